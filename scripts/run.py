"""Execute the notebooks in order. Nothing that git tracks is changed: copies, pictures and run times go to executed/.

python scripts/run.py              all of them
python scripts/run.py 01 05        those that begin so
python scripts/run.py --release    in place, with solutions, figures/ and data/results/runtimes.csv: for maintainers

A notebook that fails stops the run; its outputs up to the error are in executed/failed.
"""

import base64
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import records

import binllm_utils as bu

WIDGET = "application/vnd.jupyter.widget-view+json"


def tidy(notebook):
    """Drop what only a live kernel can show: widget state, and progress bars that stand still at 0 %."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            cell.pop("outputs", None)
            continue
        kept = []
        for output in cell.outputs:
            text = output.get("data", {}).get("text/plain", "") if WIDGET in output.get("data", {}) else ""
            if "0%|" in text:
                continue
            if text:
                output.data["text/plain"] = "(interactive: run this notebook to use it)"
            kept.append(output)
        cell.outputs = kept


def execute(path, target):
    """Run one notebook and save it as `target`; returns (minutes, peak memory in GB). Ends the program if a cell fails.

    The kernel's folder is the notebook's own, whatever the target.
    """
    notebook = nbformat.read(path, as_version=4)
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    began = time.perf_counter()
    with (
        records.PeakMemory() as memory,
        tqdm(total=cells, desc=path.stem, unit="cell", disable=None, leave=False) as bar,
    ):
        where = {"metadata": {"path": str(path.parent)}}
        client = NotebookClient(notebook, timeout=None, resources=where, extra_arguments=["--log-level=40"])
        client.on_cell_executed = lambda **_: bar.update()
        try:
            client.execute()
        except (CellExecutionError, DeadKernelError) as error:
            failed = bu.OUTPUT / "failed" / path.name
            with bu.replacing(failed) as part:
                nbformat.write(notebook, part)
            sys.exit(f"{path.name} failed; see {failed}\n{error}")
    tidy(notebook)
    with bu.replacing(target) as part:
        nbformat.write(notebook, part)
    return (time.perf_counter() - began) / 60, memory.gb


def pictures(notebooks, folder):
    """Write the pictures that stand in the notebooks' outputs to `folder`, by the names that `bu.save_figure` gave."""
    for path in sorted(notebooks.glob("[0-9]*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            named = re.search(r'save_figure\(fig, "(\w+)"', cell.source)
            for output in cell.get("outputs", []) if named else []:
                if "image/png" in output.get("data", {}):
                    with bu.replacing(folder / f"{named[1]}.png") as part:
                        part.write_bytes(base64.b64decode(output.data["image/png"]))


def main(wanted, release):
    bu.quiet()
    profile = bu.current_profile()
    folder = ROOT / "notebooks" if release else bu.OUTPUT / "notebooks"
    results = ROOT / "data" / "results" if release else bu.OUTPUT / "results"
    every = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    for begin in wanted:
        if not any(path.name.startswith(begin) for path in every):
            sys.exit(f"no notebook begins with {begin}")
    paths = [path for path in every if path.name.startswith(tuple(wanted or [""]))]
    print(f"profile {profile.name} on {records.hardware()}: {len(paths)} notebooks")
    print("[data and model] fetched, checked and converted on the first run only", flush=True)
    bu.load_ml1m()
    bu.load_llm(profile.llm, layers=profile.layers)
    os.environ["BINLLM_OUTPUT"] = str(bu.OUTPUT)  # the same place for the kernels, wherever they start
    for place, path in enumerate(paths, 1):
        minutes, peak_gb = execute(path, folder / path.name)
        row = {
            "notebook": path.stem,
            "profile": profile.name,
            "minutes": round(minutes, 2),
            "peak_gb": round(peak_gb, 2),
        }
        records.put_row(results / "runtimes.csv", row, ["notebook", "profile"])
        print(f"[{place}/{len(paths)}] {path.name}: {minutes:.1f} min, {peak_gb:.1f} GB", flush=True)
        solutions = path.parent / "solutions" / path.name
        if release and solutions.exists():
            execute(solutions, solutions)
    if release:
        pictures(ROOT / "notebooks", ROOT / "figures")
    shown = bu.OUTPUT.relative_to(ROOT) if bu.OUTPUT.is_relative_to(ROOT) else bu.OUTPUT
    print(f"notebooks, pictures and run times: {folder.relative_to(ROOT) if release else shown}/")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main([a for a in arguments if a != "--release"], "--release" in arguments)
