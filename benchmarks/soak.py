"""Memory over a long run: 100,000 prompts scored by a tiny stand-in for the LLM must take no more than 10,000 do.

python benchmarks/soak.py    writes data/results/soak.csv and figures/soak.png, ten minutes on two cores
"""

import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import records

import binllm_utils as bu

PROMPTS, AT_ONCE = 100_000, 5_000


def stand_in():
    """A Llama of one layer with 8 numbers a token, and the real tokenizer."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=49_152, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    return model.requires_grad_(False), bu.load_llm(layers=1)[1]


def main():
    import matplotlib.pyplot as plt

    bu.quiet()
    dataset = bu.load_ml1m()
    codes, (model, tokenizer) = bu.cached_codes(dataset), stand_in()
    rows = pd.concat([getattr(dataset, split) for split in bu.SPLITS] * 3).head(PROMPTS)
    table, began = [], time.perf_counter()
    for start in range(0, PROMPTS, AT_ONCE):
        prompts = bu.build_prompts(dataset, rows.iloc[start : start + AT_ONCE].reset_index(drop=True), codes)
        p = bu.score(model, tokenizer, prompts, progress=False)
        used = psutil.Process().memory_info().rss / 1e6
        table.append((start + len(p), round(used, 1), round(time.perf_counter() - began, 1)))
        print(*table[-1], flush=True)
    table = pd.DataFrame(table, columns=["prompts", "resident_mb", "seconds"]).assign(**records.stamps())
    with bu.replacing(ROOT / "data/results/soak.csv") as part:
        table.to_csv(part, index=False)
    fig, ax = plt.subplots(figsize=(6, 3))
    ax.plot(table.prompts, table.resident_mb, color=bu.COLORS[0])
    ax.set(xlabel="prompts scored", ylabel="memory in MB", ylim=(0, None), title="100,000 prompts, one process")
    fig.savefig(ROOT / "figures/soak.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
