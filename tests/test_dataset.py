"""The data: the paper's split of the real ML-1M, point-in-time histories, and bad input."""

import zipfile
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import make_dataset, make_rows

import binllm_data
import binllm_utils as bu


def test_the_split_is_the_papers(ml1m):
    sizes = {s: (len(f), f.user.nunique(), f.item.nunique()) for s in bu.SPLITS for f in [getattr(ml1m, s)]}
    assert sizes == {"train": (33891, 740, 3087), "valid": (10401, 356, 2506), "test": (7331, 320, 2203)}
    shares = [round(getattr(ml1m, s).label.mean(), 4) for s in bu.SPLITS]
    assert shares == [0.5368, 0.5283, 0.5454]
    assert (ml1m.n_users, ml1m.n_items) == (838, 3255)  # the paper's 839 and 3,256 count a padding id


def test_uauc_counts_the_papers_users(ml1m):
    for split, users in (("test", 224), ("valid", 282)):
        rows = getattr(ml1m, split)
        assert bu.uauc(rows.user, rows.label, np.arange(len(rows)))[1] == users


def test_splits_follow_each_other_in_time(ml1m):
    assert ml1m.train.timestamp.max() < ml1m.valid.timestamp.min() <= ml1m.valid.timestamp.max()
    assert ml1m.valid.timestamp.max() < ml1m.test.timestamp.min()


def test_popularity_gives_the_known_anchor(ml1m):
    scores = bu.popularity_baseline(ml1m, ml1m.test)
    assert bu.auc(ml1m.test.label, scores) == pytest.approx(0.7317, abs=5e-5)
    assert bu.uauc(ml1m.test.user, ml1m.test.label, scores)[0] == pytest.approx(0.6816, abs=5e-5)


def as_official(ratings, path):
    """Write ratings, as `_read_ml1m` gives them, in the official files' format and in random order."""
    ratings = ratings.assign(movie=pd.factorize(ratings.title)[0] + 1)
    ratings = ratings.sample(frac=1, random_state=0)  # the order of equal times must not matter
    lines = ratings[["user", "movie", "rating", "timestamp"]].astype(str).agg("::".join, axis=1)
    movies = ratings.drop_duplicates("movie")
    lists = [f"{m}::{t}::{'|'.join(g)}" for m, t, g in zip(movies.movie, movies.title, movies.genres)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ml-1m/ratings.dat", "\n".join(lines) + "\n")
        archive.writestr("ml-1m/movies.dat", ("\n".join(lists) + "\n").encode("latin-1"))
    return path


@pytest.fixture(scope="module")
def ratings():
    return binllm_data._read_ml1m(bu.fetch(bu.ML1M_OFFICIAL, bu.ML1M_REGISTRY))


def test_official_archive_gives_the_same_dataset(ml1m, ratings, tmp_path, monkeypatch):
    """Rewrite the registry's ratings in the official files' format and order, and load those."""
    month = pd.to_datetime(ratings.timestamp, unit="s").dt.to_period("M")
    some = ratings[month.between("2001-06", "2003-01") | (ratings.timestamp == ratings.timestamp.min())]
    path = as_official(some, tmp_path / "ml-1m.zip")
    monkeypatch.setattr(binllm_data, "fetch", lambda *sources, cache=None: path)
    official = bu.load_ml1m()
    assert official.titles == ml1m.titles and official.tags == ml1m.tags
    for split in bu.SPLITS:
        pd.testing.assert_frame_equal(getattr(official, split), getattr(ml1m, split))


def test_the_whole_past_leaves_valid_and_test_as_they_are(ml1m, past):
    for split in ("valid", "test"):
        pd.testing.assert_frame_equal(getattr(past, split), getattr(ml1m, split))
    assert len(past.train) == 980_981 and past.train.timestamp.max() == ml1m.train.timestamp.max()
    assert past.titles[: ml1m.n_items] == ml1m.titles and past.tags[: ml1m.n_items] == ml1m.tags
    assert past.n_users > ml1m.n_users and past.n_items > ml1m.n_items and past.name == "ml-1m-past"
    both = past.train.merge(ml1m.train, on=["user", "item", "label", "timestamp"])
    assert len(both) == len(ml1m.train)  # the paper's train is a part of it, under the same ids
    codes = bu.cached_codes(past, recipe="past")  # ids are the same, so nothing else would tell whose they are
    with pytest.raises(
        ValueError, match=r"codes of 3,\d+ items, and ml-1m has 3,255: .* other data; take `cached_codes`"
    ):
        bu.build_prompts(ml1m, ml1m.test.head(2), codes)
    assert bu.build_prompts(past, ml1m.test.head(2), codes) != bu.build_prompts(ml1m, ml1m.test.head(2), style="text")
    with pytest.raises(ValueError, match="past is 'most'; choose 'split', the paper's, or 'all'"):
        bu.load_ml1m(past="most")


def test_nothing_later_than_the_train_months_reaches_what_learns(ratings, tmp_path, monkeypatch):
    """With every rating of valid and test turned round, train, features and codes stay what they are.

    Codes after one epoch, that is: of several, valid chooses the one to be kept.
    """
    time = pd.to_datetime(ratings.timestamp, unit="s").dt.to_period("M")
    some = ratings[time.between("2001-01", "2003-01") | (ratings.timestamp == ratings.timestamp.min())]
    later = time[some.index] > "2002-03"
    assert 0.1 < later.mean() < 0.9
    found = []
    for turned in (some, some.assign(rating=some.rating.where(~later, 6 - some.rating))):
        path = as_official(turned, tmp_path / "ml-1m.zip")
        monkeypatch.setattr(binllm_data, "fetch", lambda *sources, cache=None, path=path: path)
        found.append(bu.load_ml1m(past="all"))
    pd.testing.assert_frame_equal(found[0].train, found[1].train)
    assert not found[0].test.label.equals(found[1].test.label)
    assert (bu.item_features(found[0]) == bu.item_features(found[1])).all()
    one, other = (bu.fit_codes(data, 8, recipe="past", max_epochs=1, progress=False)[0] for data in found)
    assert (one.users == other.users).all() and (one.items == other.items).all()


def test_tags_are_genres_and_five_years(ml1m):
    tags = dict(zip(ml1m.titles, ml1m.tags))
    assert tags["Toy Story (1995)"] == ("Animation", "Children's", "Comedy", "1995-1999")
    assert tags["Casablanca (1942)"] == ("Drama", "Romance", "War", "1940-1944")
    genres = {tag for mine in ml1m.tags for tag in mine if not tag[0].isdigit()}
    assert len(genres) == 18 and all(len(mine) >= 2 for mine in ml1m.tags)


def test_history_is_what_was_liked_strictly_before(toy):
    for rows in (toy.train, toy.test):
        log = toy.log
        for row, history in zip(rows.itertuples(), bu.liked_before(toy, rows, last=3)):
            before = log[(log.user == row.user) & (log.label == 1) & (log.timestamp < row.timestamp)]
            wanted = before.sort_values("timestamp", kind="stable").item.tail(3)
            assert history.tolist() == wanted.tolist()


def test_history_leaves_out_the_same_second():
    rows = pd.DataFrame({"user": [0, 0, 0], "item": [0, 1, 2], "label": [1, 1, 1], "timestamp": [5, 5, 6]})
    dataset = make_dataset(train=rows)
    assert [h.tolist() for h in bu.liked_before(dataset, rows)] == [[], [], [0, 1]]


def test_history_of_a_new_row_and_a_new_user(toy):
    rows = pd.DataFrame({"user": [0, 99], "item": [0, 0], "timestamp": [10**9, 10**9]})
    known, unknown = bu.liked_before(toy, rows, last=10**6)
    log = toy.log
    assert len(known) == ((log.user == 0) & (log.label == 1)).sum()
    assert len(unknown) == 0


def test_sample_holds_whole_users_up_to_the_cap(ml1m):
    rows = bu.sample_rows(ml1m.test, 200, per_user=10)
    assert len(rows) == 200 and rows.index.is_unique and rows.index.isin(ml1m.test.index).all()
    per_user = rows.user.value_counts()
    full = ml1m.test.user.value_counts().clip(upper=10)[per_user.index]
    assert (per_user == full).sum() >= len(per_user) - 1  # only the last user may be cut short
    assert rows.equals(bu.sample_rows(ml1m.test, 200, per_user=10))
    assert not rows.equals(bu.sample_rows(ml1m.test, 200, seed=1, per_user=10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": make_rows(0, 50).drop(columns="label")}, "train: column 'label' is missing"),
        ({"valid": make_rows(0, 50).iloc[:0]}, "valid: the split is empty"),
        ({"test": make_rows(2, 50).replace({"label": {1: 2}})}, r"test, row \d+: label 2 is not 0 or 1"),
        ({"train": make_rows(0, 50).assign(user=-1)}, "train, row 0: user id -1 is below 0"),
        ({"train": make_rows(0, 50).assign(label=0.5)}, "train: column 'label' holds float64, not integers"),
        ({"titles": ["A"] * 29}, r"row \d+: item id 29 has no title"),
        ({"titles": ["A"] * 29 + [" "]}, "item 29 has no title but ' '; give each item a text"),
        ({"titles": ["A"] * 29 + ["\x00\u200b"]}, "item 29 has no title"),
        ({"titles": "one text"}, "titles is a str; give a list"),
        ({"tags": ["Action|Comedy"] * 30}, "tags of item 0 are 'Action|Comedy'; give a list of words"),
        ({"tags": [("Action", float("nan"))] * 30}, "tags of item 0 are .*; give a list of words"),
        ({"tags": [()] * 29}, "29 lists of tags for 30 items"),
        (
            {"train": make_rows(0, 50).astype({"user": "Int64"}).replace({"user": {2: pd.NA}})},
            r"train, row \d+: no user;",
        ),
        ({"train": make_rows(0, 50).assign(timestamp=pd.NaT)}, "train, row 0: no timestamp; fill it in"),
        (
            {"train": make_rows(0, 50).assign(user=2_000_000_000)},
            "train, row 0: user id 2000000000, but there are 21 u",
        ),
    ],
)
def test_bad_data_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        make_dataset(**change)


def test_titles_go_by_place_and_are_text():
    titles = pd.Series([f"Film {i}" for i in range(30)], index=range(1, 31))
    assert make_dataset(titles=titles).titles[5] == "Film 5"
    for wrong in (None, float("nan"), pd.NA, True):
        with pytest.raises(ValueError, match="item 3 has no title but"):
            make_dataset(titles=[wrong if i == 3 else "A" for i in range(30)])
    for number in (1984, 1984.0, np.int32(1984)):  # what a table reader makes of the film
        assert make_dataset(titles=[number] + ["A"] * 29).titles[0] == "1984"


@pytest.mark.parametrize("kind", ["int16", "int32", "uint16", "Int64", "int64[pyarrow]"])
def test_any_integers_give_the_same_histories(ml1m, kind):
    """ids times times overflowed 32 bits once, without a word."""
    rows = {split: getattr(ml1m, split).astype({"user": kind, "item": kind}) for split in bu.SPLITS}
    other = bu.Dataset(**rows, titles=ml1m.titles)
    few = ml1m.test.sample(100, random_state=0)
    for a, b in zip(bu.liked_before(ml1m, few), bu.liked_before(other, other.test.loc[few.index])):
        assert a.tolist() == b.tolist()


def test_a_duplicate_row_is_named(toy):
    twice = pd.concat([toy.train, toy.train.iloc[[7]]], ignore_index=True)
    with pytest.raises(ValueError, match=rf"train, row {len(toy.train)}: user \d+ and item \d+ come twice"):
        make_dataset(train=twice)


@pytest.mark.parametrize(
    "kind",
    ["s", "ms", "us", "ns", "datetime64[s]", "datetime64[ns]", "UTC", "America/New_York", "timestamp[us][pyarrow]"],
)
def test_times_in_any_unit_give_the_same_histories(ml1m, kind):
    def other(rows):
        units = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
        if kind in units:
            return rows.assign(timestamp=rows.timestamp * units[kind])
        times = pd.to_datetime(rows.timestamp, unit="s")
        if "/" in kind or kind == "UTC":
            return rows.assign(timestamp=times.dt.tz_localize("UTC").dt.tz_convert(kind))
        return rows.assign(timestamp=times.astype(kind))

    changed = bu.Dataset(**{split: other(getattr(ml1m, split)) for split in bu.SPLITS}, titles=ml1m.titles)
    for split in bu.SPLITS:
        assert getattr(changed, split).timestamp.equals(getattr(ml1m, split).timestamp)
    few = ml1m.test.sample(100, random_state=0)
    for a, b in zip(bu.liked_before(ml1m, few), bu.liked_before(ml1m, other(few))):  # rows need not come from a Dataset
        assert a.tolist() == b.tolist()
    assert (bu.sittings(ml1m, few) == bu.sittings(ml1m, other(few))).all()


def test_labels_may_be_true_and_false(toy):
    flags = {split: getattr(toy, split).astype({"label": bool}) for split in bu.SPLITS}
    assert make_dataset(**flags).train.equals(toy.train)


def test_times_that_cannot_mean_what_they_should_are_told(toy):
    with pytest.warns(UserWarning, match="all rows have the same time: no row has a history"):
        make_dataset(**{split: getattr(toy, split).assign(timestamp=5) for split in bu.SPLITS[:1]},
                     valid=make_rows(7, 40).assign(timestamp=5, user=lambda r: r.user + 20),
                     test=make_rows(8, 40).assign(timestamp=5, user=lambda r: r.user + 40))  # fmt: skip
    with pytest.warns(UserWarning, match=r"[\d,]+ rows of train are later than the first of test: .*split by time"):
        make_dataset(test=make_rows(2, 100, start=500))


def test_an_index_with_repeats_is_no_trouble(toy):
    rows = toy.train.set_axis([0] * len(toy.train))
    assert make_dataset(train=rows).train.user.tolist() == toy.train.user.tolist()
    with pytest.raises(ValueError, match=r"train, row 0: user \d+ and item \d+ come twice"):
        make_dataset(train=pd.concat([rows, rows.iloc[[7]]]))


def test_a_missing_time_cast_to_a_whole_number_is_refused(toy):
    """datetime64 cast to int64 turns NaT into the smallest number: a row that would be before all others."""
    for unit in (1, 1000, 10**9):
        times = toy.train.timestamp * unit
        times.iloc[3] = np.iinfo(np.int64).min
        with pytest.raises(ValueError, match="row 3: no timestamp"):
            replace(toy, train=toy.train.assign(timestamp=times))
