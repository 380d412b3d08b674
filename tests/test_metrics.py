"""Metrics against scikit-learn, and the statistics against cases whose answer is known."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
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
        ([], [], "0 labels and 0 scores; give one score a label, at least one"),
        ([1, 0], [0.1], "2 labels and 1 scores"),
        ([1, 0], [0.1, np.nan], "score 1 is nan"),
        ([1, 0], pd.array([0.1, pd.NA], dtype="Float64"), "score 1 is nan"),
        ([1, 2], [0.1, 0.2], "label 2; labels must be 0 or 1"),
        ([1, np.nan], [0.1, 0.2], "label nan; labels must be 0 or 1"),
        ([1, 0], [[0.1], [0.2]], r"scores have shape \(2, 1\); give one a row"),
        ([[1, 0]], [0.1, 0.2], r"labels have shape \(1, 2\); give one a row"),
        ([1, 0], 0.5, r"scores have shape \(\); give one a row"),
        ([1, 0], ["high", "low"], "scores hold .*; give numbers"),
    ],
)
def test_bad_input_is_named(labels, scores, message):
    with pytest.raises(ValueError, match=message):
        bu.auc(labels, scores)


@pytest.mark.parametrize(
    "kind",
    [
        list,
        tuple,
        pd.Series,
        lambda x: pd.Series(x, index=range(len(x), 0, -1)),
        lambda x: pd.Series(x, dtype="Float64"),
        lambda x: pd.Series(x, dtype="double[pyarrow]"),
        torch.tensor,
        lambda x: torch.tensor(x, requires_grad=True),
        lambda x: torch.tensor(x).half(),
        lambda x: np.array(x, dtype=object),
    ],
)
def test_scores_may_come_in_any_container(kind):
    users, labels, scores = [7, 7, 7, 8, 8], [True, False, True, False, True], [0.5, 0.25, 0.125, 0.75, 1.0]
    assert bu.auc(labels, kind(scores)) == bu.auc(np.array(labels), np.array(scores))
    for people in (users, pd.Series(users, index=list("abcde")), pd.array(users, dtype="Int64"), np.array(users)):
        assert bu.uauc(people, labels, kind(scores)) == (0.75, 2)


def test_users_in_another_order_are_refused():
    labels, scores = pd.Series([1, 0, 1, 0]), pd.Series([0.9, 0.1, 0.2, 0.8])
    users = pd.Series([1, 1, 2, 2])
    assert bu.uauc(users, labels, scores) == (0.5, 2)
    for measure in (bu.uauc, bu.bootstrap_ci, lambda u, y, s: bu.paired_test(u, y, s, s)):
        with pytest.raises(ValueError, match="users have the rows of labels in another order"):
            measure(users.loc[[2, 0, 3, 1]], labels, scores)


@pytest.mark.parametrize("users", [[1, 1, None], [1, 1, np.nan], [1, 1], [1, 1, 2, 2]])
def test_each_row_needs_its_user(users):
    for measure in (bu.uauc, bu.bootstrap_ci, lambda u, y, s: bu.paired_test(u, y, s, s)):
        with pytest.raises(ValueError, match="users.* for 3 labels; name the user of each row"):
            measure(users, [0, 1, 1], [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="at least one"):
        bu.uauc([], [], [])


def test_the_bootstrap_takes_little_memory_and_the_same_draws():
    """Many users at once would be gigabytes of counts; in parts the draws are those of one go."""
    rng = np.random.default_rng(0)
    users, labels, scores = np.repeat(np.arange(6_000), 20), np.tile([0, 1], 60_000), rng.random(120_000)
    peaks = []
    for draws in (90, 250):  # 83 at once
        tracemalloc.start()
        (values,) = bu._bootstrap(users, labels, [scores], draws, seed=3)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
    counts = np.random.default_rng(3).multinomial(6_000, np.full(6_000, 1 / 6_000), size=250)
    assert np.allclose(values["uauc"], counts @ bu.user_aucs(users, labels, scores).to_numpy() / 6_000)
    assert len(values["auc"]) == 250


@pytest.mark.parametrize("users", [1, 2, 4, 5, 40])
def test_of_few_users_no_interval_is_told(users):
    """One user drawn again and again is always the same: an interval of no width would call any noise sure."""
    rng = np.random.default_rng(users)
    rows = pd.DataFrame({"user": np.repeat(np.arange(users), 30), "label": np.tile([0, 1], 15 * users)})
    a, b = rng.random((2, len(rows)))
    ci, test = bu.bootstrap_ci(rows.user, rows.label, a), bu.paired_test(rows.user, rows.label, a, b)
    told = [*np.ravel(list(ci.values())), *test[["low", "high", "p"]].to_numpy().ravel()]
    assert np.isnan(told).all() == (users < 5) and np.isnan(told).any() == (users < 5)
    assert test.difference.auc == pytest.approx(bu.auc(rows.label, b) - bu.auc(rows.label, a))


def test_p_is_two_sided_and_the_same_whichever_way_round():
    rng = np.random.default_rng(1)
    users, labels = np.repeat(np.arange(60), 10), rng.integers(0, 2, 600)
    a, b = rng.random(600), rng.random(600) + 0.05 * labels
    there, back = bu.paired_test(users, labels, a, b), bu.paired_test(users, labels, b, a)
    assert np.allclose(there[["difference", "low", "high"]], -back[["difference", "high", "low"]])
    assert np.allclose(there.p, back.p)
    one, two = bu._bootstrap(users, labels, [a, b], 1000, seed=0)
    for name in ("auc", "uauc"):
        below = (two[name] - one[name] <= 0).sum()
        assert 0 < below < 500 and there.p[name] == pytest.approx(2 * (1 + below) / 1001)


def test_few_users_that_count_have_no_interval_of_uauc():
    rows = pd.DataFrame({"user": np.repeat(np.arange(50), 4), "label": [0, 1] * 6 + [1] * 188})  # three users count
    scores = np.random.default_rng(0).random(200)
    found = bu.evaluate(rows, scores)
    assert found["users"] == 3 and np.isnan([found["uauc_lo"], found["uauc_hi"]]).all()
    assert found["auc_lo"] < found["auc"] < found["auc_hi"]
