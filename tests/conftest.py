"""Shared fixtures. The tests run in the smoke profile and never ask the hub."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("BINLLM_PROFILE", "smoke")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # else each missing name costs half a minute of retries
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import numpy as np
import pandas as pd
import pytest
import torch

import binllm_utils as bu


def make_rows(seed, n, n_users=20, n_items=30, start=0):
    """Random interactions with a pattern to learn: even users like even items."""
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(n_users * n_items)[:n]
    user, item = pairs // n_items, pairs % n_items
    noise = rng.random(n) < 0.1
    label = ((user % 2 == item % 2) ^ noise).astype(np.int64)
    when = 100 * np.sort(rng.integers(start, start + 1000, n))  # three days
    return pd.DataFrame({"user": user, "item": item, "label": label, "timestamp": when})


def make_dataset(**changes):
    parts = {"train": make_rows(0, 400), "valid": make_rows(1, 100, start=1000), "test": make_rows(2, 100, start=2000)}
    return bu.Dataset(**(parts | {"titles": [f"Film {i} ({1950 + i})" for i in range(30)], "name": "toy"} | changes))


@pytest.fixture(autouse=True)
def seeded():
    """Weights drawn in a test are the same in every run, whichever tests the process ran before."""
    torch.manual_seed(0)


@pytest.fixture
def toy():
    return make_dataset()


@pytest.fixture
def toy_codes():
    rng = np.random.default_rng(0)
    return bu.Codes(rng.integers(0, 2, (20, 16), dtype=np.uint8), rng.integers(0, 2, (30, 16), dtype=np.uint8))


@pytest.fixture(scope="session")
def ml1m():
    return bu.load_ml1m()


@pytest.fixture(scope="session")
def past():
    return bu.load_ml1m(past="all")


@pytest.fixture
def llm():
    """The real LLM's first two layers, in four bits: every code path, a fifteenth of the work. Fresh for each test."""
    return bu.load_llm(layers=2)


# ------------------------------------------------------------------------------------------------------------- drills
# A drill tries one thing many times and counts; `make fuzz` (pytest --fuzz) is the long form, which keeps its counts.
TRIED = {}  # name: [tried, survived]


def pytest_addoption(parser):
    parser.addoption("--fuzz", action="store_true", help="the drills in their long form, recorded in data/results")


def pytest_configure(config):
    if config.getoption("--fuzz"):
        os.environ["BINLLM_FUZZ"] = "1"  # for modules that must know before there is a fixture, in every process


@pytest.fixture
def long(request):
    return request.config.getoption("--fuzz")


@contextmanager
def case(drill):
    """One case of the drill of that name; it has survived if the block ends without an error."""
    count = TRIED.setdefault(drill, [0, 0])
    count[0] += 1
    try:
        yield
    except BaseException as error:
        count[0] -= type(error).__module__.startswith("hypothesis")  # it gave this case up while drawing it
        raise
    count[1] += 1


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes: what it counted goes to the first
        session.config.workeroutput["tried"] = TRIED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for drill, counts in getattr(node, "workeroutput", {}).get("tried", {}).items():
        TRIED[drill] = [a + b for a, b in zip(TRIED.get(drill, (0, 0)), counts)]


def pytest_terminal_summary(terminalreporter, config):
    if not TRIED:
        return
    terminalreporter.section("drills: tried, survived, lost")
    for drill, (tried, survived) in TRIED.items():
        terminalreporter.line(f"{drill:60s} {tried:9,d} {survived:9,d} {tried - survived:6,d}")
        if config.getoption("--fuzz"):
            import records

            row = {"drill": drill, "tried": tried, "survived": survived, "lost": tried - survived} | records.stamps()
            records.put_row(ROOT / "data/results/drills.csv", row, ["drill"])
