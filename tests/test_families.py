"""The families of notebook 08: what a new token stands for, what is asked, and what `scripts/families.py` keeps."""

from dataclasses import replace

import families
import numpy as np
import pandas as pd
import pytest
import records
import results
import torch

import binllm_utils as bu

TINY = replace(bu.PROFILES["smoke"], epochs=2, tune_rows=24, eval_rows=100)


@pytest.fixture
def scope(toy, toy_codes, monkeypatch):
    """The notebook's own cells, on the toy data."""
    monkeypatch.setattr(bu, "load_ml1m", lambda: toy)
    monkeypatch.setattr(bu, "cached_codes", lambda *_: toy_codes)
    return families.lesson(TINY)


def test_the_prompt_differs_in_the_two_names_alone(scope, toy, toy_codes):
    rows = toy.test.head(5)
    plain = bu.build_prompts(toy, rows, toy_codes)
    assert scope["prompts_of"]("text codes", rows) == plain
    assert scope["prompts_of"]("titles only", rows) == bu.build_prompts(toy, rows, style="text")
    for family in families.RATES:
        for prompt, text, u, i in zip(scope["prompts_of"](family, rows), plain, rows.user, rows.item):
            assert prompt.count(f"<user_{u}>") == prompt.count(f"<film_{i}>") == 1
            codes = bu.to_bits(toy_codes.users[u]), bu.to_bits(toy_codes.items[i])
            assert prompt.replace(f"<user_{u}>", codes[0]).replace(f"<film_{i}>", codes[1]) == text


def test_equal_codes_are_still_two_names(scope, toy, toy_codes):
    toy_codes.items[:] = toy_codes.users[0]
    row = toy.test[toy.test.user == 0].head(1)
    prompt = scope["prompts_of"]("new tokens", row)[0]
    assert prompt.index("<user_0>") < prompt.index(f"<film_{row.item.item()}>")


@pytest.mark.parametrize("family", families.RATES)
def test_a_new_token_is_its_own_vector_and_words_stay(scope, llm, family, toy):
    model, tokenizer = llm
    before = model.get_input_embeddings()
    scope["with_ids"](model, tokenizer, family)
    layer, said = model.get_input_embeddings(), tokenizer("a film <user_3> and <film_7>").input_ids
    new = [token for token in said if token >= layer.first]
    assert [token - layer.first for token in new] == [3, toy.n_users + 7]  # users, then films, whole
    out, words = layer(torch.tensor([said])), torch.tensor([[token for token in said if token < layer.first]])
    assert torch.equal(out[:, [token < layer.first for token in said]], before(words))
    wanted = layer.vectors(torch.tensor([3, toy.n_users + 7])).to(out.dtype)
    assert torch.equal(out[0, [token >= layer.first for token in said]], wanted)
    spread = layer.vectors(torch.arange(toy.n_users + toy.n_items)).std()
    assert spread.item() == pytest.approx(before.weight.float().std().item(), rel=0.1)  # of a word's size


def test_a_mapped_vector_is_the_recommenders(scope, llm):
    """Users of one vector get one place in the model's space; a film of the same numbers gets another."""
    users, items = scope["recommender"].vectors()
    users[3] = users[5]
    items[5] = users[5]
    scope["recommender"].vectors = lambda: (users, items)
    scope["with_ids"](*llm, "mapped embeddings")
    mapped = llm[0].get_input_embeddings().vectors(torch.tensor([3, 5, len(users) + 5]))
    assert torch.equal(mapped[0], mapped[1]) and not torch.allclose(mapped[1], mapped[2])


@pytest.fixture
def kept(scope, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(bu, "CACHE", tmp_path)
    monkeypatch.setattr(bu, "OUTPUT", tmp_path)
    monkeypatch.setattr(families, "RATES", {"new tokens": (1e-9, 3e-2), "mapped embeddings": (1e-3,)})
    return scope, {"valid": toy.valid, "test": toy.test}, tmp_path / "results" / "toy"


def test_valid_chooses_the_rate_and_test_is_asked_once(kept, toy, capsys, monkeypatch):
    scope, parts, folder = kept
    asked, real = [], results.score_in_parts
    good = {"valid": parts["valid"].label, "test": parts["test"].label}

    def answered(model, tokenizer, prompts, key):
        real(model, tokenizer, prompts, key)
        asked.append(key)
        split = key.rsplit("-", 1)[1]
        return (good[split] if "0.03" in key else 1 - good[split]) * 0.5 + 0.2, 1.0

    monkeypatch.setattr(results, "score_in_parts", answered)
    families.with_vectors("new tokens", scope, TINY, parts)
    table = pd.read_csv(folder / "families.csv")
    assert [(row.split, row.lr, row.auc) for row in table.itertuples()] == [
        ("valid", 1e-9, 0.0),
        ("valid", 3e-2, 1.0),
        ("test", 3e-2, 1.0),
    ]
    assert len(asked) == 3 and "AUC 1.0 on test at the rate 0.03" in capsys.readouterr().out
    assert (table.tuning_rows >= 24).all() and (table.others == 50 * 576).all() and (table.perplexity > 1).all()
    answers = records.read_answers(folder / "families-smoke.parquet", toy)
    assert not list((folder.parents[1] / "checkpoints").iterdir())  # nothing is needed any more
    assert list(answers) == ["new tokens"] and np.allclose(answers["new tokens"], parts["test"].label * 0.5 + 0.2)
    families.with_vectors("new tokens", scope, TINY, parts)
    assert len(asked) == 3  # all of it is there
    monkeypatch.setattr(families, "VERSION", 2)
    good |= {split: 1 - labels for split, labels in good.items()}  # now the other rate is the better one
    families.with_vectors("new tokens", scope, TINY, parts)
    table = pd.read_csv(folder / "families.csv").query("split == 'test'")
    assert table.lr.tolist() == [1e-9] and len(asked) == 6  # no line of the rate that was better before


def test_new_vectors_and_lora_learn_and_the_rest_stays(kept, tmp_path):
    scope, parts, _ = kept
    for family in families.RATES:
        model, tokenizer, curve = families.tuned(scope, family, 1e-3, TINY, tmp_path / family)
        moved = {name.split(".vectors.")[-1] for name, p in model.named_parameters() if p.requires_grad}
        assert any("lora_" in name for name in moved)
        assert {"weight"} <= moved if family == "new tokens" else {"map.0.weight", "map.2.bias"} <= moved
        again, _, same = families.tuned(scope, family, 1e-3, TINY, tmp_path / family)  # from its checkpoint
        assert same.loss.tolist() == curve.loss.tolist()
        ids = torch.arange(50)
        vectors = [each.get_input_embeddings().vectors(ids) for each in (model, again)]
        assert torch.equal(*vectors)


def test_a_run_of_results_keeps_its_answers(kept, toy, toy_codes):
    scope, parts, folder = kept
    results.answer("text", 0, toy, TINY)
    families.from_results("titles only", scope, TINY, parts)
    line = pd.read_csv(folder / "families.csv").iloc[0]
    p = records.read_answers(folder / "answers-smoke-test.parquet", toy)["text"]
    assert line.family == "titles only" and line.others == 0 and line.rows == 100 and line.perplexity > 1
    assert line.auc == pytest.approx(bu.auc(toy.test.label, p), abs=1e-4)
    assert line.minutes >= 0 and line.tuning_rows >= TINY.tune_rows


def test_a_model_that_is_gone_is_not_tuned_again(kept, toy, tmp_path, monkeypatch):
    scope, parts, folder = kept
    results.answer("text", 0, toy, TINY)
    (adapter,) = (tmp_path / "adapters").glob("smoke-*")  # there is a lock beside it
    adapter.rename(tmp_path / "away")
    monkeypatch.setattr(bu, "tune", None)
    families.from_results("titles only", scope, TINY, parts)
    line = pd.read_csv(folder / "families.csv").iloc[0]
    assert line.auc > 0 and np.isnan(line.perplexity) and line.others == 0


def test_answers_that_are_not_there_are_asked_for(kept):
    scope, parts, _ = kept
    with pytest.raises(OSError, match="python scripts/results.py makes it"):
        families.from_results("titles only", scope, TINY, parts)


def test_an_unknown_family_is_named():
    with pytest.raises(
        SystemExit, match="there is no family 'codes'; choose from new tokens, mapped embeddings, titles"
    ):
        families.main(["codes"])
