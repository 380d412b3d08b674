"""One job of scoring by two local workers, with dask and with Ray Data in turns: time, memory, and what becomes of it
when a worker is killed; rows of data/results/cluster.csv.

pip install -r benchmarks/requirements.txt
python benchmarks/cluster.py           some minutes on two CPU cores

The LLM keeps its first two layers, so that what is measured is the engine rather than the model.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from importlib.metadata import files, version
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import records

import binllm_scale as bs
import binllm_utils as bu

PACKAGES = {"dask": ("dask", "distributed"), "ray": ("ray",)}
TURNS, PART = 3, 32


def load(noted):
    """What a worker does first: note that it is there, load the LLM."""
    Path(noted, str(os.getpid())).touch()
    bu.quiet()
    return bu.load_llm(layers=2)


def by_dask(prompts, noted):
    from distributed import Client, LocalCluster

    options = {"threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
    with LocalCluster(2, **options) as cluster, Client(cluster) as client:
        return bs.score_everywhere(client, partial(load, noted), prompts, PART, progress=False)


class Scorer:
    def __init__(self, noted):
        self.model, self.tokenizer = load(noted)

    def __call__(self, batch):
        return {
            "place": batch["place"],
            "p": bu.score(self.model, self.tokenizer, list(batch["prompt"]), progress=False),
        }


def by_ray(prompts, noted):
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    order = np.argsort(prompts, kind="stable")  # prompts that begin alike in one part, as score_everywhere does
    rows = ray.data.from_pandas(pd.DataFrame({"place": order, "prompt": np.array(prompts)[order]}))
    options = {"fn_constructor_args": (noted,), "batch_size": PART, "compute": ray.data.ActorPoolStrategy(size=2)}
    found = rows.repartition(len(prompts) // PART).map_batches(Scorer, **options).to_pandas().sort_values("place")
    return found.p.to_numpy()


def kill_first(noted, after):
    """Kill the first worker that has noted itself, some seconds after it did."""
    while not (there := sorted(Path(noted).iterdir(), key=lambda path: path.stat().st_mtime)):
        time.sleep(0.1)
    time.sleep(after)
    os.kill(int(there[0].name), signal.SIGKILL)


def child(engine, kill):
    """Do the job once; print the measured numbers as JSON."""
    dataset = bu.load_ml1m()
    prompts = bu.build_prompts(dataset, dataset.test.head(512), bu.cached_codes(dataset), "codes")
    with tempfile.TemporaryDirectory() as noted, records.PeakMemory() as memory:
        if kill:
            threading.Thread(target=kill_first, args=(noted, kill), daemon=True).start()
        began = time.perf_counter()
        p = {"dask": by_dask, "ray": by_ray}[engine](prompts, noted)
        seconds = time.perf_counter() - began
        workers = len(list(Path(noted).iterdir()))
    here = bu.score(*bu.load_llm(layers=2), prompts, progress=False)
    print(json.dumps({"seconds": seconds, "gb": memory.gb, "workers": workers, "off": float(np.abs(here - p).max())}))


def once(engine, kill=0):
    """The numbers of one run in a process of its own, or None if the job failed."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), env.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, engine, str(kill)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, timeout=900)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"seconds')]
    print(engine, kill, found, flush=True)
    return found[-1] if found and not done.returncode else None


def main():
    runs = {engine: [] for engine in PACKAGES}
    for _ in range(TURNS):
        for engine, found in runs.items():
            found.append(once(engine))
    for engine, found in runs.items():
        killed = once(engine, kill=6)
        row = {"engine": engine, "version": version(engine), "prompts": 512}
        row["seconds"] = round(float(np.median([run["seconds"] for run in found])), 1)
        row["peak_gb"] = round(float(np.median([run["gb"] for run in found])), 2)
        row["seconds_one_killed"] = round(killed["seconds"], 1) if killed else np.nan
        row["workers_one_killed"] = killed["workers"] if killed else np.nan
        row["largest_difference"] = max(run["off"] for run in [*found, *([killed] if killed else [])])
        size = sum(file.size or 0 for name in PACKAGES[engine] for file in files(name))
        row["installed_mb"] = round(size / 1e6)
        records.put_row(ROOT / "data" / "results" / "cluster.csv", row, ["engine"])


if __name__ == "__main__":
    child(sys.argv[1], float(sys.argv[2])) if len(sys.argv) > 1 else main()
