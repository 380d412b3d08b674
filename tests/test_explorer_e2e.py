"""The explorer's page in a real browser: every number that changes is computed again here.

Skipped where no Chromium is installed: `apt-get install chromium`, or set CHROMIUM to its path.
"""

import base64
import importlib.util
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from playwright import sync_api
from test_widgets_e2e import CHROMIUM

import binllm_utils as bu
import explorer

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not CHROMIUM, reason="no Chromium")]
PAGE = bu.ROOT / "docs" / "explorer.html"
DATA = json.loads(re.search(r"page\(document.*?, (\{.*\})\);", PAGE.read_text(encoding="utf-8"))[1])
USERS, FILMS = (
    np.unpackbits(np.frombuffer(base64.b64decode(DATA[side]), np.uint8).reshape(-1, 4), axis=1)
    for side in ("users", "films")
)
AXE = Path(importlib.util.find_spec("axe_playwright_python").origin).parent / "axe.min.js"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """A function (part of the address after #, file, options) -> page; at the end none may have raised or logged."""
    pages, said = [], []

    def opened(state="", path=PAGE, **options):
        page = browser.new_context(**options).new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"file://{path}#{state}")
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.context.close()
    assert said == []


def expected(user, film, flips=((), ())):
    """(number of agreeing bits, texts of the eight nearest films, both codes) for ids and flipped bits."""
    at = DATA["filmIds"].index(film)
    a, b = USERS[user].copy(), FILMS[at].copy()
    a[list(flips[0])] ^= 1
    b[list(flips[1])] ^= 1
    scores = (a == FILMS).sum(1)
    order = sorted(range(len(FILMS)), key=lambda i: (-scores[i], -DATA["counts"][i], i))[:8]
    return int((a == b).sum()), [f"{DATA['titles'][i]}{scores[i]}/32" for i in order], a, b


def check(page, user, film, flips=((), ())):
    agree, nearest, a, b = expected(user, film, flips)
    verdict = page.locator(".bx-verdict")
    sync_api.expect(verdict).to_contain_text(f"{agree} of 32 bits agree")
    assert abs(float(re.search(r"similarity (\d\.\d+)", verdict.text_content())[1]) - agree / 32) < 0.001
    would = "would like it" if agree >= DATA["threshold"] else "would not like it"
    sync_api.expect(page.locator(".bx-verdict")).to_contain_text(would)
    assert page.locator(".bx-user .bx-bit").all_text_contents() == [str(x) for x in a]
    assert page.locator(".bx-film .bx-bit").all_text_contents() == [str(x) for x in b]
    assert page.locator(".bx-sign").all_text_contents() == ["●" if x == y else "◇" for x, y in zip(a, b)]
    assert page.locator(".bx-list").first.locator("li").all_text_contents() == nearest
    assert bu.to_dotted(a) in page.locator(".bx-facts").text_content()


def test_the_picture_for_those_who_only_read(open_page):
    """SCREENSHOT=1 renews figures/02_bit_explorer.png."""
    page = open_page("user=3&u=2,9&bit=13", viewport={"width": 1124, "height": 700})
    kept = bu.ROOT / "figures/02_bit_explorer.png"
    picture = page.locator(".bx").screenshot(path=kept if os.environ.get("SCREENSHOT") else None)
    assert len(picture) > 20_000 and kept.exists()


def test_clicks_flip_either_row_and_can_be_undone(open_page):
    page = open_page()
    user, film = DATA["user"], DATA["film"]
    check(page, user, film)
    page.locator(".bx-user .bx-bit").nth(5).click()
    check(page, user, film, ([5], []))
    page.locator(".bx-film .bx-bit").nth(30).click()
    check(page, user, film, ([5], [30]))
    assert page.locator(".bx-flipped").count() == 2 and page.locator(".bx-changed").count() == 2
    page.get_by_role("button", name="undo").click()
    check(page, user, film, ([5], []))
    page.get_by_role("button", name="reset").click()
    check(page, user, film)
    sync_api.expect(page.get_by_role("button", name="reset")).to_be_disabled()


def test_keys_go_from_bit_to_bit_and_flip(open_page):
    page = open_page("user=1")
    page.locator(".bx-user .bx-bit").first.focus()
    for key in ("ArrowRight", "ArrowRight", "Space", "ArrowDown", "Space", "End", "ArrowRight", "Space"):
        page.keyboard.press(key)
    check(page, 1, DATA["film"], ([2], [2, 31]))
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("bit 31 of the film")
    assert page.url.endswith("&u=2&f=2,31&bit=31")


def test_a_film_is_found_by_a_part_of_its_title(open_page):
    page = open_page("user=2")
    at = max(range(len(FILMS)), key=lambda i: len(DATA["titles"][i]))
    title = DATA["titles"][at]
    box = page.get_by_role("combobox", name="film")
    box.fill(title[3:14].upper())
    hits = page.get_by_role("option")
    sync_api.expect(hits.filter(has_text=title)).to_be_visible()
    box.press("ArrowDown")
    assert box.get_attribute("aria-activedescendant") == hits.first.get_attribute("id")
    hits.filter(has_text=title).click()
    check(page, 2, DATA["filmIds"][at])
    box.fill("no such film <b>")
    sync_api.expect(page.get_by_role("status")).to_have_text("no film is called “no such film <b>”")
    box.press("Enter")
    box.fill("")
    box.press("Enter")
    sync_api.expect(page.get_by_role("status")).to_have_text("type a part of a title")
    box.press("Escape")
    check(page, 2, DATA["filmIds"][at])


def test_a_neighbour_is_gone_on_from(open_page):
    page = open_page("user=3")
    third = expected(3, DATA["film"])[1][2]
    page.locator(".bx-list").first.locator("button").nth(2).click()
    film = DATA["filmIds"][DATA["titles"].index(re.sub(r"\d+/32$", "", third))]
    check(page, 3, film)
    other = page.locator(".bx-list").nth(1).locator("button").first
    name, score = re.fullmatch(r"user (\d+)(\d\d)/32", other.text_content()).groups()
    agree = (USERS[3] == USERS).sum(1)
    agree[3] = -1
    assert int(name) == agree.argmax() and int(score) == agree.max()
    other.click()
    check(page, int(name), film)


def test_a_user_out_of_range_is_said_and_not_taken(open_page):
    page = open_page("user=3")
    box = page.get_by_label("user", exact=True)
    for bad in ("838", "-1", "1.5", ""):
        box.fill(bad)
        box.press("Enter")
        box.blur()
        sync_api.expect(page.get_by_role("status")).to_contain_text("there is no user")
        check(page, 3, DATA["film"])
    box.fill("837")
    box.press("Enter")
    check(page, 837, DATA["film"])


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("user=999999", "there is no user 999999; users go from 0 to 837"),
        ("user=1e1", "there is no user NaN"),
        ("film=3256", "there is no film 3256 here"),
        ("u=1,32", "there are no such bits of the user"),
        ("bit=-7", "there is no bit -7"),
        ("user=<img src=x onerror=alert(1)>", "there is no user NaN"),
        ("%%%&&&==&user=&u=,,", "there is no user NaN"),
    ],
)
def test_an_address_that_makes_no_sense_is_said(open_page, state, said):
    page = open_page(state)
    sync_api.expect(page.get_by_role("status")).to_contain_text(said)
    check(page, DATA["user"], DATA["film"])


def test_an_address_brings_the_state_back(open_page):
    page = open_page("user=7&u=1,4&f=9&bit=4")
    check(page, 7, DATA["film"], ([1, 4], [9]))
    sync_api.expect(page.locator(".bx-about h3")).to_have_text("bit 4")
    page.evaluate("location.hash = '#user=8'")
    check(page, 8, DATA["film"])
    page.evaluate("location.hash = '#user=-8&film=1.5'")
    sync_api.expect(page.get_by_role("status")).to_contain_text("there is no user -8")
    check(page, DATA["user"], DATA["film"])


def test_the_fewest_flips_change_the_verdict(open_page):
    page = open_page("user=5")
    agree = expected(5, DATA["film"])[0]
    needed = agree - DATA["threshold"] + 1 if agree >= DATA["threshold"] else DATA["threshold"] - agree
    before = page.locator(".bx-verdict").get_attribute("class")
    page.get_by_role("button", name="fewest flips").click()
    sync_api.expect(page.get_by_role("status")).to_have_text(
        f"flip {needed} of the {needed} that change the verdict", timeout=20_000
    )
    assert page.locator(".bx-flipped").count() == needed
    assert page.locator(".bx-verdict").get_attribute("class") != before
    page.get_by_role("button", name="undo").click()  # all of them together
    check(page, 5, DATA["film"])
    page.get_by_role("button", name="fewest flips").click()
    page.get_by_role("button", name="undo").click()  # in the midst of it
    page.wait_for_timeout(800)
    check(page, 5, DATA["film"])


def test_a_bit_is_explained_when_pointed_at(open_page):
    page = open_page()
    page.locator(".bx-film .bx-bit").nth(12).hover()
    about = page.locator(".bx-about").text_content()
    assert f"1 for {round(100 * USERS[:, 12].mean())} % of the users" in about.replace("\xa0", " ")
    one = sorted(np.flatnonzero(FILMS[:, 12]), key=lambda i: -DATA["counts"][i])[:5]
    assert "; ".join(DATA["titles"][i] for i in one) in about


CLICKS = """async () => {
    const times = [];
    for (const cell of [...document.querySelectorAll(".bx-bit")].slice(0, 9)) {
        const began = performance.now();
        cell.click();
        await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
        times.push(performance.now() - began);
    }
    return times.sort((a, b) => a - b)[4];
}"""


@pytest.mark.parametrize("films", ["a hundred", "all"])
def test_a_click_is_answered_at_once_and_the_first_paint_too(open_page, ml1m, tmp_path, films):
    path = PAGE
    if films == "all":
        path = tmp_path / "explorer.html"
        path.write_text(explorer.page(ml1m, bu.cached_codes(ml1m, recipe=explorer.RECIPE)), encoding="utf-8")
    shown = [open_page(path=path) for _ in range(5)]
    assert min(page.evaluate(CLICKS) for page in shown) < 100  # milliseconds; the least, for other work can only delay
    assert min(page.evaluate("performance.getEntriesByName('first-paint')[0].startTime") for page in shown) < 300


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1600])
def test_it_holds_at_any_width_and_all_can_use_it(open_page, width, scheme):
    page = open_page("u=1", viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    tops = (
        page.locator(".bx-octet")
        .first.locator(".bx-bit")
        .evaluate_all("cells => cells.map(c => c.getBoundingClientRect())")
    )
    assert all(abs(tops[i]["x"] - tops[i + 8]["x"]) < 1 for i in range(8))  # bit under bit
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run().then(result => result.violations)")
    assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == [], found


def test_nothing_stacks_or_runs_on(open_page):
    """Fifty quick clicks: as many states to undo, the lists as long as ever, no step of a walk left running."""
    page = open_page("user=5")
    agree, _, a, b = expected(5, DATA["film"])
    step = int(np.flatnonzero((a != b) == (agree < DATA["threshold"]))[0])  # the only one that a walk comes to
    page.get_by_role("button", name="fewest flips").click()
    for place in range(50):
        page.locator(".bx-user .bx-bit").nth(place % 7).click(delay=0)
    page.wait_for_timeout(800)
    flips = {1, 2, 3, 4, 5, 6} ^ {step}  # clicked seven times each, bit 0 eight times
    check(page, 5, DATA["film"], (sorted(flips), []))
    assert page.locator(".bx-list li").count() == 16
    for _ in range(51):
        page.get_by_role("button", name="undo").click()
    check(page, 5, DATA["film"])
    sync_api.expect(page.get_by_role("button", name="undo")).to_be_disabled()
