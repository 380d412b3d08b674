"""What the BinLLM notebooks share, in the order of the walk: dataset -> codes -> prompts -> LLM -> scores -> metrics.

Source: Zhang et al., "Text-like Encoding of Collaborative Information in Large Language Models for Recommendation",
ACL 2024. Sections and tables named below are that paper's; its code is zyang1580/BinLLM, commit b28bfc4.
binllm_data.py (files, dataset) and binllm_llm.py (loading, scoring, tuning) are parts of it, passed on from here: all
is `bu.…` to a notebook. What goes beyond the paper is in binllm_extras.py.
"""

import math
import os
import string
import time
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from binllm_data import (  # noqa: F401  what notebooks need of it as bu.…
    CACHE,
    ML1M_OFFICIAL,
    ML1M_REGISTRY,
    ROOT,
    SMOLLM2,
    SMOLLM2_REGISTRY,
    SPLITS,
    TITLE_LENGTH,
    Dataset,
    Source,
    _ids,
    alone,
    by_place,
    digest,
    fetch,
    liked_before,
    load_ml1m,
    replacing,
    sample_rows,
    sample_sittings,
    shown_title,
    sittings,
)
from binllm_llm import (  # noqa: F401  and of this
    LORA,
    answer_logits,
    answer_tokens,
    can_pack,
    compute_dtype,
    encode_prompts,
    load_adapter,
    load_llm,
    make_batches,
    make_packs,
    pack_inputs,
    pack_tokens,
    rows_of,
    save_adapter,
    score,
    share_beginnings,
    tune,
)

# transformers, peft, accelerate, pooch and matplotlib take seconds to import: they are imported where they are used.

OUTPUT = ROOT / Path(os.environ.get("BINLLM_OUTPUT") or "executed").expanduser()  # pictures and records of your runs


# ---------------------------------------------------------------------------------------------- profiles and set-up
@dataclass(frozen=True)
class Profile:
    """Sizes of one way to run the notebooks."""

    name: str
    llm: str | None  # None: SmolLM2-135M-Instruct, see `load_llm`
    layers: int | None  # keep only the first layers of the LLM (tests); None keeps all
    epochs: int  # most passes over the training split for collaborative models
    tune_rows: int  # training rows the LLM sees per tuning step
    eval_rows: int  # test rows the LLM is scored on
    lora: str = "all"  # which layers get LoRA matrices, see LORA


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("smoke", None, 2, 5, 16, 60),
        Profile("cpu", None, None, 300, 64, 200),
        Profile("patient", None, None, 300, 1_024, 7_331),
        Profile("full", None, None, 300, 33_891, 7_331),
        Profile("large", "HuggingFaceTB/SmolLM2-1.7B-Instruct", None, 300, 33_891, 7_331),
        Profile("paper", "lmsys/vicuna-7b-v1.5", None, 300, 33_891, 7_331, "paper"),
    )
}


def current_profile():
    """The `Profile` named by BINLLM_PROFILE, else `full` where torch sees a GPU and `cpu` elsewhere.

    BINLLM_LLM names another LLM for any of them. Raises ValueError for an unknown profile.
    """
    name = os.environ.get("BINLLM_PROFILE") or ("full" if torch.cuda.is_available() else "cpu")
    if name not in PROFILES:
        raise ValueError(f"BINLLM_PROFILE is {name!r}; choose one of {', '.join(PROFILES)}")
    return replace(PROFILES[name], llm=os.environ.get("BINLLM_LLM") or PROFILES[name].llm)


def quiet():
    """Silence what libraries print about loading models."""
    import logging

    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def start(notebook):
    """Set one notebook up: quiet libraries, plot style, the profile with what it will cost. Returns the `Profile`."""
    import matplotlib as mpl

    quiet()
    mpl.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})
    mpl.rcParams.update({"axes.prop_cycle": mpl.cycler(color=COLORS), "font.size": 10, "figure.autolayout": True})
    profile, cost = current_profile(), ""
    table = ROOT / "data" / "results" / "runtimes.csv"
    if table.exists():
        runs = pd.read_csv(table)
        for run in runs[(runs.notebook == notebook) & (runs.profile == profile.name)].tail(1).itertuples():
            cost = f"; about {math.ceil(run.minutes)} min and {math.ceil(run.peak_gb)} GB ({run.hardware})"
    print(f"profile {profile.name}: {profile.tune_rows:,} tuning rows, {profile.eval_rows:,} scored rows{cost}")
    return profile


# -------------------------------------------------------------------------------------------------------------- codes
@dataclass(frozen=True)
class Codes:
    """Binary codes: `users` and `items` are uint8 arrays of 0 and 1, [n_users, bits] and [n_items, bits], by id.

    Raises ValueError when they are not 0/1, differ in length, or have a length that is not a multiple of 8.
    """

    users: np.ndarray
    items: np.ndarray

    def __post_init__(self):
        for name in ("users", "items"):
            object.__setattr__(self, name, _check_bits(getattr(self, name), name))
        if self.users.shape[1] != self.items.shape[1]:
            raise ValueError(f"users have {self.users.shape[1]} bits and items {self.items.shape[1]}; they must agree")

    @property
    def bits(self):
        return self.users.shape[1]

    def similarity(self, rows):
        """Hamming similarity of the user's and the item's code in each of `rows`: float64; the score of codes alone."""
        return hamming_similarity(*self.of(rows))

    def of(self, rows):
        """The codes of each row's user and item: two uint8 arrays [len(rows), bits]. Raises ValueError for other ids.

        An id of -1, as libraries write "unknown", has no code; it never means the last one.
        """
        sides = (("user", self.users), ("item", self.items))
        return [table[_ids(rows, name, len(table), "code")] for name, table in sides]


def as_array(values, name):
    """A NumPy array of a list, array, DataFrame by id, or tensor on any device, in any precision."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    by_place(values, name)
    try:
        return np.asarray(values)
    except ValueError:
        raise ValueError(f"{name}: the rows differ in length; give a table") from None


def _check_bits(code, name="code"):
    code = as_array(code, name)
    bits = code.shape[-1] if code.ndim else 1
    if bits == 0 or bits % 8:
        raise ValueError(f"{name}: a code of {bits} bits; the length must be a multiple of 8")
    number = (bool, int, float, np.bool_, np.integer, np.floating)  # in a table of objects there may be anything
    other = [x for x in code.flat if not isinstance(x, number)] if code.dtype == object else []
    other = other or code[~np.isin(code, (0, 1)) | (code.dtype.kind == "c")].tolist()
    if other:
        raise ValueError(f"{name}: a code may hold only 0 and 1, here {other[0]!r:.60}")
    return code.astype(np.uint8, copy=False)


def _one_code(code):
    code = _check_bits(code)
    if code.ndim != 1:
        raise ValueError(f"{len(code)} codes in a table of shape {code.shape}; give one code")
    return code


def straight_through(z):
    """h = sign(tanh(z)) in {-1, +1}, same shape, with the gradient of tanh(z): the paper's encoder (Section 3.2)."""
    soft = torch.tanh(z)
    hard = torch.where(soft > 0, 1.0, -1.0)
    return soft + (hard - soft).detach()  # forward hard, backward soft


@dataclass(frozen=True)
class Recipe:
    """How `BinMF` is built and trained."""

    lr: float
    weight_decay: float
    rows: int | None = None  # training rows for which that decay was searched: more have less of it; None: all the same
    patience: int = 50  # epochs without a better valid AUC after which training ends
    std: float = 1.0  # standard deviation of the embeddings at the start
    shared: bool = False  # one W and b for users and items
    zero_one: bool = False  # codes in {0, 1}, else in {-1, +1}
    scaled: bool = False  # logit = learned scale * mean product + offset, else the inner product
    features: bool = False  # an item's e also has a linear part of `item_features`
    dropout: float = 0.0  # of bit products while training
    anneal: float | None = None  # share of binary numbers while training grows by so much every second epoch
    average: float | None = None  # decay a step of the moving average of the weights whose signs are the codes
    dither: float = 0.0  # size of fixed noise in z, which tells apart ids of which little is known
    minority: float = 0.0  # least share of the ids in training that differ from the others in any bit

    def settings(self, n):
        """Arguments of `train_cf` for `n` training rows.

        Its loss is a mean over them. The more they are, the smaller is the share of any one id, and decay that stayed
        the same would outweigh what its rows say: codes of some 200,000 rows then stayed at chance level (a test).
        """
        decay = self.weight_decay * (min(1, self.rows / n) if self.rows else 1)
        return {"lr": self.lr, "weight_decay": decay, "average": self.average, "patience": self.patience}


_STE = Recipe(lr=3e-3, weight_decay=4e-4, rows=33_891, std=0.3, scaled=True, features=True, dropout=0.1, average=0.98)
RECIPES = {
    # the formula as printed (Section 3.2); the paper names no settings: the best on valid of six
    "paper": Recipe(lr=1e-2, weight_decay=1e-5, patience=100, shared=True, zero_one=True),
    # the authors' code (hashGNN_ml.py), with the settings in its comments
    "reference": Recipe(lr=1e-2, weight_decay=1e-3, patience=100, anneal=0.001),
    # the same encoder with what makes it learn; settings searched on valid
    "ste": _STE,
    # the same, with codes that are distinct and bits that all vary, which costs some accuracy
    "distinct": replace(_STE, weight_decay=3e-4, dither=0.05, minority=0.02),
    # the same for thirty times as many ratings, all that is before valid: there is enough to learn from with more
    # dropped; searched on valid with 64 bits
    "past": replace(
        _STE, weight_decay=1.4e-5, rows=980_981, patience=12, dropout=0.35, average=0.998, dither=0.05, minority=0.02
    ),
}


class BinMF(nn.Module):
    """Binary matrix factorisation (Section 3.2): h = sign(tanh(W e + b)), logits from products of two codes.

    An embedding e has as many numbers as a code has bits. Those of ids that training never sees are zero where the
    recipe is ours or features are given: b and these give their codes. forward gives logits, float32 [rows].
    """

    def __init__(self, dataset, bits, recipe, features=None):
        super().__init__()
        self.recipe, self.epoch = recipe, 0
        self.seen = [np.unique(dataset.train[column]) for column in ("user", "item")]
        self.user, self.item = nn.Embedding(dataset.n_users, bits), nn.Embedding(dataset.n_items, bits)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=recipe.std)
        self.project_user = nn.Linear(bits, bits)  # W and b
        self.project_item = self.project_user if recipe.shared else nn.Linear(bits, bits)
        if features is None:
            features = item_features(dataset) if recipe.features else np.zeros((dataset.n_items, 0))
        self.register_buffer("features", torch.from_numpy(check_features(features, dataset)))
        self.content = nn.Parameter(torch.zeros(self.features.shape[1], bits))
        self.scale, self.offset = nn.Parameter(torch.tensor(4.0)), nn.Parameter(torch.zeros(()))
        self.noise = [torch.zeros(n, bits) for n in (dataset.n_users, dataset.n_items)]
        for noise, seen in zip(self.noise, self.seen) if recipe.dither else ():
            noise[seen] = recipe.dither * torch.randn(len(seen), bits)
        if recipe.features or self.features.shape[1]:
            zero_unseen(self, dataset.train)

    def z(self):
        """W e + b of all users and of all items: [n_users, bits], [n_items, bits]."""
        items = self.item.weight + self.features @ self.content
        return self.project_user(self.user.weight) + self.noise[0], self.project_item(items) + self.noise[1]

    def encode(self, z):
        """h from z = W e + b, same shape; while training by the recipe, else binary."""
        h = straight_through(z)
        if self.training and self.recipe.anneal is not None:
            h = torch.where(torch.rand_like(z) < self.recipe.anneal * (self.epoch // 2), h, torch.tanh(z))
        return (h + 1) / 2 if self.recipe.zero_one else h

    def forward(self, users, items):
        h_users, h_items = map(self.encode, self.z())
        products = F.dropout(h_users[users] * h_items[items], self.recipe.dropout, self.training)  # [rows, bits]
        return self.scale * products.mean(-1) + self.offset if self.recipe.scaled else products.sum(-1)

    @torch.no_grad()
    def begin_epoch(self, epoch):
        """Move b so that no bit is the same for more than the share 1 - `recipe.minority` of the ids in training."""
        self.epoch, shares = epoch, torch.tensor([self.recipe.minority, 1 - self.recipe.minority])
        sides = zip(self.z(), self.seen, (self.project_user, self.project_item)) if self.recipe.minority else ()
        for z, seen, project in sides:
            some = seen[:: 1 + len(seen) // 1_000_000]  # a million tell the shares well enough
            low, high = torch.quantile(z[some], shares, dim=0)
            project.bias -= torch.zeros_like(low).clamp(low, high)

    @torch.no_grad()
    def codes(self):
        """The `Codes` of all users and items."""
        return Codes(*((z > 0).numpy().astype(np.uint8) for z in self.z()))


def zero_unseen(model, train):
    """Set the embeddings of users and items without a row in `train` to zero, where training will leave them."""
    with torch.no_grad():
        for table, seen in ((model.user, train.user), (model.item, train.item)):
            table.weight[np.setdiff1d(np.arange(len(table.weight)), seen)] = 0.0


@contextmanager
def one_thread():
    """One thread for PyTorch: for small matrices a second one only waits, and results do not depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def train_cf(model, dataset, *, lr, weight_decay, seed=0, max_epochs=300, patience=50, average=None, rows=None,
             progress=True):  # fmt: skip
    """Train a collaborative `model` on the training split by binary cross-entropy; keep the best epoch.

    The best has the highest sum, on valid, of AUC and the users' mean AUC, .5 for those who have none.
    average: decay a step of an exponential moving average of the weights, which is then what is judged and kept.
    rows: where the training rows come from, if not from the split in memory (`binllm_scale.Shards`).
    Stops `patience` epochs after the best one, but never before the valid AUC has passed .52: plain MF can sit at .5
    for hundreds of epochs. A step takes a hundredth of the rows, 2,048 to 262,144. On one machine a seed is a model.
    Returns the learning curve: columns `epoch, loss, valid_auc, seconds`. Raises ValueError for labels of one class.
    """
    check_both_classes(valid=dataset.valid)
    rows = _InMemory(dataset.train) if rows is None else rows
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(average)) if average else None
    judged = averaged.module if average else model
    shuffle, batch_size = torch.Generator().manual_seed(int(seed)), max(2048, min(len(rows) // 100, 1 << 18))
    curve, best, began = [], (-1.0, 0, model.state_dict()), time.perf_counter()
    with tqdm(total=max_epochs, desc=f"{type(model).__name__} epochs", disable=not progress, leave=False) as bar:
        for epoch in range(max_epochs):
            model.train()
            if hasattr(model, "begin_epoch"):
                model.begin_epoch(epoch)
            total = 0.0
            for users, items, labels in rows.batches(batch_size, shuffle):
                loss = F.binary_cross_entropy_with_logits(model(users, items), labels)
                total += loss.item() * len(labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if average:
                    averaged.update_parameters(model)
            scores = cf_scores(judged, dataset.valid)
            score = auc(dataset.valid.label, scores)
            both = score + user_aucs(dataset.valid.user, dataset.valid.label, scores).fillna(0.5).mean()
            curve.append((epoch, total / len(rows), score, time.perf_counter() - began))
            if both > best[0]:
                best = (both, epoch, {name: value.clone() for name, value in judged.state_dict().items()})
            bar.update()
            bar.set_postfix(valid_auc=f"{score:.4f}", best_epoch=best[1])
            if epoch - best[1] >= patience and max(row[2] for row in curve) > 0.52:
                break
    model.load_state_dict(best[2])
    model.eval()
    return pd.DataFrame(curve, columns=["epoch", "loss", "valid_auc", "seconds"])


class _InMemory:
    """The rows of a split as batches in a new order each epoch."""

    def __init__(self, train):
        check_both_classes(train=train)
        self.columns = [torch.from_numpy(train[name].to_numpy(copy=True)) for name in ("user", "item", "label")]

    def __len__(self):
        return len(self.columns[0])

    def batches(self, size, shuffle):
        for rows in torch.randperm(len(self), generator=shuffle).split(size):
            users, items, labels = (column[rows] for column in self.columns)
            yield users, items, labels.float()


def check_both_classes(**parts):
    for name, rows in parts.items():
        if not len(rows):
            raise ValueError(f"{name}: no rows; likes and dislikes needed")
        if rows.label.nunique() < 2:
            raise ValueError(f"{name}: all labels are {rows.label.iloc[0]}; likes and dislikes needed")


@torch.no_grad()
def cf_scores(model, rows):
    """Logits of a collaborative model for `rows` (columns `user`, `item`): float32 array [len(rows)].

    model.user and model.item are its tables, a line an id. Raises ValueError for ids that have none.
    """
    model.eval()
    tables = (getattr(getattr(model, side), "weight", getattr(model, side)) for side in ("user", "item"))
    ids = (_ids(rows, side, len(table), "vector") for side, table in zip(("user", "item"), tables))
    return model(*map(torch.tensor, ids)).numpy()


def item_features(dataset):
    """What is known of each item besides its ratings' values: float32 [n_items, tags + 1].

    One column a tag, 1 where the item has it, and last the logarithm of 1 + its number of training rows, over its
    standard deviation: much-seen films are liked more.
    """
    tags = dataset.tags or [()] * dataset.n_items
    column = {tag: place for place, tag in enumerate(sorted({tag for mine in tags for tag in mine}))}
    features = np.zeros((dataset.n_items, len(column) + 1), np.float32)
    for item, mine in enumerate(tags):
        features[item, [column[tag] for tag in mine]] = 1
    seen = np.log1p(np.bincount(dataset.train.item, minlength=dataset.n_items))
    features[:, -1] = seen / (seen.std() or 1)
    return features


def check_features(features, dataset):
    """Features of one's own as float32 [n_items, F]; raises ValueError for another number of rows, NaN or infinity."""
    features = np.ascontiguousarray(as_array(features, "features"), np.float32)
    if features.ndim != 2 or len(features) != dataset.n_items or not np.isfinite(features).all():
        what = f"features of shape {features.shape}, {(~np.isfinite(features)).sum()} of them NaN or infinite"
        raise ValueError(f"{what}; give finite ones in {dataset.n_items} rows, one an item, in the order of ids")
    return features


def fit_codes(dataset, bits=32, seed=0, recipe="ste", max_epochs=300, progress=True, features=None):
    """(Codes, learning curve): `BinMF` by one of RECIPES, or a `Recipe`, trained through its sign (Section 3.2).

    features: float32 [n_items, F]; None takes `item_features` where the recipe has features. Unseen ids then get the
    code that b, and for an item its features, say. The same seed gives the same codes on the same machine.
    Raises ValueError for an unknown recipe, features that do not fit, or `bits` not a positive multiple of 8.
    """
    how = check_recipe(bits, recipe, max_epochs)
    torch.manual_seed(seed)
    model = BinMF(dataset, bits, how, features)
    settings = how.settings(len(dataset.train)) | {"seed": seed, "max_epochs": max_epochs, "progress": progress}
    curve = train_cf(model, dataset, **settings)
    return model.codes(), curve


def check_recipe(bits, recipe, max_epochs):
    """The `Recipe` of that name, or given; raises ValueError for an unknown one, a wrong length, or no epoch."""
    check_length(bits)
    if (how := recipe if isinstance(recipe, Recipe) else RECIPES.get(recipe)) is None:
        raise ValueError(f"recipe is {recipe!r}; choose one of {', '.join(RECIPES)}")
    if max_epochs < 1:
        raise ValueError(f"max_epochs is {max_epochs}; train for one or more")
    return how


def check_length(bits):
    if not isinstance(bits, (int, np.integer)) or bits <= 0 or bits % 8:
        raise ValueError(f"bits is {bits!r}; a code must have a positive multiple of 8 bits")


CODES_VERSION = 2  # raise it when a change of `fit_codes` changes codes: cached ones are then made anew


def cached_codes(dataset, bits=32, seed=0, recipe="ste", fit=fit_codes):
    """The `Codes` of `fit_codes`: the shipped or earlier ones of the same recipe and data, else fitted now.

    Those of ML-1M ship in data/codes, for the last digits of a fit, and so single bits, differ between machines.
    fit: another function of (dataset, bits, seed, recipe), whose codes are kept under the name `recipe`.
    """
    if fit is not fit_codes and recipe in RECIPES:
        raise ValueError(f"recipe {recipe!r} is of `fit_codes`; give codes of another fit a recipe name of their own")
    data = [dataset.train, dataset.valid, dataset.tags, len(dataset.titles), len(dataset.train)]
    if dataset.n_users > max(dataset.train.user.max(), dataset.valid.user.max()) + 1:
        data.append(dataset.n_users)
    data = digest(*data)
    file = f"{dataset.name}-{recipe}-{bits}bits-seed{seed}-v{CODES_VERSION}-{data}.npz"
    path = next((f / file for f in (ROOT / "data" / "codes", CACHE / "codes") if (f / file).exists()), None)
    if path is None:
        path = CACHE / "codes" / file
        codes, _ = fit(dataset, bits, seed, recipe)
        try:
            with replacing(path) as part, open(part, "wb") as out:
                np.savez_compressed(out, users=codes.users, items=codes.items)
        except OSError as error:
            print(f"the codes are here but not kept: {error}")
            return codes
    return _read_codes(path, dataset, bits)


def _read_codes(path, dataset, bits):
    """The `Codes` kept in a file; raises ValueError when it is not what `cached_codes` writes, or of another size."""
    shapes = {"users": (dataset.n_users, bits), "items": (dataset.n_items, bits)}
    try:
        with np.load(path, allow_pickle=False) as arrays, zipfile.ZipFile(path) as archive:
            for name, shape in shapes.items():  # before anything of a size that a stranger chose is unpacked
                if archive.getinfo(f"{name}.npy").file_size > 1000 + np.prod(shape):
                    raise ValueError(f"{name} are larger than {shape[0]} x {shape[1]}")
            codes = Codes(arrays["users"], arrays["items"])
    except Exception as error:  # whatever reading a damaged archive may raise: there are a dozen kinds
        raise ValueError(f"{path} holds no codes that fit ({error!s:.300}); delete it: they are made anew") from None
    if (codes.users.shape, codes.items.shape) != tuple(shapes.values()):
        raise ValueError(f"{path} holds codes of {codes.users.shape} and {codes.items.shape}; delete it")
    return codes


def hamming_similarity(a, b):
    """Share of equal bits between 0/1 arrays [..., bits] (broadcast): float in [0, 1], 1 when all bits agree."""
    a, b = _check_bits(a), _check_bits(b)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"codes of {a.shape[-1]} and {b.shape[-1]} bits cannot be compared")
    return (a == b).mean(-1)


def smoothed_rates(train, column, k=5):
    """Share of likes per id of `column` ("user" or "item") in `train`, drawn to the mean as by `k` average rows."""
    stats = train.groupby(column).label.agg(["sum", "count"])
    return (stats["sum"] + k * train.label.mean()) / (stats["count"] + k)


def popularity_baseline(dataset, rows):
    """Scores that need no learning: the item's plus the user's smoothed like rate in train, float64 [len(rows)].

    An id that training never saw counts as average.
    """
    mean, sides = dataset.train.label.mean(), ("item", "user")
    return sum(smoothed_rates(dataset.train, c).reindex(_ids(rows, c)).fillna(mean).to_numpy() for c in sides)


# ------------------------------------------------------------------------------------------------------ codes as text
def to_bits(code):
    """0/1 array [bits] -> its digits without spaces, as in the paper's prompts: "01101001"."""
    return "".join(map(str, _one_code(code).tolist()))


def from_bits(text):
    """Digits written by `to_bits` -> uint8 array [bits]. Raises ValueError on anything but 8, 16, 24… digits 0 or 1."""
    if not text or len(text) % 8 or set(text) - {"0", "1"}:
        raise ValueError(f"{text!r} is not a code in bits; it needs 8, 16, 24… digits 0 or 1 and nothing else")
    return np.frombuffer(text.encode(), np.uint8) - ord("0")


def to_dotted(code):
    """0/1 array [bits] -> dotted decimal, one number of 0 to 255 for 8 bits, first bit highest: "101.9.200.17"."""
    return ".".join(map(str, np.packbits(_one_code(code)).tolist()))


def from_dotted(text):
    """Dotted decimal written by `to_dotted` -> uint8 array [bits]. Raises ValueError on a part that is not 0 to 255."""
    parts = text.split(".")
    for place, part in enumerate(parts, 1):
        if not (part.isascii() and part.isdigit() and len(part) < 4 and int(part) < 256 and part == str(int(part))):
            raise ValueError(
                f"{text!r}: part {place} is {part!r}; each part must be a number from 0 to 255 without leading zeros"
            )
    return np.unpackbits(np.array(parts, int).astype(np.uint8))


def to_pairs(a, b):
    """Two 0/1 arrays [bits] -> each bit of the one beside the same bit of the other: "01 11 00"."""
    a, b = _one_code(a), _one_code(b)
    if a.shape != b.shape:
        raise ValueError(f"codes of {a.shape[-1]} and {b.shape[-1]} bits cannot stand bit by bit")
    return " ".join(f"{x}{y}" for x, y in zip(a.tolist(), b.tolist()))


# ------------------------------------------------------------------------------------------------------------ prompts
# The paper's templates word for word (its Table 4, and TALLRec's for text only); "codes" leaves the titles out.
TEMPLATES = {
    "text": "#Question: A user has given high ratings to the following movies: {likes}. Leverage the information to "
    "predict whether the user would enjoy the movie titled {title}? "
    'Answer with "Yes" or "No". \\n#Answer:',
    "codes": "#Question: We have information about the user's preferences encoded in the feature {user}. Using all "
    "available information, make a prediction about whether the user would enjoy the movie with the feature {item}? "
    'Answer with "Yes" or "No". \\n#Answer:',
    "text+codes": "#Question: A user has given high ratings to the following movies: {likes}. Additionally, we have "
    "information about the user's preferences encoded in the feature {user}. Using all available information, make a "
    "prediction about whether the user would enjoy the movie titled {title} with the feature {item}? "
    'Answer with "Yes" or "No". \\n#Answer:',
}
FORMATS = {"bits": to_bits, "dotted": to_dotted}
FIELDS = ("likes", "title", "user", "item", "pairs")


NO_HISTORY = (
    "no row has a history: all earlier likes lie within the rows' own sittings of six hours. Are times an order, not "
    "seconds? history='row' shows what was liked before the row itself"
)


def _template(style):
    """(template named or given, its fields); raises ValueError for fields that no prompt has."""
    template = TEMPLATES.get(style, style if "{" in style else None)
    if template is None:
        raise ValueError(f"style is {style!r}; choose from {', '.join(TEMPLATES)}, or give a template with fields")
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"style {style!r} is no template: {error}; write {{{{ for a brace") from None
    for field, how, change in parts:
        if field not in FIELDS or how or change:
            whole = field + (f"!{change}" if change else "") + (f":{how}" if how else "")
            raise ValueError(f"style has the field {{{whole}}}; there are {', '.join(FIELDS)}, as they are")
    return template, {field for field, _, _ in parts}


def prompt_fields(style, titles, likes, users=None, items=None, fmt="bits", *, faithful=False):
    """(template, {field: one text a prompt}): what `build_prompts` fills in, for whoever has titles and codes at hand.

    titles: one a prompt; likes: a list of titles a prompt; users, items: codes [prompts, bits], where style asks them.
    Raises ValueError for an unknown style or format, or codes that style asks for and that are not given.
    """
    (template, wanted), write = _template(style), fmt if callable(fmt) else FORMATS.get(fmt)
    if write is None:
        raise ValueError(f"format is {fmt!r}; choose from {', '.join(FORMATS)}, or give a function")
    shown = str.strip if faithful else shown_title
    fields = {"title": [f'"{shown(title)}"' for title in titles]}
    if "likes" in wanted:
        shown = str if faithful else shown_title  # the reference code strips the film's title only
        quoted = (", ".join(f'"{shown(title)}"' for title in mine) for mine in likes)
        fields["likes"] = [text or ("unkow" if faithful else "none so far") for text in quoted]
    if wanted & {"user", "item", "pairs"}:
        if users is None or items is None:
            raise ValueError(f"style {style!r} writes codes into the prompt; pass codes=")
        fields |= {"user": list(map(write, users)), "item": list(map(write, items))}
        if "pairs" in wanted:
            fields["pairs"] = list(map(to_pairs, users, items))
        if not all(isinstance(text, str) for text in fields["user"]):
            raise ValueError(f"the format gives {fields['user'][0]!r}; it must turn a code into text")
    return (template if faithful else template.replace(" \\n", "\n")), fields


def fill(template, fields):
    """The prompts that `prompt_fields` describes: list of texts."""
    return [template.format(**dict(zip(fields, values))) for values in zip(*fields.values(), strict=True)]


def build_prompts(
    dataset, rows, codes=None, style="text+codes", fmt="bits", *, likes=10, history="sitting", faithful=False
):
    """One prompt a row, ready for the LLM to answer " Yes" or " No" (paper, Section 3.1 and Table 4).

    style: "text" (liked titles and the film's title), "codes" (the two codes alone), "text+codes", or a template of
    your own with the fields {likes}, {title}, {user}, {item}, or {pairs}, where each bit of the user's code has the
    film's beside it. fmt: one of FORMATS, or a function from a code to text.
    `rows` needs columns `user, item, timestamp`. The titles shown are the user's last `likes` likes before the row's
    sitting began (history="sitting": rows of one sitting then begin alike, and are read together), or before the row
    itself ("row", as in the paper).
    faithful=True gives what the reference code gives: a backslash and an n where a line break was meant, "unkow" for an
    empty history, and history by row, likes of the same second that stand before the row included; only likes within
    one second may come in another order. (Its literal "<s>" in front is LLaMA's start token; that tokenizer adds it.)
    Raises ValueError for an unknown style, format or history, ids that have no code, or codes of other data.
    """
    _, wanted = _template(style)
    if history not in ("sitting", "row"):
        raise ValueError(f"history is {history!r}; choose sitting or row")
    titles, liked, sides = [dataset.titles[i] for i in _ids(rows, "item", dataset.n_items, "title")], None, ()
    if "likes" in wanted:
        then = rows.assign(timestamp=sittings(dataset, rows)) if history == "sitting" and not faithful else rows
        before = liked_before(dataset, then, likes, same_second=faithful)
        liked = [[dataset.titles[i] for i in mine] for mine in before]
        if not any(liked) and then is not rows and any(map(len, liked_before(dataset, rows, likes))):
            warnings.warn(NO_HISTORY, stacklevel=2)
    if wanted & {"user", "item", "pairs"} and codes is not None:
        if len(codes.items) != dataset.n_items:  # ids of past="all" begin with those of the split: none is out of range
            what = f"codes of {len(codes.items):,} items, and {dataset.name} has {dataset.n_items:,}"
            raise ValueError(f"{what}: they were learned from other data; take `cached_codes` of this data set")
        sides = codes.of(rows)
    return fill(*prompt_fields(style, titles, liked, *sides, fmt=fmt, faithful=faithful))


# ------------------------------------------------------------------------------------------------------------ metrics
def _one_a_row(values, name):
    """float64 [rows] from a list, array, Series or tensor, by place; NaN for a missing value."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    values = as_array(values, name) if not hasattr(values, "dtype") else values  # pandas' keep their own kinds
    if np.ndim(values) != 1:
        raise ValueError(f"{name} have shape {np.shape(values)}; give one a row")
    values = pd.Series(values)
    try:
        if values.dtype.kind in "cmM":  # complex numbers and times would become numbers without a word
            raise TypeError
        return values.to_numpy(np.float64, na_value=np.nan)
    except (TypeError, ValueError):
        raise ValueError(f"{name} hold {values.dtype}; give numbers") from None


def _check_scores(labels, scores, users=None):
    for name, others in (("scores", scores), ("users", users)):
        if isinstance(labels, pd.Series) and isinstance(others, pd.Series):
            one, other = labels.index, others.index
            if not one.equals(other) and one.sort_values().equals(other.sort_values()):
                raise ValueError(f"{name} have the rows of labels in another order; give {name}.loc[labels.index]")
    labels, scores = _one_a_row(labels, "labels"), _one_a_row(scores, "scores")
    if not len(labels) or len(labels) != len(scores):
        raise ValueError(f"{len(labels)} labels and {len(scores)} scores; give one score a label, at least one")
    if not np.isfinite(scores).all():
        raise ValueError(f"score {np.flatnonzero(~np.isfinite(scores))[0]} is {scores[~np.isfinite(scores)][0]}")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"label {labels[~np.isin(labels, (0, 1))][0]:g}; labels must be 0 or 1")
    missing = ", some of them missing" * bool(np.ndim(users) == 1 and pd.isna(_by_row(users)).any())
    if users is not None and (np.shape(users) != labels.shape or missing):
        raise ValueError(
            f"users of shape {np.shape(users)}{missing} for {len(labels)} labels; name the user of each row"
        )
    return labels.astype(np.int64), scores


def _by_row(users):
    """Users as an array that keeps 1 and "1" apart."""
    return users.detach().cpu().numpy() if hasattr(users, "detach") else pd.Series(users).to_numpy()


def auc(labels, scores):
    """Area under the ROC curve: the chance that a liked row scores above a disliked one, ties counting half.

    Raises ValueError when the labels are of one class only: then no such pair exists.
    """
    labels, scores = _check_scores(labels, scores)
    if np.unique(labels).size < 2:
        raise ValueError(f"AUC needs liked and disliked rows; {labels.sum()} of {len(labels)} rows are liked")
    return float(_weighted_aucs(labels, scores, np.ones((1, len(labels))))[0])


def _weighted_aucs(labels, scores, weights):
    """AUC for each line of `weights`, how often each row counts: [draws, rows] -> float64 [draws], or NaN."""
    order = np.argsort(scores, kind="stable")
    first = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # where each distinct score begins
    weights, labels = weights[:, order], labels[order]
    ups = np.add.reduceat(weights * labels, first, axis=1)  # [draws, distinct scores]
    downs = np.add.reduceat(weights * (1 - labels), first, axis=1)
    with np.errstate(invalid="ignore"):
        return (ups * (downs.cumsum(1) - downs / 2)).sum(1) / (ups.sum(1) * downs.sum(1))


def user_aucs(users, labels, scores):
    """AUC of each user: a float64 Series indexed by user; NaN for a user with one row or one class."""
    labels, scores = _check_scores(labels, scores, users)
    rows = pd.DataFrame({"label": labels, "score": scores}).groupby(_by_row(users)).indices
    found = {u: _weighted_aucs(labels[own], scores[own], np.ones((1, len(own))))[0] for u, own in rows.items()}
    return pd.Series(found, dtype=float)


def uauc(users, labels, scores):
    """(UAUC, users counted): the plain mean of the users' AUCs (paper, Section 4.1).

    Users with one row or one class have no AUC and are left out; tell how many are left beside the mean.
    Where nobody is left, a warning says so, and the mean is NaN.
    """
    each = user_aucs(users, labels, scores).dropna()
    if each.empty:
        warnings.warn("UAUC counts no user: each has one row or one class; score more rows of each user", stacklevel=2)
    return float(each.mean()), len(each)


FEW = 5  # users; of fewer, redrawing says nothing: one user gives an interval of no width, whatever the scores


def _bootstrap(users, labels, ways, draws, seed):
    """For each array of scores in `ways` {"auc", "uauc"}: float64 [draws], over the same samples of users.

    All NaN where there are less than FEW users, or users that UAUC counts.
    """
    if not (isinstance(draws, (int, np.integer)) and draws > 0):
        raise ValueError(f"draws is {draws!r}; ask for one or more, 1,000 for an interval")
    auc(labels, ways[0])  # refuses labels of one class
    each = [user_aucs(users, labels, scores) for scores in ways]
    place, counted = each[0].index.get_indexer(_by_row(users)), each[0].notna().to_numpy()
    rng, share = np.random.default_rng(seed), np.full(len(counted), 1 / len(counted))
    at_once, found = max(1, 10_000_000 // len(place)), [{"auc": [], "uauc": []} for _ in ways]  # bounds the memory
    for start in range(0, draws, at_once):
        counts = rng.multinomial(len(counted), share, size=min(at_once, draws - start))  # [draws, users]
        for values, mine, scores in zip(found, each, ways):
            values["auc"].append(_weighted_aucs(labels, scores, counts[:, place].astype(float)))
            with np.errstate(invalid="ignore"):  # a draw may hold no countable user
                values["uauc"].append(counts[:, counted] @ mine[counted] / counts[:, counted].sum(1))
    few = {"auc": len(counted) < FEW, "uauc": counted.sum() < FEW}
    return [{name: np.concatenate(parts) * (np.nan if few[name] else 1) for name, parts in v.items()} for v in found]


def _interval(draws):
    """(low, high): the middle 95 % of the draws that are numbers; NaN where there is none."""
    draws = draws[~np.isnan(draws)]
    return tuple(np.percentile(draws, [2.5, 97.5]).tolist()) if len(draws) else (np.nan, np.nan)


def bootstrap_ci(users, labels, scores, draws=1000, seed=0):
    """95 % intervals by resampling users, with all their rows: {"auc": (low, high), "uauc": (low, high)}.

    Users, not rows, are drawn, for the rows of one user hang together (percentile bootstrap, Efron 1979). Of less than
    five users (for UAUC: users that it counts) nothing can be said: (NaN, NaN).
    """
    labels, scores = _check_scores(labels, scores, users)
    (values,) = _bootstrap(users, labels, [scores], draws, seed)
    return {name: _interval(value) for name, value in values.items()}


def paired_test(users, labels, scores_a, scores_b, draws=1000, seed=0):
    """Is scoring b better than a on the same rows? DataFrame with rows auc, uauc; columns difference, low, high, p.

    difference = b - a with its 95 % interval over resampled users; p is two-sided, from the same draws.
    Of less than five users (for UAUC: users that it counts) low, high and p are NaN.
    """
    (_, a), (labels, b) = _check_scores(labels, scores_a, users), _check_scores(labels, scores_b)
    drawn, points = _bootstrap(users, labels, [a, b], draws, seed), []
    for s in (a, b):
        points.append({"auc": auc(labels, s), "uauc": uauc(users, labels, s)[0]})
    rows = {}
    for name in ("auc", "uauc"):
        gap = drawn[1][name] - drawn[0][name]
        gap = gap[~np.isnan(gap)]
        tail = (1 + min((gap <= 0).sum(), (gap >= 0).sum())) / (1 + len(gap))  # never 0: finite draws cannot show that
        p = min(1.0, 2 * tail) if len(gap) else np.nan
        rows[name] = (points[1][name] - points[0][name], *_interval(gap), p)
    return pd.DataFrame.from_dict(rows, orient="index", columns=["difference", "low", "high", "p"])


def evaluate(rows, scores):
    """AUC and UAUC of `scores` on `rows` (columns `user`, `label`) with intervals and users counted, as a dict."""
    ci = bootstrap_ci(rows.user, rows.label, scores)
    mean, users = uauc(rows.user, rows.label, scores)
    low, high = ci["auc"], ci["uauc"]
    values = (auc(rows.label, scores), *low, mean, *high)
    names = ("auc", "auc_lo", "auc_hi", "uauc", "uauc_lo", "uauc_hi")
    return {name: round(value, 4) for name, value in zip(names, values)} | {"users": users}


# ----------------------------------------------------------------------------------------------------------- pictures
COLORS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()  # Okabe and Ito, safe for colour-blind eyes


def diagram(boxes, arrows=(), size=(9, 2.4)):
    """A figure of boxes and arrows, `size` in inches.

    boxes: {name: (x, y, text, colour)}, x and y from 0 to 1; arrows: (from, to, label), or (from, to, label, bend) for
    a dashed one that bends, up where `bend` is above 0.
    """
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=size)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.axis("off")
    looks = {"ha": "center", "va": "center", "fontsize": 10, "linespacing": 1.4}
    drawn = {}
    for name, (x, y, text, color) in boxes.items():
        bbox = {"boxstyle": "round,pad=0.5", "facecolor": f"{color}30", "edgecolor": color}
        drawn[name] = ax.text(x, y, text, bbox=bbox, **looks).get_bbox_patch()
    for start, end, label, *bend in arrows:
        ends = {"patchA": drawn[start], "patchB": drawn[end], "shrinkA": 2, "shrinkB": 2, "color": "0.25"}
        if bend:
            up = bend[0] if boxes[start][0] > boxes[end][0] else -bend[0]
            ends |= {"connectionstyle": f"arc3,rad={up}", "linestyle": "--", "color": COLORS[1]}
        (x1, y1, *_), (x2, y2, *_) = boxes[start], boxes[end]
        ax.annotate("", (x2, y2), (x1, y1), arrowprops={"arrowstyle": "-|>", **ends})
        height = abs(x2 - x1) * bend[0] * size[0] / size[1] / 2 + 0.06 if bend else 0.08
        ax.text((x1 + x2) / 2, (y1 + y2) / 2 + height, label, ha="center", va="bottom", fontsize=9, color=ends["color"])
    return fig


def save_figure(fig, name, alt):
    """Keep `fig` as executed/figures/NAME.png and return it for display, with `alt` for those who cannot see it."""
    import io

    import matplotlib.pyplot as plt
    from IPython.display import Image

    picture, path = io.BytesIO(), OUTPUT / "figures" / f"{name}.png"
    fig.savefig(picture, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(fig)
    try:
        with replacing(path) as part:
            part.write_bytes(picture.getvalue())
    except OSError as error:
        print(f"the picture is shown but not kept: {error}")
    return Image(picture.getvalue(), alt=alt, width=int(fig.get_figwidth() * 100))


if __name__ == "__main__":
    from binllm_cli import main

    raise SystemExit(main())
