"""Widgets to touch the bits with: bit explorer (notebook 02), token lens (03), playground of P(Yes) (04),
results side by side (05).

The bit explorer is drawn by explorer/explorer.js, in a notebook and as a page of its own (scripts/explorer.py). In
JupyterLab it comes by anywidget; where notebooks are shown by something else (Colab, VS Code), which would ask a server
elsewhere for it, use the plain one that notebook 02 builds. The others are of ipywidgets alone, which all of them know.
"""

import base64
import contextlib
import html
import os
import sys
import threading

import anywidget
import ipywidgets
import numpy as np
import pandas as pd
import torch
import traitlets

import binllm_extras as bx
import binllm_utils as bu
from binllm_data import ROOT

FOLDER = ROOT / "explorer"


def explorer_data(dataset, codes, films=None):
    """What explorer.js is given, a dict of plain values: codes packed in base64, titles, tags, and a threshold.

    films: ids of the films shown, all by default. threshold: the least number of agreeing bits from which on more than
    half of the training rows are likes; its side is the explorer's verdict. Raises ValueError for ids without a film.
    """
    films = np.arange(dataset.n_items) if films is None else np.asarray(films)
    if not len(films) or films.min() < 0 or films.max() >= dataset.n_items:
        raise ValueError(f"films must be ids from 0 to {dataset.n_items - 1}, at least one")
    tags = dataset.tags or [()] * dataset.n_items
    names = sorted({tag for film in films for tag in tags[film]})
    place = {tag: at for at, tag in enumerate(names)}
    counts = np.bincount(dataset.train.item, minlength=dataset.n_items)
    seen = dataset.train.user.value_counts()
    pack = lambda table: base64.b64encode(np.packbits(table, axis=1).tobytes()).decode()  # noqa: E731
    return {
        "bits": codes.bits,
        "threshold": verdict_threshold(dataset, codes),
        "users": pack(codes.users),
        "films": pack(codes.items[films]),
        "filmIds": films.tolist(),
        "titles": [dataset.titles[film] for film in films],
        "counts": counts[films].tolist(),
        "tags": names,
        "filmTags": [[place[tag] for tag in tags[film]] for film in films],
        "user": int(seen.index[0]),
        "film": int(films[counts[films].argmax()]),
    }


def verdict_threshold(dataset, codes):
    """Least number of agreeing bits at which more than half of the training rows are likes, and above it too.

    All bits, where there is no such number.
    """
    agree = (codes.similarity(dataset.train) * codes.bits).round().astype(int)
    rows = np.bincount(agree, minlength=codes.bits + 1)
    likes = np.bincount(agree, dataset.train.label, minlength=codes.bits + 1)
    few = np.flatnonzero((rows > 0) & (2 * likes <= rows))
    return int(min(codes.bits, few.max() + 1)) if len(few) else 0


class BitExplorer(anywidget.AnyWidget):
    """The bit explorer in JupyterLab; what is done in it and what Python sets are one state.

    user, film: ids. flips: {"user": [bits], "film": [bits]}, the bits that differ from the learned codes. selected: the
    bit that is explained, -1 for none. What makes no sense is not taken: `message`, a line in the widget, says so.
    """

    _esm = FOLDER / "explorer.js"
    _css = FOLDER / "explorer.css"
    data = traitlets.Dict().tag(sync=True)
    user = traitlets.Int().tag(sync=True)
    film = traitlets.Int().tag(sync=True)
    flips = traitlets.Dict().tag(sync=True)
    selected = traitlets.Int(-1).tag(sync=True)
    message = traitlets.Unicode().tag(sync=True)

    def __init__(self, dataset, codes, films=None):
        if "google.colab" in sys.modules:
            print("In Colab this explorer would be asked for from another server; use the one that notebook 02 builds.")
        data = explorer_data(dataset, codes, films)
        start = {"user": data["user"], "film": data["film"], "flips": {"user": [], "film": []}}
        super().__init__(data=data, **start)
        self._n_users = len(codes.users)
        for name in ("user", "film", "flips", "selected"):
            self._register_validator(self._sensible, (name,))

    def _sensible(self, _, proposal):
        name, value = proposal["trait"].name, proposal["value"]
        wrong = self._wrong(name, value)
        self.message = wrong or ""
        return getattr(self, name) if wrong else value

    def _wrong(self, name, value):
        """What is wrong with that value, or None."""
        bits = self.data["bits"]
        if name == "user" and not 0 <= value < self._n_users:
            return f"there is no user {value}; users go from 0 to {self._n_users - 1}"
        if name == "film" and value not in self.data["filmIds"]:
            return f"there is no film {value} here"
        if name == "selected" and not -1 <= value < bits:
            return f"there is no bit {value}; bits go from 0 to {bits - 1}"
        if name == "flips":
            lists = set(value) == {"user", "film"} and all(isinstance(side, list) for side in value.values())
            if not lists or not all(type(bit) is int and 0 <= bit < bits for side in value.values() for bit in side):
                return f"flips must be a list of bits from 0 to {bits - 1} for the user and one for the film"
        return None


# ----------------------------------------------------------------------------------------------------------- token lens
def token_boxes(pieces):
    """HTML: each text of `pieces` in a box, in turns of two looks so that neighbours are told apart."""
    look = "display:inline-block;padding:0 3px;margin:1px;border:1px solid;border-radius:3px;font-family:monospace"
    looks = (f"{look};background:#0072B230", f"{look};border-style:dashed")
    return "".join(f'<span style="{looks[at % 2]}">{html.escape(piece)}</span>' for at, piece in enumerate(pieces))


class TokenLens(ipywidgets.VBox):
    """Type a code in bits or dotted decimal: both notations and hexadecimal, cut into tokens by each of `habits`.

    habits: {name: function from a text to the list of its tokens}. `text` is what is typed, `code` the last sound code;
    `message` says what is wrong with the text. Neighbours one bit away are listed for a code of eight bits.
    """

    def __init__(self, habits, text="01101001"):
        self.habits, self.code, self.message = habits, None, ""
        self.box = ipywidgets.Text(text, description="a code", continuous_update=True)
        self.view = ipywidgets.HTML()
        self.box.observe(lambda _: self._draw(), "value")
        super().__init__([self.box, self.view])
        self._draw()

    @property
    def text(self):
        return self.box.value

    @text.setter
    def text(self, value):
        self.box.value = value

    def read(self, text):
        """The code that `text` writes, in bits or dotted decimal; raises ValueError for anything else."""
        text = text.strip()
        if not text:
            raise ValueError("type eight bits, such as 01101001, or a number from 0 to 255")
        return bu.from_bits(text) if set(text) <= {"0", "1"} and len(text) % 8 == 0 else bu.from_dotted(text)

    def _draw(self):
        try:
            self.code, self.message = self.read(self.text), ""
        except ValueError as error:
            self.message = str(error)
            self.view.value = f'<p role="status">{html.escape(self.message)}</p>'
            return
        ways = {"bits": bu.to_bits, "dotted": bu.to_dotted, "hexadecimal": bx.to_hex}
        head = "".join(f"<th>{name}: {html.escape(write(self.code))}</th>" for name, write in ways.items())
        lines = []
        for habit, cut in self.habits.items():
            cells = [cut(write(self.code)) for write in ways.values()]
            boxes = "".join(f"<td>{token_boxes(pieces)} {len(pieces)}</td>" for pieces in cells)
            lines.append(f"<tr><th>{html.escape(habit)}</th>{boxes}</tr>")
        self.view.value = f"<table><tr><th></th>{head}</tr>{''.join(lines)}</table>{self._neighbours()}"

    def _neighbours(self):
        if len(self.code) != 8:
            return ""
        near = [self.code ^ (np.arange(8) == bit) for bit in range(8)]
        here = int(bu.to_dotted(self.code))
        cells = "".join(f"<td>{bu.to_dotted(code)} ({int(bu.to_dotted(code)) - here:+d})</td>" for code in near)
        return f"<p>One bit away, first to last:</p><table><tr>{cells}</tr></table>"


# ----------------------------------------------------------------------------------------------------------- playground
class Reader:
    """P(Yes) of a prompt before and after tuning. What it shares with one read before is not read again.

    model: an LLM with an adapter. The last eight prompts are kept as keys and values.
    """

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.answers, self.kept, self.lock = bu.answer_tokens(tokenizer), [], threading.Lock()

    def ask(self, prompt):
        """[P(Yes) without the adapter, with it]."""
        (ids,) = bu.encode_prompts(self.model, self.tokenizer, [prompt])
        with self.lock:  # one at a time
            logits = self._read(ids)[:, self.answers].double()
        return torch.sigmoid(logits[:, 0] - logits[:, 1]).tolist()

    @torch.inference_mode()
    def _read(self, ids):
        """Logits of the token after `ids`, [2, vocabulary]; in one pass, whose first line the adapter leaves alone."""
        shared = [len(os.path.commonprefix([tokens, ids[:-1]])) for tokens, _ in self.kept]
        start, cache = 0, None
        if shared and max(shared) > len(ids) / 3:  # else it is of another user, and stays as it is
            start = max(shared)
            before, cache = self.kept.pop(shared.index(start))
            cache.crop(start - len(before))
        tokens = torch.tensor([ids[start:]] * 2, device=self.model.device)
        names = ["__base__", self.model.active_adapter]
        found = self.model(tokens, past_key_values=cache, adapter_names=names, use_cache=True, logits_to_keep=1)
        self.kept = [*self.kept[-7:], (ids, found.past_key_values)]
        return found.logits[:, -1]


class Playground(ipywidgets.VBox):
    """The prompt of a user and a film, live: flip bits, drop likes, change user, film or notation; P(Yes) follows.

    model: an LLM with an adapter (`bu.load_adapter`); it is asked without and with it. rows: one for each user to
    choose from, with the history of that time. Controls answer at once and the model is asked behind them, always for
    the newest state, so that nothing piles up; `wait()` waits for it. Ask the same model elsewhere only `with
    play.reader.lock`, for what one pass is told about the adapter would reach the other.
    """

    def __init__(self, dataset, codes, model, tokenizer, rows):
        self.dataset, self.codes, self.reader, self.rows = dataset, codes, Reader(model, tokenizer), rows
        self.liked = bu.liked_before(dataset, rows)
        self.result, self.asked, self.turn, self.showing = None, 0, threading.Lock(), threading.Lock()
        self.ahead = list(range(1, min(len(rows), 7)))  # users whose prompts are read while nothing else is to do
        users = [(str(user), place) for place, user in enumerate(rows.user)]
        self.user = ipywidgets.Dropdown(options=users, description="user")
        self.film = ipywidgets.Combobox(
            value=dataset.titles[int(rows.item.iloc[0])],
            options=dataset.titles,
            description="film",
            continuous_update=False,
        )
        self.notation = ipywidgets.Dropdown(options=list(bu.FORMATS), description="notation")
        self.sides = [ipywidgets.HBox(layout=ipywidgets.Layout(flex_flow="row wrap")) for _ in range(2)]
        self.view = ipywidgets.HTML()
        self.user.observe(self._swapped, "value")
        for control in (self.film, self.notation):
            control.observe(self._changed, "value")
        super().__init__([ipywidgets.HBox([self.user, self.film, self.notation]), *self.sides, self.view])
        self._swapped()

    def _swapped(self, _=None):
        """Show the learned code and the likes of the user chosen."""
        place = self.user.value
        self.code = self.codes.users[int(self.rows.user.iloc[place])].copy()
        narrow = ipywidgets.Layout(width="30px", padding="0", margin="1px")
        self.bits = [
            ipywidgets.ToggleButton(
                bool(bit), tooltip=f"flip bit {at} of the user", description=str(bit), layout=narrow
            )
            for at, bit in enumerate(self.code)
        ]
        titles = (self.dataset.titles[item] for item in self.liked[place])
        self.shown = [ipywidgets.Checkbox(True, description=title, indent=False) for title in titles]
        for side, controls in zip(self.sides, (self.bits, self.shown)):
            side.children = controls
            for control in controls:
                control.observe(self._changed, "value")
        self._changed()

    def prompt(self):
        """(template, values of its fields, similarity) of what is shown; raises ValueError for no such film."""
        return self._prompt(self.code, [box.description for box in self.shown if box.value])

    def _prompt(self, code, likes):
        title = self.film.value.strip()
        if title not in self.dataset.titles:
            raise ValueError(f"no film is called {title[:60]!r}" if title else "type a part of a title and choose one")
        film = self.codes.items[self.dataset.titles.index(title)]
        template, fields = bu.prompt_fields("text+codes", [title], [likes], [code], [film], self.notation.value)
        similarity = float(bu.hamming_similarity(code, film))
        return template, {name: texts[0] for name, texts in fields.items()}, similarity

    def _changed(self, _=None):
        for place, bit in enumerate(self.bits):
            self.code[place], bit.description = bit.value, str(int(bit.value))
        with self.showing:  # whatever is being read is of yesterday from now on
            self.asked += 1
        try:
            self.newest = self.asked, *self.prompt()
        except ValueError as error:
            self.result = {"number": self.asked, "error": str(error)}
            self.view.value = f'<p role="status">{html.escape(str(error))}</p>'
            return
        self._show(*self.newest[1:], None)
        threading.Thread(target=self._answer, args=self.newest, daemon=True).start()

    def _answer(self, number, template, values, similarity):
        """Ask the model, unless something newer was asked before its turn; then read ahead until something is."""
        with self.turn:
            if number != self.asked:
                return
            result = {"number": number, "similarity": similarity}
            try:
                result |= dict(zip(("before", "after"), self.reader.ask(template.format(**values))))
            except Exception as error:  # in a thread nobody would hear of it
                result["error"] = f"the model gave no answer: {error}"
            with self.showing:
                if number == self.asked:
                    self._show(template, values, similarity, result)
                    self.result = result
            while self.ahead and number == self.asked:
                self._read_ahead(self.ahead.pop(0))

    def _read_ahead(self, place):
        likes = [self.dataset.titles[item] for item in self.liked[place]]
        with contextlib.suppress(Exception):  # it is said when that user is chosen
            template, values, _ = self._prompt(self.codes.users[int(self.rows.user.iloc[place])], likes)
            self.reader.ask(template.format(**values))

    def wait(self, seconds=60):
        """The newest result, a dict of P(Yes) before and after and the similarity.

        Raises RuntimeError when there can be no answer, TimeoutError when it is not there in time.
        """
        for _ in range(int(20 * seconds)):
            if self.result and self.result["number"] == self.asked:
                if "error" in self.result:
                    raise RuntimeError(self.result["error"])
                return self.result
            threading.Event().wait(0.05)
        raise TimeoutError(f"no answer after {seconds} s")

    def _show(self, template, values, similarity, result):
        if result and "error" in result:
            self.view.value = f'<p role="status">{html.escape(result["error"])}</p>'
            return
        colors = {"likes": "#009E73", "title": "#E69F00", "user": "#0072B2", "item": "#0072B2"}
        marks = {
            name: f'<mark style="background:{colors[name]}40;color:inherit">{html.escape(value)}</mark>'
            for name, value in values.items()
        }
        marked = html.escape(template).replace("\n", "<br>").format(**marks)
        lines = {"before tuning": result and result["before"], "after": result and result["after"]}
        lines["Hamming similarity"] = similarity
        bars = "".join(
            f"<tr><td>{name}</td><td>{'… reading' if value is None else f'{value:.3f}'}</td><td>"
            f'<div style="width:220px;border:1px solid"><div style="width:{220 * (value or 0):.0f}px;height:10px;'
            f'background:{color}"></div></div></td></tr>'
            for (name, value), color in zip(lines.items(), bu.COLORS)
        )
        self.view.value = f"<table>{bars}</table><p>{marked}</p>"


def flip_path(dataset, codes, reader, row):
    """P(Yes) while the user's bits come to agree with the film's, two more in each line: DataFrame.

    Columns similarity, before, after; bits / 2 + 1 lines, from none that agrees to all. `reader` is a `Reader`.
    """
    item = codes.items[int(row.item.iloc[0])]
    users = np.array([np.where(np.arange(codes.bits) < n, item, 1 - item) for n in range(0, codes.bits + 1, 2)])
    prompts = [
        bu.build_prompts(dataset, row, bu.Codes(np.tile(code, (len(codes.users), 1)), codes.items))[0] for code in users
    ]
    found = [reader.ask(prompt) for prompt in prompts]
    similarity = bu.hamming_similarity(users, item)
    return pd.DataFrame({"similarity": similarity} | dict(zip(("before", "after"), zip(*found))))


# ------------------------------------------------------------------------------------------------------ result explorer
def usual_groups(dataset, rows):
    """{name: boolean array [rows]}: all rows, and those of users and films that training saw often, seldom or never."""
    groups = {"all rows": np.ones(len(rows), bool)}
    for column, plural in (("user", "users"), ("item", "films")):
        seen = rows[column].map(dataset.train[column].value_counts()).fillna(0).to_numpy()
        groups |= {
            f"{plural} never seen in training": seen == 0,
            f"{plural} seen 1 to 19 times": (seen > 0) & (seen < 20),
        }
        groups[f"{plural} seen 20 times or more"] = seen >= 20
    return groups


class ResultExplorer(ipywidgets.VBox):
    """Two methods on a group of rows: the difference with its interval, and the rows where they disagree most.

    rows: columns user, item, label, timestamp. scores: {method: numbers, one a row}; groups: {name: boolean array}.
    prompt_of: a function from a DataFrame of one row to its prompt. `difference` is what `bu.paired_test` says of the
    rows chosen, with 200 draws, None where it cannot be told; `disagreement` the rows listed, the widest gap first. The
    gap is one of ranks within the group, for scores of two methods have no common scale.
    """

    def __init__(self, rows, scores, groups, prompt_of, listed=5):
        self.rows, self.scores, self.groups, self.prompt_of, self.listed = rows, scores, groups, prompt_of, listed
        names = list(scores)
        self.a = ipywidgets.Dropdown(options=names, value=names[0], description="a")
        self.b = ipywidgets.Dropdown(options=names, value=names[1], description="b")
        self.group = ipywidgets.Dropdown(options=list(groups), description="rows")
        self.view = ipywidgets.HTML()
        for control in (self.a, self.b, self.group):
            control.observe(lambda _: self._draw(), "value")
        super().__init__([ipywidgets.HBox([self.a, self.b, self.group]), self.view])
        self._draw()

    def _draw(self):
        mine = self.groups[self.group.value]
        rows, a, b = self.rows[mine], *(self.scores[box.value][mine] for box in (self.a, self.b))
        try:
            self.difference = bu.paired_test(rows.user, rows.label, a, b, draws=200)
            table = self.difference.round(3).to_html()
        except ValueError as error:  # one class, or nobody who counts
            self.difference, table = None, f'<p role="status">no difference can be told: {html.escape(str(error))}</p>'
        ranks = [pd.Series(score).rank(pct=True).to_numpy() for score in (a, b)]
        gap = ranks[1] - ranks[0]
        order = np.argsort(-np.abs(gap), kind="stable")[: self.listed]
        self.disagreement = rows.iloc[order].assign(rank_a=ranks[0][order], rank_b=ranks[1][order])
        lines = "".join(self._line(self.disagreement.iloc[[place]]) for place in range(len(order)))
        self.view.value = (
            f"<p>{len(rows):,} rows of {rows.user.nunique()} users; b − a:</p>{table}"
            f"<p>Where the two disagree most; a rank of 1 is the surest like:</p>{lines}"
        )

    def _line(self, row):
        prompt = html.escape(self.prompt_of(row)).replace("\n", "<br>")
        (one,) = row.itertuples()
        liked = "liked" if one.label else "not liked"
        head = f"user {one.user}, {liked}: rank {one.rank_a:.2f} by a, {one.rank_b:.2f} by b"
        return f"<details><summary>{head}</summary>{prompt}</details>"
