"""What titles add to codes: who has seen which film, what a stack learns from, and which lines are kept."""

import zipfile
from dataclasses import replace

import cold
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save
from tokenizers import Tokenizer, models, pre_tokenizers

import binllm_extras as bx
import binllm_utils as bu


def test_word_vectors_are_the_means_of_the_pieces(tmp_path, monkeypatch):
    pieces = Tokenizer(models.WordLevel({"toy": 0, "story": 1, "?": 2}, unk_token="?"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    vectors, wheel = np.array([[1, 3], [3, 7], [0, 0]], np.float16), tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("wordllama/weights/l2_supercat_256.safetensors", save({"embedding.weight": vectors}))
        file.writestr("wordllama/tokenizers/l2_supercat_tokenizer_config.json", pieces.to_str())
    monkeypatch.setattr(bu, "fetch", lambda *_: wheel)
    found = cold.word_vectors(["toy story", "toy", "story toy story"])
    assert np.allclose(found, [[2, 5], [1, 3], [7 / 3, 17 / 3]], rtol=1e-3)


def test_a_titles_state_is_its_own_whatever_stands_beside_it(llm):
    titles = ["Jaws (1975)", "Star Wars: Episode IV - A New Hope (1977)", "M (1931)"]
    together = cold.title_states(*llm, titles)
    alone = np.concatenate([cold.title_states(*llm, [title]) for title in titles])
    assert together.shape == (3, 2 * llm[0].config.hidden_size) and np.allclose(together, alone, atol=1e-3)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_no_cold_film_is_among_the_likes_shown(toy, monkeypatch):
    asked, films = [], bx.some_items(toy)

    def answered(model, _, prompts, key):
        assert model == "model titles" and key in ("cold-made of this-valid", "cold-made of this-test")
        asked.append(prompts)
        return np.full(len(prompts), 0.75), 1.0

    monkeypatch.setattr(cold.results, "score_in_parts", answered)
    rows = {split: part[part.item.isin(films)] for split, part in (("valid", toy.valid), ("test", toy.test))}
    answers = cold.title_answers("model titles", "tokenizer", toy, rows, films, "made of this")
    for (split, part), prompts in zip(rows.items(), asked):
        assert np.allclose(answers[split], np.log(3)) and len(prompts) == len(part) > 5
        for prompt, item in zip(prompts, part.item):
            likes, question = prompt.split("Leverage")
            assert f'"{toy.titles[item]}"' in question and '"Film' in likes
            assert not any(f'"{toy.titles[film]}"' in likes for film in films)


def two_judges(n, seed):
    """(labels, counts, scores, titles): scores are right about films with ratings, titles about those without."""
    rng = np.random.default_rng(seed)
    labels, counts = rng.integers(0, 2, n), rng.integers(0, 2, n) * 50
    good, noise = labels + rng.normal(0, 0.7, n), rng.normal(0, 1, n)
    return labels, counts, np.where(counts > 0, good, noise), np.where(counts > 0, noise, good)


def test_a_gate_trusts_titles_where_ratings_are_missing():
    (labels, *learn), (truth, *ask) = two_judges(2000, 0), two_judges(2000, 1)
    plain = cold.stacked(labels, learn[1:], ask[1:])
    gate = cold.stacked(labels, *(cold.gated(scores, titles, count) for count, scores, titles in (learn, ask)))
    assert bu.auc(truth, gate) > bu.auc(truth, plain) + 0.02 > bu.auc(truth, ask[1]) + 0.05
    turned = cold.stacked(1 - labels, learn[1:], ask[1:])  # it learns from the labels given, not from those asked about
    assert bu.auc(truth, turned) < 0.5


def test_ties_are_broken_and_nothing_else():
    similarity, second = np.array([0.5, 0.5, 0.53125, 0.5]), np.array([0.2, 1.0, 0.0, 0.7])
    assert np.argsort(cold.ties_by(similarity, second)).tolist() == [0, 3, 1, 2]


def test_a_film_that_nobody_rated_has_the_mean_rate(toy):
    rates = cold.film_rates(bx.without_ratings(toy, [3]))
    seen = toy.train[toy.train.item != 3]
    assert rates.shape == (30,) and rates[3] == pytest.approx(seen.label.mean())
    mine = seen[seen.item == 4].label
    assert rates[4] == pytest.approx((mine.sum() + 5 * seen.label.mean()) / (len(mine) + 5))


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(cold, "RECORDS", tmp_path)
    return lambda: pd.read_csv(tmp_path / "cold.csv")


def test_a_line_holds_the_paired_difference_and_test_is_not_printed(toy, kept, capsys):
    rng = np.random.default_rng(0)
    scores, base = toy.test.label + rng.normal(size=100), rng.normal(size=100)
    cold.note("test", "cold", "mine", 0, toy.test, scores, ("other", base))
    cold.note("test", "cold", "other", 0, toy.test, base)
    assert capsys.readouterr().out == ""
    cold.note("valid", "cold", "mine", 0, toy.valid, scores)
    assert "cold films, mine, seed 0: 0." in capsys.readouterr().out
    mine, other, _ = kept().to_dict("records")
    assert mine["base"] == "other" and np.isnan(other["auc_more"])
    gap = bu.paired_test(toy.test.user, toy.test.label, base, scores)
    assert mine["auc_more"] == pytest.approx(mine["auc"] - other["auc"], abs=2e-4)
    assert mine["uauc_more_lo"] == pytest.approx(gap.low["uauc"], abs=1e-4)


def test_each_film_is_cold_once_and_the_llm_was_never_asked_about_the_first_fifth(toy, ml1m):
    for dataset in (toy, ml1m):
        parts = cold.fifths(dataset)
        assert len(parts) == 5 and sorted(np.concatenate(parts)) == list(range(dataset.n_items))
        assert np.array_equal(parts[0], bx.some_items(dataset))


def test_what_is_known_of_films_counts_no_ratings(toy):
    toy = replace(toy, tags=[("odd",) if item % 2 else ("even",) for item in range(30)])
    told = {"title states": np.random.default_rng(0).normal(size=(30, 40))}
    known = cold.known_of_films(toy, told)
    hidden = cold.known_of_films(bx.without_ratings(toy, bx.some_items(toy)), told)
    assert list(known) == ["nothing", "genres and years", "title states", "genres, years and title states"]
    assert all(np.array_equal(known[name], hidden[name]) for name in known)
    assert [columns.shape[1] for columns in known.values()] == [0, 2, 16, 18]
    counted = bu.item_features(bx.without_ratings(toy, bx.some_items(toy)))
    assert (counted[bx.some_items(toy), -1] == 0).all() and (bu.item_features(toy)[:, -1] > 0).all()


def test_each_row_is_scored_once_by_a_model_that_saw_no_rating_of_its_film(toy, monkeypatch):
    fitted = []

    def models(hidden, known, seed):
        assert known == "known" and seed == 7
        fitted.append(set(hidden.train.item) | set(hidden.valid.item))
        place = len(fitted) - 1
        return {"mine": lambda rows: np.full(len(rows), place)}

    monkeypatch.setattr(cold, "collaborative", models)
    scores = cold.every_film_once(toy, "known", 7)["mine"]
    for split in ("valid", "test"):
        part = getattr(toy, split)
        assert scores[split].index.equals(part.index)
        for item, place in zip(part.item, scores[split]):
            assert item not in fitted[place]


def test_draws_together_are_codes_with_all_their_bits(toy, toy_codes):
    """Three codes of 16 bits side by side are one of 48, and its similarity is the mean of theirs."""
    rng = np.random.default_rng(0)
    draws = [bu.Codes(*(rng.integers(0, 2, side.shape, np.uint8) for side in (toy_codes.users, toy_codes.items)))
             for _ in range(3)]  # fmt: skip
    longer = bu.Codes(*(np.hstack([getattr(draw, side) for draw in draws]) for side in ("users", "items")))
    scores = [{"mine": {"test": pd.Series(draw.similarity(toy.test), toy.test.index)}} for draw in draws]
    assert np.allclose(cold.together(scores)["mine"]["test"], longer.similarity(toy.test))


def test_cold_films_are_compared_on_the_same_rows(toy, kept):
    films = bx.some_items(toy, share=0.5)
    hidden = bx.without_ratings(toy, films)
    known = cold.known_of_films(toy, {"title states": np.random.default_rng(0).normal(size=(30, 40))})
    models = cold.collaborative(hidden, known, seed=0)
    rows = {split: part[part.item.isin(films)] for split, part in (("valid", toy.valid), ("test", toy.test))}
    scores = {
        name: {split: pd.Series(model(part), part.index) for split, part in rows.items()}
        for name, model in models.items()
    }
    titles = {split: part.label + np.random.default_rng(1).normal(0, 0.5, len(part)) for split, part in rows.items()}
    cold.compared("cold", rows, scores, 0)
    cold.with_llm("never asked", rows, scores, titles, 0)
    table = kept()
    assert table[table.split == "test"].rows.nunique() == 1
    table = table.set_index(["films", "split", "method"]).sort_index()
    assert len(table.loc["cold", "test"]) == len(table.loc["cold", "valid"]) == 2 * 5
    for kind in ("codes", "continuous"):  # all cold films have one code then, and one vector
        assert table.uauc["cold", "test", f"{kind}, nothing"] == 0.5
    assert np.isnan(table.auc_more["cold", "test", cold.BASE])
    count = table.loc["cold", "test", "codes, genres, years and a count of ratings"]
    assert count.base == cold.BASE and np.isfinite(count.auc_more)
    both = table.loc["never asked", "test", "codes, genres and years + LLM"]
    assert both.auc > 0.7 and both.base == "codes, genres and years" and both.auc_more > 0
    assert f"{cold.BASE} + LLM" not in table.loc["never asked", "valid"].index  # the stack learned from these rows


def test_all_films_are_told_apart_by_their_ratings(toy, toy_codes, kept, tmp_path):
    """Answers that are the labels: a stack with them is right; a bin holds the rows of films rated so often."""
    for split in ("valid", "test"):
        part = getattr(toy, split)
        p = np.where(part.label == 1, 0.9, 0.1)
        cold.records.keep_answers(tmp_path / f"answers-patient-{split}.parquet", "title lessons", toy, part, p)
    cold.all_films(toy, toy, toy_codes, 0)
    table = kept().set_index("split")
    assert table.loc["valid"].method.tolist() == ["codes", "codes, ties by LLM"]
    table = table.loc["test"].set_index(["films", "method"])
    assert table.auc["all", "codes, ties by LLM"] > table.auc["all", "codes"]
    assert table.auc["all", "codes + LLM"] > 0.99 and table.auc["all", "codes + LLM, gated"] > 0.99
    codes, counts = table.xs("codes", level="method"), np.bincount(toy.train.item)[toy.test.item]
    assert codes.rows["all"] == 100 and codes.rows["10-19"] == ((counts > 9) & (counts < 20)).sum() > 90
    assert codes.auc["all"] == pytest.approx(bu.auc(toy.test.label, toy_codes.similarity(toy.test)), abs=1e-4)
    cold.all_films(toy, replace(toy, name="longer"), toy_codes, 0)
    longer = kept().query("films == 'all, whole past' and split == 'test'").set_index("method")
    assert longer.auc.to_dict() == table.auc["all"].to_dict()  # the same codes and answers; no bins


def test_the_lines_kept_are_made_from_what_is_there_and_are_not_made_again(ml1m, past, monkeypatch, capsys):
    assert (cold.RECORDS / "cold.txt").read_text().strip() == cold.made_from(ml1m, past)
    monkeypatch.setattr(bu, "load_llm", lambda *_: pytest.fail("it began"))
    cold.main()
    assert "there already" in capsys.readouterr().out
    assert cold.made_from(ml1m, past) != cold.made_from(ml1m, past, version=-1)


def test_other_answers_are_another_start(ml1m, past, kept, tmp_path):
    def answered(p):
        for split in ("valid", "test"):
            part = getattr(ml1m, split)
            cold.records.keep_answers(
                tmp_path / f"answers-patient-{split}.parquet", "title lessons", ml1m, part, np.full(len(part), p)
            )
        return cold.made_from(ml1m, past)

    assert answered(0.25) == answered(0.25) != answered(0.75)
