"""Train what takes longer than a notebook should, and keep it in data/adapters.

python notebooks/adapters.py literacy    teach the default LLM to read codes, on made-up codes alone

Run it again after whatever stopped it: it goes on from its last checkpoint in data/cache/checkpoints.
"""

import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import binllm_utils as bu

# (where the two codes stand, bits, optimiser steps of 32 questions): short codes first, the paper's prompts last.
LESSONS = (("alike", 8, 40), ("alike", 16, 20), ("alike", 32, 40), ("codes", 32, 30), ("text+codes", 32, 20))
BATCH = 32


def lesson(dataset, where, bits, n, seed):
    """(prompts, labels) of n questions: are these two made-up codes alike? No user's or film's own code is among them.

    where: a short question, or a style of the paper's prompt about a row of the training split; then n is at most what
    rows with a user and a film of their own allow.
    """
    if where in bu.QUESTIONS:
        pairs = bu.code_pairs(n, bits, seed)
        texts = zip(map(bu.to_bits, pairs.users), map(bu.to_bits, pairs.items))
        prompts = [bu.QUESTIONS[where].format(a=a, b=b) for a, b in texts]
        return prompts, bu.alike(bu.hamming_similarity(pairs.users, pairs.items))
    rows = dataset.train.sample(frac=1, random_state=seed).drop_duplicates("user").drop_duplicates("item").head(n)
    pairs = bu.code_pairs(dataset.n_users, bits, seed)
    items = bu.code_pairs(dataset.n_items, bits, seed + 1).items
    items[rows.item] = pairs.items[rows.user]
    prompts = bu.build_prompts(dataset, rows, bu.Codes(pairs.users, items), where)
    return prompts, bu.alike(bu.hamming_similarity(pairs.users[rows.user], items[rows.item]))


def literacy():
    """LoRA weights that read codes, learned lesson by lesson; data/adapters/literacy."""
    dataset = bu.load_ml1m()
    model, tokenizer = bu.load_llm()
    curves = []
    for place, (where, bits, steps) in enumerate(LESSONS):
        prompts, labels = lesson(dataset, where, bits, steps * BATCH, seed=place)
        print(f"lesson {place + 1} of {len(LESSONS)}: {where}, {bits} bits, {len(prompts)} questions", flush=True)
        folder = bu.CACHE / "checkpoints" / f"literacy-{place}"
        model, curve = bu.tune(model, tokenizer, prompts, labels, batch_size=BATCH, folder=folder)
        print(
            f"  loss {curve.loss.head(5).mean():.3f} -> {curve.loss.tail(5).mean():.3f} in {curve.seconds.iloc[-1]:.0f} s"
        )
        curves.append(curve.assign(lesson=f"{where} {bits}"))
    curve = pd.concat(curves, ignore_index=True)
    card = {
        "what": "reads codes; saw made-up codes only",
        "llm": model.name_or_path,
        "lessons": LESSONS,
        "batch": BATCH,
    }
    card |= {"seconds": round(sum(c.seconds.iloc[-1] for c in curves)), "hardware": bu.hardware()}
    card |= {"versions": bu.versions(), "commit": bu.commit()}
    bu.save_adapter(model, ROOT / "data" / "adapters" / "literacy", card, curve)


if __name__ == "__main__":
    wanted = {"literacy": literacy}
    if len(sys.argv) != 2 or sys.argv[1] not in wanted:
        sys.exit(__doc__)
    wanted[sys.argv[1]]()
