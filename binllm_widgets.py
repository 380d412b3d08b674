"""Widgets to touch the bits with: the bit explorer, in a notebook and as a page of its own (scripts/explorer.py).

Both are drawn by explorer/explorer.js. In JupyterLab the widget comes by anywidget; where notebooks are shown by
something else (Colab, VS Code), which would ask a server elsewhere for it, use the plain one that notebook 02 builds.
"""

import base64
import sys

import anywidget
import numpy as np
import traitlets

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
    """Least number of agreeing bits at which more than half of the training rows are likes, and above it too."""
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
            places = [bit for side in ("user", "film") for bit in value.get(side, ["none"])]
            if set(value) != {"user", "film"} or not all(isinstance(bit, int) and 0 <= bit < bits for bit in places):
                return f"flips must be a list of bits from 0 to {bits - 1} for the user and one for the film"
        return None
