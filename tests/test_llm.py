"""The LLM: loading, scoring, tuning and keeping adapters, on the real model's first two layers."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file

import binllm_llm
import binllm_utils as bu

WORDS = "one two three four five six seven eight nine ten".split()


def prompts_of(n, seed=0):
    """Prompts of very different lengths, so that padding happens."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 40))) + "\n#Answer:" for _ in range(n)]


def lora(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def test_scores_equal_the_plain_way_whatever_the_pack(llm):
    """Full logits, one prompt at a time, softmax over Yes and No."""
    model, tokenizer = llm
    prompts = prompts_of(13)
    yes, no = tokenizer.encode(" Yes")[-1], tokenizer.encode(" No")[-1]
    plain = []
    with torch.inference_mode():
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
            logits = model(**inputs).logits[0, -1, [yes, no]]
            plain.append(torch.softmax(logits.double(), 0)[0].item())
    for tokens in (1, 100, None):
        got = bu.score(model, tokenizer, prompts, tokens=tokens, progress=False)
        assert np.abs(got - plain).max() < 1e-5
    assert np.ptp(plain) > 1e-4  # else the comparison says nothing


def test_the_tokens_that_the_project_stands_on(llm):
    _, tokenizer = llm
    assert tokenizer.tokenize("01101001") == list("01101001")
    assert bu.can_pack(llm[0])
    assert [tokenizer.decode([i]) for i in bu.answer_tokens(tokenizer)] == [" Yes", " No"]


def test_tuning_learns_and_touches_lora_only(llm):
    model, tokenizer = llm
    before = {name: p.clone() for name, p in model.state_dict().items()}
    prompts = [f"Is {word} good?\n#Answer:" for word in WORDS] * 4
    labels = [place % 2 for place in range(len(WORDS))] * 4
    tuned, curve = bu.tune(model, tokenizer, prompts, labels, batch_size=8, lr=5e-3, epochs=16, progress=False)
    assert curve.loss.tail(4).mean() < 0.3 < curve.loss.head(4).mean()
    scores = bu.score(tuned, tokenizer, prompts[: len(WORDS)], progress=False)
    assert ((scores > 0.5) == np.array(labels[: len(WORDS)])).all()
    base = tuned.get_base_model().state_dict()
    for name, old in before.items():
        new = base.get(name, base.get(name.replace(".weight", ".base_layer.weight", 1)))
        assert torch.equal(old, new), name
    layers = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[-4] for name in lora(tuned)} == layers
    assert all(8 in p.shape for p in lora(tuned).values())


def test_the_learning_rate_rises_in_a_line_then_falls(llm):
    model, tokenizer = llm
    _, curve = bu.tune(model, tokenizer, prompts_of(40), [0, 1] * 20, batch_size=2, lr=1e-3, progress=False)
    assert len(curve) == 20
    assert curve.lr.iloc[0] == pytest.approx(5e-4) and curve.lr.iloc[1] == pytest.approx(1e-3)
    assert curve.lr.iloc[1:].is_monotonic_decreasing and curve.lr.iloc[-1] < 1e-4


def test_the_seed_decides(llm):
    runs = []
    for seed in (0, 0, 1):
        model, tokenizer = bu.load_llm(layers=2)
        options = {"batch_size": 4, "seed": seed, "progress": False}
        tuned, curve = bu.tune(model, tokenizer, prompts_of(16), [0, 1] * 8, **options)
        runs.append((curve.loss.tolist(), bu.score(tuned, tokenizer, prompts_of(3), progress=False)))
    assert runs[0][0] == runs[1][0] and (runs[0][1] == runs[1][1]).all()
    assert runs[0][0] != runs[2][0]


def test_an_adapter_comes_back_identical(llm, tmp_path):
    model, tokenizer = llm
    tuned, curve = bu.tune(model, tokenizer, prompts_of(16), [0, 1] * 8, lr=1e-2, progress=False)
    before = bu.score(tuned, tokenizer, prompts_of(5), progress=False)
    bu.save_adapter(tuned, tmp_path / "adapter", {"seed": 0}, curve)
    fresh, _ = bu.load_llm(layers=2)
    untuned = bu.score(fresh, tokenizer, prompts_of(5), progress=False)
    again = bu.load_adapter(fresh, tmp_path / "adapter")
    assert (bu.score(again, tokenizer, prompts_of(5), progress=False) == before).all()
    assert np.abs(untuned - before).max() > 1e-4
    assert json.loads((tmp_path / "adapter/card.json").read_text()) == {"seed": 0}
    assert len(load_file(tmp_path / "adapter/adapter_model.safetensors")) == 28  # 2 layers, 7 matrices each, A and B


def test_a_model_that_carries_an_adapter_is_not_given_another(llm, tmp_path):
    """The second one would change the first one's answers, and the plain model's."""
    model, tokenizer = llm
    tuned, curve = bu.tune(model, tokenizer, prompts_of(16), [0, 1] * 8, progress=False)
    bu.save_adapter(tuned, tmp_path / "adapter", {}, curve)
    with pytest.raises(ValueError, match="already carries an adapter; load a fresh one"):
        bu.tune(model, tokenizer, prompts_of(16), [0, 1] * 8, progress=False)
    for carrier in (model, tuned):
        with pytest.raises(ValueError, match="already carries an adapter; load a fresh one"):
            bu.load_adapter(carrier, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"was tuned on 2 layers, the model given has 3"):
        bu.load_adapter(bu.load_llm(layers=3)[0], tmp_path / "adapter")


def test_the_papers_lora_is_on_two_projections(llm):
    model, tokenizer = llm
    tuned, _ = bu.tune(model, tokenizer, prompts_of(16), [0, 1] * 8, lora="paper", progress=False)
    assert {name.split(".")[-4] for name in lora(tuned)} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="lora is 'most'; choose one of paper, all"):
        bu.tune(*bu.load_llm(layers=2), prompts_of(16), [0, 1] * 8, lora="most", progress=False)


def test_nf4_answers_like_the_whole_model():
    whole, tokenizer = bu.load_llm(layers=2, nf4=False)
    small, _ = bu.load_llm(layers=2)  # four bits is the default
    assert small.get_memory_footprint() < 0.9 * whole.get_memory_footprint()  # the embedding stays as it is
    scores = [bu.score(model, tokenizer, prompts_of(4), progress=False) for model in (small, whole)]
    assert 0 < np.abs(scores[0] - scores[1]).max() < 0.2


@pytest.mark.parametrize("scored_before", [False, True])
def test_nf4_tunes_with_true_gradients(scored_before):
    """The first layer's gradient must be that of the dequantised weights, whether or not the model was scored before.

    (bitsandbytes repacks weights when scoring on some CPUs, and then no gradient passes.)
    """
    small, tokenizer = bu.load_llm(layers=2, nf4=True)
    if scored_before:
        bu.score(small, tokenizer, prompts_of(2), progress=False)
    whole, _ = bu.load_llm(layers=2, nf4=False)
    for name, module in small.named_modules():
        if hasattr(module, "quant_state"):
            values = dequantize_4bit(module.weight.data, module.weight.quant_state)
            whole.get_submodule(name).weight.data.copy_(values)
    curves = [
        bu.tune(model, tokenizer, prompts_of(16), [0, 1] * 8, batch_size=4, lr=3e-3, epochs=6, progress=False)[1].loss
        for model in (small, whole)
    ]
    assert np.allclose(*curves, rtol=1e-3)
    assert curves[0].iloc[-4:].mean() < curves[0].iloc[:4].mean()


def test_loading_order(monkeypatch, tmp_path):
    """Explicit name, then BINLLM_LLM, then the registry, then the hub."""
    model, tokenizer = bu.load_llm(layers=2, nf4=False)
    for folder in ("explicit", "variable"):
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    assert model.name_or_path == bu.SMOLLM2
    monkeypatch.setenv("BINLLM_LLM", str(tmp_path / "variable"))
    assert bu.load_llm()[0].name_or_path == str(tmp_path / "variable")
    assert bu.load_llm(str(tmp_path / "explicit"))[0].name_or_path == str(tmp_path / "explicit")
    assert bu.load_llm(bu.SMOLLM2, layers=2)[0].name_or_path == bu.SMOLLM2  # named, it comes from the registry too
    monkeypatch.delenv("BINLLM_LLM")

    def no_registry():
        raise OSError("no registry")

    monkeypatch.setattr(binllm_llm, "_smollm2_folder", no_registry)
    asked, real = [], transformers.AutoConfig.from_pretrained
    monkeypatch.setattr(
        transformers.AutoConfig, "from_pretrained", lambda name, **how: asked.append((name, how)) or real(name, **how)
    )
    with pytest.raises(OSError, match=f"no LLM '{bu.SMOLLM2}'"):  # it did turn to the hub, which tests cannot reach
        bu.load_llm()
    (name, how), _ = asked[0], asked.clear()
    assert name == bu.SMOLLM2 and re.fullmatch("[0-9a-f]{40}", how["revision"]) and not how["trust_remote_code"]
    # what comes from there are other weights than the registry's: under its own name no adapter is taken for the other
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda name, **how: real(folder, **how))
    loads = [
        (loader, loader.from_pretrained) for loader in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM)
    ]
    for loader, load in loads:
        monkeypatch.setattr(loader, "from_pretrained", lambda name, load=load, **how: load(folder, **how))
    folder = str(tmp_path / "explicit")
    assert bu.load_llm(nf4=False)[0].name_or_path == binllm_llm.SMOLLM2_HUB == bu.SMOLLM2 + "@hub"


def test_a_missing_llm_is_named():
    with pytest.raises(OSError, match="no LLM 'nobody/no-such-model'.*Give a folder") as caught:
        bu.load_llm("nobody/no-such-model")
    assert "\n" not in str(caught.value)


def test_bad_prompts_are_named(llm):
    model, tokenizer = llm
    with pytest.raises(ValueError, match="give a list of prompts, at least one"):
        bu.score(model, tokenizer, [])
    with pytest.raises(ValueError, match="give a list of prompts"):
        bu.score(model, tokenizer, "one prompt")  # not a prompt a letter
    with pytest.raises(ValueError, match=r"prompt 1 has \d+ tokens, the model reads 8192"):
        bu.score(model, tokenizer, ["short", "word " * 9000 + "."])


@pytest.mark.parametrize(
    "labels, said",
    [
        ([1, 1, 1], r"all 3 labels are 1\.0; take rows with likes and dislikes"),
        ([0, 1], r"3 prompts and labels of shape \(2,\); give one label a prompt"),
        ([[0, 1, 1]], r"3 prompts and labels of shape \(1, 3\); give one label a prompt"),
        ([0, 1, 2], r"labels go from 0\.0 to 2\.0; give 0 and 1"),
        ([0, 1, np.nan], "labels go from nan to nan; give 0 and 1"),
    ],
)
def test_bad_labels_are_named(llm, labels, said):
    with pytest.raises(ValueError, match=said):
        bu.tune(*llm, prompts_of(3), labels, progress=False)


def test_answers_that_begin_alike_are_refused():
    class OneToken:
        def __call__(self, text):
            return type("Encoding", (), {"input_ids": [7, 8] + [9] * ("Yes" in text or "No" in text)})

    with pytest.raises(ValueError, match="the same token"):
        bu.answer_tokens(OneToken())


def test_a_foreign_adapter_is_refused(llm, tmp_path):
    model, tokenizer = llm
    tuned, curve = bu.tune(model, tokenizer, prompts_of(4), [0, 1] * 2, progress=False)
    bu.save_adapter(tuned, tmp_path / "adapter", {}, curve)
    other, _ = bu.load_llm(layers=2)
    other.name_or_path = "some/other-model"
    with pytest.raises(ValueError, match=f"was tuned on {bu.SMOLLM2}, the model given is some/other"):
        bu.load_adapter(other, tmp_path / "adapter")
    with pytest.raises(OSError, match=r"holds no adapter_model\.safetensors"):
        bu.load_adapter(other, tmp_path / "nothing")


def test_importing_the_module_is_quick():
    """The heavy libraries load where they are used, so that notebooks without an LLM start at once."""
    heavy = "('transformers', 'peft', 'faiss', 'matplotlib')"
    code = f"import sys, binllm_utils; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=bu.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
