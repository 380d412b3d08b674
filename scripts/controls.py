"""Is it the bits? Readers of codes, asked again with one thing in their prompts made false. python scripts/controls.py

Half an hour on two cores; run again, it goes on where it was stopped. The readers are adapters of data/adapters:
`pairs`, taught by made-up codes alone, reads the default codes bit by bit (the run `bit lessons` of results.py);
`one_step` reads the paper's prompt and was tuned on all ratings. Some test rows are asked about with another user's
code, random codes, false likes and so on; and of one row of each of some users every bit of the user's code is turned
over, one at a time. The files: controls.parquet, P(Yes), a column a reader and change; flips.csv, a line a turned bit,
the first of each row with none; controls.csv, what each was made from: the same is not made again.
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
READERS = {"bit lessons": ("pairs", bx.BIT_BY_BIT), "all ratings": ("one_step", bu.TEMPLATES["text+codes"])}
ROWS, FLIPPED = 500, 40  # test rows asked about with each change; rows whose bits are turned


def told(dataset, rows, codes):
    """What the prompts of `rows` tell, for `bu.prompt_fields`: titles, likes, and the two codes, one a row."""
    sitting = rows.assign(timestamp=bu.sittings(dataset, rows))
    likes = [[dataset.titles[item] for item in mine] for mine in bu.liked_before(dataset, sitting, 10)]
    users, items = codes.of(rows)
    return {"titles": [dataset.titles[item] for item in rows.item], "likes": likes, "users": users, "items": items}


def falsified(dataset, rows, codes, template, seed=0):
    """{what is made false: prompts of `rows`}; everything else in them stays as it is."""
    rng, true = np.random.default_rng(seed), told(dataset, rows, codes)
    first = rows.user.drop_duplicates()  # of each user the first row, and whose turn comes next
    place = dict(zip(first, np.roll(rows.index.get_indexer(first.index), -1)))
    other = rows.user.map(place).to_numpy()
    known = replace(dataset, **{split: getattr(dataset, split).assign(label=0) for split in ("valid", "test")})
    one_bit = np.eye(codes.bits, dtype=np.uint8)[np.random.default_rng(seed + 1).integers(codes.bits, size=len(rows))]
    changes = {
        "as it is": {},
        "another user's code": {"users": true["users"][other]},
        "random codes": {side: rng.integers(0, 2, true[side].shape, np.uint8) for side in ("users", "items")},
        "one bit turned over in both": {side: true[side] ^ one_bit for side in ("users", "items")},  # as many are equal
        "every bit turned over": {side: 1 - true[side] for side in ("users", "items")},  # here too
        "another user's likes": {"likes": [true["likes"][row] for row in other]},
        "another film's title": {"titles": [true["titles"][row] for row in of_another_film(rows, rng)]},
        "likes up to the end of training": {"likes": told(known, rows, codes)["likes"]},
    }
    asked = {what: bu.fill(*bu.prompt_fields(template, **(true | false))) for what, false in changes.items()}
    for what, (words, others) in {
        '"No" or "Yes"': ('"Yes" or "No"', '"No" or "Yes"'),
        "hate in place of enjoy": (" enjoy ", " hate "),
        "different in place of alike": (" alike?", " different?"),
    }.items():
        if words in template:
            asked[what] = bu.fill(*bu.prompt_fields(template.replace(words, others), **true))
    return asked


def of_another_film(rows, rng):
    """For each row the place of a random one that is about another film."""
    items, place = rows.item.to_numpy(), rng.permutation(len(rows))
    while (same := items[place] == items).any():
        place[same] = rng.integers(len(rows), size=same.sum())
    return place


def flips(dataset, rows, codes, template):
    """(table, prompts): each row as it is, bit -1, and with each bit of the user's code turned over."""
    true, parts, prompts = told(dataset, rows, codes), [], []
    for place, row in enumerate(rows.index):
        users = true["users"][place] ^ np.r_[np.zeros((1, codes.bits), np.uint8), np.eye(codes.bits, dtype=np.uint8)]
        items = np.tile(true["items"][place], (len(users), 1))
        one = [[true[name][place]] * len(users) for name in ("titles", "likes")]
        prompts += bu.fill(*bu.prompt_fields(template, *one, users, items))
        similarity = bu.hamming_similarity(users, items)
        parts.append(pd.DataFrame({"row": row, "bit": range(-1, codes.bits), "similarity": similarity}))
    return pd.concat(parts, ignore_index=True), prompts


def ask(reader, dataset, rows, codes):
    """Make what is missing of one of READERS."""
    adapter, template = READERS[reader]
    table, turned = flips(dataset, rows.drop_duplicates("user").head(FLIPPED), codes, template)
    asked = falsified(dataset, rows, codes, template) | {"single bits turned over": turned}
    made = {what: bu.digest([results.shipped_sha256(adapter)], prompts) for what, prompts in asked.items()}
    about = {what: {"reader": reader, "change": what, "made_from": key} for what, key in made.items()}
    missing = [what for what in asked if not records.has_row(RECORDS / "controls.csv", about[what])]
    if not missing:
        return print(f"{reader}: there already")
    model, tokenizer = bu.load_llm(bu.SMOLLM2)
    model = bu.load_adapter(model, bu.ROOT / "data" / "adapters" / adapter)
    for what in missing:
        p, seconds = results.score_in_parts(model, tokenizer, asked[what], f"controls-{made[what]}", size=500)
        if asked[what] is turned:
            records.put_table(RECORDS / "flips.csv", table.assign(p=p.round(6)), {"reader": reader})
        else:
            records.keep_answers(RECORDS / "controls.parquet", f"{reader}: {what}", dataset, rows, p)
        row = about[what] | {"prompts": len(p), "seconds": round(seconds)}
        records.put_row(RECORDS / "controls.csv", row, ["reader", "change"])
        shutil.rmtree(bu.CACHE / "answers" / f"controls-{made[what]}")
        print(f"{reader}, {what}: asked", flush=True)


def main():
    bu.quiet()
    dataset = bu.load_ml1m()
    for reader in READERS:
        ask(reader, dataset, bu.sample_rows(dataset.test, ROWS), bu.cached_codes(dataset))


if __name__ == "__main__":
    main()
