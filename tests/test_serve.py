"""Recommendations from codes, with and without an LLM, and the service that gives them over HTTP."""

import asyncio
import contextlib
import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import make_dataset
from peft import LoraConfig, get_peft_model

import binllm_serve as bs
import binllm_utils as bu


@pytest.fixture
def codes():
    rng = np.random.default_rng(3)
    return bu.Codes(rng.integers(0, 2, (20, 32), dtype=np.uint8), rng.integers(0, 2, (30, 32), dtype=np.uint8))


@pytest.fixture
def made(toy, codes):
    return bs.Recommender(toy, codes)


# ---------------------------------------------------------------------------------------------------- codes at once
def test_enough_ratings_bring_back_the_code_that_they_came_from():
    rng = np.random.default_rng(0)
    items = bu.Codes(np.zeros((1, 32), int), rng.integers(0, 2, (400, 32)))
    true = rng.integers(0, 2, 32)
    labels = (rng.random(400) < 1 / (1 + np.exp(-20 * (bu.hamming_similarity(true, items.items) - 0.5)))).astype(int)
    found = [bs.code_of_ratings(items, np.arange(n), labels[:n], np.zeros(32)) for n in (10, 100, 400)]
    agree = [(code == true).mean() for code in found]
    assert agree[0] < agree[2] and agree[2] > 0.9 and found[0].dtype == np.uint8


def test_who_has_rated_nothing_has_the_average_code_and_likes_draw_it_near(codes):
    average = 2.0 * codes.users.mean(0) - 1
    none = bs.code_of_ratings(codes, [], [], average)
    assert np.array_equal(none, average > 0)
    nearer = [
        bu.hamming_similarity(bs.code_of_ratings(codes, [i] * 3, [label] * 3, average), codes.items[i])
        for i in range(30)
        for label in (0, 1)
    ]
    before = [bu.hamming_similarity(none, codes.items[i]) for i in range(30) for _ in (0, 1)]
    moved = (np.array(nearer) - before).reshape(30, 2)
    assert (
        (moved[:, 0] <= 0).all() and (moved[:, 1] >= 0).all() and moved[:, 1].mean() > 0.05 > -0.05 > moved[:, 0].mean()
    )


def test_thousands_of_equal_ratings_are_no_trouble(codes):
    """A whole Newton step would overshoot here, and the code would be that of somebody else."""
    average = -0.99 * (2.0 * codes.items[4] - 1)  # far from what is liked
    code = bs.code_of_ratings(codes, [4] * 5000, [1] * 5000, average)
    assert np.array_equal(code, codes.items[4])


@pytest.mark.parametrize(
    ("items", "labels", "said"),
    [
        ([-1], [1], "items must be whole numbers from 0"),
        ([1.7], [1], "items must be whole numbers from 0"),
        ([10**6], [1], "items must be whole numbers from 0"),
        ([1, 2, 3], [1], "1 labels of 3 items"),
        ([1], [5], "1 labels of 1 items; give each item one, 0 or 1"),
        ([1, 2], [1, np.nan], "give each item one, 0 or 1"),
    ],
)
def test_a_code_of_ratings_that_make_no_sense_is_refused(codes, items, labels, said):
    with pytest.raises(ValueError, match=said):
        bs.code_of_ratings(codes, items, labels, np.zeros(codes.bits))


def test_one_text_is_no_list_of_likes(made):
    with pytest.raises(ValueError, match="likes and dislikes are lists of items, not one text"):
        made.recommend(likes="12")
    with pytest.raises(ValueError, match=r"n is 2\.5"):
        made.recommend(user=0, n=2.5)


def test_codes_before_a_row_know_nothing_of_it_or_later(toy, codes):
    rows = toy.test.head(30)
    found, known = bs.codes_before(toy, codes, rows)
    later = replace(toy, test=toy.test.assign(label=1 - toy.test.label))  # other likes in the test months
    first = known == [(toy.train.user == u).sum() + (toy.valid.user == u).sum() for u in rows.user]
    assert first.any() and np.array_equal(bs.codes_before(later, codes, rows)[0][first], found[first])
    for place, row in enumerate(rows.itertuples()):
        past = toy.log[(toy.log.user == row.user) & (toy.log.timestamp < row.timestamp)].sort_values("timestamp")
        wanted = bs.code_of_ratings(codes, past.item, past.label, bs.average_code(toy, codes))
        assert known[place] == len(past) and np.array_equal(found[place], wanted)
    assert len(np.unique(found, axis=0)) > 10


def test_counting_so_far_is_counting_with_the_likes_so_far(toy):
    rows = toy.test.head(40)
    found = bs.counting_before(toy, rows)
    rates, mean = bu.smoothed_rates(toy.train, "item"), toy.train.label.mean()
    for score, row in zip(found, rows.itertuples()):
        past = toy.log[(toy.log.user == row.user) & (toy.log.timestamp < row.timestamp)].label
        assert np.isclose(score, rates.get(row.item, mean) + (past.sum() + 5 * mean) / (len(past) + 5))


def test_who_came_after_training_has_a_code_of_all_they_rated(toy, codes):
    late = replace(toy, train=toy.train[toy.train.user != 3])
    made = bs.Recommender(late, codes)
    past = late.log[late.log.user == 3].sort_values("timestamp", kind="stable").drop_duplicates("item", keep="last")
    assert np.array_equal(made.taste(3)[0], bs.code_of_ratings(codes, past.item, past.label, made.average))
    assert np.array_equal(made.taste(4)[0], codes.users[4])


# --------------------------------------------------------------------------------------------------- recommendations
def test_the_nearest_that_are_new_come_first(made, toy, codes):
    found = made.recommend(user=3, n=8)
    known = set(toy.log.item[toy.log.user == 3])
    similarity = bu.hamming_similarity(codes.users[3], codes.items)
    count = np.bincount(toy.log.item, minlength=30)
    wanted = sorted(set(range(30)) - known, key=lambda item: (-similarity[item], -count[item], item))[:8]
    assert [(-similarity[i], -count[i]) for i in found.item] == [(-similarity[i], -count[i]) for i in wanted]
    assert not known & set(found.item) and np.allclose(found.similarity, similarity[found.item])
    assert found.title.tolist() == [toy.titles[i] for i in found.item] and found.p.isna().all()


def test_new_likes_change_the_answer_at_once_and_are_not_recommended(made, toy):
    new = [toy.titles[i] for i in set(range(30)) - set(toy.log.item[toy.log.user == 3])][:2]
    found = made.recommend(user=3, likes=new)
    assert not set(new) & set(found.title)
    code, liked, known = made.taste(3, new)
    past = toy.log[toy.log.user == 3].sort_values("timestamp", kind="stable").drop_duplicates("item", keep="last")
    assert sorted(known) == sorted([*past.item, *map(made.items.find, new)])
    assert [toy.titles[i] for i in liked[-2:]] == new and len(liked) == past.label.sum() + 2
    assert not np.array_equal(made.taste(None, new)[0], made.taste(None, (), new)[0])


def test_the_llm_is_asked_what_build_prompts_would_ask(toy, codes, llm):
    """Where nobody rated a film twice: `build_prompts` shows a like also when it was taken back."""
    rows = pd.concat({split: getattr(toy, split) for split in bu.SPLITS}).drop_duplicates(["user", "item"])
    toy = replace(toy, **{split: rows.loc[split] for split in bu.SPLITS})
    model = get_peft_model(llm[0], LoraConfig(**bu.LORA["all"] | {"init_lora_weights": False})).eval()
    made = bs.Recommender(toy, codes, model, llm[1], fmt="dotted")
    found = made.recommend(user=3, n=5, candidates=6)
    rows = pd.DataFrame({"user": 3, "item": found.item, "timestamp": toy.log.timestamp.max() + 10**6})
    prompts = bu.build_prompts(toy, rows, codes, fmt="dotted")
    p = bu.score(model, llm[1], prompts, progress=False)
    logits = [np.log(each / (1 - each)) for each in (found.p, p)]  # two layers may be very sure of No
    assert np.abs(logits[0] - logits[1]).max() < 1e-4 and (np.diff(found.p) <= 0).all() and np.ptp(logits[1]) > 1e-3
    nearest = bs.Recommender(toy, codes).recommend(user=3, n=6)
    assert set(found.item) < set(nearest.item)
    again = made.score(found.title.tolist()[::-1], user=3)
    assert np.allclose(again.p[::-1], found.p, atol=1e-6) and again.item.tolist() == found.item.tolist()[::-1]


def test_reasons_are_true(toy, codes):
    tags = [("Odd" if i % 2 else "Even", "All") for i in range(30)]
    items = codes.items.copy()
    items[:, 5] = np.arange(30) % 2  # this bit says which
    made = bs.Recommender(make_dataset(tags=tags), bu.Codes(codes.users, items))
    assert bs.bit_meanings(made.dataset, made.codes, least=10)[5] == ("Even", "Odd")
    code, liked, _ = made.taste(3)
    said = made.because(code, liked, 7)
    assert f"{(code == items[7]).sum()} of 32 bits agree" in said
    near = bu.hamming_similarity(items[7], items[liked])
    assert f"of the likes: {toy.titles[liked[near.argmax()]]} ({near.max():.2f})" in said
    assert bs.bit_meanings(toy, codes) == [(None, None)] * 32


def named(toy, codes):
    """A recommender for data whose ids are texts, users' like numbers that begin with 1."""
    return bs.Recommender(toy, codes, users=[str(i + 1) for i in range(20)], items=[f"B{i}" for i in range(30)])


def test_ids_are_those_of_the_file_in_both_directions(toy, codes):
    made = named(toy, codes)
    assert made.users.find(7) == made.users.find("7") == 6
    assert made.items.find("film 3 (1953) ") == made.items.find("B3") == 3
    found = made.recommend(user=7)
    assert found.item.tolist() == [f"B{i}" for i in bs.Recommender(toy, codes).recommend(user=6).item]
    again = made.score(found.item.tolist(), user="7")
    assert again.title.tolist() == found.title.tolist() and again.item.tolist() == found.item.tolist()


def test_what_may_be_two_is_asked_back(codes):
    titles = ["B7", "Same", "same", *(f"Film {i}" for i in range(3, 30))]
    made = bs.Recommender(make_dataset(titles=titles), codes, items=[*"aAb", *(f"B{i}" for i in range(3, 30))])
    assert made.items.find("a") == 0 and made.items.find("A") == 1  # ids differ by their case
    for what, said in (("B7", "'B7' may be 2 items: those with the ids 'a', 'B7'"), ("SAME", "with the ids 'A', 'b'")):
        with pytest.raises(ValueError, match=said):
            made.items.find(what)


def test_whom_and_what_nobody_knows_is_said(toy, codes):
    made, plain = named(toy, codes), bs.Recommender(toy, codes)
    for call, said in (
        (lambda: made.items.find("Film 3"), r"no item 'Film 3'; near it: Film 3 \(1953\)"),
        (lambda: made.items.find("Flim 3 (1953)"), r"near it: .*Film 3 \(1953\)"),
        (lambda: plain.items.find(-1), "no item '-1'; they go from 0 to 29"),
        (lambda: plain.items.find(30), "no item '30'"),
        (lambda: plain.items.find(True), "no item 'True'"),
        (lambda: made.items.find(None), "no item 'None'"),
        (lambda: made.items.find([1]), "no item"),
        (lambda: made.items.find("zzz"), "ids are like 'B0'"),
        (lambda: made.users.find("0"), "no user '0'; ids are like '1'"),
        (lambda: made.users.find(21), "no user '21'"),
        (lambda: plain.users.find(-1), "no user '-1'"),
        (lambda: plain.users.find("3"), "they go from 0 to 19"),
        (lambda: made.recommend(), "name a user, or items"),
        (lambda: made.recommend(user=3, n=-5), "n is -5; ask for one item"),
        (lambda: made.recommend(likes=["B3"], dislikes=["Film 3 (1953)"]), "among both likes and dislikes"),
        (lambda: made.score([], user=3), "name the items"),
        (lambda: bs.Recommender(toy, bu.Codes(codes.users[:5], codes.items)), "codes of 5 users"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_who_changes_their_mind_is_taken_at_the_last_word(made, toy):
    past = toy.log[toy.log.user == 3].sort_values("timestamp")
    liked = past.item[past.label == 1].tolist()
    code, still, known = made.taste(3, (), liked)
    assert not set(still) & set(liked) and set(known) == set(past.item)
    kept, liked = past[~past.item.isin(liked)], list(dict.fromkeys(liked))
    wanted = bs.code_of_ratings(made.codes, [*kept.item, *liked], [*kept.label, *[0] * len(liked)], made.average)
    assert np.array_equal(code, wanted)


def test_of_equally_near_items_those_rated_most_are_candidates(toy, codes):
    same = bu.Codes(codes.users, np.tile(codes.items[:3], (10, 1)))  # ten items share each code
    made = bs.Recommender(toy, same)
    known = np.array([0, 3])
    for k in (1, 4, 15, 40):
        found = made.nearest(codes.users[0], known, k)
        distance = (same.items != codes.users[0]).sum(1)
        wanted = sorted(set(range(30)) - {0, 3}, key=lambda i: (distance[i], -made.count[i], i))[:k]
        assert found.tolist() == wanted


def test_times_in_any_unit_and_no_user_missing(toy, codes):
    parts = {split: getattr(toy, split).assign(timestamp=lambda r: r.timestamp + 10**9) for split in bu.SPLITS}
    toy = replace(toy, **parts)
    rows = toy.test.head(30)
    wanted, known = bs.codes_before(toy, codes, rows)
    for times in (rows.timestamp * 1000, pd.to_datetime(rows.timestamp, unit="s")):
        found, same = bs.codes_before(toy, codes, rows.assign(timestamp=times))
        assert np.array_equal(found, wanted) and np.array_equal(same, known)
    with pytest.raises(ValueError, match="some missing"):
        bs.codes_before(toy, codes, rows.assign(user=rows.user.astype("Int64").where(rows.index > 3)))


def test_somebody_who_knows_all_items_is_told_of_none(made, toy):
    assert made.recommend(likes=toy.titles).empty


# ----------------------------------------------------------------------------------------------------------- service
def running(recommender, token=None):
    """(address, function that ends it) of a service in a thread of its own."""
    loop, port, started = asyncio.new_event_loop(), [], threading.Event()
    ready = lambda number: (port.append(number), started.set())  # noqa: E731
    task = loop.create_task(bs.serve(recommender, 0, token=token, ready=ready))

    def run():
        asyncio.set_event_loop(loop)
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(20)

    def end():
        loop.call_soon_threadsafe(task.cancel)
        thread.join(20)
        assert not thread.is_alive()

    return f"http://127.0.0.1:{port[0]}", end


@pytest.fixture
def service(made):
    address, end = running(made)
    yield address
    end()


def ask(address, path="/recommend", body=None, **headers):
    """(status, JSON) of a request; body None gets, another posts it as JSON, or as it is if it is bytes."""
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
    request = urllib.request.Request(address + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        said = error.read()
        return error.code, json.loads(said) if said else None


def test_the_service_says_what_the_recommender_says(service, made):
    assert ask(service, "/health") == (
        200,
        {"status": "ok", "bits": 32, "llm": None, "waiting": 0, "users": 20, "items": 30},
    )
    status, found = ask(service, body={"user": 3, "n": 4})
    assert status == 200 and [line["item"] for line in found["items"]] == made.recommend(user=3, n=4).item.tolist()
    assert found["items"][0]["p"] is None and "bits agree" in found["items"][0]["because"]
    status, found = ask(service, "/score", {"items": [2, "Film 5 (1955)"], "likes": [1]})
    wanted = made.score([2, 5], likes=[1])
    assert status == 200 and [line["similarity"] for line in found["items"]] == wanted.similarity.tolist()


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "must be a JSON object"),
        (b"{", 400, "must be a JSON object"),
        (b"[1]", 400, "must be a JSON object"),
        (b"[" * 60_000, 400, "must be a JSON object"),
        (b'{"user": 3, "n": ' + b"9" * 4000 + b"}", 400, "n: 99999999999999999999; 1 to 100"),
        (b"\xff\xfe", 400, "must be a JSON object"),
        ({}, 400, "name a user, or items"),
        ({"user": 3.5}, 400, "user must be an id"),
        ({"user": True}, 400, "user must be an id"),
        ({"user": 10**30}, 400, "there is no user"),
        ({"user": "3"}, 400, "there is no user '3'"),
        ({"user": 3, "n": 0}, 400, "n: 0; 1 to 100"),
        ({"user": 3, "n": 101}, 400, "n: 101"),
        ({"user": 3, "likes": "Film 1 (1951)"}, 400, "likes must be a list"),
        ({"likes": [1] * 201}, 400, "likes: 201"),
        ({"likes": [{"a": 1}]}, 400, "there is no item"),
        ({"likes": [float("nan")]}, 400, "there is no item"),
        ({"likes": ["\ud800"]}, 400, "there is no item"),
        ({"user": 3, "model": "x"}, 400, "no field 'model'; there are user, likes"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(service, body, status, said):
    found = ask(service, body=body)
    assert found[0] == status and said in found[1]["error"] and "Traceback" not in str(found)
    assert ask(service, "/health")[0] == 200


def test_other_paths_methods_kinds_and_hosts(service):
    assert ask(service, "/")[0] == ask(service, "/../etc/passwd")[0] == 404
    assert ask(service, "/recommend")[0] == 405 and ask(service, "/health", {})[0] == 405
    status, said = ask(service, body={"user": 3}, Content_Type="text/plain")  # what a page of another site could send
    assert status == 400 and "Content-Type" in said["error"]
    assert ask(service, body={"user": 3}, Host="evil.example")[0] == 403  # a name that somebody points at this machine
    assert ask(service, "/health", Host="localhost:1")[0] == 200
    try:
        status, _ = ask(service, body=b" " * 70_000)
        assert status in (400, 413)
    except OSError:  # the connection is closed before all is sent
        pass
    assert ask(service, "/health")[0] == 200


def test_a_token_is_asked_for_where_others_could_ask(made):
    for address in ("0.0.0.0", "::", "192.168.0.7", "example.org"):
        with pytest.raises(ValueError, match="give a token"):
            asyncio.run(bs.serve(made, 0, address))
    address, end = running(made, token="very secret")
    try:
        for given in ({}, {"Authorization": "very secret"}, {"Authorization": "Bearer very secre"}):
            assert ask(address, "/health", **given)[0] == ask(address, body={"user": 3}, **given)[0] == 401
        assert ask(address, body={"user": 3}, Authorization="Bearer very secret", Host="films.example")[0] == 200
    finally:
        end()


def test_the_llms_answers_come_over_http(toy, codes, llm):
    made = bs.Recommender(toy, codes, *llm)
    address, end = running(made)
    try:
        found = ask(address, body={"user": 3, "n": 3})[1]["items"]
    finally:
        end()
    assert np.allclose([line["p"] for line in found], made.recommend(user=3, n=3).p, atol=1e-6)


def test_a_service_that_ended_answers_nobody(made):
    address, end = running(made)
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    connection.request("GET", "/health")
    assert connection.getresponse().read()
    end()
    with pytest.raises(OSError):
        connection.auto_open = False
        connection.request("GET", "/health")
        connection.getresponse().read() or (_ for _ in ()).throw(ConnectionResetError)


@pytest.mark.parametrize("port", [-1, 70_000])
def test_a_port_that_cannot_be(made, port):
    with pytest.raises(ValueError, match="ports go to 65535"):
        asyncio.run(bs.serve(made, port))


def test_a_taken_port_is_an_error(made, service):
    with pytest.raises(OSError, match="in use"):
        asyncio.run(bs.serve(made, int(service.rsplit(":", 1)[1])))


def test_twenty_at_once_get_their_own_answers(service, made):
    wanted = {user: made.recommend(user=user, n=5).item.tolist() for user in range(20)}
    with ThreadPoolExecutor(20) as askers:
        found = list(askers.map(lambda turn: ask(service, body={"user": turn % 20, "n": 5}), range(200)))
    assert all(status == 200 for status, _ in found)
    assert all([line["item"] for line in said["items"]] == wanted[turn % 20] for turn, (_, said) in enumerate(found))


def test_too_many_are_sent_away_and_the_rest_are_answered(made, monkeypatch):
    monkeypatch.setitem(bs.MOST, "waiting", 3)
    slow, real = threading.Event(), made.recommend
    monkeypatch.setattr(made, "recommend", lambda **given: (slow.wait(20), real(**given))[1])
    address, end = running(made)
    try:
        with ThreadPoolExecutor(8) as askers:
            found = [askers.submit(ask, address, body={"user": 3}) for _ in range(8)]
            for _ in range(200):
                if sum(one.done() for one in found) == 5:
                    break
                time.sleep(0.05)
            assert ask(address, "/health")[1]["waiting"] == 3  # the loop is free while the one thread works
            slow.set()
            statuses = sorted(one.result()[0] for one in found)
        assert statuses == [200] * 3 + [503] * 5
        assert all(one.result()[1]["error"].startswith("too many") for one in found if one.result()[0] == 503)
        assert ask(address, body={"user": 3})[0] == 200
    finally:
        end()


def test_the_latest_rating_of_a_film_is_the_one_that_counts(toy, codes):
    """Liked once and disliked later: no longer among the likes, in whichever split the later rating stands."""
    item, user = toy.train.item.iloc[0], toy.train.user.iloc[0]
    when = toy.log.timestamp.max()
    again = pd.DataFrame({"user": user, "item": item, "label": [1, 0], "timestamp": [when + 1, when + 2]})
    changed = replace(toy, test=pd.concat([toy.test, again], ignore_index=True))
    _, liked, known = bs.Recommender(changed, codes).taste(user)
    assert item not in liked and (known == item).sum() == 1
    back = replace(changed, test=pd.concat([toy.test, again.assign(label=[0, 1])], ignore_index=True))
    assert item in bs.Recommender(back, codes).taste(user)[1]
