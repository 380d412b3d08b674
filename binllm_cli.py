"""python -m binllm_utils COMMAND: codes, tuning, scores and recommendations for a file of interactions, from a shell.

DATA is a file with users, items and ratings (CSV, TSV, Parquet, JSON lines: see binllm_own.py), or the word ml-1m.
Progress goes to stderr, the answer to stdout as one JSON object. Exit status: 0, 1 for what went wrong (one line says
it), 2 for a wrong command line, 130 after Ctrl-C; what was begun is kept where it can be gone on with.
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import sys
import time
import zipfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pandas as pd

import binllm_own as bo
import binllm_utils as bu
from binllm_data import ADAPTER_FILES, check_replaceable

RECIPE = "distinct"  # codes to search among: fewer items share one


def about_data():
    """What all commands must be told: where the data are, and how they are meant."""
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("data", metavar="DATA", help="a file of interactions, or ml-1m")
    data.add_argument("--titles", help="a second file, with items and their titles")
    data.add_argument(
        "--columns", nargs="+", default=[], metavar="ROLE=NAME", help="as in rating=stars, where guesses are wrong"
    )
    data.add_argument(
        "--dayfirst", action=argparse.BooleanOptionalAction, help="how dates such as 03/04/2020 are meant"
    )
    data.add_argument("--like", type=float, help="the least value that counts as liked")
    return data


def parser():
    made = argparse.ArgumentParser("python -m binllm_utils", description=__doc__.split("\n\n")[0])
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    data = about_data()
    coded = argparse.ArgumentParser(add_help=False)
    coded.add_argument("--codes", help="what the command codes wrote; else codes are learned now")
    tuned = argparse.ArgumentParser(add_help=False)
    tuned.add_argument("--adapter", help="what the command tune wrote; else similarity alone is used")
    person = argparse.ArgumentParser(add_help=False)
    person.add_argument("--user", help="a user of the data, by id; of ml-1m by row, from 0")
    person.add_argument("--likes", nargs="+", default=[], help="items that are liked, by title or id")
    person.add_argument("--dislikes", nargs="+", default=[], help="items that are not liked")

    def add(name, how, *parents):
        command = commands.add_parser(name, parents=[data, *parents], help=how.__doc__.split("\n")[0])
        command.set_defaults(how=how)
        return command

    out = add("try", try_out)
    out.add_argument("--ask", type=int, metavar="ROWS", help="ask an LLM too, about so many rows; half a second each")
    out.add_argument("--things", default="movie", help="what the items are, in the singular: book, song, article")
    codes = add("codes", make_codes)
    codes.add_argument("--out", required=True, help="the file to write, .npz")
    codes.add_argument("--bits", type=int, default=32)
    codes.add_argument("--recipe", default=RECIPE, choices=bu.RECIPES, help="ste is the paper's way")
    tune = add("tune", tune_llm, coded)
    tune.add_argument("--out", required=True, help="the folder to write the adapter to")
    tune.add_argument("--rows", type=int, default=1024, help="training rows, whole sittings")
    tune.add_argument("--style", default="text+codes", choices=bu.TEMPLATES)
    tune.add_argument("--format", default="bits", choices=bu.FORMATS)
    tune.add_argument("--things", default="movie", help="what the items are, in the singular: book, song, article")
    tune.add_argument("--llm", help="a folder or hub name; else SmolLM2-135M")
    score = add("score", score_items, coded, tuned, person)
    score.add_argument("--items", nargs="+", required=True, help="the items in question, by title or id")
    recommend = add("recommend", recommend_items, coded, tuned, person)
    recommend.add_argument("-n", type=int, default=10)
    serve = add("serve", serve_http, coded, tuned)
    serve.add_argument("--port", type=int, default=8765)
    serve.add_argument(
        "--address", default="127.0.0.1", help="others than this machine need BINLLM_TOKEN, and TLS before it"
    )
    return made


# ---------------------------------------------------------------------------------------------------- data and codes
def read(asked):
    """(Dataset, ids of its users, ids of its items, report): ids as they are written in the file; of ml-1m the users'
    rows, and titles. The report is printed too: no command goes on from a wrong guess without a word.
    """
    if asked.data == "ml-1m":
        if asked.titles or asked.columns or asked.like is not None:
            raise ValueError("ml-1m has its own titles and likes; leave --titles, --columns and --like out")
        dataset = bu.load_ml1m()
        return dataset, [str(user) for user in range(dataset.n_users)], list(dataset.titles), {}
    if not all("=" in pair for pair in asked.columns):
        raise ValueError(f"--columns {' '.join(asked.columns)}: give pairs such as rating=stars")
    columns = dict(pair.split("=", 1) for pair in asked.columns)
    found = bo.read_interactions(asked.data, columns or None, asked.titles, asked.dayfirst)
    name = re.sub(r"[^\w .+-]|^[^\w]+", "_", Path(asked.data).stem)
    dataset = found.split(like=asked.like, name=name)
    if first():
        print(*(f"{fact}: {value}" for fact, value in found.report.items()), sep="\n")
    return dataset, found.users, found.items, found.report


def write_codes(path, codes, users, items, dataset):
    """Keep codes with the ids that they belong to, and the digest of what they were learned from."""
    with bu.replacing(path) as part, open(part, "wb") as file:
        made_from = bu.digest(dataset.train)
        ids = {"user_ids": users, "item_ids": items}
        np.savez_compressed(file, users=codes.users, items=codes.items, made_from=made_from, **ids)


def holds_codes(path):
    """Whether `path` is a file that `write_codes` wrote."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            return "user_ids" in kept
    except Exception:  # there are a dozen kinds
        return False


def read_codes(path, users, items, dataset):
    """The `Codes` that `write_codes` kept, put in the order of these ids; raises ValueError where one has no code.

    Says so where they were learned from other rows: of a longer file that is fine, of another data set it is not.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is not there; make it with the command codes")
    try:
        with np.load(path, allow_pickle=False) as kept, zipfile.ZipFile(path) as archive:
            most = max(1 << 30, 10_000 * (len(users) + len(items)))  # bytes, before a stranger's array fills the memory
            if sum(part.file_size for part in archive.infolist()) > most:
                raise ValueError(f"unpacked it has more than {most:,} bytes")
            sides = [(kept[f"{side}s"], kept[f"{side}_ids"].tolist()) for side in ("user", "item")]
            known = str(kept["made_from"]) == bu.digest(dataset.train)
        tables = bu.Codes(*(table for table, _ in sides))
        if any(len(table) != len(ids) for table, (_, ids) in zip((tables.users, tables.items), sides)):
            raise ValueError("not a code for each id")
        if any(len(set(ids)) < len(ids) for _, ids in sides):
            raise ValueError("an id is there twice")
    except Exception as error:  # whatever reading a damaged archive may raise: there are a dozen kinds
        raise ValueError(f"{path} holds no codes ({error!s:.200}); make them with the command codes") from None
    places = [pd.Index(ids).get_indexer(wanted) for (_, ids), wanted in zip(sides, (users, items))]
    for what, place, ids in zip(("users", "items"), places, (users, items)):
        if (place < 0).any():
            lacking = ids[int(np.argmax(place < 0))]
            raise ValueError(f"{path} lacks codes of {(place < 0).sum()} {what}, such as {lacking!r}; make them again")
    if not known:
        print(f"{path} was learned from other rows than these; if that was another data set, make them again")
    return bu.Codes(tables.users[places[0]], tables.items[places[1]])


def codes_for(asked, dataset, users, items):
    """The codes asked for, or new ones."""
    return read_codes(asked.codes, users, items, dataset) if asked.codes else bu.cached_codes(dataset, recipe=RECIPE)


# ----------------------------------------------------------------------------------------------------------- commands
def try_out(asked):
    """do codes rank better than counting on your data? a report and a verdict

    On the latest tenth of the rows, learned now; and once more with what users had rated before each of those rows.
    With --ask, on some of these rows, also an LLM that reads titles, and one that reads titles and codes.
    """
    import binllm_serve as bs

    dataset, _, _, report = read(asked)
    codes, _ = bu.fit_codes(dataset, recipe=RECIPE)
    rows = bu.sample_rows(dataset.test, asked.ask) if asked.ask else dataset.test
    scores = {"counting": bu.popularity_baseline(dataset, rows), "counting so far": bs.counting_before(dataset, rows)}
    scores["codes"], (now, _) = codes.similarity(rows), bs.codes_before(dataset, codes, rows)
    scores["codes so far"] = bu.hamming_similarity(now, codes.items[rows.item])
    seconds = {}
    for reader in bs.READERS if asked.ask else ():
        p, taught, spent = shipped(reader, dataset, codes, rows, asked.things)
        name = f"LLM, {reader}" if taught else f"LLM, {reader}, untaught"
        scores[name], seconds[name] = p, round(spent / len(rows), 3)
    table, sentence = bo.verdict(rows, scores)
    sentences = sentence.splitlines()
    if asked.ask:  # the other question too: codes against counting
        _, without = bo.verdict(rows, {name: values for name, values in scores.items() if name not in seconds})
        sentences += without.splitlines()[1:]
    table["seconds a row"] = pd.Series(seconds, dtype=float)
    table = table.astype(object).where(table.notna(), None)  # JSON has no NaN
    report |= bo.shares(dataset)
    return {"report": report, "table": table.to_dict("index"), "verdict": sentences}


def shipped(reader, dataset, codes, rows, things):
    """(P(Yes) of `rows`, whether it was taught, seconds) of one of `bs.READERS`, which saw no row of these data."""
    import binllm_extras as bx
    import binllm_serve as bs

    style, adapter = bs.READERS[reader]
    model, tokenizer = bu.load_llm()
    prompts = bs.prompts_before(dataset, codes, rows, bo.template_about(style, things))
    reader = bx.load_shipped(model, adapter)
    began = time.perf_counter()
    p = bu.score(reader, tokenizer, prompts)
    return p, hasattr(reader, "peft_config"), time.perf_counter() - began


def make_codes(asked):
    """learn a binary code for each user and item"""
    if Path(asked.out).exists() and not holds_codes(asked.out):
        raise ValueError(f"{asked.out} is there and holds no codes; choose another name for --out")
    dataset, users, items, _ = read(asked)
    codes, curve = bu.fit_codes(dataset, asked.bits, recipe=asked.recipe)
    write_codes(asked.out, codes, users, items, dataset)
    quality = round(bu.auc(dataset.test.label, codes.similarity(dataset.test)), 4)
    return {"codes": asked.out, "users": len(users), "items": len(items), "epochs": len(curve), "test AUC": quality}


def tune_llm(asked):
    """tune an LLM on the data's own prompts; goes on where it was stopped"""
    style = bo.template_about(asked.style, asked.things)
    check_replaceable(asked.out, ADAPTER_FILES, "an adapter")  # now, not when all is done
    dataset, users, items, _ = read(asked)
    codes = codes_for(asked, dataset, users, items) if asked.style != "text" else None
    model, tokenizer = bu.load_llm(asked.llm)
    rows = bu.sample_sittings(dataset, asked.rows)
    prompts = bu.build_prompts(dataset, rows, codes, style, asked.format, history="row")  # as `recommend` asks
    kept = bu.CACHE / "checkpoints" / bu.digest([model.name_or_path, *prompts], rows)
    model, curve = bu.tune(model, tokenizer, prompts, rows.label, folder=kept)
    card = {"style": style, "format": asked.format, "llm": model.name_or_path, "rows": len(rows), "data": dataset.name}
    card["codes"] = codes and bu.digest(codes.users, codes.items)
    if first():
        bu.save_adapter(model, asked.out, card, curve)
        shutil.rmtree(kept, ignore_errors=True)
    return {"adapter": asked.out, "rows": len(rows), "steps": len(curve), "loss": round(curve.loss.tail(10).mean(), 4)}


def recommender(asked):
    """The `Recommender` of a command line's data, codes and adapter."""
    import binllm_serve as bs

    dataset, users, items, _ = read(asked)
    codes, llm = codes_for(asked, dataset, users, items), {}
    if asked.adapter:
        try:
            card = json.loads(Path(asked.adapter, "card.json").read_text())
            llm, name, learned = {"style": card["style"], "fmt": card["format"]}, card["llm"], card["codes"]
            if not all(isinstance(value, str) for value in (*llm.values(), name)):
                raise TypeError(f"style, format and llm are {llm}, {name}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{asked.adapter} is no adapter of the command tune: {error!r:.200}") from None
        if learned not in (None, bu.digest(codes.users, codes.items)):
            raise ValueError(f"{asked.adapter} was tuned with other codes; give --codes the file that tune was given")
        model, llm["tokenizer"] = bu.load_llm(str(name))
        llm["model"] = bu.load_adapter(model, asked.adapter)
    return bs.Recommender(dataset, codes, **llm, users=users, items=items)


def person_of(asked):
    return {"user": asked.user, "likes": asked.likes, "dislikes": asked.dislikes}


def score_items(asked):
    """what somebody would think of some items"""
    import binllm_serve as bs

    return bs.as_json(recommender(asked).score(asked.items, **person_of(asked)))


def recommend_items(asked):
    """the best items for a user of the data, or for anybody who likes some items"""
    import binllm_serve as bs

    return bs.as_json(recommender(asked).recommend(**person_of(asked), n=asked.n))


def serve_http(asked):
    """answer over HTTP: GET /health, POST /recommend, POST /score"""
    import binllm_serve as bs

    def ready(port):
        host = f"[{asked.address}]" if ":" in asked.address else asked.address
        print(f"serving on http://{host}:{port}, Ctrl-C ends it", file=sys.stderr, flush=True)

    token = os.environ.get("BINLLM_TOKEN")
    bs.check_address(asked.address, asked.port, token)
    asyncio.run(bs.serve(recommender(asked), asked.port, asked.address, token, ready))


def first():
    """Whether this process speaks and writes: the only one, or the first of those of `accelerate launch`."""
    return int(os.environ.get("RANK", 0)) == 0


def main(arguments=None):
    """The exit status of a command line; what it prints is said at the top of this file."""
    asked = parser().parse_args(arguments)
    try:
        bu.quiet()
        with redirect_stdout(sys.stderr):
            answer = asked.how(asked)
        if first():
            print(json.dumps(answer, indent=2, allow_nan=False), flush=True)
    except BrokenPipeError:  # whoever asked has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python says so once more at its end
        return 1
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0
