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
    ("codes", "ours"): "codes alone, 32 bits",
    ("llm", "text"): "LLM, titles only",
    ("llm", "one_step"): "LLM, titles + codes, one step",
    ("llm", "two_step"): "LLM, titles + codes, two steps",
}


def markdown(header, rows):
    """A Markdown table of `rows` (lists of cells) under `header`."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def results_table(metrics):
    """The rows of metrics.csv: the largest test sets first, then the methods in the order of METHODS."""
    metrics = metrics.fillna({"variant": "", "format": ""})
    metrics["place"] = [list(METHODS).index(key) for key in zip(metrics.model, metrics.variant)]
    rows = []
    order = {"by": ["profile", "rows", "place", "format"], "ascending": [True, False, True, True]}
    for row in metrics.sort_values(**order).itertuples():
        name = METHODS[row.model, row.variant] + (", dotted" if row.format == "dotted" else "")
        auc = f"{row.auc:.4f} [{row.auc_lo:.3f}, {row.auc_hi:.3f}]"
        uauc = f"{row.uauc:.4f} [{row.uauc_lo:.3f}, {row.uauc_hi:.3f}]"
        seconds = "" if pd.isna(row.seconds) else f"{row.seconds:.0f} s"
        rows.append([name, f"{row.rows:,}", auc, uauc, row.users, seconds, row.profile])
    header = ["method", "test rows", "AUC [95 %]", "UAUC [95 %]", "users counted", "training, last step", "profile"]
    return markdown(header, rows) + f"\n\nMade on {' and '.join(sorted(set(metrics.hardware)))}."


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
    what |= {"score_memory": "memory while scoring"}
    rows = []
    for row in bench.itertuples():
        values = [f"{row.ours:.3g}", f"{row.peer:.3g}", row.unit, f"**{row.ratio:.1f}**"]
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
    for name, make in (("metrics", results_table), ("runtimes", runtimes_table), ("bench", bench_table)):
        if (results / f"{name}.csv").exists():
            text = fill(text, name, make(pd.read_csv(results / f"{name}.csv")))
    return text


if __name__ == "__main__":
    text = rendered()
    with bu.replacing(ROOT / "README.md") as part:
        part.write_text(text, encoding="utf-8")
