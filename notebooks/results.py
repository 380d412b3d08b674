"""Ask every tuned LLM about the same rows and keep its answers in data/results, for notebook 05 to evaluate.

python notebooks/results.py                    every run there is: hours on two CPU cores
python notebooks/results.py one_step control   some; "control" is all of the controls, "recipe" all of the recipes

It goes on where it was stopped: a run whose answers are there, from the same codes, prompts and settings, is not made
again. Without a GPU the profile is `patient` and the seed 0, of the runs in DRAWN 0, 1 and 2, unless you ask for more
("two_step, seed 1"); with one it is `gpu` and all have three seeds. BINLLM_PROFILE chooses another profile.

The files: scores-PROFILE-SPLIT.csv (P(Yes); a column a run, a line a row of the split), flips-PROFILE.csv,
ranking-PROFILE.csv, and runs.csv, which says how each was made; recipes.csv tells, on valid, what one-step tuning owes
to each part of how it is done; families.csv is what notebook 06 finds in the profile's size.
"""

import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import adapters

import binllm_utils as bu

# name: variant, code format, bits, share of the profile's test rows (ALL: every row of the test split, whatever the
# profile). "long" is the adapter that `adapters.py long` made; it has codes of its own.
ALL = None
RUNS = {
    "text": ("text", "bits", 32, 1),
    "one_step": ("one_step", "bits", 32, 1),
    "codes_only": ("codes_only", "bits", 32, 1 / 2),
    "two_step": ("two_step", "bits", 32, 1 / 2),
    "bit_by_bit": ("bit_by_bit", "bits", 32, 1),
    "one_step dotted": ("one_step", "dotted", 32, 1 / 2),
    "two_step dotted": ("two_step", "dotted", 32, 1 / 2),
    "one_step hex": ("one_step", "hex", 32, 1 / 4),
    "one_step 16 bits": ("one_step", "bits", 16, 1 / 4),
    "one_step 64 bits": ("one_step", "bits", 64, 1 / 4),
    "long": ("long", "bits", adapters.LONG_CODES[0], ALL),
}
DRAWN = ("text", "one_step", "bit_by_bit")  # with three draws of the training rows on any machine
DAY = 24 * 60 * 60  # seconds


def load(dataset, codes, profile, variant, fmt="bits", seed=0):
    """(model, tokenizer, style of its prompts, seconds of tuning) of one of VARIANTS, or of "long"."""
    if variant != "long":
        model, tokenizer, curve = bu.tuned_llm(dataset, codes, profile, variant, fmt, seed)
        return model, tokenizer, bu.VARIANTS[variant][0], curve.seconds.iloc[-1]
    model, tokenizer = bu.load_llm(profile.llm, layers=profile.layers)
    model = bu.load_adapter(model, bu.ADAPTERS / "long")
    seconds = pd.read_csv(bu.ADAPTERS / "long" / "curve.csv").groupby("chapter").seconds.max().sum()
    return model, tokenizer, adapters.LONG_STYLE, seconds


def prompts_of(variant):
    """What decides the prompts of a variant: its settings and template, and those of the step before it."""
    if variant == "long":
        return bu.TEMPLATES[adapters.LONG_STYLE]
    style, first, _ = bu.VARIANTS[variant]
    return bu.VARIANTS[variant], bu.TEMPLATES[style], first and prompts_of(first)


def make(name, dataset, profile, work, count, variant, fmt="bits", bits=32, seed=0):
    """Make one run, unless runs.csv says that as many prompts were made from the same things, and note it there.

    work(ask, style, codes) asks, keeps the answers and returns its prompts, `count` of them; ask(prompts) is
    `bu.score`.
    """
    codes = bu.cached_codes(dataset, *(adapters.LONG_CODES if variant == "long" else (bits,)))
    path = bu.output_folder("data/results", profile) / "runs.csv"
    folder = bu.ADAPTERS / "long" if variant == "long" else bu.literacy_for(bu.VARIANTS[variant][0])
    start = folder / "adapter_model.safetensors"
    if variant == "long" and not start.exists():
        return print(f"{name}: left out, for {start.parent} is not there; python notebooks/adapters.py long makes it")
    if variant == "long" and (profile.llm or profile.layers):
        return print(f"{name}: left out, for {start.parent} was made for another LLM than that of {profile.name}")
    made_from = (codes.users, codes.items, repr(profile), variant, fmt, prompts_of(variant), start.read_bytes())
    row = {"run": name, "profile": profile.name, "made_from": bu.fingerprint(*made_from)}
    there = row | {"prompts": count}
    if path.exists() and (pd.read_csv(path)[list(there)] == there).all(axis=1).any():
        return print(f"{name}: there already", flush=True)
    model, tokenizer, style, tuning = load(dataset, codes, profile, variant, fmt, seed)
    began = time.perf_counter()
    prompts = work(partial(bu.score, model, tokenizer), style, codes)
    seconds = (time.perf_counter() - began) / len(prompts)
    pair = [] if style == "text" else [bu.FORMATS[fmt](codes.users[0]), bu.FORMATS[fmt](codes.items[0])]
    if style == "bit by bit":
        pair = [bu.to_pairs(codes.users[0], codes.items[0])]
    row |= {"variant": variant, "format": fmt if pair else "", "bits": codes.bits if pair else "", "seed": seed}
    row |= {"tuning_seconds": round(tuning, 1), "prompts": len(prompts), "seconds_per_prompt": round(seconds, 4)}
    row["tokens"] = round(np.mean([len(ids) for ids in tokenizer(prompts).input_ids]), 1)
    row["code_tokens"] = sum(len(tokenizer(text).input_ids) for text in pair)
    bu.put_row(path, row, ["run", "profile"])
    print(f"{name}: {len(prompts):,} prompts in {seconds * len(prompts):.0f} s", flush=True)


def sampled(dataset, profile, split="test", share=1):
    """The rows asked about; those of a smaller share are among those of a larger one. Of valid a quarter as many."""
    if split == "test":
        return dataset.test if share is ALL else bu.sample_rows(dataset.test, int(profile.eval_rows * share))
    return bu.sample_rows(dataset.valid, int(profile.eval_rows * (share or 1)) // 4, seed=1)


def keep(profile, split, name, rows, p):
    """Put `p`, the answers on `rows`, into column `name` of the profile's scores; the other columns stay."""
    path = bu.output_folder("data/results", profile) / f"scores-{profile.name}-{split}.csv"
    table = pd.DataFrame({name: np.round(p, 6)}, index=rows.index.rename("row"))
    if path.exists():
        table = bu.read_scores(path).drop(columns=name, errors="ignore").join(table, how="outer")
    with bu.replacing(path) as part:
        table.to_csv(part)


def answer(run, seed, dataset, profile):
    """One of RUNS on the sampled rows of valid and test; `seed` draws the training rows and the new LoRA matrices."""
    variant, fmt, bits, share = RUNS[run]
    name = f"{run}, seed {seed}" if seed else run
    rows = {split: sampled(dataset, profile, split, share) for split in ("valid", "test")}

    def work(ask, style, codes):
        asked = []
        for split, part in rows.items():
            prompts = bu.build_prompts(dataset, part, codes, style, fmt)
            keep(profile, split, name, part, ask(prompts))
            asked += prompts
        return asked

    make(name, dataset, profile, work, sum(map(len, rows.values())), variant, fmt, bits, seed)


def so_far(dataset, profile):
    """The long run's answers on the whole test split, each row with the code of what its user had rated before it.

    The likes in the prompt go up to the row asked about; here the user's code does too, in place of one for all rows.
    """
    rows = dataset.test

    def work(ask, style, codes):
        bits, seed = adapters.LONG_CODES
        model, _ = bu.fit_hybrid(dataset, seed=seed)
        now, prompts = bu.codes_so_far(model, dataset, rows, bits, seed), pd.Series("", rows.index)
        for _, part in rows.assign(code=now.users.tolist()).groupby(rows.groupby("user").cumcount()):
            users = codes.users.copy()  # the code of each user's first row, then of each one's second row, ...
            users[part.user] = part.code.to_list()
            prompts[part.index] = bu.build_prompts(dataset, part, bu.Codes(users, now.items), style)
        prompts = prompts.to_list()
        keep(profile, "test", "long so far", rows, ask(prompts))
        return prompts

    make("long so far", dataset, profile, work, len(rows), "long")


# ------------------------------------------------------------------------------------------------------------ controls
def shuffled(ids, seed=0):
    """A dict that gives every id in `ids` another one of them."""
    order = np.random.default_rng(seed).permutation(np.unique(ids))
    return dict(zip(order, np.roll(order, 1)))


def other_code(dataset, rows, codes, style):
    """Each user with another test user's code, all else as it was."""
    other, users = shuffled(rows.user), codes.users.copy()
    users[list(other)] = codes.users[list(other.values())]
    return bu.build_prompts(dataset, rows, bu.Codes(users, codes.items), style)


def random_codes(dataset, rows, codes, style):
    draw = np.random.default_rng(0).integers
    made_up = bu.Codes(*(draw(0, 2, side.shape, dtype=np.uint8) for side in (codes.users, codes.items)))
    return bu.build_prompts(dataset, rows, made_up, style)


def other_likes(dataset, rows, codes, style):
    """Each user's code beside what another test user had liked by then."""
    other, users = shuffled(rows.user), codes.users.copy()
    users[list(other.values())] = codes.users[list(other)]
    moved = rows.assign(user=rows.user.map(other))
    return bu.build_prompts(dataset, moved, bu.Codes(users, codes.items), style)


def other_title(dataset, rows, codes, style):
    """Each film's code beside another film's title."""
    other, items = shuffled(rows.item), codes.items.copy()
    items[list(other.values())] = codes.items[list(other)]
    return bu.build_prompts(dataset, rows.assign(item=rows.item.map(other)), bu.Codes(codes.users, items), style)


def reworded(old, new):
    """Prompts in which `new` stands for `old`."""

    def build(dataset, rows, codes, style):
        prompts = bu.build_prompts(dataset, rows, codes, style)
        if not all(old in prompt for prompt in prompts):
            raise ValueError(
                f"a prompt of style {style!r} does not hold {old!r}; reword this control with the template"
            )
        return [prompt.replace(old, new) for prompt in prompts]

    return build


def likes_as_of(when):
    """Prompts that show what was liked before `when(dataset, rows)` and nothing later."""

    def build(dataset, rows, codes, style):
        return bu.build_prompts(dataset, rows.assign(timestamp=when(dataset, rows)), codes, style)

    return build


# What is changed in the prompt of the model tuned in one step, on an eighth of the test rows.
CONTROLS = {
    "another user's code": other_code,
    "random codes": random_codes,
    "another user's likes": other_likes,
    "another film's title": other_title,
    "No or Yes": reworded('"Yes" or "No"', '"No" or "Yes"'),
    "hate": reworded("Would the user enjoy", "Would the user hate"),
    "likes up to the end of training": likes_as_of(lambda dataset, rows: dataset.train.timestamp.max() + 1),
    "likes of earlier days": likes_as_of(lambda dataset, rows: rows.timestamp // DAY * DAY),
}


def control(name, dataset, profile):
    """The model tuned in one step on prompts of which one thing is not as it should be."""
    rows = sampled(dataset, profile, share=1 / 8)

    def work(ask, style, codes):
        prompts = CONTROLS[name](dataset, rows, codes, style)
        keep(profile, "test", f"control: {name}", rows, ask(prompts))
        return prompts

    make(f"control: {name}", dataset, profile, work, len(rows), "one_step")


def flips(dataset, profile):
    """P(Yes) of the model tuned in one step for some test rows, and again with each bit of the user's code flipped."""
    rows = sampled(dataset, profile).head(profile.eval_rows // 50)

    def work(ask, style, codes):
        parts = []
        for bit in (None, *range(codes.bits)):
            users = codes.users.copy()
            if bit is not None:
                users[:, bit] ^= 1
            flipped = bu.Codes(users, codes.items)
            asked = {"prompt": bu.build_prompts(dataset, rows, flipped, style), "similarity": flipped.similarity(rows)}
            parts.append(pd.DataFrame({"row": rows.index, "bit": bit} | asked))
        table = pd.concat(parts, ignore_index=True).astype({"bit": "Int64"})
        prompts = table.pop("prompt").to_list()
        table["p"] = ask(prompts).round(6)
        with bu.replacing(bu.output_folder("data/results", profile) / f"flips-{profile.name}.csv") as part:
            table.to_csv(part, index=False)
        return prompts

    make("flips", dataset, profile, work, (1 + 32) * len(rows), "one_step")


# ------------------------------------------------------------------------------------------------------------- ranking
def candidates(dataset, n_users, per_user=50, seed=0):
    """Films to rank: of each of `n_users` test users what they liked in the test months, filled up to `per_user`.

    The others are drawn from the films the user never rated. `timestamp` is that of the user's first test row: no
    prompt shows a later like. A DataFrame as `Dataset.test`, at most half of a user's rows liked.
    """
    rng, parts = np.random.default_rng(seed), []
    liked = dataset.test[dataset.test.label == 1].groupby("user").item.agg(list)
    rated, first = dataset.log.groupby("user").item.agg(set), dataset.test.groupby("user").timestamp.min()
    for user in rng.permutation(liked.index)[:n_users]:
        films = rng.permutation(liked[user])[: per_user // 2]
        unseen = np.setdiff1d(np.arange(dataset.n_items), list(rated[user]))
        items = np.concatenate([films, rng.choice(unseen, per_user - len(films), replace=False)])
        label = (np.arange(per_user) < len(films)).astype(int)
        parts.append(pd.DataFrame({"user": user, "item": items, "label": label, "timestamp": first[user]}))
    return pd.concat(parts, ignore_index=True)


def ranking(dataset, profile):
    """P(Yes) of `candidates` by the LLM tuned without and with codes, beside scores that need no LLM."""
    table = candidates(dataset, max(2, profile.eval_rows // 50))

    def work(ask, style, codes):
        table["popularity"] = bu.popularity_baseline(dataset, table)
        table["codes"] = codes.similarity(table)
        prompts = bu.build_prompts(dataset, table, codes, style)
        table["one_step"] = ask(prompts)
        model, tokenizer, style, _ = load(dataset, codes, profile, "text")
        table["text"] = bu.score(model, tokenizer, bu.build_prompts(dataset, table, style=style))
        shown = table.drop(columns=["item", "timestamp"]).round(6)  # the ratings themselves may not be passed on
        with bu.replacing(bu.output_folder("data/results", profile) / f"ranking-{profile.name}.csv") as part:
            shown.to_csv(part, index=False)
        return prompts

    make("ranking", dataset, profile, work, len(table), "one_step")


# ------------------------------------------------------------------------------------------------------------ recipes
def three_titles(prompt):
    """`prompt` with no more than the last three of the titles that the user liked."""
    return re.sub(r'(movies: )".*((?:"[^"]+", ){2}"[^"]+"\. Would)', r"\1\2", prompt)


def in_groups(prompt):
    """`prompt` with a space after every eighth digit of its codes."""
    return re.sub(r"[01]{16,}", lambda code: " ".join(re.findall("[01]{8}", code[0])), prompt)


# One-step tuning with one thing changed: whether it starts from bit literacy, its prompt, what is done to each prompt,
# and whether the codes have seen the training rows.
RECIPES = {
    "as it is": (True, "side by side", str, True),
    "without bit literacy": (False, "side by side", str, True),
    "bit by bit": (True, "bit by bit", str, True),
    "bit by bit, on rows the codes have not seen": (True, "bit by bit", str, False),
    "on rows the codes have not seen": (True, "side by side", str, False),
    "in the paper's words": (True, "text+codes", str, True),
    "without titles": (True, "codes", str, True),
    "three titles": (True, "side by side", three_titles, True),
    "digits in groups of eight": (True, "side by side", in_groups, True),
}


def recipe(name, dataset, profile):
    """One of RECIPES on a quarter of the profile's training rows, judged on valid rows: a line of recipes.csv.

    Without bit literacy the LoRA matrices are new and learn at the rate of titles only, ten times as high.
    """
    literate, style, change, seen = RECIPES[name]
    literacy = (bu.literacy_for(style) / "adapter_model.safetensors").read_bytes()
    codes = bu.cached_codes(dataset)
    path = bu.output_folder("data/results", profile) / "recipes.csv"
    row = {"recipe": name, "profile": profile.name}
    row["made_from"] = bu.fingerprint(codes.users, codes.items, repr(profile), style, bu.TEMPLATES[style], literacy)
    if path.exists() and (pd.read_csv(path)[list(row)] == row).all(axis=1).any():
        return print(f"recipe: {name}: there already", flush=True)
    rows, known = (dataset.train, codes) if seen else adapters.unseen_rows(dataset)
    train = rows.sample(profile.tune_rows // 4, random_state=0)
    valid = bu.sample_rows(dataset.valid, profile.eval_rows // 8, seed=1)
    learn, ask = (
        [change(prompt) for prompt in bu.build_prompts(dataset, part, written, style)]
        for part, written in ((train, known), (valid, codes))
    )
    if literate:
        model, tokenizer, _ = bu.literate_llm(profile, style)
    else:
        model, tokenizer = bu.load_llm(profile.llm, layers=profile.layers)
    lr = bu.VARIANTS["one_step" if literate else "text"][2]
    model, curve = bu.tune(model, tokenizer, learn, train.label, batch_size=profile.batch_size, lr=lr)
    p = bu.score(model, tokenizer, ask)
    row |= {"tuning_rows": len(train), "lr": lr, "seconds": round(curve.seconds.iloc[-1])}
    row["tokens"] = round(np.mean([len(ids) for ids in tokenizer(ask).input_ids]), 1)
    row["correlation"] = round(adapters.correlation(p, codes.similarity(valid)), 4)
    row |= {"valid_rows": len(valid)} | bu.evaluate(valid, p)
    bu.put_row(path, row, ["recipe", "profile"])
    print(f"recipe: {name}: AUC {row['auc']}, correlation {row['correlation']}", flush=True)


def families(dataset, profile):
    """Notebook 06 in the size of `profile`, for its lines in families.csv. The notebook keeps that run's outputs."""
    path = bu.output_folder("data/results", profile) / "families.csv"
    if path.exists() and (pd.read_csv(path).profile == profile.name).sum() == 4:
        return print("families: there already", flush=True)
    command = [sys.executable, ROOT / "notebooks" / "run.py", "06"]
    subprocess.run(command, env=os.environ | {"BINLLM_PROFILE": profile.name}, check=True)


def main(wanted):
    if "BINLLM_PROFILE" not in os.environ and bu.current_profile().name == "cpu":
        os.environ["BINLLM_PROFILE"] = "patient"
    profile, dataset = bu.current_profile(), bu.load_ml1m()
    named = [(name, s) for s in range(3) for name in RUNS if s == 0 or name != "long"]  # of that one there is one only
    runs = {f"{name}, seed {s}" if s else name: partial(answer, name, s) for name, s in named}
    runs |= {f"control: {name}": partial(control, name) for name in CONTROLS}
    runs |= {"long so far": so_far, "flips": flips, "ranking": ranking}
    runs |= {f"recipe: {name}": partial(recipe, name) for name in RECIPES} | {"families": families}
    unknown = set(wanted) - set(runs) - {"control", "recipe"}
    if unknown:
        sys.exit(f"there is no run {unknown.pop()!r}; choose from control, recipe, {', '.join(runs)}")
    usual = [n for n in runs if torch.cuda.is_available() or ", seed" not in n or n.split(",")[0] in DRAWN]
    for name in runs:
        if name in (wanted or usual) or name.split(":")[0] in wanted:
            runs[name](dataset, profile)


if __name__ == "__main__":
    main(sys.argv[1:])
