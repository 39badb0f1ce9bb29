/* Overview and head view, and the panel of the chosen head. */
(function () {
  "use strict";
  const R = window.headscopeRender, { el, number, headName, visible } = R, hs = window.hs, page = hs.page;
  const $ = (id) => document.getElementById(id);
  const parts = {};

  function metric(key) { return page.overview ? page.overview.metrics.find((m) => m.key === key) : null; }
  hs.metric = metric;
  const rankings = new WeakMap();
  function ranks(m) {
    if (!rankings.has(m)) {
      const order = [...m.values.keys()].filter((i) => m.values[i] === m.values[i]).sort((a, b) => m.values[b] - m.values[a]), out = new Int32Array(m.values.length);
      order.forEach((i, n) => { out[i] = n + 1; }); rankings.set(m, { out, count: order.length, order });
    }
    return rankings.get(m);
  }
  hs.ranks = ranks;

  /* ---- overview ---- */
  function thumb(i) {
    const o = page.overview; if (!o || !o.sprite || !o.pooled) return null;
    const [h, w] = o.pooled, c = el("canvas", { width: 128, height: 128, class: "hs-thumb" }), x = c.getContext("2d");
    x.imageSmoothingEnabled = false; x.drawImage(o.sprite, (i % o.heads) * w, Math.floor(i / o.heads) * h, w, h, 0, 0, 128, 128); return c;
  }
  function tip(i) {
    const o = page.overview, layer = Math.floor(i / o.heads), head = i % o.heads, name = headName(o.stack, layer, head), m = metric(hs.state.metric);
    if (o.exists[i] !== 1) return R.rowsNode(name, [["missing", "this layer has no such head"]]);
    const rows = [];
    if (m && m.values) {
      const r = ranks(m); rows.push([m.name, `${number(m.values[i])} ${m.unit}`], ["rank", `${r.out[i] || "–"} / ${r.count}`]);
      if (m.se && m.se[i] === m.se[i]) rows.push(["95 % interval", `${number(m.values[i] - 1.96 * m.se[i])} … ${number(m.values[i] + 1.96 * m.se[i])} (n ${m.n})`]);
      if (m.null) rows.push(["control", number(m.null[i])]);
    }
    if (o.kv_group > 1) rows.push(["KV group", Math.floor(head / o.kv_group)]);
    return R.rowsNode(name, rows, thumb(i));
  }
  function order(o, s) {
    if (s.sort === "cluster" && o.order) return Int32Array.from(o.order.flat());
    const m = metric(s.metric);
    if (s.sort === "value" && m && m.values) {
      const out = new Int32Array(o.layers * o.heads);
      for (let l = 0; l < o.layers; l++) [...Array(o.heads).keys()].sort((a, b) => (m.values[l * o.heads + b] || -Infinity) - (m.values[l * o.heads + a] || -Infinity)).forEach((h, p) => { out[l * o.heads + p] = h; });
      return out;
    }
    return null;
  }
  function sprite() {
    const o = page.overview; if (!o || !o.pooled || o.sprite || o.loading) return;
    o.loading = true; const image = new Image();
    image.onload = () => { o.sprite = image; if (page.overview === o) overview(); };
    image.onerror = () => hs.problem("the thumbnails could not be loaded", "sprite");
    image.src = `api/run/${page.info.id}/sprite/${o.stack}.png`;
  }
  function overview() {
    const o = page.overview, s = hs.state; if (!o || !$("grid-host")) return;
    if (!parts.grid) {
      parts.grid = new R.Grid($("grid-host"), {
        open: (i) => { const g = page.overview; if (g.exists[i] === 1) hs.set({ layer: Math.floor(i / g.heads), head: i % g.heads, view: "head" }); },
        toggle: (i) => { const g = page.overview; if (g.exists[i] === 1) hs.toggle(headName(g.stack, Math.floor(i / g.heads), i % g.heads)); },
        select: (found, add) => hs.select(found.filter((i) => page.overview.exists[i] === 1), add), hover: (i) => { if (i >= 0) sprite(); },
      });
    }
    const m = metric(s.metric), values = m && m.values ? m.values : o.exists, look = m && m.values ? R.scale(values) : { low: 0, high: 2, name: "grey" };
    parts.grid.zoom = s.zoom || 1;
    let kept = null;
    if (s.top > 0 && m && m.values) kept = new Set(ranks(m).order.slice(0, s.top));
    if (s.thumbs) sprite();
    parts.grid.set({
      rows: o.layers, columns: o.heads, values: values.map((v, i) => (o.exists[i] === 1 ? v : NaN)), low: look.low, high: look.high, palette: look.name, order: order(o, s), sprite: s.thumbs ? o.sprite : null, thumb: o.pooled,
      cap: 54, capHeight: 30, current: o.stack === s.stack ? s.layer * o.heads + s.head : -1, selected: hs.selected(o.stack), kept, tip, pinned: pinnedIndex(o),
    });
    parts.grid.canvas.setAttribute("aria-label", `${o.layers} layers by ${o.heads} heads coloured by ${m ? m.name : "nothing"}; the table below has the same numbers`);
    if (s.thumbs && o.sprite) R.colourbar($("grid-bar"), 0, o.pooled_top, "viridis", "mean attention per block (one scale for all heads)", 0.5);
    else if (m && m.values) R.colourbar($("grid-bar"), look.low, look.high, look.name, m.unit);
    else $("grid-bar").replaceChildren();
    about(m);
  }
  function pinnedIndex(o) { const p = hs.parse(hs.state.pin)[0]; return p && p.stack === o.stack ? p.layer * o.heads + p.head : -1; }
  function about(m) {
    const host = $("metric-about"); if (!host) return;
    if (!m) { host.replaceChildren(); return; }
    const nodes = [el("b", { text: m.name }), el("span", { text: `: ${m.definition}. Unit: ${m.unit}. ` }), el("span", { class: "hs-dim", text: [m.paper, m.probe && `on ${m.probe}`, m.control && `control: ${m.control}`].filter(Boolean).join("; ") })];
    if (!m.ready) {
      const job = [...hs.jobs.values()].find((j) => j.kind === "score" && j.title === `score ${m.name} (${hs.state.stack})` && ["queued", "running"].includes(j.state));
      nodes.push(el("div", { class: "hs-empty" }, job ? el("span", { text: "being computed; you can go on browsing" }) : el("button", { type: "button", class: "hs-button hs-strong", id: "compute", text: `Compute ${m.name} for this model`, onclick: () => compute(m.name) })));
    }
    host.replaceChildren(...nodes);
  }
  async function compute(name) {
    await hs.guard(`score ${name}`, async () => {
      const made = await hs.post("score", { run: page.info.id, score: name, stack: hs.state.stack });
      const again = async () => { await hs.loadOverview(); overview(); table(); hs.announceStack(); };
      hs.watch(made.job, { done: again, failed: (j) => { hs.problem(`${name}: ${j.error}`, `score ${name}`); about(metric(hs.state.metric)); }, cancelled: () => about(metric(hs.state.metric)) });
      setTimeout(() => about(metric(hs.state.metric)), 150);
    });
  }
  hs.compute = compute;

  let tableFor = "";
  function table() {
    const o = page.overview; if (!o) return;
    const ready = o.metrics.filter((m) => m.ready), key = page.info.id + o.stack + ready.map((m) => m.key).join();
    if (key === tableFor) return; tableFor = key;
    const rows = [];
    for (let i = 0; i < o.layers * o.heads; i++) {
      if (o.exists[i] !== 1) continue;
      const row = { id: headName(o.stack, Math.floor(i / o.heads), i % o.heads), layer: Math.floor(i / o.heads), head: i % o.heads };
      ready.forEach((m, n) => { const v = m.values[i]; row["m" + n] = v === v ? Number(v.toPrecision(6)) : null; });
      rows.push(row);
    }
    const columns = [{ field: "id", headerName: "head", pinned: "left", width: 120, filter: "agTextColumnFilter" }, { field: "layer", headerName: "layer", width: 90, filter: "agNumberColumnFilter" }, { field: "head", headerName: "number", width: 100, filter: "agNumberColumnFilter" },
      ...ready.map((m, n) => ({ field: "m" + n, headerName: m.name, headerTooltip: `${m.definition} (${m.unit})`, filter: "agNumberColumnFilter", width: 150, wrapHeaderText: true, autoHeaderHeight: true }))];
    hs.props("table", { columnDefs: columns, rowData: rows });
  }
  hs.tablePicked = (rows) => {
    const names = (rows || []).map((r) => r.id), o = page.overview; if (!o) return;
    const others = hs.parse(hs.state.sel).map((h) => headName(h.stack, h.layer, h.head)).filter((n) => !names.includes(n) && !(hs.state.stack === "text" ? !n.includes(".") : n.startsWith(hs.state.stack + ".")));
    if (rows && rows.length) hs.set({ sel: hs.pack([...others, ...names]) });
  };
  hs.tableOpened = (cell) => { const h = cell && hs.parse(cell.rowId || "")[0]; if (h) hs.set({ layer: h.layer, head: h.head }); };

  /* ---- chosen head, selection ---- */
  function panel() {
    const s = hs.state, host = $("chosen"); if (!host) return;
    if (!page.info) { host.replaceChildren(el("p", { class: "hs-empty", text: "The chosen head and the selection will be here." })); return; }
    const name = hs.current(), o = page.overview, group = o && o.kv_group > 1 ? `KV group ${Math.floor(s.head / o.kv_group)}` : "";
    const list = hs.list();
    const chip = (n) => el("span", { class: "hs-chip" }, el("button", { type: "button", text: n, title: "open", onclick: () => { const h = hs.parse(n)[0]; hs.set({ stack: h.stack, layer: h.layer, head: h.head }); } }), el("button", { type: "button", "aria-label": `remove ${n}`, text: "×", onclick: () => hs.toggle(n) }));
    const button = (text, label, f) => el("button", { type: "button", class: "hs-button", "aria-label": label, title: label, text, onclick: f });
    const find = el("input", { id: "find", type: "search", placeholder: "L3H1", "aria-label": "go to a head", onkeydown: (e) => { if (e.key !== "Enter") return; const h = hs.parse(e.target.value.trim().replace(/l(\d+)h(\d+)$/i, "L$1H$2"))[0]; if (h && (h.stack !== s.stack || hs.exists(h.layer, h.head))) { hs.set({ stack: h.stack, layer: h.layer, head: h.head }); e.target.blur(); } else hs.problem(`no head ${e.target.value} here: write L3H1, or vision.L3H1`, "find"); } });
    host.replaceChildren(
      el("div", { class: "hs-headname", id: "head-name", text: name }), el("div", { class: "hs-dim", text: group }),
      el("div", { class: "hs-row" }, button("←", "previous head", () => hs.move(0, -1)), button("→", "next head", () => hs.move(0, 1)), button("↑", "layer up", () => hs.move(-1, 0)), button("↓", "layer down", () => hs.move(1, 0))),
      el("div", { class: "hs-row" }, button(list.includes(name) ? "Unselect" : "Select", "select or unselect this head", () => hs.toggle(name)), button(s.pin === name ? "Unpin" : "Pin", "pin this head for comparison", () => hs.set({ pin: s.pin === name ? "" : name }))),
      find, el("h2", { text: `Selection (${list.length})` }),
      list.length ? el("div", { class: "hs-chips", id: "chips" }, ...list.slice(0, 40).map(chip), ...(list.length > 40 ? [el("span", { class: "hs-dim", text: `and ${list.length - 40} more` })] : [])) : el("p", { class: "hs-empty", text: "Shift-click heads, draw a box on the grid, or press s." }),
      ...(list.length ? [el("div", { class: "hs-row" }, button("Clear", "clear the selection", () => hs.set({ sel: "" })), button("Keep as…", "keep the selection under a name", keep), button("Workbench", "change these heads", () => hs.set({ view: "workbench" })))] : []), named(),
    );
    const live = $("live"); if (live) { const m = metric(s.metric), i = o ? s.layer * o.heads + s.head : 0; live.textContent = `${name}${m && m.values ? `, ${m.name} ${number(m.values[i])}` : ""}`; }
  }
  const kept = () => { try { return JSON.parse(localStorage.getItem("headscope-selections") || "{}"); } catch (e) { return {}; } };
  function keep() {
    const all = kept(), names = Object.keys(all); let n = names.length + 1; while (all[`selection ${n}`]) n++;
    const input = el("input", { type: "text", value: `selection ${n}`, "aria-label": "name of the selection" });
    const done = () => { const name = input.value.trim().slice(0, 60); if (name) { all[name] = hs.state.sel; localStorage.setItem("headscope-selections", JSON.stringify(all)); } panel(); };
    input.addEventListener("keydown", (e) => { if (e.key === "Enter") done(); if (e.key === "Escape") panel(); });
    $("named").replaceChildren(input, el("button", { type: "button", class: "hs-button", text: "Keep", onclick: done })); input.focus(); input.select();
  }
  function named() {
    const all = kept();
    return el("div", { id: "named" }, ...Object.entries(all).map(([name, text]) => el("span", { class: "hs-chip" }, el("button", { type: "button", text: name, title: text.slice(0, 300), onclick: () => hs.set({ sel: text }) }), el("button", { type: "button", "aria-label": `forget ${name}`, text: "×", onclick: () => { delete all[name]; localStorage.setItem("headscope-selections", JSON.stringify(all)); panel(); } }))));
  }

  /* ---- head view ---- */
  const lines = new Map();
  class Lines {
    /* Rows and columns of one head's map, fetched when they are looked at. */
    constructor(path, rows, columns) { this.path = path; this.rows = rows; this.columns = columns; this.held = new Map(); }
    get(kind, at) { return this.held.get(kind + at); }
    async load(kind, at) {
      const key = kind + at; if (this.held.has(key)) return this.held.get(key);
      if (!this.wait) this.wait = new Map();
      if (!this.wait.has(key)) this.wait.set(key, hs.getFloats(`${this.path}&${kind}=${at}`).then((v) => { this.held.set(key, v); this.wait.delete(key); if (this.held.size > 600) this.held.delete(this.held.keys().next().value); return v; }));
      return this.wait.get(key);
    }
  }
  function query(s, hide) { return `norm=${s.norm ? 1 : 0}&hide=${hide}`; }
  async function source(run, tokens, h, s, top) {
    const base = `run/${run}`, where = `${h.stack}/${h.layer}/${h.head}`;
    const picture = async (path) => {
      const answer = await hs.ask(path), [x0, x1, y0, y1] = answer.headers.get("X-Tile").split(",").map(Number);
      return { image: await createImageBitmap(await answer.blob()), x0, x1, y0, y1 };
    };
    /* The whole map is asked for beside its description, not after it. */
    let early = !s.hide && !top && parts.map && parts.map.root.clientWidth ? picture(`${base}/tile/${where}.png?w=${parts.map.pixels()}&gamma=${s.gamma}&norm=${s.norm ? 1 : 0}&top=${s.norm ? 1 : ""}`) : null;
    if (early) early.catch(() => {});
    let meta = await hs.getJson(`${base}/map/${where}?norm=${s.norm ? 1 : 0}`);
    const hide = s.hide ? meta.sinks.join(",") : "";
    if (hide) meta = { ...(await hs.getJson(`${base}/map/${where}?${query(s, hide)}`)), sinks: meta.sinks };
    const key = `${run}/${where}?${query(s, hide)}`;
    if (!lines.has(key)) { lines.set(key, new Lines(`${base}/line/${where}?${query(s, hide)}`, meta.rows, meta.columns)); if (lines.size > 12) lines.delete(lines.keys().next().value); }
    const held = lines.get(key), scale = top || (s.norm ? 1 : Math.max(meta.top, 1e-6));
    const name = (list, i) => (meta.pooled ? `${i * meta.edge}…` : list[i]);
    return {
      meta, held, rows: meta.rows, columns: meta.columns, queries: meta.pooled ? [...Array(meta.rows).keys()].map((i) => name(null, i)) : tokens.queries, keys: meta.pooled ? [...Array(meta.columns).keys()].map((i) => name(null, i)) : tokens.keys, top: scale, gamma: s.gamma, title: headName(h.stack, h.layer, h.head), hidden: hide,
      unit: (meta.pooled ? "mean weight per block" : s.norm ? "share of the row's largest" : "attention weight") + ", largest of each pixel" + (s.gamma !== 1 ? `, gamma ${s.gamma}` : ""),
      value: (q, k) => { const r = held.get("q", q); if (r) return r[k]; const c = held.get("k", k); return c ? c[q] : undefined; },
      tile: async (v) => {
        const whole = v.x0 === 0 && v.y0 === 0 && v.x1 === meta.columns && v.y1 === meta.rows, first = early; early = null;
        if (first && whole) return first;
        return picture(`${base}/tile/${where}.png?x0=${v.x0}&x1=${v.x1}&y0=${v.y0}&y1=${v.y1}&w=${v.w}&top=${scale}&gamma=${s.gamma}&${query(s, hide)}`);
      },
    };
  }
  function linked(view) {
    return {
      hover: (c) => { point(c); if (c && view.source) { view.source.held.load("q", c.q).then(() => view.tip()).catch(() => {}); } },
      lock: (c) => { const s = hs.state; if (s.q === c.q && s.k === c.k) hs.set({ q: null, k: null }, "replace"); else hs.set({ q: c.q, k: c.k }, "replace"); },
    };
  }
  let hovering = null;
  function point(c) { hovering = c; strips(); }
  async function head() {
    const s = hs.state; if (!page.info || !$("map-host") || s.view !== "head") return;
    const tokens = page.info.tokens[s.stack]; if (!tokens || !hs.exists(s.layer, s.head)) { if (tokens) $("head-facts").replaceChildren(el("p", { class: "hs-empty", text: `${hs.current()} is missing: this layer has no such head. Choose another.` })); return; }
    if (!parts.map) { parts.map = new R.MapView($("map-host"), {}); parts.map.on = linked(parts.map); parts.q = new R.Strip($("strip-q"), { hover: (i) => point(i === null ? null : { q: i, k: -1 }), lock: (i) => hs.set({ q: hs.state.q === i ? null : i, k: null }, "replace") });
      parts.k = new R.Strip($("strip-k"), { hover: (i) => point(i === null ? null : { q: -1, k: i }), lock: (i) => hs.set({ k: hs.state.k === i ? null : i, q: null }, "replace") }); }
    await hs.guard("head", async (current) => {
      const began = performance.now(), pin = hs.parse(s.pin)[0], other = s.pinrun && s.pinrun !== page.info.id ? s.pinrun : null;
      const src = await source(page.info.id, tokens, s, s); if (!current()) return;
      src.keep = true; src.run = page.info.id;
      const right = pin || other ? await pinned(pin || s, other || page.info.id, s, src) : null; if (!current()) return;
      if (right) src.top = right.top = Math.max(src.top, right.top);
      if (right && src.top !== (s.norm ? 1 : src.meta.top)) { const again = await source(page.info.id, tokens, s, s, src.top); Object.assign(src, { tile: again.tile }); }
      parts.q.set(tokens.queries, tokens.kind && tokens.kind.length === tokens.queries.length ? tokens.kind : null); parts.k.set(tokens.keys, tokens.kind);
      parts.map.source = parts.map.source && parts.map.source.rows === src.rows ? parts.map.source : null;
      await parts.map.set(src); if (!current()) return;
      parts.map.canvas.setAttribute("aria-label", `attention of ${hs.current()}, ${src.rows} queries by ${src.columns} keys; exact weights are in the token strips`);
      $("map-title").textContent = right ? hs.current() : ""; $("map-host").dataset.head = hs.current(); $("map-host").dataset.took = Math.round(performance.now() - began);
      compare(right); strips(); facts(src);
    });
  }
  async function pinned(h, run, s, src) {
    const info = run === page.info.id ? page.info : await hs.getJson("run/" + encodeURIComponent(run));
    const tokens = info.tokens[h.stack]; if (!tokens) throw new Error(`the other run has no stack ${h.stack}`);
    const out = await source(run, tokens, h, s); out.title += run === page.info.id ? "" : ` · ${info.title}`; out.keep = true;
    const full = await source(run, tokens, h, s, Math.max(out.top, src.top)); full.title = out.title; full.keep = true; full.shown = headName(h.stack, h.layer, h.head); return full;
  }
  async function compare(src) {
    const host = $("pin-host"), title = $("pin-title"); if (!host) return;
    $("pin-box").hidden = !src; $("maps").classList.toggle("hs-two", Boolean(src)); if (!src) { parts.map.draw(); return; }
    title.textContent = src.title; if (!parts.pin) { parts.pin = new R.MapView(host, {}); parts.pin.on = linked(parts.pin); }
    parts.pin.source = parts.pin.source && parts.pin.source.rows === src.rows && parts.pin.source.columns === src.columns ? parts.pin.source : null;
    await parts.pin.set(src); parts.map.draw();
  }
  async function strips() {
    const s = hs.state, view = parts.map, src = view && view.source; if (!src || src.meta.pooled) { if (parts.q) { parts.q.paint(null, 1, null); parts.k.paint(null, 1, null); } return; }
    const locked = s.q !== null || s.k !== null ? { q: s.q === null ? -1 : s.q, k: s.k === null ? -1 : s.k } : null, c = hovering || locked;
    view.locked = locked; if (parts.pin) { parts.pin.locked = locked; parts.pin.hover = hovering; parts.pin.draw(); }
    if (hovering && view.hover !== hovering) { view.hover = hovering; } view.draw(); if (!hovering) view.hover = null;
    if (!c) { parts.q.paint(null, 1, null); parts.k.paint(null, 1, null); $("strip-note").textContent = "Hover or click a token: what it looks at, and what looks at it."; return; }
    const from = s.dir === "from";
    /* From a query: its row over the keys. From a key: its column over the queries. */
    const q = c.q, k = c.k, useRow = q >= 0 && (from || k < 0), at = useRow ? q : k; if (at < 0 || at >= (useRow ? src.rows : src.columns)) return;
    let line = src.held.get(useRow ? "q" : "k", at);
    if (!line) { const mark = (strips.mark = (strips.mark || 0) + 1); try { line = await src.held.load(useRow ? "q" : "k", at); } catch (e) { return; } if (mark !== strips.mark) return; }
    let top = 0; for (const v of line) if (v > top) top = v;
    if (useRow) { parts.k.paint(line, top, k >= 0 ? k : null); parts.q.paint(null, 1, q); } else { parts.q.paint(line, top, q >= 0 ? q : null); parts.k.paint(null, 1, k); }
    const tokens = page.info.tokens[s.stack], token = useRow ? tokens.queries[at] : tokens.keys[at], best = line.indexOf(top), there = useRow ? tokens.keys[best] : tokens.queries[best];
    $("strip-note").textContent = `${useRow ? "query" : "key"} ${at} “${visible(token)}” ${useRow ? "looks most at key" : "is looked at most by query"} ${best} “${visible(there === undefined ? "" : there)}” with ${number(top)}${q >= 0 && k >= 0 ? `; weight of this cell ${number(src.value(q, k))}` : ""}`;
  }
  function facts(src) {
    const host = $("head-facts"), meta = src.meta; if (!host) return;
    const rows = meta.numbers.map((n) => { const m = metric(n.key); return [m ? m.name : n.key, number(n.value), `${n.rank} / ${n.of}`, m ? `${m.definition}. Unit: ${m.unit}` : ""]; });
    const table = el("table", { class: "hs-table" }, el("tr", {}, ...["number", "value", "rank"].map((t) => el("th", { text: t }))), ...rows.map((r) => el("tr", { title: r[3] }, ...r.slice(0, 3).map((t) => el("td", { text: t })))));
    const tokens = page.info.tokens[hs.state.stack];
    const sinks = meta.sinks.length ? `Sink columns of this head: ${meta.sinks.map((k) => `${k} “${visible(tokens.keys[k])}”`).join(", ")}${src.hidden ? " (hidden)" : ""}.` : "No sink column in this head.";
    host.replaceChildren(el("h2", { text: meta.head }), el("p", { class: "hs-dim", text: (meta.kv_group !== null ? `KV group ${meta.kv_group}. ` : "") + sinks + (meta.pooled ? ` Only block sums were traced (blocks of ${meta.edge}).` : "") }), table,
      el("p", { class: "hs-dim", text: "On one prompt. A head's behaviour on a narrow task rarely is its behaviour everywhere: see its examples." }));
    for (const id of ["pairs", "logits", "examples"]) { const box = $("head-" + id); if (box) box.replaceChildren(); }
    pairs(src);
  }
  async function pairs(src) {
    await hs.guard("pairs", async (current) => {
      const s = hs.state, found = await hs.getJson(`run/${page.info.id}/pairs/${s.stack}/${s.layer}/${s.head}?hide=${src.hidden}`); if (!current()) return;
      $("head-pairs").replaceChildren(el("h2", { text: "QK: strongest pairs" }), el("table", { class: "hs-table" }, ...found.pairs.map((p) => el("tr", { tabindex: "0", class: "hs-link", onclick: () => hs.set({ q: p.query, k: p.key }, "replace") }, el("td", { text: `${p.query} ${visible(p.query_token)}` }), el("td", { text: "→" }), el("td", { text: `${p.key} ${visible(p.key_token)}` }), el("td", { text: number(p.weight) })))));
    });
  }
  hs.showLogits = () => hs.guard("logits", async (current) => {
    const s = hs.state, host = $("head-logits"); host.textContent = "working";
    try {
      const d = await hs.getJson(`run/${page.info.id}/logits/${s.stack}/${s.layer}/${s.head}?row=${s.q === null ? -1 : s.q}`); if (!current()) return;
      const list = (title, rows) => el("div", {}, el("b", { text: title }), ...rows.map(([t, v]) => el("div", { class: "hs-pair" }, el("code", { text: visible(t) }), el("span", { text: number(v) }))));
      host.replaceChildren(el("h2", { text: "OV: direct logit contribution" }), el("p", { class: "hs-dim", text: `At row ${d.row}; the head writes ${(100 * d.write_share).toFixed(1)} % of the residual's norm.${d.produced ? ` ${d.row + 1 < page.info.prompt_length ? "Next in the prompt" : "Produced"}: “${visible(d.produced[0])}” ${number(d.produced[1])} logits.` : ""}` }), el("div", { class: "hs-cols" }, list("more likely", d.up), list("less likely", d.down)));
    } catch (e) { host.replaceChildren(); throw e; }
  });
  hs.showExamples = () => hs.guard("examples", async (current) => {
    const s = hs.state, host = $("head-examples"); host.textContent = "running the model on other texts";
    try {
      const d = await hs.getJson(`run/${page.info.id}/examples/${s.stack}/${s.layer}/${s.head}`); if (!current()) return;
      host.replaceChildren(el("h2", { text: "Top rows in other texts (probe Passages)" }), ...(d.examples.length ? d.examples.map((x) => el("div", { class: "hs-example" }, el("span", { class: "hs-dim", text: x.weight.toFixed(3) + " " }), ...x.tokens.map((t, i) => el("span", { class: i === x.query ? "hs-q" : i === x.key ? "hs-k" : "", text: visible(t) })))) : [el("p", { class: "hs-empty", text: "This head rests on the first position in all of them." })]));
    } catch (e) { host.replaceChildren(); throw e; }
  });
  hs.mapZoom = (k) => { if (!parts.map || !parts.map.view) return; if (k === 0) parts.map.reset(); else parts.map.zoomTo(k, 0.5, 0.5); };

  /* ---- export ---- */
  hs.export = (kind) => {
    const s = hs.state, run = page.info && page.info.id; if (!run) { hs.problem("trace a prompt first", "export"); return; }
    const view = { overview: parts.grid, head: parts.map, map: hs.parts2 && hs.parts2.scatter, sinks: hs.parts2 && hs.parts2.sinkGrid, importance: hs.parts2 && hs.parts2.importance }[s.view] || null;
    const name = `${s.view}-${s.view === "head" || s.view === "image" ? hs.current() : s.stack}`, canvas = view ? view.canvas : document.querySelector(`#view-${s.view} canvas`);
    const link = (path) => { const a = el("a", { href: path, download: "" }); document.body.append(a); a.click(); a.remove(); };
    if (kind === "csv") link(`api/run/${run}/table/${s.stack}.csv`);
    else if (kind === "npz") link(`api/run/${run}/npz/${s.stack}/${s.layer}/${s.head}.npz?norm=${s.norm ? 1 : 0}`);
    else if (!canvas) hs.problem("this view has no picture to export", "export");
    else if (kind === "png") canvas.toBlob((b) => hs.download(`${name}.png`, b));
    else if (kind === "svg") hs.download(`${name}.svg`, view && view.svg ? view.svg() : `<svg xmlns="http://www.w3.org/2000/svg" width="${canvas.width}" height="${canvas.height}"><image href="${canvas.toDataURL()}" width="${canvas.width}" height="${canvas.height}"/></svg>`, "image/svg+xml");
  };

  hs.parts = parts;
  hs.subscribe((s, changed) => {
    if (("view" in changed || "boot" in changed) && $("metric-box")) $("metric-box").hidden = !["overview", "map", "importance"].includes(s.view);
    if ("view" in changed) for (const v of hs.VIEWS) { const n = $("view-" + v); if (n) n.hidden = v !== s.view; }
    if ("stack" in changed && page.info && !changed.run && page.overview && page.overview.stack !== s.stack) {
      const n = page.info.stacks[s.stack]; if (!n) { hs.set({ stack: Object.keys(page.info.stacks)[0] }, "replace"); return; }
      hs.set({ layer: Math.min(s.layer, n.layers - 1), head: Math.min(s.head, n.heads - 1), q: null, k: null }, "replace");
      hs.loadOverview().then(() => { overview(); table(); panel(); head(); hs.announceStack(); });
    }
    const any = (...keys) => keys.some((k) => k in changed);
    if (any("run", "metric", "thumbs", "sort", "top", "sel", "layer", "head", "theme", "zoom", "pin", "view") && s.view === "overview") overview();
    if (any("run", "view") && s.view === "overview") table();
    if (any("run", "sel", "layer", "head", "pin", "stack", "boot", "metric")) panel();
    if (any("run", "layer", "head", "norm", "hide", "gamma", "view", "pin", "pinrun", "theme")) head();
    if (any("q", "k", "dir") && s.view === "head") strips();
    if (any("image", "boot", "run")) {
      const host = $("image-preview"); const all = s.image.split(",").filter(Boolean);
      if (host) host.replaceChildren(...all.map((name, n) => el("span", { class: "hs-picture" }, el("img", { src: `api/image/${name}.png`, alt: `picture ${n} of the prompt` }), el("button", { type: "button", class: "hs-button", "aria-label": `remove picture ${n}`, text: "×", onclick: () => hs.set({ image: all.filter((x) => x !== name).join(",") }, "replace") }))));
    }
  });
  hs.announceStack = () => {};
})();
