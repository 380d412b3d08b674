"""A tuned LLM taken elsewhere gives the answers that it gave here."""

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import binllm_export as be
import binllm_utils as bu

PROMPTS = [f"Is {word} alike?\n#Answer:" for word in "01101 11011 00000 10101 one two".split()]


@pytest.fixture(params=[("all", True), ("paper", True), ("all", False)], ids=["all NF4", "q and v NF4", "all float32"])
def tuned(request):
    """(model, tokenizer): two layers, tuned so that the adapter counts."""
    lora, nf4 = request.param
    model, tokenizer = bu.load_llm(layers=2, nf4=nf4)
    model, curve = bu.tune(model, tokenizer, PROMPTS, [0, 1, 1, 0, 1, 0], lora=lora, lr=5e-3, epochs=4, progress=False)
    return model, tokenizer, curve


def answers(model, tokenizer):
    return bu.score(model, tokenizer, PROMPTS, progress=False)


def test_merged_weights_answer_as_the_adapter_does(tuned, tmp_path):
    model, tokenizer, _ = tuned
    with model.disable_adapter():
        before = answers(model, tokenizer)
    wanted = answers(model, tokenizer)
    assert np.abs(wanted - before).max() > 0.01
    plain = be.write_merged(model, tokenizer, tmp_path / "merged")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for other in (plain, read):
        assert np.abs(answers(other, AutoTokenizer.from_pretrained(tmp_path / "merged")) - wanted).max() < 1e-4
    assert np.abs(answers(model, tokenizer) - wanted).max() == 0  # the tuned one is as it was
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"mine holds other files \(thesis\.txt\)"):
        be.write_merged(model, tokenizer, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert {file.suffix for file in (tmp_path / "merged").iterdir()} <= {".safetensors", ".json", ".jinja", ".txt"}


def test_a_gguf_file_read_back_gives_the_same_answers(tmp_path):
    model, tokenizer = bu.load_llm(layers=2, nf4=True)
    model, _ = bu.tune(model, tokenizer, PROMPTS, [0, 1, 1, 0, 1, 0], lr=5e-3, epochs=4, progress=False)
    plain, wanted = be.merged(model), answers(model, tokenizer)
    for half, close in ((False, 1e-4), (True, 2e-3)):
        be.write_gguf(plain, tmp_path / "film.gguf", half)
        source = dict(pretrained_model_name_or_path=str(tmp_path), gguf_file="film.gguf")
        read = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        if not half:  # the slowest part, and the same in both
            tokenizer = AutoTokenizer.from_pretrained(**source)
        assert np.abs(answers(read, tokenizer) - wanted).max() < close
    assert read.config.num_hidden_layers == 2 and [file.name for file in tmp_path.iterdir()] == ["film.gguf"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"use_dora": True}, "default"),
        ({"modules_to_save": ["lm_head"]}, "default"),
        ({"target_modules": ["lm_head"]}, "default"),
        ({}, "another"),
    ],
)
def test_what_no_sum_of_weights_says_is_not_merged(options, name):
    model, _ = bu.load_llm(layers=1, nf4=False)
    with pytest.raises(ValueError, match="merged takes one plain LoRA adapter"):
        be.merged(get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj"]} | options), name))


def test_a_gguf_file_of_another_llama_is_refused(tmp_path):
    """The settings of the file come from the default LLM's."""
    for changed in ({"num_key_value_heads": 9}, {"intermediate_size": 64}, {"rope_parameters": {"rope_theta": 1e4}}):
        model, _ = bu.load_llm(layers=1, nf4=False)
        for key, value in changed.items():
            setattr(model.config, key, value)
        with pytest.raises(ValueError, match=r"convert_hf_to_gguf\.py"):
            be.write_gguf(model, tmp_path / "x.gguf")


def test_what_has_no_adapter_or_another_tokenizer_is_refused(tmp_path):
    model, _ = bu.load_llm(layers=1)
    with pytest.raises(ValueError, match="carries no adapter"):
        be.merged(model)
    with pytest.raises(ValueError, match="give what merged"):
        be.write_gguf(model, tmp_path / "x.gguf")  # its weights are in four bits
    model.config.vocab_size = 7
    with pytest.raises(ValueError, match=r"convert_hf_to_gguf\.py"):
        be.write_gguf(model, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="holds no adapter"):
        be.write_card(tmp_path, "x", "x", {})


def test_the_card_names_the_llm_and_the_folder_is_what_peft_reads(tmp_path):
    model, tokenizer = bu.load_llm(nf4=False)
    model, curve = bu.tune(model, tokenizer, PROMPTS[:2], [0, 1], lr=1e-2, progress=False)
    bu.save_adapter(model, tmp_path / "adapter", {}, curve)
    be.write_card(tmp_path / "adapter", "Films", "Tuned on two prompts.", {"rows": 2, "AUC": 0.5})
    card = (tmp_path / "adapter" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == bu.SMOLLM2 and front["library_name"] == "peft" and "| rows | 2 |" in card
    plain, _ = bu.load_llm(nf4=False)
    there = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert np.abs(answers(there, tokenizer) - answers(model, tokenizer)).max() < 1e-5
    again = bu.load_adapter(bu.load_llm(nf4=False)[0], tmp_path / "adapter")  # ours reads it with the card, too
    assert np.abs(answers(again, tokenizer) - answers(model, tokenizer)).max() < 1e-5
