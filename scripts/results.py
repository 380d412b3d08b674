"""Make what data/results holds, and keep every single answer; goes on where it was stopped.

python scripts/results.py                        all that is missing
python scripts/results.py text "codes ste 32"    some; "one_step, seed 1" for another seed, "past: codes past 32" for
                                                 codes learned from all that was rated before valid

Without a GPU the profile is `patient`: 1,024 tuning rows and all test rows, an hour a run on two slow cores; with one
it is `full`, the whole training split. BINLLM_PROFILE chooses another. A row that needs no LLM is made once: delete its
line of metrics.csv when its recipe has changed.

The files: metrics.csv, a line a result; runs.csv, how each run of the LLM was made, and curves.csv, its loss by step;
answers-PROFILE-SPLIT.parquet, P(Yes), a column a run, a line a row of the split.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import records

import binllm_extras as bx
import binllm_utils as bu
from binllm_data import SMOLLM2_HUB


# -------------------------------------------------------------------------------------------------- without an LLM
class NeverBinary(bu.BinMF):
    """The authors' encoder without its sign: what the sign costs."""

    def encode(self, z):
        return torch.tanh(z)


WAYS = {"ml-1m": ["paper 32", "reference 32", "ste 32", "ste 64", "distinct 32", "distinct 64"]}
WAYS["ml-1m"] += ["descent 32", "descent 64"]
PARTS = {"scale": {"scaled": False}, "dropout": {"dropout": 0.0}, "average": {"average": None}}  # what `ste` adds
CHANGED = {  # what each part is worth: (recipe of `bu.RECIPES`, what is changed in it, whether films have features)
    **{f"ste, no {part}": ("ste", without, True) for part, without in PARTS.items()},
    "ste, no features": ("ste", {}, False),
    "ste, none of these": ("ste", PARTS["scale"] | PARTS["dropout"] | PARTS["average"], False),
    "reference, not annealed": ("reference", {"anneal": None}, False),
    "reference, 0 and 1": ("reference", {"zero_one": True}, False),
}
WAYS["ml-1m"] += [f"{name} 32" for name in CHANGED]
WAYS["ml-1m-past"] = ["past 32", "past 64", "descent 32", "descent 64", "descent 128"]  # settings for as many rows


def continuous(dataset, seed, max_epochs):
    torch.manual_seed(seed)
    how = bu.RECIPES["reference"]
    model = NeverBinary(dataset, 32, how)
    return model, bu.train_cf(model, dataset, **how.settings(len(dataset.train)), seed=seed, max_epochs=max_epochs)


def changed(dataset, bits, seed, name, max_epochs):
    """As `bu.fit_codes`, by one of CHANGED."""
    recipe, changes, featured = CHANGED[name]
    features = None if featured else np.zeros((dataset.n_items, 0), np.float32)
    return bu.fit_codes(dataset, bits, seed, replace(bu.RECIPES[recipe], **changes), max_epochs, features=features)


def collaborative(dataset, profile):
    """{name: (columns of metrics.csv, function of a seed -> (scores of all test rows, seconds))}, without an LLM."""
    test, epochs = dataset.test, profile.epochs

    def scored(fit, **options):
        def run(seed):
            model, curve = fit(dataset, seed=seed, **options)
            return bu.cf_scores(model, test), curve.seconds.iloc[-1]

        return run

    def coded(recipe, bits):
        def run(seed):
            fit = changed if recipe in CHANGED else bx.fit_descent if recipe == "descent" else bu.fit_codes
            codes, curve = fit(dataset, bits, seed, recipe, max_epochs=epochs)
            if recipe in ("paper", "reference, 0 and 1"):  # bits that both have count, bits that both lack do not
                users, items = codes.of(test)
                return (users * items).sum(1), curve.seconds.iloc[-1]
            return codes.similarity(test), curve.seconds.iloc[-1]

        return run

    no_features = np.zeros((dataset.n_items, 0), np.float32)
    ways = {
        ("popularity", "", None): lambda _: (bu.popularity_baseline(dataset, test), None),
        ("mf", "paper", None): scored(bx.fit_mf, max_epochs=2 * epochs),
        ("mf_bias", "", None): scored(bx.fit_hybrid, features=no_features, max_epochs=epochs),
        ("continuous", "reference", None): scored(continuous, max_epochs=epochs),
        ("continuous", "hybrid", None): scored(bx.fit_hybrid, max_epochs=epochs),
    }
    for way in WAYS.get(dataset.name, WAYS["ml-1m"]):
        recipe, bits = way.rsplit(" ", 1)
        ways["codes", recipe, int(bits)] = coded(recipe, int(bits))
    found = {}
    for (model, variant, bits), way in ways.items():
        name = " ".join(str(part) for part in (model, variant, bits) if part)
        found[name] = ({"model": model, "variant": variant, "bits": bits}, way)
    return found


def without_llm(name, dataset, profile, seeds=5):
    """Put what `collaborative` calls `name` into metrics.csv, all seeds that are not there."""
    about, way = collaborative(dataset, profile)[name]
    path = records.results_folder(profile) / "metrics.csv"
    for seed in range(seeds) if about["model"] != "popularity" else (None,):
        row = about | {"seed": seed, "profile": profile.name, "rows": len(dataset.test), "dataset": dataset.name}
        if records.has_row(path, row):
            continue
        scores, seconds = way(seed)
        where = {"dataset": dataset.name, "split": "test", "seed": seed, "seconds": seconds and round(seconds, 1)}
        records.record(profile, dataset.test, scores, **about, **where)
    print(f"{name}: there", flush=True)


# ----------------------------------------------------------------------------------------------------- with an LLM
@dataclass(frozen=True)
class Variant:
    """One way to tune (Section 3.3): the prompts' style, the highest learning rate, and where tuning begins.

    first: the variant that is tuned before and gone on from; start: the adapters of data/adapters to begin with, whose
    changes to the weights add up.
    """

    name: str
    style: str
    lr: float | None  # None: as `start` left it
    first: "Variant | None" = None
    start: tuple[str, ...] = ()


TEXT = Variant("text", "text", 1e-3)
VARIANTS = {  # the paper's four, from the pretrained LLM; three at a lower rate; then those that begin with lessons
    variant.name: variant
    for variant in (
        TEXT,
        Variant("codes_only", "codes", 1e-3),
        Variant("one_step", "text+codes", 1e-3),
        Variant("two_step", "text+codes", 5e-4, first=TEXT),
        Variant("text, lr 3e-4", "text", 3e-4),
        Variant("codes_only, lr 3e-4", "codes", 3e-4),
        Variant("one_step, lr 3e-4", "text+codes", 3e-4),
        Variant("code lessons", "text+codes", None, start=("literacy",)),
        Variant("pairs one_step", bx.BIT_BY_BIT, 1e-4, start=("pairs",)),
        Variant("both one_step", bx.BIT_BY_BIT, 1e-4, start=("pairs", "all_titles")),
        Variant("bit lessons", bx.BIT_BY_BIT, None, start=("pairs",)),
        Variant("both lessons", bx.BIT_BY_BIT, None, start=("pairs", "all_titles")),
        Variant("title lessons", "text", None, start=("all_titles",)),
        Variant("title lessons, ratings", "text", 1e-4, start=("all_titles",)),
    )
}
TUNING_VERSION = 1  # raise it when a change of `build_prompts` or `tune` changes what is learned


@dataclass(frozen=True)
class Run:
    """What is asked of one tuned LLM. history: what `bu.build_prompts` shows; valid: how many valid rows; test: whether
    test rows are asked too; turned: codes from their last bit to their first, for no bit has a place of its own.
    """

    variant: str
    fmt: str = "bits"
    nf4: bool = True
    history: str = "sitting"
    valid: int = 1000
    test: bool = True
    turned: bool = False


RUNS = {
    "text": Run("text"),
    "one_step": Run("one_step"),
    "codes_only": Run("codes_only"),
    "two_step": Run("two_step"),
    "one_step dotted": Run("one_step", "dotted"),
    "two_step dotted": Run("two_step", "dotted"),
    "pairs one_step": Run("pairs one_step"),
    "both one_step": Run("both one_step"),
    "code lessons": Run("code lessons", nf4=False),  # as it was taught
    "bit lessons": Run("bit lessons"),
    "bit lessons, last bit first": Run("bit lessons", turned=True),
    "both lessons": Run("both lessons"),
    "title lessons": Run("title lessons", valid=3000),  # `cold.py` learns from them
    "title lessons, ratings": Run("title lessons, ratings"),
    "codes_only, float32": Run("codes_only", nf4=False),
    "text, history by row": Run("text", history="row", test=False),
    **{f"{name}, lr 3e-4": Run(f"{name}, lr 3e-4", test=False) for name in ("text", "codes_only", "one_step")},
}


def tuned_llm(dataset, codes, profile, run, seed=0):
    """(model, tokenizer, learning curve) of the profile's LLM tuned as `run` says, now or read from the cache.

    All that determines it is in its card, whose digest is in the folder's name. A run that was cut short goes on where
    it was. The rows are whole sittings, the same for every run of a seed.
    """
    card = card_of(dataset, codes, profile, run, VARIANTS[run.variant], seed)
    with bu.alone(kept_adapter(profile, card)):  # runs that want the same wait for the first
        return _tuned(dataset, codes, profile, run, seed, card)


def _tuned(dataset, codes, profile, run, seed, card):
    variant, folder = VARIANTS[run.variant], kept_adapter(profile, card)
    done = folder.exists()
    if variant.first and not done:
        first = Run(variant.first.name, nf4=run.nf4, history=run.history)
        model, tokenizer, before = tuned_llm(dataset, codes, profile, first, seed)
    else:
        model, tokenizer = bu.load_llm(profile.llm, nf4=run.nf4, layers=profile.layers)
    if model.name_or_path == SMOLLM2_HUB != card["llm"]:  # the registry failed; these are other weights
        raise OSError(f"the LLM is {model.name_or_path}, the record is of {card['llm']}; try again later")
    if done:
        return bu.load_adapter(model, folder), tokenizer, pd.read_csv(folder / "curve.csv")
    if card["start"]:
        model, curve = started(model, variant.start)
        if variant.lr is None:
            return model, tokenizer, curve
    rows = bu.sample_sittings(dataset, profile.tune_rows, seed)
    prompts = bu.build_prompts(dataset, rows, codes, variant.style, run.fmt, history=run.history)
    kept = bu.CACHE / "checkpoints" / folder.name
    options = {"lora": profile.lora, "lr": variant.lr, "seed": seed, "folder": kept}
    model, curve = bu.tune(model, tokenizer, prompts, rows.label, **options)
    if variant.first:
        curve["seconds"] += before.seconds.iloc[-1]  # both steps count
    card |= {"steps": len(curve), "seconds": round(curve.seconds.iloc[-1], 1)} | records.stamps()
    bu.save_adapter(model, folder, card, curve)
    shutil.rmtree(kept, ignore_errors=True)
    return model, tokenizer, curve


def kept_adapter(profile, card):
    """Folder of the cache for the adapter of a `card_of`."""
    return bu.CACHE / "adapters" / f"{profile.name}-{card['variant'].replace(' ', '-')}-{bu.digest(card)}"


def started(model, names):
    """(model, learning curve) with adapters of data/adapters; of several the sum, as one of as many ranks together."""
    folders = [bu.ROOT / "data" / "adapters" / name for name in names]
    for folder in folders[1:]:
        model = bu.load_adapter(model, folder).unload()  # peft itself would take one of another LLM
    model, curve = bu.load_adapter(model, folders[0]), pd.read_csv(folders[0] / "curve.csv")
    for folder in folders[1:]:
        more = pd.read_csv(folder / "curve.csv")
        curve = pd.concat([curve, more.assign(seconds=more.seconds + curve.seconds.iloc[-1])], ignore_index=True)
    if len(names) > 1:
        for folder in folders:
            model.load_adapter(folder, folder.name)
        model.set_adapter(names[0])
        model.delete_adapter("default")
        model.add_weighted_adapter(names, [1.0] * len(names), "default", combination_type="cat")
        model.set_adapter("default")  # the one that is tuned on and saved
        for name in names:
            model.delete_adapter(name)
    return model.eval(), curve


def shipped_sha256(*names):
    """SHA-256 of the weights of adapters in data/adapters: taught anew, they are others."""
    weights = (bu.ROOT / "data" / "adapters" / name / "adapter_model.safetensors" for name in names)
    return hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()


def card_of(dataset, codes, profile, run, variant, seed):
    """All that determines what `tuned_llm` makes, as a dict of plain values."""
    start = " + ".join(variant.start) if fits(variant.start, profile) else None
    card = {"variant": variant.name, "style": variant.style, "lr": variant.lr, "start": start, "seed": seed}
    card |= {"data": dataset.name, "rows": bu.digest(dataset.train, list(dataset.titles))}
    card |= {"tune_rows": profile.tune_rows, "llm": profile.llm or bu.SMOLLM2, "layers": profile.layers}
    if start:  # taught anew, it is another start
        card["start_sha256"] = shipped_sha256(*variant.start)
    card |= {"lora": profile.lora, "nf4": run.nf4, "history": run.history, "version": TUNING_VERSION}
    if variant.style != "text":
        card |= {"format": run.fmt, "codes": bu.digest(codes.users, codes.items)}
    if variant.first:
        card["first"] = card_of(dataset, codes, profile, run, variant.first, seed)
    return card


def fits(start, profile):
    """Whether there are adapters to start from, all for the profile's LLM; a line says so where one is not."""
    for name in start:
        card = json.loads((bu.ROOT / "data" / "adapters" / name / "card.json").read_text())
        if profile.layers or card["llm"] != (profile.llm or bu.SMOLLM2):
            print(f"the adapter {name} is for the whole {card['llm']}; this LLM begins without it")
            return False
    return bool(start)


def answer(name, seed, dataset, profile):
    """One of RUNS on valid rows and on the profile's test rows; `seed` draws training rows, LoRA matrices and codes."""
    run, title = RUNS[name], f"{name}, seed {seed}" if seed else name
    codes = bu.cached_codes(dataset, 32, seed, "past" if dataset.name == "ml-1m-past" else "ste")
    if run.turned:
        codes = bu.Codes(codes.users[:, ::-1], codes.items[:, ::-1])
    variant = VARIANTS[run.variant]
    card = card_of(dataset, codes, profile, run, variant, seed)
    if variant.lr is None and not card["start"]:
        return print(f"{title}: nothing to ask without its adapter", flush=True)
    folder = kept_in(profile, dataset)
    rows = {"valid": bu.sample_rows(dataset.valid, run.valid, seed=1), "test": dataset.test}
    if profile.eval_rows < len(dataset.test):
        rows = {"valid": rows["valid"].head(20), "test": bu.sample_rows(dataset.test, profile.eval_rows)}
    if not run.test:
        del rows["test"]
    asked = {"run": title, "profile": profile.name, "made_from": bu.digest(card, *rows.values())}
    if records.has_row(folder / "runs.csv", asked):
        return print(f"{title}: there already", flush=True)
    model, tokenizer, curve = tuned_llm(dataset, codes, profile, run, seed)
    seconds, count = 0.0, 0
    for split, part in rows.items():
        prompts = bu.build_prompts(dataset, part, codes, variant.style, run.fmt, history=run.history)
        p, part_seconds = score_in_parts(model, tokenizer, prompts, f"{asked['made_from']}-{split}")
        records.keep_answers(folder / f"answers-{profile.name}-{split}.parquet", title, dataset, part, p)
        marks = {"float32": not run.nf4, "history by row": run.history == "row", "last bit first": run.turned}
        what = {"variant": ", ".join([run.variant, *(mark for mark, holds in marks.items() if holds)])}
        if variant.style != "text":
            what |= {"bits": codes.bits, "format": run.fmt}
        what |= {"dataset": dataset.name, "split": split, "seed": seed, "seconds": round(curve.seconds.iloc[-1], 1)}
        records.record(profile, part, p, model="llm", **what)
        seconds, count = seconds + part_seconds, count + len(prompts)
        if split == "valid":  # rows that every run is asked about
            tokens = np.mean([len(ids) for ids in tokenizer(prompts).input_ids])
    row = asked | {"variant": run.variant, "format": run.fmt, "seed": seed, "tuning_rows": int(curve.rows.sum())}
    row |= {"tuning_seconds": round(curve.seconds.iloc[-1], 1), "prompts": count}
    row |= {"seconds_per_prompt": round(seconds / count, 4), "tokens": round(tokens, 1)}
    keep_curve(folder / "curves.csv", title, profile, curve)
    records.put_row(folder / "runs.csv", row, ["run", "profile"])
    for split in rows:
        shutil.rmtree(bu.CACHE / "answers" / f"{asked['made_from']}-{split}", ignore_errors=True)
    print(f"{title}: {count:,} prompts in {seconds:.0f} s", flush=True)


def kept_in(profile, dataset):
    """Where answers and runs of a data set are kept: those of the paper's split beside metrics.csv, others below it."""
    folder = records.results_folder(profile)
    return folder if dataset.name == "ml-1m" else folder / dataset.name


def score_in_parts(model, tokenizer, prompts, key, size=1000):
    """(`bu.score`, seconds), some prompts at a time; each is kept until the run is recorded, so it can be cut short."""
    scores, seconds = [], 0.0
    for start in range(0, len(prompts), size):
        path, began = bu.CACHE / "answers" / key / f"{start}.npz", time.perf_counter()
        if not path.exists():
            p = bu.score(model, tokenizer, prompts[start : start + size])
            with bu.replacing(path) as part, open(part, "wb") as file:
                np.savez(file, p=p, seconds=time.perf_counter() - began)
        with np.load(path, allow_pickle=False) as kept:
            scores.append(kept["p"])
            seconds += float(kept["seconds"])
    return np.concatenate(scores), seconds


def keep_curve(path, title, profile, curve):
    """Put a run's learning curve into curves.csv, in place of an earlier one."""
    records.put_table(path, curve[["step", "rows", "loss"]].round(4), {"run": title, "profile": profile.name})


def own_profile():
    """`bu.current_profile`, `patient` for `cpu` if none was named; another LLM (BINLLM_LLM) has a name of its own."""
    if not os.environ.get("BINLLM_PROFILE") and bu.current_profile().name == "cpu":
        os.environ["BINLLM_PROFILE"] = "patient"
    profile, llm = bu.current_profile(), os.environ.get("BINLLM_LLM")
    return replace(profile, name=f"{profile.name}-{Path(llm).name}") if llm else profile


def main(wanted):
    bu.quiet()
    profile, dataset, past = own_profile(), bu.load_ml1m(), bu.load_ml1m(past="all")
    runs = {name: partial(without_llm, name, dataset) for name in collaborative(dataset, profile)}
    runs |= {f"past: {name}": partial(without_llm, name, past) for name in collaborative(past, profile)}
    runs |= {name: partial(answer, name, 0, dataset) for name in RUNS}
    variants = {name: VARIANTS[run.variant] for name, run in RUNS.items()}
    taught = [name for name, variant in variants.items() if variant.lr is None and variant.style != "text"]
    runs |= {f"past: {name}": partial(answer, name, 0, past) for name in taught}  # codes are what the past changes
    tuned = [name for name, variant in variants.items() if variant.lr]  # seeds change nothing in the others
    runs |= {f"{name}, seed {seed}": partial(answer, name, seed, dataset) for seed in (1, 2) for name in tuned}
    unknown = set(wanted) - set(runs)
    if unknown:
        sys.exit(f"there is no run {unknown.pop()!r}; choose from {', '.join(runs)}")
    usual = [name for name in runs if torch.cuda.is_available() or ", seed" not in name]
    for name in wanted or usual:
        runs[name](profile=profile)


if __name__ == "__main__":
    main(sys.argv[1:])
