"""Token lens and playground without a browser: what they show is what the functions of the walk give."""

import re
import threading

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model

import binllm_utils as bu
import binllm_widgets as bw

HABITS = {"letters": list, "pairs": lambda text: re.findall("..?", text), "odd <b>": lambda text: [text]}


def test_the_lens_shows_both_notations_and_every_tokenizers_cut():
    lens = bw.TokenLens(HABITS)
    for text, bits in (
        ("01100101", "01100101"),
        ("101", "01100101"),
        ("101.9", "0110010100001001"),
        (" 255 ", "11111111"),
    ):
        lens.text = text
        assert bu.to_bits(lens.code) == bits and not lens.message
        shown = lens.view.value
        assert f"bits: {bits}" in shown and f"dotted: {bu.to_dotted(lens.code)}" in shown
        assert shown.count(f"</span> {len(bits)}</td>") >= 1 and shown.count(f"</span> {len(bits) // 2}</td>") >= 1
        assert "odd &lt;b&gt;" in shown and "<b>" not in shown
    lens.text = "101"
    numbers = re.findall(r"<td>(\d+) \(([+-]\d+)\)</td>", lens.view.value)
    assert [int(n) for n, _ in numbers] == [101 ^ (128 >> bit) for bit in range(8)]
    assert [int(step) for _, step in numbers] == [int(n) - 101 for n, _ in numbers]


@pytest.mark.parametrize("text", ["", "  ", "256", "0110", "1.2.3.x", "<script>alert(1)</script>", "012"])
def test_what_is_no_code_is_said_in_the_lens(text):
    lens = bw.TokenLens(HABITS)
    before = lens.code
    lens.text = text
    assert lens.message and 'role="status"' in lens.view.value and "<script" not in lens.view.value
    assert (lens.code == before).all()


@pytest.fixture
def play(toy, llm):
    """(playground, its model, tokenizer): two layers with an adapter that says something else than they do."""
    model = get_peft_model(llm[0], LoraConfig(**bu.LORA["all"] | {"init_lora_weights": False})).eval()
    codes = bu.Codes(np.eye(20, 16, dtype=int), np.eye(30, 16, dtype=int))
    rows = toy.test[[len(liked) > 3 for liked in bu.liked_before(toy, toy.test)]].drop_duplicates("user").head(2)
    return bw.Playground(toy, codes, model, llm[1], rows), model, llm[1]


def idle(play):
    """Wait for the answer and for all that is read ahead."""
    play.wait()
    with play.turn:
        pass


def wanted(play, model, tokenizer):
    """P(Yes) before and after by `bu.score` of the whole prompt."""
    template, values, _ = play.prompt()
    prompt = template.format(**values)
    with play.reader.lock:
        after = bu.score(model, tokenizer, [prompt], progress=False)[0]
        with model.disable_adapter():
            return bu.score(model, tokenizer, [prompt], progress=False)[0], after, prompt


def test_the_playground_says_what_score_says_after_any_change(play, toy):
    play, model, tokenizer = play
    prompts = bu.build_prompts(toy, play.rows, play.codes, history="row")
    play.wait()
    assert wanted(play, model, tokenizer)[2] == prompts[0]
    seen = []
    for change in (
        lambda: None,
        lambda: setattr(play.bits[3], "value", not play.bits[3].value),
        lambda: setattr(play.notation, "value", "dotted"),
        lambda: setattr(play.shown[0], "value", False),
        lambda: setattr(play.film, "value", toy.titles[7]),
    ):
        change()
        got = play.wait()
        before, after, prompt = wanted(play, model, tokenizer)
        assert abs(got["before"] - before) < 1e-5 and abs(got["after"] - after) < 1e-5
        seen.append((prompt, round(got["after"], 9)))
        assert f"{got['after']:.3f}" in play.view.value and f"{got['similarity']:.3f}" in play.view.value
    assert len(set(seen)) == 5 and abs(got["before"] - got["after"]) > 1e-6
    play.user.value, play.notation.value, play.film.value = 1, "bits", toy.titles[play.rows.item.iloc[1]]
    assert abs(play.wait()["after"] - wanted(play, model, tokenizer)[1]) < 1e-5
    assert wanted(play, model, tokenizer)[2] == prompts[1]  # another code and other likes


def test_nothing_is_read_twice(play):
    """Of a prompt only what differs from one read before; the likes of the other users while nothing else is to do."""
    play, model, tokenizer = play
    read = []
    model.register_forward_pre_hook(lambda _, given, named: read.append(given[0].shape), with_kwargs=True)

    def pieces(act):
        act()
        idle(play)
        found, read[:] = [shape[1] for shape in read], []
        return found, len(bu.encode_prompts(model, tokenizer, [play.newest[1].format(**play.newest[2])])[0])

    pieces(lambda: None)
    for act, share in (
        (lambda: setattr(play.bits[0], "value", not play.bits[0].value), 0.7),
        (lambda: setattr(play.bits[15], "value", not play.bits[15].value), 0.4),
        (lambda: setattr(play.user, "value", 1), 0.4),  # read ahead
        (lambda: setattr(play.user, "value", 0), 0.4),
    ):
        found, whole = pieces(act)
        assert len(found) == 1 and found[0] < share * whole, (found, whole)
    assert 1 < len(play.reader.kept) <= 8


def test_changes_in_quick_succession_do_not_pile_up(play):
    play, *_ = play
    idle(play)
    asked, real = [], play.reader.ask
    play.reader.ask = lambda *given: (asked.append(given), threading.Event().wait(0.2), real(*given))[2]
    for turn in range(31):
        play.bits[turn % 16].value = not play.bits[turn % 16].value
    newest = play.newest[1].format(**play.newest[2])
    play.wait()
    assert 1 <= len(asked) <= 20 and asked[-1][0] == newest


def test_an_answer_that_comes_too_late_changes_nothing(play):
    """Something new is asked at the very moment when an answer is shown."""
    play, *_ = play
    idle(play)
    real, late = play._show, []

    def show(*given):
        if given[-1] and not late:
            late.append(threading.Thread(target=lambda: setattr(play.film, "value", "no such film")))
            late[0].start()
            threading.Event().wait(0.2)
        real(*given)

    play._show = show
    play.bits[0].value = not play.bits[0].value
    while not late:
        threading.Event().wait(0.01)
    late[0].join(20)
    with pytest.raises(RuntimeError, match="no film is called"):
        play.wait(5)
    assert "no film is called" in play.view.value


@pytest.mark.parametrize("title", ["", "no such film", "<img src=x onerror=alert(1)>"])
def test_a_film_that_is_none_is_said_in_the_playground(play, title):
    play, *_ = play
    idle(play)
    done, real = threading.Event(), play.reader.ask
    play.reader.ask = lambda *given: (threading.Event().wait(0.3), real(*given), done.set())[1]
    play.bits[0].value = not play.bits[0].value  # the model is still reading this when the film is gone
    threading.Event().wait(0.1)
    play.film.value = title
    for _ in range(2):
        assert 'role="status"' in play.view.value and "<img" not in play.view.value
        assert done.wait(20)
        threading.Event().wait(0.2)
    with pytest.raises(RuntimeError, match="no film is called|type a part of a title"):
        play.wait()


def test_the_path_of_flips_goes_from_none_to_all(play, toy):
    play, *_ = play
    path = bw.flip_path(toy, play.codes, play.reader, play.rows.head(1))
    assert path.similarity.tolist() == [n / 8 for n in range(9)] and path.after.nunique() > 4


def test_results_side_by_side_are_those_of_the_paired_test(toy):
    rng = np.random.default_rng(0)
    rows = toy.test
    scores = {"chance": rng.random(100), "truth": rows.label + rng.random(100) / 2, "constant": np.zeros(100)}
    groups = bw.usual_groups(toy, rows) | {"likes only": rows.label.to_numpy() == 1, "nothing": np.zeros(100, bool)}
    explorer = bw.ResultExplorer(rows, scores, groups, lambda row: f"<b>row {row.index[0]}</b>")
    assert explorer.difference.equals(
        bu.paired_test(rows.user, rows.label, scores["chance"], scores["truth"], draws=200)
    )
    explorer.group.value = "films seen 1 to 19 times"
    mine = rows.item.map(toy.train.item.value_counts()).fillna(0).between(1, 19).to_numpy()
    assert 0 < mine.sum() <= 100 and f"{mine.sum()} rows" in explorer.view.value
    ranks = scores["chance"][mine].argsort().argsort()
    widest = explorer.disagreement.iloc[0]
    gap = np.abs(explorer.disagreement.rank_a - explorer.disagreement.rank_b)
    assert gap.is_monotonic_decreasing and gap.iloc[0] > 0.5
    assert widest.rank_a == (ranks[rows[mine].index.get_loc(widest.name)] + 1) / mine.sum()
    assert "&lt;b&gt;row" in explorer.view.value and "<b>row" not in explorer.view.value
    for group in ("likes only", "nothing"):
        explorer.group.value = group
        assert explorer.difference is None and "no difference can be told" in explorer.view.value


def test_a_model_that_fails_is_said_and_the_next_answer_is_right(play):
    play, model, tokenizer = play
    play.wait()
    real = model.forward

    def fails(*given, **named):
        raise RuntimeError("out of memory")

    model.forward = fails
    play.bits[1].value = not play.bits[1].value
    with pytest.raises(RuntimeError, match="the model gave no answer: out of memory"):
        play.wait()
    assert "out of memory" in play.view.value
    model.forward = real
    play.bits[2].value = not play.bits[2].value
    got = play.wait()
    assert abs(got["after"] - wanted(play, model, tokenizer)[1]) < 1e-5
