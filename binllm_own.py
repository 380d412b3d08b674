"""Your own interactions: a file of any common kind is read, repaired where that is safe, reported, and split by time.

`read_interactions(path)` -> `Interactions` (with a `report`) -> `.split()` -> the `Dataset` of binllm_utils. Nothing is
repaired without being counted in the report; what cannot be repaired is named by file and line.
"""

import csv
import html
import re
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from binllm_data import CACHE, Dataset, Source, fetch, replacing

CHUNK = 500_000  # rows that are in memory as text at once
NAMES = {  # a column's names in the files that people have, without blanks, dashes and types
    "user": "user userid uid reviewerid reviewer customerid memberid username accountid",
    "item": "item itemid movieid movie bookid isbn parentasin asin productid trackid songid articleid letterboxduri",
    "rating": "rating ratings myrating overall score stars starrating bookrating label like liked",
    "timestamp": "timestamp time unixreviewtime datetime date dateread watcheddate createdat reviewtime reviewdate",
    "title": "title movietitle booktitle itemtitle name trackname songtitle",
}
MAGIC = {
    b"PK\x03\x04": "a ZIP archive; unpack it",
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"%PDF": "a PDF",
    b"\x89PNG": "a picture",
    b"SQLite": "a database; export a table",
    b"\xd0\xcf\x11\xe0": "an Excel file; save it as CSV",
}
WORDS = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}


@dataclass
class Interactions:
    """What a file holds: rows with user and item (int32, places in `users`, `items`), value (float32), time (int64).

    value: the rating or label as it stands in the file. time: seconds, or -1 in all rows where the file has no times.
    users, items: the ids as they are written in the file; titles: one an item. report: {fact: value}, repairs counted.
    """

    rows: pd.DataFrame
    users: list[str]
    items: list[str]
    titles: list[str]
    report: dict = field(default_factory=dict)

    @property
    def table(self):
        """The report as a DataFrame."""
        return pd.DataFrame({"": list(self.report.values())}, index=list(self.report))

    def split(self, like=None, valid=0.1, test=0.1, name="my-data"):
        """`Dataset`: the latest share `test` of the rows, before them `valid`, and train.

        like: the least value that counts as liked; None takes four fifths of the highest, or 1 where there are 0 and 1.
        Rows of one time stay together. Without times, each user's last rows are taken, in the file's order.
        Raises ValueError where a part would be empty or have likes or dislikes only.
        """
        value, highest = self.rows.value.to_numpy(), float(self.rows.value.max())
        like = like if like is not None else (1.0 if set(np.unique(value)) <= {0.0, 1.0} else 0.8 * highest)
        if self.rows.time.iloc[0] >= 0:
            cut = np.quantile(self.rows.time, [1 - valid - test, 1 - test])
            part, time = np.searchsorted(cut, self.rows.time, side="left"), self.rows.time.to_numpy()
        else:
            order = self.rows.groupby("user").cumcount()
            size = self.rows.groupby("user").user.transform("size")
            place = (order + 1) / size
            part = np.searchsorted([1 - valid - test, 1 - test], place, side="left")
            time = part * 10**8 + order.to_numpy() * 86_400  # a day a row: each begins a sitting of its own
        rows = pd.DataFrame({"user": self.rows.user, "item": self.rows.item, "label": value >= like, "timestamp": time})
        parts = {}
        for number, split in enumerate(("train", "valid", "test")):
            mine = rows[part == number].reset_index(drop=True)
            if mine.label.nunique() < 2:
                raise ValueError(
                    f"{split} would hold {len(mine):,} rows, {int(mine.label.sum()):,} of them liked; a value of "
                    f"{like:g} or more counts as liked here: choose another with like=, or give more rows"
                )
            parts[split] = mine
        return Dataset(**parts, titles=self.titles, name=name)


def read_interactions(path, columns=None, titles=None, dayfirst=None):
    """`Interactions` of a CSV, TSV, Parquet or JSON-lines file, or of an export that a known service gives.

    columns: {"user", "item", "rating", "timestamp" or "title": name in the file} where the guess is to be changed.
    titles: a second file, with a column of items and one of titles. dayfirst: how dates such as 03/04/2020 are meant.
    Rows without a user, an item or a value are left out, as are all but the last of rows that name the same user, item
    and time; both are counted. Ids stay the texts they are, so that 007 and 7 differ.
    Memory: a part of the file as text, and 20 bytes a row. Raises ValueError naming file and line.
    """
    path = Path(path)
    before = _fingerprint(path)
    source = _Source(path)
    found = guess_columns(source.names, path, columns)
    reading = _Reading(path, found, dayfirst)
    for first_line, chunk in source.chunks():
        reading.take(first_line, chunk)
    if _fingerprint(path) != before:
        raise ValueError(f"{path} was changed while it was read; read it again when nothing writes it")
    return reading.finished(source, titles)


def _fingerprint(path):
    if not path.is_file():
        raise ValueError(f"{path} is not there; give the path of a file")
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _plain(name):
    """A column's name without type, case, blanks and dashes: "user_id:token" -> userid."""
    return re.sub(r"[\W_]", "", str(name).split(":")[0].lower())


def guess_columns(names, path="the file", wanted=None):
    """{role: name of the column} for those of NAMES that the file has; `wanted` overrules. Raises ValueError."""
    names, found = list(names), {}
    for role, known in NAMES.items():
        by_plain = {_plain(name): name for name in reversed(names)}
        found[role] = next((by_plain[k] for k in known.split() if k in by_plain), None)
    for role, name in (wanted or {}).items():
        if role not in NAMES or name not in names:
            raise ValueError(
                f"columns: {role!r}: {name!r}; roles are {', '.join(NAMES)}, {path} has {', '.join(names)}"
            )
        found[role] = name
    if not found["item"]:
        found["item"] = found["title"]  # an export of one's own often has titles only
    if not found["item"] or not found["rating"]:
        lacking = "items" if not found["item"] else "ratings or labels"
        raise ValueError(f"{path}: no column of {lacking} among {', '.join(map(repr, names))}; say columns={{...}}")
    return {role: name for role, name in found.items() if name}


# ---------------------------------------------------------------------------------------------------- kinds of files
class _Source:
    """A file, the names of its columns, and its rows as text, some at a time."""

    def __init__(self, path):
        self.path, self.repairs = path, {}
        head = path.read_bytes()[:200_000] if path.stat().st_size < 1e6 else path.open("rb").read(200_000)
        if not head.strip():
            raise ValueError(f"{path} is empty")
        if head.startswith(b"PAR1"):
            self.kind = "Parquet"
            try:
                self.names = pq.read_schema(path).names
            except Exception as error:  # Arrow's own kinds
                raise ValueError(f"{path}: not a Parquet file that can be read ({error!s:.200})") from None
            return
        for start, what in MAGIC.items():
            if head.startswith(start):
                raise ValueError(f"{path} is {what}")
        self._decode(head)
        self.kind = "JSON lines" if self.head.lstrip()[:1] == "{" else "text"
        self._read_head_of_json() if self.kind == "JSON lines" else self._read_head_of_text()

    def _decode(self, head):
        self.encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        if b"\0" in head and self.encoding != "utf-16":
            raise ValueError(f"{self.path} is not text: there are zero bytes in it")
        try:
            whole = head if len(head) < 200_000 else head[: head.rfind(b"\n")]
            self.head = whole.decode(self.encoding)
            if len(head) == 200_000:
                for line in self.path.open(encoding=self.encoding):  # the whole of it, before a row is taken
                    del line
        except UnicodeDecodeError:
            self.encoding = "cp1252"
            self.head = head.decode("cp1252", errors="replace")
            self.repairs["not UTF-8, read as Windows-1252"] = "yes"

    def _read_head_of_json(self):
        import json

        try:
            self.names = list(json.loads(self.head.lstrip().splitlines()[0]))
        except ValueError as error:
            raise ValueError(f"{self.path}, line 1: not JSON ({error})") from None

    def _read_head_of_text(self):
        lines = [line for line in self.head.splitlines()[:50] if line.strip()]
        self.separator, cells = _separator(lines, self.path)
        numeric = [bool(re.fullmatch(r"\s*-?\d+([.,]\d+)?\s*", cell)) for cell in cells[0]]
        known = any(_plain(cell) in known.split() for cell in cells[0] for known in NAMES.values())
        self.header = known or not any(numeric)
        if self.header:
            self.names = [cell.strip() for cell in cells[0]]
            twice = {name for name in self.names if self.names.count(name) > 1}
            if twice:
                raise ValueError(f"{self.path}, line 1: the column {twice.pop()!r} is there twice")
        elif 3 <= len(cells[0]) <= 4:
            self.names = ["user", "item", "rating", "timestamp"][: len(cells[0])]
            self.repairs["no header, columns taken as"] = ", ".join(self.names)
        else:
            raise ValueError(f"{self.path}: no header line, and {len(cells[0])} columns; write their names into line 1")

    def chunks(self):
        """(number of the first line, DataFrame of texts) again and again."""
        if self.kind == "Parquet":
            yield from self._parquet()
            return
        options = {"dtype": str, "keep_default_na": False, "na_filter": False, "encoding": self.encoding}
        try:
            if self.kind == "JSON lines":
                line = 1
                frames = pd.read_json(self.path, lines=True, chunksize=CHUNK, dtype=False, convert_dates=False,
                                      encoding=self.encoding.removesuffix("-sig"))  # fmt: skip
            else:
                line = 2 if self.header else 1
                options |= {"sep": self.separator, "engine": "python" if len(self.separator) > 1 else "c"}
                options |= {"names": self.names, "header": 0 if self.header else None, "index_col": False}
                frames = pd.read_csv(self.path, chunksize=CHUNK, on_bad_lines="error", **options)
            for frame in frames:
                yield line, frame.reset_index(drop=True)
                line += len(frame)
        except (pd.errors.ParserError, ValueError) as error:
            if str(error).startswith(str(self.path)):
                raise
            reason = str(error).removeprefix("Error tokenizing data. C error: ").strip()
            raise ValueError(f"{self.path}: {reason}; is a quotation mark left open, or a line broken?") from None

    def _parquet(self):
        line = 1
        try:
            for batch in pq.ParquetFile(self.path).iter_batches(CHUNK):
                yield line, batch.to_pandas(ignore_metadata=True)
                line += len(batch)
        except Exception as error:  # Arrow has many kinds of its own
            raise ValueError(f"{self.path}: a damaged Parquet file ({error!s:.200})".replace("\n", " ")) from None


def _separator(lines, path):
    """(separator, cells of each line) of the first lines of a text: the one that gives most of them equally many."""
    best = (0.0, 1, "", [])
    for separator in ("::", ",", "\t", ";", "|"):
        if separator == "::":
            cells = [line.split("::") for line in lines]
        else:
            cells = list(islice(csv.reader(lines, delimiter=separator), len(lines)))
        widths = [len(row) for row in cells]
        usual = max(set(widths), key=widths.count)
        share = widths.count(usual) / len(widths)
        if usual > 1 and (round(share, 1), usual) > best[:2]:
            best = (round(share, 1), usual, separator, cells)
    if not best[2]:
        raise ValueError(f"{path}: no comma, tab, semicolon, bar or :: parts its lines into columns")
    return best[2], best[3]


# ------------------------------------------------------------------------------------------------------ cells to values
class _Reading:
    """Rows taken so far; ids are numbered as they come."""

    def __init__(self, path, columns, dayfirst):
        self.path, self.columns, self.dayfirst = path, columns, dayfirst
        self.ids, self.title_of, self.parts, self.left_out = {"user": {}, "item": {}}, {}, [], 0
        self.count = {}

    def line(self, first, at):
        return f"{self.path}, line {first + int(at)}"

    def take(self, first, frame):
        cells = {role: frame[name] for role, name in self.columns.items()}
        value = self.values(first, cells["rating"])
        if _plain(self.columns["rating"]) == "myrating":  # Goodreads writes 0 for a book without a rating
            value = np.where(value == 0, np.nan, value)
        ids = {role: _texts(cells[role]) for role in ("user", "item") if role in cells}
        ids.setdefault("user", pd.Series("me", index=frame.index))
        keep = ~np.isnan(value) & (ids["user"] != "").to_numpy() & (ids["item"] != "").to_numpy()
        time = np.full(len(frame), -1)
        if "timestamp" in cells:
            time = self.times(first, cells["timestamp"])
        self.left_out += int((~keep).sum())
        numbers = {role: self.numbered(role, ids[role][keep]) for role in ("user", "item")}
        if "title" in cells:
            titles = _texts(cells["title"])[keep]
            for item, title in zip(numbers["item"], titles):
                if title and item not in self.title_of:
                    self.title_of[item] = title
        self.parts.append(pd.DataFrame(numbers | {"value": value[keep].astype(np.float32), "time": time[keep]}))

    def numbered(self, role, texts):
        known = self.ids[role]
        codes, names = pd.factorize(texts)
        places = np.array([known.setdefault(name, len(known)) for name in names], np.int32)
        return places[codes]

    def values(self, first, cells):
        """float64 of ratings as people write them: 4, 4.5, "4,5", ★★★½, yes; NaN where there is none."""
        if pd.api.types.is_numeric_dtype(cells) or pd.api.types.is_bool_dtype(cells):
            return cells.astype(float).to_numpy(na_value=np.nan)
        texts = _texts(cells)
        value = pd.to_numeric(texts, errors="coerce").to_numpy(float, na_value=np.nan).copy()
        for at in np.flatnonzero(np.isnan(value) & (texts != "").to_numpy()):
            text = texts.iloc[at]
            if re.fullmatch(r"-?\d+,\d+", text):
                value[at], what = float(text.replace(",", ".")), "ratings with a decimal comma"
            elif re.fullmatch("★*½?", text):
                value[at], what = text.count("★") + 0.5 * text.count("½"), "ratings written in stars"
            elif text.lower() in WORDS:
                value[at], what = WORDS[text.lower()], "ratings written as words"
            else:
                raise ValueError(f"{self.line(first, at)}: the rating is {text[:40]!r}; give a number")
            self.count[what] = self.count.get(what, 0) + 1
        if np.isinf(value).any():
            raise ValueError(f"{self.line(first, np.isinf(value).argmax())}: the rating is infinite")
        return value

    def times(self, first, cells):
        """int64 as they stand, or seconds of dates; -1 where there is none."""
        if pd.api.types.is_datetime64_any_dtype(cells):
            stamps = pd.DatetimeIndex(cells)
            return np.where(stamps.isna(), -1, stamps.as_unit("s").asi8)
        texts = _texts(cells)
        number = pd.to_numeric(texts, errors="coerce")
        if (number.notna() | (texts == "")).all():
            return number.fillna(-1).astype(np.int64).to_numpy()
        slashed = texts.str.extract(r"^\s*(\d{1,2})[/.](\d{1,2})[/.]\d{4}").astype(float)
        if self.dayfirst is None and slashed[0].notna().any():
            if (slashed[0] > 12).any() == (slashed[1] > 12).any():
                raise ValueError(
                    f"{self.line(first, slashed[0].notna().argmax())}: {texts[slashed[0].notna()].iloc[0]!r} may begin "
                    "with the day or with the month; say dayfirst=True or False"
                )
            self.dayfirst = bool((slashed[0] > 12).any())
        stamps = pd.to_datetime(
            texts.where(texts != ""), format="mixed", utc=True, errors="coerce", dayfirst=bool(self.dayfirst)
        )
        bad = stamps.isna() & (texts != "")
        if bad.any():
            raise ValueError(
                f"{self.line(first, bad.argmax())}: the time is {texts[bad].iloc[0][:40]!r}; give a date or seconds"
            )
        return np.where(stamps.isna(), -1, pd.DatetimeIndex(stamps).as_unit("s").asi8)

    def finished(self, source, titles):
        rows = pd.concat(self.parts, ignore_index=True)
        if not len(rows):
            raise ValueError(f"{self.path}: no row has a user, an item and a rating")
        report = {
            "file": f"{self.path.name}, {source.kind}",
            "columns": ", ".join(f"{r} = {n}" for r, n in self.columns.items()),
        }
        report |= source.repairs
        timed = rows.time >= 0
        if timed.any() and rows.time[timed].nunique() > 1:
            report["rows without a time, left out"] = int((~timed).sum())
            rows = rows[timed]
            rows["time"] = _to_seconds(rows.time.to_numpy(), self.path)
            rows = rows.sort_values("time", kind="stable")
        else:
            report["times"] = "none that differ: the file's order is taken for time, user by user"
            rows["time"] = -1
        again = rows.duplicated(["user", "item", "time"], keep="last")
        rows = rows[~again].reset_index(drop=True)
        users, rows["user"] = self.sorted_ids("user", rows.user)
        items, rows["item"] = self.sorted_ids("item", rows.item)
        names, told = self.titles(items, titles)
        report |= {"rows": len(rows), "rows without user, item or rating, left out": self.left_out}
        report |= {"same user, item and time, all but the last left out": int(again.sum())} | self.count
        report |= {"users": len(users), "items": len(items)} | told
        report["ratings"] = ", ".join(
            f"{v:g}: {n:,}" for v, n in rows.value.value_counts().sort_index().head(12).items()
        )
        if timed.any() and rows.time.iloc[0] >= 0:
            first, last = pd.to_datetime(rows.time.iloc[[0, -1]], unit="s").dt.date
            report["period"] = f"{first} to {last}"
        return Interactions(rows, users, items, names, {k: v for k, v in report.items() if v != 0})

    def sorted_ids(self, role, numbers):
        """(ids in order, their new numbers): as numbers where all are, else as texts, whatever order the file has."""
        names = np.array(list(self.ids[role]), dtype=object)
        used = np.unique(numbers)
        plain = all(re.fullmatch(r"0|[1-9]\d{0,17}", names[at]) for at in used)
        order = sorted(used, key=lambda at: int(names[at]) if plain else names[at])
        place = np.full(len(names), -1, np.int32)
        place[order] = np.arange(len(order))
        return [names[at] for at in order], place[numbers]

    def titles(self, items, path):
        """(title of each item, what there is to report)."""
        known = {name: self.title_of.get(number) for name, number in self.ids["item"].items()}
        if path is not None:
            known |= _read_titles(Path(path))
        titles = [html.unescape(known.get(item) or "") for item in items]
        lacking = sum(not title.strip() for title in titles)
        told = {"items without a title, shown by their id": lacking}
        told["titles that several items have"] = len(titles) - lacking - len({t for t in titles if t.strip()})
        return [title if title.strip() else item for title, item in zip(titles, items)], told


def _texts(cells):
    """Cells as stripped texts; missing ones empty, whole numbers without a point."""
    if pd.api.types.is_float_dtype(cells):
        cells = cells.map(lambda x: "" if pd.isna(x) else f"{x:.15g}")
    return cells.astype(object).where(cells.notna(), "").map(str).str.strip()


def _to_seconds(times, path):
    """int64 seconds of seconds, milli-, micro- or nanoseconds, told by their median."""
    unit = next((unit for unit in (1, 10**3, 10**6) if np.median(times) < 10**11 * unit), 10**9)
    seconds = times // unit
    if seconds.max() > 10**11:
        raise ValueError(f"{path}: the time {times.max()} is not in the unit of the others")
    return seconds


def _read_titles(path):
    """{item: title} of a file with both."""
    _fingerprint(path)
    source = _Source(path)
    plain = {_plain(name): name for name in source.names}
    item, title = (next((plain[k] for k in NAMES[role].split() if k in plain), None) for role in ("item", "title"))
    if not item or not title:
        raise ValueError(f"{path}: no columns of items and titles among {', '.join(map(repr, source.names))}")
    return {i: t for _, frame in source.chunks() for i, t in zip(_texts(frame[item]), _texts(frame[title])) if t}


# --------------------------------------------------------------------------------------------------- a second data set
ML100K = Source(
    "recbole-1.2.1-py3-none-any.whl",
    "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    package="recbole==1.2.1",
)


def ml100k_files(cache=None):
    """(ratings, films): MovieLens-100K as files, from inside a package of the registry, checked by SHA-256."""
    import zipfile

    folder = Path(cache or CACHE) / "ml-100k"
    names = ("ml-100k.inter", "ml-100k.item")
    if not folder.exists():
        with zipfile.ZipFile(fetch(ML100K, cache=cache)) as archive, replacing(folder) as part:
            part.mkdir()
            for name in names:
                (part / name).write_bytes(archive.read(f"recbole/dataset_example/ml-100k/{name}"))
    return tuple(folder / name for name in names)


# -------------------------------------------------------------------------------------------------------------- verdict
def verdict(rows, scores):
    """(table, sentence): does the last of `scores` ({method: one number a row}) rank `rows` better than each other one?

    The table has a line a method, AUC and UAUC with intervals; the sentence names the paired differences in AUC.
    """
    import binllm_utils as bu

    table = pd.DataFrame({name: bu.evaluate(rows, values) for name, values in scores.items()}).T
    *others, mine = scores
    told = []
    for other in others:
        gap = bu.paired_test(rows.user, rows.label, scores[other], scores[mine]).loc["auc"]
        sure = "better than" if gap.low > 0 else "worse than" if gap.high < 0 else "not surely different from"
        told.append(f"{sure} {other} ({gap.difference:+.3f} AUC, 95 % from {gap.low:+.3f} to {gap.high:+.3f})")
    return table, f"On {len(rows):,} rows {mine} rank {'; '.join(told)}."


def main(arguments):
    """python binllm_own.py FILE [TITLES]: the report, then codes against counting, in a table and a sentence."""
    import sys

    import binllm_utils as bu

    if not 1 <= len(arguments) <= 2 or arguments[0].startswith("-"):
        sys.exit("python binllm_own.py FILE [FILE WITH TITLES]")
    try:
        read = read_interactions(arguments[0], titles=arguments[1] if len(arguments) > 1 else None)
        print(read.table.to_string(header=False))
        data = read.split()
    except ValueError as error:
        sys.exit(str(error))
    codes, _ = bu.fit_codes(data)
    scores = {"counting": bu.popularity_baseline(data, data.test), "codes": codes.similarity(data.test)}
    table, sentence = verdict(data.test, scores)
    print(f"\n{table.to_string()}\n\n{sentence}")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
