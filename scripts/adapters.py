"""Train what takes longer than a notebook should, and keep it in data/adapters.

python scripts/adapters.py literacy    teach the default LLM to read codes, on made-up codes alone: an hour
python scripts/adapters.py pairs       the same for codes that stand bit by bit: half an hour
python scripts/adapters.py titles      the collaborative model's opinion of films, told by their titles: 80 minutes
python scripts/adapters.py all_titles  the same of all films, from there: as long
python scripts/adapters.py one_step    BinLLM itself: the paper's prompt, tuned on all ratings: ten minutes of a GPU

All but the last on two CPU cores. Run it again after whatever stopped it: it goes on from its last checkpoint in
data/cache.
"""

import itertools
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
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
ADAPTERS = ROOT / "data" / "adapters"
SHORT = {"alike": bx.ALIKE, "pairs": bx.ALIKE_PAIRS}
STYLES = {"side by side": bx.SIDE_BY_SIDE, "bit by bit": bx.BIT_BY_BIT}  # others are those of `bu.build_prompts`
# For each adapter its courses. Each is one run of `tune`: (highest learning rate, lessons); the next goes on from its
# weights. A lesson: where the two codes stand, bits, questions, `spread` of `code_pairs`. Short codes first, whole
# prompts last.
COURSES = {
    "literacy": (
        (
            1e-3,
            (
                ("alike", 8, 1536, None),
                ("alike", 16, 1024, None),
                ("alike", 32, 2048, None),
                ("codes", 32, 256, None),
                ("side by side", 32, 320, None),
                ("text+codes", 32, 320, None),
            ),
        ),
        (
            5e-4,
            (
                ("alike", 32, 3072, 0.1),
                ("side by side", 32, 512, 0.1),
            ),
        ),
    ),
    "pairs": (
        (
            1e-3,
            (
                ("pairs", 8, 640, None),
                ("pairs", 16, 320, None),
                ("pairs", 32, 640, None),
                ("pairs", 32, 960, 0.1),
                ("bit by bit", 32, 512, 0.1),
            ),
        ),
    ),
}
BATCH = 32  # questions a step


def lesson(dataset, where, bits, n, spread, *, seed):
    """(prompts, labels) of n questions: are these two made-up codes alike? No user's or film's own code is among them.

    where: "alike" for `bx.ALIKE` alone, "pairs" for `bx.ALIKE_PAIRS`, or a style of prompt about a row of the training
    split, each with a user and a film of its own; there are some 500 such rows.
    """
    if where in ("alike", "pairs"):
        pairs = bx.code_pairs(n, bits, seed, spread)
        return bx.code_questions(pairs, SHORT[where]), bx.alike(bu.hamming_similarity(pairs.users, pairs.items))
    rows = dataset.train.sample(frac=1, random_state=seed).drop_duplicates("user").drop_duplicates("item")
    if len(rows) < n:
        raise ValueError(f"{n} questions asked for, {len(rows)} rows have a user and a film of their own")
    rows, pairs = rows.head(n), bx.code_pairs(dataset.n_users, bits, seed, spread)
    items = bx.code_pairs(dataset.n_items, bits, seed + 1).items
    items[rows.item] = pairs.items[rows.user]
    codes = bu.Codes(pairs.users, items)
    return bu.build_prompts(dataset, rows, codes, STYLES.get(where, where)), bx.alike(codes.similarity(rows))


def literacy(name="literacy"):
    """LoRA weights that read codes, learned on made-up ones alone; the folder of data/adapters named as in COURSES.

    After each course the adapter is saved, with the courses so far in its card: run again, it goes on with the next.
    """
    dataset, folder = bu.load_ml1m(), ADAPTERS / name
    # `literacy` is older than the tutorial's four bits; taught and examined so, it read worse
    model, tokenizer = bu.load_llm(bu.SMOLLM2, nf4=name != "literacy")
    courses, curves = json.loads(json.dumps(COURSES[name])), []
    done = json.loads((folder / "card.json").read_text())["courses"] if (folder / "card.json").exists() else []
    if done != courses[: len(done)]:
        sys.exit(f"{folder} was taught other courses than COURSES; delete it to teach these")
    if done:
        model, curves = bu.load_adapter(model, folder), [pd.read_csv(folder / "curve.csv")]
    seeds = itertools.count(sum(len(lessons) for _, lessons in done))
    for place, (lr, lessons) in list(enumerate(COURSES[name], 1))[len(done) :]:
        model, curve = teach(dataset, model, tokenizer, lr, lessons, seeds, f"{name}-{place}")
        before = curves[-1].seconds.iloc[-1] if curves else 0
        curves.append(curve.assign(course=place, seconds=curve.seconds + before))
        exam(dataset, model, tokenizer, name, place)
        card = {"what": "reads codes; saw made-up codes only", "llm": model.name_or_path, "courses": courses[:place]}
        card |= {"seconds": round(curves[-1].seconds.iloc[-1])} | records.stamps()
        bu.save_adapter(model, folder, card, pd.concat(curves))
        forget(f"{name}-{place}")


def teach(dataset, model, tokenizer, lr, lessons, seeds, checkpoint):
    """(model, learning curve) after one course; the curve says which lesson each step belongs to."""
    parts = [dict(zip(("prompt", "label"), lesson(dataset, *what, seed=next(seeds)))) for what in lessons]
    asked = pd.concat([pd.DataFrame(part).assign(lesson=lesson_name(*what)) for part, what in zip(parts, lessons)])
    options = {"batch_size": BATCH, "lr": lr, "shuffle": False, "folder": bu.CACHE / "checkpoints" / checkpoint}
    model, curve = bu.tune(model, tokenizer, asked.prompt, asked.label, **options)
    return model, curve.assign(lesson=asked.lesson.to_list()[::BATCH])


def forget(checkpoint):
    """Delete the checkpoint of a course that is saved: taught anew, it shall not be found."""
    shutil.rmtree(bu.CACHE / "checkpoints" / checkpoint, ignore_errors=True)


def exam(dataset, model, tokenizer, name, course):
    """How well real codes are read after a course, on valid rows and before any rating: data/results/literacy.csv."""
    short, styles = {"literacy": ("alike", ("side by side", "text+codes")), "pairs": ("pairs", ("bit by bit",))}[name]
    codes, rows = bu.cached_codes(dataset), bu.sample_rows(dataset.valid, 150, seed=1)
    sides = codes.users[rows.user], codes.items[rows.item]
    similarity = bu.hamming_similarity(*sides)
    scores = {"Hamming similarity itself": bx.alike(similarity)}
    prompts = {short: bx.code_questions(bu.Codes(*sides), SHORT[short])}
    prompts |= {style: bu.build_prompts(dataset, rows, codes, STYLES.get(style, style)) for style in styles}
    scores |= {prompt: bu.score(model, tokenizer, asked) for prompt, asked in prompts.items()}
    for prompt, p in scores.items():
        key = {"adapter": name, "after_course": course, "prompt": prompt, "split": "valid", "rows": len(rows)}
        row = {"correlation": correlation(p, similarity), "auc": bu.auc(rows.label, p)}
        row["uauc"] = bu.uauc(rows.user, rows.label, p)[0]
        row = {column: round(float(value), 4) for column, value in row.items()}
        records.put_row(RECORDS / "literacy.csv", key | row, list(key))
        print(f"{name}, course {course}, {prompt}: {row}", flush=True)


def correlation(p, similarity):
    """How surely codes are read: correlation of logit(Yes) with the codes' Hamming similarity."""
    return float(np.corrcoef(np.log(p / (1 - p)), similarity)[0, 1])


def lesson_name(where, bits, n, spread):
    return f"{where}, {bits} bits" + (", near one half" if spread else "")


def cut_earlier(dataset):
    """`Dataset` of the training split alone: its last third, by time, is test, and what is before it train and valid.

    Codes agree with the rows that they were learned from better than with any others: whoever is tuned on those learns
    to trust the codes too much, and that nothing else counts. With codes learned here, test is as unseen as
    the real one.
    """
    when, train = dataset.train.timestamp, dataset.train
    stop, cut = (when.quantile(share, interpolation="lower") for share in (0.6, 2 / 3))
    early, watched, late = train[when < stop], train[(when >= stop) & (when < cut)], train[when >= cut]
    return bu.Dataset(early, watched, late, dataset.titles, f"{dataset.name}-earlier", dataset.tags)


TITLES = {"lr": 1e-3, "moments": 512, "films": 32}
TITLE_COURSES = {"titles": 1, "all_titles": 1}  # each with other users, moments and films


def titles(name="titles"):
    """Title lessons: the LLM learns from titles what the collaborative model thinks; data/adapters/`name`.

    For `titles` a fifth of the films is cold: never asked about, and their ratings before test are hidden from the
    collaborative model and from the likes shown. `all_titles` goes on from it, with nothing hidden. How it orders valid
    rows by titles alone, before the first course and after each, all of them and those of films cold at first or not,
    becomes rows of data/results/titles.csv. Run again, it goes on.
    """
    dataset, (model, tokenizer), folder = bu.load_ml1m(), bu.load_llm(bu.SMOLLM2), ADAPTERS / name
    cold, card, learned = bx.some_items(dataset), {"courses": 0}, None
    start = "titles" if name == "all_titles" else None
    if (folder / "card.json").exists():
        model, card = bu.load_adapter(model, folder), json.loads((folder / "card.json").read_text())
        learned = pd.read_csv(folder / "curve.csv")
        if any(card.get(key) != value for key, value in TITLES.items()):
            sys.exit(f"{folder} was taught other lessons than TITLES; delete it to teach these")
    elif start:
        model = bu.load_adapter(model, ADAPTERS / start)
        learned = pd.read_csv(ADAPTERS / start / "curve.csv").assign(course=0)  # they are part of what it cost
    elif not (bu.CACHE / "checkpoints" / "titles-1").exists():
        title_exam(dataset, model, tokenizer, cold, name, 0)
    hidden = [] if start else cold
    seen = bx.without_ratings(dataset, hidden)
    z = bx.opinions(seen)
    for course in range(card["courses"] + 1, TITLE_COURSES[name] + 1):
        seed = course - 1 + 100 * bool(start)
        lessons = bx.title_lessons(seen, z, TITLES["moments"], TITLES["films"], unasked=hidden, seed=seed)
        options = {"batch_size": TITLES["films"], "lr": TITLES["lr"], "shuffle": False}
        options["folder"] = bu.CACHE / "checkpoints" / f"{name}-{course}"
        model, curve = bu.tune(model, tokenizer, *lessons, **options)
        before = 0 if learned is None else learned.seconds.iloc[-1]
        learned = pd.concat([learned, curve.assign(course=course, seconds=curve.seconds + before)])
        title_exam(dataset, model, tokenizer, cold, name, int(learned.rows.sum()))
        what = "knows a collaborative model's opinion by titles; no rating was an answer"
        card = {"what": what, "llm": model.name_or_path, "start": start}
        card |= TITLES | {"courses": course, "seconds": round(learned.seconds.iloc[-1])} | records.stamps()
        bu.save_adapter(model, folder, card, learned)
        forget(f"{name}-{course}")


def title_exam(dataset, model, tokenizer, cold, name, questions):
    """How well valid rows are ordered by titles alone after so many questions: data/results/titles.csv."""
    rows = bu.sample_rows(dataset.valid, 1000, seed=1)
    p, new = bu.score(model, tokenizer, bu.build_prompts(dataset, rows, style="text")), rows.item.isin(cold).to_numpy()
    for films, mine in {"all": new | True, "warm": ~new, "cold": new}.items():
        row = {"adapter": name, "questions": questions, "films": films, "split": "valid", "rows": int(mine.sum())}
        row |= bu.evaluate(rows[mine], p[mine])
        records.put_row(RECORDS / "titles.csv", row, ["adapter", "questions", "films"])
        print(f"{name}, {questions:,} questions, films {films}: {row['auc']}/{row['uauc']}", flush=True)


def one_step():
    """BinLLM itself, as an adapter: the run `one_step` of results.py from all ratings of the training split."""
    dataset, run = bu.load_ml1m(), results.RUNS["one_step"]
    profile = replace(bu.PROFILES["full"], llm=bu.SMOLLM2)  # whatever BINLLM_LLM says
    codes = bu.cached_codes(dataset)
    model, _, curve = results.tuned_llm(dataset, codes, profile, run)
    made_of = results.card_of(dataset, codes, profile, run, results.VARIANTS[run.variant], 0)
    card = {"what": "BinLLM in one step: the paper's prompt of titles and codes; tuned on all training ratings"}
    # its own stamps stay: where it was tuned, not where it is copied
    card |= json.loads((results.kept_adapter(profile, made_of) / "card.json").read_text())
    bu.save_adapter(model, ADAPTERS / "one_step", card, curve)


if __name__ == "__main__":
    wanted = {
        "literacy": literacy,
        "pairs": partial(literacy, "pairs"),
        "titles": titles,
        "all_titles": partial(titles, "all_titles"),
        "one_step": one_step,
    }
    if len(sys.argv) != 2 or sys.argv[1] not in wanted:
        sys.exit(__doc__)
    wanted[sys.argv[1]]()
