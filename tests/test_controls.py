"""Controls: one thing in a prompt is made false and nothing else; a turned bit is one bit; the records are of today."""

import re

import controls
import numpy as np
import pandas as pd
import pytest

import binllm_utils as bu


def parts(prompt):
    """(likes, title, user's bits, film's bits, the question without them)."""
    likes, title = re.search(r'movies: (.*?)\. (?:Would|Add).* titled (".*?")(?:\?| with)', prompt).groups()
    if " feature " in prompt:
        user, item = shown = re.findall(r"feature ([01]+)", prompt)
    else:
        shown = re.findall(r"movie ([01 ]+) (?:alike|different)\?", prompt)
        user, item = map("".join, zip(*shown[0].split()))
    for part in (likes, title, *shown):
        prompt = prompt.replace(part, "")
    return likes, title, user, item, prompt


@pytest.fixture(params=controls.READERS)
def asked(toy, toy_codes, request):
    rows, (_, template) = bu.sample_rows(toy.test, 40), controls.READERS[request.param]
    return rows, bu.build_prompts(toy, rows, toy_codes, template), controls.falsified(toy, rows, toy_codes, template)


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("as it is", set()),
        ("another user's code", {2}),
        ("random codes", {2, 3}),
        ("one bit turned over in both", {2, 3}),
        ("every bit turned over", {2, 3}),
        ("another user's likes", {0}),
        ("another film's title", {1}),
        ("likes up to the end of training", {0}),
        ('"No" or "Yes"', {4}),
        ("hate in place of enjoy", {4}),
        ("different in place of alike", {4}),
    ],
)
def test_one_thing_is_false_and_all_else_as_it_was(asked, what, changed):
    _, true, false = asked
    assert len(false) == 10 + ("alike" in true[0])
    if what in false:
        assert len(false[what]) == len(true) == 40
        differs = np.array(
            [[a != b for a, b in zip(parts(one), parts(other))] for one, other in zip(true, false[what])]
        )
        assert set(np.flatnonzero(differs.any(0))) == changed
        assert not changed or differs[:, list(changed)].mean() > 0.3


def test_another_films_title_is_so_in_every_row(asked):
    _, true, false = asked
    titles = [[parts(prompt)[1] for prompt in prompts] for prompts in (true, false["another film's title"])]
    assert all(one != other for one, other in zip(*titles))


def test_one_bit_turned_over_in_both_is_the_same_bit_of_each(asked):
    _, true, false = asked
    places = set()
    for prompt, other in zip(true, false["one bit turned over in both"]):
        (_, _, *before, _), (_, _, *after, _) = parts(prompt), parts(other)
        (user,), (item,) = ([at for at in range(16) if a[at] != b[at]] for a, b in zip(before, after))
        assert user == item
        places.add(user)
    assert len(places) > 8


def test_every_bit_turned_over_leaves_as_many_equal(asked):
    _, true, false = asked
    for prompt, other in zip(true, false["every bit turned over"]):
        (_, _, user, item, _), (_, _, turned, turned_item, _) = parts(prompt), parts(other)
        assert turned == user.translate({48: "1", 49: "0"}) and turned_item == item.translate({48: "1", 49: "0"})


def test_a_users_rows_all_get_one_other_users_code(asked, toy, toy_codes):
    rows, _, false = asked
    codes = pd.Series([parts(prompt)[2] for prompt in false["another user's code"]], rows.index)
    for user, mine in codes.groupby(rows.user):
        assert mine.nunique() == 1
        assert mine.iloc[0] in {bu.to_bits(toy_codes.users[other]) for other in rows.user.unique() if other != user}


def test_no_like_of_valid_or_test_is_shown_up_to_the_end_of_training(asked, toy):
    rows, _, false = asked
    early = toy.train[toy.train.label == 1]
    for user, prompt in zip(rows.user, false["likes up to the end of training"]):
        shown = set(re.findall(r"Film \d+ \(\d+\)", parts(prompt)[0]))
        assert shown <= {toy.titles[item] for item in early.item[early.user == user]}


@pytest.mark.parametrize("reader", controls.READERS)
def test_each_bit_of_the_user_is_turned_once(toy, toy_codes, reader):
    rows, (_, template) = toy.test.drop_duplicates("user").head(3), controls.READERS[reader]
    table, prompts = controls.flips(toy, rows, toy_codes, template)
    assert len(table) == len(prompts) == 3 * 17
    assert prompts[::17] == bu.build_prompts(toy, rows, toy_codes, template)
    for place, row in enumerate(table.itertuples()):
        likes, title, user, item, _ = parts(prompts[place])
        own = bu.to_bits(toy_codes.users[toy.test.user[row.row]])
        assert [at for at in range(16) if user[at] != own[at]] == ([] if row.bit < 0 else [row.bit])
        assert row.similarity == pytest.approx(np.mean([a == b for a, b in zip(user, item)]))


def test_the_records_are_of_todays_codes_prompts_and_adapter(capsys, monkeypatch):
    monkeypatch.setattr(bu, "load_llm", lambda *_, **__: pytest.fail("asked again"))
    controls.main()
    assert capsys.readouterr().out.count("there already") == len(controls.READERS)
    rows = bu.sample_rows(bu.load_ml1m().test, controls.ROWS)
    assert pd.read_parquet(controls.RECORDS / "controls.parquet").index.equals(rows.index.rename("row"))
    turned = pd.read_csv(controls.RECORDS / "flips.csv")
    assert (turned.reader.value_counts() == controls.FLIPPED * 33).all() and set(turned.reader) == set(controls.READERS)
