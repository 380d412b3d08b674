"""The script that asks every LLM about the same rows: what it keeps, what it makes again, what its controls change."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import results as script

import binllm_utils as bu


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(bu, "CACHE", tmp_path)
    return script


SMOKE = bu.PROFILES["smoke"]


def test_answers_of_several_runs_stand_side_by_side(toy, results, tmp_path):
    few, more = toy.test.iloc[[3, 5]], toy.test.iloc[[5, 3, 9]]
    results.keep(SMOKE, "test", "a", few, np.array([0.1, 0.2]))
    results.keep(SMOKE, "test", "b", more, np.array([0.5, 0.3, 0.9]))
    results.keep(SMOKE, "test", "a", few, np.array([0.15, 0.25]))  # made again: takes the place of the first
    table = bu.read_scores(tmp_path / "smoke/data/results/scores-smoke-test.csv")
    assert table.index.tolist() == [3, 5, 9]
    assert table.loc[[3, 5], "a"].tolist() == [0.15, 0.25] and np.isnan(table.a[9])
    assert table.b.tolist() == [0.3, 0.5, 0.9]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a,b\n1,2\n", "not scores; its columns must be `row`"),
        ("row,a\n1,x\n", "not scores; its columns must be `row`"),
        ("row,a\n4,.5\n4,.6\n", r"line 3: row 4 is there twice; drop one"),
        ("row,a\n4,.5\n,.6\n", r"line 3: row nan is not the place of a row"),
        ("row,a,b\n4,.5,.5\n7,.5,1.5\n", r"line 3: row 7 holds an answer not from 0 to 1"),
    ],
)
def test_damaged_scores_are_named(tmp_path, text, message):
    path = tmp_path / "scores.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"scores\.csv.*{message}"):
        bu.read_scores(path)


def test_missing_scores_name_the_command(tmp_path):
    with pytest.raises(OSError, match=r"none\.csv is not there; python notebooks/results\.py makes it"):
        bu.read_scores(tmp_path / "none.csv")


def test_damaged_scores_are_kept_when_new_ones_come(toy, results, tmp_path):
    path = tmp_path / "smoke/data/results/scores-smoke-test.csv"
    path.parent.mkdir(parents=True)
    path.write_text("row,a\n4,.5\n4,.6\n")
    with pytest.raises(ValueError, match="twice"):
        results.keep(SMOKE, "test", "b", toy.test, np.zeros(len(toy.test)))
    assert path.read_text() == "row,a\n4,.5\n4,.6\n"


def test_a_run_is_made_once_and_again_when_its_codes_change(llm, toy, toy_codes, results, tmp_path, monkeypatch):
    tokenizer, asked, codes = llm[1], [], [toy_codes]
    monkeypatch.setattr(bu, "cached_codes", lambda dataset, bits: codes[0])
    monkeypatch.setattr(
        bu, "score", lambda model, tokenizer, prompts: asked.append(prompts) or np.full(len(prompts), 0.5)
    )
    monkeypatch.setattr(results, "load", lambda *_: (None, tokenizer, "codes", 3.0))
    results.answer("codes_only", 0, toy, SMOKE)
    assert len(asked) == 2  # valid and test
    results.answer("codes_only", 0, toy, SMOKE)
    assert len(asked) == 2
    row = pd.read_csv(tmp_path / "smoke/data/results/runs.csv").iloc[0]
    assert row.code_tokens == 32 and row.prompts == sum(map(len, asked)) and row.tokens > row.code_tokens
    monkeypatch.setitem(bu.TEMPLATES, "text", "another variant's prompt")
    results.answer("codes_only", 0, toy, SMOKE)
    assert len(asked) == 2
    codes[0] = bu.Codes(1 - toy_codes.users, toy_codes.items)
    results.answer("codes_only", 0, toy, SMOKE)
    assert len(asked) == 4 and len(pd.read_csv(tmp_path / "smoke/data/results/runs.csv")) == 1
    monkeypatch.setitem(bu.TEMPLATES, "codes", "{user} and {item}?")
    results.answer("codes_only", 0, toy, SMOKE)
    assert len(asked) == 6 and "?" in asked[-1][0]
    monkeypatch.setitem(results.RUNS, "codes_only", ("codes_only", "bits", 32, 1 / 10))
    results.answer("codes_only", 0, toy, SMOKE)
    assert len(asked) == 8 and len(asked[-1]) < len(asked[-3])  # fewer rows are another run
    results.answer("codes_only", 1, toy, SMOKE)
    assert pd.read_csv(tmp_path / "smoke/data/results/runs.csv").seed.tolist() == [0, 1]
    monkeypatch.setattr(results, "load", lambda *_: (None, tokenizer, "bit by bit", 3.0))
    results.answer("bit_by_bit", 0, toy, SMOKE)
    assert pd.read_csv(tmp_path / "smoke/data/results/runs.csv").code_tokens.iloc[-1] == 3 * toy_codes.bits - 1


def test_two_steps_are_stale_when_the_prompt_of_the_first_changes(results, monkeypatch):
    before = {variant: results.prompts_of(variant) for variant in (*bu.VARIANTS, "long")}
    monkeypatch.setitem(bu.TEMPLATES, "text", "other words")
    assert [v for v in before if results.prompts_of(v) != before[v]] == ["text", "two_step"]


def test_smaller_samples_are_parts_of_larger_ones(ml1m, results):
    patient = bu.PROFILES["patient"]
    whole, part = (results.sampled(ml1m, patient, share=share) for share in (1, 1 / 8))
    assert len(whole) == 2000 and len(part) == 250 and set(part.index) < set(whole.index)
    assert results.sampled(ml1m, patient, share=results.ALL) is ml1m.test
    assert len(results.sampled(ml1m, patient, "valid", results.ALL)) == 500


def fields(prompt):
    """(titles liked, the film's title, user code, item code) read out of a prompt with the codes side by side."""
    likes, title, user, item = re.search(
        r"following movies: (.*)\. Would .* titled (.*)\? Answer.* User (\d+) movie (\d+) alike", prompt
    ).groups()
    return likes, title, user, item


@pytest.mark.parametrize(
    "name, changed, most",
    [
        ("another user's code", "user", 0),
        ("another user's likes", "likes", 0.1),
        ("another film's title", "title", 0),
        ("likes up to the end of training", "likes", 0.5),
        ("likes of earlier days", "likes", 0.9),
    ],
)
def test_a_control_changes_one_thing(ml1m, results, name, changed, most):
    """most: the share of prompts in which even that may be as it was, such as those of users who had liked nothing."""
    rows = bu.sample_rows(ml1m.test, 200)
    rng = np.random.default_rng(0)  # codes of which no two are the same
    codes = bu.Codes(*(rng.integers(0, 2, (n, 32), dtype=np.uint8) for n in (ml1m.n_users, ml1m.n_items)))
    before = pd.DataFrame(map(fields, bu.build_prompts(ml1m, rows, codes, "side by side")))
    after = pd.DataFrame(map(fields, results.CONTROLS[name](ml1m, rows, codes, "side by side")))
    before.columns = after.columns = ["likes", "title", "user", "item"]
    same = (before == after).mean()
    assert same.drop(changed).eq(1).all()
    assert same[changed] <= most


def test_codes_so_far_are_those_of_their_own_row(ml1m, results, monkeypatch):
    """All that changes is the user's code, and it is the code of that very row."""
    monkeypatch.setattr(results.adapters, "LONG_CODES", (32, 1))
    asked, codes, rows = [], bu.cached_codes(ml1m, 32, 1), ml1m.test
    monkeypatch.setattr(results, "make", lambda *args: args[3](asked.extend, "side by side", codes))
    monkeypatch.setattr(results, "keep", lambda *args: None)
    results.so_far(ml1m, SMOKE)
    model, _ = bu.fit_hybrid(ml1m, seed=1, progress=False)
    now = bu.codes_so_far(model, ml1m, rows, 32, 1)
    before = bu.build_prompts(ml1m, rows, bu.Codes(codes.users, now.items), "side by side")
    for prompt, old, code in zip(asked, before, now.users, strict=True):
        new, old = fields(prompt), fields(old)
        assert new[2] == bu.to_bits(code) and new[:2] + new[3:] == old[:2] + old[3:]
    newcomer = rows.user[~rows.user.isin(ml1m.train.user)].mode()[0]
    assert len({code.tobytes() for code in now.users[rows.user == newcomer]}) > 10


def test_likes_of_earlier_days_show_no_like_of_that_day(ml1m, results):
    rows = bu.sample_rows(ml1m.test, 100)
    codes = bu.cached_codes(ml1m)
    log = ml1m.log[ml1m.log.label == 1]
    for prompt, row in zip(
        results.CONTROLS["likes of earlier days"](ml1m, rows, codes, "side by side"), rows.itertuples()
    ):
        today = log[(log.user == row.user) & (log.timestamp // 86400 == row.timestamp // 86400)].item
        assert not any(f'"{ml1m.titles[item]}"' in fields(prompt)[0] for item in today)


def test_rewording_fails_when_the_template_has_other_words(toy, toy_codes, results):
    with pytest.raises(ValueError, match="does not hold 'Would the user enjoy'"):
        results.CONTROLS["hate"](toy, toy.test, toy_codes, "codes")


def test_recipes_change_titles_or_digits_alone(ml1m, results):
    rows, codes = bu.sample_rows(ml1m.test, 300), bu.cached_codes(ml1m)
    prompts = bu.build_prompts(ml1m, rows, codes, "side by side")
    for prompt, liked in zip(prompts, bu.liked_before(ml1m, rows), strict=True):
        old, new = fields(prompt), fields(results.three_titles(prompt))
        titles = ", ".join(f'"{ml1m.titles[i]}"' for i in liked[-3:]) or "none so far"
        assert new == (titles, *old[1:])
        grouped = results.in_groups(prompt)
        assert grouped.replace(" ", "") == prompt.replace(" ", "") and len(grouped) == len(prompt) + 6


def test_a_recipe_is_tried_once_from_its_own_start(llm, toy, toy_codes, results, tmp_path, monkeypatch):
    tokenizer, profile, tuned = llm[1], replace(SMOKE, eval_rows=1000, tune_rows=64), []

    def tune(start, tokenizer, prompts, labels, *, batch_size, lr):
        tuned.append((start, prompts, lr))
        return start, pd.DataFrame({"seconds": [7.0]})

    monkeypatch.setattr(bu, "cached_codes", lambda dataset: toy_codes)
    monkeypatch.setattr(bu, "load_llm", lambda *args, **options: ("plain", tokenizer))
    monkeypatch.setattr(bu, "literate_llm", lambda profile, style: (f"reads {style}", tokenizer, "adapter"))
    monkeypatch.setattr(bu, "tune", tune)
    monkeypatch.setattr(bu, "score", lambda model, tokenizer, prompts: np.linspace(0.2, 0.7, len(prompts)))
    unseen = "bit by bit, on rows the codes have not seen"
    for name in ("as it is", "without bit literacy", "without titles", unseen, "as it is"):
        results.recipe(name, toy, profile)
    starts = [("reads side by side", 1e-4), ("plain", 1e-3), ("reads codes", 1e-4), ("reads bit by bit", 1e-4)]
    assert [(start, lr) for start, _, lr in tuned] == starts
    assert tuned[0][1] == tuned[1][1] != tuned[2][1]
    rows, codes = results.adapters.unseen_rows(toy)
    assert set(tuned[3][1]) <= set(bu.build_prompts(toy, rows, codes, "bit by bit"))
    table = pd.read_csv(tmp_path / "smoke/data/results/recipes.csv").set_index("recipe")
    assert table.seconds.eq(7).all() and table.tokens["without titles"] < table.tokens["as it is"]


def test_candidates_hold_the_liked_films_and_unseen_ones_only(ml1m, results):
    table = results.candidates(ml1m, 12, per_user=20)
    assert table.user.nunique() == 12 and (table.groupby("user").size() == 20).all()
    assert not table.duplicated(["user", "item"]).any()
    for user, films in table.groupby("user"):
        test = ml1m.test[ml1m.test.user == user]
        assert set(films.item[films.label == 1]) <= set(test.item[test.label == 1])
        assert 1 <= films.label.sum() <= 10
        assert not set(films.item[films.label == 0]) & set(ml1m.log.item[ml1m.log.user == user])
        assert (films.timestamp == test.timestamp.min()).all()
    assert table.equals(results.candidates(ml1m, 12, per_user=20))


def test_families_are_compared_once(results, tmp_path, monkeypatch):
    calls, path = [], tmp_path / "smoke/data/results/families.csv"
    monkeypatch.setattr(results.subprocess, "run", lambda command, env, check: calls.append(env["BINLLM_PROFILE"]))
    path.parent.mkdir(parents=True)
    for lines, runs in ((3, 1), (4, 1)):
        path.write_text("family,profile\n" + "a,smoke\n" * lines + "a,cpu\n")
        results.families(None, SMOKE)
        assert calls == ["smoke"] * runs


@pytest.mark.parametrize(
    "wanted, made",
    [
        (["one_step, seed 1"], [("one_step", 1)]),
        (["text", "long"], [("text", 0), ("long", 0)]),
        ([], [(name, 0) for name in script.RUNS] + [(name, s) for s in (1, 2) for name in script.DRAWN]),
    ],
)
def test_other_seeds_are_made_when_asked_for(results, monkeypatch, wanted, made):
    answers = []
    monkeypatch.setattr(results.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(results, "answer", lambda run, seed, *_: answers.append((run, seed)))
    for other in ("control", "recipe", "so_far", "flips", "ranking", "families"):
        monkeypatch.setattr(results, other, lambda *_: None)
    results.main(wanted)
    assert answers == made


def test_an_unknown_run_is_named(results):
    with pytest.raises(SystemExit, match="there is no run 'nothing'; choose from control, recipe, text, one_step"):
        results.main(["nothing"])


def test_the_committed_answers_can_be_read_and_say_how_they_were_made(ml1m, results):
    folder = bu.ROOT / "data/results"
    runs = pd.read_csv(folder / "runs.csv")
    assert not runs.duplicated(["run", "profile"]).any() and runs[["hardware", "versions", "commit"]].notna().all(
        axis=None
    )
    for split in ("valid", "test"):
        table = bu.read_scores(folder / f"scores-patient-{split}.csv")
        assert set(table) <= set(runs.run[runs.profile == "patient"])
        for run in table:
            name = run.split(", seed")[0]
            if name in results.RUNS:
                asked = results.sampled(ml1m, bu.PROFILES["patient"], split, results.RUNS[name][3])
                assert table[run].dropna().index.equals(asked.index.sort_values()), run
