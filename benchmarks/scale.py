"""Time and memory of our codes on generated data of 1, 5 and 25 million interactions; rows of data/results/scale.csv.

python benchmarks/scale.py             some minutes on two CPU cores

The codes are those by descent, of a continuous model (`bx.fit_hybrid`, `bx.binarise`). Each size runs in a process of
its own, so that its peak memory is its own.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import records

import binllm_extras as bx
import binllm_utils as bu

SIZES = (1_000_000, 5_000_000, 25_000_000)
EPOCHS = 10


def generate(n, seed=0):
    """`n` training interactions, 150 a user and 500 an item on average, and valid and test of a hundredth each.

    Users and items have 4 hidden numbers each, items also a quality; the inner product, the quality and noise decide
    the label. Low item ids come up more often.
    """
    rng = np.random.default_rng(seed)
    n_users, n_items = n // 150, n // 500
    taste, content = rng.normal(size=(n_users, 4)).astype("f4"), rng.normal(size=(n_items, 4)).astype("f4")
    quality = rng.normal(size=n_items)

    def rows(count, start):
        user = rng.integers(0, n_users, count)
        item = (n_items * rng.random(count) ** 2).astype(np.int64)
        label = np.einsum("nd,nd->n", taste[user], content[item]) + quality[item] + rng.logistic(size=count) > 0
        return pd.DataFrame(
            {"user": user, "item": item, "label": label.astype(int), "timestamp": start + np.arange(count)}
        )

    parts = {"train": rows(n, 0), "valid": rows(n // 100, n), "test": rows(n // 100, 2 * n)}
    return bu.Dataset(**parts, titles=[f"item {i}" for i in range(n_items)], name=f"generated-{n}")


def child(n):
    """Fit and binarise `n` interactions; print the measured numbers as JSON."""
    dataset = generate(n)
    model, curve = bx.fit_hybrid(dataset, max_epochs=EPOCHS, progress=False)
    epochs = np.diff(curve.seconds, prepend=0)
    began = time.perf_counter()
    codes = bx.binarise(*model.vectors(), 32, *bx.id_weights(dataset))
    seconds = time.perf_counter() - began
    match = codes.similarity(dataset.test)
    row = {"interactions": n, "users": dataset.n_users, "items": dataset.n_items}
    row |= {"seconds_per_epoch": round(float(np.median(epochs)), 2), "binarise_seconds": round(seconds, 2)}
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps(row | {"peak_gb": round(peak_gb, 2), "test_auc": round(bu.auc(dataset.test.label, match), 4)}))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        child(int(sys.argv[1]))
    else:
        for n in SIZES:
            command = [sys.executable, __file__, str(n)]
            row = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            print(row, flush=True)
            records.put_row(ROOT / "data" / "results" / "scale.csv", row, ["interactions"])
