"""Made-up codes and questions about them, and the adapter that was taught by them."""

import functools
import json
import re

import adapters
import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

import binllm_utils as bu


def test_pairs_are_of_every_similarity():
    pairs = bu.code_pairs(4000, 32, seed=1)
    similarity = bu.hamming_similarity(pairs.users, pairs.items)
    assert np.histogram(similarity, bins=4, range=(0, 1))[0].min() > 800  # random pairs would all stand in the middle
    assert abs(pairs.users.mean() - 0.5) < 0.01 and abs(pairs.items.mean() - 0.5) < 0.01
    assert not np.array_equal(pairs.users, bu.code_pairs(4000, 32, seed=2).users)
    near = bu.code_pairs(4000, 32, seed=1, spread=0.1)
    similarity = bu.hamming_similarity(near.users, near.items)
    assert similarity.mean() == pytest.approx(0.5, abs=0.01)
    of_bits = (0.5**2 - 0.1**2) / 32  # the variance of 32 throws, beside that of the chances
    assert similarity.std() == pytest.approx((0.1**2 + of_bits) ** 0.5, abs=0.005)


@pytest.mark.parametrize("kind", bu.QUESTIONS)
@pytest.mark.parametrize("fmt", ["bits", "dotted"])
def test_answers_are_right_by_another_way(kind, fmt):
    """Read the codes back out of the questions and work the answers out with Python's integers."""
    questions, labels = bu.code_questions(kind, 200, 16, fmt, seed=3)
    assert len(questions) == len(labels) == 200 and labels.sum() == 100
    value = {"bits": lambda text: int(text, 2), "dotted": lambda text: int(bu.to_bits(bu.from_dotted(text)), 2)}[fmt]
    near = 0
    for question, label in zip(questions, labels):
        a, b, *c = (value(text) for text in re.findall(r"[0-9.]+", question))
        same = 16 - (a ^ b).bit_count()
        answer = {"alike": same > 8, "equal": a == b, "and": bool(c) and c[0] == a & b}[kind]
        assert answer == label, question
        wrong = {"alike": 0, "equal": (a ^ b).bit_count(), "and": (c[0] ^ (a & b)).bit_count() if c else 0}[kind]
        near += kind != "alike" and wrong == 1 - label
    assert near == (0 if kind == "alike" else 200)  # a wrong one is wrong in one bit


def test_more_alike_is_more_likely_yes():
    taught = bu.alike(np.linspace(0, 1, 11))
    assert (np.diff(taught) > 0).all() and taught[5] == 0.5 and taught[0] == pytest.approx(1 - taught[10])


@pytest.mark.parametrize("where", ["alike", "codes", "side by side", "text+codes"])
def test_lessons_ask_about_the_codes_they_hold(ml1m, where):
    prompts, labels = adapters.lesson(ml1m, where, 16, 60, 0.1, seed=4)
    assert len(prompts) == len(labels) == 60 == len(set(prompts))
    for prompt, label in zip(prompts, labels):
        a, b = re.findall(r"\b[01]{16}\b", prompt)
        same = 16 - (int(a, 2) ^ int(b, 2)).bit_count()
        assert label == pytest.approx(bu.alike(same / 16)), prompt


def test_the_shipped_adapter_reads_codes_it_has_never_seen():
    """The whole model: it tells 8 bits that are alike from those that are not; the untuned one cannot."""
    questions, labels = bu.code_questions("alike", 60, 8, seed=99)
    plain, tokenizer = bu.load_llm()
    assert bu.auc(labels, bu.score(plain, tokenizer, questions, progress=False)) < 0.75
    literate, _, start = bu.literate_llm(bu.PROFILES["cpu"])
    assert start and bu.auc(labels, bu.score(literate, tokenizer, questions, progress=False)) > 0.9


def test_the_shipped_adapter_is_small_and_says_how_it_was_made():
    folder = bu.ADAPTERS / "literacy"
    weights = folder / "adapter_model.safetensors"
    assert weights.stat().st_size < 10_000_000
    assert {name.split(".")[-3] for name in load_file(weights)} >= {"q_proj", "down_proj"}
    card = json.loads((folder / "card.json").read_text())
    assert card["llm"] == bu.SMOLLM2 and card["seconds"] > 0
    assert card["courses"] == json.loads(json.dumps(adapters.COURSES))


def test_another_llm_starts_plain(monkeypatch, llm):
    assert bu.literate_llm(bu.PROFILES["smoke"])[2] is None  # two layers only
    monkeypatch.setattr(bu, "load_llm", lambda *_, **__: llm)
    monkeypatch.setenv("BINLLM_LLM", "some/other-model")
    llm[0].name_or_path = "some/other-model"
    assert bu.literate_llm(bu.PROFILES["cpu"])[2] is None


def test_the_long_run_goes_on_after_the_last_whole_chapter(toy, toy_codes, tmp_path, monkeypatch):
    two_layers = functools.partial(bu.load_llm, layers=2)
    for name, value in (("CACHE", tmp_path / "cache"), ("ADAPTERS", tmp_path), ("load_llm", two_layers)):
        monkeypatch.setattr(bu, name, value)
    monkeypatch.setattr(bu, "load_ml1m", lambda: toy)
    monkeypatch.setattr(bu, "cached_codes", lambda dataset: toy_codes)
    monkeypatch.setattr(adapters, "CHAPTER", -(-len(toy.train) // 3))
    monkeypatch.setattr(adapters, "RECORDS", tmp_path)
    model, tokenizer = bu.load_llm()
    model, curve = bu.tune(model, tokenizer, ["a", "b"], [0, 1], progress=False)
    bu.save_adapter(model, tmp_path / "literacy", {}, curve)
    seen, tune = [], bu.tune

    def stopped_in_the_second(model, tokenizer, prompts, labels, **options):
        seen.append(list(prompts))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return tune(model, tokenizer, prompts, labels, **options)

    monkeypatch.setattr(bu, "tune", stopped_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        adapters.long()
    adapters.long()
    assert seen[1] == seen[2] and len(seen) == 4  # the chapter that was cut short comes again, then the last
    everything = bu.build_prompts(toy, toy.train, toy_codes, "side by side")
    assert sorted(seen[0] + seen[2] + seen[3]) == sorted(everything)
    card = json.loads((tmp_path / "one_step" / "card.json").read_text())
    assert card["chapters"][-1]["rows"] == len(toy.train) and len(card["chapters"]) == 3
    assert pd.read_csv(tmp_path / "long.csv").rows.tolist() == [chapter["rows"] for chapter in card["chapters"]]
