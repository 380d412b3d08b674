"""Input drill: whatever comes in, the right result comes out, or one of our errors; nothing else, and nothing hangs.

Each test draws its cases with hypothesis and compares with a plain reading of the rules. `make fuzz` draws many more.
"""

import io
import json
import math
import os
import re

import numpy as np
import pandas as pd
import pytest
import readme
import records
import torch
from conftest import case, make_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

import binllm_extras as bx
import binllm_scale as bs
import binllm_utils as bu

LONG = "BINLLM_FUZZ" in os.environ  # set by --fuzz
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


def cases(short, long):
    """How many cases are drawn: the same ones each time in the short form, new ones in the long."""
    return settings(
        max_examples=long if LONG else short,
        derandomize=not LONG,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3)
ODD |= st.sampled_from([np.nan, pd.NA, pd.NaT, np.int8(-1)]) | st.complex_numbers()
ODD |= st.lists(st.integers(0, 1), max_size=3)


# ------------------------------------------------------------------------------------------------------- codes as text
@cases(300, 25_000)
@given(
    st.one_of(st.text(alphabet="01", max_size=40), st.text(alphabet="01 \n١०1２", max_size=17), st.text(max_size=16))
)
def test_bits_are_read_or_refused(text):
    with case("read: codes in bits"):
        if re.fullmatch("([01]{8})+", text):
            assert bu.from_bits(text).tolist() == [int(c) for c in text] and bu.to_bits(bu.from_bits(text)) == text
        else:
            with pytest.raises(ValueError, match="is not a code in bits"):
                bu.from_bits(text)


NUMBER = st.one_of(st.integers(-2, 300).map(str), st.sampled_from(["", " 1", "01", "1.", "٣", "1e1", "+1", "1_0", "²"]))


@cases(300, 20_000)
@given(st.one_of(st.lists(NUMBER, max_size=5).map(".".join), st.text(max_size=12)))
def test_dotted_codes_are_read_or_refused(text):
    with case("read: codes in dotted decimal"):
        parts = text.split(".")
        if all(re.fullmatch("[0-9]{1,3}", p) and int(p) < 256 and str(int(p)) == p for p in parts):
            code = bu.from_dotted(text)
            assert bu.to_dotted(code) == text and bu.to_bits(code) == "".join(f"{int(p):08b}" for p in parts)
            assert bx.to_hex(code) == "".join(f"{int(p):02x}" for p in parts)
        else:
            with pytest.raises(ValueError, match="each part must be a number from 0 to 255 without leading zeros"):
                bu.from_dotted(text)


NUMBERS = (bool, int, float, np.number, np.bool_)


def fits(table):
    """The rule: rows of equal length, 8, 16… numbers that are 0 or 1."""
    lengths = {len(row) for row in table}
    numbers = all(isinstance(x, NUMBERS) and x in (0, 1) for row in table for x in row)
    return len(lengths) == 1 and min(lengths) > 0 and min(lengths) % 8 == 0 and numbers


KINDS = [list, np.array, pd.DataFrame, torch.tensor, lambda t: torch.tensor(t).half()]
KINDS += [lambda t, kind=kind: np.array(t, kind) for kind in (object, bool, np.float16)]
KINDS += [lambda t: pd.DataFrame(t, dtype="Int8")]


@cases(300, 10_000)
@given(st.lists(st.lists(st.integers(0, 1), min_size=8, max_size=8), min_size=1, max_size=4), st.sampled_from(KINDS),
       st.one_of(st.none(), st.tuples(st.integers(0, 3), st.integers(0, 8), ODD)))  # fmt: skip
def test_tables_of_codes_are_read_or_refused(table, kind, spoil):
    with case("read: tables of codes"):
        if spoil:
            row, place, odd = spoil
            row = row % len(table)
            table = [[*mine[:place], odd, *mine[place + 1 :]] if i == row else mine for i, mine in enumerate(table)]
            kind = list
        if fits(table):
            codes = bu.Codes(kind(table), np.zeros((1, len(table[0]))))
            assert codes.users.tolist() == [[int(x) for x in row] for row in table] and codes.users.dtype == np.uint8
            assert bu.to_bits(codes.users[0]) == "".join(str(int(x)) for x in table[0])
        else:
            with pytest.raises(ValueError, match="users: |users have"):
                bu.Codes(kind(table), np.zeros((1, 8)))


# ---------------------------------------------------------------------------------------------------- data and prompts
IDS = st.integers(0, 5)
ROW = st.tuples(IDS, IDS, st.integers(0, 1), st.integers(1_000_000_000, 1_000_100_000))
DTYPES = ["int64", "int32", "uint32", "Int64", "int64[pyarrow]", "object", "float64", "string"]


def frame(rows, dtype="int64"):
    return pd.DataFrame(rows, columns=["user", "item", "label", "timestamp"]).astype(dtype)


@cases(150, 6_000)
@given(st.lists(ROW, min_size=1, max_size=8), st.sampled_from(DTYPES), st.sampled_from([1, 10**3, 10**6, 10**9]),
       st.none() | st.tuples(st.integers(0, 7), st.integers(0, 3), ODD), st.sampled_from(bu.SPLITS))  # fmt: skip
def test_interactions_are_read_or_refused(rows, dtype, unit, spoil, split):
    with case("read: interactions"):
        given_rows = [(u, i, label, t * unit) for u, i, label, t in rows]
        table = frame(given_rows) if unit > 1 else frame(given_rows, dtype)
        if spoil:
            table = frame(given_rows, "object")
            table.iat[spoil[0] % len(table), spoil[1]] = spoil[2]
            table = table.infer_objects()
        other = frame([(0, 0, 1, 1_000_200_000), (1, 1, 0, 1_000_300_000)])
        whole = all(pd.api.types.is_integer_dtype(d) or (c == "label" and pd.api.types.is_bool_dtype(d))
                    for c, d in table.dtypes.items())  # fmt: skip
        sound = whole and len({(u, i, t) for u, i, _, t in rows}) == len(rows)
        parts = dict(zip(bu.SPLITS, (other.assign(timestamp=lambda r, k=k: r.timestamp + k) for k in range(3))))
        parts[split] = table
        try:
            read = getattr(make_dataset(**parts, titles=list("abcdef")), split)
        except ValueError as error:
            assert not sound or spoil, error
            assert re.match(rf"({split}|row|train|valid|test)[,: ]", str(error)) and "\n" not in str(error)
        else:
            assert sound or spoil
            wanted = table.astype("int64").assign(timestamp=lambda r: r.timestamp // unit if not spoil else r.timestamp)
            if not spoil:
                assert (read[list(wanted)].to_numpy() == wanted.to_numpy()).all()
            assert read.user.between(0, 10**6).all() and read.item.between(0, 5).all() and read.label.isin([0, 1]).all()


@cases(200, 5_000)
@given(st.lists(ODD, min_size=30, max_size=30))
def test_titles_and_tags_are_read_or_refused(things):
    with case("read: titles and tags"):
        try:
            toy = make_dataset(titles=things)
        except ValueError as error:
            assert re.match(r"item \d+ has no title", str(error))
        else:
            assert all(isinstance(title, str) and title.strip() for title in toy.titles)
        try:
            toy = make_dataset(tags=things)
        except ValueError as error:
            assert re.match(r"tags of item \d+ are", str(error))
        else:
            assert all(isinstance(word, str) for words in toy.tags for word in words)


STRANGE = st.text(
    st.one_of(st.characters(), st.sampled_from('#"<|>{}\\\n\r\u2028\u202e\x00: ')), min_size=1, max_size=30
)
FORGED = ["#Answer:", "#Question: ", " Yes", "<|im_end|>", "##", "{user}", '"', "long " * 99]
PIECES = st.lists(STRANGE | st.sampled_from(FORGED), min_size=1, max_size=6).map("".join)
TOY = make_dataset()
CODES = bu.Codes(np.eye(20, 16, dtype=int), np.eye(30, 16, dtype=int))
PLAIN = {style: bu.build_prompts(TOY, TOY.test, CODES, style) for style in bu.TEMPLATES}


@cases(150, 5_000)
@given(PIECES, st.integers(0, 29), st.sampled_from(list(bu.TEMPLATES)))
def test_no_title_forges_a_prompt(title, item, style):
    with case("read: titles in prompts"):
        try:
            strange = make_dataset(titles=[title if i == item else t for i, t in enumerate(TOY.titles)])
        except ValueError as error:
            assert f"item {item} has no title" in str(error)
            return
        shown = bu.shown_title(title)
        assert 0 < len(shown) <= bu.TITLE_LENGTH and '"' not in shown and "\n" not in shown and shown.isprintable()
        for before, after in zip(PLAIN[style], bu.build_prompts(strange, TOY.test, CODES, style)):
            assert after == before.replace(f'"{TOY.titles[item]}"', f'"{shown}"')
            assert len(re.findall(r"#\s*answer\s*:", after, re.I)) == 1 and after.endswith("\n#Answer:")


@cases(150, 5_000)
@given(st.one_of(st.text("{}!:>07.[]abcdehiklmnoprstuxy ", max_size=25), PIECES), st.booleans())
def test_templates_are_filled_or_refused(style, with_codes):
    with case("read: templates"):
        rows = TOY.test.head(3)
        try:
            prompts = bu.build_prompts(TOY, rows, CODES if with_codes else None, style)
        except ValueError as error:
            assert str(error).startswith("style")
        else:
            bare = re.sub(r"\{\{|\}\}", "", style if style not in bu.TEMPLATES else "")
            assert len(prompts) == 3 and set(re.findall(r"\{(.*?)\}", bare)) <= {
                "likes",
                "title",
                "user",
                "item",
                "pairs",
            }


@cases(100, 3_000)
@given(st.lists(ROW, min_size=3, max_size=20, unique=True), st.integers(1, 4), st.booleans())
def test_histories_are_those_of_a_plain_reading(rows, last, same_second):
    with case("read: histories"):
        rows = list({(u, i, t): (u, i, label, t) for u, i, label, t in rows}.values())
        table = frame(rows).sort_values("timestamp", kind="stable")
        later = frame([(0, 0, 1, 1_000_200_000)])
        toy = make_dataset(train=table, valid=later, test=later.assign(timestamp=1_000_200_001), titles=list("abcdef"))
        for liked, row in zip(bu.liked_before(toy, table, last, same_second), table.itertuples()):
            past = [(t, i) for u, i, label, t in rows if u == row.user and label and
                    (t < row.timestamp or (same_second and t == row.timestamp and i < row.item))]  # fmt: skip
            assert liked.tolist() == [i for _, i in sorted(past)][-last:]


@pytest.fixture(scope="module")
def reader():
    """A tiny model with the real tokenizer."""
    from stages import tiny_llm, tokenizer

    return tiny_llm(), tokenizer()


@cases(100, 3_000)
@given(st.lists(st.one_of(PIECES, ODD), min_size=1, max_size=4))
def test_prompts_are_read_or_refused(reader, prompts):
    with case("read: prompts"):
        model, tokenizer = reader
        try:
            ids = bu.encode_prompts(model, tokenizer, prompts)
        except ValueError as error:
            assert re.match(r"prompt \d+ (is|ends in white space|has \d+ tokens)|give a list", str(error))
        else:
            for prompt, tokens in zip(prompts, ids):
                assert not set(tokens) & set(tokenizer.all_special_ids)
                text = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
                plain = all(" " <= letter <= "~" for letter in prompt)  # for some rare bytes it has no token
                assert text == prompt or not plain


# -------------------------------------------------------------------------------------------------------------- metrics
SCORES = st.one_of(st.floats(allow_nan=False, allow_infinity=False, width=32), st.sampled_from([0.0, -0.0, 1.0]))
WAYS = [list, np.array, tuple, pd.Series, torch.tensor, lambda x: pd.Series(x, index=range(5, 5 + len(x)))]
WAYS += [lambda x, kind=kind: pd.Series(x, dtype=kind) for kind in ("Float64", "double[pyarrow]", object)]


@cases(200, 8_000)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), SCORES), min_size=1, max_size=15), st.sampled_from(WAYS),
       st.one_of(st.none(), st.tuples(st.integers(0, 14), ODD)))  # fmt: skip
def test_scores_are_measured_or_refused(rows, way, spoil):
    with case("read: scores"):
        users, labels, scores = map(list, zip(*rows))
        if spoil:
            scores[spoil[0] % len(scores)], way = spoil[1], list
        try:
            got = bu.auc(labels, way(scores))
        except ValueError as error:
            numbers = all(isinstance(s, (int, float, np.number)) and math.isfinite(s) for s in scores)
            assert len(set(labels)) < 2 or not numbers, error
            assert re.match("score|AUC|labels", str(error))
        else:
            numbers = [float(s) for s in scores]
            assert got == pytest.approx(roc_auc_score(labels, numbers), abs=1e-9)
            own = pd.DataFrame({"u": users, "y": labels, "s": numbers}).groupby("u")
            each = [roc_auc_score(g.y, g.s) for _, g in own if g.y.nunique() == 2]
            if each:
                assert bu.uauc(users, labels, way(scores)) == (pytest.approx(np.mean(each), abs=1e-9), len(each))


# ---------------------------------------------------------------------------------------------------------------- files
def spoiled(content, at, new, cut):
    """`content` with other bytes somewhere, or cut off."""
    at %= len(content)
    return content[:at] if cut else content[:at] + new + content[at + len(new) :]


DAMAGE = (st.integers(0, 10**9), st.binary(min_size=1, max_size=4), st.booleans())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@cases(150, 3_000)
@given(*DAMAGE, st.sampled_from(["metrics.csv", "published.csv"]))
def test_records_are_read_or_refused(folder, at, new, cut, name):
    with case("read: records and published.csv"):
        source = bu.ROOT / "data" / ("results/metrics.csv" if name == "metrics.csv" else "published.csv")
        text = b"".join(source.read_bytes().splitlines(keepends=True)[:6])
        (folder / name).write_bytes(spoiled(text, at, new, cut))
        try:
            if name == "metrics.csv":
                table = readme.read_metrics(folder / name)
                readme.results_table(table)
            else:
                columns = pd.read_csv(source).columns
                table = records.read_table(folder / name, columns, ["auc", "uauc"])
        except ValueError as error:
            assert str(error).startswith(str(folder / name))
        else:
            assert table[["auc", "uauc"]].apply(lambda c: c.dropna().between(0, 1)).all(axis=None)


@cases(150, 3_000)
@given(*DAMAGE)
def test_answers_are_read_or_refused(folder, at, new, cut):
    path = folder / "answers.parquet"
    with case("read: answers"):
        whole = pd.DataFrame({"a": np.linspace(0, 1, 5, dtype=np.float32)}, index=pd.RangeIndex(5, name="row"))
        whole.attrs = {"dataset": TOY.name}
        buffer = io.BytesIO()
        whole.to_parquet(buffer)
        path.write_bytes(spoiled(buffer.getvalue(), at, new, cut))
        try:
            table = records.read_answers(path, TOY)
        except ValueError as error:
            assert str(error).startswith(str(path))
        else:
            assert table.index.is_unique and (table.index >= 0).all()
            assert table.apply(lambda c: c.dropna().between(0, 1)).all(axis=None)


@pytest.fixture(scope="module")
def kept_codes(tmp_path_factory):
    """(folder, file, its bytes, the codes) as `cached_codes` keeps them."""
    place = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bu, "CACHE", place)
        codes = bu.cached_codes(TOY, 16, recipe="made", fit=lambda *_: (CODES, None))
    (file,) = (place / "codes").iterdir()
    return place, file, file.read_bytes(), codes


@cases(150, 4_000)
@given(*DAMAGE)
def test_kept_codes_are_read_or_refused(kept_codes, at, new, cut):
    with case("read: kept codes"):
        place, file, content, codes = kept_codes
        file.write_bytes(spoiled(content, at, new, cut))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bu, "CACHE", place)
            try:
                again = bu.cached_codes(TOY, 16, recipe="made", fit=None)
            except ValueError as error:
                assert str(error).startswith(str(file)) and "delete it" in str(error)
            else:  # a byte of no consequence: the archive checks the sum of all others
                assert (again.users == codes.users).all() and (again.items == codes.items).all()


@pytest.fixture(scope="module")
def kept_adapter(reader, tmp_path_factory):
    model, tokenizer = reader
    from stages import tiny_llm

    model, curve = bu.tune(tiny_llm(), tokenizer, ["a", "b"], [0, 1], progress=False)
    place = tmp_path_factory.mktemp("adapter") / "adapter"
    bu.save_adapter(model, place, {}, curve)
    return place, {name: (place / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


VALUES = st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=5)
VALUES |= st.lists(st.text("qv_proj", max_size=6), max_size=2) | st.dictionaries(st.text(max_size=3), st.integers())


@cases(60, 1_500)
@given(*DAMAGE, st.sampled_from(["bytes of the card", "a value of the card", "bytes of the weights"]), st.data())
def test_adapters_are_read_or_refused(kept_adapter, at, new, cut, what, data):
    from stages import tiny_llm

    with case("read: adapters and their cards"):
        place, files = kept_adapter
        card = files["adapter_config.json"]
        for name, content in files.items():
            (place / name).write_bytes(content)
        if what == "bytes of the card":
            (place / "adapter_config.json").write_bytes(spoiled(card, at, new, cut))
        elif what == "a value of the card":
            key = data.draw(st.sampled_from(sorted(json.loads(card))))
            (place / "adapter_config.json").write_text(json.dumps(json.loads(card) | {key: data.draw(VALUES)}))
        else:
            (place / "adapter_model.safetensors").write_bytes(
                spoiled(files["adapter_model.safetensors"], at % 600, new, cut)
            )
        try:
            model = bu.load_adapter(tiny_llm(), place)
        except (ValueError, OSError) as error:
            assert str(error).startswith(str(place)) and len(str(error)) < 2000
        else:
            assert all(p.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------------------------ rows in shards
IN_SHARDS = st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 1))
SPOILT = st.sampled_from([None, -1, 2, 1 << 31, 1.0, 0.5, math.nan, "1", b"1", True])


@cases(60, 3_000)
@given(
    st.lists(IN_SHARDS, max_size=12),
    st.none() | st.tuples(st.integers(0, 11), st.integers(0, 2), SPOILT),
    st.sampled_from([None, "user", "label"]) | st.just(None),
)
def test_shards_are_read_or_refused(tmp_path_factory, rows, spoil, lacking):
    with case("read: rows in shards"):
        table = {name: [row[place] for row in rows] for place, name in enumerate(bs.COLUMNS)}
        if rows and spoil:
            place, column, value = spoil
            mine = table[bs.COLUMNS[column]]
            if value is not None and type(value) is not int:
                mine[:] = [type(value)(x) if type(value) is not bytes else b"1" for x in mine]  # of one type
            mine[place % len(rows)] = value
        table.pop(lacking, None)
        folder = tmp_path_factory.mktemp("shards")
        pd.DataFrame(table).to_parquet(folder / "0.parquet", row_group_size=5)
        if fits_shards(pd.read_parquet(folder / "0.parquet")):
            shards = bs.Shards(folder, together=2)
            found = [tuple(map(int, row)) for b in shards.batches(4, torch.Generator()) for row in zip(*b)]
            assert sorted(found) == sorted(zip(*(map(int, table[name]) for name in bs.COLUMNS)))
        else:
            with pytest.raises(ValueError, match="must be|cannot be read|likes and dislikes needed"):
                bs.Shards(folder)


def fits_shards(table):
    """The rule: three columns of whole numbers (or true and false) that are ids and labels, labels of both kinds."""
    if not len(table) or set(table) != set(bs.COLUMNS) or any(table[name].dtype.kind not in "iub" for name in table):
        return False
    ids = all(table[name].between(0, 2**31 - 1).all() for name in ("user", "item"))
    return ids and set(table.label.astype(int)) == {0, 1}
