"""The verdict on other data: what a prompt may know, what is tuned on what, and what is kept."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import records
import verdict

import binllm_utils as bu


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """All that an LLM was loaded, tuned and asked for: a list of what happened."""
    happened = []

    def tune(model, _, prompts, labels, folder, **options):
        happened.append(("tuned", prompts, list(labels), options))
        folder.mkdir(parents=True)
        return model, pd.DataFrame({"seconds": [3.0]})

    def score(model, _, prompts, key, size):
        happened.append((model, prompts))
        return np.linspace(0, 1, len(prompts)), 2.0 * len(prompts)

    monkeypatch.setattr(bu, "ROOT", tmp_path)
    monkeypatch.setattr(bu, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(bu, "load_llm", lambda name: (name, "tokenizer"))
    monkeypatch.setattr(bu, "tune", tune)
    monkeypatch.setattr(bu, "load_adapter", lambda model, folder: f"{model} after {folder.name}")
    monkeypatch.setattr(verdict.results, "score_in_parts", score)
    for name in ("pairs", "all_titles"):
        weights = tmp_path / "data" / "adapters" / name / "adapter_model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.write_bytes(name.encode())
    return happened


def test_a_prompt_knows_what_was_rated_before_its_row_and_no_more(toy, toy_codes):
    rows = toy.test
    style = "{likes} | {title} | {user} | {item}"
    prompts = verdict.bs.prompts_before(toy, toy_codes, rows, style)
    later = toy.test.assign(label=1 - toy.test.label)  # whatever users will say of these rows and after them
    first = rows.timestamp == rows.groupby("user").timestamp.transform("min")
    changed = verdict.bs.prompts_before(replace(toy, test=later), toy_codes, later, style)
    assert first.any() and not first.all() and prompts != changed
    assert [a for a, mine in zip(prompts, first) if mine] == [b for b, mine in zip(changed, first) if mine]
    now, _ = verdict.bs.codes_before(toy, toy_codes, rows)
    for prompt, row, code in zip(prompts, rows.itertuples(), now):
        _, title, user, item = prompt.split(" | ")
        assert title == f'"{toy.titles[row.item]}"'
        assert user == bu.to_bits(code) and item == bu.to_bits(toy_codes.items[row.item])


def test_each_reader_is_asked_once_as_it_was_left_and_once_tuned(toy, toy_codes, asked, tmp_path):
    rows, then, tuned_on = toy.test, verdict.adapters.cut_earlier(toy), toy.train.tail(8)
    other = bu.Codes(1 - toy_codes.users, toy_codes.items)
    for _ in range(2):  # the second time all is there already
        for learned in (None, (then, other, tuned_on)):
            for reader in verdict.bs.READERS:
                verdict.with_llm(tmp_path, toy, toy_codes, rows, reader, learned)
    models = [f"{bu.SMOLLM2} after {name}" for name in ("all_titles", "pairs")]
    assert [step[0] for step in asked] == [*models, "tuned", models[0], "tuned", models[1]]
    titles, codes, tuned = asked[0][1], asked[1][1], asked[2]
    assert all("alike?" in prompt for prompt in codes) and not any("alike?" in prompt for prompt in titles)
    assert asked[3][1] == titles and tuned[2] == list(tuned_on.label) and tuned[3] == {"lr": verdict.LR}
    assert asked[4][1] == verdict.bs.prompts_before(
        then, other, tuned_on, verdict.bs.bx.BIT_BY_BIT
    )  # the codes of then
    table = pd.read_csv(tmp_path / "verdict.csv").set_index("method")
    assert table.tuning_rows.fillna(0).tolist() == [0, 0, 8, 8] and (table.seconds_per_row == 2).all()
    assert not any((tmp_path / "cache" / "checkpoints").iterdir())
    answers = records.read_answers(tmp_path / "answers-test.parquet", toy)
    assert list(answers.columns) == list(table.index) and answers.index.equals(rows.index)
    assert table.auc.to_numpy() == pytest.approx(bu.auc(rows.label, np.linspace(0, 1, len(rows))), abs=1e-4)


def test_another_adapter_is_asked_anew(toy, toy_codes, asked, tmp_path):
    verdict.with_llm(tmp_path, toy, toy_codes, toy.test, "titles")
    (tmp_path / "data" / "adapters" / "all_titles" / "adapter_model.safetensors").write_bytes(b"taught anew")
    verdict.with_llm(tmp_path, toy, toy_codes, toy.test, "titles")
    assert len(asked) == 2 and len(pd.read_csv(tmp_path / "verdict.csv")) == 1


def test_halved_counting_ranks_as_counting(toy, toy_codes, tmp_path):
    verdict.without_llm(tmp_path, toy, toy_codes, toy.test)
    answers = records.read_answers(tmp_path / "answers-test.parquet", toy)
    wanted = {"counting": bu.popularity_baseline(toy, toy.test)}
    wanted["counting so far"] = verdict.bs.counting_before(toy, toy.test)
    table = pd.read_csv(tmp_path / "verdict.csv").set_index("method")
    for name, scores in wanted.items():
        assert answers[name].to_numpy() == pytest.approx(scores / 2, abs=1e-6)
        assert table.auc[name] == pytest.approx(bu.auc(toy.test.label, scores), abs=1e-4)
    assert "codes so far" in table.index
