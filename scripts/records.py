"""Records: what a run was made on, and the CSV and Parquet files in data/results that keep what came out."""

import os
import platform
import subprocess
import sys
import threading
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import binllm_utils as bu

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


def results_folder(profile):
    """data/results of the repository; of the smoke profile, a folder of the output that git ignores."""
    return bu.OUTPUT / "results" if profile.name.startswith("smoke") else ROOT / "data" / "results"


def stamps():
    """What a number was made on and with: a dict of hardware, versions and commit."""
    return {"hardware": hardware(), "versions": versions(), "commit": commit()}


def put_row(path, row, key):
    """Put `row` (a dict) into the CSV file `path` in place of the one with the same values in `key`; others stay.

    Hardware, versions and commit are added where `row` does not give them. Raises ValueError for other columns.
    """
    row = row | {name: stamp for name, stamp in stamps().items() if row.get(name) is None}
    table = pd.DataFrame([{name: "" if value is None else str(value) for name, value in row.items()}])
    with bu.alone(path):
        if Path(path).exists():
            old = pd.read_csv(path, dtype=str, keep_default_na=False)
            if list(old.columns) != list(table.columns):
                raise ValueError(f"{path}: its columns are not those of this version; move it away and run again")
            same = (old[key] == table.loc[0, key]).all(axis=1)
            table = pd.concat([old[~same], table], ignore_index=True)
        with bu.replacing(path) as part:
            table.to_csv(part, index=False)


def put_table(path, table, key):
    """Put the rows of `table` into the CSV file `path`, with the columns `key` (a dict), in place of those with it."""
    table = table.assign(**key)
    with bu.alone(path):
        others = pd.read_csv(path) if Path(path).exists() else table.head(0)
        same = (others[list(key)] == list(key.values())).all(axis=1)
        with bu.replacing(path) as part:
            pd.concat([others[~same], table]).to_csv(part, index=False)


def has_row(path, known):
    """Whether the CSV file `path` is there and has a row with the values `known` (a dict; None is an empty cell)."""
    if not Path(path).exists():
        return False
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    cells = {name: "" if value is None else str(value) for name, value in known.items()}
    return bool((table[list(cells)] == cells).all(axis=1).any())


def read_table(path, columns, shares=()):
    """A CSV file with exactly `columns`; those in `shares` hold numbers from 0 to 1, or nothing.

    Raises ValueError, naming file and line, for anything else.
    """
    try:
        table = pd.read_csv(path, index_col=False)
    except (ValueError, OSError) as error:  # pandas' errors for what is no table are ValueErrors
        raise ValueError(f"{path}: not a table ({error})") from None
    if list(table.columns) != list(columns):
        raise ValueError(f"{path}: its columns are not those of this version; move it away and make it again")
    for name in shares:
        numbers = pd.to_numeric(table[name], errors="coerce")
        bad = (numbers.isna() & table[name].notna()) | (numbers < 0) | (numbers > 1)
        if bad.any():
            raise ValueError(f"{path}, line {bad.idxmax() + 2}: {name} is {table[name][bad.idxmax()]!r}, not 0 to 1")
        table[name] = numbers
    return table


def record(profile, rows, scores, **what):
    """Put the AUC and UAUC of `scores` on `rows` into metrics.csv; what: values of other METRIC_COLUMNS.

    Two lines are the same result when data, split, rows, model, variant, bits, format, seed and profile agree.
    """
    found = {"rows": len(rows), "profile": profile.name} | bu.evaluate(rows, scores) | what
    path = results_folder(profile) / "metrics.csv"
    put_row(path, {column: found.get(column) for column in METRIC_COLUMNS}, METRIC_COLUMNS[:9])


def read_answers(path, dataset):
    """P(Yes) by run (columns) on rows of a split (lines, by their place in it): a DataFrame, NaN where not asked.

    Raises OSError where there is no such file, ValueError for answers about another `Dataset` (the paper's split and
    the whole past have the same test rows, and nothing else would tell), for a row that is there twice, for one without
    a number, and for an answer that is no probability.
    """
    if not Path(path).exists():
        raise OSError(f"{path} is not there; python scripts/results.py makes it")
    try:
        size = pq.read_metadata(path)
        if size.num_rows * size.num_columns > 100_000_000:
            raise ValueError(f"{size.num_rows:,} rows of {size.num_columns} columns are more than any split has")
        table = pd.read_parquet(path)
        about, table = table.attrs.get("dataset"), table.reset_index()
    except Exception as error:  # pandas and Arrow have a dozen kinds for what is no such file
        raise ValueError(f"{path}: not answers ({' '.join(str(error).split())[:300]})") from None
    if "row" not in table or not all(map(pd.api.types.is_numeric_dtype, table.dtypes)):
        raise ValueError(f"{path}: not answers; its columns must be `row` and a number column for each run")
    answers = table.drop(columns="row")
    for bad, what in (
        (table.row.duplicated(), "row {row:.0f} is there twice; drop one"),
        (
            table.row.isna() | (table.row < 0) | (table.row % 1 > 0) | (table.row > 2**53),
            "row {row} is not the place of a row in the split",
        ),
        ((answers.lt(0) | answers.gt(1)).any(axis=1), "row {row:.0f} holds an answer not from 0 to 1"),
    ):
        if bad.any():
            raise ValueError(f"{path}, line {bad.idxmax() + 2}: {what.format(**table.loc[bad.idxmax()])}")
    if about != dataset.name:
        about = about or "nobody knows what"
        raise ValueError(f"{path}: answers about {about}, and they are read for {dataset.name}; take the file of that")
    return table.astype({"row": int}).set_index("row")


def keep_answers(path, name, dataset, rows, p):
    """Put `p`, the answers on `rows` of `dataset`, into column `name` of the Parquet file `path`; others stay."""
    p = np.asarray(p, np.float32)
    if p.shape != (len(rows),) or rows.index.has_duplicates or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(
            f"{name}: give each row, once, an answer from 0 to 1; here {len(rows)} rows, {p.shape} answers"
        )
    table = pd.DataFrame({name: p}, index=rows.index.rename("row"))
    with bu.alone(path):
        if Path(path).exists():
            table = read_answers(path, dataset).drop(columns=name, errors="ignore").join(table, how="outer")
        table.attrs = {"dataset": dataset.name}
        with bu.replacing(path) as part:
            table.to_parquet(part)
