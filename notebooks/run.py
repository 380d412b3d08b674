"""Execute the notebooks in order and save them in place.

python notebooks/run.py          all of them
python notebooks/run.py 01 05    those that begin so

A notebook that fails stays on disk as it was; its outputs up to the error go to data/cache/failed.
Each run's minutes and peak memory become a row of data/results/runtimes.csv.
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import binllm_utils as bu

WIDGET = "application/vnd.jupyter.widget-view+json"


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
    began = time.perf_counter()
    with bu.PeakMemory() as memory, tqdm(total=cells, desc=path.stem, unit="cell", disable=None, leave=False) as bar:
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
    tidy(notebook)
    with bu.replacing(path) as part:
        nbformat.write(notebook, part)
    return (time.perf_counter() - began) / 60, memory.gb


def note_runtime(path, minutes, peak_gb, profile):
    """Put the run into runtimes.csv, in place of an earlier one of the same notebook and profile."""
    row = {"notebook": path.stem, "profile": profile.name, "minutes": round(minutes, 2), "peak_gb": round(peak_gb, 2)}
    bu.put_row(bu.output_folder("data/results", profile) / "runtimes.csv", row, ["notebook", "profile"])


def shown(kind, profile):
    """An output folder, seen from the repository."""
    folder = bu.output_folder(kind, profile)
    return folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder


def main():
    profile = bu.current_profile()
    paths = [
        p for p in sorted(Path(__file__).parent.glob("[0-9]*.ipynb")) if p.name.startswith(tuple(sys.argv[1:] or [""]))
    ]
    print(f"profile {profile.name} on {bu.hardware()}: {len(paths)} notebooks")
    print("[data and model] fetched, checked and converted on the first run only", flush=True)
    bu.load_ml1m()
    bu.load_llm(profile.llm, layers=profile.layers)
    for place, path in enumerate(paths, 1):
        minutes, peak_gb = execute(path)
        note_runtime(path, minutes, peak_gb, profile)
        print(f"[{place}/{len(paths)}] {path.name}: {minutes:.1f} min, {peak_gb:.1f} GB", flush=True)
    print(f"pictures: {shown('figures', profile)}\nresults:  {shown('data/results', profile)}/metrics.csv")


if __name__ == "__main__":
    main()
