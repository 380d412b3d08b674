"""Your own interactions: a file of any common kind is read, repaired where that is safe, reported, and split by time.

`read_interactions(path)` -> `Interactions` (with a `report`) -> `.split()` -> the `Dataset` of binllm_utils. Nothing is
repaired without being counted in the report; what cannot be repaired is named by file and line.
"""

import codecs
import csv
import html
import json
import re
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from binllm_data import CACHE, SPLITS, Dataset, Source, _seconds, alone, fetch, replacing

CHUNK = 500_000  # rows that are in memory as text at once
NAMES = {  # a column's names in the files that people have, without blanks, dashes and types
    "user": "user userid uid reviewerid reviewer customerid memberid username accountid",
    "item": "item itemid movieid movie bookid isbn parentasin asin productid trackid songid articleid letterboxduri",
    "rating": "rating ratings myrating yourrating overall score stars starrating bookrating label like liked",
    "timestamp": "timestamp unixreviewtime datetime date dateread watcheddate createdat reviewtime reviewdate time",
    "title": "title movietitle booktitle itemtitle name trackname songtitle",
}
MAGIC = {
    b"PK\x03\x04": "a ZIP archive or an Excel file; unpack it, or save it as CSV",
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"%PDF": "a PDF",
    b"\x89PNG": "a picture",
    b"SQLite": "a database; export a table",
    b"\xd0\xcf\x11\xe0": "an Excel file; save it as CSV",
}
SHELL = "--columns role=name"
NO_TIME = np.iinfo(np.int64).min
DATE = r"^(?!\d{4}).*?(?<![\d/.:-])(\d{1,2})([-/. ])(\d{1,2})\2(\d{4}|\d{2})(?![\d:])"  # 31/12/2000, "Sun 31.12.00"
# Columns of exports by Goodreads, IMDb, Letterboxd: whose they are stands nowhere.
ONE_PERSON = {"myrating", "yourrating", "letterboxduri"}
MISSING = r"NULL null NaN nan None <NA> \N NA N/A #N/A".split()  # what programs write for an id that is not there
WORDS = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}


@dataclass
class Interactions:
    """What a file holds: rows with user and item (int32, places in `users`, `items`), value (float32), time (int64).

    value: the rating or label as it stands in the file. time: seconds, or NO_TIME in all rows where there are none.
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
        Rows of one time stay together. Without times, the last share of each user's rows is taken, in the file's order:
        of a user with few rows the last one, so that test is larger and valid smaller than asked for.
        The report then also says what counts as liked, and of how many rows. Raises ValueError where a part would be
        empty or have likes or dislikes only.
        """
        value, highest = self.rows.value.to_numpy(), float(self.rows.value.max())
        like = like if like is not None else (1.0 if set(np.unique(value)) <= {0.0, 1.0} else 0.8 * highest)
        share = (value >= like).mean()
        doubt = "" if 0.05 <= share <= 0.95 else "; is that meant? Else say like=, in a shell --like"
        self.report["liked"] = f"{like:g} or more: {share:.1%} of the rows{doubt}"
        if self.rows.time.iloc[0] != NO_TIME:
            cut = np.quantile(self.rows.time, [1 - valid - test, 1 - test])
            part, time = np.searchsorted(cut, self.rows.time, side="left"), self.rows.time.to_numpy()
        else:
            order = self.rows.groupby("user").cumcount()
            size = self.rows.groupby("user").user.transform("size")
            place = (order + 1) / size
            part = np.searchsorted([1 - valid - test, 1 - test], place, side="left")
            time = 21_601 * (part * (order.max() + 1) + order.to_numpy())  # over 6 hours: each is its own sitting
        return _cut(self.rows.assign(time=time), part, like, self.titles, name)


def _cut(rows, part, like, titles, name):
    """`Dataset` of `rows`, those of part 0 for training, 1 for valid, 2 for test; `like` and above is liked."""
    rows = pd.DataFrame({"user": rows.user, "item": rows.item, "label": rows.value >= like, "timestamp": rows.time})
    parts = {}
    for number, split in enumerate(("train", "valid", "test")):
        mine = rows[part == number].reset_index(drop=True)
        if mine.empty:
            raise ValueError(
                f"{split} would hold no row: rows of one time stay together, and without times users of five rows "
                "or fewer leave none for valid; give more rows, or times that differ"
            )
        if mine.label.nunique() < 2:
            raise ValueError(
                f"{split} would hold {len(mine):,} rows, {int(mine.label.sum()):,} of them liked; a value of "
                f"{like:g} or more counts as liked here: say like= (in a shell --like), or give more rows"
            )
        parts[split] = mine
    return Dataset(**parts, titles=titles, name=name)


def read_interactions(path, columns=None, titles=None, dayfirst=None):
    """`Interactions` of a CSV, TSV, Parquet or JSON-lines file, or of an export that a known service gives.

    columns: {"user", "item", "rating", "timestamp" or "title": name in the file} where the guess is to be changed.
    titles: a second file, with a column of items and one of titles. dayfirst: how dates such as 03/04/2020 are meant.
    Rows without a user, an item or a value are left out, as are all but the last of rows that name the same user, item
    and time; both are counted. Ids stay the texts they are, so that 007 and 7 differ.
    Memory: a part of the file as text, and some 20 bytes a row, several times over while they are put in order.
    Raises ValueError naming the file, and the line where there is one; a row with line breaks counts as one line.
    """
    path = Path(path)
    with _unchanged(path):
        source = _Source(path)
        found = guess_columns(source.names, path, columns)
        reading = _Reading(path, found, dayfirst)
        for first_line, chunk in source.chunks(list(dict.fromkeys(found.values()))):
            reading.take(first_line, chunk)
    return reading.finished(source, titles)


def _fingerprint(path):
    if not path.is_file():
        raise ValueError(f"{path} is not there; give the path of a file")
    state = path.stat()
    return state.st_size, state.st_mtime_ns


@contextmanager
def _unchanged(path):
    """A block that reads `path`; ValueError where the file is another one at its end."""
    before = _fingerprint(path)
    yield
    if _fingerprint(path) != before:
        raise ValueError(f"{path} was changed while it was read; read it again when nothing writes it")


def _plain(name):
    """A column's name without type, case, blanks and dashes: "user_id:token" -> userid."""
    return re.sub(r"[\W_]", "", str(name).split(":")[0].lower())


def _find(names, role):
    """The first of `names` that usually holds that role, or None."""
    by_plain = {_plain(name): name for name in reversed(names)}
    return next((by_plain[known] for known in NAMES[role].split() if known in by_plain), None)


def guess_columns(names, path="the file", wanted=None):
    """{role: name of the column} for those of NAMES that the file has; `wanted` overrules. Raises ValueError."""
    names = list(names)
    found = {role: _find(names, role) for role in NAMES}
    for role, name in (wanted or {}).items():
        if role not in NAMES or name not in names:
            raise ValueError(
                f"columns: {role!r}: {name!r}; roles are {', '.join(NAMES)}, {path} has {', '.join(names)}"
            )
        found[role] = name
    named = (wanted or {}).values()
    found = {role: None if name in named and role not in wanted else name for role, name in found.items()}
    if not found["title"] and _plain(found["item"]) in NAMES["title"].split():
        found["title"] = found["item"]
    if _plain(found["item"]) in ("asin", "parentasin") and "title" not in (wanted or {}):
        found["title"] = None  # Amazon's: the headline of a review
    if not found["item"]:
        found["item"] = found["title"]  # an export of one's own often has titles only
    if not found["item"] or not found["rating"]:
        lacking = "items" if not found["item"] else "ratings or labels"
        listed = ", ".join(map(repr, names))
        raise ValueError(f"{path}: no column of {lacking} among {listed}; say columns={{role: name}} (shell: {SHELL})")
    others = [name for name in names if name not in found.values()]
    if _plain(found["title"]) == "name" and found["title"] not in (found["item"], *named):  # perhaps a person's
        others.append(found["title"])
    if not found["user"] and others and not ONE_PERSON & set(map(_plain, names)):
        listed = ", ".join(map(repr, others))
        raise ValueError(
            f"{path}: no column of users; if it is among {listed}, say columns={{'user': name}} (shell: {SHELL}); of "
            "one person's file keep items, titles, ratings and times, or say what the others are"
        )
    return {role: name for role, name in found.items() if name}


# ---------------------------------------------------------------------------------------------------- kinds of files
class _Source:
    """A file, the names of its columns, and its rows as text, some at a time."""

    def __init__(self, path, unnamed=("user", "item", "rating", "timestamp")):
        self.path, self.repairs, self.unnamed = path, {}, unnamed
        with path.open("rb") as file:
            head = file.read(200_000)
        if not head.strip():
            raise ValueError(f"{path} is empty")
        if head.startswith(b"PAR1"):
            self.kind = "Parquet"
            try:
                self.names = pq.read_schema(path).names
            except Exception as error:  # Arrow has many kinds of its own
                raise ValueError(f"{path}: not a Parquet file that can be read ({_line(error)})") from None
            return
        for start, what in MAGIC.items():
            if head.startswith(start):
                raise ValueError(f"{path} is {what}")
        self._decode(head)
        if re.match(r"\s*\[\s*[{\[]", self.head):
            raise ValueError(f"{path} is a JSON array; write one object a line")
        self.kind = "JSON lines" if self.head.lstrip()[:1] == "{" else "text"
        if self.kind == "JSON lines":
            with path.open(encoding=self.encoding) as file:
                lines = enumerate(islice(file, 1000), 1)  # the first may lack what others have
                rows = [self._json_line(number, line) for number, line in lines if line.strip()]
            self.names = list(dict.fromkeys(name for row in rows for name in row))
        else:
            self._read_head()

    def _decode(self, head):
        usual = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        if b"\0" in head and usual != "utf-16":
            raise ValueError(f"{self.path} is not text: there are zero bytes in it")
        for self.encoding in (usual, "cp1252"):
            with suppress(UnicodeDecodeError):
                self.head = codecs.getincrementaldecoder(self.encoding)().decode(head)
                with self.path.open(encoding=self.encoding) as file:
                    self.lines = sum(1 for _ in file)  # the whole of it is read, before a row is taken
                break
        else:  # letters replaced by one sign would make two ids one
            raise ValueError(f"{self.path}, line {self._odd()}: neither UTF-8 nor Windows-1252; save it as UTF-8")
        if self.encoding == "cp1252":
            self.repairs["not UTF-8, all of it read as Windows-1252"] = f"line {self._odd()} is the first that shows it"

    def _odd(self):
        """The number of the first line that is no UTF-8."""
        with self.path.open("rb") as file:
            return next((number for number, line in enumerate(file, 1) if not _is_utf8(line)), 1)

    def _read_head(self):
        lines = self.head.splitlines()
        self.blank = next(at for at, line in enumerate(lines) if line.strip())  # lines before the first
        self.separator, cells = _separator([line for line in lines if line.strip()][:50], self.path)
        numeric = [bool(re.fullmatch(r"\s*-?\d+([.,]\d+)?\s*", cell)) for cell in cells[0]]
        known = any(_plain(cell) in known.split() for cell in cells[0] for known in NAMES.values())
        self.header = known or not any(numeric)
        if self.header:
            self.names = [cell.strip() for cell in cells[0]]
            twice = {name for name in self.names if self.names.count(name) > 1}
            if twice:
                raise ValueError(f"{self.path}, line {self.blank + 1}: the column {twice.pop()!r} is there twice")
        elif len(self.unnamed) - 1 <= len(cells[0]) <= len(self.unnamed) or "title" in self.unnamed:
            more = [f"column {number}" for number in range(len(self.unnamed) + 1, len(cells[0]) + 1)]
            self.names = [*self.unnamed[: len(cells[0])], *more]
            asins = [all(re.fullmatch(r"[0-9B][0-9A-Z]{9}", row[side]) for row in cells) for side in (0, 1)]
            if self.names[:2] == ["user", "item"] and asins == [True, False]:  # Amazon's lists of ratings
                self.names[:2] = ["item", "user"]
            self.repairs["no header, columns taken as"] = ", ".join(self.names)
        else:
            raise ValueError(f"{self.path}: no header line, and {len(cells[0])} columns; write their names into line 1")

    def chunks(self, wanted):
        """(number of the first line, DataFrame of the `wanted` columns, mostly texts) again and again."""
        way = {"Parquet": self._parquet, "JSON lines": self._json, "text": self._text}[self.kind]
        yield from way(wanted)

    def _parquet(self, wanted):
        line = 1
        try:
            file = pq.ParquetFile(self.path)
            kinds = {name: file.schema_arrow.field(name).type for name in wanted}
            odd = [name for name, kind in kinds.items() if pa.types.is_nested(kind) or pa.types.is_time(kind)]
            if odd:
                raise ValueError(f"column {odd[0]!r} holds {kinds[odd[0]]}, not texts, numbers or dates")
            for batch in file.iter_batches(CHUNK, columns=wanted):
                table = pa.table({  # texts that were written as bytes
                    name: batch[name].cast(pa.string()) if pa.types.is_binary(kind) else batch[name]
                    for name, kind in kinds.items()
                })  # fmt: skip
                table.validate(full=True)  # a text that is no UTF-8 would be noticed much later
                yield line, table.to_pandas(ignore_metadata=True, types_mapper=pd.ArrowDtype)
                line += len(batch)
        except Exception as error:  # Arrow has many kinds of its own
            raise ValueError(f"{self.path}: a Parquet file that cannot be read ({_line(error)})") from None

    def _json_line(self, number, text):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}, line {number}: not JSON ({_line(error)})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{self.path}, line {number}: not an object of JSON but {text[:40]!r}")
        return row

    def _json(self, wanted):
        with self.path.open(encoding=self.encoding) as file:
            size = max(1, CHUNK // 10)  # with a review in it, a line takes ten times the memory of a row
            for first in count(1, size):
                lines = list(islice(file, size))
                if not lines:
                    return
                rows = [self._json_line(first + at, line) if line.strip() else {} for at, line in enumerate(lines)]
                cells = [[row.get(name) for name in wanted] for row in rows]
                nested = [any(isinstance(cell, (list, dict)) for cell in row) for row in cells]
                if any(nested):
                    what = f"a list or an object in one of {', '.join(wanted)}; give texts or numbers"
                    raise ValueError(f"{self.path}, line {first + nested.index(True)}: {what}")
                yield first, pd.DataFrame(cells, columns=wanted, dtype=object)

    def _text(self, wanted):
        options = {"dtype": str, "keep_default_na": False, "na_filter": False, "encoding": self.encoding}
        options |= {"sep": self.separator, "engine": "python" if len(self.separator) > 1 else "c"}
        options |= {"names": self.names, "header": None, "index_col": False, "skip_blank_lines": False}
        if self.separator == ";" and "isbn" in map(_plain, self.names):  # Book-Crossing writes \" inside a title
            options["escapechar"] = "\\"
        line = self.blank + 1 + self.header
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # else a long row would be cut
                frames = pd.read_csv(self.path, skiprows=line - 1, chunksize=CHUNK, on_bad_lines="error", **options)
                for frame in frames:
                    yield line, frame[wanted].reset_index(drop=True)
                    line += len(frame)
            if line <= self.lines:  # two rows that each begin a cell with a quotation mark swallow all between them
                self.repairs["lines that stand inside quotation marks, read as part of a cell"] = self.lines - line + 1
        except pd.errors.EmptyDataError:
            return
        except (pd.errors.ParserError, pd.errors.ParserWarning, csv.Error, ValueError) as error:
            if str(error).startswith(str(self.path)):
                raise
            reason = _line(error).removeprefix("Error tokenizing data. C error: ")
            raise ValueError(f"{self.path}: {reason}; is a quotation mark left open, or a line broken?") from None


def _is_utf8(line):
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _line(error):
    """What an error says, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _separator(lines, path):
    """(separator, cells of each line) of the first lines of a text: the one that gives most of them equally many."""
    best = (0.0, 1, "", [])
    for separator in ("::", ",", "\t", ";", "|"):
        if separator == "::":
            cells = [line.split("::") for line in lines]
        else:
            try:
                cells = list(csv.reader(lines, delimiter=separator))
            except csv.Error as error:
                raise ValueError(f"{path}: {_line(error)}; is a quotation mark left open?") from None
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
        self.count, self.zones = {}, set()

    def add(self, what, number=1):
        self.count[what] = self.count.get(what, 0) + int(number)

    def line(self, first, at):
        return f"{self.path}, line {first + int(at)}"

    def take(self, first, frame):
        cells = {role: frame[name] for role, name in self.columns.items()}
        value = self.values(first, cells["rating"])
        if _plain(self.columns["rating"]) in ("myrating", "bookrating"):  # Goodreads, Book-Crossing: 0 is no rating
            value = np.where(value == 0, np.nan, value)
        ids = {role: self.identified(first, role, cells[role]) for role in ("user", "item") if role in cells}
        ids.setdefault("user", pd.Series("me", index=frame.index))
        keep = ~np.isnan(value) & (ids["user"] != "").to_numpy() & (ids["item"] != "").to_numpy()
        blank = (
            np.isnan(value) & (ids["item"] == "").to_numpy() & ((ids["user"] == "") | ("user" not in cells)).to_numpy()
        )
        self.left_out += int((~keep & ~blank).sum())
        time = self.times(first, cells["timestamp"]) if "timestamp" in cells else np.full(len(frame), NO_TIME)
        numbers = {role: self.numbered(role, ids[role][keep]) for role in ("user", "item")}
        if "title" in cells:
            for item, title in zip(numbers["item"], _texts(cells["title"])[keep]):
                if title and self.title_of.setdefault(item, title) != title:
                    self.add("titles other than the first of their item, left out")
        known = numbers | {"value": value[keep].astype(np.float32), "time": time[keep]}
        self.parts.append(pd.DataFrame(known, index=first + np.flatnonzero(keep)))  # by line

    def identified(self, first, role, cells):
        """The ids as texts; blanks around them are cut, and counted."""
        texts = _texts(cells)
        if pd.api.types.is_float_dtype(cells):
            exact = 2 ** (np.finfo(getattr(cells.dtype, "numpy_dtype", cells.dtype)).nmant + 1)
            large = (cells.abs() >= exact).fillna(False).to_numpy(bool)
            if large.any():
                at = large.argmax()
                raise ValueError(
                    f"{self.line(first, at)}: the {role} {texts.iloc[at]} stands in a column of decimals, in which ids "
                    "as large run together; write them as whole numbers or texts"
                )
        elif not pd.api.types.is_numeric_dtype(cells):
            missing = texts.isin(MISSING)
            self.add("ids such as NULL or nan, taken as missing", missing.sum())
            texts = texts.mask(missing, "")
            blank = [name for name in pd.unique(cells) if isinstance(name, str) and name != name.strip()]
            self.add("ids with blanks around them, cut", cells.isin(blank).sum())
        return texts

    def numbered(self, role, texts):
        known = self.ids[role]
        codes, names = pd.factorize(texts)
        places = np.array([known.setdefault(name, len(known)) for name in names], np.int32)
        return places[codes]

    def values(self, first, cells):
        """float64 of ratings as people write them: 4, 4.5, "4,5", ★★★½, yes; NaN where there is none."""
        if pd.api.types.is_numeric_dtype(cells) or pd.api.types.is_bool_dtype(cells):
            value = cells.astype("Float64").to_numpy(float, na_value=np.nan)
        else:
            value = self.written(first, _texts(cells))
        wrong = np.isinf(value) | (np.abs(value) > 1e6)
        if wrong.any():
            raise ValueError(
                f"{self.line(first, wrong.argmax())}: the rating is {value[wrong.argmax()]:g}; give a smaller one"
            )
        return value

    def written(self, first, texts):
        value = pd.to_numeric(texts, errors="coerce").to_numpy(float, na_value=np.nan).copy()
        for at in np.flatnonzero(np.isnan(value) & (texts != "").to_numpy()):
            text = texts.iloc[at]
            if re.fullmatch(r"[1-9]\d{0,2}(,\d{3})+", text):
                raise ValueError(
                    f"{self.line(first, at)}: the rating {text!r} may be a thousand or a fraction; write 1234 or 1.234"
                )
            if re.fullmatch(r"-?\d+,\d+", text):
                value[at], what = float(text.replace(",", ".")), "ratings with a decimal comma"
            elif re.fullmatch("★*½?", text):
                value[at], what = text.count("★") + 0.5 * text.count("½"), "ratings written in stars"
            elif text.lower() in WORDS:
                value[at], what = WORDS[text.lower()], "ratings written as words"
            else:
                raise ValueError(f"{self.line(first, at)}: the rating is {text[:40]!r}; give a number")
            self.add(what)
        return value

    def times(self, first, cells):
        """int64 as they stand, or seconds of dates; NO_TIME where there is none."""
        if pd.api.types.is_datetime64_any_dtype(cells):
            return self.stamps(first, pd.Series(pd.DatetimeIndex(cells)), cells.isna())
        texts = _texts(cells)
        none = (texts == "").to_numpy()
        number = pd.to_numeric(texts.where(~none, "0"), errors="coerce")
        # 20200102 and 20200102030405 are dates
        if number.notna().all() and not texts[~none].str.fullmatch(r"(19|20)\d{6}(\d{6})?").any():
            odd = (number.abs() > 9e18) | ((number % 1 != 0) & (number.abs() < 1e6))  # or days of a spreadsheet
            if odd.any():
                raise ValueError(
                    f"{self.line(first, odd.argmax())}: the time is {texts.iloc[odd.argmax()][:40]!r}; give a date, or "
                    "seconds since 1970"
                )
            return np.where(none, NO_TIME, number.astype(np.int64))
        vague = ~(none | texts.str.contains(r"\d{4}") | texts.str.match(DATE)).to_numpy()  # "10:30" would be today
        if vague.any():
            where, text = self.line(first, vague.argmax()), texts.iloc[vague.argmax()][:40]
            raise ValueError(f"{where}: the time is {text!r}; give a date with its year, or seconds since 1970")
        self.order_of_dates(first, texts)
        read = partial(pd.to_datetime, format="mixed", utc=True, errors="coerce")
        year_first = texts.str.match(r"\d{4}")  # then the month comes next, whatever other dates begin with
        stamps = read(texts.where(year_first)).fillna(
            read(texts.where(~none & ~year_first), dayfirst=bool(self.dayfirst))
        )
        zoned = texts.str.contains(r"\d(?:Z|[+-]\d\d:?\d\d)$").to_numpy()
        self.zones |= {kind for kind, mine in (("with", zoned), ("without", ~zoned & ~none)) if mine.any()}
        return self.stamps(first, stamps, none, texts)

    def stamps(self, first, stamps, none, texts=None):
        bad = (stamps.isna() & ~none).to_numpy()
        if bad.any():
            text = texts.iloc[bad.argmax()][:40]
            raise ValueError(
                f"{self.line(first, bad.argmax())}: the time is {text!r}; write all as dates, or all in seconds"
            )
        return np.where(none, NO_TIME, pd.DatetimeIndex(stamps).as_unit("s").asi8)

    def order_of_dates(self, first, texts):
        """Find out whether dates such as 31/12/2000 begin with the day; the whole file must agree."""
        parts = texts.str.extract(DATE)
        short = ((parts[1] == "-") & (parts[3].str.len() == 2)).to_numpy()
        if short.any():
            raise ValueError(
                f"{self.line(first, short.argmax())}: {texts.iloc[short.argmax()][:40]!r} may begin with the year or "
                "end in it; write years in four digits"
            )
        parts = parts[[0, 2]].astype(float)
        days, months = (parts[0] > 12).to_numpy(), (parts[2] > 12).to_numpy()
        if self.dayfirst is None and parts[0].notna().any():
            if days.any() == months.any():
                at = parts[0].notna().to_numpy().argmax()
                raise ValueError(
                    f"{self.line(first, at)}: {texts.iloc[at][:40]!r} may begin with the day or with the month; "
                    "say dayfirst=True or False, in a shell --dayfirst or --no-dayfirst"
                )
            self.dayfirst = bool(days.any())
        other = months if self.dayfirst else days
        if other.any():
            raise ValueError(
                f"{self.line(first, other.argmax())}: {texts.iloc[other.argmax()][:40]!r} does not begin with the "
                f"{'day' if self.dayfirst else 'month'} as other dates do; write dates in one way"
            )

    def finished(self, source, titles):
        rows = pd.concat(self.parts) if self.parts else ()
        self.parts.clear()  # as large again
        if not len(rows):
            raise ValueError(f"{self.path}: no row has a user, an item and a rating")
        report = {
            "file": f"{self.path.name}, {source.kind}",
            "columns": ", ".join(f"{r} = {n}" for r, n in self.columns.items()),
        }
        report |= source.repairs
        if "user" not in self.columns:
            report["no column of users"] = "all rows taken as one person's"
        timed = rows.time != NO_TIME
        if timed.any() and rows.time[timed].nunique() > 1:
            report["rows without a time, left out"] = int((~timed).sum())
            rows = rows[timed]
            try:
                rows["time"] = _seconds(rows.time)
            except ValueError as error:
                raise ValueError(f"{self.path}, {str(error).replace('row', 'line', 1)}") from None
            rows = rows.reset_index(drop=True).sort_values("time", kind="stable")
            if rows.time.max() < 10_000_000:
                report["times are small"] = "taken as seconds, all of early 1970; are they days or years? Give dates"
            if len(self.zones) == 2:
                report["times with and without a zone"] = "those without are taken as UTC"
        else:
            report["times"] = "none that differ: the file's order is taken for time, user by user"
            rows["time"] = NO_TIME
        again = rows.duplicated(["user", "item", "time"], keep="last")
        rows = rows[~again].reset_index(drop=True)
        users, rows["user"] = self.sorted_ids("user", rows.user)
        items, rows["item"] = self.sorted_ids("item", rows.item)
        names, told = self.titles(items, titles)  # before `count` is read: it adds to it
        report |= {"rows": len(rows), "rows without user, item or rating, left out": self.left_out}
        report |= {"same user, item and time, all but the last left out": int(again.sum())} | self.count
        report |= {"users": len(users), "items": len(items)} | told
        report["ratings"] = ", ".join(
            f"{v:g}: {n:,}" for v, n in rows.value.value_counts().sort_index().head(12).items()
        )
        if rows.time.iloc[0] != NO_TIME:
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
        told = {}
        if path is not None:
            listed, more, columns = _read_titles(Path(path))
            known |= listed
            told["titles from"] = f"{Path(path).name}: {columns}"
            self.add("titles other than the first of their item, left out", more)
        written = [known.get(item) or "" for item in items]
        titles = [re.sub(r"</?[a-zA-Z][^<>]*>", "", html.unescape(title)).strip() for title in written]
        lacking = sum(not title.strip() for title in titles)
        told["items without a title, shown by their id"] = lacking
        told["titles with marks such as &amp; or <i>, cleaned"] = sum(map(str.__ne__, written, titles))
        told["titles that several items have"] = len(titles) - lacking - len({t for t in titles if t.strip()})
        return [title if title.strip() else item for title, item in zip(titles, items)], told


def _texts(cells):
    """Cells as stripped texts; missing ones empty, whole numbers without a point."""
    if pd.api.types.is_float_dtype(cells):
        cells = cells.map(lambda x: "" if pd.isna(x) else str(int(x)) if float(x).is_integer() else repr(float(x)))
    cells = cells.astype(object).where(cells.notna(), "")
    # in a JSON file 7 and 7.0 may stand in one column
    return cells.map(lambda x: str(int(x) if isinstance(x, float) and x.is_integer() else x)).str.strip()


def _read_titles(path):
    """({item: its first title}, how many others were left out, what its columns were taken for) of a file with both."""
    first, more = {}, 0
    with _unchanged(path):
        source = _Source(path, unnamed=("item", "title", "kinds"))
        ids = [name for name in source.names if _plain(name) == "id"]
        wanted = [_find(source.names, "item") or next(iter(ids), None), _find(source.names, "title")]
        if None in wanted:
            raise ValueError(
                f"{path}: no columns of items and titles among {', '.join(map(repr, source.names))}; name them so "
                "in line 1"
            )
        for _, frame in source.chunks(wanted):
            for item, title in zip(*(_texts(frame[name]) for name in wanted)):
                more += bool(title) and first.setdefault(item, title) != title
    return first, more, f"item = {wanted[0]}, title = {wanted[1]}"


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
        package = fetch(ML100K, cache=cache)
        with alone(folder):
            if not folder.exists():  # else another process has made it meanwhile
                with zipfile.ZipFile(package) as archive, replacing(folder) as part:
                    part.mkdir()
                    for name in names:
                        (part / name).write_bytes(archive.read(f"recbole/dataset_example/ml-100k/{name}"))
    return tuple(folder / name for name in names)


def amazon_book(reviews, books):
    """`Dataset` of the paper's Amazon-Book (Section 4.1), from `Books_5.json` and `meta_Books.json` of 2018, unpacked.

    As the reference code cuts it: ratings of 2017; users and books with more than 20 of them, both counted before any
    is left out; five stars are a like; of December's rows by time, one half is valid and one test; the rest is train.
    Books that the second file gives no title, or one spoilt by a script (`getTime`), are left out first.
    Raises ValueError as `read_interactions` does.
    """
    read = read_interactions(reviews, titles=books)
    named = [title != item and "getTime" not in title for item, title in zip(read.items, read.titles)]
    time = pd.to_datetime(read.rows.time, unit="s")
    rows = read.rows[(time.dt.year == 2017) & np.array(named)[read.rows.item]]
    often = [rows[role].map(rows[role].value_counts()) > 20 for role in ("user", "item")]
    rows = rows[often[0] & often[1]].sort_values("time", kind="stable")
    if rows.empty:
        raise ValueError(f"{reviews}: no rating of 2017 by a user and of a book with more than 20; give the whole file")
    december = (time[rows.index].dt.month == 12).to_numpy()
    part = np.where(december, 1 + (np.cumsum(december) > december.sum() / 2), 0)
    items, kept = pd.factorize(rows.item, sort=True)
    rows = rows.assign(user=pd.factorize(rows.user, sort=True)[0], item=items)
    return _cut(rows, part, 5, [read.titles[at] for at in kept], "amazon-book")


# -------------------------------------------------------------------------------------------------- prompts and verdict
def shares(dataset):
    """What a verdict depends on, for a report: how many test rows are liked, and whose users or items are new."""
    test, seen = dataset.test, {role: dataset.train[role] for role in ("user", "item")}
    told = {"training, valid and test rows": ", ".join(f"{len(getattr(dataset, s)):,}" for s in SPLITS)}
    told["liked, of the test rows"] = f"{test.label.mean():.0%}"
    return told | {f"of {role}s not in training": f"{(~test[role].isin(ids)).mean():.0%}" for role, ids in seen.items()}


def template_about(style, thing):
    """The template that `style` names, with a "book", "song" or "article" where the paper's says "movie"."""
    import binllm_utils as bu

    if not re.fullmatch(r"[^\W\d_]{1,30}", thing):
        raise ValueError(f"{thing!r:.60} is no word for what the items are; give one such as book")
    template, _ = bu._template(style)
    return template.replace("movie", thing)


def verdict(rows, scores):
    """(table, sentence): does the last of `scores` ({method: one number a row}) rank `rows` better than each other one?

    The table has a line a method, AUC and UAUC with intervals; the sentence names the paired differences, across users
    (AUC) and within each (UAUC), and is sure only where an interval leaves zero out.
    """
    import binllm_utils as bu

    table = pd.DataFrame({name: bu.evaluate(rows, values) for name, values in scores.items()}).T
    *others, mine = scores
    told = []
    for other in others:
        gaps = bu.paired_test(rows.user, rows.label, scores[other], scores[mine])
        said = []
        for name, where in (("auc", "across users"), ("uauc", "within a user")):
            gap = gaps.loc[name]
            sure = "better" if gap.low > 0 else "worse" if gap.high < 0 else "not surely different"
            numbers = f"{sure} ({gap.difference:+.3f} {name.upper()}, {gap.low:+.3f} to {gap.high:+.3f})"
            said.append(f"{where} {'too few users to tell' if np.isnan(gap.low) else numbers}")
        told.append(f"{mine} against {other}: {', '.join(said)}")
    counted = (
        f"On {len(rows):,} rows, {table.users.iloc[0]:.0f} users counted by UAUC, differences with 95 % intervals:"
    )
    return table, "\n".join([counted, *told])
