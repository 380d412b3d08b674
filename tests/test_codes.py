"""Codes: training, text forms, similarity and search."""

import numpy as np
import pytest
import torch
from conftest import make_dataset, make_rows
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

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
    ids, similarity = bu.nearest_codes(codes, query, k=9)
    brute = bu.hamming_similarity(query[:, None], codes[None])
    assert np.allclose(similarity, -np.sort(-brute, axis=1)[:, :9])
    assert np.allclose(np.take_along_axis(brute, ids, 1), similarity)
    assert bu.nearest_codes(codes[:3], query, k=9)[0].shape == (7, 3)  # no more neighbours than codes
    with pytest.raises(ValueError, match="query has 8 bits and codes have 40"):
        bu.nearest_codes(codes, query[:, :8])


def test_the_sign_passes_the_gradient_of_tanh():
    model = bu.BinMF(3, 3, 8)
    x = torch.randn(5, 8, requires_grad=True)
    out = model.encode(x)
    assert set(out.detach().numpy().round(6).ravel()) <= {-1.0, 1.0}
    (out * torch.arange(8.0)).sum().backward()
    got, x.grad = x.grad.clone(), None
    (torch.tanh(model.project(x)) * torch.arange(8.0)).sum().backward()
    assert torch.allclose(got, x.grad, atol=1e-6)


def test_codes_learn_the_pattern_and_repeat(toy):
    codes, curve = bu.fit_codes(toy, bits=16, seed=3, max_epochs=300, progress=False)
    match = bu.hamming_similarity(codes.users[toy.test.user], codes.items[toy.test.item])
    assert bu.auc(toy.test.label, match) > 0.75
    assert codes.users.shape == (20, 16) and codes.users.dtype == np.uint8
    again, _ = bu.fit_codes(toy, bits=16, seed=3, max_epochs=300, progress=False)
    assert (codes.users == again.users).all() and (codes.items == again.items).all()
    other, _ = bu.fit_codes(toy, bits=16, seed=4, max_epochs=300, progress=False)
    assert (codes.users != other.users).any()


def test_the_best_epoch_is_kept(toy):
    torch.manual_seed(0)
    model = bu.MF(toy.n_users, toy.n_items, 8)
    curve = bu.train_cf(model, toy, lr=0.1, weight_decay=0, patience=5, max_epochs=200, progress=False)
    assert bu.auc(toy.valid.label, bu.cf_scores(model, toy.valid)) == curve.valid_auc.max()
    assert len(curve) == min(200, curve.valid_auc.idxmax() + 6)  # it stopped five epochs after the best


def test_unseen_ids_share_the_default_code():
    train = make_rows(0, 400, n_users=18, n_items=27)  # users 18, 19 and items 27-29 come later only
    dataset = make_dataset(train=train)
    codes, _ = bu.fit_codes(dataset, bits=16, max_epochs=50, progress=False)
    default = codes.users[18]
    assert (codes.users[19] == default).all() and (codes.items[27:] == default).all()
    assert len(np.unique(codes.users[:18], axis=0)) > 1


def test_bad_training_input_is_named(toy):
    with pytest.raises(ValueError, match="bits is 12"):
        bu.fit_codes(toy, bits=12)
    with pytest.raises(ValueError, match="valid: all labels are 1"):
        bu.fit_codes(make_dataset(valid=toy.valid[toy.valid.label == 1]), progress=False)


def test_the_shipped_codes_belong_to_this_recipe(ml1m):
    """They must be read, not fitted anew: whoever changes the recipe ships new codes (and then new results)."""
    recipe = bu.fingerprint(bu.BinMF, bu.train_cf, bu.fit_codes, ml1m.train, ml1m.valid)
    assert (bu.ROOT / "data/codes" / f"ml-1m-32bits-seed0-{recipe}.npz").exists()
    codes = bu.cached_codes(ml1m)
    valid = bu.hamming_similarity(codes.users[ml1m.valid.user], codes.items[ml1m.valid.item])
    assert bu.auc(ml1m.valid.label, valid) > 0.69


def test_codes_are_fitted_once(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(bu, "CACHE", tmp_path)
    first = bu.cached_codes(toy, bits=8)
    (file,) = (tmp_path / "codes").iterdir()
    stamp = file.stat().st_mtime_ns
    second = bu.cached_codes(toy, bits=8)
    assert file.stat().st_mtime_ns == stamp and (first.items == second.items).all()
