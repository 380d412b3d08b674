"""Made-up codes and questions about them, and the adapter that was taught by them."""

import json
import re
import shutil
from dataclasses import replace

import adapters
import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

import binllm_extras as bx
import binllm_utils as bu


def test_pairs_are_of_every_similarity():
    pairs = bx.code_pairs(4000, 32, seed=1)
    similarity = bu.hamming_similarity(pairs.users, pairs.items)
    assert np.histogram(similarity, bins=4, range=(0, 1))[0].min() > 800  # random pairs would all stand in the middle
    assert abs(pairs.users.mean() - 0.5) < 0.01 and abs(pairs.items.mean() - 0.5) < 0.01
    assert not np.array_equal(pairs.users, bx.code_pairs(4000, 32, seed=2).users)
    near = bx.code_pairs(4000, 32, seed=1, spread=0.1)
    similarity = bu.hamming_similarity(near.users, near.items)
    assert similarity.mean() == pytest.approx(0.5, abs=0.01)
    of_bits = (0.5**2 - 0.1**2) / 32  # the variance of 32 throws, beside that of the chances
    assert similarity.std() == pytest.approx((0.1**2 + of_bits) ** 0.5, abs=0.005)


def test_more_alike_is_more_likely_yes():
    taught = bx.alike(np.linspace(0, 1, 11))
    assert (np.diff(taught) > 0).all() and taught[5] == 0.5 and taught[0] == pytest.approx(1 - taught[10])


@pytest.mark.parametrize("where", ["alike", "codes", "side by side", "text+codes", "pairs", "bit by bit"])
def test_lessons_ask_about_the_codes_they_hold(ml1m, where):
    prompts, labels = adapters.lesson(ml1m, where, 16, 60, 0.1, seed=4)
    assert len(prompts) == len(labels) == 60 == len(set(prompts))
    for prompt, label in zip(prompts, labels):
        if where in ("pairs", "bit by bit"):
            a, b = map("".join, zip(*re.search(r"movie ([01 ]+) alike", prompt)[1].split()))
        else:
            a, b = re.findall(r"\b[01]{16}\b", prompt)
        same = 16 - (int(a, 2) ^ int(b, 2)).bit_count()
        assert label == pytest.approx(bx.alike(same / 16)), prompt


def test_the_shipped_adapter_reads_codes_it_has_never_seen():
    """The whole model: short questions about fresh pairs of codes, answered before and after bit literacy."""
    pairs = bx.code_pairs(60, 8, seed=99)
    questions = bx.code_questions(pairs)
    labels = bu.hamming_similarity(pairs.users, pairs.items) > 0.5
    plain, tokenizer = bu.load_llm(nf4=False)
    assert bu.auc(labels, bu.score(plain, tokenizer, questions, progress=False)) < 0.75
    literate = bu.load_adapter(plain, adapters.ADAPTERS / "literacy")
    assert bu.auc(labels, bu.score(literate, tokenizer, questions, progress=False)) > 0.9


def test_bit_by_bit_the_shipped_adapter_misses_hardly_a_pair():
    """Pairs as near to one half as real ones, where each bit counts."""
    pairs = bx.code_pairs(60, 32, seed=99, spread=0.1)
    model, tokenizer = bu.load_llm(nf4=False)
    model = bu.load_adapter(model, adapters.ADAPTERS / "pairs")
    p = bu.score(model, tokenizer, bx.code_questions(pairs, bx.ALIKE_PAIRS), progress=False)
    assert adapters.correlation(p, bu.hamming_similarity(pairs.users, pairs.items)) > 0.97


@pytest.mark.parametrize("name", [*adapters.COURSES, *adapters.TITLE_COURSES])
def test_the_shipped_adapters_are_small_and_say_how_they_were_made(name):
    folder = adapters.ADAPTERS / name
    weights = folder / "adapter_model.safetensors"
    assert weights.stat().st_size < 10_000_000
    assert {name.split(".")[-3] for name in load_file(weights)} >= {"q_proj", "down_proj"}
    card = json.loads((folder / "card.json").read_text())
    assert card["llm"] == bu.SMOLLM2 and card["seconds"] > 0
    if name in adapters.TITLE_COURSES:
        assert {key: card[key] for key in adapters.TITLES} == adapters.TITLES
        assert card["courses"] == adapters.TITLE_COURSES[name]
    else:
        assert card["courses"] == json.loads(json.dumps(adapters.COURSES[name]))
        asked = sum(lesson[2] for _, lessons in card["courses"] for lesson in lessons)
        assert pd.read_csv(folder / "curve.csv").rows.sum() == asked  # results.py records how many there were


def test_the_shipped_title_lessons_brought_something():
    exam = pd.read_csv(bu.ROOT / "data/results/titles.csv").set_index(["adapter", "questions", "films"])
    before = ("titles", 0, "all")
    for name in adapters.TITLE_COURSES:
        questions = pd.read_csv(adapters.ADAPTERS / name / "curve.csv").rows.sum()
        of = exam.loc[name, questions]
        assert of.auc["all"] > exam.auc_hi[before] and of.rows["all"] == of.rows["warm"] + of.rows["cold"] == 1000


@pytest.fixture
def in_small(toy, toy_codes, tmp_path, monkeypatch):
    """The script on toy data and two layers, every file of it under tmp_path."""
    whole = bu.load_llm

    def one_layer(*_, **__):
        return whole(layers=1, nf4=False)

    for name, value in (("CACHE", tmp_path / "cache"), ("load_llm", one_layer)):
        monkeypatch.setattr(bu, name, value)
    monkeypatch.setattr(adapters, "ADAPTERS", tmp_path)
    monkeypatch.setattr(bu, "load_ml1m", lambda: toy)
    monkeypatch.setattr(bu, "cached_codes", lambda *_, **__: toy_codes)
    monkeypatch.setattr(adapters, "RECORDS", tmp_path)
    return tmp_path


def values(weights):
    """All numbers of a dict of LoRA weights, sorted: saved ones go by other names than those of a model."""
    return np.sort(np.concatenate([np.zeros(0), *(w.detach().cpu().numpy().ravel() for w in weights.values())]))


def lora_values(model):
    return values({name: p for name, p in model.named_parameters() if "lora_" in name})


def saved_values(folder):
    return values(load_file(folder / "adapter_model.safetensors"))


def test_literacy_goes_on_after_the_last_whole_course(in_small, monkeypatch):
    courses = ((1e-3, (("alike", 8, 64, None),)), (5e-4, (("alike", 8, 64, 0.1),)), (5e-4, (("alike", 16, 64, 0.1),)))
    monkeypatch.setattr(adapters, "COURSES", {"literacy": courses[:1]})
    adapters.literacy()
    first = saved_values(in_small / "literacy")
    monkeypatch.setattr(adapters, "COURSES", {"literacy": courses})
    taught, tune = [], bu.tune

    def noted(model, tokenizer, prompts, *rest, **options):
        taught.append((list(prompts), lora_values(model)))
        return tune(model, tokenizer, prompts, *rest, **options)

    monkeypatch.setattr(bu, "tune", noted)
    monkeypatch.setattr(adapters, "exam", lambda *_: None)
    adapters.literacy()
    assert len(taught) == 2 and np.array_equal(taught[0][1], first)  # on from the first, not over again
    card = json.loads((in_small / "literacy" / "card.json").read_text())
    assert card["courses"] == json.loads(json.dumps(courses))
    assert pd.read_csv(in_small / "literacy" / "curve.csv").course.tolist() == [1, 1, 2, 2, 3, 3]
    whole = [taught[0][0], taught[1][0]]
    (in_small / "literacy" / "card.json").unlink()
    taught.clear()
    adapters.literacy()
    assert [prompts for prompts, _ in taught[1:]] == whole  # the same lessons as without the break
    monkeypatch.setattr(adapters, "COURSES", {"literacy": courses[1:]})
    with pytest.raises(SystemExit, match="was taught other courses than COURSES; delete it"):
        adapters.literacy()


def test_unseen_rows_come_after_all_that_their_codes_were_learned_from(toy):
    """Other labels in these rows must leave the codes as they are; other labels before them must not."""
    then = adapters.cut_earlier(toy)
    rows, codes = then.test, adapters.bx.fit_descent(then, 16)[0]
    assert (
        abs(len(rows) - len(toy.train) / 3) < 10 and rows.timestamp.min() > toy.train.drop(rows.index).timestamp.max()
    )
    late = toy.train.index.isin(rows.index)
    for changed, same in ((late, True), (~late, False)):
        train = toy.train.assign(label=toy.train.label.where(~changed, 1 - toy.train.label))
        others, _ = adapters.bx.fit_descent(adapters.cut_earlier(replace(toy, train=train)), 16)
        assert (np.array_equal(others.users, codes.users) and np.array_equal(others.items, codes.items)) == same


def test_title_lessons_say_what_the_collaborative_model_thinks(toy):
    z = np.random.default_rng(0).normal(size=(toy.n_users, toy.n_items))
    prompts, shares = bx.title_lessons(toy, z, moments=10, films=8, unasked=[0, 1, 2], seed=3)
    assert len(prompts) == len(shares) == 80
    for start in range(0, 80, 8):
        asked = [re.search(r'titled "(.*?)"\?', prompt) for prompt in prompts[start : start + 8]]
        items = [toy.titles.index(found[1]) for found in asked]
        assert len(set(items)) == 8 and not set(items) & {0, 1, 2}
        assert len({prompt[: found.start()] for prompt, found in zip(prompts[start:], asked)}) == 1
        assert 'movies: "' in prompts[start]  # some likes are shown
        found = np.log(shares[start : start + 8] / (1 - shares[start : start + 8])) / 2
        (user,) = np.flatnonzero(np.abs(z[:, items] - found).max(1) < 1e-6)  # whose opinions these are
        mine = toy.train[(toy.train.user == user) & (toy.train.label == 1)].item
        shown = re.findall(r'"(Film \d+ \(\d+\))"', prompts[start].split("Leverage")[0])
        assert shown and set(shown) <= {toy.titles[item] for item in mine}


def test_too_few_films_or_moments_for_title_lessons_are_refused(toy):
    z = np.zeros((toy.n_users, toy.n_items))
    with pytest.raises(ValueError, match="27 films to ask about; 10 and 28 are wanted"):
        bx.title_lessons(toy, z, moments=10, films=28, unasked=[0, 1, 2])
    with pytest.raises(ValueError, match="moments and 30 films to ask about; 401 and 2 are wanted"):
        bx.title_lessons(toy, z, moments=401, films=2)


def test_title_lessons_without_opinions_are_refused(toy):
    for z in (None, np.zeros((toy.n_users, 1)), np.zeros(toy.n_items)):
        with pytest.raises(ValueError, match="give what the collaborative model thinks, as `opinions` says it"):
            bx.title_lessons(toy, z, moments=1)


def test_opinions_are_within_a_user(toy):
    z = bx.opinions(toy)
    assert z.shape == (toy.n_users, toy.n_items) and np.abs(z.mean(1)).max() < 1e-5
    assert z.std() == pytest.approx(1, abs=0.01)
    rows = pd.DataFrame({"user": np.repeat(np.arange(20), 30), "item": np.tile(np.arange(30), 20)})
    logits = bu.cf_scores(bx.fit_hybrid(toy)[0], rows).reshape(20, 30)
    away = logits - logits.mean(1, keepdims=True)
    assert np.allclose(z, away / away.std(), atol=1e-4)


def test_ratings_hidden_are_seen_by_nobody_before_test(toy):
    cold = bx.some_items(toy)
    assert len(set(cold)) == 6 and set(cold) != set(range(6)) and (bx.some_items(toy) == cold).all()
    seen = bx.without_ratings(toy, cold)
    for split in ("train", "valid"):
        whole, left = getattr(toy, split), getattr(seen, split)
        assert not left.item.isin(cold).any() and len(left) == (~whole.item.isin(cold)).sum() < len(whole)
    assert seen.test.equals(toy.test) and (seen.n_users, seen.n_items) == (toy.n_users, toy.n_items)
    assert (bu.item_features(seen)[cold, -1] == 0).all()


def test_title_lessons_go_on_after_the_last_whole_course(in_small, monkeypatch):
    """Once in one go, once with a break: the same lessons and weights; no cold film is asked about."""
    monkeypatch.setattr(adapters, "TITLES", {"lr": 1e-3, "moments": 2, "films": 4})
    z = np.random.default_rng(0).normal(size=(20, 30))
    cold = bx.some_items(bu.load_ml1m())

    def opinions(seen):
        assert not any(part.item.isin(cold).any() for part in (seen.train, seen.valid))
        return z

    monkeypatch.setattr(bx, "opinions", opinions)
    taught, tune = [], bu.tune

    def noted(model, tokenizer, prompts, *rest, **options):
        taught.append(list(prompts))
        return tune(model, tokenizer, prompts, *rest, **options)

    monkeypatch.setattr(bu, "tune", noted)
    for courses in (1, 2):
        monkeypatch.setitem(adapters.TITLE_COURSES, "titles", courses)
        adapters.titles()
    broken, lessons = saved_values(in_small / "titles"), list(taught)
    assert len(lessons) == 2 and lessons[0] != lessons[1] and [len(prompts) for prompts in lessons] == [8, 8]
    exams = pd.read_csv(in_small / "titles.csv")
    assert exams.questions.tolist() == [0] * 3 + [8] * 3 + [16] * 3 and (exams.rows[exams.films == "all"] == 100).all()
    assert json.loads((in_small / "titles" / "card.json").read_text())["courses"] == 2
    assert pd.read_csv(in_small / "titles" / "curve.csv").course.tolist() == [1, 1, 2, 2]
    shutil.rmtree(in_small / "titles")
    assert not list((in_small / "cache" / "checkpoints").iterdir())  # else the old course would be found
    taught.clear()
    adapters.titles()
    assert taught == lessons and np.allclose(saved_values(in_small / "titles"), broken, atol=1e-6)
    hidden = [f'"Film {i} (' for i in cold]  # neither asked about nor among the likes
    assert not any(film in prompt for prompts in lessons for prompt in prompts for film in hidden)
    monkeypatch.setattr(adapters, "TITLES", {"lr": 1e-4, "moments": 2, "films": 4})
    with pytest.raises(SystemExit, match="was taught other lessons than TITLES; delete it"):
        adapters.titles()


def test_lessons_about_all_films_begin_with_those_about_some(in_small, monkeypatch):
    monkeypatch.setattr(adapters, "TITLES", {"lr": 1e-3, "moments": 2, "films": 4})
    toy, cold, hidden = bu.load_ml1m(), bx.some_items(bu.load_ml1m()), []
    monkeypatch.setattr(bx, "opinions", lambda seen: hidden.append(seen) or np.zeros((20, 30)) + np.arange(30) / 10)
    adapters.titles()
    begun, tune = [], bu.tune

    def noted(model, *rest, **options):
        begun.append([p.detach().numpy().copy() for name, p in model.named_parameters() if "lora" in name])
        return tune(model, *rest, **options)

    monkeypatch.setattr(bu, "tune", noted)
    adapters.titles("all_titles")
    (start,) = begun
    found, saved = np.concatenate([p.ravel() for p in start]), saved_values(in_small / "titles")
    assert np.allclose(np.sort(found), np.sort(saved), atol=1e-6)
    assert not hidden[0].train.item.isin(cold).any() and len(hidden[1].train) == len(toy.train)
    exams = pd.read_csv(in_small / "titles.csv")
    assert exams.adapter.tolist() == ["titles"] * 6 + ["all_titles"] * 3 and exams.questions.iloc[-1] == 16
