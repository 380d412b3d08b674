"""The script that makes the records: each run once, again when what it was made from changes, nothing lost."""

import io
import json

import numpy as np
import pandas as pd
import pytest
import records
import results
import torch
from conftest import make_dataset, make_rows

import binllm_llm
import binllm_utils as bu

SMOKE = bu.PROFILES["smoke"]


@pytest.fixture
def small(toy, toy_codes, tmp_path, monkeypatch):
    """The script on toy data and two layers, every file of it under tmp_path; counts what is tuned."""
    tuned, real = [], bu.tune
    monkeypatch.setattr(bu, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(bu, "OUTPUT", tmp_path)
    codes = {"now": toy_codes}
    monkeypatch.setattr(bu, "cached_codes", lambda *_, **__: codes["now"])

    def noted(model, tokenizer, prompts, labels, **options):
        tuned.append((list(prompts), options))
        return real(model, tokenizer, prompts, labels, **options)

    monkeypatch.setattr(bu, "tune", noted)
    return toy, codes, tuned, tmp_path / "results" / "toy"


def test_a_run_is_made_once_and_again_when_its_codes_change(small):
    toy, codes, tuned, folder = small
    for _ in range(2):
        results.answer("codes_only", 0, toy, SMOKE)
    assert len(tuned) == 1 and tuned[0][1]["lora"] == "all"
    table = pd.read_csv(folder.parent / "metrics.csv")
    assert table.split.tolist() == ["valid", "test"] and table.variant.tolist() == ["codes_only"] * 2
    answers = records.read_answers(folder / "answers-smoke-test.parquet", toy)
    assert answers.codes_only.between(0, 1).all() and len(answers) == SMOKE.eval_rows
    codes["now"] = bu.Codes(1 - codes["now"].users, codes["now"].items)
    results.answer("codes_only", 0, toy, SMOKE)
    assert len(tuned) == 2
    results.answer("text", 0, toy, SMOKE)
    codes["now"] = bu.Codes(1 - codes["now"].users, codes["now"].items)
    results.answer("text", 0, toy, SMOKE)  # titles only: other codes change nothing
    assert len(tuned) == 3
    answers = records.read_answers(folder / "answers-smoke-test.parquet", toy)
    assert set(answers) == {"codes_only", "text"}


def test_another_data_set_takes_no_place_of_the_firsts(small, toy):
    """Answers, runs, adapters and parts of runs; also where it has as many test rows, or the same name."""
    _, _, tuned, folder = small
    other = make_dataset(test=toy.test.sample(frac=1, random_state=0).reset_index(drop=True), name="other")
    same_name = make_dataset(train=make_rows(7, 400))
    for data in (toy, other, toy, same_name, toy):
        results.answer("codes_only", 0, data, SMOKE)
    assert len(tuned) == 3  # toy, other, its namesake; the last time toy's adapter is in the cache
    for data in (toy, other):
        place = folder.parent / data.name
        answers = records.read_answers(place / "answers-smoke-test.parquet", data).codes_only
        assert set(pd.read_csv(place / "runs.csv").run) == {"codes_only"} and len(answers) == SMOKE.eval_rows
    made = {
        results.card_of(data, None, SMOKE, results.Run("text"), results.TEXT, 0)["rows"] for data in (toy, same_name)
    }
    assert len(made) == 2


def test_two_steps_begin_with_the_first_one_tuned_before(small, monkeypatch):
    toy, _, tuned, folder = small
    noted = bu.tune

    def five_seconds(*args, **options):
        model, curve = noted(*args, **options)
        return model, curve.assign(seconds=5.0)

    monkeypatch.setattr(bu, "tune", five_seconds)
    results.answer("text", 0, toy, SMOKE)
    results.answer("two_step", 0, toy, SMOKE)
    assert len(tuned) == 2  # the first step is read from the cache
    assert "Leverage" in tuned[0][0][0] and "Additionally" in tuned[1][0][0]
    one = results.card_of(toy, None, SMOKE, results.Run("text"), results.TEXT, 0)
    assert one != results.card_of(toy, None, SMOKE, results.Run("text", history="row"), results.TEXT, 0)
    seconds = pd.read_csv(folder / "runs.csv").set_index("run").tuning_seconds
    assert seconds["text"] == 5 and seconds["two_step"] == 10  # both of its steps


def test_history_by_row_is_asked_about_on_valid_only(small):
    toy, _, tuned, folder = small
    results.answer("text, history by row", 0, toy, SMOKE)
    results.answer("text, history by row", 0, toy, SMOKE)
    table = pd.read_csv(folder.parent / "metrics.csv")
    assert len(tuned) == 1 and table.split.tolist() == ["valid"] and table.variant.tolist() == ["text, history by row"]
    assert not (folder / "answers-smoke-test.parquet").exists()


def test_lessons_are_examined_as_they_were_left(small, monkeypatch, capsys):
    """Not tuned; and where the adapter is for another LLM, not asked at all."""
    toy, _, tuned, folder = small
    monkeypatch.setattr(results, "fits", lambda *_: False)
    results.answer("title lessons", 0, toy, SMOKE)
    assert "nothing to ask without its adapter" in capsys.readouterr().out and not folder.exists()
    model, _ = bu.load_llm(layers=2)
    model = binllm_llm.with_lora(model, "all").eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    monkeypatch.setattr(bu, "ROOT", folder.parent)
    curve = pd.DataFrame({"step": [1, 2], "rows": [8, 8], "loss": [0.7, 0.6], "seconds": [1.0, 3.5]})
    card = {"llm": bu.SMOLLM2}
    bu.save_adapter(model, folder.parent / "data" / "adapters" / "all_titles", card, curve)
    monkeypatch.setattr(results, "fits", lambda start, _: start == ("all_titles",))
    results.answer("title lessons", 0, toy, SMOKE)
    rows = bu.sample_rows(toy.test, SMOKE.eval_rows)
    p = bu.score(model, bu.load_llm(layers=2)[1], bu.build_prompts(toy, rows, style="text"), progress=False)
    answers = records.read_answers(folder / "answers-smoke-test.parquet", toy)
    assert not tuned and np.allclose(answers["title lessons"], p)
    run = pd.read_csv(folder / "runs.csv").iloc[0]
    assert (run.tuning_rows, run.tuning_seconds) == (16, 3.5)


def test_two_adapters_together_change_the_weights_by_both_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(bu, "ROOT", tmp_path)
    for seed, name in enumerate(("codes", "titles")):
        torch.manual_seed(seed)
        model = binllm_llm.with_lora(bu.load_llm(layers=2, nf4=False)[0], "all")
        for weight in (weight for place, weight in model.named_parameters() if "lora_B" in place):
            weight.data.normal_(std=0.05)
        curve = pd.DataFrame({"step": [1, 2], "rows": [8, 8], "loss": [0.7, 0.6], "seconds": [1.0, 3.5]})
        bu.save_adapter(model, tmp_path / "data" / "adapters" / name, {"llm": bu.SMOLLM2}, curve)
    model, tokenizer = bu.load_llm(layers=2, nf4=False)
    asked = ["Is it so?\n#Answer:", "Or the other way round, as a longer prompt says?\n#Answer:"]
    plain = bu.score(model, tokenizer, asked, progress=False)
    both, curve = results.started(model, ("codes", "titles"))
    found = np.log(bu.score(both, tokenizer, asked, progress=False))
    added = bu.load_llm(layers=2, nf4=False)[0]
    for name in ("titles", "codes"):  # one after the other written into the weights
        added = bu.load_adapter(added, tmp_path / "data" / "adapters" / name).merge_and_unload()
    assert np.allclose(found, np.log(bu.score(added, tokenizer, asked, progress=False)), atol=1e-3)
    assert np.abs(found - np.log(plain)).max() > 0.1
    assert curve.seconds.tolist() == [1, 3.5, 4.5, 7] and curve.rows.sum() == 32
    both, tuned = bu.tune(both, tokenizer, asked, [1, 0], lr=1e-2, progress=False)  # it is the sum that goes on
    found = bu.score(both, tokenizer, asked, progress=False)
    bu.save_adapter(both, tmp_path / "data" / "adapters" / "tuned", {"llm": bu.SMOLLM2}, tuned)
    again = bu.load_adapter(bu.load_llm(layers=2, nf4=False)[0], tmp_path / "data" / "adapters" / "tuned")
    assert np.allclose(found, bu.score(again, tokenizer, asked, progress=False), atol=1e-6)
    deeper = binllm_llm.with_lora(bu.load_llm(layers=3, nf4=False)[0], "all")
    bu.save_adapter(deeper, tmp_path / "data" / "adapters" / "deeper", {"llm": bu.SMOLLM2}, curve)
    with pytest.raises(ValueError, match="was tuned on 3 layers, the model given has 2"):
        results.started(bu.load_llm(layers=2, nf4=False)[0], ("codes", "deeper"))


def test_the_tuned_model_that_ships_is_of_todays_run_and_of_the_shipped_codes():
    dataset, run = bu.load_ml1m(), results.RUNS["one_step"]
    card = json.loads((bu.ROOT / "data" / "adapters" / "one_step" / "card.json").read_text())
    wanted = results.card_of(
        dataset, bu.cached_codes(dataset), bu.PROFILES["full"], run, results.VARIANTS[run.variant], 0
    )
    assert {name: card[name] for name in wanted} == wanted
    runs = pd.read_csv(bu.ROOT / "data/results/runs.csv").query("run == 'one_step' and profile == 'full'")
    assert runs.tuning_seconds.tolist() == [card["seconds"]]  # the run whose answers are kept


def test_the_papers_variants_use_the_papers_prompts_and_start_plain():
    for name, style in (
        ("text", "text"),
        ("codes_only", "codes"),
        ("one_step", "text+codes"),
        ("two_step", "text+codes"),
    ):
        assert results.VARIANTS[name].style == style and not results.VARIANTS[name].start
    assert results.VARIANTS["two_step"].first is results.TEXT
    plain = {name for name, run in results.RUNS.items() if not run.nf4}
    assert plain == {"codes_only, float32", "code lessons"}  # the latter as its adapter was taught


def test_turned_codes_are_asked_about_from_their_last_bit(small, monkeypatch):
    toy, codes, tuned, folder = small
    monkeypatch.setitem(results.RUNS, "turned", results.Run("codes_only", turned=True))
    for name in ("codes_only", "turned"):
        results.answer(name, 0, toy, SMOKE)
    rows = bu.sample_sittings(toy, SMOKE.tune_rows, 0)
    straight, turned = (prompts for prompts, _ in tuned)
    for one, other, user, item in zip(straight, turned, rows.user, rows.item):
        for text in (bu.to_bits(codes["now"].users[user]), bu.to_bits(codes["now"].items[item])):
            assert text in one and text[::-1] in other
    assert straight != turned
    assert set(pd.read_csv(folder.parent / "metrics.csv").variant) == {"codes_only", "codes_only, last bit first"}


def test_an_adapter_for_another_llm_is_said_to_be_left_out(capsys, monkeypatch):
    assert results.fits(("pairs",), bu.PROFILES["cpu"])
    assert not results.fits(("pairs",), SMOKE)  # two layers only
    assert "begins without it" in capsys.readouterr().out


def test_sittings_are_sampled_whole(ml1m):
    rows = bu.sample_sittings(ml1m, 500)
    assert 500 <= len(rows) < 900 and rows.index.is_monotonic_increasing
    key = pd.MultiIndex.from_arrays([ml1m.train.user, bu.sittings(ml1m, ml1m.train)])
    mine = key[ml1m.train.index.isin(rows.index)]
    assert key.isin(mine).sum() == len(rows)  # no row of these sittings is left out
    assert bu.sample_sittings(ml1m, 10**6).equals(ml1m.train)
    assert not rows.equals(bu.sample_sittings(ml1m, 500, seed=1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "not answers; its columns must be `row`"),
        ("row,a\n1,x\n", "not answers"),
        ("row,a\n1,.5\n1,.6\n", r"line 3: row 1 is there twice"),
        ("row,a\n-1,.5\n", r"line 2: row -1.0 is not the place"),
        ("row,a\n1,1.5\n", r"line 2: row 1 holds an answer not from 0 to 1"),
    ],
)
def test_damaged_answers_are_named(tmp_path, toy, text, message):
    path = tmp_path / "answers.parquet"
    pd.read_csv(io.StringIO(text)).to_parquet(path, index=False)
    with pytest.raises(ValueError, match=message):
        records.read_answers(path, toy)
    with pytest.raises(OSError, match=r"results\.py makes it"):
        records.read_answers(tmp_path / "none.parquet", toy)


def test_answers_of_one_protocol_are_not_read_or_kept_for_the_other(tmp_path, ml1m, past):
    """The test rows of both are the same, so nothing but the name tells."""
    path, p = tmp_path / "answers.parquet", np.full(len(ml1m.test), 0.5)
    records.keep_answers(path, "a", past, past.test, p)
    before = path.read_bytes()
    for act in (
        lambda: records.read_answers(path, ml1m),
        lambda: records.keep_answers(path, "b", ml1m, ml1m.test, p),
    ):
        with pytest.raises(ValueError, match=r"answers\.parquet: answers about ml-1m-past, .* read for ml-1m;"):
            act()
    assert path.read_bytes() == before and list(records.read_answers(path, past)) == ["a"]
    pd.DataFrame({"a": p}, index=ml1m.test.index.rename("row")).to_parquet(path)
    with pytest.raises(ValueError, match="answers about nobody knows what"):
        records.read_answers(path, ml1m)


def test_an_unknown_run_is_named():
    with pytest.raises(SystemExit, match="there is no run 'nothing'; choose from popularity, mf paper"):
        results.main(["nothing"])


def test_the_committed_answers_are_those_of_the_committed_metrics(ml1m):
    folder = bu.ROOT / "data" / "results"
    metrics = pd.read_csv(folder / "metrics.csv")
    runs = pd.read_csv(folder / "runs.csv").query("profile == 'patient'").set_index("run")
    on_test = {run for run in runs.index if results.RUNS[run.split(", seed ")[0]].test}
    for split, asked in {"valid": set(runs.index), "test": on_test}.items():
        answers = records.read_answers(folder / f"answers-patient-{split}.parquet", ml1m)
        assert set(answers) == asked and len(asked)
        for run in asked:
            p = answers[run].dropna()
            rows = getattr(ml1m, split).loc[p.index]
            line = metrics[(metrics.model == "llm") & (metrics.split == split) & (metrics.rows == len(p))]
            line = line[np.isclose(line.auc, bu.auc(rows.label, p), atol=2e-4)]
            assert (line.seed == runs.seed[run]).any(), run


def test_scoring_that_was_cut_short_goes_on(small, monkeypatch, llm):
    """The parts that are there are not asked again, and the answers are those of one go."""
    prompts, asked = [f"{place}?\n#Answer:" for place in range(25)], []
    wanted = bu.score(*llm, prompts, progress=False)
    real = bu.score

    def cut(model, tokenizer, some):
        asked.append(len(some))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(model, tokenizer, some, progress=False)

    monkeypatch.setattr(bu, "score", cut)
    with pytest.raises(KeyboardInterrupt):
        results.score_in_parts(*llm, prompts, "key", size=10)
    p, seconds = results.score_in_parts(*llm, prompts, "key", size=10)
    assert seconds > 0 and asked == [10, 10, 10, 5] and np.allclose(p, wanted, atol=1e-5)


def test_another_llm_has_records_of_its_own(small, monkeypatch):
    """Its rows stand beside those of the profile's LLM and take no place of theirs."""
    toy, _, _, folder = small
    monkeypatch.setenv("BINLLM_PROFILE", "smoke")
    monkeypatch.delenv("BINLLM_LLM", raising=False)
    for llm in (None, bu.SMOLLM2):
        if llm:
            monkeypatch.setenv("BINLLM_LLM", llm)
        results.answer("text", 0, toy, results.own_profile())
    table = pd.read_csv(folder.parent / "metrics.csv")
    assert set(table.profile) == {"smoke", "smoke-SmolLM2-135M-Instruct"} and len(table) == 4


def test_a_changed_recipe_differs_in_what_it_names_alone(toy):
    """Without features: as `fit_codes` given none. With one part out: another fit than the whole recipe's."""
    bare = np.zeros((toy.n_items, 0), np.float32)
    made, _ = results.changed(toy, 16, 3, "ste, no features", 4)
    same, _ = bu.fit_codes(toy, 16, 3, max_epochs=4, features=bare, progress=False)
    assert np.array_equal(made.users, same.users) and np.array_equal(made.items, same.items)
    for name, (recipe, changes, featured) in results.CHANGED.items():
        built = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bu, "train_cf", lambda model, *a, built=built, **how: built.append((model, how)))
            results.changed(toy, 16, 3, name, 4)
        ((model, how),) = built
        settings = {field: getattr(bu.RECIPES[recipe], field) for field in bu.RECIPES[recipe].__dataclass_fields__}
        assert vars(model.recipe) == settings | changes and how["average"] == model.recipe.average
        assert model.features.shape[1] == (bu.item_features(toy).shape[1] if featured else 0)
