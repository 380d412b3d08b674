"""How many requests a second the service answers, how fast, and whether all are right: data/results/serve.csv.

python benchmarks/load.py            codes alone, 1 and 16 askers at once
python benchmarks/load.py pairs      an LLM with that adapter of data/adapters orders the candidates

The service runs in a process of its own, on this machine. Answers are compared with what the same call gives here: all
of them, or the P(Yes) of the first four where an LLM is asked.
"""

import asyncio
import json
import multiprocessing
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import records

import binllm_extras as bx
import binllm_serve as bs
import binllm_utils as bu


def recommender(adapter):
    """The `Recommender` of MovieLens-1M, with an LLM if an adapter is named."""
    dataset = bu.load_ml1m()
    codes = bu.cached_codes(dataset, recipe="distinct")
    if not adapter:
        return bs.Recommender(dataset, codes)
    model, tokenizer = bu.load_llm()
    return bs.Recommender(dataset, codes, bx.load_shipped(model, adapter), tokenizer, style=bx.BIT_BY_BIT)


def served(adapter, port):
    """What the process of the service does: it says its port, and serves."""
    asyncio.run(bs.serve(recommender(adapter), 0, ready=port.send))


def ask(address, body):
    """(answer, seconds) of one request."""
    began = time.perf_counter()
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["items"], time.perf_counter() - began


def measure(address, made, askers, requests, known, adapter):
    """Put one row into serve.csv: `requests` of users in turn, with a new like in every second one."""
    users = np.random.default_rng(0).integers(0, made.dataset.n_users, requests)
    bodies = [
        {"user": int(user), "n": 10} | ({"likes": [int(user) % 500]} if i % 2 else {}) for i, user in enumerate(users)
    ]
    began = time.perf_counter()
    with ThreadPoolExecutor(askers) as pool:
        found = list(pool.map(lambda body: ask(address, body), bodies))
    whole = time.perf_counter() - began
    seconds, wrong = np.array([s for _, s in found]), 0
    for body, (items, _) in list(zip(bodies, found))[:known]:
        wanted = made.recommend(**body)
        close = np.allclose([line["p"] or 0 for line in items], wanted.p.fillna(0), atol=1e-5)
        wrong += not close or (not adapter and [line["item"] for line in items] != wanted.item.tolist())
    row = {"ranked by": f"LLM, adapter {adapter}" if adapter else "codes", "askers": askers, "requests": requests}
    row |= {"requests a second": float(f"{requests / whole:.3g}"), "compared": min(known, requests), "wrong": wrong}
    row |= {f"p{q} ms": round(1000 * float(np.percentile(seconds, q)), 1) for q in (50, 99)}
    records.put_row(ROOT / "data/results/serve.csv", row, ["ranked by", "askers"])
    print(row, flush=True)


def main(adapter=None):
    bu.quiet()
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=served, args=(adapter, there), daemon=True)
    process.start()
    there.close()  # so that a service that cannot start is an error here, not a wait without end
    address, made = f"http://127.0.0.1:{here.recv()}/recommend", recommender(adapter)
    for askers, requests, known in ((1, 12, 4), (4, 12, 4)) if adapter else ((1, 1000, 1000), (16, 4000, 4000)):
        measure(address, made, askers, requests, known, adapter)
    process.terminate()


if __name__ == "__main__":
    main(*sys.argv[1:])
