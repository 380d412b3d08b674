"""What titles add to codes: about films that nobody has rated, and about all. python scripts/cold.py; an hour.

Each fifth of the films is cold once: its ratings are hidden from all that learns, and the valid and test rows about it
say who was right; each draw of the models by itself, then all draws together. The first fifth (`bx.some_items`) is the
one that the adapter `titles` was never asked about: there the LLM answers too. Then nothing is hidden, and the answers
of the run `title lessons` of results.py stand beside the shipped codes. Stacks are fitted on valid. The file: cold.csv,
a line a split, kind of film, method and seed, with the paired difference from `base` on the same rows; test is not
printed. cold.txt names what the lines were made from: the same is not made again.
"""

import shutil
import sys
import tempfile
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import records
import results

import binllm_extras as bx
import binllm_utils as bu

RECORDS = ROOT / "data" / "results"
SEEDS = range(3)
DIMENSIONS = 16  # principal components of what titles say; of 16, 32 and 64 the best on valid, beside genres and years
BINS = {"0": (0, 0), "1-2": (1, 2), "3-9": (3, 9), "10-19": (10, 19), "20+": (20, np.inf)}  # training rows of a film
WORD_VECTORS = bu.Source(  # 32,000 word pieces, 256 numbers each, distilled from large LLMs; MIT licence
    "wordllama-0.2.1.post0-py3-none-any.whl",
    "ea361757a53f4fd2f0d6757c2d69a65c141df92a663bf03071c94cf20941b8e5",
    package="wordllama==0.2.1.post0",
)


# ---------------------------------------------------------------------------------------------- what titles say
def word_vectors(titles):
    """The mean vector of each title's word pieces, float32 [titles, 256]: a sentence encoder without a network."""
    with zipfile.ZipFile(bu.fetch(WORD_VECTORS)) as wheel, tempfile.TemporaryDirectory() as folder:
        vectors = load(wheel.read("wordllama/weights/l2_supercat_256.safetensors"))["embedding.weight"]
        pieces = wheel.extract("wordllama/tokenizers/l2_supercat_tokenizer_config.json", folder)
        pieces = PreTrainedTokenizerFast(tokenizer_file=pieces)
    ids = pieces(titles, add_special_tokens=False).input_ids
    return np.stack([vectors[mine].mean(0) for mine in ids]).astype(np.float32)


@torch.inference_mode()
def title_states(model, tokenizer, titles, batch=64):
    """What the LLM makes of each title: float32 [titles, 2 width].

    Of `The movie "…"`, the mean state of the middle layer over its tokens, beside the last token's of the last layer.
    """
    tokenizer.padding_side, states = "right", []
    for start in tqdm(range(0, len(titles), batch), desc="titles", leave=False):
        asked = [f'The movie "{title}"' for title in titles[start : start + batch]]
        tokens = tokenizer(asked, padding=True, return_tensors="pt").to(model.device)
        layers = model(**tokens, output_hidden_states=True, logits_to_keep=1).hidden_states
        mask = tokens.attention_mask[..., None]
        middle = (layers[len(layers) // 2] * mask).sum(1) / mask.sum(1)
        last = layers[-1][torch.arange(len(asked)), mask[..., 0].sum(1) - 1]
        states.append(torch.cat([middle, last], 1).float().cpu().numpy())
    return np.concatenate(states)


def title_answers(model, tokenizer, dataset, rows, cold, key):
    """{split: logit(Yes)} of rows about cold films, titles only; model: after lessons that left these films out.

    No cold film is among the likes shown: for the prompts nobody ever liked one. key: what the parts kept are named by.
    """
    splits = {name: getattr(dataset, name) for name in bu.SPLITS}
    splits = {name: part.assign(label=part.label * ~part.item.isin(cold)) for name, part in splits.items()}
    nobody, answers = replace(dataset, **splits), {}
    for split, part in rows.items():
        prompts = bu.build_prompts(nobody, part, style="text")
        p, _ = results.score_in_parts(model, tokenizer, prompts, f"cold-{key}-{split}")
        answers[split] = logit(p)
    return answers


def logit(p):
    return np.log(p / (1 - p))


# ---------------------------------------------------------------------------------------------- what is compared
def fifths(dataset):
    """Five arrays of item ids, every item in one; the first is `bx.some_items`."""
    return np.array_split(bx.some_items(dataset, share=1), 5)


def known_of_films(dataset, told):
    """{name: float32 [n_items, F]}: what models may know of a film beside ratings, none of it made of ratings.

    told: {name: [n_items, k]}, what titles say.
    """
    tags = bu.item_features(dataset)[:, :-1]  # the last column counts ratings: never zero for a film learned from
    known = {"nothing": tags[:, :0], "genres and years": tags}
    for name, vectors in told.items():
        parts = PCA(DIMENSIONS, whiten=True, random_state=0).fit_transform(vectors).astype(np.float32)
        known |= {name: parts, f"genres, years and {name}": np.c_[tags, parts]}
    return known


def collaborative(hidden, known, seed):
    """{method: function of rows -> scores} of models that saw no rating of cold films."""
    found, known = {}, known | {"genres, years and a count of ratings": bu.item_features(hidden)}
    for name, columns in known.items():
        codes, _ = bu.fit_codes(hidden, seed=seed, features=columns, progress=False)
        model, _ = bx.fit_hybrid(hidden, seed=seed, features=columns, progress=False)
        found |= {f"codes, {name}": codes.similarity, f"continuous, {name}": partial(bu.cf_scores, model)}
    return found


def stacked(labels, learn, ask):
    """Logistic regression of `labels` on the columns of `learn`; its logits for those of `ask`."""
    model = make_pipeline(StandardScaler(), LogisticRegression())
    return model.fit(np.stack(learn, 1), labels).decision_function(np.stack(ask, 1))


def gated(scores, titles, count):
    """Columns whose weighted sum trusts titles the more, or the less, the more ratings a film has in training."""
    return [scores, titles, titles * np.log1p(count)]


def ties_by(similarity, second, bits=32):
    """The codes' similarity, and between equal ones the order of `second`, numbers from 0 to 1."""
    return similarity + 0.99 * second / bits


def note(split, films, method, seed, rows, scores, base=None):
    """Put one line into cold.csv; base: (its name, its scores on the same rows)."""
    row = {"split": split, "films": films, "method": method, "seed": seed, "rows": len(rows)}
    row |= bu.evaluate(rows, scores) | {"base": base and base[0]}
    gap = bu.paired_test(rows.user, rows.label, base[1], scores) if base else None
    for metric in ("auc", "uauc"):
        for column, name in (("difference", "more"), ("low", "more_lo"), ("high", "more_hi")):
            row[f"{metric}_{name}"] = round(gap.loc[metric, column], 4) if base else None
    records.put_row(RECORDS / "cold.csv", row, ["split", "films", "method", "seed"])
    if split == "valid":  # test is read from the file, once
        print(f"{films} films, {method}, seed {seed}: {row['auc']}/{row['uauc']}", flush=True)


BASE = "codes, genres and years"


def every_film_once(dataset, known, seed):
    """{method: {split: scores, a Series by row}}: all rows, each scored by a model that saw no rating of its film."""
    found = {}
    for cold in tqdm(fifths(dataset), desc="fifths of the films", leave=False):
        for name, model in collaborative(bx.without_ratings(dataset, cold), known, seed).items():
            for split in ("valid", "test"):
                part = getattr(dataset, split)
                part = part[part.item.isin(cold)]
                found.setdefault(name, {}).setdefault(split, []).append(pd.Series(model(part), part.index))
    return {
        name: {split: pd.concat(parts).sort_index() for split, parts in sides.items()} for name, sides in found.items()
    }


def together(draws):
    """{method: {split: scores}}, the mean of several draws: of codes, the similarity of all their bits side by side."""
    methods = draws[0]
    return {name: {split: sum(draw[name][split] for draw in draws) / len(draws) for split in methods[name]}
            for name in methods}  # fmt: skip


def compared(films, rows, scores, seed):
    """Lines for each method, against BASE; rows: {split: rows}, scores: {method: {split: Series}}."""
    for split, part in rows.items():
        for name, mine in scores.items():
            base = None if name == BASE else (BASE, scores[BASE][split][part.index])
            note(split, films, name, seed, part, mine[split][part.index], base)


def with_llm(films, rows, scores, titles, seed):
    """Rows about films that no lesson asked about: by titles, and with codes in a stack that valid's rows teach."""
    titles = {split: pd.Series(titles[split], part.index) for split, part in rows.items()}
    compared(films, rows, {BASE: scores[BASE], "LLM, titles only": titles}, seed)
    for name in (BASE, "continuous, genres and years"):
        sides = {split: [scores[name][split][part.index], titles[split]] for split, part in rows.items()}
        both = stacked(rows["valid"].label, sides["valid"], sides["test"])
        note("test", films, f"{name} + LLM", seed, rows["test"], both, (name, sides["test"][0]))


def all_films(dataset, learned, codes, seed):
    """All test rows, nothing hidden: what titles add to codes, over all films and by ratings in training.

    In a stack, plain or gated, and where codes leave a tie: 33 similarities order few rows. There a film's like rate,
    which needs no LLM, is the control. learned: what the codes were learned from; where that is not `dataset`, all
    films stand together only.
    """
    name, bins = ("all", BINS) if learned is dataset else ("all, whole past", {})
    counts, rates, sides = np.bincount(learned.train.item, minlength=learned.n_items), film_rates(learned), {}
    for split in ("valid", "test"):
        p = records.read_answers(RECORDS / f"answers-patient-{split}.parquet", dataset)["title lessons"].dropna()
        part, p = getattr(dataset, split).loc[p.index], p.to_numpy(np.float64)
        sides[split] = part, codes.similarity(part), p, counts[part.item]
    (valid, *learn), (test, *ask) = ((part, own, logit(p), count) for part, own, p, count in sides.values())
    untied = {split: ties_by(own, p, codes.bits) for split, (_, own, p, _) in sides.items()}
    note("valid", name, "codes", seed, valid, learn[0])
    note("valid", name, "codes, ties by LLM", seed, valid, untied["valid"], ("codes", learn[0]))
    alone, titles, count = ask
    scores = {"LLM, titles only": titles, "codes + LLM": stacked(valid.label, learn[:2], ask[:2])}
    scores["codes + LLM, gated"] = stacked(valid.label, gated(*learn), gated(*ask))
    scores["codes, ties by LLM"] = untied["test"]
    scores["codes, ties by like rate"] = ties_by(alone, rates[test.item], codes.bits)
    for films, (low, high) in ({name: (0, np.inf)} | bins).items():
        mine = (low <= count) & (count <= high)
        if test[mine].groupby("user").label.nunique().max() != 2:  # too few to tell anything
            continue
        note("test", films, "codes", seed, test[mine], alone[mine])
        for method, those in scores.items():
            note("test", films, method, seed, test[mine], those[mine], ("codes", alone[mine]))


def film_rates(dataset):
    """How often each film was liked in training, smoothed; of a film that nobody rated, the mean: [n_items]."""
    found, mean = bu.smoothed_rates(dataset.train, "item"), dataset.train.label.mean()
    return found.reindex(range(dataset.n_items)).fillna(mean).to_numpy()


def made_from(dataset, past, version=3):
    """Digest of all that decides the lines; raise `version` when this file makes other ones of the same."""
    codes = [bu.cached_codes(dataset, 32, seed) for seed in SEEDS]
    codes.append(bu.cached_codes(past, recipe="past"))
    told = [records.read_answers(RECORDS / f"answers-patient-{split}.parquet", dataset) for split in ("valid", "test")]
    told = [part["title lessons"].dropna().to_numpy() for part in told]
    words = [str(version), results.shipped_sha256("titles"), *dataset.titles]
    return bu.digest(
        words, dataset.train, dataset.valid, dataset.test, *told, *(side for c in codes for side in (c.users, c.items))
    )


def main():
    bu.quiet()
    dataset, past = bu.load_ml1m(), bu.load_ml1m(past="all")
    key, mark = made_from(dataset, past), RECORDS / "cold.txt"
    if mark.exists() and mark.read_text() == key + "\n":
        return print("cold films: there already")
    cold, rows = fifths(dataset)[0], {"valid": dataset.valid, "test": dataset.test}
    unasked = {split: part[part.item.isin(cold)] for split, part in rows.items()}
    model, tokenizer = bu.load_llm(bu.SMOLLM2)
    titles = dataset.titles
    told = {"title states": title_states(model, tokenizer, titles), "word vectors": word_vectors(titles)}
    model = bu.load_adapter(model, bu.ROOT / "data" / "adapters" / "titles")
    answers = title_answers(model, tokenizer, dataset, unasked, cold, key)
    known = known_of_films(dataset, told)
    draws = []
    for seed in SEEDS:
        draws.append(scores := every_film_once(dataset, known, seed))
        compared("cold", rows, scores, seed)
        with_llm("never asked", unasked, scores, answers, seed)
        all_films(dataset, dataset, bu.cached_codes(dataset, 32, seed), seed)
    scores = together(draws)
    compared("cold, draws together", rows, scores, 0)
    with_llm("never asked, draws together", unasked, scores, answers, 0)
    all_films(dataset, past, bu.cached_codes(past, recipe="past"), 0)
    mark.write_text(key + "\n")
    for split in rows:
        shutil.rmtree(bu.CACHE / "answers" / f"cold-{key}-{split}", ignore_errors=True)


if __name__ == "__main__":
    main()
