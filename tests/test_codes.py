"""Codes: training, text forms, similarity and search."""

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_dataset, make_rows
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import binllm_extras as bx
import binllm_utils as bu

code = st.integers(1, 16).flatmap(lambda n: arrays(np.uint8, 8 * n, elements=st.integers(0, 1)))


@given(code)
def test_both_texts_come_back(bits):
    assert (bu.from_bits(bu.to_bits(bits)) == bits).all()
    assert (bu.from_dotted(bu.to_dotted(bits)) == bits).all()
    assert len(bu.to_bits(bits)) == len(bits)
    assert [int(part) for part in bu.to_dotted(bits).split(".")] == [int(p, 2) for p in chunks(bu.to_bits(bits))]


def chunks(text):
    return [text[i : i + 8] for i in range(0, len(text), 8)]


def test_the_papers_example():
    assert bu.to_dotted(bu.from_bits("10101100000100001111111000000001")) == "172.16.254.1"
    assert bx.to_hex(bu.from_bits("10101100000100001111111000000001")) == "ac10fe01"


@pytest.mark.parametrize(
    ("text", "part"),
    [("256.1.1.1", "1 is '256'"), ("1.-1", "2"), ("1..2", "2"), ("01.2", "1"), ("", "1"), ("²", "1"), ("1.2.", "3")],
)
def test_bad_dotted_text_is_named(text, part):
    with pytest.raises(ValueError, match=f"part {part}"):
        bu.from_dotted(text)


@pytest.mark.parametrize("text", ["", "0101", "01021010", "0101 010", "1" * 12])
def test_bad_bits_text_is_named(text):
    with pytest.raises(ValueError, match="not a code in bits"):
        bu.from_bits(text)


@pytest.mark.parametrize("bits", [np.zeros(12, int), np.zeros(0, int), np.full(8, 2), np.array(1)])
def test_bad_codes_are_refused(bits):
    for write in (bu.to_bits, bu.to_dotted):
        with pytest.raises(ValueError, match="a code"):
            write(bits)


def test_codes_must_agree_in_length():
    with pytest.raises(ValueError, match="users have 8 bits and items 16"):
        bu.Codes(np.zeros((2, 8), np.uint8), np.zeros((2, 16), np.uint8))
    with pytest.raises(ValueError, match="items: a code of 12 bits"):
        bu.Codes(np.zeros((2, 8), np.uint8), np.zeros((2, 12), np.uint8))


def test_similarity_is_the_share_of_equal_bits():
    a, b = bu.from_bits("11110000"), bu.from_bits("11111111")
    assert bu.hamming_similarity(a, b) == 0.5
    assert bu.hamming_similarity(a, a) == 1.0 and bu.hamming_similarity(a, 1 - a) == 0.0
    with pytest.raises(ValueError, match="8 and 16 bits"):
        bu.hamming_similarity(a, np.zeros(16, int))


def test_search_equals_brute_force():
    rng = np.random.default_rng(0)
    codes, query = rng.integers(0, 2, (500, 40)), rng.integers(0, 2, (7, 40))
    ids, similarity = bx.nearest_codes(codes, query, k=9)
    brute = bu.hamming_similarity(query[:, None], codes[None])
    assert np.allclose(similarity, -np.sort(-brute, axis=1)[:, :9])
    assert np.allclose(np.take_along_axis(brute, ids, 1), similarity)
    assert bx.nearest_codes(codes[:3], query, k=9)[0].shape == (7, 3)  # no more neighbours than codes
    with pytest.raises(ValueError, match="query has 8 bits and codes have 40"):
        bx.nearest_codes(codes, query[:, :8])


def test_the_sign_passes_the_gradient_of_tanh():
    x = torch.randn(5, 8, requires_grad=True)
    out = bu.straight_through(x)
    assert set(out.detach().numpy().round(6).ravel()) <= {-1.0, 1.0} and torch.equal(out > 0, x > 0)
    (out * torch.arange(8.0)).sum().backward()
    assert torch.allclose(x.grad, (1 - torch.tanh(x.detach()) ** 2) * torch.arange(8.0), atol=1e-6)


@pytest.mark.parametrize("recipe", bu.RECIPES)
def test_hamming_similarity_ranks_as_the_models_own_logits(toy, recipe):
    """What is trained is what the codes are: equal bits for codes in {-1, 1}, shared ones for codes in {0, 1}."""
    how = bu.RECIPES[recipe]
    torch.manual_seed(0)
    model = bu.BinMF(toy, 16, how)
    bu.train_cf(model, toy, lr=0.01, weight_decay=0, average=how.average, max_epochs=4, progress=False)
    codes, logits = model.codes(), bu.cf_scores(model, toy.test)
    a, b = (2.0 * side - 1 for side in codes.of(toy.test))
    products = ((a + 1) / 2 * (b + 1) / 2).sum(1) if how.zero_one else (a * b).sum(1)
    expected = model.scale.item() * products / 16 + model.offset.item() if how.scaled else products
    assert np.allclose(logits, expected, atol=1e-4) and np.ptp(logits) > 0


def test_recipes_differ_where_they_say(toy):
    paper, reference, ste = (bu.BinMF(toy, 8, bu.RECIPES[name]) for name in ("paper", "reference", "ste"))
    assert paper.project_user is paper.project_item and ste.project_user is not ste.project_item
    z = torch.tensor([[-0.2, 0.1, 3.0, -3.0]])
    assert paper.encode(z).tolist() == [[0, 1, 1, 0]] and ste.encode(z).tolist() == [[-1, 1, 1, -1]]
    reference.begin_epoch(0)
    assert torch.equal(reference.train().encode(z), torch.tanh(z))  # beta is 0 in the first epochs
    reference.begin_epoch(4000)
    assert reference.encode(z).abs().min() == 1  # and 1 in the end
    reference.begin_epoch(0)
    assert reference.eval().encode(z).abs().min() == 1  # at evaluation always binary


def test_the_average_of_the_weights_is_what_is_kept(toy):
    """An average that hardly moves keeps what the first step made (one step an epoch here), whatever comes after."""
    torch.manual_seed(0)
    calm = bu.BinMF(toy, 8, replace(bu.RECIPES["ste"], dropout=0.0))
    one_step, wild = copy.deepcopy(calm), copy.deepcopy(calm)
    settings = {"lr": 0.05, "weight_decay": 0, "progress": False}
    bu.train_cf(calm, toy, average=0.999999, max_epochs=5, **settings)
    bu.train_cf(one_step, toy, max_epochs=1, **settings)
    bu.train_cf(wild, toy, max_epochs=5, **settings)
    assert torch.allclose(calm.user.weight, one_step.user.weight, atol=1e-4)
    assert not torch.allclose(calm.user.weight, wild.user.weight, atol=1e-2)


def test_valid_without_a_user_of_both_classes_still_chooses_by_auc(toy):
    """One row a user, as leave-one-out splits have it: UAUC counts nobody, and must not stop the choice."""
    valid = toy.valid.drop_duplicates("user")
    _, curve = bu.fit_codes(make_dataset(valid=valid), bits=8, max_epochs=40, progress=False)
    codes, _ = bu.fit_codes(make_dataset(valid=valid), bits=8, max_epochs=40, progress=False)
    assert bu.auc(valid.label, codes.similarity(valid)) == pytest.approx(curve.valid_auc.max())


def test_vectors_give_the_logits(toy):
    model, _ = bx.fit_hybrid(toy, max_epochs=3, progress=False)
    users, items = model.vectors()
    product = (users[toy.test.user] * items[toy.test.item]).sum(1)
    assert np.allclose(product, bu.cf_scores(model, toy.test), atol=1e-5)


def test_decay_is_shared_among_many_rows():
    for name, n, decay in (
        ("ste", 33_891, 4e-4),
        ("ste", 338_910, 4e-5),
        ("ste", 100, 4e-4),
        ("past", 980_981, 1.4e-5),
    ):
        assert bu.RECIPES[name].settings(n)["weight_decay"] == pytest.approx(decay)
    for name in ("paper", "reference"):
        assert bu.RECIPES[name].settings(10**7)["weight_decay"] == bu.RECIPES[name].weight_decay
    assert bu.RECIPES["ste"].settings(33_891)["weight_decay"] == 4e-4  # to the bit, for the shipped codes


def test_codes_of_many_rows_are_worth_what_they_can_be():
    """With the decay of 33,891 rows these codes stay at one half."""
    n, rng = 200_000, np.random.default_rng(0)
    taste, content = rng.normal(size=(1000, 4)), rng.normal(size=(400, 4))
    rows = pd.DataFrame({"user": rng.integers(0, 1000, n), "item": rng.integers(0, 400, n), "timestamp": np.arange(n)})
    rows["label"] = ((taste[rows.user] * content[rows.item]).sum(1) + rng.logistic(size=n) > 0).astype(int)
    parts = {"train": rows[:180_000], "valid": rows[180_000:190_000], "test": rows[190_000:]}
    parts = {split: part.reset_index(drop=True) for split, part in parts.items()}
    many = bu.Dataset(**parts, titles=[str(i) for i in range(400)], name="many")
    codes, _ = bu.fit_codes(many, max_epochs=12, progress=False)
    assert bu.auc(many.test.label, codes.similarity(many.test)) > 0.6


def test_codes_learn_the_pattern_and_repeat(toy):
    codes, curve = bu.fit_codes(toy, bits=16, seed=3, max_epochs=300, progress=False)
    match = codes.similarity(toy.test)
    assert bu.auc(toy.test.label, match) > 0.75
    assert codes.users.shape == (20, 16) and codes.users.dtype == np.uint8
    again, _ = bu.fit_codes(toy, bits=16, seed=3, max_epochs=300, progress=False)
    assert (codes.users == again.users).all() and (codes.items == again.items).all()
    other, _ = bu.fit_codes(toy, bits=16, seed=4, max_epochs=300, progress=False)
    assert (codes.users != other.users).any()


def test_the_best_epoch_is_kept(toy):
    torch.manual_seed(0)
    model = bx.MF(toy.n_users, toy.n_items, 8)
    curve = bu.train_cf(model, toy, lr=0.1, weight_decay=0, patience=5, max_epochs=200, progress=False)
    kept = bu.auc(toy.valid.label, bu.cf_scores(model, toy.valid))
    best = np.flatnonzero(curve.valid_auc == kept)
    assert len(best) and any(len(curve) == min(200, epoch + 6) for epoch in best)  # it stopped five epochs after it


def test_unseen_ids_get_what_is_known_of_them():
    """Users 18, 19 and items 27-29 come after training only: the users share one code; an item has that of its tags."""
    train = make_rows(0, 400, n_users=18, n_items=27)
    tags = [("even",) if item % 2 == 0 else ("odd",) for item in range(30)]
    train["label"] = (train.item % 2 == 0).astype(int)  # everybody likes even items
    valid = make_rows(1, 100, start=1000)
    valid["label"] = (valid.item % 2 == 0).astype(int)
    dataset = make_dataset(train=train, valid=valid, tags=tags)
    codes, _ = bu.fit_codes(dataset, bits=16, max_epochs=100, progress=False)
    assert (codes.users[19] == codes.users[18]).all()
    assert (codes.items[27] == codes.items[29]).all()  # both odd, and nothing else known
    odd, even, _ = bu.hamming_similarity(codes.users[18], codes.items[27:])
    assert even > odd


def test_codes_take_features_of_ones_own(toy):
    """An unseen item has the code that its features say; those of `item_features` are what is taken unasked."""
    train, valid = (part.assign(label=part.item % 2) for part in (toy.train, toy.valid))
    hidden = replace(toy, train=train[~train.item.isin([3, 4, 5])], valid=valid)
    mine = np.arange(30, dtype=np.float32)[:, None] % 2  # what decides
    mine[[3, 4, 5]] = [[0], [1], [0]]
    settings = {"bits": 16, "max_epochs": 100, "progress": False}
    codes, _ = bu.fit_codes(hidden, features=mine, **settings)
    assert np.array_equal(codes.items[3], codes.items[5]) and not np.array_equal(codes.items[3], codes.items[4])
    usual, _ = bu.fit_codes(hidden, **settings)
    same, _ = bu.fit_codes(hidden, features=bu.item_features(hidden), **settings)
    assert np.array_equal(usual.items, same.items) and np.array_equal(usual.users, same.users)


@pytest.mark.parametrize("fit", [bu.fit_codes, bx.fit_hybrid])
def test_features_that_do_not_fit_are_refused(toy, fit):
    known = np.ones((toy.n_items, 2))
    for odd in (known[1:], known[:, 0], np.r_[known[1:], [[1, np.nan]]]):
        with pytest.raises(ValueError, match="give finite ones in 30 rows, one an item"):
            fit(toy, features=odd, max_epochs=1, progress=False)
    fit(toy, features=known, max_epochs=1, progress=False)  # float64 is as good


def test_features_tell_any_recipe_of_unseen_items(toy):
    """Without features of its own, the authors' recipe leaves unseen ids at random; given some, alike is alike."""
    hidden = replace(toy, train=toy.train[~toy.train.item.isin([3, 4, 5])])
    mine = np.arange(30)[:, None] % 2
    codes, _ = bu.fit_codes(hidden, 32, recipe="reference", features=mine, max_epochs=2, progress=False)
    assert np.array_equal(codes.items[3], codes.items[5])
    codes, _ = bu.fit_codes(hidden, 32, recipe="reference", max_epochs=2, progress=False)
    assert not np.array_equal(codes.items[3], codes.items[5])


def test_features_are_tags_and_how_often_seen():
    train = pd.DataFrame({"user": [0, 1, 0], "item": [0, 0, 2], "label": [1, 0, 1], "timestamp": [1, 2, 3]})
    later = {split: train.assign(timestamp=train.timestamp + 10 * k) for k, split in enumerate(bu.SPLITS)}
    dataset = make_dataset(**later, titles=["a", "b", "c"], tags=[("x", "y"), (), ("y",)])
    features = bu.item_features(dataset)
    seen = np.log1p([2, 0, 1])
    assert np.allclose(features, np.c_[[1, 0, 0], [1, 0, 1], seen / seen.std()])
    plain = bu.item_features(make_dataset(**later, titles=["a", "b", "c"]))
    assert np.allclose(plain, features[:, -1:])


def products(codes):
    """Inner products of all pairs of +-1 codes, [users, items]."""
    return (2.0 * codes.users - 1) @ (2.0 * codes.items - 1).T


def left_over(codes, users, items, weights):
    """Share of the weighted variance of all inner products that the best a B_u . B_i + c leaves, pair by pair."""
    pair = np.outer(*weights).ravel()
    match, logit = products(codes).ravel(), (users @ items.T).ravel()
    cov = np.cov(match, logit, aweights=pair)
    return 1 - cov[0, 1] ** 2 / (cov[0, 0] * cov[1, 1])


def test_more_bits_follow_the_products_more_closely():
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(60, 8)), rng.normal(size=(90, 8))
    even = np.ones(60), np.ones(90)
    left = [left_over(bx.binarise(users, items, bits), users, items, even) for bits in (8, 16, 32, 64, 128)]
    assert (np.diff(left) < 0).all() and left[0] < 0.6 and left[-1] < 0.05


def test_descent_beats_its_start_and_weights_count():
    rng = np.random.default_rng(1)
    users, items = rng.normal(size=(80, 6)), rng.normal(size=(50, 6))
    weights = rng.integers(1, 50, 80).astype(float), rng.integers(1, 50, 50).astype(float)
    ours = left_over(bx.binarise(users, items, 32, *weights), users, items, weights)
    assert ours < 0.5 * left_over(bx.binarise(users, items, 32, *weights, sweeps=0), users, items, weights)
    assert ours < left_over(bx.binarise(users, items, 32), users, items, weights)


def test_loss_without_listing_pairs_is_the_loss_of_all_pairs():
    rng = np.random.default_rng(2)
    sides = [rng.normal(size=(20, 5)), rng.normal(size=(30, 5))]
    codes = [rng.choice([-1.0, 1.0], (20, 8)), rng.choice([-1.0, 1.0], (30, 8))]
    weights = [rng.random(20), rng.random(30)]
    scale, offset, loss = bx._scale_and_offset(sides, codes, weights)
    match, logit = (codes[0] @ codes[1].T).ravel(), (sides[0] @ sides[1].T).ravel()
    slope, intercept = np.polyfit(match, logit, 1, w=np.sqrt(np.outer(*weights).ravel()))
    as_codes = bu.Codes(*((side > 0).astype(np.uint8) for side in codes))
    assert np.allclose([scale, offset, loss], [slope, intercept, left_over(as_codes, *sides, weights)])


def test_a_row_of_weight_zero_has_no_say_but_gets_a_code():
    rng = np.random.default_rng(3)
    users, items = rng.normal(size=(40, 4)), rng.normal(size=(30, 4))
    alone = bx.binarise(users, items, 16)
    guests = np.vstack([users, 100 * rng.normal(size=(25, 4)), users[:1]])
    joined = bx.binarise(guests, items, 16, np.r_[np.ones(40), np.zeros(26)])
    assert (joined.users[:40] == alone.users).all() and (joined.items == alone.items).all()
    logits, match = guests[40:65] @ items.T, products(joined)[40:65]
    assert np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(logits, match)]) > 0.8


@pytest.mark.parametrize("minority", [0.05, 0.2])
def test_no_bit_is_nearly_constant(minority):
    rng = np.random.default_rng(4)
    users, items = np.c_[rng.normal(size=(200, 2)) * 0.1, np.ones(200)], rng.normal(size=(100, 3))  # mostly popularity
    codes = bx.binarise(users, items, 16, minority=minority)
    for side in (codes.users, codes.items):
        share = side.mean(axis=0)
        assert (np.minimum(share, 1 - share) >= minority - 0.011).all()


def test_fold_in_finds_what_the_penalised_loss_asks_for(toy):
    """Against scikit-learn: logistic regression on the row's past, the average user's logits as its starting point."""
    model, _ = bx.fit_hybrid(toy, dim=3, max_epochs=30, progress=False)
    users, items = model.vectors()
    got = bx.fold_in(model, toy, toy.test)
    average = np.r_[model.taste.detach().numpy(), 0, 1]
    penalty = bx.PENALTY
    log = toy.log

    def loss_slope(x, past):
        p = 1 / (1 + np.exp(-(items[past.item] @ x)))
        return (items[past.item][:, :-1]).T @ (p - past.label) + penalty * (x - average)[:-1]

    moved = 0
    for x, row in zip(got, toy.test.itertuples()):
        past = log[(log.user == row.user) & (log.timestamp < row.timestamp)]
        assert np.abs(loss_slope(x, past)).max() < 1e-3 and x[-1] == 1
        moved += not np.allclose(x, average)
    assert moved > 50
    stranger = toy.test.iloc[:1].assign(user=99)
    assert np.allclose(bx.fold_in(model, toy, stranger)[0], average, atol=1e-6)


def test_report_counts_what_it_says():
    codes = np.array(
        [[0, 1, 0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 0, 0, 1], [0, 1, 0, 1, 1, 0, 0, 1]]
    )
    row = bx.code_report(bu.Codes(codes, codes)).loc["users"]
    assert row.to_dict() | {"effective_bits": 0} == {
        "rows": 4,
        "distinct": 0.75,
        "largest": 2,
        "constant": 4,
        "entropy_min": 0,
        "entropy_mean": pytest.approx((1 + 1 + 2 * 0.811278) / 8, abs=1e-6),
        "effective_bits": 0,
        "correlation": pytest.approx(np.abs(np.corrcoef(codes[:, [2, 3, 4, 7]].T)[np.triu_indices(4, 1)]).mean()),
    }
    independent = np.array([[(row >> bit) & 1 for bit in range(8)] for row in range(256)])
    full = bx.code_report(bu.Codes(independent, independent)).loc["items"]
    assert full.effective_bits == pytest.approx(8) and full.correlation == pytest.approx(0, abs=1e-12)
    assert full.entropy_mean == full.distinct == 1
    still = bx.code_report(bu.Codes(np.zeros((5, 8), int), np.zeros((5, 8), int))).loc["users"]
    assert (still.constant, still.effective_bits, still.largest) == (8, 0, 5)


def test_codes_of_embeddings_learn_labels_the_vectors_explain(toy):
    """Vectors of a recommender that knows the pattern, of different lengths on the two sides."""
    rng = np.random.default_rng(0)
    users = np.c_[np.where(np.arange(20) % 2, 1.0, -1.0), rng.normal(size=(20, 3))]
    items = np.c_[np.where(np.arange(30) % 2, 1.0, -1.0), rng.normal(size=(30, 6))]
    codes, curve = bx.codes_from_embeddings(users, items, toy.train, bits=8, progress=False)
    match = codes.similarity(toy.test)
    assert bu.auc(toy.test.label, match) > 0.75 and len(curve) > 1
    assert (codes.users.shape, codes.items.shape) == ((20, 8), (30, 8))


def test_bad_training_input_is_named(toy):
    for bits in (12, 0, -8):
        with pytest.raises(ValueError, match=f"bits is {bits}; a code must have a positive multiple of 8"):
            bu.fit_codes(toy, bits=bits)
    with pytest.raises(ValueError, match="recipe is 'magic'; choose one of paper, reference, ste, distinct"):
        bu.fit_codes(toy, recipe="magic")
    with pytest.raises(ValueError, match="valid: all labels are 1; likes and dislikes needed"):
        bu.fit_codes(make_dataset(valid=toy.valid[toy.valid.label == 1]), progress=False)
    with pytest.raises(ValueError, match="20 lists of tags for 30 items"):
        make_dataset(tags=[()] * 20)


def test_bad_vectors_are_named(toy):
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(20, 4)), rng.normal(size=(30, 4))
    broken = items.copy()
    broken[7, 2] = np.nan
    for make in (bx.binarise, lambda u, i: bx.codes_from_embeddings(u, i, toy.train)):
        with pytest.raises(ValueError, match="row 7: the vector holds NaN or infinity"):
            make(users, broken)
        with pytest.raises(ValueError, match="all 20 vectors are equal"):
            make(np.ones((20, 4)), items)
        with pytest.raises(ValueError, match="one row an id"):
            make(users[:, 0], items)
    with pytest.raises(ValueError, match="users have 4 numbers and items 3; they must agree"):
        bx.binarise(users, items[:, :3])
    with pytest.raises(ValueError, match="item 29 has no vector; ids here go from 0 to 28"):
        bx.codes_from_embeddings(users, items[:29], toy.train)
    with pytest.raises(ValueError, match="interactions: all labels are 0"):
        bx.codes_from_embeddings(users, items, toy.train.assign(label=0))
    with pytest.raises(ValueError, match="bits is 20"):
        bx.codes_from_embeddings(users, items, toy.train, bits=20)


def test_a_user_with_one_row_is_trained_and_left_out_of_uauc():
    """One interaction is no reason to fail: the user gets a code; only UAUC cannot count such a user, and says so."""
    lonely = pd.DataFrame({"user": [20], "item": [3], "label": [1], "timestamp": [500]})
    dataset = make_dataset(train=pd.concat([make_rows(0, 400), lonely], ignore_index=True))
    codes, _ = bu.fit_codes(dataset, bits=8, max_epochs=3, progress=False)
    assert codes.users.shape == (21, 8)
    with pytest.warns(UserWarning, match="UAUC counts no user: each has one row or one class"):
        mean, users = bu.uauc(lonely.user, lonely.label, [0.5])
    assert np.isnan(mean) and users == 0


@pytest.fixture(scope="session")
def shipped(ml1m):
    return bu.cached_codes(ml1m)


def test_the_shipped_codes_belong_to_this_recipe(ml1m, shipped, monkeypatch, tmp_path):
    """They must be read, not fitted anew: whoever changes the recipe ships new codes (and then new results)."""
    monkeypatch.setattr(bu, "CACHE", tmp_path)
    for recipe, bits, seed in (
        ("ste", 32, 0),
        ("ste", 32, 1),
        ("ste", 32, 2),
        ("distinct", 32, 0),
        ("distinct", 64, 0),
    ):
        bu.cached_codes(ml1m, bits, seed, recipe)
    bu.cached_codes(bu.load_ml1m(past="all"), recipe="past")
    assert not (tmp_path / "codes").exists()
    valid = ml1m.valid
    match = shipped.similarity(valid)
    assert bu.auc(valid.label, match) > 0.743 and bu.uauc(valid.user, valid.label, match)[0] > 0.685


def test_distinct_codes_of_64_bits_are_healthy(ml1m):
    codes = bu.cached_codes(ml1m, 64, 0, "distinct")
    seen = np.unique(ml1m.train.user), np.unique(ml1m.train.item)
    report = bx.code_report(bu.Codes(codes.users[seen[0]], codes.items[seen[1]]))
    assert (report.distinct >= 0.9).all() and (report.constant == 0).all() and (report.entropy_min > 0.05).all()


def test_a_new_users_past_and_a_new_films_tags_tell_something(ml1m):
    """On the valid months: folding in must rank unseen users' rows better than one code for all of them."""
    model, _ = bx.fit_hybrid(ml1m, progress=False)
    rows = ml1m.valid[~ml1m.valid.user.isin(ml1m.train.user)]
    now = bx.codes_so_far(model, ml1m, rows)
    so_far = bu.hamming_similarity(now.users, now.items[rows.item])
    users, items = model.vectors()
    codes = bx.binarise(users, items, 32, *bx.id_weights(ml1m))
    assert (codes.items == now.items).all()  # newcomers change nobody else's code
    default = codes.similarity(rows)
    assert bu.auc(rows.label, so_far) > bu.auc(rows.label, default) + 0.03


def test_codes_are_fitted_once(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(bu, "CACHE", tmp_path)
    first = bu.cached_codes(toy, bits=8)
    (file,) = (tmp_path / "codes").iterdir()
    stamp = file.stat().st_mtime_ns
    second = bu.cached_codes(toy, bits=8)
    assert file.stat().st_mtime_ns == stamp and (first.items == second.items).all()


def test_ids_without_a_code_are_named(toy_codes):
    """-1 is what libraries call "unknown"; it must not mean the last one."""
    rows = pd.DataFrame({"user": [0, -1], "item": [0, 0]})
    with pytest.raises(ValueError, match="user -1 has no code; ids here go from 0 to 19"):
        toy_codes.similarity(rows)
    with pytest.raises(ValueError, match="item 30 has no code; ids here go from 0 to 29"):
        toy_codes.of(pd.DataFrame({"user": [0], "item": [30]}))


def test_the_same_rows_cut_elsewhere_are_other_data(toy, tmp_path, monkeypatch):
    """Or codes would be handed out that have learned from what is valid now."""
    monkeypatch.setattr(bu, "CACHE", tmp_path)
    rows, made = pd.concat([toy.train, toy.valid], ignore_index=True), []

    def fit(dataset, bits, seed, recipe):
        made.append(len(dataset.train))
        return bu.fit_codes(dataset, bits, seed, max_epochs=1, progress=False)

    for cut in (300, 350, 300):
        data = replace(toy, train=rows.head(cut), valid=rows.iloc[cut:])
        bu.cached_codes(data, 8, recipe="mine", fit=fit)
    assert made == [300, 350]
