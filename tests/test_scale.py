"""More than one process, machine or file: the same numbers as with one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from stages import PROMPTS, tiny_llm, tokenizer

import binllm_llm
import binllm_scale as bs
import binllm_utils as bu

HERE = Path(__file__).resolve()


# ---------------------------------------------------------------------------------------- tuning, in many processes
def tune_here(folder, stop=None):
    """The run that all process counts must agree on; with `stop`, it is cut off after that many steps."""
    labels = [i % 3 == 0 for i in range(len(PROMPTS))]
    options = {"batch_size": 1, "lr": 3e-3, "folder": folder, "save_seconds": 0, "progress": False}
    step, ended, steps = binllm_llm._Run.step, binllm_llm._Run.ended, []
    binllm_llm._Run.step = lambda run: (steps.append(1), step(run))[1]
    binllm_llm._Run.ended = lambda run: ended(run) or len(run.curve) == stop
    model, curve = bu.tune(tiny_llm(), tokenizer(), PROMPTS, labels, **options)
    p = bu.score(model, tokenizer(), PROMPTS, progress=False)
    if int(os.environ.get("RANK", 0)) == 0:
        world = os.environ.get("WORLD_SIZE", "1")
        print(json.dumps({"loss": curve.loss.tolist(), "p": p.tolist(), "world": world, "steps": len(steps)}))


def tune_cut(llm, adapter):
    """A run of an LLM in four bits whose layers are cut among the processes; each step has one row."""
    model, words = bu.load_llm(llm, device="cpu")
    whole = bytes_of_layers(model)
    model = bs.shard(model, seed=0)
    options = {"batch_size": 1, "lr": 3e-3, "shuffle": False, "valid": (PROMPTS[8:], [1, 0] * 8)}
    model, curve = bu.tune(model, words, PROMPTS[:8], [1, 0] * 4, **options)
    p, part = bu.score(model, words, PROMPTS, progress=False), bytes_of_layers(model.get_base_model())
    if int(os.environ["RANK"]) == 0:
        bu.save_adapter(model, Path(adapter), {}, curve)
        found = {"loss": curve.loss.tolist(), "auc": curve.valid_auc.dropna().tolist(), "p": p.tolist()}
        print(json.dumps(found | {"whole": whole, "part": part}))


def bytes_of_layers(model):
    """What this process holds of the layers' frozen weights."""
    mine = (p.to_local() if hasattr(p, "to_local") else p for p in model.model.layers.parameters())
    return sum(p.nbytes for p in mine if not p.requires_grad)


def launched(processes, *arguments):
    """What `tune_here` or `tune_cut` printed in that many processes, which talk over gloo."""
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(HERE), *map(str, arguments)]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return launched(1, tmp_path_factory.mktemp("alone"))


def test_two_processes_learn_what_one_learns(alone, tmp_path):
    two = launched(2, tmp_path)
    assert (alone["world"], two["world"]) == ("1", "2")
    assert np.abs(np.array(alone["loss"]) - two["loss"]).max() < 1e-4 and len(set(alone["loss"])) > 5
    assert np.abs(np.array(alone["p"]) - two["p"]).max() < 1e-4


def test_a_run_goes_on_with_another_number_of_processes(alone, tmp_path):
    cut = launched(2, tmp_path, 4)
    assert len(cut["loss"]) == 4 < len(alone["loss"])
    resumed = launched(1, tmp_path)
    assert resumed["steps"] == len(alone["loss"]) - 4
    assert np.abs(np.array(alone["loss"]) - resumed["loss"]).max() < 1e-4
    assert np.abs(np.array(alone["p"]) - resumed["p"]).max() < 1e-4


def test_layers_cut_among_processes_learn_what_whole_ones_learn(tmp_path):
    sizes = dict(vocab_size=49_152, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2)
    llm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True))
    llm.save_pretrained(tmp_path / "llm")
    tokenizer().save_pretrained(tmp_path / "llm")
    one, two = (launched(n, "cut", tmp_path / "llm", tmp_path / str(n)) for n in (1, 2))
    assert one["part"] == one["whole"] == two["whole"] and two["part"] < 0.6 * two["whole"]
    for what in ("loss", "auc", "p"):
        assert len(one[what]) >= 4 and np.abs(np.array(one[what]) - two[what]).max() < 1e-4
    whole, words = bu.load_llm(tmp_path / "llm")
    p = bu.score(bu.load_adapter(whole, tmp_path / "2"), words, PROMPTS, progress=False)
    assert np.abs(p - two["p"]).max() < 1e-4  # the adapter of a cut model is one of the whole model


def test_processes_that_hold_different_runs_are_refused(monkeypatch):
    run = SimpleNamespace(name="a", curve=[1, 2])
    for others, good in (([("a", 2)], True), ([("a", 0)], False), ([("b", 2)], False)):
        monkeypatch.setattr("accelerate.utils.gather_object", lambda mine, others=others: mine + others)
        with nullcontext() if good else pytest.raises(ValueError, match="differ in data, weights or step"):
            binllm_llm._Run.check_processes(run)


def test_each_process_takes_a_share_and_all_together_every_row():
    for n, processes in ((17, 2), (3, 4), (24, 3)):
        shares = []
        for rank in range(processes):
            run = SimpleNamespace(accelerator=SimpleNamespace(num_processes=processes, process_index=rank))
            shares.append(binllm_llm._Run.mine(run, list(range(100, 100 + n))))
        assert sum(shares, []) == list(range(100, 100 + n)) and max(map(len, shares)) - min(map(len, shares)) <= 1


# ------------------------------------------------------------------------------------------- scoring, on a cluster
def load_tiny():
    return tiny_llm(), tokenizer()


@pytest.fixture(scope="module")
def client():
    from distributed import Client, LocalCluster

    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(bu.ROOT), os.environ.get("PYTHONPATH", "")])
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster,
        Client(cluster) as client,
    ):
        yield client


def load_and_note(folder):
    """A worker's model; every prompt that it is asked about is noted in a file of its own process."""
    model, words = load_tiny()
    real = binllm_llm.score  # in bu it may be a noting one already

    def noting(model, tokenizer, prompts, **options):
        time.sleep(0.3)  # that both workers get some
        with open(Path(folder, f"{os.getpid()}.json"), "a") as file:
            file.writelines(json.dumps(prompt) + "\n" for prompt in prompts)
        return real(model, tokenizer, prompts, **options)

    bu.score = noting
    return model, words


def test_each_prompt_is_answered_once_by_two_workers(client, tmp_path):
    load = partial(load_and_note, str(tmp_path))
    prompts = [f"{prompt} {i}" for i in range(4) for prompt in PROMPTS]
    p = bs.score_everywhere(client, load, prompts, rows_a_part=8, progress=False)
    assert np.abs(p - bu.score(*load_tiny(), prompts, progress=False)).max() < 1e-6
    noted = [[json.loads(line) for line in file.open()] for file in tmp_path.glob("*.json")]
    assert len(noted) == 2 and sorted(sum(noted, [])) == sorted(prompts)


def test_a_worker_that_is_killed_loses_nothing(client, tmp_path):
    load = partial(load_and_note, str(tmp_path))
    prompts = [f"{prompt} {i}" for i in range(8) for prompt in PROMPTS]

    def kill_one():
        while len(list(tmp_path.glob("*.json"))) < 2:
            time.sleep(0.05)
        killed.append(int(next(iter(tmp_path.glob("*.json"))).stem))
        os.kill(killed[0], signal.SIGKILL)

    killed, killer = [], threading.Thread(target=kill_one)
    killer.start()
    p = bs.score_everywhere(client, load, prompts, rows_a_part=8, progress=False)
    killer.join()
    assert killed and killed[0] not in client.run(os.getpid).values()
    assert np.abs(p - bu.score(*load_tiny(), prompts, progress=False)).max() < 1e-6


def test_what_a_worker_cannot_do_is_said_here(client):
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        bs.score_everywhere(client, load_tiny, ["", *PROMPTS], progress=False)


def test_prompts_go_by_place_whatever_their_index(monkeypatch):
    class Client(SimpleNamespace):
        def submit(self, _, run, load, prompts, pure):
            done = Future()
            done.set_result([float(prompt[1:]) for prompt in prompts])
            return done

    client = Client(scheduler_info=lambda n_workers: {"workers": {0: {"nthreads": 1}}}, cancel=lambda futures: None)
    monkeypatch.setattr("distributed.as_completed", list)
    prompts = pd.Series(["p3", "p1", "p0", "p2"], index=[3, 1, 0, 2])
    assert bs.score_everywhere(client, None, prompts, rows_a_part=3, progress=False).tolist() == [3, 1, 0, 2]


def test_one_text_is_no_list_of_prompts_and_parts_have_rows():
    for prompts, rows in (("hello", 256), (["a", "b"], 0), (["a", "b"], -1)):
        with pytest.raises(ValueError, match=f"here {rows} rows a part"):
            bs.score_everywhere(None, None, prompts, rows_a_part=rows)


@pytest.mark.parametrize(
    "threads, prompts, said",
    [
        ((1, 2), PROMPTS, "--nthreads 1"),
        ((), PROMPTS, "24 prompts and 0 workers"),
        ((1,), [], "0 prompts and 1 workers"),
    ],
)
def test_a_job_that_cannot_be_done_is_refused(threads, prompts, said):
    client = SimpleNamespace(
        scheduler_info=lambda n_workers: {"workers": dict(enumerate({"nthreads": n} for n in threads))}
    )
    with pytest.raises(ValueError, match=said):
        bs.score_everywhere(client, load_tiny, prompts)


# --------------------------------------------------------------------------------------------- codes, from shards
def in_shards(rows, folder, files=3, rows_a_group=40):
    parts = np.array_split(np.random.default_rng(0).permutation(len(rows)), files)
    bs.write_shards((rows.iloc[part] for part in parts), folder, rows_a_group)
    return bs.Shards(folder, together=2)


def test_shards_hold_each_row_once_in_an_order_of_its_own_each_epoch(toy, tmp_path):
    shards = in_shards(toy.train, tmp_path)
    assert len(shards) == len(toy.train) and shards.likes == toy.train.label.sum()
    assert (shards.users == np.bincount(toy.train.user)).all() and (shards.items == np.bincount(toy.train.item)).all()
    wanted = sorted(zip(toy.train.user, toy.train.item, toy.train.label))
    orders = []
    for seed in (0, 0, 1):
        shuffle, epochs = torch.Generator().manual_seed(seed), []
        for _ in range(2):
            batches = list(shards.batches(64, shuffle))
            assert {len(batch[0]) for batch in batches[:-1]} == {64} and batches[-1][2].dtype == torch.float32
            epochs.append([tuple(map(int, row)) for batch in batches for row in zip(*batch)])
            assert sorted(epochs[-1]) == wanted
        assert epochs[0] != epochs[1]
        orders.append(epochs)
    assert orders[0] == orders[1] != orders[2]


def test_codes_from_shards_rank_as_those_from_memory(ml1m, tmp_path):
    shards = in_shards(ml1m.train, tmp_path, rows_a_group=2000)
    codes, curve = bs.fit_streamed(shards, ml1m.valid, recipe="ste", max_epochs=25, progress=False)
    again, _ = bs.fit_streamed(shards, ml1m.valid, recipe="ste", max_epochs=25, progress=False)
    assert (codes.users == again.users).all() and (codes.items == again.items).all()
    memory, _ = bu.fit_codes(ml1m, max_epochs=25, progress=False)
    streamed, usual = (bu.auc(ml1m.valid.label, c.similarity(ml1m.valid)) for c in (codes, memory))
    assert streamed > 0.68 and streamed > usual - 0.03, (streamed, usual)
    assert len(curve) == 25 and codes.users.shape[1] == 32


def test_an_id_without_a_row_has_a_code_that_all_such_share(toy, tmp_path):
    rows = toy.train[(toy.train.user != 3) & (toy.train.user != 5)]
    codes, _ = bs.fit_streamed(
        in_shards(rows, tmp_path), toy.valid, bits=16, max_epochs=3, progress=False, recipe="ste"
    )
    assert (codes.users[3] == codes.users[5]).all() and len(codes.users) == max(toy.train.user.max(), 19) + 1


def a_file(folder, **columns):
    pq.write_table(pa.table({"user": [0, 1], "item": [0, 1], "label": [0, 1]} | columns), folder / "0.parquet")


def test_shards_are_made_anew_and_nothing_else_is_deleted(toy, tmp_path):
    for files in (3, 1):
        assert len(in_shards(toy.train, tmp_path / "shards", files)) == len(toy.train)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "shards/notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "shards"):
        with pytest.raises(ValueError, match="holds other files"):
            bs.write_shards([toy.train], folder)


@pytest.mark.parametrize(
    "options, said",
    [({"recipe": "no"}, "recipe is 'no'"), ({"bits": 12}, "multiple of 8"), ({"max_epochs": 0}, "max_epochs is 0")],
)
def test_what_fit_codes_refuses_is_refused_for_shards(toy, tmp_path, options, said):
    shards = in_shards(toy.train, tmp_path / "shards")
    with pytest.raises(ValueError, match=said):
        bs.fit_streamed(shards, toy.valid, **options)
    with pytest.raises(ValueError, match="valid: no rows"):
        bs.fit_streamed(shards, toy.valid.head(0))


@pytest.mark.parametrize(
    "columns, said",
    [
        ({"label": [0, 2]}, r"0\.parquet, row group 0: label must be 0 or 1"),
        ({"label": [0.0, 1.0]}, "label must be 0 or 1"),
        ({"user": [-1, 0]}, "user must be whole numbers from 0"),
        ({"user": ["a", "b"]}, "user must be whole numbers"),
        ({"item": pa.array([None, 1])}, "item must be whole numbers from 0 to 999,999, none missing"),
        ({"item": [0, 1 << 40]}, "item must be whole numbers"),
        ({"user": [0, 1 << 30]}, "user must be whole numbers from 0 to 999,999, none missing"),
        ({"label": [1, 1]}, "of 2 rows 2 are likes"),
    ],
)
def test_what_is_wrong_in_a_shard_is_said_with_its_place(tmp_path, columns, said):
    a_file(tmp_path, **columns)
    with pytest.raises(ValueError, match=said):
        bs.Shards(tmp_path)


def test_no_shards_a_broken_one_and_one_without_a_column(tmp_path):
    with pytest.raises(OSError, match=r"holds no \.parquet file"):
        bs.Shards(tmp_path)
    a_file(tmp_path)
    pd.DataFrame({"user": [1], "film": [2], "label": [1]}).to_parquet(tmp_path / "1.parquet")
    with pytest.raises(ValueError, match=r"1\.parquet, row group 0 cannot be read .*needs the columns"):
        bs.Shards(tmp_path)
    (tmp_path / "1.parquet").write_bytes((tmp_path / "0.parquet").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"1\.parquet is no Parquet file"):
        bs.Shards(tmp_path)


def test_other_peoples_parquet_is_not_replaced(toy, tmp_path):
    for name in ("20240101.parquet", "2023-01 raw.parquet", "000000.parquet"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(b"mine")
        with pytest.raises(ValueError, match="holds other files"):
            bs.write_shards([toy.train], folder)
        assert (folder / name).read_bytes() == b"mine"


if __name__ == "__main__":
    if sys.argv[1] == "cut":
        tune_cut(*sys.argv[2:])
    else:
        tune_here(sys.argv[1], *map(int, sys.argv[2:]))
