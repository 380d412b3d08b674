"""Recommending: the nearest films by Hamming search, asked about in one pass, with reasons; and the same over HTTP.

`Recommender` answers for users it knows, and for anybody who names films: that person's code is made at once.
`serve` is a small service of it, on this machine only unless a token is given. Notebook 11 shows both.
"""

import asyncio
import difflib
import hmac
import ipaddress
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import faiss
import numpy as np
import pandas as pd
import tornado.httpserver
import tornado.log
import tornado.netutil
import tornado.web

import binllm_extras as bx
import binllm_utils as bu
from binllm_data import _ids

# How sharply agreeing bits speak for a like, and how strongly a new code is held at the average one: chosen on valid.
SCALE, PENALTY = 4.0, 1.0


def code_of_ratings(codes, items, labels, average):
    """The code of somebody who liked (1) or did not like (0) `items`: uint8 [bits]; nothing is trained anew.

    The signs of the weights of a logistic regression of `labels` on the items' bits (as -1 and +1), held at `average`,
    float [bits], the mean of known users' codes (as -1 and +1): what remains where nothing is known.
    Raises ValueError for items that have no code, and for labels other than one 0 or 1 an item.
    """
    items, labels = np.asarray(items), np.asarray(labels)
    if items.size and (items.dtype.kind not in "iu" or not (items >= 0).all() or not (items < len(codes.items)).all()):
        raise ValueError(f"items must be whole numbers from 0 to {len(codes.items) - 1}, as items have codes")
    if labels.shape != items.shape or not np.isin(labels, (0, 1)).all():
        raise ValueError(f"{labels.size} labels of {items.size} items; give each item one, 0 or 1")
    signs = 2.0 * codes.items[items.astype(int)] - 1
    if not len(signs):
        return (average > 0).astype(np.uint8)
    vectors = np.c_[SCALE / codes.bits * signs, np.zeros(len(signs))]  # the last number would be an offset
    x = bx._newton(vectors, np.asarray(labels, dtype=float), np.append(average, 1.0), PENALTY)
    return (x[:-1] > 0).astype(np.uint8)


def codes_before(dataset, codes, rows):
    """(code, number of ratings) of each row's user just before the row, from what was rated until then in any split.

    uint8 [rows, bits] and int64 [rows]. Items keep their learned codes.
    """
    average = average_code(dataset, codes)
    found, known = np.empty((len(rows), codes.bits), np.uint8), np.zeros(len(rows), np.int64)
    for places, items, labels in bx.ratings_before(dataset, rows):
        known[places], found[places] = len(items), code_of_ratings(codes, items, labels, average)
    return found, known


# What ships to ask an LLM with: style of prompt, adapter.
READERS = {"titles": ("text", "all_titles"), "titles and codes": (bx.BIT_BY_BIT, "pairs")}


def prompts_before(dataset, codes, rows, style):
    """One prompt a row, with the likes and the code (`codes_before`) of its user just before it: a list of texts."""
    titles = [dataset.titles[item] for item in rows.item]
    likes = [[dataset.titles[item] for item in mine] for mine in bu.liked_before(dataset, rows)]
    now, _ = codes_before(dataset, codes, rows)
    return bu.fill(*bu.prompt_fields(style, titles, likes, now, codes.items[rows.item]))


def counting_before(dataset, rows, k=5):
    """`bu.popularity_baseline` that knows what `codes_before` knows: a user's like rate is that so far. float64 [rows].

    The yardstick for codes made at once; items keep their rates in training.
    """
    mean = dataset.train.label.mean()
    scores = bu.smoothed_rates(dataset.train, "item", k).reindex(_ids(rows, "item")).fillna(mean).to_numpy(copy=True)
    for places, _, labels in bx.ratings_before(dataset, rows):
        scores[places] += (labels.sum() + k * mean) / (len(labels) + k)
    return scores


def average_code(dataset, codes):
    """The mean code of the users that training saw, as -1 and +1: float64 [bits]."""
    return 2.0 * codes.users[np.unique(dataset.train.user)].mean(0) - 1


def bit_meanings(dataset, codes, least=20):
    """[(tag, tag)] a bit: what goes along with its 0 and with its 1 most, by the difference in the tag's share.

    Of tags that `least` items or more have; (None, None) where the data has no such tags.
    """
    tags = sorted({tag for mine in dataset.tags or () for tag in mine})
    has = np.array([[tag in mine for tag in tags] for mine in dataset.tags or ()], dtype=float)
    common = np.flatnonzero(has.sum(0) >= least) if len(tags) else []
    if not len(common):
        return [(None, None)] * codes.bits
    has, on = has[:, common], codes.items.astype(float)
    share = on.T @ has / np.maximum(on.sum(0), 1)[:, None] - (1 - on).T @ has / np.maximum((1 - on).sum(0), 1)[:, None]
    return [(tags[common[low]], tags[common[high]]) for low, high in zip(share.argmin(1), share.argmax(1))]


def _latest(items, labels):
    """Of ratings in the order of time, the last of each item."""
    _, from_end = np.unique(items[::-1], return_index=True)
    kept = np.sort(len(items) - 1 - from_end)
    return items[kept], labels[kept]


class Names:
    """Users or items by what they are called: ids as the data has them, their places where it has none, and titles."""

    def __init__(self, kind, count, ids=(), titles=()):
        self.kind, self.count, self.ids = kind, count, {str(name): place for place, name in enumerate(ids)}
        self.written, self.titles, self.known = list(ids) or range(count), {}, titles
        for place, title in enumerate(titles):
            self.titles.setdefault(title.strip().casefold(), []).append(place)

    def find(self, what):
        """The place of `what`, an int or a text; raises ValueError where there is none, or more than one."""
        whole = isinstance(what, (int, np.integer)) and not isinstance(what, bool)
        found = set(self.titles.get(what.strip().casefold(), ())) if isinstance(what, str) else set()
        if self.ids:
            found |= {self.ids[str(what)]} if (whole or isinstance(what, str)) and str(what) in self.ids else set()
        elif whole and 0 <= what < self.count:
            found = {int(what)}
        if len(found) == 1:
            return found.pop()
        shown = repr(str(what)[:80])
        if found:
            ids = ", ".join(repr(self.written[place]) for place in sorted(found)[:3])
            raise ValueError(
                f"{shown} may be {len(found)} {self.kind}s: those with the ids {ids}; give an id that is no title"
            )
        raise ValueError(f"there is no {self.kind} {shown}; {self.hint(str(what)[:100].strip().casefold())}")

    def hint(self, text):
        """Titles near `text`, or what ids are like."""
        near = [title for title in self.titles if text and text in title][:3]
        if not near and len(self.titles) < 10_000:  # it compares with each
            near = difflib.get_close_matches(text, self.titles, 3)
        if near:
            return f"near it: {', '.join(self.known[self.titles[title][0]] for title in near)}"
        return f"ids are like {self.written[0]!r}" if self.ids else f"they go from 0 to {self.count - 1}"


class Recommender:
    """The best items for somebody: retrieved by Hamming search over all, asked about by an LLM if there is one.

    model, tokenizer: an LLM with its adapter, or None to rank by similarity alone. style, fmt: how prompts are written,
    as in `bu.build_prompts`. users, items: texts by which they may be named too, one each, in the data set's order.
    Of several ratings of an item by one user the latest counts.
    Raises ValueError for codes of another data set.
    """

    def __init__(self, dataset, codes, model=None, tokenizer=None, style="text+codes", fmt="bits", users=(), items=()):
        if (len(codes.users), len(codes.items)) != (dataset.n_users, dataset.n_items):
            raise ValueError(
                f"codes of {len(codes.users)} users and {len(codes.items)} items for a data set of "
                f"{dataset.n_users} and {dataset.n_items}; make them from this data set"
            )
        self.dataset, self.codes, self.model, self.tokenizer = dataset, codes, model, tokenizer
        self.style, self.fmt, self.reading = style, fmt, threading.Lock()
        faiss.omp_set_num_threads(1)  # for one query at a time more threads only wait for each other
        self.index = faiss.IndexBinaryFlat(codes.bits)
        self.index.add(np.packbits(codes.items, axis=1))
        self.average, self.trained = average_code(dataset, codes), set(dataset.train.user)
        self.meanings = bit_meanings(dataset, codes)
        self.past = {user: _latest(items, labels) for user, (_, items, labels) in bx.histories(dataset).items()}
        self.count = np.bincount(dataset.log.item, minlength=dataset.n_items)
        self.users = Names("user", dataset.n_users, users)
        self.items = Names("item", dataset.n_items, items, dataset.titles)

    def taste(self, user=None, likes=(), dislikes=()):
        """(code uint8 [bits], items liked, items known): a known user's, with any new ratings, or a new one's.

        A new rating takes the place of older ones of its item. Raises ValueError for nobody: no user and no rating.
        """
        if isinstance(likes, str) or isinstance(dislikes, str):  # else each letter would be an item
            raise ValueError("likes and dislikes are lists of items, not one text")
        items, labels = np.empty(0, int), np.empty(0, int)
        if user is not None:
            user = self.users.find(user)
            items, labels = self.past.get(user, (items, labels))
        new = [(self.items.find(what), label) for given, label in ((dislikes, 0), (likes, 1)) for what in given]
        if user is None and not new:
            raise ValueError("name a user, or items that are liked or not liked")
        now = dict(new)
        if set(new) != set(now.items()):
            item = next(item for item, label in new if now[item] != label)
            raise ValueError(f"{self.dataset.titles[item]!r} is among both likes and dislikes")
        kept = ~np.isin(items, list(now))
        items = np.r_[items[kept], list(now)].astype(int)
        labels = np.r_[labels[kept], list(now.values())].astype(int)
        learned = user in self.trained and not new
        code = self.codes.users[user] if learned else code_of_ratings(self.codes, items, labels, self.average)
        return code, items[labels == 1], items

    def nearest(self, code, known, k):
        """The `k` items nearest to a code that are not among `known`; of equally near ones those rated most come first.

        int64 [k], or fewer where there are no more.
        """
        query = np.packbits(code)[None]
        distance, _ = self.index.search(query, min(self.dataset.n_items, k + len(set(known))))
        _, distance, found = self.index.range_search(query, int(distance[0, -1]) + 1)  # with all that tie with the last
        new = ~np.isin(found, known)
        found, distance = found[new], distance[new]
        return found[np.lexsort([found, -self.count[found], distance])][:k]

    def recommend(self, user=None, likes=(), dislikes=(), n=10, candidates=50):
        """The `n` best items that are new to somebody: DataFrame item, title, similarity, p, because; the best first.

        The `candidates` nearest codes are asked about, in one pass that reads the likes once, and ordered by P(Yes),
        p; without an LLM p is NaN. What is equal is ordered by similarity, then by how often it was rated. item: the id
        as the data has it, or the item's place. Raises ValueError as `taste` and `Names.find` do.
        """
        if n < 1 or n % 1:
            raise ValueError(f"n is {n}; ask for one item or more")
        code, liked, known = self.taste(user, likes, dislikes)
        items = self.nearest(code, known, n if self.model is None else max(n, candidates))
        table = self.table(code, liked, items)
        order = np.argsort(-table.p.fillna(0), kind="stable")[:n]
        table = table.iloc[order].reset_index(drop=True)
        table["because"] = [self.because(code, liked, item) for item in items[order]]
        return table

    def score(self, items=(), user=None, likes=(), dislikes=()):
        """What somebody would think of these items: DataFrame item, title, similarity, p, in the order given."""
        items = [self.items.find(what) for what in items]
        if not items:
            raise ValueError("name the items to be scored")
        code, liked, _ = self.taste(user, likes, dislikes)
        return self.table(code, liked, items)

    def table(self, code, liked, items):
        """What `recommend` and `score` say of items, in their order."""
        table = pd.DataFrame({"item": [self.items.written[item] for item in items]})
        table["title"] = [self.dataset.titles[item] for item in items]
        table["similarity"] = bu.hamming_similarity(code, self.codes.items[items]) if len(items) else np.nan
        table["p"] = self.ask(code, liked, items) if self.model is not None and len(items) else np.nan
        return table

    def ask(self, code, liked, items):
        """P(Yes) of `items` for somebody of that code and those likes: float64 [items], by one reading of the likes."""
        shown = [[self.dataset.titles[item] for item in liked[-10:]]] * len(items)
        titles = [self.dataset.titles[item] for item in items]
        sides = np.tile(code, (len(items), 1)), self.codes.items[items]
        prompts = bu.fill(*bu.prompt_fields(self.style, titles, shown, *sides, fmt=self.fmt))
        with self.reading:  # one at a time: a model is not made for two threads
            return bu.score(self.model, self.tokenizer, prompts, progress=False)

    def because(self, code, liked, item):
        """Why an item is near, in words: bits that agree, what they go along with, and the likes it is most like."""
        film, agree = self.codes.items[item], code == self.codes.items[item]
        words = f"{agree.sum()} of {len(code)} bits agree"
        tags = set(self.dataset.tags[item]) if self.dataset.tags else ()
        speaking = {self.meanings[bit][film[bit]]: bit for bit in reversed(np.flatnonzero(agree))}
        told = [f"bit {bit}: {tag}" for tag, bit in speaking.items() if tag in tags]
        words += f" ({', '.join(told[:2])})" * bool(told)
        if len(liked):
            near = bu.hamming_similarity(film, self.codes.items[liked])
            order = np.argsort(-near, kind="stable")[:2]
            words += "; nearest of the likes: " + ", ".join(
                f"{self.dataset.titles[liked[at]]} ({near[at]:.2f})" for at in order
            )
        return words


# ------------------------------------------------------------------------------------------------------------- service
MOST = {"n": 100, "items": 100, "likes": 200, "dislikes": 200, "bytes": 65_536, "waiting": 32}
LIST, NUMBER, ID = (list,), (int,), (int, str)  # kinds of fields
KINDS = {LIST: "a list", NUMBER: "a whole number", ID: "an id"}


def as_json(table):
    """What `recommend` or `score` found, for JSON: {"items": [a dict a line]}, None for NaN, which JSON has not."""
    return {"items": table.astype(object).where(table.notna(), None).to_dict("records")}


class _Handler(tornado.web.RequestHandler):
    """JSON in, JSON out; errors too."""

    def initialize(self, service):
        self.service = service

    def set_default_headers(self):
        self.set_header("X-Content-Type-Options", "nosniff")

    def prepare(self):
        """Refuse who has no token, and pages of other sites that a browser on this machine shows."""
        if self.service.token:
            given = self.request.headers.get("Authorization", "").encode()
            if not hmac.compare_digest(given, f"Bearer {self.service.token}".encode()):
                raise tornado.web.HTTPError(401, reason="the header Authorization must hold Bearer and the token")
        elif not _is_loopback(self.request.host_name):
            raise tornado.web.HTTPError(403, reason="ask for localhost")

    def write_error(self, status_code, **_):
        if status_code == 503:
            self.set_header("Retry-After", "1")
        self.finish({"error": self._reason})

    def fields(self, **wanted):
        """The fields of the request's JSON object, each of a kind in `wanted`; others are refused."""
        if self.request.headers.get("Content-Type", "").split(";")[0].strip() != "application/json":
            raise ValueError("the header Content-Type must be application/json")
        try:
            given = json.loads(self.request.body)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise ValueError("the body must be a JSON object")
        for name, value in given.items():
            if name not in wanted:
                raise ValueError(f"there is no field {name[:40]!r}; there are {', '.join(wanted)}")
            if type(value) not in wanted[name]:
                raise ValueError(f"{name} must be {KINDS[wanted[name]]}")
            size, most = (len(value), MOST[name]) if type(value) is list else (value, MOST.get(name, value))
            if name != "user" and (size > most or (name in ("n", "items") and size < 1)):
                raise ValueError(f"{name}: {str(size)[:20]}; 1 to {most} can be asked for")
        return given

    async def answer(self, work, **wanted):
        """Send the table that `work` makes of the fields, in the service's one thread; a ValueError is the asker's."""
        if self.service.waiting >= MOST["waiting"]:
            raise tornado.web.HTTPError(503, reason="too many are waiting; ask again later")
        self.service.waiting += 1
        try:
            asked = partial(work, **self.fields(**wanted))
            table = await asyncio.get_running_loop().run_in_executor(self.service.thread, asked)
        except ValueError as error:
            self.set_status(400)
            return self.finish({"error": str(error)})
        finally:
            self.service.waiting -= 1
        self.finish(as_json(table))


class _Health(_Handler):
    def get(self):
        recommender = self.service.recommender
        size = {"users": recommender.dataset.n_users, "items": recommender.dataset.n_items}
        llm = getattr(recommender.model, "name_or_path", None)
        self.finish(
            {"status": "ok", "bits": recommender.codes.bits, "llm": llm, "waiting": self.service.waiting} | size
        )


class _Recommend(_Handler):
    async def post(self):
        await self.answer(self.service.recommender.recommend, user=ID, likes=LIST, dislikes=LIST, n=NUMBER)


class _Score(_Handler):
    async def post(self):
        await self.answer(self.service.recommender.score, items=LIST, user=ID, likes=LIST, dislikes=LIST)


class Service:
    """What the handlers share: the recommender, one thread that works, and how many wait for it."""

    def __init__(self, recommender, token=None):
        self.recommender, self.token, self.waiting = recommender, token, 0
        self.thread = ThreadPoolExecutor(1)

    def app(self):
        """The tornado application: GET /health, POST /recommend, POST /score."""
        paths = {"/health": _Health, "/recommend": _Recommend, "/score": _Score}
        routes = [(path, handler, {"service": self}) for path, handler in paths.items()]
        other = {"default_handler_class": _Other, "default_handler_args": {"service": self}}
        other["log_function"] = _log_our_faults
        return tornado.web.Application(routes, **other)


def _log_our_faults(handler):
    """What an asker did wrong is said to the asker."""
    if handler.get_status() >= 500 and handler.get_status() != 503:
        tornado.log.access_log.error("%d %s", handler.get_status(), handler._request_summary())


class _Other(_Handler):
    def prepare(self):
        super().prepare()
        raise tornado.web.HTTPError(404, reason="there are GET /health, POST /recommend and POST /score")


def _is_loopback(host):
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_address(address, port, token):
    """Raise ValueError where others could ask without a token, or for a port that cannot be."""
    if not token and not _is_loopback(address):
        raise ValueError(f"{address} can be reached from elsewhere; give a token, or serve on 127.0.0.1")
    if token and not token.isascii():
        raise ValueError("the token holds letters that no HTTP header can carry; take ASCII ones")
    if not 0 <= port <= 65_535:
        raise ValueError(f"port is {port}; ports go to 65535")


async def serve(recommender, port=8765, address="127.0.0.1", token=None, ready=None):
    """Serve `recommender` until cancelled. ready: a function that is told the port (0 takes a free one).

    Raises ValueError when others could ask without a token, OSError when the port cannot be had.
    """
    check_address(address, port, token)
    service = Service(recommender, token)
    limits = {"max_body_size": MOST["bytes"], "max_buffer_size": 2 * MOST["bytes"], "body_timeout": 10}
    server = tornado.httpserver.HTTPServer(service.app(), idle_connection_timeout=60, **limits)
    try:
        sockets = tornado.netutil.bind_sockets(port, address)
        server.add_sockets(sockets)
        if ready:
            ready(sockets[0].getsockname()[1])
        await asyncio.Event().wait()
    finally:
        server.stop()
        await server.close_all_connections()
        service.thread.shutdown(cancel_futures=True)
