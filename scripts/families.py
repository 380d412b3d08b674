"""Three ways to tell a language model who and what is asked about, compared: notebook 08, section 5.

python scripts/families.py                        all that is missing; goes on where it was stopped
python scripts/families.py "mapped embeddings"    some

Without a GPU the profile is `patient`, with one `full`, as in results.py. New tokens and mapped embeddings are tuned
here, by the cells of the notebook that are tagged "families": what is recorded is what is shown. Titles only and text
codes are runs of results.py on the same rows; their answers must be there.

The files: families.csv, a line for each rate on valid, and for the one that is best there on test;
families-PROFILE.parquet, P(Yes) of the two tuned here, a line a test row.
"""

import shutil
import sys
from pathlib import Path

import nbformat
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import records
import results

import binllm_utils as bu
from binllm_llm import with_lora

RATES = {"new tokens": (3e-4, 1e-3, 3e-3), "mapped embeddings": (3e-4, 1e-3, 3e-3)}  # one step, from the pretrained LLM
RUNS = {
    "titles only": "text",
    "text codes": "one_step",
    "codes only": "codes_only",
    "text codes, taught": "bit lessons",
}
VERSION = 1  # raise it when a change of the cells changes what is learned


def lesson(profile):
    """What the cells of notebook 08 tagged "families" define: {name: what it stands for}."""
    book = nbformat.read(ROOT / "notebooks" / "08_what_titles_add.ipynb", as_version=4)
    scope = {"bu": bu, "profile": profile}
    for cell in book.cells:
        if "families" in cell.metadata.get("tags", ()):
            exec(cell.source, scope)
    return scope


def tuned(scope, family, lr, profile, folder, seed=0):
    """(model, tokenizer, learning curve) of a family with vectors of its own; `folder` keeps the checkpoint."""
    rows = bu.sample_sittings(scope["dataset"], profile.tune_rows, seed)
    model, tokenizer = bu.load_llm(profile.llm, layers=profile.layers)
    torch.manual_seed(seed)
    model = with_lora(model, profile.lora)  # first: it freezes all that is there
    scope["with_ids"](model, tokenizer, family)
    prompts = scope["prompts_of"](family, rows)
    return model, tokenizer, bu.tune(model, tokenizer, prompts, rows.label, lr=lr, seed=seed, folder=folder)[1]


def with_vectors(family, scope, profile, parts):
    """Tune `family` at each of its RATES and ask about valid; at the one that is best there ask about test."""
    dataset, codes = scope["dataset"], scope["codes"]
    folder = results.kept_in(profile, dataset)
    how = [VERSION, results.TUNING_VERSION, profile.llm, profile.layers, profile.lora, profile.tune_rows]
    made_from = bu.digest(how, dataset.train, *parts.values(), codes.users, codes.items)
    keys = {lr: f"{profile.name}-{family.replace(' ', '-')}-{lr}-{made_from}" for lr in RATES[family]}

    def ask(lr, split):
        """AUC on a split; from the records, if it is there."""
        row = {"family": family, "profile": profile.name, "split": split, "lr": lr, "made_from": made_from}
        if not records.has_row(folder / "families.csv", row):
            *llm, curve = tuned(scope, family, lr, profile, bu.CACHE / "checkpoints" / keys[lr])
            p, _ = results.score_in_parts(*llm, scope["prompts_of"](family, parts[split]), f"{keys[lr]}-{split}")
            if split == "test":
                records.keep_answers(folder / f"families-{profile.name}.parquet", family, dataset, parts[split], p)
            cost = {"tuning_rows": int(curve.rows.sum()), "seconds": curve.seconds.iloc[-1]}
            keep(profile, row, scope, cost, llm, parts[split], p)
            shutil.rmtree(bu.CACHE / "answers" / f"{keys[lr]}-{split}")
        table = pd.read_csv(folder / "families.csv", dtype={"made_from": str})
        return table.loc[(table[list(row)] == list(row.values())).all(axis=1), "auc"].item()

    best = max(RATES[family], key=lambda lr: ask(lr, "valid"))
    print(f"{family}: AUC {ask(best, 'test')} on test at the rate {best}", flush=True)
    for key in keys.values():  # until here the best one was still needed
        shutil.rmtree(bu.CACHE / "checkpoints" / key, ignore_errors=True)


def from_results(family, scope, profile, parts):
    """The line of a run of results.py: its answers as they are recorded, and its model, where that is still there."""
    dataset, codes, run = scope["dataset"], scope["codes"], results.RUNS[RUNS[family]]
    variant, folder = results.VARIANTS[run.variant], results.kept_in(profile, dataset)
    path, name = folder / "runs.csv", RUNS[family]
    if not records.has_row(path, {"run": name, "profile": profile.name}):
        raise OSError(f"{path}: no run {name!r} of {profile.name}; python scripts/results.py makes it")
    made = pd.read_csv(path, dtype={"made_from": str}).set_index(["run", "profile"]).loc[name, profile.name]
    row = {"family": family, "profile": profile.name, "split": "test", "lr": variant.lr, "made_from": made.made_from}
    if records.has_row(folder / "families.csv", row):
        return print(f"{family}: there already", flush=True)
    p = records.read_answers(folder / f"answers-{profile.name}-test.parquet", dataset)[name]
    cost = {"tuning_rows": made.tuning_rows, "seconds": made.tuning_seconds}
    card = results.card_of(dataset, codes, profile, run, variant, 0)
    there = variant.lr is None or results.kept_adapter(profile, card).exists()
    llm = results.tuned_llm(dataset, codes, profile, run)[:2] if there else None
    keep(profile, row, scope, cost, llm, parts["test"], p[parts["test"].index].to_numpy())
    print(f"{family}: recorded", flush=True)


def keep(profile, row, scope, cost, llm, rows, p):
    """Put one line into families.csv: what was tuned, how long it took, its metrics, and how it reads plain text."""
    row = row | {"tuning_rows": cost["tuning_rows"], "rows": len(rows), "minutes": round(cost["seconds"] / 60, 1)}
    tuned_too = [p.numel() for name, p in llm[0].named_parameters() if ".vectors." in name] if llm else []
    row["others"] = sum(tuned_too)  # weights beside LoRA's
    row |= bu.evaluate(rows, p) | {"perplexity": round(scope["perplexity"](*llm), 2) if llm else None}
    key = ["family", "profile", "split"] + ["lr"] * (row["split"] == "valid")  # of rates one is asked about test
    records.put_row(results.kept_in(profile, scope["dataset"]) / "families.csv", row, key)


def main(wanted):
    bu.quiet()
    families = {family: with_vectors for family in RATES} | {family: from_results for family in RUNS}
    unknown = set(wanted) - set(families)
    if unknown:
        sys.exit(f"there is no family {unknown.pop()!r}; choose from {', '.join(families)}")
    profile = results.own_profile()
    scope = lesson(profile)
    parts = {"valid": bu.sample_rows(scope["dataset"].valid, 1000, seed=1), "test": scope["dataset"].test}
    for family in wanted or families:
        families[family](family, scope, profile, parts)


if __name__ == "__main__":
    main(sys.argv[1:])
