"""Metrics against scikit-learn, and the statistics against cases whose answer is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

import binllm_utils as bu

cases = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 1), st.sampled_from([-1.5, 0.0, 0.1, 0.1 + 1e-12, 2.0, 1e9])),
    min_size=2,
    max_size=60,
)


def loop_uauc(users, labels, scores):
    """UAUC as a plain loop over users, with scikit-learn."""
    each = {}
    for user in np.unique(users):
        mine = users == user
        if len(set(labels[mine])) == 2:
            each[user] = roc_auc_score(labels[mine], scores[mine])
    return each


@settings(max_examples=300, deadline=None)
@given(cases)
def test_both_metrics_equal_scikit_learn(rows):
    users, labels, scores = (np.array(column) for column in zip(*rows))
    if len(set(labels)) == 2:
        assert bu.auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    each = loop_uauc(users, labels, scores)
    got = bu.user_aucs(users, labels, scores)
    assert set(got.dropna().index) == set(each)
    if each:
        mean, counted = bu.uauc(users, labels, scores)
        assert mean == pytest.approx(np.mean(list(each.values())), abs=1e-12) and counted == len(each)


def test_equal_on_many_random_rows():
    rng = np.random.default_rng(0)
    users, labels = rng.integers(0, 3000, 50_000), rng.integers(0, 2, 50_000)
    scores = rng.normal(size=50_000).round(1)  # many ties
    assert bu.auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    each = loop_uauc(users, labels, scores)
    assert bu.uauc(users, labels, scores)[0] == pytest.approx(np.mean(list(each.values())), abs=1e-12)


def test_users_may_have_any_names():
    mean, counted = bu.uauc(["ann", "ann", "bob", "cyd", "cyd"], [1, 0, 1, 1, 1], [2, 1, 0, 0, 0])
    assert (mean, counted) == (1.0, 1)  # bob has one row, cyd one class


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([1, 1], [0.1, 0.2], "2 of 2 rows are liked"),
        ([], [], "0 of 0 rows"),
        ([1, 0], [0.1], "2 labels and 1 scores"),
        ([1, 0], [0.1, np.nan], "score 1 is nan"),
        ([1, 2], [0.1, 0.2], "labels must be 0 or 1"),
    ],
)
def test_bad_input_is_named(labels, scores, message):
    with pytest.raises(ValueError, match=message):
        bu.auc(labels, scores)


def test_uauc_of_nobody_is_an_error():
    with pytest.raises(ValueError, match="counts no user"):
        bu.uauc([0, 1], [0, 1], [0.3, 0.4])


@pytest.fixture
def panel():
    """200 users with 10 rows each; their scores follow the label with noise."""
    rng = np.random.default_rng(1)
    users = np.repeat(np.arange(200), 10)
    labels = rng.integers(0, 2, 2000)
    return users, labels, labels + rng.normal(0, 1.5, 2000)


def test_the_bootstrap_draws_users(panel):
    """Its AUC values are those of really repeating the drawn users' rows."""
    users, labels, scores = panel
    values = bu._bootstrap(users, labels, scores, draws=5, seed=7)
    counts = np.random.default_rng(7).multinomial(200, np.full(200, 1 / 200), size=5)
    for draw in range(5):
        rows = np.repeat(np.arange(2000), counts[draw][users])
        assert values["auc"][draw] == pytest.approx(roc_auc_score(labels[rows], scores[rows]), abs=1e-12)
        each = loop_uauc(users, labels, scores)
        times = [counts[draw][user] for user in each]
        weighted = np.average(list(each.values()), weights=times)
        assert values["uauc"][draw] == pytest.approx(weighted, abs=1e-12)


def test_intervals_hold_the_value_and_narrow_with_users(panel):
    users, labels, scores = panel
    all_users, few = bu.bootstrap_ci(users, labels, scores), bu.bootstrap_ci(users[:300], labels[:300], scores[:300])
    low, high = all_users["auc"]
    assert low < bu.auc(labels, scores) < high
    assert high - low < 0.6 * (few["auc"][1] - few["auc"][0])
    assert all_users == bu.bootstrap_ci(users, labels, scores)  # the seed decides


def test_intervals_cover_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        users, labels = np.repeat(np.arange(60), 8), rng.integers(0, 2, 480)
        scores = labels + rng.normal(0, 1, 480)  # its AUC is P(N(1, sqrt 2) > 0) = .7602
        low, high = bu.bootstrap_ci(users, labels, scores, draws=200, seed=trial)["auc"]
        covered += low <= 0.7602 <= high
    assert 88 <= covered <= 100


def test_the_paired_test_tells_better_from_equal(panel):
    users, labels, scores = panel
    better = scores + 0.7 * labels
    test = bu.paired_test(users, labels, scores, better)
    assert (test.low > 0).all() and (test.p < 0.01).all()
    assert test.loc["auc", "difference"] == pytest.approx(bu.auc(labels, better) - bu.auc(labels, scores), abs=1e-12)
    back = bu.paired_test(users, labels, better, scores)
    assert back.loc["uauc", "high"] == pytest.approx(-test.loc["uauc", "low"])
    same = bu.paired_test(users, labels, scores, 3 * scores + 1)  # the same order
    assert (same.difference.abs() < 1e-12).all() and (same.p == 1).all()


def test_pairing_sees_what_separate_intervals_cannot(panel):
    users, labels, scores = panel
    slightly = scores + 0.15 * labels
    a, b = (bu.bootstrap_ci(users, labels, s)["auc"] for s in (scores, slightly))
    assert a[1] > b[0]  # the intervals overlap
    assert bu.paired_test(users, labels, scores, slightly).loc["auc", "low"] > 0


def test_evaluate_gathers_a_records_numbers(ml1m):
    result = bu.evaluate(ml1m.test, bu.popularity_baseline(ml1m, ml1m.test))
    assert list(result) == ["auc", "auc_lo", "auc_hi", "uauc", "uauc_lo", "uauc_hi", "users"]
    assert (result["auc"], result["uauc"], result["users"]) == (0.7317, 0.6816, 224)
    assert result["auc_lo"] < 0.7317 < result["auc_hi"]
