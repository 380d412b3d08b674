"""What the project takes from others: all of it pinned, hashed and named; nothing unpickled, nothing run from a hub."""

import ast
import re
import sys
from importlib.metadata import packages_distributions, version

import pytest
from conftest import ROOT

SHIPPED = [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/*.py")]
NOTEBOOKS = [*ROOT.glob("notebooks/**/*.ipynb")]


def plain(name):
    return re.sub("[-_.]+", "-", name).lower()


def pins(path):
    """{package: version} of a requirements file."""
    lines = path.read_text().splitlines()
    return {plain(m[1]): m[2] for m in map(re.compile(r"([\w.-]+)==([\w.]+)").match, lines) if m}


def test_the_lock_holds_every_pin_and_a_hash_for_every_package():
    wanted, text = pins(ROOT / "requirements.txt"), (ROOT / "requirements.lock").read_text()
    locked = pins(ROOT / "requirements.lock")
    assert wanted and all(locked[name] == pin for name, pin in wanted.items()), "run make lock"
    entries = re.split(r"\n(?=[a-z0-9])", text, flags=re.IGNORECASE)[1:]
    assert len(entries) > len(wanted) and all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert len(lines) == len(wanted)  # nothing in it is not pinned


def test_what_is_installed_is_what_is_locked():
    entries = re.findall(
        r"^([\w.-]+)==([\w.]+)(?: ; (.*?))? \\$", (ROOT / "requirements.lock").read_text(), re.MULTILINE
    )
    packaging = pytest.importorskip("packaging.markers")
    checked = 0
    for name, pin, marker in entries:
        if not marker or packaging.Marker(marker).evaluate():
            try:
                assert version(name).split("+")[0] == pin, name
                checked += 1
            except ModuleNotFoundError:
                assert "nvidia" in name or "cuda" in name or name == "triton", name  # a CPU build of torch needs none
    assert checked > 100


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_whatever_is_imported_is_pinned(path):
    wanted = pins(ROOT / "requirements.txt") | pins(ROOT / "benchmarks" / "requirements.txt")
    own = {p.stem for p in SHIPPED}
    belongs = packages_distributions()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - own:
            found = {plain(package) for package in belongs.get(name, [name])}
            assert found & wanted.keys() or name in ("IPython", "nbformat", "traitlets"), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", [*SHIPPED, *NOTEBOOKS], ids=lambda path: path.name)
def test_nothing_is_unpickled_or_run_from_a_hub(path):
    text = path.read_text(encoding="utf-8")
    for word in (
        "import pickle",
        "torch.load",
        "allow_pickle=True",
        "trust_remote_code=True",
        "read_pickle",
        "eval(input",
    ):
        assert word not in text
    for call in re.findall(r"np\.load\([^)]*\)", text):
        assert "allow_pickle=False" in call


def test_the_workflow_has_pinned_actions_and_least_rights():
    text = (ROOT / ".github/workflows/test.yml").read_text()
    uses = re.findall(r"uses: (\S+)", text)
    assert uses and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", use) for use in uses)
    assert "permissions:\n  contents: read\n" in text and "secrets." not in text and "write" not in text


def test_the_lab_listens_to_this_machine_only_and_keeps_its_token():
    (command,) = re.findall(r"jupyter lab.*", (ROOT / "Makefile").read_text())
    assert "--ip=127.0.0.1" in command and "token" not in command and "password" not in command
