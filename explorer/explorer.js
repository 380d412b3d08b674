// The bit explorer: two codes, bit under bit, to be flipped; what follows from them is shown at once.
//
// One module without dependencies, for a page (scripts/explorer.py) and for a notebook (binllm_widgets.py, anywidget).
// mount(root, data, state, changed) draws into `root`; `data` is what binllm_widgets.explorer_data makes:
//   bits, threshold; users, films: codes, packed, base64; filmIds, titles, counts, tags: tag names, filmTags: their places.
// state: {user, film, flips: {user: [bits], film: [bits]}, selected}; changed(state) is called after each change by hand.

const NEAREST = 8;

function unpack(text, bits) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const width = bits / 8;
  const codes = [];
  for (let at = 0; at < bytes.length; at += width) codes.push(bytes.subarray(at, at + width));
  return codes;
}

const bitOf = (code, place) => (code[place >> 3] >> (7 - (place & 7))) & 1;

function flipped(code, places) {
  const copy = Uint8Array.from(code);
  for (const place of places) copy[place >> 3] ^= 128 >> (place & 7);
  return copy;
}

const ONES = Uint8Array.from({ length: 256 }, (_, byte) => byte.toString(2).replaceAll("0", "").length);

function agreeing(a, b, bits) {
  let different = 0;
  for (let i = 0; i < a.length; i++) different += ONES[a[i] ^ b[i]];
  return bits - different;
}

const dotted = (code) => Array.from(code);

// An element with properties, attributes (names with a dash, role) and children; texts stay texts, whatever they hold.
function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

export function mount(root, data, state, changed = () => {}) {
  const bits = data.bits;
  const users = unpack(data.users, bits);
  const films = unpack(data.films, bits);
  const place = new Map(data.filmIds.map((id, at) => [id, at]));
  const byTitle = new Map(data.titles.map((title, at) => [title.toLowerCase(), at]));
  const id = `bx${Math.random().toString(36).slice(2, 8)}`;
  const history = [];
  let walking = null;

  // ------------------------------------------------------------------------------------------------- what is drawn once
  const status = el("p", { className: "bx-status", role: "status" });
  const userBox = el("input", { id: `${id}u`, type: "number", min: 0, max: users.length - 1, step: 1 });
  const filmBox = el("input", { id: `${id}f`, type: "search", autocomplete: "off", spellcheck: false });
  const list = el("ul", { id: `${id}l`, role: "listbox", "aria-label": "films found", hidden: true });
  for (const [name, value] of [["role", "combobox"], ["aria-controls", `${id}l`], ["aria-expanded", "false"]])
    filmBox.setAttribute(name, value);
  const button = (label, act) => el("button", { type: "button", textContent: label, onclick: act });
  const undo = button("undo", () => {
    stop();
    if (history.length) show(history.pop(), "undone");
  });
  const reset = button("reset", () => change({ flips: { user: [], film: [] } }, "as learned"));
  const fewest = button("fewest flips to change the verdict", () => walk());
  const grid = el("div", { className: "bx-grid", role: "grid", "aria-label": "codes, bit under bit" });
  const cells = { user: [], film: [] };
  const signs = [];
  const numbers = { user: [], film: [] };
  const octets = Array.from({ length: bits / 8 }, () => el("div", { className: "bx-octet", role: "rowgroup" }));
  octets.forEach((octet, o) => {
    for (const side of ["user", "film", "same"]) {
      const row = el("div", { className: `bx-row bx-${side}`, role: "row" });
      for (let bit = 8 * o; bit < 8 * o + 8; bit++) {
        const cell =
          side === "same"
            ? el("span", { className: "bx-sign", role: "gridcell" })
            : el("button", { type: "button", className: "bx-bit", role: "gridcell", tabIndex: -1 });
        if (side === "same") signs.push(cell);
        else {
          cells[side].push(cell);
          cell.onclick = () => flip(side, bit);
          cell.onfocus = cell.onmouseenter = () => explain(bit);
          cell.onkeydown = (event) => keys(event, side, bit);
        }
        row.append(cell);
      }
      octet.append(row);
    }
    for (const side of ["user", "film"]) numbers[side].push(el("span"));
    octet.append(el("div", { className: "bx-number" }, numbers.user[o], " · ", numbers.film[o]));
  });
  grid.append(...octets);
  const verdict = el("p", { className: "bx-verdict" });
  const facts = el("dl", { className: "bx-facts" });
  const about = el("section", { className: "bx-about", "aria-label": "about a bit" });
  const nearFilms = el("ol", { className: "bx-list" });
  const nearUsers = el("ol", { className: "bx-list" });
  const lists = el(
    "div",
    { className: "bx-lists" },
    el("section", {}, el("h3", { textContent: "films nearest to the user" }), nearFilms),
    el("section", {}, el("h3", { textContent: "users nearest to the user" }), nearUsers),
  );
  const legend = el("p", { className: "bx-legend" });
  legend.textContent =
    "Upper row: the user; lower row: the film; ● agree, ◇ differ; below, eight bits as a number, user · film. " +
    "Click a bit to flip it, or go with the arrow keys and flip with space; a flipped bit is dashed.";
  root.replaceChildren(
    el(
      "div",
      { className: "bx" },
      el(
        "div",
        { className: "bx-controls" },
        el("label", { for: `${id}u`, textContent: "user" }),
        userBox,
        el("label", { for: `${id}f`, textContent: "film" }),
        el("div", { className: "bx-search" }, filmBox, list),
        undo,
        reset,
        fewest,
      ),
      status,
      verdict,
      grid,
      legend,
      el("div", { className: "bx-lists" }, facts, about),
      lists,
    ),
  );

  // ------------------------------------------------------------------------------------------------------------- changes
  function say(message) {
    status.textContent = message;
  }

  function keep() {
    history.push(structuredClone(state));
    if (history.length > 500) history.shift();
  }

  function change(part, message = "") {
    stop();
    keep();
    show({ ...state, ...part }, message);
  }

  function show(next, message = "") {
    state = next;
    draw();
    say(message);
    changed(structuredClone(state));
  }

  function toggled(side, bit) {
    const now = state.flips[side];
    const next = now.includes(bit) ? now.filter((other) => other !== bit) : [...now, bit].sort((a, b) => a - b);
    return { ...state.flips, [side]: next };
  }

  function flip(side, bit) {
    change({ flips: toggled(side, bit), selected: bit });
    cells[side][bit].focus();
  }

  function keys(event, side, bit) {
    const to = { ArrowLeft: bit - 1, ArrowRight: bit + 1, Home: 0, End: bits - 1, ArrowUp: bit, ArrowDown: bit }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const other = { ArrowUp: "user", ArrowDown: "film" }[event.key] ?? side;
    cells[other][Math.min(bits - 1, Math.max(0, to))].focus();
  }

  function stop() {
    clearTimeout(walking);
    walking = null;
  }

  // Flip the user's bits, one after the other, until the verdict is another one.
  function walk() {
    stop();
    const { user, film } = now();
    const wanted = agreeing(user, film, bits) < data.threshold;
    const steps = [];
    for (let bit = 0; bit < bits; bit++) if ((bitOf(user, bit) !== bitOf(film, bit)) === wanted) steps.push(bit);
    const needed = wanted ? data.threshold - agreeing(user, film, bits) : agreeing(user, film, bits) - data.threshold + 1;
    if (needed > steps.length) return say("no flips change the verdict: it is the same from 0 bits to all");
    let done = 0;
    keep();
    const step = () => {
      show({ ...state, flips: toggled("user", steps[done]), selected: steps[done] });
      done += 1;
      say(`flip ${done} of the ${needed} that change the verdict`);
      walking = done < needed ? setTimeout(step, 350) : null;
    };
    step();
  }

  userBox.onchange = () => {
    const user = Number(userBox.value);
    if (userBox.value !== "" && Number.isInteger(user) && user >= 0 && user < users.length)
      change({ user, flips: { ...state.flips, user: [] } });
    else {
      say(`there is no user ${userBox.value || "without a number"}; users go from 0 to ${users.length - 1}`);
      userBox.value = state.user;
    }
  };

  function choose(at) {
    close();
    change({ film: data.filmIds[at], flips: { ...state.flips, film: [] } });
  }

  function close() {
    list.hidden = true;
    filmBox.setAttribute("aria-expanded", "false");
    filmBox.removeAttribute("aria-activedescendant");
  }

  function found() {
    const words = filmBox.value.toLowerCase().trim();
    if (!words) return [];
    const hits = data.titles.map((title, at) => at).filter((at) => data.titles[at].toLowerCase().includes(words));
    const starts = (at) => (data.titles[at].toLowerCase().startsWith(words) ? 0 : 1);
    return hits.sort((a, b) => starts(a) - starts(b) || data.counts[b] - data.counts[a]).slice(0, 12);
  }

  filmBox.oninput = () => {
    const hits = found();
    list.replaceChildren(
      ...hits.map((at, row) => {
        const item = el("li", { id: `${id}o${row}`, role: "option", textContent: data.titles[at] });
        item.onpointerdown = (event) => {
          event.preventDefault();
          choose(at);
        };
        return item;
      }),
    );
    list.hidden = !hits.length;
    filmBox.setAttribute("aria-expanded", String(!list.hidden));
    say(filmBox.value.trim() && !hits.length ? `no film is called “${filmBox.value.trim().slice(0, 60)}”` : "");
  };

  filmBox.onkeydown = (event) => {
    const items = [...list.children];
    const active = items.findIndex((item) => item.classList.contains("bx-active"));
    if (event.key === "Escape") {
      close();
      filmBox.value = title(state.film);
    } else if (event.key === "Enter") {
      const hits = found();
      const exact = byTitle.get(filmBox.value.toLowerCase().trim());
      const at = active >= 0 ? hits[active] : (exact ?? hits[0]);
      if (at !== undefined) choose(at);
      else say(filmBox.value.trim() ? `no film is called “${filmBox.value.trim().slice(0, 60)}”` : "type a part of a title");
    } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && items.length) {
      event.preventDefault();
      const next = (active + (event.key === "ArrowDown" ? 1 : items.length - 1) + (active < 0 && event.key === "ArrowUp" ? 1 : 0)) % items.length;
      items.forEach((item, row) => item.classList.toggle("bx-active", row === next));
      filmBox.setAttribute("aria-activedescendant", items[next].id);
    }
  };
  filmBox.onfocus = () => filmBox.select();
  filmBox.onblur = () => {
    close();
    filmBox.value = title(state.film);
  };

  // -------------------------------------------------------------------------------------------------------------- drawing
  const title = (film) => data.titles[place.get(film)];
  const now = () => ({
    user: flipped(users[state.user], state.flips.user),
    film: flipped(films[place.get(state.film)], state.flips.film),
  });

  function draw() {
    const codes = now();
    const agree = agreeing(codes.user, codes.film, bits);
    for (let bit = 0; bit < bits; bit++) {
      const same = bitOf(codes.user, bit) === bitOf(codes.film, bit);
      for (const side of ["user", "film"]) {
        const cell = cells[side][bit];
        const value = String(bitOf(codes[side], bit));
        if (cell.textContent !== value) cell.textContent = value;
        cell.className = `bx-bit ${same ? "bx-agree" : "bx-differ"}${state.flips[side].includes(bit) ? " bx-flipped" : ""}`;
        cell.tabIndex = side === "user" && bit === Math.max(0, state.selected) ? 0 : -1;
        cell.setAttribute("aria-label", `bit ${bit} of the ${side}: ${value}, ${same ? "agrees" : "differs"}`);
      }
      signs[bit].textContent = same ? "●" : "◇";
      signs[bit].className = `bx-sign ${same ? "bx-agree" : "bx-differ"}`;
    }
    const learned = { user: users[state.user], film: films[place.get(state.film)] };
    for (const side of ["user", "film"])
      dotted(codes[side]).forEach((number, o) => {
        numbers[side][o].textContent = number;
        numbers[side][o].className = number === learned[side][o] ? "" : "bx-changed";
      });
    const scores = films.map((code) => agreeing(codes.user, code, bits));
    const below = scores.filter((score) => score < agree).length;
    verdict.textContent =
      `${agree} of ${bits} bits agree, Hamming similarity ${(agree / bits).toFixed(3)}: ` +
      `${agree >= data.threshold ? "would like it" : "would not like it"} (from ${data.threshold} bits on, most ratings are likes)`;
    verdict.className = `bx-verdict ${agree >= data.threshold ? "bx-yes" : "bx-no"}`;
    const address = { user: dotted(codes.user).join("."), film: dotted(codes.film).join(".") };
    const rows = [
      ["fits better than", `${Math.round((100 * below) / films.length)} % of the ${films.length.toLocaleString("en")} films here`],
      ["user, dotted", address.user],
      ["film, dotted", address.film],
      ["tokens of both", `${2 * bits} as bits, ${address.user.length + address.film.length} dotted: a digit or dot each`],
    ];
    facts.replaceChildren(...rows.flatMap(([name, value]) => [el("dt", { textContent: name }), el("dd", { textContent: value })]));
    const order = (scores, count) =>
      scores.map((_, at) => at).sort((a, b) => scores[b] - scores[a] || data.counts[b] - data.counts[a] || a - b).slice(0, count);
    neighbours(nearFilms, order(scores, NEAREST), (at) => data.titles[at], (at) => scores[at], choose, place.get(state.film));
    const others = users.map((code) => agreeing(codes.user, code, bits));
    const nearest = others.map((_, at) => at).filter((at) => at !== state.user).sort((a, b) => others[b] - others[a] || a - b);
    const go = (user) => change({ user, flips: { ...state.flips, user: [] } });
    neighbours(nearUsers, nearest.slice(0, NEAREST), (at) => `user ${at}`, (at) => others[at], go, -1);
    if (root.getRootNode().activeElement !== userBox) userBox.value = state.user;
    if (root.getRootNode().activeElement !== filmBox) filmBox.value = title(state.film);
    undo.disabled = !history.length;
    reset.disabled = !state.flips.user.length && !state.flips.film.length;
    explain(state.selected);
  }

  // Rows keep their element while they stay in the list, and slide to their new place.
  function neighbours(parent, order, name, score, go, current) {
    const before = new Map([...parent.children].map((row) => [row.dataset.at, row]));
    const tops = new Map([...before].map(([at, row]) => [at, row.offsetTop]));
    const rows = order.map((at) => {
      let row = before.get(String(at));
      if (!row) {
        row = el("li", {}, el("button", { type: "button" }, el("span"), el("b")));
        row.dataset.at = at;
      }
      const link = row.firstChild;
      link.firstChild.textContent = name(at);
      link.lastChild.textContent = `${score(at)}/${bits}`;
      link.style.setProperty("--share", `${(100 * score(at)) / bits}%`);
      link.onclick = () => go(at);
      row.classList.toggle("bx-current", at === current);
      return row;
    });
    parent.replaceChildren(...rows);
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    for (const row of rows) {
      const moved = (tops.get(row.dataset.at) ?? row.offsetTop) - row.offsetTop;
      if (moved) row.animate([{ transform: `translateY(${moved}px)` }, { transform: "none" }], { duration: 200, easing: "ease-out" });
    }
  }

  const explained = new Map();

  // Share of ones, the tags that go along with a bit most, and the best-known films of either side.
  function facts_of(bit) {
    if (explained.has(bit)) return explained.get(bit);
    const on = films.map((code) => bitOf(code, bit));
    const ones = on.reduce((a, b) => a + b, 0);
    const difference = data.tags.map((tag, t) => {
      const having = data.filmTags.map((mine) => mine.includes(t));
      const count = having.filter(Boolean).length;
      const inside = having.filter((has, at) => has && on[at]).length;
      return { tag, count, gap: count ? inside / count - ones / films.length : 0 };
    });
    const usual = difference.filter((entry) => entry.count >= Math.max(3, films.length / 100) && Math.abs(entry.gap) >= 0.01);
    const famous = (value) => on.map((_, at) => at).filter((at) => on[at] === value).sort((a, b) => data.counts[b] - data.counts[a]);
    const made = {
      users: users.filter((code) => bitOf(code, bit)).length / users.length,
      films: ones / films.length,
      tags: usual.sort((a, b) => Math.abs(b.gap) - Math.abs(a.gap)).slice(0, 3),
      one: famous(1).slice(0, 5),
      zero: famous(0).slice(0, 5),
    };
    explained.set(bit, made);
    return made;
  }

  function explain(bit) {
    if (!(bit >= 0)) {
      about.replaceChildren(el("h3", { textContent: "a bit" }), el("p", { textContent: "Point at a bit to see what goes along with it." }));
      return;
    }
    const known = facts_of(bit);
    const percent = (share) => `${Math.round(100 * share)} %`;
    const along = known.tags
      .map((entry) => `${entry.tag} (${Math.round(100 * Math.abs(entry.gap))} points ${entry.gap > 0 ? "more" : "less"} often)`)
      .join(", ");
    const titles = (some) => some.map((at) => data.titles[at]).join("; ") || "none";
    about.replaceChildren(
      el("h3", { textContent: `bit ${bit}` }),
      el("p", { textContent: `1 for ${percent(known.users)} of the users and ${percent(known.films)} of the films` }),
      el("p", { textContent: `compared with all films, 1 for ${along || "no kind more or less often"}` }),
      el("p", { textContent: `best-known films with 1: ${titles(known.one)}` }),
      el("p", { textContent: `and with 0: ${titles(known.zero)}` }),
    );
  }

  draw();
  return {
    // Take a state from outside; what makes no sense is said and left out.
    set(wanted, message = "") {
      stop();
      const [next, wrong] = sensible(wanted, data, users.length, state);
      state = next;
      draw();
      say(wrong || message);
      return state;
    },
    say,
    stop,
  };
}

// [state that can be shown, what was wrong with `wanted`]: each part that makes no sense is taken from `usual`.
export function sensible(wanted, data, nUsers, usual) {
  const wrong = [];
  const whole = (value, low, high) => Number.isInteger(value) && value >= low && value <= high;
  const next = structuredClone(usual);
  if (whole(wanted.user, 0, nUsers - 1)) next.user = wanted.user;
  else if (wanted.user !== undefined) wrong.push(`there is no user ${wanted.user}; users go from 0 to ${nUsers - 1}`);
  if (data.filmIds.includes(wanted.film)) next.film = wanted.film;
  else if (wanted.film !== undefined) wrong.push(`there is no film ${wanted.film} here`);
  for (const side of ["user", "film"]) {
    const places = wanted.flips?.[side];
    if (places === undefined) continue;
    if (Array.isArray(places) && places.every((bit) => whole(bit, 0, data.bits - 1))) next.flips[side] = [...new Set(places)].sort((a, b) => a - b);
    else wrong.push(`there are no such bits of the ${side}; bits go from 0 to ${data.bits - 1}`);
  }
  if (whole(wanted.selected, -1, data.bits - 1)) next.selected = wanted.selected;
  else if (wanted.selected !== undefined) wrong.push(`there is no bit ${wanted.selected}`);
  return [next, wrong.join("; ")];
}

// ------------------------------------------------------------------------------------------------------------ on a page
const start = (data) => ({ user: data.user ?? 0, film: data.film ?? data.filmIds[0], flips: { user: [], film: [] }, selected: -1 });

export function page(root, data) {
  const nUsers = atob(data.users).length / (data.bits / 8);
  const read = () => {
    const asked = new URLSearchParams(location.hash.slice(1));
    const number = (name) => (asked.has(name) ? (/^-?\d{1,9}$/.test(asked.get(name)) ? Number(asked.get(name)) : NaN) : undefined);
    const places = (name) =>
      asked.has(name) ? asked.get(name).split(",").filter(Boolean).map((bit) => (/^\d{1,4}$/.test(bit) ? Number(bit) : NaN)) : undefined;
    return { user: number("user"), film: number("film"), selected: number("bit"), flips: { user: places("u"), film: places("f") } };
  };
  const write = (state) => {
    const parts = [`user=${state.user}`, `film=${state.film}`];
    if (state.flips.user.length) parts.push(`u=${state.flips.user}`);
    if (state.flips.film.length) parts.push(`f=${state.flips.film}`);
    if (state.selected >= 0) parts.push(`bit=${state.selected}`);
    window.history.replaceState(null, "", `#${parts.join("&")}`);
  };
  const [first, wrong] = sensible(read(), data, nUsers, start(data));
  const shown = mount(root, data, first, write);
  shown.say(wrong);
  addEventListener("hashchange", () => {
    const [whole, unclear] = sensible(read(), data, nUsers, start(data)); // what an address leaves out is as at the start
    shown.set(whole, unclear);
  });
  return shown;
}

// -------------------------------------------------------------------------------------------------------- in a notebook
function render({ model, el: root }) {
  const names = ["user", "film", "flips", "selected"];
  const read = () => Object.fromEntries(names.map((name) => [name, model.get(name)]));
  const data = model.get("data");
  const nUsers = atob(data.users).length / (data.bits / 8);
  const [first, wrong] = sensible(read(), data, nUsers, start(data));
  let own = false;
  const shown = mount(root, data, first, (state) => {
    own = true; // what comes back from Python is our own
    for (const name of names) model.set(name, state[name]);
    model.save_changes();
    own = false;
  });
  shown.say(wrong || model.get("message"));
  const taken = () => own || shown.set(read(), model.get("message"));
  for (const name of [...names, "message"]) model.on(`change:${name}`, taken);
  return () => {
    shown.stop();
    for (const name of [...names, "message"]) model.off(`change:${name}`, taken);
  };
}

export default { render };
