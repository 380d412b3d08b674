"""One pass, many questions: packs give every architecture's own answers, and read shared beginnings once."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import binllm_llm
import binllm_utils as bu

SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FEED = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES = {  # name: (model type, its configuration, whether packs are right for it)
    "llama": ("llama", FEED, True),
    "qwen2": ("qwen2", FEED, True),
    "qwen3": ("qwen3", FEED | {"head_dim": 8}, True),
    "gpt2": ("gpt2", {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}, True),
    "opt": ("opt", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 512}, True),
    "gpt_neox": ("gpt_neox", SMALL | {"intermediate_size": 48}, True),
    "phi with a bias": ("phi", SMALL | {"intermediate_size": 48}, True),
    "granite": ("granite", FEED | {"logits_scaling": 3.0}, True),
    "cohere": ("cohere", FEED | {"logit_scale": 0.5}, True),
    "gpt_neo, window 8": (
        "gpt_neo",
        {"vocab_size": 60, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8}
        | {"attention_types": [[["global", "local"], 1]]},
        False,
    ),
    "bloom": ("bloom", {"vocab_size": 60, "hidden_size": 32, "n_layer": 2, "n_head": 4}, False),
    "mistral, window 8": ("mistral", FEED | {"sliding_window": 8}, False),
    "gemma2, soft cap, window 8": (
        "gemma2",
        FEED | {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 0.5},
        False,
    ),
    "gemma3, window 8": ("gemma3_text", FEED | {"head_dim": 8, "sliding_window": 8}, False),
    "mamba": ("mamba", {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, False),
}
FAMILIES["gemma2, soft cap"] = ("gemma2", FAMILIES["gemma2, soft cap, window 8"][1] | {"sliding_window": 512}, False)


class Letters:
    """A tokenizer for tests: one token a letter, 1 to 59; spaces are left out."""

    eos_token_id = sep_token_id = None

    def __call__(self, text, **_):
        whole = [text] if isinstance(text, str) else text
        ids = [[1 + ord(letter) % 59 for letter in t if letter != " "] for t in whole]
        return type("Encoding", (), {"input_ids": ids[0] if isinstance(text, str) else ids})


def tiny(kind, config, seed=0):
    torch.manual_seed(seed)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(config | tokens)))
    for name, p in model.named_parameters():  # far from initial zeros, so that biases and heads matter
        p.data.normal_(0, 0.2 if "norm" not in name.lower() else 0.05).add_(1.0 if "norm" in name.lower() else 0.0)
    return model.eval()


def prompts_of(seed=0, n=12):
    """Prompts of two users who share a beginning each, and of others who share nothing, in random order."""
    rng = np.random.default_rng(seed)
    word = lambda n: "".join(rng.choice(list("abcdefghij"), n))  # noqa: E731
    ann, bob = "ann " + word(25), "bob " + word(30)
    prompts = [f"{user} {word(rng.integers(3, 12))}" for user in [ann] * n + [bob] * n]
    prompts += [word(rng.integers(1, 40)) for _ in range(5)] + [prompts[0]]
    return [prompts[i] for i in rng.permutation(len(prompts))]


def plainly(model, prompts):
    """P(Yes) by the model's full logits, one prompt at a time."""
    tokenizer, found = Letters(), []
    yes, no = bu.answer_tokens(tokenizer)
    with torch.inference_mode():
        for ids in tokenizer(prompts).input_ids:
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            found.append(torch.softmax(logits[[yes, no]], 0)[0].item())
    return np.array(found)


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_the_models_own(name):
    kind, config, packs = FAMILIES[name]
    model, prompts = tiny(kind, config), prompts_of()
    assert bu.can_pack(model) == packs
    plain = plainly(model, prompts)
    assert np.ptp(plain) > 1e-2  # else the comparison says nothing
    for tokens in (40, 150, None):
        assert np.abs(bu.score(model, Letters(), prompts, tokens=tokens, progress=False) - plain).max() < 1e-5


def test_a_composite_models_text_part_is_asked():
    """Gemma-3 with eyes: its config has no window or layers of its own, those of the text stand in a part of it."""
    text = FEED | {"head_dim": 8, "sliding_window": 8, "num_hidden_layers": 3}
    eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=eyes | {"image_size": 28, "patch_size": 14})
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    assert not bu.can_pack(model) and not hasattr(config, "max_position_embeddings")
    prompts = prompts_of()
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    scores = bu.score(model, Letters(), prompts, progress=False)
    assert np.abs(scores - plainly(model, prompts)).max() < 1e-5 and np.ptp(scores) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mask_is_in_the_models_precision_not_the_machines(dtype, monkeypatch):
    """As on a GPU, whose precision is half: a float32 model there and a half one here are asked all the same."""
    model, prompts = tiny("llama", FEED), prompts_of()
    plain = plainly(model, prompts)
    monkeypatch.setattr(binllm_llm, "compute_dtype", lambda: dtype)
    assert np.abs(bu.score(model, Letters(), prompts, progress=False) - plain).max() < 1e-5
    monkeypatch.undo()
    assert np.abs(bu.score(model.to(dtype), Letters(), prompts, progress=False) - plain).max() < 0.2


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_does_not_round_the_answers(autocast):
    """bfloat16 has multiples of 1/8 alone near 16, where a real LLM's logits are: different prompts would tie."""
    model = tiny("llama", FEED)
    head = model.lm_head.weight.data
    head[1] = 20 * head[0] + head[1] / 4  # the two answers' logits are large, and near each other
    head[0] *= 20
    ids = bu.encode_prompts(model, Letters(), prompts_of())
    (pack,) = bu.make_packs(ids, range(len(ids)), 10_000)
    true, half = bu.answer_logits(model, ids, pack, [0, 1]), model.to(torch.bfloat16)
    rounded = bu.answer_logits(half, ids, pack, [0, 1])
    binllm_llm.answer_in_float32(half.get_output_embeddings())
    half.lm_head, asked = copy.deepcopy(half.lm_head), half.lm_head
    asked.weight.data.zero_()  # a copy asks its own weights
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # as in tuning
        exact = bu.answer_logits(half, ids, pack, [0, 1])
    assert len(rounded.unique()) < len(exact.unique())
    assert (exact - true).abs().mean() < (rounded - true).abs().mean() < true.std() / 5


def test_an_empty_prompt_is_named():
    """In a pack it would get another prompt's answer."""
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        bu.score(tiny("llama", FEED), Letters(), ["abc", "", "abd"], progress=False)


@pytest.mark.parametrize("name", ["llama", "gemma3, window 8", "phi with a bias"])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_heeded_disabled_switched_and_merged(name, dora):
    kind, config, _ = FAMILIES[name]
    model, prompts = tiny(kind, config), prompts_of(1, n=20)  # 46: however many there are
    base = plainly(model, prompts)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "use_dora": dora}
    model = get_peft_model(model, LoraConfig(**settings)).eval()
    model.add_adapter("other", LoraConfig(**settings))

    def scored():
        return bu.score(model, Letters(), prompts, progress=False)

    first = scored()
    assert np.abs(first - plainly(model, prompts)).max() < 1e-5 and np.abs(first - base).max() > 1e-3
    model.set_adapter("other")
    second = scored()
    assert np.abs(second - plainly(model, prompts)).max() < 1e-5 and np.abs(second - first).max() > 1e-3
    with model.disable_adapter():
        assert np.abs(scored() - base).max() < 1e-5
    model.merge_adapter()
    assert np.abs(scored() - second).max() < 1e-4
    model.unmerge_adapter()
    model = model.merge_and_unload()
    assert np.abs(scored() - second).max() < 1e-4


def test_shared_beginnings_are_read_once():
    model, prompts = tiny("llama", FEED), prompts_of()
    read = []
    hook = model.register_forward_pre_hook(lambda _, __, kw: read.append(kw["input_ids"].numel()), with_kwargs=True)
    bu.score(model, Letters(), prompts, progress=False)
    hook.remove()
    whole = sum(map(len, prompts))
    beginnings = 24 + 29  # the second time and later, of ann's and bob's twelve prompts
    assert whole - sum(read) >= 11 * beginnings


LISTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=60)


@given(LISTS, st.integers(1, 60))
def test_packs_hold_each_prompt_once_and_share_what_they_say(ids, tokens):
    groups = bu.share_beginnings(ids, range(len(ids)))
    assert sorted(i for _, group in groups for i in group) == list(range(len(ids)))
    for shared, group in groups:
        assert all(ids[i][:shared] == ids[group[0]][:shared] and len(ids[i]) > shared for i in group)
        assert shared == 0 or len(group) > 1
    (one,) = bu.make_packs(ids, range(len(ids)), 10**6)
    assert bu.pack_inputs(ids, one)["input_ids"].shape[1] <= sum(map(len, ids))
    packs = list(bu.make_packs(ids, range(len(ids)), tokens))
    assert sorted(i for pack in packs for i in bu.rows_of(pack)) == list(range(len(ids)))
    for pack in packs:
        size = sum(shared + sum(len(ids[i]) - shared for i in rows) for shared, rows in pack)
        assert size <= tokens or len(bu.rows_of(pack)) == 1
        assert bu.pack_inputs(ids, pack)["input_ids"].shape == (1, size)


def test_an_ending_sees_its_beginning_and_itself_alone():
    inputs = bu.pack_inputs([[5, 6, 7], [5, 6, 8, 9], [3, 4]], [(2, [0, 1]), (0, [2])])
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3, 4]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 2, 3, 0, 1]]
    assert inputs["logits_to_keep"].tolist() == [2, 4, 6]
    sees = ["1000000", "1100000", "1110000", "1101000", "1101100", "0000010", "0000011"]
    assert [[int(v == 0) for v in row] for row in inputs["attention_mask"][0, 0]] == [[*map(int, row)] for row in sees]


@pytest.mark.parametrize("name", ["llama", "mistral, window 8"])
def test_gradients_are_those_of_plain_passes(name):
    kind, config, _ = FAMILIES[name]
    prompts, tokenizer = prompts_of(2), Letters()
    ids, answers = tokenizer(prompts).input_ids, bu.answer_tokens(Letters())
    grads = []
    for packed in (True, False):
        model = tiny(kind, config)
        parts = bu.make_packs(ids, range(len(ids)), 200, share=bu.can_pack(model))
        for pack in parts if packed else []:
            bu.answer_logits(model, ids, pack, answers).sin().sum().backward()
        for tokens in [] if packed else ids:
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
            (logits[answers[0]] - logits[answers[1]]).sin().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for n, g in grads[1].items():
        assert torch.allclose(grads[0][n], g, atol=1e-4 * g.abs().max().item() + 1e-6), n


def test_batches_keep_what_begins_alike_together():
    ids = Letters()(prompts_of(3)).input_ids
    groups = [set(group) for _, group in bu.share_beginnings(ids, range(len(ids)))]
    batches = bu.make_batches(ids, 4, epochs=2, seed=0)
    assert sorted(i for batch in batches for i in batch) == sorted([*range(len(ids))] * 2)
    assert all(len(batch) >= 4 for batch in batches[:3])
    for group in groups:
        assert any(group <= set(batch) for batch in batches)
    assert batches != bu.make_batches(ids, 4, epochs=2, seed=1)
    assert bu.make_batches(ids, 4, shuffle=False)[0] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi with a bias"])
def test_every_tensor_is_on_the_models_device(name):
    """On torch's meta device, which computes nothing: a tensor left on the CPU raises here, as it would on a GPU."""
    kind, config, _ = FAMILIES[name]
    prompts, answers = prompts_of(), bu.answer_tokens(Letters())
    ids = Letters()(prompts).input_ids
    model = tiny(kind, config).to("meta")
    for pack in bu.make_packs(ids, range(len(ids)), 100, bu.can_pack(model)):
        logits = bu.answer_logits(model, ids, pack, answers)
        assert logits.device.type == "meta" and logits.shape == (len(bu.rows_of(pack)),)
        logits.sum().backward()
