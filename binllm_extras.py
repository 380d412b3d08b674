"""What goes beyond the paper, or beside it, and two or more notebooks need; `binllm_utils.py` is the paper's own walk.

Baselines, health and search of codes, other ways to codes, and lessons for an LLM: bit literacy, which
teaches it to read codes, and title lessons, which teach it what a collaborative model thinks of films.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

import binllm_utils as bu
from binllm_data import _column, _ids, _seconds
from binllm_llm import _check_bare
from binllm_utils import Codes, _check_bits, _one_code, as_array, check_both_classes, to_pairs, train_cf, zero_unseen


# ---------------------------------------------------------------------------------------------------------- baselines
class MF(nn.Module):
    """Matrix factorisation without biases, as in the paper's Table 2: logit = e_u . e_i, float32 [rows]."""

    def __init__(self, n_users, n_items, dim):
        super().__init__()
        self.user, self.item = nn.Embedding(n_users, dim), nn.Embedding(n_items, dim)

    def forward(self, users, items):
        return (self.user(users) * self.item(items)).sum(-1)


def fit_mf(dataset, dim=256, seed=0, max_epochs=600, progress=True):
    """(MF, learning curve): the paper's collaborative baseline with the published settings, fitted by `train_cf`."""
    torch.manual_seed(seed)
    model, settings = MF(dataset.n_users, dataset.n_items, dim), {"lr": 1e-3, "weight_decay": 1e-4}
    return model, train_cf(model, dataset, **settings, seed=seed, max_epochs=max_epochs, progress=progress)


class HybridMF(nn.Module):
    """Matrix factorisation with biases and item features, much like LightFM (Kula, 2015).

    logit = (e_u + t) . e_i + b_u + b_i + c, float32 [rows]: t is the taste all users share, and an item's e_i and b_i
    are its own plus a linear map of `features`, a float32 array [n_items, F]; F may be 0. Products are dropped at
    random while training, so that no few of them carry everything.
    """

    def __init__(self, n_users, n_items, dim, features, dropout=0.5):
        super().__init__()
        self.user, self.item = nn.Embedding(n_users, dim), nn.Embedding(n_items, dim)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.3)
        self.user_bias = nn.Embedding.from_pretrained(torch.zeros(n_users, 1), freeze=False)
        self.item_bias = nn.Embedding.from_pretrained(torch.zeros(n_items, 1), freeze=False)
        self.register_buffer("features", torch.as_tensor(features))
        self.content = nn.Parameter(torch.zeros(self.features.shape[1], dim + 1))
        self.taste, self.offset = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(()))
        self.dropout = dropout

    def describe(self, items):
        """(e_i [..., dim], b_i [...]) of item ids."""
        content = self.features[items] @ self.content
        return self.item(items) + content[..., :-1], self.item_bias(items)[..., 0] + content[..., -1]

    def forward(self, users, items):
        e, b = self.describe(items)
        products = F.dropout((self.user(users) + self.taste) * e, self.dropout, self.training)
        return products.sum(-1) + self.user_bias(users)[..., 0] + b + self.offset

    @torch.no_grad()
    def vectors(self):
        """(users [n_users, dim + 2], items [n_items, dim + 2]), float32: the inner product of two is their logit."""
        n_users, n_items = self.user.num_embeddings, self.item.num_embeddings
        e, b = self.describe(torch.arange(n_items))
        users = torch.cat([self.user.weight + self.taste, self.user_bias.weight, torch.ones(n_users, 1)], 1)
        items = torch.cat([e, torch.ones(n_items, 1), (b + self.offset)[:, None]], 1)
        return users.numpy(), items.numpy()


LR, PENALTY = 5e-3, 3.3891  # the penalty on squares goes with the loss summed over all rows; chosen on valid


def fit_hybrid(dataset, dim=8, seed=0, features=None, max_epochs=300, progress=True):
    """(HybridMF, learning curve): our continuous model, settings chosen on valid.

    features: float32 [n_items, F]; None takes `bu.item_features`. Ids that training never saw keep a zero embedding: an
    unseen user has the taste all share, an unseen item what its features say. Raises ValueError if they do not fit.
    """
    torch.manual_seed(seed)
    features = bu.item_features(dataset) if features is None else bu.check_features(features, dataset)
    model = HybridMF(dataset.n_users, dataset.n_items, dim, features)
    zero_unseen(model, dataset.train)
    settings = {"lr": LR, "weight_decay": PENALTY / len(dataset.train), "seed": seed}
    return model, train_cf(model, dataset, **settings, max_epochs=max_epochs, progress=progress)


# ----------------------------------------------------------------------------------------------- health and neighbours
def nearest_codes(codes, query, k=10):
    """The `k` nearest of `codes` [n, bits] to each of `query` [m, bits], by exact Hamming search with faiss.

    Returns (ids [m, k], similarity [m, k]), nearest first. Needs no training and no float copy: 8 bits take a byte.
    """
    import faiss

    codes, query = _check_bits(codes, "codes"), _check_bits(np.atleast_2d(query), "query")
    if codes.shape[1] != query.shape[1]:
        raise ValueError(f"query has {query.shape[1]} bits and codes have {codes.shape[1]}; they must agree")
    if not (isinstance(k, (int, np.integer)) and k > 0):
        raise ValueError(f"k is {k!r}; ask for one neighbour or more")
    index = faiss.IndexBinaryFlat(codes.shape[1])
    index.add(np.packbits(codes, axis=1))
    distance, ids = index.search(np.packbits(query, axis=1), int(min(k, len(codes))))
    return ids, 1 - distance / codes.shape[1]


def code_report(codes):
    """Health of `Codes`: DataFrame with a row for users and one for items.

    Columns: `rows`; `distinct`, the share of distinct codes; `largest`, how many have the most common one; `constant`,
    bits that never change; `entropy_min` and `entropy_mean` of the bits, 1 for a bit that is on for half of the rows;
    `effective_bits`, the effective rank of the bits' covariance (Roy & Vetterli, 2007), bits if all are independent and
    balanced; `correlation`, the mean absolute correlation of two bits, NaN where less than two ever change.
    Leave out ids that share a default code; they would look like collisions.
    """
    rows = {}
    for name, code in (("users", codes.users), ("items", codes.items)):
        _, sizes = np.unique(np.packbits(code, axis=1), axis=0, return_counts=True)
        p = code.mean(axis=0)
        moving = (p > 0) & (p < 1)
        entropy = torch.special.entr(torch.tensor(np.array([p, 1 - p]))).sum(0).numpy() / math.log(2)
        spread = torch.tensor(np.linalg.eigvalsh(np.cov(code.T.astype(float), bias=True)).clip(1e-12))
        pairs = np.corrcoef(code.T[moving].astype(float)) if moving.sum() > 1 else np.full((2, 2), np.nan)
        rows[name] = {
            "rows": len(code),
            "distinct": len(sizes) / len(code),
            "largest": sizes.max(),
            "constant": int((~moving).sum()),
            "entropy_min": entropy.min(),
            "entropy_mean": entropy.mean(),
            "effective_bits": torch.special.entr(spread / spread.sum()).sum().exp().item() if moving.any() else 0.0,
            "correlation": np.minimum(1.0, np.abs(pairs[np.triu_indices(len(pairs), 1)]).mean()),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


# ------------------------------------------------------------------------------------------------ other ways to codes
def binarise(users, items, bits=32, user_weights=None, item_weights=None, seed=0, minority=0.05, sweeps=20):
    """`Codes` of two tables, users [n, d] and items [m, d], so that bits agree where inner products are large.

    Over codes B in {-1, +1} and numbers a, c it minimises the weighted sum of (a B_u . B_i + c - x_u . y_i)^2 over all
    pairs by discrete coordinate descent, bit after bit, as in Discrete Collaborative Filtering (Zhang et al., SIGIR
    2016). Pairs are never listed: a sweep costs O((n + m) bits (bits + d)). It begins with the signs of the leading
    singular vectors under a random rotation (sweeps=0 gives these), and ends when a sweep gains less than 1e-4 of the
    variance. Each bit is on, and off, in at least the share `minority` of the rows: where fewer would choose a value,
    those follow to whom it costs least. A row of weight 0 gets its best code but has no say in the others'.
    Raises ValueError for tables that are not finite, do not fit together, or in which all rows are equal.
    """
    sides = [_check_vectors(users, "users"), _check_vectors(items, "items")]
    if sides[0].shape[1] != sides[1].shape[1]:
        raise ValueError(f"users have {sides[0].shape[1]} numbers and items {sides[1].shape[1]}; they must agree")
    weights = [
        np.ones(len(side)) if weight is None else np.asarray(weight, np.float64)
        for side, weight in zip(sides, (user_weights, item_weights))
    ]
    for side, weight in zip(sides, weights):
        if len(weight) != len(side) or not (weight >= 0).all() or not weight.any():
            raise ValueError(f"{weight.shape} weights for {len(side)} rows; give one a row, from 0, not all of them 0")
    if not 0 <= minority < 0.5:
        raise ValueError(f"minority is {minority}; it is a share below one half")
    weights = [weight / weight[weight > 0].mean() for weight in weights]
    codes = _rotated_signs(sides, weights, bits, seed)
    before = np.inf
    for _ in range(sweeps):
        scale, offset, loss = _scale_and_offset(sides, codes, weights)
        if before - loss < 1e-4:
            break
        before = loss
        for this, other in ((1, 0), (0, 1)):
            fixed = codes[other] * weights[other][:, None]
            gram = fixed.T @ codes[other]
            target = (sides[this] @ (sides[other].T @ fixed) - offset * fixed.sum(0)) / scale
            for bit in [*range(bits)] * 2:
                pull = target[:, bit] - codes[this] @ gram[:, bit] + gram[bit, bit] * codes[this][:, bit]
                cut = np.clip(0, *np.quantile(pull[weights[this] > 0], (minority, 1 - minority)))
                codes[this][:, bit] = np.where(pull > cut, 1.0, -1.0)
    return Codes(*((side > 0).astype(np.uint8) for side in codes))


def _rotated_signs(sides, weights, bits, seed):
    """Where `binarise` starts: signs of the weighted, centred products' leading singular vectors, randomly rotated."""
    (x, y), (wx, wy) = sides, weights
    mean = (wx @ x) @ (wy @ y) / (wx.sum() * wy.sum())
    x, y = np.c_[x, np.full(len(x), -mean)], np.c_[y, np.ones(len(y))]  # now x . y has mean 0
    rx, ry = (np.linalg.qr(side * np.sqrt(w)[:, None], mode="r") for side, w in ((x, wx), (y, wy)))
    left, value, right = np.linalg.svd(rx @ ry.T)  # the products' own singular values, from two small triangles
    if value[0] < 1e-12 * np.sqrt((x**2).sum() * (y**2).sum()):
        raise ValueError("all products of a user and an item are equal, so no code can tell pairs apart")
    kept = min(bits, int((value > 1e-6 * value[0]).sum()))
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(bits, bits)))
    turn = np.sqrt(value[:kept, None]) * rotation[:kept]
    starts = x @ np.linalg.pinv(rx) @ left[:, :kept] @ turn, y @ np.linalg.pinv(ry) @ right[:kept].T @ turn
    return [np.where(start > 0, 1.0, -1.0) for start in starts]


def _scale_and_offset(sides, codes, weights):
    """Least-squares a, c of a B_u . B_i + c ~ x_u . y_i over all weighted pairs, and the share of variance left."""
    (x, y), (bx, by), (wx, wy) = sides, codes, weights
    pairs = wx.sum() * wy.sum()
    match, logit = (wx @ bx) @ (wy @ by) / pairs, (wx @ x) @ (wy @ y) / pairs  # means
    weighted = [(b * w[:, None], v * w[:, None]) for b, v, w in ((bx, x, wx), (by, y, wy))]
    (bxw, xw), (byw, yw) = weighted
    cov = ((bxw.T @ x) * (byw.T @ y)).sum() / pairs - match * logit
    var_match = ((bxw.T @ bx) * (byw.T @ by)).sum() / pairs - match**2
    var_logit = ((xw.T @ x) * (yw.T @ y)).sum() / pairs - logit**2
    scale = cov / var_match
    return scale, logit - scale * match, 1 - cov**2 / (var_match * var_logit)


def _check_vectors(vectors, name):
    vectors = as_array(vectors, name).astype(np.float64)
    if vectors.ndim != 2 or not vectors.size:
        raise ValueError(f"{name}: vectors of shape {vectors.shape}; give a table with one row an id")
    broken = ~np.isfinite(vectors).all(axis=1)
    if broken.any():
        raise ValueError(f"{name}, row {broken.argmax()}: the vector holds NaN or infinity; train that model again")
    if (vectors == vectors[0]).all():
        raise ValueError(f"{name}: all {len(vectors)} vectors are equal, so no code can tell them apart")
    return vectors


def id_weights(dataset):
    """[users, items]: the number of training rows of each id, and their mean for an unseen one; float64 arrays."""
    counts = (
        np.bincount(dataset.train[column], minlength=n)
        for column, n in (("user", dataset.n_users), ("item", dataset.n_items))
    )
    return [np.where(count > 0, count, count.mean()) for count in counts]


def fit_descent(dataset, bits=32, seed=0, recipe="descent", max_epochs=300, progress=True):
    """(Codes, learning curve) without a sign in the training: train `fit_hybrid`, then `binarise` it.

    Pairs weigh in `binarise` as often as their ids occur in training. The code of an id that training never saw is
    that of what is known about it: for a user the taste all share, for an item its features. For `bu.cached_codes`.
    """
    model, curve = fit_hybrid(dataset, seed=seed, max_epochs=max_epochs, progress=progress)
    return binarise(*model.vectors(), bits, *id_weights(dataset), seed=seed), curve


class EmbeddingCodes(nn.Module):
    """h = straight_through(W e + b) for embeddings that stay as they are: users [n_users, d] and items [n_items, k].

    forward gives logits, float32 [rows]: a learned scale times the mean product of the two codes, plus an offset.
    """

    def __init__(self, users, items, bits, dropout=0.5):
        super().__init__()
        self.register_buffer("user", torch.as_tensor(users))
        self.register_buffer("item", torch.as_tensor(items))
        self.project_user, self.project_item = nn.Linear(users.shape[1], bits), nn.Linear(items.shape[1], bits)
        self.scale, self.offset, self.dropout = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(())), dropout

    def forward(self, users, items):
        a = bu.straight_through(self.project_user(self.user[users]))
        b = bu.straight_through(self.project_item(self.item[items]))
        return self.scale * F.dropout(a * b, self.dropout, self.training).mean(-1) + self.offset

    @torch.no_grad()
    def codes(self):
        """The `Codes` of all users and items."""
        sides = self.project_user(self.user), self.project_item(self.item)
        return Codes(*((side > 0).numpy().astype(np.uint8) for side in sides))


def codes_from_embeddings(user_vectors, item_vectors, interactions, bits=32, seed=0, max_epochs=300, progress=True):
    """(Codes, learning curve): codes for the embeddings of any recommender, which stay as they are.

    user_vectors [n_users, d] and item_vectors [n_items, k], indexed by id; `interactions` has columns `user, item,
    label`. Learns only one W and b a side, by `straight_through`; a random tenth of the rows decides when to stop.
    Give interactions that the recommender was not trained on, such as later ones: the others it knows by heart, and W
    and b would learn to recognise them instead of the users' taste.
    Raises ValueError for vectors that are not finite or all equal, ids without a vector, one class of labels only, or
    bits that are no multiple of 8.
    """
    bu.check_length(bits)
    check_both_classes(interactions=interactions)
    sides = []
    for name, vectors in (("user", user_vectors), ("item", item_vectors)):
        vectors = _check_vectors(vectors, f"{name} vectors")
        interactions = interactions.assign(**{name: _ids(interactions, name, len(vectors), "vector")})
        vectors = vectors - vectors.mean(0)  # else all begin on one side of zero, and codes hardly differ
        sides.append((vectors / np.sqrt((vectors**2).mean())).astype(np.float32))
    held_out = np.random.default_rng(seed).permutation(len(interactions)) < max(1, len(interactions) // 10)
    parts = SimpleNamespace(train=interactions[~held_out], valid=interactions[held_out])
    if min(part.label.nunique() for part in (parts.train, parts.valid)) < 2:
        liked = int(interactions.label.sum())
        raise ValueError(
            f"interactions: {len(interactions)} rows, {liked} of them liked, are too few to hold a tenth out"
        )
    torch.manual_seed(seed)
    model = EmbeddingCodes(*sides, bits)
    curve = train_cf(model, parts, lr=3e-3, weight_decay=0, seed=seed, max_epochs=max_epochs, progress=progress)
    return model.codes(), curve


def codes_so_far(model, dataset, rows, bits=32, seed=0):
    """`Codes` with one code for each of `rows` in place of one a user: from all that its user had rated before it.

    `fit_descent` with `fold_in`: model is the trained `HybridMF`, users of the result are [len(rows), bits], items are
    all items as `fit_descent` has them, for the rows weigh nothing.
    """
    users, items = model.vectors()
    now, weights = fold_in(model, dataset, rows), id_weights(dataset)
    weights[0] = np.r_[weights[0], np.zeros(len(now))]
    both = binarise(np.vstack([users, now]), items, bits, *weights, seed=seed)
    return Codes(both.users[len(users) :], both.items)


def histories(dataset):
    """{user: (timestamps, items, labels)}: what each user rated, in any split, in the order of time."""
    log = dataset.log.sort_values("timestamp", kind="stable")
    return {
        user: (own.timestamp.to_numpy(), own.item.to_numpy(), own.label.to_numpy()) for user, own in log.groupby("user")
    }


def ratings_before(dataset, rows):
    """Yield (places in `rows`, items, labels): for rows of one user and moment, what that user had rated before it.

    In any split, and nothing of that moment or later.
    """
    past = histories(dataset)
    moments = pd.DataFrame({"user": _ids(rows, "user"), "when": _seconds(_column(rows, "timestamp"))})
    for (user, when), places in moments.groupby(["user", "when"]).indices.items():
        times, items, labels = past.get(user, (np.empty(0, int),) * 3)
        before = np.searchsorted(times, when)
        yield places, items[:before], labels[:before]


def fold_in(model, dataset, rows):
    """What a `HybridMF` thinks of each row's user after all interactions before the row: float32 [len(rows), dim + 2].

    The user's likes and dislikes strictly before the row's timestamp, in whichever split, are taken as data, the
    average user as the start, and the penalty is that of training (a few Newton steps on the regularised logistic
    loss; items stay as they are). `codes_so_far` makes codes of it.
    """
    items = model.vectors()[1].astype(np.float64)
    average = np.concatenate([model.taste.detach().numpy(), [0, 1]])
    out = np.tile(average, (len(rows), 1))
    for places, seen, labels in ratings_before(dataset, rows):
        if len(seen):
            out[places] = _newton(items[seen], labels, average, PENALTY)
    return out.astype(np.float32)


def _newton(vectors, labels, start, penalty, steps=20):
    """Argmin over x of the logistic loss of vectors @ x plus penalty / 2 |x - start|^2; x's last number stays fixed.

    Newton's steps, each halved until the loss falls: from far away a whole one would overshoot, and never come back.
    """

    def loss(x):
        logits = vectors @ x
        return (np.logaddexp(0, logits) - labels * logits).sum() + penalty / 2 * ((x - start) ** 2).sum()

    free, x = vectors[:, :-1], start.astype(float)
    for _ in range(steps):
        p = np.exp(-np.logaddexp(0, -(vectors @ x)))
        slope = free.T @ (p - labels) + penalty * (x - start)[:-1]
        step = np.append(np.linalg.solve((free.T * (p * (1 - p))) @ free + penalty * np.eye(len(slope)), slope), 0)
        size = next((size for size in 0.5 ** np.arange(12) if loss(x - size * step) < loss(x)), 0)
        x = x - size * step
        if size * np.abs(step).max() < 1e-6:
            break
    return x


# --------------------------------------------------------------------------------------------------------- bit literacy
def to_hex(code):
    """0/1 array [bits] -> two hexadecimal digits for 8 bits: "65c9c811". Not in the paper; a control for dotted."""
    return np.packbits(_one_code(code)).tobytes().hex()


# Two templates for `bu.build_prompts`. In the paper's a title between two codes shifts one against the other by a
# different length in each prompt. Here the codes stand side by side; or bit by bit: there is no distance to learn.
SIDE_BY_SIDE = (
    "#Question: A user has given high ratings to the following movies: {likes}. Would the user enjoy the movie titled "
    '{title}? Answer with "Yes" or "No". User {user} movie {item} alike? \\n#Answer:'
)
BIT_BY_BIT = (
    "#Question: A user has given high ratings to the following movies: {likes}. Would the user enjoy the movie titled "
    '{title}? Answer with "Yes" or "No". User and movie {pairs} alike? \\n#Answer:'
)
# The same question about two codes alone, of which there is no end: `code_pairs` makes the codes, `alike` the answers.
ALIKE = "User {user} movie {item} alike?\n#Answer:"
ALIKE_PAIRS = "User and movie {pairs} alike?\n#Answer:"


def code_pairs(n, bits, seed=0, spread=None):
    """n pairs of random codes, as `Codes`: each bit of item i agrees with user i's with a chance of its own pair.

    The chances are uniform from 0 to 1, so that there are pairs of every similarity, or normal around 1/2 with standard
    deviation `spread`, as in real codes: then every bit must be read to tell more from less.
    `hamming_similarity(pairs.users, pairs.items)` says how the pairs came out.
    """
    rng = np.random.default_rng(seed)
    users = rng.integers(0, 2, (n, bits), dtype=np.uint8)
    draw = rng.random((n, bits))
    chance = rng.random((n, 1)) if spread is None else rng.normal(0.5, spread, (n, 1))
    return Codes(users, users ^ (draw >= chance))


def alike(similarity):
    """The answer taught to "are these codes alike?": P(Yes) = sigmoid(10 (similarity - 1/2)), so that more is more.

    A share of Yes for each question tells a small model more than a bare Yes or No: it learns in fewer steps.
    """
    return 1 / (1 + np.exp(-10 * (np.asarray(similarity) - 0.5)))


def code_questions(codes, template=ALIKE):
    """`template` (ALIKE or ALIKE_PAIRS) about user i and item i of `codes`, for each i: a list of prompts."""
    pairs = zip(codes.users, codes.items)
    return [template.format(user=bu.to_bits(a), item=bu.to_bits(b), pairs=to_pairs(a, b)) for a, b in pairs]


# ------------------------------------------------------------------------------------------------------ title lessons
def some_items(dataset, share=0.2, seed=0):
    """Ids of a random `share` of all items, int64: the cold films of notebook 08, which title lessons leave out."""
    return np.random.default_rng(seed).permutation(dataset.n_items)[: int(share * dataset.n_items)]


def without_ratings(dataset, items):
    """The `Dataset` as it would be if nobody had rated `items` before the test months."""
    train, valid = (part[~part.item.isin(items)] for part in (dataset.train, dataset.valid))
    return replace(dataset, train=train, valid=valid)


def opinions(dataset):
    """z, float32 [n_users, n_items]: logits of `fit_hybrid` less each user's mean, in standard deviations of the rest.

    A user's general level cannot be read off a list of likes; which films a user likes more than others can.
    """
    users, items = fit_hybrid(dataset)[0].vectors()
    logits = users @ items.T
    logits -= logits.mean(1, keepdims=True)
    return logits / logits.std()


def title_lessons(dataset, z, moments, films=32, unasked=(), seed=0):
    """(prompts, shares of Yes): at `moments` moments of the training split, a question about each of `films` films.

    The prompt is the paper's, titles only, with the user's likes before that moment; the films are random, none of
    `unasked`, and the share of Yes is sigmoid(2 z), z of `opinions`: what the collaborative model thinks, whatever the
    user rated then. Raises ValueError for a z of another shape, or where fewer than `films` films or `moments` moments
    with a like are left.
    """
    if np.shape(z) != (dataset.n_users, dataset.n_items):
        raise ValueError(f"z of shape {np.shape(z)}; give what the collaborative model thinks, as `opinions` says it")
    rng, rows, pool = np.random.default_rng(seed), dataset.train, np.setdiff1d(np.arange(dataset.n_items), unasked)
    rows = rows[[len(mine) > 0 for mine in bu.liked_before(dataset, rows)]]
    if len(pool) < films or len(rows) < moments:
        raise ValueError(
            f"{len(rows):,} moments and {len(pool):,} films to ask about; {moments} and {films} are wanted"
        )
    rows = rows.sample(moments, random_state=seed)
    rows = rows.loc[rows.index.repeat(films)].reset_index(drop=True)
    rows["item"] = np.concatenate([rng.choice(pool, films, replace=False) for _ in range(moments)])
    shares = 1 / (1 + np.exp(-2 * z[rows.user, rows.item]))
    return bu.build_prompts(dataset, rows, style="text", history="row"), shares


def load_shipped(model, name):
    """`model` with the adapter data/adapters/`name`; as it is, and a line says so, if that is for another LLM.

    Raises ValueError for an adapter that cannot be read. Where answers are recorded, `bu.load_adapter` refuses both.
    """
    _check_bare(model)
    try:
        return bu.load_adapter(model, bu.ROOT / "data" / "adapters" / name)
    except ValueError as error:
        if "was tuned on" not in str(error):
            raise
        print(f"no adapter {name!r} for this LLM, it answers as it is: {error}")
        return model
