"""Is it the bits? The reader of codes, asked again with one thing in its prompts made false. python scripts/controls.py

Half an hour on two cores; run again, it goes on where it was stopped. The reader is the run `bit lessons`, results.py,
taught by made-up codes alone; it reads the default codes bit by bit. Some test rows are asked about with another user's
code, random codes, false likes and so on; and of one row of each of some users every bit of the user's code is turned
over, one at a time. The files: controls.parquet, P(Yes), a column a change; flips.csv, a line a turned bit, the first
of each row with none; controls.txt names what they were made from: the same is not made again.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import records
import results

import binllm_extras as bx
import binllm_utils as bu

RECORDS = ROOT / "data" / "results"
READER = "bit lessons"
ROWS, FLIPPED = 500, 40  # test rows asked about with each change; rows whose bits are turned


def told(dataset, rows, codes):
    """What the prompts of `rows` tell, for `bu.prompt_fields`: titles, likes, and the two codes, one a row."""
    sitting = rows.assign(timestamp=bu.sittings(dataset, rows))
    likes = [[dataset.titles[item] for item in mine] for mine in bu.liked_before(dataset, sitting, 10)]
    users, items = codes.of(rows)
    return {"titles": [dataset.titles[item] for item in rows.item], "likes": likes, "users": users, "items": items}


def falsified(dataset, rows, codes, seed=0):
    """{what is made false: prompts of `rows`}; everything else in them stays as it is."""
    rng, true = np.random.default_rng(seed), told(dataset, rows, codes)
    first = rows.user.drop_duplicates()  # of each user the first row, and whose turn comes next
    place = dict(zip(first, np.roll(rows.index.get_indexer(first.index), -1)))
    other = rows.user.map(place).to_numpy()
    known = replace(dataset, **{split: getattr(dataset, split).assign(label=0) for split in ("valid", "test")})
    changes = {
        "another user's code": {"users": true["users"][other]},
        "random codes": {side: rng.integers(0, 2, true[side].shape, np.uint8) for side in ("users", "items")},
        "another user's likes": {"likes": [true["likes"][row] for row in other]},
        "another film's title": {"titles": [true["titles"][row] for row in rng.permutation(len(rows))]},
        "likes up to the end of training": {"likes": told(known, rows, codes)["likes"]},
    }
    asked = {what: bu.fill(*bu.prompt_fields(bx.BIT_BY_BIT, **(true | false))) for what, false in changes.items()}
    for what, (words, others) in {
        '"No" or "Yes"': ('"Yes" or "No"', '"No" or "Yes"'),
        "hate in place of enjoy": ("the user enjoy", "the user hate"),
        "different in place of alike": (" alike?", " different?"),
    }.items():
        asked[what] = bu.fill(*bu.prompt_fields(bx.BIT_BY_BIT.replace(words, others), **true))
    return asked


def flips(dataset, rows, codes):
    """(table, prompts): each row as it is, bit -1, and with each bit of the user's code turned over."""
    true, parts, prompts = told(dataset, rows, codes), [], []
    for place, row in enumerate(rows.index):
        users = true["users"][place] ^ np.r_[np.zeros((1, codes.bits), np.uint8), np.eye(codes.bits, dtype=np.uint8)]
        items = np.tile(true["items"][place], (len(users), 1))
        one = [[true[name][place]] * len(users) for name in ("titles", "likes")]
        prompts += bu.fill(*bu.prompt_fields(bx.BIT_BY_BIT, *one, users, items))
        similarity = bu.hamming_similarity(users, items)
        parts.append(pd.DataFrame({"row": row, "bit": range(-1, codes.bits), "similarity": similarity}))
    return pd.concat(parts, ignore_index=True), prompts


def main():
    bu.quiet()
    dataset, run = bu.load_ml1m(), results.RUNS[READER]
    codes, rows = bu.cached_codes(dataset), bu.sample_rows(dataset.test, ROWS)
    table, turned = flips(dataset, rows.drop_duplicates("user").head(FLIPPED), codes)
    asked, mark = falsified(dataset, rows, codes), RECORDS / "controls.txt"
    start = results.VARIANTS[run.variant].start
    key = bu.digest([results.shipped_sha256(*start)], *asked.values(), turned)
    if mark.exists() and mark.read_text() == key + "\n":
        return print("controls: there already")
    profile = replace(bu.PROFILES["patient"], llm=bu.SMOLLM2)
    model, tokenizer, _ = results.tuned_llm(dataset, codes, profile, run)
    for place, (what, prompts) in enumerate(asked.items()):
        p, _ = results.score_in_parts(model, tokenizer, prompts, f"controls-{key}-{place}")
        records.keep_answers(RECORDS / "controls.parquet", what, dataset, rows, p)
        print(f"{what}: asked", flush=True)
    table["p"], _ = results.score_in_parts(model, tokenizer, turned, f"controls-{key}-flips")
    with bu.replacing(RECORDS / "flips.csv") as part:
        table.round(6).to_csv(part, index=False)
    mark.write_text(key + "\n")
    for kept in (bu.CACHE / "answers").glob(f"controls-{key}-*"):
        shutil.rmtree(kept)


if __name__ == "__main__":
    main()
