"""Runs of `tune` that are killed, cut short or cannot be kept: what was reached is never lost."""

import errno
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
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import binllm_llm
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
    real, calls = binllm_llm._warm_up_then_cosine, []

    def rate(now, steps):
        calls.append(now)
        if now == step:
            raise error
        return real(now, steps)

    monkeypatch.setattr(binllm_llm, "_warm_up_then_cosine", rate)
    return calls


def interrupted_at_step_3(folder, monkeypatch):
    """The bytes of the checkpoint that a run leaves in `folder` when it is interrupted there."""
    with monkeypatch.context() as patch:
        stop_at(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            tune_kept(bu.load_llm(layers=2), folder)
    return (folder / "checkpoint.safetensors").read_bytes()


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
    good = interrupted_at_step_3(tmp_path, monkeypatch)

    def full(tensors, path, **_):
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(
        OSError, match="cannot write .*checkpoint.safetensors .*No space left.*the one before is kept; make room"
    ):
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

    monkeypatch.setattr("sklearn.metrics.roc_auc_score", made_up)
    valid = PROMPTS, LABELS
    prompts = [f"{k} {prompt}" for k in range(5) for prompt in PROMPTS]
    model, curve = bu.tune(*llm, prompts, LABELS * 5, batch_size=4, lr=1e-2, valid=valid, progress=False)
    assert curve.valid_auc.dropna().tolist() == [0.6, 0.8, 0.7, 0.8, 0.5]
    assert len(curve) == 5  # of ten: three checks without a gain
    assert np.abs(bu.score(model, llm[1], PROMPTS, progress=False) - best[1]).max() < 1e-6
    assert np.abs(best[1] - best[4]).max() > 1e-3


def test_without_shuffling_the_steps_keep_the_order():
    steps = bu.make_batches([[0] * n for n in (3, 1, 2, 9, 5)], 2, 2, seed=0, shuffle=False)
    assert steps == [[0, 1], [2, 3], [4]] * 2


def test_small_packs_have_the_gradient_of_the_whole_batch(llm, monkeypatch):
    losses = []
    for tokens in (10, 10_000):
        monkeypatch.setattr(binllm_llm, "pack_tokens", lambda model, training=False, tokens=tokens: tokens)
        fresh = bu.load_llm(layers=2)
        losses.append(bu.tune(*fresh, PROMPTS, LABELS, batch_size=4, lr=1e-2, epochs=3, progress=False)[1].loss)
    assert np.allclose(*losses, atol=1e-4) and np.ptp(losses[0]) > 1e-2


def test_the_loop_is_the_textbooks(llm):
    """Against plain passes, one prompt at a time, with PyTorch's own AdamW: the same losses."""
    model, tokenizer = llm
    ids, (yes, no) = bu.encode_prompts(model, tokenizer, PROMPTS), bu.answer_tokens(tokenizer)
    _, curve = bu.tune(model, tokenizer, PROMPTS, LABELS, batch_size=4, lr=1e-2, epochs=3, progress=False)
    torch.manual_seed(0)
    plain = get_peft_model(bu.load_llm(layers=2)[0], LoraConfig(**bu.LORA["all"]))
    weights = [p for p in plain.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(weights, weight_decay=1e-3), []
    for batch, lr in zip(bu.make_batches(ids, 4, 3), curve.lr):
        inputs = [torch.tensor([ids[i]], device=plain.device) for i in batch]
        logits = torch.stack([plain(one).logits[0, -1].cpu() for one in inputs])
        targets = torch.tensor([float(LABELS[i]) for i in batch])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, yes] - logits[:, no], targets)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert np.allclose(losses, curve.loss, atol=1e-3) and np.ptp(losses) > 1e-2


def test_a_loss_that_is_no_number_stops_at_once_and_keeps_the_checkpoint(llm, tmp_path, monkeypatch):
    good = interrupted_at_step_3(tmp_path, monkeypatch)
    real = bu.answer_logits
    monkeypatch.setattr(binllm_llm, "answer_logits", lambda *args: real(*args) * float("nan"))
    with pytest.raises(FloatingPointError, match="step 3: the loss is nan.*; load a fresh model"):
        tune_kept(bu.load_llm(layers=2), tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == good


def test_valid_of_one_class_is_refused_before_the_first_step(llm, monkeypatch):
    calls = stop_at(monkeypatch, None, None)
    with pytest.raises(ValueError, match="valid: all 8 labels are 1.0"):
        bu.tune(*llm, PROMPTS, LABELS, valid=(PROMPTS, [1] * 8), progress=False)
    assert calls == []


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
    tokens = sum(map(len, bu.encode_prompts(*llm, PROMPTS)))
    assert re.search(rf"tuning on 8 rows, {tokens} tokens: about 0\.\d min", capsys.readouterr().out)
    shared = "A user has given high ratings to many films, and here is a list of them that goes on and on. "
    bu.tune(*bu.load_llm(layers=2), [shared + prompt for prompt in PROMPTS], LABELS, batch_size=8)
    beginning = len(llm[1](shared).input_ids)
    told = int(re.search(r"([\d,]+) tokens", capsys.readouterr().out)[1].replace(",", ""))
    assert told == pytest.approx(beginning + tokens, abs=10)  # the beginning is read once
