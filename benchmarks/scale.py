"""Time and memory of codes learned from shards on disk, of 1, 5 and 25 million generated interactions, and of 5 million
with as many users and items as the 25 have; rows of data/results/scale.csv.

python benchmarks/scale.py             some minutes on two CPU cores

The codes are trained through the sign (`binllm_scale.fit_streamed`). Each size is learned in a process of its own, so
that its peak memory is its own.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import records

import binllm_scale as bs
import binllm_utils as bu

SIZES = ((1_000_000, 1), (5_000_000, 1), (5_000_000, 5), (25_000_000, 1))  # rows, and how many times the ids
EPOCHS = 5
CHUNK = 1 << 20


def generate(n, more=1, seed=0):
    """DataFrames `user, item, label` of together `n` rows: 150 a user and 500 an item on average, or by `more` fewer.

    Users and items have 4 hidden numbers each, items also a quality; the inner product, the quality and noise decide
    the label. Low item ids come up more often.
    """
    rng = np.random.default_rng(0)
    n_users, n_items = more * n // 150, more * n // 500
    taste, content = rng.normal(size=(n_users, 4)).astype("f4"), rng.normal(size=(n_items, 4)).astype("f4")
    quality, rng = rng.normal(size=n_items), np.random.default_rng(seed)
    for start in range(0, n, CHUNK):
        count = min(CHUNK, n - start)
        user = rng.integers(0, n_users, count)
        item = (n_items * rng.random(count) ** 2).astype(np.int64)
        label = np.einsum("nd,nd->n", taste[user], content[item]) + quality[item] + rng.logistic(size=count) > 0
        yield pd.DataFrame({"user": user, "item": item, "label": label.astype(int)})


def held_out(n, more, seed):
    """A hundredth as many rows, of the same users and items."""
    return next(generate(n, more, seed)).head(n // 100)


def child(n, more, folder):
    """Learn codes of the shards in `folder`; print the measured numbers as JSON."""
    shards = bs.Shards(folder)
    with records.PeakMemory() as memory:  # not ru_maxrss, into which Linux counts what the parent held
        codes, curve = bs.fit_streamed(shards, held_out(n, more, 1), max_epochs=EPOCHS, progress=False)
    test = held_out(n, more, 2)
    row = {"interactions": len(shards), "users": len(codes.users), "items": len(codes.items)}
    row["seconds_per_epoch"] = round(float(np.median(np.diff(curve.seconds, prepend=0))), 2)
    row["peak_gb"] = round(memory.before + memory.gb, 2)
    row["disk_gb"] = round(sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e9, 3)
    print(json.dumps(row | {"test_auc": round(bu.auc(test.label, codes.similarity(test)), 4)}))


def main():
    for n, more in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            bs.write_shards(generate(n, more), folder)
            command = [sys.executable, __file__, str(n), str(more), folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        print(row, flush=True)
        records.put_row(ROOT / "data" / "results" / "scale.csv", row, ["interactions", "users"])


if __name__ == "__main__":
    child(*map(int, sys.argv[1:3]), sys.argv[3]) if len(sys.argv) > 1 else main()
