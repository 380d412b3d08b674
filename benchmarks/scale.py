"""Time and memory of codes learned from shards on disk, of 1, 5 and 25 million generated interactions; rows of
data/results/scale.csv.

python benchmarks/scale.py             some minutes on two CPU cores

The codes are trained through the sign (`binllm_scale.fit_streamed`). Each size is learned in a process of its own, so
that its peak memory is its own.
"""

import json
import resource
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

SIZES = (1_000_000, 5_000_000, 25_000_000)
EPOCHS = 5
CHUNK = 1 << 20


def generate(n, seed=0):
    """DataFrames `user, item, label` of together `n` rows: 150 a user and 500 an item on average.

    Users and items have 4 hidden numbers each, items also a quality; the inner product, the quality and noise decide
    the label. Low item ids come up more often.
    """
    rng = np.random.default_rng(0)
    n_users, n_items = n // 150, n // 500
    taste, content = rng.normal(size=(n_users, 4)).astype("f4"), rng.normal(size=(n_items, 4)).astype("f4")
    quality, rng = rng.normal(size=n_items), np.random.default_rng(seed)
    for start in range(0, n, CHUNK):
        count = min(CHUNK, n - start)
        user = rng.integers(0, n_users, count)
        item = (n_items * rng.random(count) ** 2).astype(np.int64)
        label = np.einsum("nd,nd->n", taste[user], content[item]) + quality[item] + rng.logistic(size=count) > 0
        yield pd.DataFrame({"user": user, "item": item, "label": label.astype(int)})


def held_out(n, seed):
    """A hundredth as many rows, of the same users and items."""
    return next(generate(n, seed)).head(n // 100)


def child(n, folder):
    """Learn codes of the shards in `folder`; print the measured numbers as JSON."""
    shards = bs.Shards(folder)
    codes, curve = bs.fit_streamed(shards, held_out(n, 1), max_epochs=EPOCHS, progress=False)
    test = held_out(n, 2)
    row = {"interactions": len(shards), "users": len(codes.users), "items": len(codes.items)}
    row["seconds_per_epoch"] = round(float(np.median(np.diff(curve.seconds, prepend=0))), 2)
    row["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    row["disk_gb"] = round(sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e9, 3)
    print(json.dumps(row | {"test_auc": round(bu.auc(test.label, codes.similarity(test)), 4)}))


def main():
    for n in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            bs.write_shards(generate(n), folder)
            command = [sys.executable, __file__, str(n), folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        print(row, flush=True)
        records.put_row(ROOT / "data" / "results" / "scale.csv", row, ["interactions"])


if __name__ == "__main__":
    child(int(sys.argv[1]), sys.argv[2]) if len(sys.argv) > 1 else main()
