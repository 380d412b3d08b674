"""python -m binllm_utils: JSON on stdout, all else on stderr, exit statuses, and the way from a file to an answer."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, make_dataset, make_rows
from safetensors.torch import load_file

import binllm_cli as bc
import binllm_llm
import binllm_utils as bu


@pytest.fixture
def ratings(tmp_path):
    """A file with the pattern of the toy data, ids as texts, a title each."""
    rows = make_rows(0, 400).assign(rating=lambda r: 1 + 4 * r.label)
    rows = rows.assign(
        user="u" + rows.user.astype(str), title="Film " + rows.item.astype(str), item="B" + rows.item.astype(str)
    )
    rows[["user", "item", "rating", "timestamp", "title"]].to_csv(tmp_path / "r.csv", index=False)
    return str(tmp_path / "r.csv")


@pytest.fixture
def small_llm(monkeypatch):
    """Two layers in place of the whole LLM."""
    whole = bu.load_llm
    monkeypatch.setattr(bu, "load_llm", lambda name=None: whole(name, layers=2))


def said(capsys, *arguments):
    """The JSON that a command prints; it must end well."""
    assert bc.main(list(map(str, arguments))) == 0
    return json.loads(capsys.readouterr().out)


def test_the_verdict_of_a_file(ratings, capsys):
    found = said(capsys, "try", ratings)
    assert found["report"]["rows"] == 400 and "codes so far against counting so far" in " ".join(found["verdict"])
    assert (
        set(found["table"]) == {"counting", "counting so far", "codes", "codes so far"}
        and 0 < found["table"]["codes"]["auc"] <= 1
    )


def test_a_verdict_may_ask_an_llm_about_some_rows(ratings, capsys, small_llm, monkeypatch):
    asked, whole = [], bu.score
    monkeypatch.setattr(
        bu, "score", lambda model, tokenizer, prompts: asked.append(prompts) or whole(model, tokenizer, prompts)
    )
    found = said(capsys, "try", ratings, "--ask", 20, "--things", "book")
    table = found["table"]
    assert list(table)[-2:] == ["LLM, titles, untaught", "LLM, titles and codes, untaught"]  # two layers of it
    assert table["codes"]["seconds a row"] is None and table["LLM, titles, untaught"]["seconds a row"] > 0
    assert [len(prompts) for prompts in asked] == [20, 20]
    assert all("books" in prompt and "movie" not in prompt for prompts in asked for prompt in prompts)
    assert found["verdict"][0].startswith("On 20 rows")
    assert all(line.startswith("LLM, titles and codes, untaught against ") for line in found["verdict"][1:6])
    assert [line.split(":")[0] for line in found["verdict"][6:]] == [
        f"codes so far against {other}" for other in ("counting", "counting so far", "codes")
    ]
    assert found["report"]["training, valid and test rows"] == "320, 41, 39"
    assert {"liked, of the test rows", "of users not in training", "of items not in training"} <= set(found["report"])


def test_who_asked_may_be_gone_when_the_answer_comes(ratings):
    command = f"set -o pipefail; {sys.executable} -m binllm_utils try {ratings} | true"
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr and "BrokenPipe" not in run.stderr


def test_the_verdict_on_one_person_is_json(ratings, tmp_path, capsys):
    """Of one user there is no interval, and JSON has no NaN."""
    pd.read_csv(ratings).drop(columns="user").to_csv(tmp_path / "me.csv", index=False)
    found = said(capsys, "try", tmp_path / "me.csv")
    assert found["table"]["codes"]["auc_lo"] is None and "too few users to tell" in " ".join(found["verdict"])


def test_from_a_file_to_codes_an_adapter_and_recommendations(ratings, tmp_path, capsys, small_llm):
    codes, adapter = tmp_path / "codes.npz", tmp_path / "adapter"
    made = said(capsys, "codes", ratings, "--out", codes, "--bits", 16)
    assert (made["users"], made["items"]) == (20, 30)
    plain = said(capsys, "recommend", ratings, "--codes", codes, "--user", "u4", "-n", 3)["items"]
    assert len(plain) == 3 and plain[0]["p"] is None and plain[0]["title"].startswith("Film ")
    same = said(capsys, "recommend", ratings, "--codes", codes, "--user", "u4", "-n", 3)["items"]
    assert plain == same
    tuned = said(
        capsys,
        "tune",
        ratings,
        "--codes",
        codes,
        "--out",
        adapter,
        "--rows",
        40,
        "--things",
        "book",
        "--format",
        "dotted",
    )
    assert tuned["rows"] >= 40 and tuned["steps"] >= 1
    card = json.loads((adapter / "card.json").read_text())
    assert "books" in card["style"] and "movie" not in card["style"] and card["format"] == "dotted"
    asked = ("score", ratings, "--codes", codes, "--user", "u4", "--items", "B3", "film 4")
    with_llm = said(capsys, *asked, "--adapter", adapter)["items"]
    without = said(capsys, *asked)["items"]
    assert [line["title"] for line in with_llm] == [line["title"] for line in without] == ["Film 3", "Film 4"]
    assert all(0 < line["p"] < 1 for line in with_llm) and all(line["p"] is None for line in without)
    said(capsys, "codes", ratings, "--out", tmp_path / "others.npz", "--bits", 8)
    assert (
        bc.main(["score", ratings, "--codes", str(tmp_path / "others.npz"), *asked[4:], "--adapter", str(adapter)]) == 1
    )
    assert "was tuned with other codes" in capsys.readouterr().err


def test_every_command_says_how_the_file_was_read(ratings, tmp_path, capsys, monkeypatch):
    lines = Path(ratings).read_text().splitlines()
    (tmp_path / "gap.csv").write_text("\n".join([*lines, "u1,,5,3,Film 3"]) + "\n")
    monkeypatch.setattr(bu, "cached_codes", lambda data, recipe: bu.fit_codes(data, 16, max_epochs=2)[0])
    assert bc.main(["recommend", str(tmp_path / "gap.csv"), "--user", "u1"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["items"]
    assert "columns: user = user, item = item, rating = rating" in err and "liked: 4 or more: " in err
    assert "rows without user, item or rating, left out: 1" in err


def test_tuning_shows_likes_as_recommending_does(ratings, tmp_path, capsys, small_llm, monkeypatch):
    """Up to the row: of people with one sitting, likes before the sitting are none."""
    rows = pd.read_csv(ratings)
    rows.assign(timestamp=range(len(rows))).to_csv(ratings, index=False)  # all of it one sitting
    shown = []
    monkeypatch.setattr(bu, "tune", lambda model, tokenizer, prompts, *a, **k: shown.extend(prompts) or sys.exit())
    with pytest.raises(SystemExit):
        bc.main(["tune", ratings, "--out", str(tmp_path / "a"), "--rows", "40", "--style", "text"])
    assert sum("Film" in prompt.split("Leverage")[0] for prompt in shown) > len(shown) / 2


def test_codes_belong_to_ids_not_to_places(tmp_path, toy, capsys):
    rng = np.random.default_rng(0)
    codes, users, items = bu.Codes(rng.integers(0, 2, (3, 16)), rng.integers(0, 2, (4, 16))), list("abc"), list("wxyz")
    bc.write_codes(tmp_path / "c.npz", codes, users, items, toy)
    found = bc.read_codes(tmp_path / "c.npz", ["c", "a"], ["z", "w", "y", "x"], toy)
    assert np.array_equal(found.users, codes.users[[2, 0]]) and np.array_equal(found.items, codes.items[[3, 0, 2, 1]])
    assert capsys.readouterr().out == ""
    bc.read_codes(tmp_path / "c.npz", users, items, make_dataset(train=make_rows(7, 400)))
    assert "c.npz was learned from other rows than these" in capsys.readouterr().out
    with pytest.raises(ValueError, match="lacks codes of 1 users, such as 'd'"):
        bc.read_codes(tmp_path / "c.npz", ["a", "d"], items, toy)
    whole, dice = (tmp_path / "c.npz").read_bytes(), np.random.default_rng(0)
    for at in dice.integers(0, len(whole), 300):  # one bit of it turned round: the codes themselves, or one sentence
        (tmp_path / "turned.npz").write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            assert np.array_equal(bc.read_codes(tmp_path / "turned.npz", users, items, toy).users, codes.users)
        except ValueError as error:
            assert "turned.npz" in str(error)
    np.save(tmp_path / "table.npy", codes.users)
    with pytest.raises(ValueError, match="holds no codes"):
        bc.read_codes(tmp_path / "table.npy", users, items, toy)
    for name, content in (("text.npz", b"text"), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} holds no codes"):
            bc.read_codes(tmp_path / name, users, items, toy)
    np.savez(tmp_path / "pickled.npz", users=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="holds no codes"):
        bc.read_codes(tmp_path / "pickled.npz", users, items, toy)
    np.savez(
        tmp_path / "short.npz", users=codes.users, items=codes.items, user_ids=users[:2], item_ids=items, made_from=""
    )
    with pytest.raises(ValueError, match="not a code for each id"):
        bc.read_codes(tmp_path / "short.npz", users, items, toy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["try", "none.csv"], "none.csv is not there"),
        (["codes", "{ratings}", "--out", "x.npz", "--bits", "7"], "bits is 7"),
        (["recommend", "ml-1m", "--user", "1", "--like", "3"], "leave --titles, --columns and --like out"),
        (["recommend", "{ratings}", "--user", "u1", "-n", "-5"], "n is -5"),
        (["try", "{ratings}", "--columns", "stars"], "give pairs such as rating=stars"),
        (["try", "{ratings}", "--columns", "rating=stars"], "stars"),
        (["tune", "{ratings}", "--out", "x", "--things", "two words"], "no word for what the items are"),
        (["tune", "nothing read.csv", "--out", "."], "holds other files (r.csv)"),
        (["recommend", "{ratings}", "--user", "nobody"], "there is no user 'nobody'"),
        (["recommend", "{ratings}"], "name a user, or items"),
        (["recommend", "{ratings}", "--user", "u1", "--codes", "none.npz"], "none.npz"),
        (["recommend", "{ratings}", "--user", "u1", "--adapter", "{tmp}"], "no adapter of the command tune"),
        (["codes", "{ratings}", "--out", "{ratings}"], "is there and holds no codes"),
        (["serve", "{ratings}", "--address", "0.0.0.0", "--port", "0"], "give a token"),
        (["serve", "nothing read.csv", "--port", "70000"], "ports go to 65535"),
    ],
)
def test_what_goes_wrong_is_a_line_on_stderr(ratings, tmp_path, capsys, arguments, message, monkeypatch, small_llm):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BINLLM_TOKEN", raising=False)
    before = Path(ratings).read_bytes()
    real = bu.fit_codes
    monkeypatch.setattr(bu, "fit_codes", lambda *a, **k: real(*a, **{"max_epochs": 2} | k))
    monkeypatch.setattr(bu, "cached_codes", lambda data, recipe: bu.fit_codes(data, 16)[0])
    assert bc.main([part.format(ratings=ratings, tmp=tmp_path) for part in arguments]) == 1
    out, err = capsys.readouterr()
    assert (
        out == "" and message in err and "Traceback" not in err and err.strip().splitlines()[-1].startswith("error: ")
    )
    assert (
        sorted(os.listdir(tmp_path)) == ["r.csv"] and Path(ratings).read_bytes() == before
    )  # nothing is written, and nothing lost


def test_a_wrong_command_line_ends_with_2(capsys):
    for arguments in (
        [],
        ["sing"],
        ["codes", "x"],
        ["recommend", "x", "-n", "many"],
        ["codes", "x", "--out", "y", "--recipe", "soup"],
        ["tune", "x", "--out", "y", "--style", "poem"],
    ):
        with pytest.raises(SystemExit) as ended:
            bc.main(arguments)
        assert ended.value.code == 2
    with pytest.raises(SystemExit) as ended:
        bc.main(["--help"])
    assert ended.value.code == 0 and "recommend" in capsys.readouterr().out


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(ratings, tmp_path, capsys, small_llm, monkeypatch):
    monkeypatch.setattr(
        bu, "cached_codes", lambda data, recipe: bu.fit_codes(data, 16, max_epochs=3, progress=False)[0]
    )
    monkeypatch.setattr(bu, "CACHE", tmp_path / "cache")
    real, calls = binllm_llm._warm_up_then_cosine, []

    def stopped(step, steps):
        calls.append(step)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(step, steps)

    def tune(*given, **options):
        return tuned(*given, **options | {"save_seconds": 0})

    tuned = bu.tune
    monkeypatch.setattr(bu, "tune", tune)
    command = ["tune", ratings, "--rows", "60", "--out"]
    assert bc.main([*command, str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(binllm_llm, "_warm_up_then_cosine", stopped)
    command.append(str(tmp_path / "adapter"))
    assert bc.main(command) == 130 and capsys.readouterr().err.strip().endswith("stopped")
    assert not (tmp_path / "adapter").exists() and list((tmp_path / "cache" / "checkpoints").iterdir())
    assert bc.main(command) == 0 and calls.count(1) == 1  # the first step is not done again
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "adapter"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list((tmp_path / "cache" / "checkpoints").iterdir())


def test_the_service_from_the_shell_ends_by_ctrl_c(ratings, tmp_path, capsys):
    said(capsys, "codes", ratings, "--out", tmp_path / "codes.npz", "--bits", 16)
    command = [
        sys.executable,
        "-m",
        "binllm_utils",
        "serve",
        ratings,
        "--codes",
        str(tmp_path / "codes.npz"),
        "--port",
        "0",
    ]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which a shell's background job does not hear
    run = subprocess.Popen(command, cwd=ROOT, preexec_fn=heard, **pipes)
    try:
        line = next(line for line in run.stderr if "serving on" in line)
        address = line.split()[2].rstrip(",")
        body = json.dumps({"user": "u4", "n": 2}).encode()
        request = urllib.request.Request(f"{address}/recommend", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert len(json.load(answer)["items"]) == 2
        run.send_signal(signal.SIGINT)
        assert run.wait(20) == 130 and run.stdout.read() == ""
    finally:
        run.kill()
