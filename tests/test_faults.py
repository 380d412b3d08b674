"""Faults: killed at any moment, full and read-only disks, servers that misbehave, two runs at once, a clock set back.

After each, the next run must end with the result of one that was never disturbed. The stages are in stages.py, which
runs in processes of its own.
"""

import hashlib
import http.server
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, case

import binllm_data
import binllm_utils as bu

STAGES = ["download", "conversion", "codes", "tuning", "scoring", "recording"]
CONTENT = random.Random(0).randbytes(20_000)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT as /good; other paths misbehave in the way that they name."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        way = self.path.strip("/").removesuffix(".zip")
        if way == "missing":
            return self.send_error(404)
        body = CONTENT[:-7] if way == "short" else CONTENT[::-1] if way == "other" else CONTENT
        self.send_response(200)
        if way in ("good", "cut", "silent"):
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        try:
            if way == "cut":
                return self.wfile.write(body[:9_000])
            if way == "silent":
                self.wfile.write(body[:9_000])
                return time.sleep(1.5)
            if way == "page":
                return self.wfile.write(b"<html>log in first</html>")
            while way == "endless":
                self.wfile.write(bytes(100_000))
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):  # the other side has had enough
            pass


@pytest.fixture(scope="module")
def server():
    """The address of a server on this machine only."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def run_stages(server, *arguments, before=()):
    """The lines that `stages.py` prints for these arguments."""
    environment = os.environ | {"STAGES_SERVER": f"{server}/good {hashlib.sha256(CONTENT).hexdigest()}"}
    command = [*before, sys.executable, str(ROOT / "tests" / "stages.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=850)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    whole = {line["stage"]: line["result"] for line in lines if line["drill"] == "not disturbed"}
    assert list(whole) == STAGES
    return whole, [line for line in lines if line["drill"] != "not disturbed"]


def test_killed_two_at_once_or_with_a_wrong_clock(server, tmp_path, long):
    """kill -9 before what would have been done next to a file, or in the midst of the work; and so on."""
    whole, lines = run_stages(server, "disturbed", tmp_path, 1000 if long else 4, 0)
    two = lines.pop()
    for line in lines:
        with case(f"{line['drill']}: {line['stage']}"):
            assert line.get("result") == whole[line["stage"]], line
            assert line["drill"] != "killed" or line["killed"]
    assert all(sum(line["drill"] == "killed" for line in lines if line["stage"] == stage) >= 4 for stage in STAGES)
    with case("two that record at once"):  # each rewrites the whole table
        wanted = [f"{who}{n}" for who in "ab" for n in range(6)]
        assert sorted(two["runs"]) == sorted(two["answers"]) == wanted
    assert not list(tmp_path.glob("*/whole/**/*.part-*"))  # an undisturbed run leaves nothing beside its files


def may_mount():
    """How a disk of its own can be made here: as root, or in a name space of one's own; None if it cannot."""
    for how in (["unshare", "-m"], ["unshare", "-rm"]):
        command = [*how, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        if shutil.which("unshare") and not subprocess.run(command, capture_output=True).returncode:
            return how
    return None


def test_full_and_read_only_disks(server, tmp_path):
    """Either an error names what cannot be written, or the result is right and only not kept."""
    how = may_mount()
    if how is None:
        pytest.skip("no disk of a size of our own can be mounted here")
    mounted = [*how, "sh", "-c", 'mount -t tmpfs -o size=16m tmpfs "$0" && exec "$@"', str(tmp_path)]
    whole, lines = run_stages(server, "disk", tmp_path, before=mounted)
    failed = set()
    for line in lines:
        with case(f"{line['drill']}: {line['stage']}"):
            disturbed = line["disturbed"]
            said = disturbed.get("error", "")
            assert line.get("result") == whole[line["stage"]], line
            if said:
                failed.add(line["stage"])
                assert said.startswith("OSError: cannot ") and "\n" not in said, disturbed
                assert "No space left" in said or "Read-only" in said, disturbed
            else:
                assert disturbed["result"] == whole[line["stage"]], disturbed
    assert failed == set(STAGES) - {"codes"}  # codes are given back even when they cannot be kept


@pytest.mark.parametrize("way", ["cut", "short", "other", "page", "missing", "silent", "endless"])
@pytest.mark.parametrize("had", [None, b"an older copy"])
def test_servers_that_misbehave(server, tmp_path, monkeypatch, way, had):
    """The file is refused and what was there is kept; then a good server gives it."""
    monkeypatch.setattr(binllm_data, "PATIENCE", 0.5)
    monkeypatch.setattr(binllm_data._Bounded, "most", 10_000_000)
    path, sha256 = tmp_path / "film.zip", hashlib.sha256(CONTENT).hexdigest()
    if had:
        path.write_bytes(had)
    with case(f"a server that misbehaves: {way}"):
        with pytest.raises(OSError, match=r"cannot fetch http.*Go online and run again, or put film\.zip into"):
            bu.fetch(bu.Source("film.zip", sha256, url=f"{server}/{way}.zip"), cache=tmp_path)
        assert [file.read_bytes() for file in tmp_path.iterdir()] == [had] * bool(had)
        good = bu.Source("film.zip", sha256, url=f"{server}/good.zip")
        bad = bu.Source("film.zip", sha256, url=f"{server}/{way}.zip")
        assert bu.fetch(bad, good, cache=tmp_path).read_bytes() == CONTENT
