"""Runs of `tune` that are killed, cut short or cannot be kept: what was reached is never lost."""

import contextlib
import errno
import functools
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import binllm_utils as bu

# Run in a process of its own, so that it can be killed: 24 steps on the first two layers, a checkpoint after each.
RUN = """
import sys
import torch
import binllm_utils as bu
from safetensors.torch import save_file

torch.set_num_threads(1)
prompts = [f"{'one two three four five '.split(' ')[i % 5]} {i} " * (1 + i % 7) + "#Answer:" for i in range(48)]
labels = [i * 7 % 5 % 2 for i in range(48)]
model, tokenizer = bu.load_llm(layers=2)
options = dict(batch_size=4, epochs=2, lr=5e-3, seed=3, folder=sys.argv[1], save_seconds=0)
model, curve = bu.tune(model, tokenizer, prompts, labels, **options)
save_file({name: p.data.clone() for name, p in model.named_parameters() if p.requires_grad}, sys.argv[2])
curve.drop(columns="seconds").to_csv(sys.argv[3], index=False)
"""


def start(folder):
    command = [sys.executable, "-c", RUN, folder / "kept", folder / "out.safetensors", folder / "out.csv"]
    return subprocess.Popen(list(map(str, command)), cwd=bu.ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


def test_a_killed_run_ends_where_an_unbroken_one_does(tmp_path):
    """kill -9 at random moments, again and again, the moment of writing included; every start goes on from the last."""
    (tmp_path / "whole").mkdir()
    whole = start(tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read().decode()
    (tmp_path / "broken").mkdir()
    kept, kills, sizes = tmp_path / "broken/kept/checkpoint.safetensors", 0, []
    dice = random.Random(0)
    for _ in range(40):
        run = start(tmp_path / "broken")
        before = kept.stat().st_mtime_ns if kept.exists() else 0
        while run.poll() is None and kills < 4:
            if kept.exists() and kept.stat().st_mtime_ns > before:  # at least one more step than at the last start
                time.sleep(dice.random() * 0.6)
                run.send_signal(signal.SIGKILL)
                kills += 1
        code = run.wait()
        sizes.append(len(load_file(kept)["curve"]))
        if code == 0:
            break
        assert code == -signal.SIGKILL, run.stderr.read().decode()
    assert kills == 4 and sizes == sorted(sizes) and sizes[0] < sizes[-1] == 24
    one, other = (load_file(tmp_path / side / "out.safetensors") for side in ("whole", "broken"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    curves = [(tmp_path / side / "out.csv").read_text() for side in ("whole", "broken")]
    assert curves[0] == curves[1]


PROMPTS = [f"{word}?\n#Answer:" for word in "one two three four five six seven eight".split()]
LABELS = [0, 1] * 4


def tune_kept(llm, folder, **options):
    return bu.tune(
        *llm, PROMPTS, LABELS, batch_size=2, lr=1e-2, folder=folder, save_seconds=0, progress=False, **options
    )


def stop_at(monkeypatch, step, error):
    """Raise `error` at the beginning of that step."""
    real, calls = bu._warm_up_then_cosine, []

    def rate(now, steps):
        calls.append(now)
        if now == step:
            raise error
        return real(now, steps)

    monkeypatch.setattr(bu, "_warm_up_then_cosine", rate)
    return calls


def test_an_interrupted_run_goes_on(llm, tmp_path, monkeypatch):
    """Ctrl-C, or a notebook's stop button: the steps done so far are not done again."""
    # The opposite is wanted on valid, so that an early step is the best and must come back from the checkpoint.
    valid = PROMPTS, [1 - label for label in LABELS]
    whole, curve = bu.tune(*llm, PROMPTS, LABELS, batch_size=2, lr=1e-2, valid=valid, progress=False)
    assert curve.valid_auc.idxmax() < 3
    wanted = bu.score(whole, llm[1], PROMPTS, progress=False)
    with monkeypatch.context() as patch:
        stop_at(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            tune_kept(bu.load_llm(layers=2), tmp_path, valid=valid)
    calls = stop_at(monkeypatch, None, None)
    again, resumed = tune_kept(bu.load_llm(layers=2), tmp_path, valid=valid)
    assert calls == [4]
    assert resumed.loss.tolist() == curve.loss.tolist()
    assert (bu.score(again, llm[1], PROMPTS, progress=False) == wanted).all()
    tune_kept(bu.load_llm(layers=2), tmp_path, valid=valid)  # finished: nothing is left to do
    assert calls == [4]


def test_a_full_disk_leaves_the_last_good_checkpoint(llm, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            tune_kept(bu.load_llm(layers=2), tmp_path)
    good = (tmp_path / "checkpoint.safetensors").read_bytes()

    def full(tensors, path, **_):
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="cannot write the checkpoint .*No space left.*the one before is kept; make room"):
        tune_kept(bu.load_llm(layers=2), tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == good
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_a_damaged_or_foreign_checkpoint_is_named(llm, tmp_path):
    tune_kept(llm, tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is of another run"):
        tune_kept(bu.load_llm(layers=2), tmp_path, seed=1)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged .*delete it to begin anew"):
        tune_kept(bu.load_llm(layers=2), tmp_path)
    assert len(path.read_bytes()) == len(whole) // 2  # a person decides, not we
    save_file({"something": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is of another run"):
        tune_kept(bu.load_llm(layers=2), tmp_path)


def test_early_stopping_returns_the_best_weights(llm, monkeypatch):
    """With the AUC on valid made up: best at the second check, never better again."""
    found = iter([0.6, 0.8, 0.7, 0.8, 0.5, 0.9])
    best = []

    def made_up(labels, scores):
        best.append(scores)
        return next(found)

    monkeypatch.setattr(bu, "auc", made_up)
    valid = PROMPTS, LABELS
    model, curve = bu.tune(*llm, PROMPTS * 5, LABELS * 5, batch_size=4, lr=1e-2, valid=valid, progress=False)
    assert curve.valid_auc.dropna().tolist() == [0.6, 0.8, 0.7, 0.8, 0.5]
    assert len(curve) == 5  # of ten: three checks without a gain
    assert np.abs(bu.score(model, llm[1], PROMPTS, progress=False) - best[1]).max() < 1e-6
    assert np.abs(best[1] - best[4]).max() > 1e-3


def test_each_epoch_sees_each_prompt_once_and_little_is_padded():
    rng = np.random.default_rng(0)
    ids = [[0] * n for n in rng.integers(100, 300, 1000)]
    steps = list(bu._training_batches(ids, 8, 2, seed=0))
    assert len(steps) == 250 and all(len(batch) == 8 for batch in steps)
    for epoch in (steps[:125], steps[125:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(1000))
    assert steps[:125] != steps[125:] and steps != list(bu._training_batches(ids, 8, 2, seed=1))
    read = real = 0
    for part in (part for batch in steps for part in bu._split(batch, ids, 500)):
        lengths = [len(ids[i]) for i in part]
        assert len(part) == 1 or len(part) * max(lengths) <= 500
        read, real = read + len(part) * max(lengths), real + sum(lengths)
    assert 1 - real / read < 0.05


def test_without_shuffling_the_steps_keep_the_order():
    steps = list(bu._training_batches([[0] * n for n in (3, 1, 2, 9, 5)], 2, 2, seed=0, shuffle=False))
    assert steps == [[0, 1], [2, 3], [4]] * 2


def test_small_parts_have_the_gradient_of_the_whole_batch(llm, monkeypatch):
    losses = []
    for tokens in (10, 10_000):
        monkeypatch.setattr(bu, "_tokens_at_once", lambda model, layers, tokens=tokens: tokens)
        fresh = bu.load_llm(layers=2)
        losses.append(bu.tune(*fresh, PROMPTS, LABELS, batch_size=4, lr=1e-2, epochs=3, progress=False)[1].loss)
    assert np.allclose(*losses, atol=1e-4) and np.ptp(losses[0]) > 1e-2


def test_a_shared_beginning_is_read_once_and_changes_no_gradient(llm, monkeypatch):
    """Half of the prompts begin alike; with the sharing switched off the run is the same but reads more tokens."""
    long = "A user has given high ratings to many films, and here is a list of them that goes on and on. "
    prompts = [long + prompt for prompt in PROMPTS] + PROMPTS
    losses, read, real = [], [], bu.answer_logit

    def counted(model, batch, *rest):
        read[-1] += sum(map(len, batch))
        return real(model, batch, *rest)

    monkeypatch.setattr(bu, "answer_logit", counted)
    by_prefix = bu._by_prefix
    for least in (8, 100):
        monkeypatch.setattr(bu, "_by_prefix", functools.partial(by_prefix, least=least))
        read.append(0)
        fresh = bu.load_llm(layers=2)
        losses.append(bu.tune(*fresh, prompts, LABELS * 2, batch_size=16, lr=1e-2, epochs=4, progress=False)[1].loss)
    assert np.allclose(*losses, atol=1e-4) and np.ptp(losses[0]) > 1e-2
    assert read[0] < 0.6 * read[1]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lora_in_one_product_trains_as_pefts_own_layers_do(llm, monkeypatch, dropout):
    """The same gradients, steps and answers on valid in between; layers with dropout stay as they are."""
    monkeypatch.setitem(bu.LORA, "lora_dropout", dropout)
    used, product, found = [], bu._LoraProduct.apply, []
    monkeypatch.setattr(bu._LoraProduct, "apply", lambda *args: used.append(1) or product(*args))
    for one_product in (bu._one_product, contextlib.nullcontext):
        monkeypatch.setattr(bu, "_one_product", lambda model, way=one_product: way(model))
        options = {"batch_size": 4, "lr": 1e-2, "epochs": 5, "valid": (PROMPTS * 4, LABELS * 4), "progress": False}
        model, curve = bu.tune(*bu.load_llm(layers=2), PROMPTS, LABELS, **options)
        lora = [p.detach().flatten() for name, p in model.named_parameters() if "lora_" in name]
        found.append((curve.loss, curve.valid_auc, torch.cat(lora), len(used)))
        assert not any("forward" in vars(layer) for layer in model.modules())
    (loss, auc, weights, first), (plain_loss, plain_auc, plain_weights, both) = found
    assert np.allclose(loss, plain_loss, atol=1e-4) and np.ptp(loss) > 1e-2
    assert np.allclose(auc, plain_auc, equal_nan=True) and torch.allclose(weights, plain_weights, atol=1e-3)
    assert first == both and (first > 0) == (dropout == 0)


def test_activations_computed_twice_train_alike():
    """What a GPU does whose memory does not hold them."""
    losses = []
    for twice in (False, True):
        model, tokenizer = bu.load_llm(layers=2)
        if twice:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        losses.append(
            bu.tune(model, tokenizer, PROMPTS, LABELS, batch_size=4, lr=1e-2, epochs=4, progress=False)[1].loss
        )
    assert np.allclose(*losses, atol=1e-4) and np.ptp(losses[0]) > 1e-2


def test_the_cost_is_told_beforehand(llm, capsys):
    bu.tune(*llm, PROMPTS, LABELS, batch_size=4)
    out = capsys.readouterr().out
    tokens = sum(map(len, bu.encode_prompts(*llm, PROMPTS)))
    assert f"tuning on {tokens} tokens: about 0.0 min and 0.2 GB" in out
    shared = "A user has given high ratings to many films, and here is a list of them that goes on and on. "
    bu.tune(*bu.load_llm(layers=2), [shared + prompt for prompt in PROMPTS], LABELS, batch_size=8)
    beginning = len(llm[1](shared).input_ids)
    told = int(re.search(r"tuning on ([\d,]+) tokens", capsys.readouterr().out)[1].replace(",", ""))
    assert told == pytest.approx(beginning + tokens, abs=10)  # the beginning is read once
