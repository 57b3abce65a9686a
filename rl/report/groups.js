// The list of groups and the reader of one. The address's hash says what is shown. So it can be sent as a link, and a
// page that reloads while its run goes on returns to the same place.
(() => {
  const records = json("records"), held = json("texts"), page = json("page");
  const el = (id) => document.getElementById(id);
  const PAGE_ROWS = 25, TAGS = ["no spread", "truncated", "abstained", "failed tool"], FIRST = { q: "", set: "", tag: "", step: "", sort: "new", at: "0", g: "", open: "", y: "" };
  const state = { ...FIRST };
  const groups = [], byKey = new Map(), bySource = new Map();
  for (const [kind, step, rank, parts, rows] of records) rows.forEach(([id, words, mean, spread, bits, num], pos) => {
    const g = { kind, step, id, words, mean, spread, num, tags: TAGS.filter((_, i) => bits & (1 << i)), record: `${kind}${step}-${rank}`, parts, pos };
    g.key = `${g.record}-${pos}`;
    groups.push(g);
    byKey.set(g.key, g);
    if (bySource.has(id)) bySource.get(id).push(g);
    else bySource.set(id, [g]);
  });

  // Side files: each is one call of cohortGroups with compressed texts.
  const waiting = new Map(), loaded = new Map();
  window.cohortGroups = async (name, packed) => {
    const call = waiting.get(name);
    waiting.delete(name);
    if (!call) return;
    try {
      const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
      call.resolve(JSON.parse(await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text()));
    } catch (error) { call.reject(error); }
  };
  function load(name) {
    if (!loaded.has(name)) {
      loaded.set(name, new Promise((resolve, reject) => {
        const script = make("script");
        waiting.set(name, { resolve, reject });
        script.onload = script.onerror = () => { script.remove(); if (waiting.has(name)) { waiting.delete(name); reject(new Error("missing")); } };
        script.src = `${encodeURIComponent(page.folder)}/${name}.js`;
        document.head.append(script);
      }));
      loaded.get(name).catch(() => loaded.delete(name));
      if (loaded.size > 12) loaded.delete(loaded.keys().next().value);
    }
    return loaded.get(name);
  }
  function fileOf(g) {
    let pos = g.pos;
    for (let part = 0; part < g.parts.length; part++) {
      if (pos < g.parts[part]) return [`groups-${g.record}-${part}`, pos];
      pos -= g.parts[part];
    }
    return null;
  }
  async function textsOf(g) {
    if (!g.parts) return held[g.record][g.pos];
    const found = fileOf(g);
    return found ? (await load(found[0]))[found[1]] : null;
  }

  // Search: prompts' first words and all texts in the page at once; side files when asked.
  const haystack = (texts) => [texts.prompt, ...Object.values(texts.columns), ...texts.completions.flatMap((c) => [c.text, c.detail, c.extracted || ""])].join("\n").toLowerCase();
  const deep = { q: "", hits: new Set() };
  function fits(g, q) {
    if (`${g.id}\n${g.words}`.toLowerCase().includes(q) || (deep.q === q && deep.hits.has(g.key))) return true;
    if (g.parts) return false;
    if (g.hay === undefined) g.hay = haystack(held[g.record][g.pos]);
    return g.hay.includes(q);
  }
  async function searchFiles() {
    const q = state.q.trim().toLowerCase(), files = new Map();
    for (const g of groups) if (g.parts && g.parts.length) { const [name, pos] = fileOf(g); files.set(name, [...(files.get(name) || []), [g, pos]]); }
    Object.assign(deep, { q, hits: new Set() });
    let num = 0;
    for (const [name, some] of files) {
      if (deep.q !== q || q !== state.q.trim().toLowerCase()) break;
      try {
        const texts = await load(name);
        for (const [g, pos] of some) if (haystack(texts[pos]).includes(q)) deep.hits.add(g.key);
      } catch { /* a file that is gone has no hits */ }
      num += 1;
      if (num % 50 === 0 || num === files.size) { el("deep").textContent = `${num} of ${files.size} side files searched`; list(); }
    }
  }

  const number = (x) => (x === null ? "–" : String(Number(x.toPrecision(3))));
  const last = (x) => (x === null ? -Infinity : x);
  const orders = {
    new: (a, b) => b.step - a.step, old: (a, b) => a.step - b.step,
    high: (a, b) => last(b.mean) - last(a.mean), low: (a, b) => last(a.mean) - last(b.mean),
    wide: (a, b) => last(b.spread) - last(a.spread), narrow: (a, b) => last(a.spread) - last(b.spread),
  };
  function matching() {
    const q = state.q.trim().toLowerCase();
    return groups.filter((g) => (!state.set || g.kind === state.set) && (!state.step || String(g.step) === state.step) &&
      (!state.tag || g.tags.includes(state.tag)) && (!q || fits(g, q))).sort(orders[state.sort] || orders.new);
  }
  let found = [];

  // The hash is the state; code that changes the state calls put.
  const hashOf = () => new URLSearchParams(Object.entries(state).filter(([name, value]) => value !== FIRST[name])).toString();
  function put(changes, { keep = false } = {}) {
    Object.assign(state, { y: "" }, changes);
    if (keep) history.replaceState(null, "", "#" + hashOf());
    else location.hash = hashOf();
    render();
  }
  function read() {
    Object.assign(state, FIRST);
    for (const [name, value] of new URLSearchParams(location.hash.slice(1))) if (name in FIRST) state[name] = value;
    el("search").value = state.q;
    render();
    if (state.g) el("browser").scrollIntoView({ block: "start" });
  }

  function marked(node, text) {
    // The text, with what was searched for in <mark>.
    const q = state.q.trim(), low = text.toLowerCase(), isSafe = low.length === text.length;
    let from = 0, to;
    while (q && isSafe && (to = low.indexOf(q.toLowerCase(), from)) >= 0) {
      node.append(text.slice(from, to), make("mark", "", text.slice(to, to + q.length)));
      from = to + q.length;
    }
    node.append(text.slice(from));
    return node;
  }

  function surprise(logprobs) {
    // One bar per token (or bucket of tokens): the taller, the less likely the sampler found it.
    const svg = draw(null, "svg", { class: "strip", viewBox: `0 0 ${logprobs.length} 10`, preserveAspectRatio: "none" });
    draw(svg, "path", { d: logprobs.map((p, i) => `M${i + 0.5} 10V${10 - Math.min(10, -2 * p + 0.3)}`).join("") });
    draw(svg, "title", {}, "surprise of the sampler, token by token");
    return svg;
  }

  function completion(c, i, isOpen) {
    const box = make("details", "completion"), head = make("summary"), body = make("div", "body"), facts = make("p", "facts");
    const kind = c.score === null || c.advantage === null ? "none" : c.advantage > 0 ? "up" : c.advantage < 0 ? "down" : "none";
    const ends = { stop: "ended by itself", length: "cut by the limit", abort: "engine failed" };
    head.append(make("strong", "score " + kind, c.score === null ? "no verdict" : number(c.score)));
    head.append(make("span", "about", `${c.advantage === null ? "" : `advantage ${c.advantage > 0 ? "+" : ""}${number(c.advantage)} · `}${c.length.toLocaleString("en")} tokens`));
    if (c.finish !== "stop") head.append(make("span", "pill warning", ends[c.finish] || c.finish));
    head.append(make("span", "first", c.text.slice(0, 200).replace(/\s+/g, " ")));
    facts.append(make("span", "", c.reason.replaceAll("_", " ")), make("span", "", ends[c.finish] || c.finish));
    if (c.extracted !== null) facts.append(make("span", "mono", "answer " + c.extracted));
    const parts = Object.entries(c.parts);
    if (parts.length > 1) for (const [name, value] of parts) facts.append(make("span", "mono", `${name} ${number(value)}`));
    body.append(facts);
    if (c.detail) body.append(make("p", "detail", c.detail));
    if (c.logprobs.length > 15) body.append(surprise(c.logprobs));
    body.append(marked(make("pre"), c.text === "" ? "(no text)" : c.text));
    box.append(head, body);
    box.open = isOpen;
    box.addEventListener("toggle", () => { clearTimeout(toggled); toggled = setTimeout(() => { // once for all that open together
      state.open = [...document.querySelectorAll("details.completion")].flatMap((d, k) => (d.open ? [k] : [])).join("-") || "none";
      if (state.g) history.replaceState(null, "", "#" + hashOf());
    }, 30); });
    return box;
  }

  function reader(g, texts) {
    const view = el("view"), about = make("div", "prompt"), elsewhere = bySource.get(g.id).filter((other) => other !== g);
    view.replaceChildren();
    if (!texts) { view.append(make("p", "empty", "The texts of this group are only in the ledger: the side files of the report are full (cohort report --side-mb).")); return; }
    if (elsewhere.length) {
      const row = make("p", "facts"), link = (other) => { const a = make("button", "link", (other.kind === "e" ? "evaluation " : "step ") + `${other.step} (${number(other.mean)})`); a.onclick = () => put({ g: other.key, open: "" }); return a; };
      row.append(make("span", "about", "The same prompt:"), ...elsewhere.sort(orders.old).slice(0, 24).map(link));
      view.append(row);
    }
    about.append(make("h3", "", "Prompt"), marked(make("pre"), texts.prompt));
    const columns = Object.entries(texts.columns), named = make("dl", "columns");
    for (const [name, value] of columns) named.append(make("dt", "", name), marked(make("dd"), value));
    if (columns.length) about.append(named);
    const asked = about.querySelector("pre");
    view.append(about, make("h3", "", texts.completions.length === 1 ? "Completion" : `${texts.completions.length} completions, the best first`));
    asked.scrollTop = asked.scrollHeight; // the question comes last
    const chosen = state.open ? new Set(state.open.split("-")) : null, q = state.q.trim().toLowerCase();
    texts.completions.forEach((c, i) => view.append(completion(c, i, chosen ? chosen.has(String(i)) : i === 0 || c.text.length < 200 || (q !== "" && c.text.toLowerCase().includes(q)))));
  }

  async function open(g) {
    const place = found.indexOf(g);
    el("title").textContent = `${g.kind === "e" ? "Evaluation after step" : "Step"} ${g.step} · ${g.id}`;
    el("title").href = "#" + new URLSearchParams([["g", g.key]]);
    el("count").textContent = place < 0 ? "" : `${place + 1} of ${found.length}`;
    el("back").disabled = place <= 0;
    el("next").disabled = place < 0 || place >= found.length - 1;
    if (g.parts) el("view").replaceChildren(make("p", "empty", "Loading …"));
    try {
      const texts = await textsOf(g);
      if (state.g === g.key) reader(g, texts);
    } catch { if (state.g === g.key) el("view").replaceChildren(make("p", "empty", `The file ${page.folder}/${fileOf(g)[0]}.js is missing: keep the folder ${page.folder} beside this page, or build the report again.`)); }
    if (state.y) window.scrollTo(0, Number(state.y));
  }

  function list() {
    found = matching();
    const pages = Math.max(1, Math.ceil(found.length / PAGE_ROWS)), at = Math.max(0, Math.min(Number(state.at) || 0, pages - 1));
    state.at = String(at);
    el("num").textContent = `${found.length.toLocaleString("en")} group${found.length === 1 ? "" : "s"}`;
    el("pages").textContent = `page ${at + 1} of ${pages.toLocaleString("en")}`;
    el("first-page").disabled = el("back-page").disabled = at === 0;
    el("last-page").disabled = el("next-page").disabled = at === pages - 1;
    el("deep").hidden = !state.q.trim() || !groups.some((g) => g.parts && g.parts.length);
    el("deep").disabled = deep.q === state.q.trim().toLowerCase();
    if (!el("deep").disabled) el("deep").textContent = "Search the older texts too (side files)";
    el("rows").replaceChildren(...found.slice(at * PAGE_ROWS, (at + 1) * PAGE_ROWS).map((g) => {
      const row = make("tr"), words = make("td", "words"), link = make("a", "", ""), bar = make("span", "meter"), flags = make("td");
      link.href = "#" + new URLSearchParams([["g", g.key]]);
      marked(link, g.words || g.id);
      words.append(link, marked(make("span", "what"), g.id));
      bar.style.setProperty("--share", String(Math.max(0, Math.min(1, g.mean || 0))));
      const mean = make("td", "number", number(g.mean));
      mean.append(bar);
      flags.append(...g.tags.map((tag) => make("span", "pill plain", tag)));
      row.append(make("td", "number", (g.kind === "e" ? "held-out " : "") + g.step.toLocaleString("en")), words, mean, make("td", "number", number(g.spread)), flags);
      row.tabIndex = 0;
      row.onclick = (event) => { event.preventDefault(); put({ g: g.key, open: "" }); };
      row.onkeydown = (event) => { if (event.key === "Enter") { event.preventDefault(); put({ g: g.key, open: "" }); } };
      return row;
    }));
    el("none").hidden = found.length > 0;
  }

  function render() {
    const g = byKey.get(state.g);
    el("list").hidden = Boolean(g);
    el("reader").hidden = !g;
    for (const name of ["set", "tag", "step", "sort"]) el(name).value = state[name];
    list();
    if (g) open(g);
    else if (state.g) put({ g: "" }, { keep: true });
  }
  const go = (by) => { const g = found[found.findIndex((other) => other.key === state.g) + by]; if (g) put({ g: g.key, open: "" }); };
  const turn = (to) => put({ at: String(to) });
  const close = () => put({ g: "", open: "", at: String(Math.max(0, Math.floor(found.findIndex((g) => g.key === state.g) / PAGE_ROWS))) });
  const openAll = () => { const all = [...document.querySelectorAll("details.completion")], isOpen = all.some((d) => !d.open); for (const d of all) d.open = isOpen; };
  const step = (by) => {
    const rows = [...el("rows").children], here = rows.indexOf(document.activeElement), row = rows[here < 0 ? 0 : here + by];
    if (row) { row.focus(); row.scrollIntoView({ block: "nearest" }); }
  };
  const keys = { j: () => (state.g ? go(1) : step(1)), k: () => (state.g ? go(-1) : step(-1)), n: () => turn(Number(state.at) + 1), p: () => turn(Number(state.at) - 1),
    o: openAll, Escape: () => { if (state.g) close(); }, "/": () => { if (state.g) close(); el("search").focus(); } };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input, select")) { if (event.key === "Escape") event.target.blur(); return; }
    if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
  });

  let typing, toggled;
  el("search").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(() => put({ q: el("search").value, at: "0" }, { keep: true }), 150); });
  for (const name of ["set", "tag", "step", "sort"]) el(name).addEventListener("change", (event) => put({ [name]: event.target.value, at: "0" }));
  for (const [id, act] of Object.entries({ back: () => go(-1), next: () => go(1), close, all: openAll, deep: searchFiles, "first-page": () => turn(0),
    "back-page": keys.p, "next-page": keys.n, "last-page": () => turn(1e9) })) el(id).addEventListener("click", act);
  for (const number of [...new Set(groups.map((g) => g.step))]) { const option = make("option", "", "step " + number); option.value = String(number); el("step").append(option); }
  el("set").hidden = new Set(groups.map((g) => g.kind)).size < 2;
  window.addEventListener("hashchange", () => { if (location.hash.slice(1) !== hashOf()) read(); });
  el("browser").hidden = false;
  read();
  if (state.y) { history.scrollRestoration = "manual"; window.scrollTo(0, Number(state.y)); }
})();

// While the run goes on, the page reloads, unless somebody types or selects, or no newer page was made for long.
(() => {
  const page = json("page");
  if (!page.live) return;
  const again = () => {
    const isBusy = document.activeElement.matches("input, select") || String(getSelection()) !== "";
    if (Date.now() / 1000 - page.made > 20 * page.live) { document.getElementById("live").textContent = "not rebuilt for a while: reload by hand"; return; }
    if (isBusy) { setTimeout(again, 2000); return; }
    const place = new URLSearchParams(location.hash.slice(1));
    place.set("y", String(Math.round(scrollY)));
    history.replaceState(null, "", "#" + place);
    location.reload();
  };
  setTimeout(again, 1000 * page.live);
})();
