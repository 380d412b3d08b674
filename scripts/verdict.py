"""Does an LLM that reads titles and codes rank other data better than counting? scripts/verdict.py; half an hour.

MovieLens-100K, cut by time as in notebook 10, where most test users are new: codes, likes and counting all know what
had been rated so far. The reader of titles and the reader of codes are asked as their lessons left them, and after
tuning on ratings of this data, beside codes that were not learned from these (`adapters.cut_earlier`). Whole runs are
kept, so it goes on where it was stopped; test is not printed.

The files, in data/results/ml-100k: answers-test.parquet, one number a row and method, all from 0 to 1; verdict.csv, a
line a method: quality on those rows, and what it cost.
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import adapters
import records
import results

import binllm_own as bo
import binllm_serve as bs
import binllm_utils as bu

FOLDER = ROOT / "data" / "results" / "ml-100k"
ROWS, TUNING_ROWS, LR = 1500, 512, 1e-4


def note(folder, dataset, rows, method, scores, **cost):
    """Keep `scores`, from 0 to 1, and put one line into verdict.csv."""
    records.keep_answers(folder / "answers-test.parquet", method, dataset, rows, scores)
    row = {"method": method, "rows": len(rows)} | bu.evaluate(rows, scores)
    row |= {name: cost.get(name) for name in ("tuning_rows", "tuning_seconds", "seconds_per_row", "made_from")}
    records.put_row(folder / "verdict.csv", row, ["method"])
    print(f"{method}: kept", flush=True)


def without_llm(folder, dataset, codes, rows):
    """What costs no LLM. Counting adds two rates and more; halved, the order is the same and no number is above 1."""
    now, _ = bs.codes_before(dataset, codes, rows)
    note(folder, dataset, rows, "counting", bu.popularity_baseline(dataset, rows) / 2)
    note(folder, dataset, rows, "counting so far", bs.counting_before(dataset, rows) / 2)
    note(folder, dataset, rows, "codes so far", bu.hamming_similarity(now, codes.items[rows.item]))


def with_llm(folder, dataset, codes, rows, reader, tuning=None):
    """One of `bs.READERS`, as its lessons left it or tuned; tuning: (data set, codes, rows) to tune it on."""
    style, adapter = bs.READERS[reader]
    method, learned = f"LLM, {reader}", []
    if tuning:
        method, learned = f"{method}, tuned", bs.prompts_before(*tuning, style)
    asked = bs.prompts_before(dataset, codes, rows, style)
    key = bu.digest([*asked, *learned, results.shipped_sha256(adapter), str(LR)])
    if records.has_row(folder / "verdict.csv", {"method": method, "made_from": key}):
        return print(f"{method}: there already", flush=True)
    model, tokenizer = bu.load_llm(bu.SMOLLM2)
    model, cost = bu.load_adapter(model, bu.ROOT / "data" / "adapters" / adapter), {"made_from": key}
    checkpoint, parts = bu.CACHE / "checkpoints" / f"verdict-{key}", f"verdict-{key}"
    if learned:
        model, curve = bu.tune(model, tokenizer, learned, tuning[-1].label, lr=LR, folder=checkpoint)
        cost |= {"tuning_rows": len(learned), "tuning_seconds": round(curve.seconds.iloc[-1], 1)}
    p, seconds = results.score_in_parts(model, tokenizer, asked, parts, size=500)
    note(folder, dataset, rows, method, p, seconds_per_row=round(seconds / len(rows), 4), **cost)
    for done in (checkpoint, bu.CACHE / "answers" / parts):
        shutil.rmtree(done, ignore_errors=True)


def main():
    bu.quiet()
    ratings, titles = bo.ml100k_files()
    dataset = bo.read_interactions(ratings, titles=titles).split(name="ml-100k")
    codes, rows = bu.cached_codes(dataset, recipe="distinct"), bu.sample_rows(dataset.test, ROWS)
    then = adapters.cut_earlier(dataset)
    tuning = then, bu.cached_codes(then, recipe="distinct"), bu.sample_rows(then.test, TUNING_ROWS)
    without_llm(FOLDER, dataset, codes, rows)
    for learn, readers in ((None, bs.READERS), (tuning, reversed(bs.READERS))):
        for reader in readers:
            with_llm(FOLDER, dataset, codes, rows, reader, learn)


if __name__ == "__main__":
    main()
