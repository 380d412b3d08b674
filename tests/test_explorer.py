"""What the explorer is given and says without a browser: its data, the state shared with Python, the committed page."""

import base64
import json
import re

import numpy as np
import pytest
from conftest import make_dataset

import binllm_utils as bu
import binllm_widgets as bw
import explorer

CODES = bu.Codes(np.random.default_rng(0).integers(0, 2, (20, 16)), np.random.default_rng(1).integers(0, 2, (30, 16)))


def test_the_data_hold_the_codes_of_the_films_asked_for(toy):
    data = bw.explorer_data(toy, CODES, [4, 7, 29])
    packed = np.frombuffer(base64.b64decode(data["films"]), np.uint8).reshape(3, 2)
    assert (np.unpackbits(packed, axis=1) == CODES.items[[4, 7, 29]]).all()
    assert data["titles"] == [toy.titles[i] for i in (4, 7, 29)] and data["filmIds"] == [4, 7, 29]
    assert data["counts"] == [int((toy.train.item == i).sum()) for i in (4, 7, 29)]
    json.dumps(data)
    for bad in ([], [30], [-1]):
        with pytest.raises(ValueError, match="films must be ids from 0 to 29"):
            bw.explorer_data(toy, CODES, bad)


def test_the_verdict_is_where_most_ratings_are_likes(ml1m):
    codes = bu.cached_codes(ml1m)
    k = bw.verdict_threshold(ml1m, codes)
    agree = (codes.similarity(ml1m.train) * 32).round()
    assert all(ml1m.train.label[agree == n].mean() > 0.5 for n in np.unique(agree) if n >= k)
    assert ml1m.train.label[agree == k - 1].mean() <= 0.5


def test_python_and_widget_share_a_state_and_refuse_what_makes_no_sense(toy):
    w = bw.BitExplorer(toy, CODES)
    w.user, w.film, w.selected, w.flips = 3, 5, 2, {"user": [0, 2], "film": []}
    assert (w.user, w.film, w.selected, w.flips, w.message) == (3, 5, 2, {"user": [0, 2], "film": []}, "")
    for name, bad, said in (
        ("user", 20, "there is no user 20; users go from 0 to 19"),
        ("film", 30, "there is no film 30 here"),
        ("selected", 16, "there is no bit 16"),
        ("flips", {"user": [16], "film": []}, "flips must be a list of bits from 0 to 15"),
        ("flips", {"user": [0]}, "flips must be"),
        ("flips", {"user": 3, "film": []}, "flips must be"),
        ("flips", {"user": [True], "film": []}, "flips must be"),
    ):
        before = getattr(w, name)
        setattr(w, name, bad)
        assert getattr(w, name) == before and w.message.startswith(said)


def test_no_title_can_leave_its_place_in_the_page():
    title = "</script><script>alert(1)</script> & <b>"
    toy = make_dataset(titles=[title, *[f"Film {i}" for i in range(1, 30)]])
    text = explorer.page(toy, CODES)
    assert "<script>alert" not in text and text.count("</script>") == 1
    assert json.loads(re.search(r"page\(document.*?, (\{.*\})\);", text)[1])["titles"][0] == title


def test_the_page_asks_nobody_for_anything():
    text = (bu.ROOT / "docs/explorer.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text and not re.search(r"https?:|import |fetch\(|src=|@import|url\(", text)


def test_the_committed_page_is_made_from_the_program_and_shows_few_titles(ml1m):
    films = explorer.shown_in_notebooks(ml1m)
    text = (bu.ROOT / "docs/explorer.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r"page\(document.*?, (\{.*\})\);", text)[1])
    assert len(films) <= 100 and set(data["filmIds"]) <= set(films)
    assert text == explorer.page(ml1m, bu.cached_codes(ml1m, recipe=explorer.RECIPE), data["filmIds"]), (
        "run python scripts/explorer.py --public"
    )
