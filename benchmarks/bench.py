"""Speed and memory side by side with the plain way of doing the same; each comparison becomes a row of bench.csv.

python benchmarks/bench.py               all of them, about fifty minutes on two CPU cores
python benchmarks/bench.py score tune     some
python benchmarks/bench.py qlora         4-bit QLoRA of a model of 7 billion weights, on a GPU only; 20 GB of disk

Both sides run in one go, taking turns, and must give the same result; the ratio is that of the medians.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import records

import binllm_extras as bx
import binllm_utils as bu

PEER_BATCH = 64  # as the reference code evaluates
SMALL_CARD = 12 * 2**30  # bytes: what a free Colab GPU leaves for the model
COLUMNS = "bench ours peer unit ratio peer_name peer_version hardware versions commit runs".split()


def take_turns(ours, peer, runs):
    """Run both `runs` times in alternation; returns (our seconds, peer seconds, our last result, peer's)."""
    seconds, results = ([], []), [None, None]
    for _ in range(runs):
        for side, work in enumerate((ours, peer)):
            began = time.perf_counter()
            results[side] = work()
            seconds[side].append(time.perf_counter() - began)
    return *seconds, *results


def note(bench, ours, peer, unit, peer_name, peer_version, runs, more_is_better=False):
    """Print one comparison and put it into bench.csv in place of an earlier one."""
    ours, peer = float(np.median(ours)), float(np.median(peer))
    ratio = ours / peer if more_is_better else peer / ours
    row = {"bench": bench, "ours": round(ours, 4), "peer": round(peer, 4), "unit": unit, "ratio": round(ratio, 2)}
    row |= {"peer_name": peer_name, "peer_version": peer_version, "runs": runs}
    records.put_row(ROOT / "data" / "results" / "bench.csv", {column: row.get(column) for column in COLUMNS}, ["bench"])
    print(f"{bench}: {ratio:.2f} times as good ({ours:.3g} against {peer:.3g} {unit}, {peer_name})", flush=True)


def plain_ste(dataset, seed, epochs):
    """The same training with a row-wise DataLoader and scikit-learn's AUC; the valid AUC of each epoch."""
    how = bu.RECIPES["ste"]
    torch.manual_seed(seed)
    model = bu.BinMF(dataset, 32, how)
    optimizer = torch.optim.Adam(model.parameters(), lr=how.lr, weight_decay=how.weight_decay)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(how.average))
    rows = TensorDataset(*(torch.tensor(dataset.train[c].to_numpy()) for c in ("user", "item", "label")))
    shuffle, curve = torch.Generator().manual_seed(seed), []
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(rows), generator=shuffle).tolist()
        own = torch.Generator()  # else the loader takes a number that our side gives to dropout
        for users, items, labels in DataLoader(rows, batch_size=2048, sampler=order, generator=own):
            loss = F.binary_cross_entropy_with_logits(model(users, items), labels.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update_parameters(model)
        scores = bu.cf_scores(average.module, dataset.valid)
        curve.append(roc_auc_score(dataset.valid.label, scores))
    return curve


def bench_codes_fit():
    """ML-1M, 32 bits, on one core: 20 epochs, and the same the plain way; then five whole fits."""
    dataset, epochs = bu.load_ml1m(), 20
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    work = partial(bu.fit_codes, dataset, max_epochs=epochs, progress=False)
    a, b, ours, plain = take_turns(lambda: work()[1].valid_auc, lambda: plain_ste(dataset, 0, epochs), runs=3)
    torch.set_num_threads(threads)
    assert np.allclose(ours, plain, atol=5e-3), "the two sides must train alike"
    began = time.perf_counter()
    for seed in range(5):
        bu.fit_codes(dataset, seed=seed, progress=False)
    print(f"five seeds at 32 bits, from data to codes: {time.perf_counter() - began:.1f} s")
    peer = "torch DataLoader + scikit-learn AUC", f"{version('torch')}, {version('scikit-learn')}"
    note("codes_fit", np.array(a) / epochs, np.array(b) / epochs, "s per epoch", *peer, 3)


def bench_hamming():
    """The ten nearest of a million 64-bit codes to each of 2,000: from 0/1 arrays to ids, ours and faiss alone."""
    import faiss

    rng = np.random.default_rng(0)
    codes, query = rng.integers(0, 2, (10**6, 64), dtype=np.uint8), rng.integers(0, 2, (2000, 64), dtype=np.uint8)

    def direct():
        index = faiss.IndexBinaryFlat(64)
        index.add(np.packbits(codes, axis=1))
        return index.search(np.packbits(query, axis=1), 10)[0]

    a, b, ours, distance = take_turns(lambda: bx.nearest_codes(codes, query, 10)[1], direct, runs=15)
    assert np.allclose(64 * (1 - ours), distance)
    note("hamming", a, b, "s", "faiss IndexBinaryFlat directly", version("faiss-cpu"), 15)


def plain_scores(model, tokenizer, prompts):
    """P(Yes) of each prompt with transformers alone: whole batches, whole logits, padded on the left."""
    tokenizer.padding_side = "left"
    yes, no = bu.answer_tokens(tokenizer)
    scores = []
    with torch.inference_mode():
        for start in range(0, len(prompts), PEER_BATCH):
            batch = tokenizer(prompts[start : start + PEER_BATCH], padding=True, return_tensors="pt").to(model.device)
            logits = model(**batch).logits[:, -1]
            scores += torch.softmax(logits[:, [yes, no]], 1)[:, 0].tolist()
    return np.array(scores)


def our_scores(model, tokenizer, prompts):
    return bu.score(model, tokenizer, prompts, progress=False)


def our_tuning(model, tokenizer, prompts, batch_size=8):
    """Tune on `prompts`, every second answer Yes; nothing is returned that the peer's could be compared with."""
    labels = np.arange(len(prompts)) % 2
    bu.tune(model, tokenizer, prompts, labels, batch_size=batch_size, lr=1e-4, progress=False)


def trl_tuning(model, tokenizer, prompts, batch_size=8):
    """The same rows, LoRA, precision and batch in TRL's SFTTrainer. Its loss is over the whole vocabulary."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = {"prompt": prompts, "completion": [[" Yes", " No"][place % 2] for place in range(len(prompts))]}
    options = dict(per_device_train_batch_size=batch_size, num_train_epochs=1, learning_rate=1e-4, max_length=None)
    options |= dict(gradient_checkpointing=False, report_to="none", save_strategy="no")
    half, cuda = bu.compute_dtype(), torch.cuda.is_available()
    options |= dict(use_cpu=not cuda, bf16=half == torch.bfloat16, fp16=half == torch.float16)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(output_dir=folder, disable_tqdm=True, **options)
        parts = dict(train_dataset=Dataset.from_dict(rows), processing_class=tokenizer)
        SFTTrainer(model, config, peft_config=LoraConfig(**bu.LORA["all"], task_type="CAUSAL_LM"), **parts).train()


def child(work, prompts_file, out_file):
    """Do one side's work in a process of its own, so that its peak memory is its own. Prints seconds and gigabytes.

    The memory is that of the GPU where there is one; option `card` leaves so many bytes of it free and holds the rest.
    """
    work = {f.__name__: f for f in (our_scores, plain_scores, our_tuning, trl_tuning)}[work]
    prompts, options = json.loads(Path(prompts_file).read_text())
    card, held = options.pop("card", None), torch.empty(0)
    if card:
        held = torch.empty(max(0, torch.cuda.mem_get_info()[0] - card), dtype=torch.uint8, device="cuda")
    with records.PeakMemory() as memory:  # not ru_maxrss, into which Linux counts what the parent held
        model, tokenizer = bu.load_llm()
        our_scores(model, tokenizer, prompts[:2])  # warm up
        began = time.perf_counter()
        scores = work(model, tokenizer, prompts, **options)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    if scores is not None:
        np.save(out_file, scores)
    peak = memory.before + memory.gb
    if torch.cuda.is_available():
        peak = (torch.cuda.max_memory_reserved() - held.nbytes) / 1e9
    print(json.dumps([seconds, peak]))


def in_children(sides, prompts, runs=3, **options):
    """Each side in processes of its own, in turn: [runs, (seconds per prompt, GB)] of each, then their results.

    options: for the sides' functions, and `card` for `child`.
    """
    measured = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "prompts.json")
        file.write_text(json.dumps([prompts, options]))
        for _ in range(runs):
            for side in measured:
                out_file = Path(folder, f"{side.__name__}.npy")
                command = [sys.executable, __file__, "--child", side.__name__, str(file), str(out_file)]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                measured[side].append(json.loads(out.splitlines()[-1]))
        results = [np.load(path, allow_pickle=False) for path in sorted(Path(folder).glob("*.npy"))]
    return *(np.array(measured[side]) / [len(prompts), 1] for side in measured), results


def prompts_about(rows, style="text+codes"):
    dataset = bu.load_ml1m()
    return bu.build_prompts(dataset, rows, bu.cached_codes(dataset), style)


def bench_score():
    """Prompts with titles and codes: seconds per prompt, and peak memory of the whole process.

    First all rows of some users, then one row a user: these have no more in common than the template's first words.
    """
    test = bu.load_ml1m().test
    mixed = test.sample(frac=1, random_state=0)
    whole = test[test.user.isin(mixed.user.unique()[:4])].head(96)
    peer = f"transformers: full logits, padded in the order given, {PEER_BATCH} a batch", version("transformers")
    for name, rows in (("score", whole), ("score_unrelated", mixed.drop_duplicates("user").head(40))):
        ours, plain, results = in_children((our_scores, plain_scores), prompts_about(rows))
        gap = np.abs(results[0] - results[1]).max()
        assert gap < 1e-3, f"the scores differ by {gap}"
        note(name, ours[:, 0], plain[:, 0], "s per prompt", *peer, 3)
        if name == "score":
            note("score_memory", ours[:, 1], plain[:, 1], "GB at the peak", *peer, 3)


def bench_tune():
    """Rows of whole sittings, titles and codes and then titles only: seconds per prompt, and peak memory."""
    rows = bu.sample_sittings(bu.load_ml1m(), 48)
    for name, style in (("tune", "text+codes"), ("tune_text", "text")):
        ours, trl, _ = in_children((our_tuning, trl_tuning), prompts_about(rows, style))
        note(name, ours[:, 0], trl[:, 0], "s per prompt", "TRL SFTTrainer", version("trl"), 3)
        if name == "tune":
            note("tune_memory", ours[:, 1], trl[:, 1], "GB at the peak", "TRL SFTTrainer", version("trl"), 3)


def bench_lessons():
    """Tuning on the questions of lessons, 32 a step: films by title, and two codes of 8 bits, bit by bit."""
    dataset = bu.load_ml1m()
    no_opinion = np.zeros((dataset.n_users, dataset.n_items), np.float32)  # the answers change no second of it
    asked = {"tune_titles": bx.title_lessons(dataset, no_opinion, moments=2)[0]}
    asked["tune_bits"] = bx.code_questions(bx.code_pairs(128, 8), bx.ALIKE_PAIRS)
    for name, prompts in asked.items():
        ours, trl, _ = in_children((our_tuning, trl_tuning), prompts, batch_size=32)
        peer = "TRL SFTTrainer", version("trl"), 3
        note(name, 1 / ours[:, 0], 1 / trl[:, 0], "questions/s", *peer, more_is_better=True)


def products(a, b):
    """40 products of two matrices."""
    for _ in range(40):
        a @ b
    if a.is_cuda:
        torch.cuda.synchronize()


def bench_roofline():
    """Share of the machine's own matrix-product rate: 2 operations per weight and token in scoring, 4 in tuning."""
    model, tokenizer = bu.load_llm()
    prompts = prompts_about(bu.sample_sittings(bu.load_ml1m(), 24))
    ids = bu.encode_prompts(model, tokenizer, prompts)
    packs = bu.make_packs(ids, range(len(ids)), bu.pack_tokens(model))
    tokens = sum(bu.pack_inputs(ids, pack)["input_ids"].numel() for pack in packs)
    weights = layer_weights(model)
    product = partial(products, *torch.randn(2, 2048, 2048))
    our_scores(model, tokenizer, prompts[:4])
    # tuned beforehand, for on a plain model each run would put new LoRA matrices beside the old
    with_lora, _ = bu.tune(*bu.load_llm(), prompts[:4], [0, 1, 0, 1], progress=False)
    cases = ("score_roofline", our_scores, model, 2), ("tune_roofline", our_tuning, with_lora, 4)
    for name, work, llm, per_weight in cases:
        ours, peak, _, _ = take_turns(partial(work, llm, tokenizer, prompts), product, runs=5)
        ours, peak = per_weight * weights * tokens / np.array(ours) / 1e9, 40 * 2 * 2048**3 / np.array(peak) / 1e9
        peer = "float32 product of 2048 x 2048 on the same cores", version("torch")
        note(name, ours, peak, "GFLOP/s", *peer, 5, more_is_better=True)


def random_llama(folder, **sizes):
    """Keep a Llama of random weights, by default of 7 billion, with SmolLM2's tokenizer in `folder`.

    Returns its `layer_weights`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = bu.load_llm(layers=1, nf4=False)
    sizes = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008) | sizes
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(config, dtype=bu.compute_dtype())
    model.save_pretrained(folder, max_shard_size="2GB")
    tokenizer.save_pretrained(folder)
    return layer_weights(model)


def layer_weights(model):
    """Number of weights outside the embeddings; of four bits two share a byte, and each counts."""
    parts = model.get_decoder().layers.parameters()
    return sum(p.quant_state.shape.numel() if hasattr(p, "quant_state") else p.numel() for p in parts)


def bench_qlora():
    """4-bit QLoRA of 7 billion weights, 16 prompts of 320 tokens a step: speed, share of the peak, memory on 12 GiB."""
    if not torch.cuda.is_available():
        return print("qlora: left out, it needs a GPU")
    rng, size = np.random.default_rng(0), 2**13
    prompts = ["".join(map(str, rng.integers(0, 10, 320))) for _ in range(96)]  # one token a digit
    with tempfile.TemporaryDirectory() as folder:
        weights = random_llama(folder)
        torch.cuda.empty_cache()  # else this process keeps the memory that its children need
        os.environ["BINLLM_LLM"] = folder
        ours, trl, _ = in_children((our_tuning, trl_tuning), prompts, batch_size=16)
        small, _ = in_children((our_tuning,), prompts, runs=1, batch_size=16, card=SMALL_CARD)
        del os.environ["BINLLM_LLM"]
    factors = torch.randn(2, size, size, dtype=bu.compute_dtype(), device="cuda")
    _, seconds, _, _ = take_turns(lambda: None, partial(products, *factors), runs=5)
    peer = "TRL SFTTrainer", version("trl")
    note("qlora", ours[:, 0], trl[:, 0], "s per prompt", *peer, 3)
    note("qlora_memory", small[:, 1], trl[:, 1], "GB at the peak, of 12 GiB given and of all", *peer, 1)
    rate = 4 * weights * 320 / ours[:, 0] / 1e12
    what = f"{bu.compute_dtype()} product of {size} x {size} on the same GPU", version("torch")
    peak = 40 * 2 * size**3 / np.array(seconds) / 1e12
    note("qlora_roofline", rate, peak, "TFLOP/s", *what, 3, more_is_better=True)


def bench_candidates():
    """200 films for one user at one moment: the prompts differ only in the film."""
    dataset = bu.load_ml1m()
    user = dataset.test.user.value_counts().index[0]
    films = np.random.default_rng(0).choice(dataset.n_items, 200, replace=False)
    rows = pd.DataFrame({"user": user, "item": films, "timestamp": dataset.test.timestamp.max()})
    prompts = prompts_about(rows)
    model, tokenizer = bu.load_llm()
    data = model, tokenizer, prompts
    a, b, ours, plain = take_turns(lambda: our_scores(*data), lambda: plain_scores(*data), runs=3)
    assert np.abs(ours - plain).max() < 1e-3
    peer = f"transformers: whole prompts, full logits, {PEER_BATCH} a batch", version("transformers")
    note("score_candidates", np.array(a) / len(prompts), np.array(b) / len(prompts), "s per candidate", *peer, 3)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        benches = {"codes_fit": bench_codes_fit, "hamming": bench_hamming, "score": bench_score}
        benches |= {"candidates": bench_candidates, "tune": bench_tune, "lessons": bench_lessons}
        benches |= {"roofline": bench_roofline, "qlora": bench_qlora}
        for name in sys.argv[1:] or benches:
            benches[name]()
