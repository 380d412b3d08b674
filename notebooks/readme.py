"""Write the README's tables from the records in data/results, so that no number there is typed by hand."""

import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import binllm_utils as bu

METHODS = {
    ("popularity", ""): "popularity (no learning)",
    ("mf", "paper"): "matrix factorisation, 256 numbers",
    ("mf_bias", ""): "matrix factorisation with biases, 8 numbers",
    ("codes", "paper"): "codes alone, the paper's formula",
    ("codes", "reference"): "codes alone, the authors' code",
    ("continuous", "reference"): "the same, never binary",
    ("codes", "ours"): "**codes alone, ours**",
    ("codes", "so_far"): "ours, unseen users by their past so far",
    ("continuous", "ours"): "ours before the sign",
    ("llm", "text"): "LLM, titles only",
    ("llm", "codes_only"): "LLM, codes only",
    ("llm", "one_step"): "LLM, titles + codes, one step",
    ("llm", "two_step"): "LLM, titles + codes, two steps",
    ("llm", "long"): "LLM, titles + codes, the long run",
    ("llm", "long_so_far"): "the same, unseen users by their past so far",
}


def markdown(header, rows):
    """A Markdown table of `rows` (lists of cells) under `header`."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def read_metrics(path):
    """The rows of metrics.csv. Raises ValueError, naming file and line, for one that cannot be put into a table."""
    metrics = pd.read_csv(path)
    if list(metrics.columns) != bu.METRIC_COLUMNS:
        raise ValueError(f"{path}: its columns are not those of this version; move it away and run make results")
    unknown = [key not in METHODS for key in zip(metrics.model, metrics.variant.fillna(""))]
    for bad, what in (
        (metrics.duplicated(bu.METRIC_COLUMNS[:9]), "the same result is there twice; drop one"),
        (metrics.seed.isna() & (metrics.model != "popularity"), "a {model} without its seed; run make results"),
        (pd.Series(unknown, dtype=bool), "no method is called {model} {variant}; name it in METHODS of readme.py"),
    ):
        if bad.any():
            raise ValueError(f"{path}, line {bad.idxmax() + 2}: {what.format(**metrics.loc[bad.idxmax()])}")
    return metrics


def results_table(metrics):
    """The rows of metrics.csv, seeds together: the largest test sets first, then the methods in METHODS' order."""
    metrics = metrics.fillna({"variant": "", "format": "", "bits": 0}).astype({"bits": int})
    metrics["place"] = [list(METHODS).index(key) for key in zip(metrics.model, metrics.variant)]
    metrics["size"] = -metrics.rows
    rows = []
    for _, seeds in metrics.groupby(["profile", "size", "place", "bits", "format"]):
        row = seeds.iloc[0]
        name = METHODS[row.model, row.variant] + (f", {row.bits} bits" if row.bits else "")
        name += {"dotted": ", dotted", "hex": ", hexadecimal"}.get(row.format, "")
        cells = []
        for metric in ("auc", "uauc"):
            spread = f" ± {seeds[metric].std():.4f}" if len(seeds) > 1 else ""
            low, high = seeds[f"{metric}_lo"].mean(), seeds[f"{metric}_hi"].mean()
            cells.append(f"{seeds[metric].mean():.4f}{spread} [{low:.3f}, {high:.3f}]")
        seconds = "" if seeds.seconds.isna().all() else f"{seeds.seconds.mean():.0f} s"
        rows.append([name, f"{row.rows:,}", len(seeds), *cells, row.users, seconds, row.profile])
    header = ["method", "test rows", "seeds", "AUC [95 %]", "UAUC [95 %]", "users", "last training", "profile"]
    note = "± is the standard deviation over seeds; intervals are over users, with several seeds their mean."
    return markdown(header, rows) + f"\n\n{note} Made on {' and '.join(sorted(set(metrics.hardware)))}."


def runtimes_table(runtimes):
    """What `make run` prints, as measured on a CPU."""
    runtimes = runtimes[runtimes.profile == "cpu"].sort_values("notebook")
    lines = [f"profile cpu on {runtimes.hardware.iloc[0]}: {len(runtimes)} notebooks"]
    for place, row in enumerate(runtimes.itertuples(), 1):
        lines.append(f"[{place}/{len(runtimes)}] {row.notebook}.ipynb: {row.minutes:.1f} min, {row.peak_gb:.1f} GB")
    total = f"That is {runtimes.minutes.sum():.0f} minutes and {runtimes.peak_gb.max():.1f} GB of memory at the peak"
    return "\n".join(["```", *lines, "pictures: figures", "results:  data/results/metrics.csv", "```", "", total + "."])


def bench_table(bench):
    """The rows of bench.csv."""
    what = {"codes_fit": "training codes", "uauc": "UAUC of a million rows", "score": "scoring prompts"}
    what |= {
        "score_memory": "memory while scoring",
        "score_candidates": "scoring 200 films for one user",
        "hamming": "ten nearest of a million codes, 2,000 times",
        "tune": "tuning prompts",
        "tune_memory": "memory while tuning",
        "score_roofline": "speed of scoring",
        "tune_roofline": "speed of tuning",
        "qlora": "4-bit tuning of a 7B model on a GPU",
        "qlora_memory": "memory of that",
        "qlora_roofline": "speed of that",
    }
    rows = []
    for row in bench.itertuples():
        values = [f"{row.ours:.3g}", f"{row.peer:.3g}", row.unit, f"**{row.ratio:.{1 if row.ratio >= 1 else 2}f}**"]
        rows.append([what[row.bench], *values, f"{row.peer_name} ({row.peer_version})"])
    return markdown(["what", "here", "plain way", "unit", "times better", "the plain way"], rows)


def fill(text, name, table):
    """`text` with `table` between the marks of block `name`."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = text.split(begin)
    return before + begin + table + "\n" + end + rest.split(end)[1]


def rendered():
    """The README with all tables made anew from the records that are there."""
    text, results = (ROOT / "README.md").read_text(encoding="utf-8"), ROOT / "data" / "results"
    tables = {"metrics": (read_metrics, results_table), "runtimes": (pd.read_csv, runtimes_table)}
    for name, (read, make) in (tables | {"bench": (pd.read_csv, bench_table)}).items():
        if (results / f"{name}.csv").exists():
            text = fill(text, name, make(read(results / f"{name}.csv")))
    return text


if __name__ == "__main__":
    text = rendered()
    with bu.replacing(ROOT / "README.md") as part:
        part.write_text(text, encoding="utf-8")
