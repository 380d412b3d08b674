"""Write the tables of README.md and docs/RESULTS.md from the records in data/results; no number is typed by hand.

The prose of README lives in README; only what stands between its marks is renewed. docs/RESULTS.md is all generated.
"""

import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import records

import binllm_utils as bu

METHODS = {
    ("popularity", ""): "popularity (no learning)",
    ("mf", "paper"): "matrix factorisation, 256 numbers",
    ("mf_bias", ""): "matrix factorisation with biases, 8 numbers",
    ("continuous", "reference"): "the authors' encoder, never binary",
    ("continuous", "hybrid"): "continuous model with biases and features",
    ("codes", "paper"): "codes alone, the paper's formula",
    ("codes", "reference"): "codes alone, the authors' code",
    ("codes", "ste"): "**codes alone, trained through the sign**",
    ("codes", "ste, no features"): "codes alone, through the sign, no features",
    ("codes", "ste, no scale"): "codes alone, through the sign, logit a plain sum",
    ("codes", "ste, no dropout"): "codes alone, through the sign, no dropout",
    ("codes", "ste, no average"): "codes alone, through the sign, no average of weights",
    ("codes", "ste, none of these"): "codes alone, through the sign, none of these four",
    ("codes", "reference, not annealed"): "codes alone, the authors' code, not annealed",
    ("codes", "reference, 0 and 1"): "codes alone, the authors' code, codes of 0 and 1",
    ("codes", "distinct"): "codes alone, through the sign, distinct",
    ("codes", "past"): "**codes alone, trained through the sign**",
    ("codes", "descent"): "codes alone, by descent",
    ("llm", "text"): "LLM, titles only",
    ("llm", "text, history by row"): "LLM, titles only, history by row",
    ("llm", "codes_only"): "LLM, codes only",
    ("llm", "codes_only, float32"): "LLM, codes only, unpacked to float32",
    ("llm", "one_step"): "LLM, titles + codes, one step",
    ("llm", "two_step"): "LLM, titles + codes, two steps",
    ("llm", "text, lr 3e-4"): "LLM, titles only, rate 3e-4 in place of 1e-3",
    ("llm", "codes_only, lr 3e-4"): "LLM, codes only, rate 3e-4",
    ("llm", "one_step, lr 3e-4"): "LLM, titles + codes, one step, rate 3e-4",
    ("llm", "pairs one_step"): "LLM, titles + codes bit by bit",
    ("llm", "text, all ratings"): "LLM, titles only, all ratings",
    ("llm", "codes_only, all ratings"): "LLM, codes only, all ratings",
    ("llm", "one_step, all ratings"): "LLM, titles + codes, one step, all ratings",
    ("llm", "two_step, all ratings"): "LLM, titles + codes, two steps, all ratings",
    ("llm", "bit lessons"): "LLM taught by made-up codes, bit by bit",
    ("llm", "bit lessons, last bit first"): "LLM taught by made-up codes, bit by bit, last bit first",
    ("llm", "code lessons, float32"): "LLM taught by made-up codes, the paper's prompt, unpacked to float32",
    ("llm", "both lessons"): "LLM taught by made-up codes and by titles",
    ("llm", "title lessons"): "LLM, titles only, taught by title lessons",
    ("llm", "title lessons, ratings"): "LLM, titles only, title lessons and then ratings",
}
README_ROWS = 10
WHAT = {  # bench.csv
    "codes_fit": "training codes",
    "score": "scoring rows of whole users",
    "score_unrelated": "scoring one row a user",
    "score_memory": "memory while scoring",
    "score_candidates": "scoring 200 films for one user",
    "hamming": "ten nearest of a million codes, 2,000 times",
    "tune": "tuning on titles and codes, whole sittings",
    "tune_text": "tuning on titles only, whole sittings",
    "tune_titles": "tuning on title lessons",
    "tune_bits": "tuning on bit lessons, 8 bits, bit by bit",
    "tune_memory": "memory while tuning",
    "score_roofline": "speed of scoring against the machine's products",
    "tune_roofline": "speed of tuning against the machine's products",
    "qlora": "4-bit tuning of a 7B model on a GPU",
    "qlora_memory": "memory of that",
    "qlora_roofline": "speed of that against the machine's products",
}


RECORDED = {  # records that are shown whole: their title, and what to know
    "ml-100k/verdict": (
        "Another data set: MovieLens-100K, its latest tenth",
        "By `scripts/verdict.py`, on weights in four bits: see notebook 10. Seconds are of tuning, and of one answer.",
    ),
    "runs": (
        "How each LLM was tuned and asked",
        "Seconds are of different days and machines, and tuning in two steps counts both; they are no comparison.",
    ),
    "ml-1m-past/runs": (
        "The same, with codes of the whole past",
        "Lessons with made-up codes, no rating as an answer.",
    ),
    "families": (
        "Three families: new tokens, mapped embeddings, text codes",
        "By `scripts/families.py`: see notebook 08. `others`: weights tuned beside LoRA's. Minutes are no comparison.",
    ),
    "past_tried": (
        "Tried on the whole past, 10,401 valid rows",
        "The continuous model, and codes made of it by descent; by hand, on two cores AMD EPYC. `penalty`: on squares.",
    ),
    "llama_cpp": (
        "The exported file in llama.cpp itself",
        "By `benchmarks/llama_cpp.py`: how far its P(Yes) is from the tuned model's, at most.",
    ),
    "drills": (
        "Drills: what was tried and lost",
        "By `make fuzz`: input of every kind, and runs that were killed, starved or given company.",
    ),
    "soak_runs": (
        "`make run` several times in a row",
        "By `benchmarks/soak.py runs`, on an earlier state of the notebooks; the tests compare these cells' output.",
    ),
    "runtimes": ("Run times of the notebooks", "By `make release`, each on the machine that it names."),
}


def markdown(header, rows):
    """A Markdown table of `rows` (lists of cells) under `header`."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def read_metrics(path):
    """The rows of metrics.csv. Raises ValueError, naming file and line, for one that cannot be put into a table."""
    metrics = records.read_table(
        path, records.METRIC_COLUMNS, ["auc", "uauc", "auc_lo", "auc_hi", "uauc_lo", "uauc_hi"]
    )
    metrics = metrics.fillna({"variant": "", "format": "", "bits": 0, "model": "", "split": "", "profile": ""})
    seconds = pd.to_numeric(metrics.seconds, errors="coerce")
    for bad, what in (
        (seconds.isna() & metrics.seconds.notna(), "{seconds} seconds; give a number or nothing"),
        (~pd.to_numeric(metrics.bits, errors="coerce").between(0, 4096), "{bits} bits; no code has that many"),
        (~(pd.to_numeric(metrics.rows, errors="coerce") >= 1), "{rows} rows; a result has one or more"),
        (
            (metrics.auc_lo > metrics.auc_hi) | (metrics.uauc_lo > metrics.uauc_hi),
            "an interval that ends before it begins",
        ),
        (metrics.duplicated(records.METRIC_COLUMNS[:9]), "the same result is there twice; drop one"),
        (metrics.seed.isna() & (metrics.model != "popularity"), "a {model} without its seed; run make results"),
    ):
        if bad.any():
            raise ValueError(f"{path}, line {bad.idxmax() + 2}: {what.format(**metrics.loc[bad.idxmax()])}")
    return metrics.astype({"bits": int, "rows": int})


def results_table(metrics):
    """One line a method on the same rows, seeds together, in METHODS' order and then by name."""
    order = {key: place for place, key in enumerate(METHODS)}
    place = [order.get(key, len(order)) for key in zip(metrics.model, metrics.variant)]
    rows = []
    for _, seeds in metrics.assign(place=place).groupby(["place", "model", "variant", "bits", "format"]):
        row = seeds.iloc[0]
        name = METHODS.get((row.model, row.variant), f"{row.model}, {row.variant}") + (
            f", {row.bits} bits" if row.bits else ""
        )
        name += {"dotted": ", dotted", "hex": ", hexadecimal"}.get(row.format, "")
        cells = []
        for metric in ("auc", "uauc"):
            spread = f" ± {seeds[metric].std():.4f}" if len(seeds) > 1 else ""
            low, high = seeds[f"{metric}_lo"].mean(), seeds[f"{metric}_hi"].mean()
            cells.append(f"{seeds[metric].mean():.4f}{spread} [{low:.3f}, {high:.3f}]")
        rows.append([name, len(seeds), *cells, "" if seeds.seconds.isna().all() else f"{seeds.seconds.mean():.0f} s"])
    return markdown(["method", "seeds", "AUC [95 %]", "UAUC [95 %]", "training"], rows)


def results_page(folder):
    """docs/RESULTS.md: every row of the records, grouped by the rows that they were measured on."""
    metrics = read_metrics(folder / "metrics.csv")
    parts = ["# Results", "Generated by `make results` from `data/results`; every number is a record there."]
    parts += [
        "± is the standard deviation over seeds; intervals are over users (bootstrap), with several seeds their mean."
    ]
    parts += ["LLM rows are of NF4 weights where the name says nothing else; all were unpacked from a 4-bit file."]
    groups = metrics.groupby(["dataset", "split", "rows", "profile"], sort=False)
    for (data, split, size, profile), rows in groups:
        learned = ", learned from the whole past" if data == "ml-1m-past" else ""
        parts += [f"## {size:,} {split} rows, profile {profile}{learned}", results_table(rows)]
        parts += [f"Made on {' and '.join(sorted(set(rows.hardware)))}; {rows.users.iloc[0]} users count for UAUC."]
    if (folder / "cold.csv").exists():
        parts += ["## What titles add, by how often a film was rated in training", cold_table(folder / "cold.csv")]
        parts += [
            "By `scripts/cold.py`. *more*: the paired difference from `base`, mean of the seeds; in brackets, with how "
            "many of them it is surely up or down, its interval over users all above or below zero."
        ]
        parts += [
            "Cold: each film in turn, its ratings hidden from all that learned; never asked: the fifth that no "
            "lesson asked about. Whole past: the codes alone know it, the LLM does not."
        ]
    for name, (title, note) in RECORDED.items():
        if (folder / f"{name}.csv").exists():
            table = pd.read_csv(folder / f"{name}.csv").drop(
                columns=["made_from", "versions", "commit"], errors="ignore"
            )
            table = table.sort_values("notebook") if "notebook" in table else table
            cells = table.astype(object).fillna("").to_numpy().tolist()
            parts += [f"## {title}", markdown(list(table.columns), cells), note]
    columns = ["source", "where", "system", "llm", "run", "auc", "uauc"]
    published = records.read_table(ROOT / "data" / "published.csv", columns, ["auc", "uauc"])
    parts += [
        "## What others have published on these test rows",
        markdown(list(published.columns), published.astype(object).fillna("").to_numpy().tolist()),
    ]
    if (folder / "bench.csv").exists():
        parts += ["## Speed and memory, side by side", bench_table(pd.read_csv(folder / "bench.csv"))]
    return "\n\n".join(parts) + "\n"


def cold_table(path):
    """The test rows of cold.csv, seeds together."""
    table, rows = pd.read_csv(path), []
    table = table[table.split == "test"]
    for (films, method), seeds in table.groupby(["films", "method"], sort=False):
        cells = [films, method, int(seeds.rows.iloc[0]), len(seeds)]
        for metric in ("auc", "uauc"):
            more, low, high = (seeds[f"{metric}_{name}"] for name in ("more", "more_lo", "more_hi"))
            sure = f"{(low > 0).sum()} up, {(high < 0).sum()} down"
            cells += [f"{seeds[metric].mean():.3f}", "" if more.isna().all() else f"{more.mean():+.3f} ({sure})"]
        rows.append([*cells, seeds.base.fillna("").iloc[0]])
    return markdown(["films", "method", "rows", "seeds", "AUC", "more", "UAUC", "more", "base"], rows)


def runtimes_table(runtimes):
    """What `make run` prints first and last, as measured on a CPU."""
    runtimes = runtimes[runtimes.profile == "cpu"].sort_values("notebook")
    lines = [f"profile cpu on {runtimes.hardware.iloc[0]}: {len(runtimes)} notebooks"]
    for place, row in enumerate(runtimes.itertuples(), 1):
        lines.append(f"[{place}/{len(runtimes)}] {row.notebook}.ipynb: {row.minutes:.1f} min, {row.peak_gb:.1f} GB")
    total = f"That is {runtimes.minutes.sum():.0f} minutes and {runtimes.peak_gb.max():.1f} GB of memory at the peak."
    return "\n".join(["```", *lines[:3], "…", lines[-1], "```", "", total])


def bench_table(bench):
    """The rows of bench.csv."""
    rows = []
    for row in bench.itertuples():
        values = [f"{row.ours:.3g}", f"{row.peer:.3g}", row.unit, f"**{row.ratio:.{1 if row.ratio >= 1 else 2}f}**"]
        rows.append([WHAT.get(row.bench, row.bench), *values, f"{row.peer_name} ({row.peer_version})"])
    return markdown(["what", "here", "plain way", "unit", "times better", "the plain way"], rows)


def readme_table(metrics):
    """What README shows, all measured on the same rows: the whole test split; a test holds it to README_ROWS."""
    test = metrics[(metrics.split == "test") & (metrics.dataset == "ml-1m")]
    whole = test[test.rows == test.rows.max()]
    whole = whole[whole.bits.isin([0, 32]) & (whole.format != "dotted")]
    every = whole[whole.variant.isin(["text", "codes_only", "one_step", "two_step"])]
    every = every[(every.profile == "full") & (every.seed == 0)]  # one draw, and so the same codes
    keys = [("popularity", ""), *(("codes", recipe) for recipe in ("reference", "ste", "ste, no features"))]
    keys += [("llm", "codes_only"), ("llm", "bit lessons")]
    shown = pd.Series([key in keys for key in zip(whole.model, whole.variant)], whole.index)
    shown &= whole.profile == "patient"
    return results_table(pd.concat([whole[shown], every.assign(variant=every.variant + ", all ratings")]))


def fill(text, name, table):
    """`text` with `table` between the marks of block `name`."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = text.split(begin)
    return before + begin + table + "\n" + end + rest.split(end)[1]


def rendered():
    """(README.md, docs/RESULTS.md) made anew from the records that are there."""
    folder, text = ROOT / "data" / "results", (ROOT / "README.md").read_text(encoding="utf-8")
    text = fill(text, "metrics", readme_table(read_metrics(folder / "metrics.csv")))
    if (folder / "runtimes.csv").exists():
        text = fill(text, "runtimes", runtimes_table(pd.read_csv(folder / "runtimes.csv")))
    return text, results_page(folder)


if __name__ == "__main__":
    for path, text in zip((ROOT / "README.md", ROOT / "docs" / "RESULTS.md"), rendered()):
        with bu.replacing(path) as part:
            part.write_text(text, encoding="utf-8")
