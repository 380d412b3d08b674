"""Long runs: what repeats must neither grow nor change.

python benchmarks/soak.py prompts    100,000 prompts scored by a tiny stand-in for the LLM in one process: memory by the
                                     number scored, to data/results/soak_prompts.csv and figures/soak.png; ten minutes
python benchmarks/soak.py runs       `make run` three times from a warm cache: time, memory, size of the cache, and the
                                     outputs that differ from the first run's, to data/results/soak_runs.csv; an hour
"""

import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import records

import binllm_utils as bu

PROMPTS, AT_ONCE, RUNS = 100_000, 5_000, 3


def stand_in():
    """A Llama of one layer with 8 numbers a token, and the real tokenizer."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=49_152, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    return model.requires_grad_(False), bu.load_llm(layers=1)[1]


def keep(table, name):
    with bu.replacing(ROOT / "data/results" / name) as part:
        table.assign(**records.stamps()).to_csv(part, index=False)


def prompts():
    import matplotlib.pyplot as plt

    dataset = bu.load_ml1m()
    codes, (model, tokenizer) = bu.cached_codes(dataset), stand_in()
    rows = pd.concat([getattr(dataset, split) for split in bu.SPLITS] * 3).head(PROMPTS)
    table, began = [], time.perf_counter()
    for start in range(0, PROMPTS, AT_ONCE):
        texts = bu.build_prompts(dataset, rows.iloc[start : start + AT_ONCE].reset_index(drop=True), codes)
        p = bu.score(model, tokenizer, texts, progress=False)
        used = psutil.Process().memory_info().rss / 1e6
        table.append((start + len(p), round(used, 1), round(time.perf_counter() - began, 1)))
        print(*table[-1], flush=True)
    table = pd.DataFrame(table, columns=["prompts", "resident_mb", "seconds"])
    keep(table, "soak_prompts.csv")
    fig, ax = plt.subplots(figsize=(6, 3))
    ax.plot(table.prompts, table.resident_mb, color=bu.COLORS[0])
    ax.set(xlabel="prompts scored", ylabel="memory in MB", ylim=(0, 1.2 * table.resident_mb.max()))
    ax.set(title="100,000 prompts, one process")
    fig.savefig(ROOT / "figures/soak.png", dpi=110, bbox_inches="tight")


def outputs():
    """{(notebook, cell): its printed text and tables} in executed/, of the cells that the notebooks' tests compare."""
    found = {}
    for path in sorted((bu.OUTPUT / "notebooks").glob("[0-9]*.ipynb")):
        for place, cell in enumerate(nbformat.read(path, as_version=4).cells):
            if "nbval-check-output" in cell.metadata.get("tags", []):
                texts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.get("outputs", [])]
                found[path.stem, place] = "".join(texts)
    return found


def runs():
    table, first = [], None
    tracked = lambda: subprocess.check_output(["git", "diff", "HEAD", "--", ":!data/results/soak*"], cwd=ROOT)  # noqa: E731
    before = tracked()
    for run in range(1, RUNS + 1):
        began = time.perf_counter()
        with records.PeakMemory() as memory:
            subprocess.run(["make", "run"], cwd=ROOT, check=True)
        found = outputs()
        first = first or found
        changed = sorted(where for where in found | first if found.get(where) != first.get(where))
        print(run, "other outputs than the first run:", changed, flush=True)
        cache = sum(file.stat().st_size for file in bu.CACHE.rglob("*") if file.is_file()) / 1e6
        row = {"run": run, "minutes": round((time.perf_counter() - began) / 60, 1), "peak_gb": round(memory.gb, 1)}
        row |= {"cache_mb": round(cache), "tracked_files_changed": tracked() != before}
        table.append(row | {"cells": len(found), "cells_that_differ": len(changed)})
        keep(pd.DataFrame(table), "soak_runs.csv")


if __name__ == "__main__":
    bu.quiet()
    known = {"prompts": prompts, "runs": runs}
    if not sys.argv[1:] or set(sys.argv[1:]) - set(known):
        sys.exit(f"say which of {', '.join(known)}")
    for name in sys.argv[1:]:
        known[name]()
