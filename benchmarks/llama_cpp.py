"""Does llama.cpp answer as the tuned model does? The GGUF file of notebook 11, asked by llama.cpp itself.

pip install -r benchmarks/requirements.txt && python benchmarks/llama_cpp.py

The adapter `pairs`, merged, as float16 and as float32; P(Yes) of some test rows, made of the log-probabilities of the
next token that llama.cpp gives. data/results/llama_cpp.csv has a line a file: how far the answers are apart.
"""

import math
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import records
import xllamacpp

import binllm_export as be
import binllm_extras as bx
import binllm_utils as bu

ROWS = 20


def answers(path, prompts, yes, no):
    """P(Yes) of each prompt by llama.cpp: a list. yes, no: the numbers of the two tokens."""
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.verbosity = str(path), 1024, 1, 0
    server, found = xllamacpp.Server(settings), []
    for prompt in prompts:
        told = server.handle_completions({"prompt": prompt, "n_predict": 1, "n_probs": 500, "cache_prompt": False})
        top = told["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        chance = {token["id"]: token["logprob"] for token in top}
        found.append(1 / (1 + math.exp(chance[no] - chance[yes])))
    return found


def main():
    bu.quiet()
    dataset = bu.load_ml1m()
    prompts = bu.build_prompts(dataset, bu.sample_rows(dataset.test, ROWS), bu.cached_codes(dataset), bx.BIT_BY_BIT)
    model, tokenizer = bu.load_llm()
    model = bx.load_shipped(model, "pairs")
    wanted, plain = bu.score(model, tokenizer, prompts), be.merged(model)
    (yes,), (no,) = (tokenizer(word, add_special_tokens=False).input_ids for word in (" Yes", " No"))
    for kind, half in (("float16", True), ("float32", False)):
        path = bu.CACHE / "export" / f"llama-cpp-{kind}.gguf"
        be.write_gguf(plain, path, half)
        apart = [abs(a - b) for a, b in zip(answers(path, prompts, yes, no), wanted)]
        row = {"file": f"GGUF, {kind}", "prompts": len(prompts), "largest difference": round(float(max(apart)), 5)}
        row["xllamacpp"] = version("xllamacpp")
        records.put_row(ROOT / "data" / "results" / "llama_cpp.csv", row, ["file"])
        path.unlink()
        print(row, flush=True)


if __name__ == "__main__":
    main()
