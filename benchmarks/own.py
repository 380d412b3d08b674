"""Time and memory of reading a large file of one's own: data/results/own.csv.

python benchmarks/own.py               ten million made-up rows, as Parquet and as CSV
python benchmarks/own.py 1000000       as many

Each file is read in a process of its own, whose peak memory is that of the whole: Python and libraries included.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import records

import binllm_own as bo


def make(path, rows, users=500_000, items=100_000, part=1_000_000):
    """Write `rows` ratings to `path`, a part at a time; films of low numbers are rated most."""
    rng, writer = np.random.default_rng(0), None
    for start in range(0, rows, part):
        n = min(part, rows - start)
        table = pd.DataFrame(
            {"user_id": rng.integers(0, users, n), "item_id": (items * rng.random(n) ** 3).astype(int)}
        )
        table["rating"], table["timestamp"] = rng.integers(1, 6, n), 1_000_000_000 + start + np.arange(n)
        if path.suffix == ".csv":
            table.to_csv(path, mode="a", header=start == 0, index=False)
        else:
            writer = writer or pq.ParquetWriter(path, pa.Schema.from_pandas(table, preserve_index=False))
            writer.write_table(pa.Table.from_pandas(table, preserve_index=False))
    if writer:
        writer.close()


def read(path):
    """What the process that reads does: rows, seconds, and gigabytes at the peak."""
    began = time.perf_counter()
    with records.PeakMemory() as memory:
        found = bo.read_interactions(path)
        dataset = found.split()
    seconds = time.perf_counter() - began
    print(len(found.rows), len(dataset.train), round(seconds, 1), round(memory.before + memory.gb, 2))


def main(rows=10_000_000):
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("parquet", "csv"):
            path = Path(folder, f"ratings.{kind}")
            make(path, int(rows))
            done = subprocess.run(
                [sys.executable, __file__, "--read", path], stdout=subprocess.PIPE, text=True, check=True
            )
            kept, train, seconds, peak = done.stdout.split()
            row = {"file": kind, "rows": int(rows), "megabytes": round(path.stat().st_size / 1e6), "kept": int(kept)}
            row |= {"train": int(train), "seconds": float(seconds), "peak_gb": float(peak)}
            records.put_row(ROOT / "data/results/own.csv", row, ["file", "rows"])
            print(row, flush=True)


if __name__ == "__main__":
    read(Path(sys.argv[2])) if sys.argv[1:2] == ["--read"] else main(*sys.argv[1:])
