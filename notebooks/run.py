"""Execute the notebooks in order and save them in place; then rewrite the README's results table.

python notebooks/run.py          all of them
python notebooks/run.py 01 05    those that begin so

A notebook that fails stays on disk as it was; its outputs up to the error go to data/cache/failed.
Each run's minutes and peak memory become a row of data/results/runtimes.csv.
"""

import sys
import threading
import time
from pathlib import Path

import nbformat
import pandas as pd
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import binllm_utils as bu

WIDGET = "application/vnd.jupyter.widget-view+json"


class PeakMemory(threading.Thread):
    """Watches the memory of this process's children (the notebook's kernel); `gb` is the most seen."""

    def __init__(self):
        super().__init__(daemon=True)
        self.gb, self.done = 0.0, threading.Event()

    def run(self):
        while not self.done.wait(0.25):
            used = 0
            for child in psutil.Process().children(recursive=True):
                try:
                    used += child.memory_info().rss
                except psutil.Error:  # it has just ended
                    continue
            self.gb = max(self.gb, used / 1e9)


def tidy(notebook):
    """Drop what only a live kernel can show: widget state, and progress bars that stand still at 0 %."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if WIDGET in output.get("data", {}) and "0%|" not in output.data["text/plain"]:
                output.data["text/plain"] = "(interactive: run this notebook to use it)"
        cell["outputs"] = [
            output
            for output in cell.get("outputs", [])
            if not (WIDGET in output.get("data", {}) and "0%|" in output.data["text/plain"])
        ]
        if cell.cell_type != "code":
            del cell["outputs"]


def execute(path):
    """Run one notebook and save it; returns (minutes, peak memory in GB). Ends the program if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    memory, began = PeakMemory(), time.perf_counter()
    memory.start()
    with tqdm(total=cells, desc=path.stem, unit="cell", disable=None, leave=False) as bar:
        where = {"metadata": {"path": str(path.parent)}}
        client = NotebookClient(notebook, timeout=None, resources=where, extra_arguments=["--log-level=40"])
        client.on_cell_executed = lambda **_: bar.update()
        try:
            client.execute()
        except (CellExecutionError, DeadKernelError) as error:
            failed = bu.CACHE / "failed" / path.name
            with bu.replacing(failed) as part:
                nbformat.write(notebook, part)
            sys.exit(f"{path.name} failed and was left as it was; see {failed}\n{error}")
        finally:
            memory.done.set()
    tidy(notebook)
    with bu.replacing(path) as part:
        nbformat.write(notebook, part)
    return (time.perf_counter() - began) / 60, memory.gb


def note_runtime(path, minutes, peak_gb, profile):
    """Put the run into runtimes.csv, in place of an earlier one of the same notebook and profile."""
    table = bu.output_folder("data/results", profile) / "runtimes.csv"
    row = {"notebook": path.stem, "profile": profile.name, "minutes": round(minutes, 2), "peak_gb": round(peak_gb, 2)}
    rows = pd.DataFrame([row | {"hardware": bu.hardware(), "versions": bu.versions(), "commit": bu.commit()}])
    if table.exists():
        old = pd.read_csv(table)
        rows = pd.concat([old[(old.notebook != path.stem) | (old.profile != profile.name)], rows])
    with bu.replacing(table) as part:
        rows.sort_values(["profile", "notebook"]).to_csv(part, index=False)


def results_table(metrics):
    """The rows of metrics.csv as a Markdown table, best known first within each set of rows."""
    names = {("mf", "paper"): "matrix factorisation, 256 numbers", ("codes", "ours"): "codes alone, 32 bits"}
    names |= {("llm", "text"): "LLM, titles only", ("llm", "one_step"): "LLM, titles + codes, one step"}
    names |= {("llm", "two_step"): "LLM, titles + codes, two steps", ("popularity", ""): "popularity (no learning)"}
    lines = ["| method | test rows | AUC [95 %] | UAUC [95 %] | users | training | profile |"]
    lines += ["|---|---|---|---|---|---|---|"]
    kinds = ["popularity", "mf", "mf_bias", "continuous", "codes", "llm"]
    metrics = metrics.assign(kind=metrics.model.map(kinds.index)).sort_values(
        ["rows", "profile", "kind", "variant", "format"], ascending=[False, True, True, True, True], kind="stable"
    )
    for row in metrics.itertuples():
        name = names.get((row.model, row.variant), f"{row.model} {row.variant}")
        name += ", dotted" if row.format == "dotted" else ""
        cells = [
            f"{v:.4f} [{lo:.3f}, {hi:.3f}]"
            for v, lo, hi in ((row.auc, row.auc_lo, row.auc_hi), (row.uauc, row.uauc_lo, row.uauc_hi))
        ]
        time_text = f"{row.seconds:.0f} s" if row.seconds == row.seconds else ""
        lines.append("| " + " | ".join([name, f"{row.rows:,}", *cells, f"{row.users}", time_text, row.profile]) + " |")
    machines = "; ".join(f"{p}: {h}" for p, h in sorted(set(zip(metrics.profile, metrics.hardware))))
    return "\n".join([*lines, "", f"Made on {machines}."])


def readme_with(table):
    """README.md with `table` between its two result marks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = text.split("<!-- results -->\n")
    return f"{before}<!-- results -->\n{table}\n<!-- end of results -->{rest.split('<!-- end of results -->')[1]}"


def read_metrics(folder):
    return pd.read_csv(folder / "metrics.csv").fillna({"variant": "", "format": ""})


def main():
    profile = bu.current_profile()
    paths = [
        p for p in sorted(Path(__file__).parent.glob("[0-9]*.ipynb")) if p.name.startswith(tuple(sys.argv[1:] or [""]))
    ]
    print(f"profile {profile.name} on {bu.hardware()}: {len(paths)} notebooks")
    for place, path in enumerate(paths, 1):
        minutes, peak_gb = execute(path)
        note_runtime(path, minutes, peak_gb, profile)
        print(f"[{place}/{len(paths)}] {path.name}: {minutes:.1f} min, {peak_gb:.1f} GB", flush=True)
    results, figures = (bu.output_folder(kind, profile) for kind in ("data/results", "figures"))
    if profile.name != "smoke" and (results / "metrics.csv").exists():
        with bu.replacing(ROOT / "README.md") as part:
            part.write_text(readme_with(results_table(read_metrics(results))), encoding="utf-8")
    print(f"pictures: {figures}\nresults:  {results / 'metrics.csv'} (and the table in README.md)")


if __name__ == "__main__":
    main()
