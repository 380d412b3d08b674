"""Write the README's tables and findings from the records in data/results, so that no number is typed by hand."""

import json
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
    ("llm", "bit_by_bit"): "LLM, titles + codes bit by bit, one step",
    ("llm", "long"): "LLM, titles + codes bit by bit, the long run",
    ("llm", "long_so_far"): "the same, every user by their past so far",
}
# The line of data/published.csv that stands for the same as our rows of a model, variant and format.
PUBLISHED = {
    ("mf", "paper", ""): "MF",
    ("codes", "paper", ""): "codes alone",
    ("codes", "reference", ""): "codes alone",
    ("llm", "text", ""): "text",
    ("llm", "codes_only", "bits"): "codes_only",
    ("llm", "one_step", "bits"): "one_step",
    ("llm", "two_step", "bits"): "two_step",
    ("llm", "two_step", "dotted"): "two_step dotted",
}
SHOWN_ROWS = 500  # the README leaves out what was measured on fewer


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


def published():
    """What the paper prints: the rows of data/published.csv that are its own, by the run they stand for."""
    rows = pd.read_csv(ROOT / "data" / "published.csv").query("source == 'paper'")
    return {row.run: row for row in rows.itertuples()}


def results_table(metrics):
    """The rows of metrics.csv, seeds together: the largest test sets first, then the methods in METHODS' order."""
    metrics = metrics.fillna({"variant": "", "format": "", "bits": 0}).astype({"bits": int})
    metrics["place"] = [list(METHODS).index(key) for key in zip(metrics.model, metrics.variant)]
    metrics["size"] = -metrics.rows
    rows, paper = [], {}
    for run, row in published().items():
        paper[run] = f"{row.auc:.4f}/{row.uauc:.4f}" + " (read off a figure)" * row.where.startswith("Figure")
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
        printed = paper.get(PUBLISHED.get((row.model, row.variant, row.format)), "") if row.bits in (0, 32) else ""
        rows.append([name, f"{row.rows:,}", len(seeds), *cells, printed, row.users, seconds, row.profile])
    header = ["method", "test rows", "seeds", "AUC [95 %]", "UAUC [95 %]", "the paper prints", "users"]
    header += ["last training", "profile"]
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
    what = {"codes_fit": "training codes", "uauc": "UAUC of a million rows", "score": "scoring rows of whole users"}
    what |= {
        "score_unrelated": "scoring one row a user",
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


# `findings` fills the fields in: score, and its (the codes that the long run reads) from metrics.csv, auc and uauc
# (paired differences, second method minus first) from paired.csv, draws (all seeds of a variant) from metrics.csv
# too, run, family, literacy (the last exam) and the long run's chapters from the files so named.
FINDINGS = """\
With {profile.tune_rows} training rows and {run[one_step].minutes:.0f} minutes of tuning on two cores (profile \
`patient`), codes side by side in the prompt raise its AUC on {profile.eval_rows:,} test rows from \
{score[llm text 2000].auc:.3f} to {score[llm one_step 2000].auc:.3f}; the paired difference is {auc[text, one_step]}. \
That is the first of {draws[one_step].n} draws of the training rows; over all of them the means are \
{draws[text].auc:.3f} and {draws[one_step].auc:.3f}, and two draws of the same tuning differ by at most \
{draws[text].spread:.3f} and {draws[one_step].spread:.3f}. What follows is of the first draw.

**What is that worth?** [Notebook 05](notebooks/05_evaluation.ipynb) asks, from answers kept row by row \
([scores-patient-test.csv](data/results/scores-patient-test.csv)):

- The model **comes close to the codes alone and does not pass them**: {score[codes ours 2000].auc:.3f} on the same \
rows, difference {auc[codes alone, one_step]}; in UAUC {uauc[codes alone, one_step]}. With the same rows and the same \
codes written bit by bit it reaches {score[llm bit_by_bit 2000].auc:.3f}, which these rows cannot tell from the codes \
alone: differences {auc[codes alone, bit_by_bit]} and {uauc[codes alone, bit_by_bit]}. Stacking the codes with the \
text-only model, three fitted weights, does as well in AUC.
- **Bit by bit it reads nearly all of them.** The correlation of its logit with Hamming similarity, on valid rows and \
before it has seen a rating, is {literacy[text+codes].correlation:.2f} in the paper's words, \
{literacy[side by side].correlation:.2f} side by side, and {literacy[bit by bit].correlation:.2f} bit by bit, after \
half the lessons. So the adapter in `data/adapters/long` reads them that way, with codes of {its.bits:.0f} bits \
that were chosen on valid. On **all test rows it reaches {score[llm long 7331].auc:.3f}/\
{score[llm long 7331].uauc:.3f}** (AUC/UAUC), those codes alone {its.auc:.3f}/{its.uauc:.3f}; the differences are \
{auc[its codes alone, long]} and {uauc[its codes alone, long]}. The paper prints \
{paper[two_step].auc:.4f}/{paper[two_step].uauc:.4f} for 7 billion weights and two steps, \
{paper[one_step].auc:.4f}/{paper[one_step].uauc:.4f} for one step.
- **Codes that keep up.** The titles in a prompt go up to the row asked about, the codes end with the training months. \
Give every row the code of what its user had rated before it, and the same adapter, tuned no further, reaches \
{score[llm long_so_far 7331].auc:.3f}/{score[llm long_so_far 7331].uauc:.3f} on all test rows: \
against the codes alone as they were {auc[its codes alone, long so far]} in AUC and \
{uauc[its codes alone, long so far]} in UAUC, against the new codes alone \
{auc[its codes so far, long so far]} and {uauc[its codes so far, long so far]}.
- **It is the bits, and only the bits**: random codes bring it to the coin, while false likes, a false title, or \
asking whether the user would *hate* the film change nothing that can be told. {flips:.0%} of single flipped bits move \
P(Yes) in the direction that Hamming similarity predicts.
- **Ratings teach it nothing that lasts.** Codes agree with the rows that they were learned from much better than with \
others, so the long run tunes on later rows, with codes learned from earlier ones, for as long as valid rows gain. On \
them AUC is {long[auc]} and UAUC {long[uauc]} after {long[rows]} of them, where the codes alone have AUC \
{long[hamming_auc]} ([long.csv](data/results/long.csv)): **the adapter kept has seen made-up codes only, and no \
rating**. Even a logistic regression that weighs every bit, fitted on the whole training split, ranks valid rows no \
better than counting equal bits. Nor is there much to learn from the rest of a prompt: the codes stacked with exact \
counts of how often the training rows like this film, and how often this user likes, come to \
{auc[codes alone, codes + counts]} against the codes alone.
- **One step or two** is a toss-up: {auc[one_step, two_step]} on test, and the other way round on valid.
- **Dotted decimal shortens and blinds**: the prompt falls from {run[one_step].tokens:.0f} tokens to \
{run[one_step dotted].tokens:.0f}, and AUC changes by {auc[one_step, one_step dotted]} in one step, by \
{auc[two_step, two_step dotted]} in two; in hexadecimal, {run[one_step hex].tokens:.0f} tokens, by \
{auc[one_step, one_step hex]}. This model was taught to read bits, and a number hides eight of them.
- **Other lengths**, each against 32 bits on the same rows: {auc[one_step, one_step 16 bits]} with 16, \
{auc[one_step, one_step 64 bits]} with 64.
- With *another user's* code the codes alone keep their UAUC and lose AUC: within a user they tell good films from bad \
ones rather than one taste from another.
- **Three families** on {family[text codes].tuning_rows} training rows ([notebook \
06](notebooks/06_three_ways_to_tell_an_llm.ipynb), AUC/UAUC on {family[text codes].rows:,} test rows): titles only \
{family[titles only].auc:.3f}/{family[titles only].uauc:.3f}, new ID tokens \
{family[new tokens].auc:.3f}/{family[new tokens].uauc:.3f}, mapped embeddings (as in CoLLM) \
{family[mapped embeddings].auc:.3f}/{family[mapped embeddings].uauc:.3f}, text codes \
{family[text codes].auc:.3f}/{family[text codes].uauc:.3f}. The last two cannot be told apart. Text codes come with an \
hour of bit literacy, which the others cannot use; the map costs the model's own language: perplexity on plain text is \
{family[mapped embeddings].perplexity:.0f} with it and {family[text codes].perplexity:.0f} with text codes."""


def findings(results):
    """FINDINGS with the numbers of the records in the folder `results`. Raises ValueError where one is missing."""
    names = ("metrics", "paired", "runs", "families", "long", "literacy")
    read = {name: pd.read_csv(results / f"{name}.csv") for name in names}
    metrics = read["metrics"].fillna({"variant": "", "bits": 32, "format": "bits"})
    one = metrics.query("seed == 0 and format == 'bits' and (bits == 32 or variant.str.startswith('long'))")
    fields = {"paper": published(), "score": {f"{row.model} {row.variant} {row.rows}": row for row in one.itertuples()}}
    bits, seed = json.loads((bu.ADAPTERS / "long" / "card.json").read_text())["codes"]
    (fields["its"],) = metrics.query(
        "model == 'codes' and variant == 'ours' and rows == 7331 and bits == @bits and seed == @seed"
    ).itertuples()
    for metric, tests in read["paired"].groupby("metric"):
        fields[metric] = {
            f"{t.a}, {t.b}": f"{t.difference:+.3f} [{t.low:+.3f}, {t.high:+.3f}]" for t in tests.itertuples()
        }
    runs = read["runs"].query("profile == 'patient'").assign(minutes=lambda table: table.tuning_seconds / 60)
    fields["run"] = {row.run: row for row in runs.itertuples()}
    largest = read["families"].query("tuning_rows == tuning_rows.max()")
    fields["family"] = {row.family: row for row in largest.itertuples()}
    exams = read["literacy"].sort_values("after_course").drop_duplicates(["adapter", "prompt"], keep="last")
    fields["literacy"] = {row.prompt: row for row in exams.itertuples()}
    profile = bu.PROFILES["patient"]
    drawn = metrics.query("model == 'llm' and profile == @profile.name and rows == @profile.eval_rows")
    drawn = drawn.groupby("variant").auc.agg(n="size", auc="mean", spread=lambda auc: auc.max() - auc.min())
    fields["draws"] = {row.Index: row for row in drawn.itertuples()}
    chapters = read["long"].query("prompt == 'bit by bit' and bits == @bits")
    fields["long"] = {
        name: ", ".join(f"{x:.3f}" if name.endswith("auc") else f"{x:,}" for x in chapters[name].drop_duplicates())
        for name in ("rows", "auc", "uauc", "hamming_auc")
    }
    flips = pd.read_csv(results / "flips-patient.csv")
    flips = flips[flips.bit.notna()].merge(flips[flips.bit.isna()], on="row", suffixes=("", "_before"))
    as_predicted = (flips.p > flips.p_before) == (flips.similarity > flips.similarity_before)
    try:
        return FINDINGS.format(**fields, profile=profile, flips=as_predicted.mean())
    except KeyError as error:
        raise ValueError(f"{results}: no record of {error} for the README; make results makes it") from None


def fill(text, name, table):
    """`text` with `table` between the marks of block `name`."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = text.split(begin)
    return before + begin + table + "\n" + end + rest.split(end)[1]


def rendered():
    """The README with all tables made anew from the records that are there."""
    text, results = (ROOT / "README.md").read_text(encoding="utf-8"), ROOT / "data" / "results"
    tables = {
        "metrics": (read_metrics, lambda metrics: results_table(metrics[metrics.rows >= SHOWN_ROWS])),
        "runtimes": (pd.read_csv, runtimes_table),
        "bench": (pd.read_csv, bench_table),
    }
    for name, (read, make) in tables.items():
        if (results / f"{name}.csv").exists():
            text = fill(text, name, make(read(results / f"{name}.csv")))
    return fill(text, "findings", findings(results))


if __name__ == "__main__":
    text = rendered()
    with bu.replacing(ROOT / "README.md") as part:
        part.write_text(text, encoding="utf-8")
