/* A run without a server: overview, maps of the chosen heads, table. Used by the exported page and by the notebook widget. */
(function () {
  "use strict";
  function half(bytes) {
    const view = new DataView(bytes.buffer), out = new Float32Array(bytes.length / 2);
    for (let i = 0; i < out.length; i++) {
      const h = view.getUint16(2 * i, true), sign = h & 0x8000 ? -1 : 1, e = (h >> 10) & 31, f = h & 1023;
      out[i] = e === 0 ? sign * f * 2 ** -24 : e === 31 ? (f ? NaN : sign * Infinity) : sign * (1 + f / 1024) * 2 ** (e - 15);
    }
    return out;
  }
  function bytes(text) { const raw = atob(text), out = new Uint8Array(raw.length); for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i); return out; }
  window.headscopeStandalone = function (root, data) {
    const R = window.headscopeRender, { el, number, headName } = R;
    const stacks = Object.keys(data.stacks); let stack = stacks.includes("text") ? "text" : stacks[0], metric = null, thumbs = false, open = null, grid = null;
    const host = el("div", { class: "hs-scroll" }), bar = el("div", { class: "hs-bar" }), about = el("div", { class: "hs-dim" }), maps = el("div", {}), table = el("div", { class: "hs-scroll", style: "max-height:360px" });
    const stackPick = el("select", { "aria-label": "stack", onchange: (e) => { stack = e.target.value; load(); } }, ...stacks.map((s) => el("option", { value: s, text: s })));
    const pick = el("select", { "aria-label": "colour by", onchange: (e) => { metric = e.target.value; draw(); } });
    const box = el("input", { type: "checkbox", onchange: (e) => { thumbs = e.target.checked; draw(); } });
    root.replaceChildren(el("div", { id: "page" }, el("h1", { text: `${data.title}` }), el("p", { class: "hs-dim", text: `${data.model}${data.answer ? " → " + data.answer : ""}` }),
      el("div", { class: "hs-row" }, stackPick, pick, el("label", { class: "hs-dim" }, box, " maps as thumbnails")), about, bar, host, el("h2", { text: "Maps" }), el("div", { class: "hs-row", id: "heads" }), maps, el("h2", { text: "Table" }), table));
    stackPick.value = stack;
    const here = () => data.stacks[stack].overview, metricOf = () => here().metrics.find((m) => m.key === metric) || here().metrics[0];
    function unpack(o) { if (o.ready) return; o.ready = true; for (const m of o.metrics) for (const k of ["values", "se", "null"]) m[k] = R.floats(m[k]); o.exists = R.floats(o.exists); if (o.sprite) { const image = new Image(); image.onload = () => { o.image = image; draw(); }; image.src = "data:image/png;base64," + o.sprite; } }
    function load() { const o = here(); unpack(o); metric = (o.metrics[0] || {}).key; pick.replaceChildren(...o.metrics.map((m) => el("option", { value: m.key, text: m.name }))); draw(); buttons(); rows(); }
    function draw() {
      const o = here(), m = metricOf(), look = m ? R.scale(m.values) : { low: 0, high: 1, name: "grey" };
      if (!grid) grid = new R.Grid(host, { open: (i) => show(headName(stack, Math.floor(i / here().heads), i % here().heads)) });
      const marked = new Set(Object.values(data.maps).filter((x) => x.stack === stack).map((x) => x.layer * o.heads + x.head));
      grid.set({ rows: o.layers, columns: o.heads, values: m ? m.values : o.exists, low: look.low, high: look.high, palette: look.name, order: null, sprite: thumbs && o.image ? o.image : null, thumb: o.pooled, current: -1, pinned: -1, selected: marked, tip: (i) => R.rowsNode(headName(stack, Math.floor(i / o.heads), i % o.heads), o.metrics.map((x) => [x.name, `${number(x.values[i])} ${x.unit}`])) });
      grid.canvas.setAttribute("aria-label", "heads by layer; the table below has the same numbers");
      if (thumbs && o.image) R.colourbar(bar, 0, o.pooled_top, "viridis", "mean attention per block", 0.5); else if (m) R.colourbar(bar, look.low, look.high, look.name, m.unit);
      about.textContent = m ? `${m.definition}. ${m.paper} Outlined heads have their map below.` : "";
    }
    function buttons() { root.querySelector("#heads").replaceChildren(...Object.keys(data.maps).map((n) => el("button", { type: "button", class: "hs-button", text: n, onclick: () => show(n) }))); if (Object.keys(data.maps).length) show(Object.keys(data.maps)[0]); }
    function show(name) {
      const m = data.maps[name]; if (!m) { maps.replaceChildren(el("p", { class: "hs-empty", text: `The map of ${name} was not exported.` })); return; }
      open = name; const at = el("div", { style: "max-width:820px" }); maps.replaceChildren(el("h2", { text: name }), at); const view = new R.MapView(at, {}), tokens = data.stacks[m.stack].tokens, whole = tokens.keys.length === m.columns, values = m.values ? half(bytes(m.values)) : null;
      const picture = new Promise((done) => {
        if (!values) { const image = new Image(); image.onload = () => done(image); image.src = "data:image/png;base64," + m.picture; return; }
        const c = document.createElement("canvas"); c.width = m.columns; c.height = m.rows; const x = c.getContext("2d"), image = x.createImageData(m.columns, m.rows);
        values.forEach((v, i) => { if (v === v) image.data.set([...R.colour(v, 0, m.top, "viridis", 0.5), 255], 4 * i); }); x.putImageData(image, 0, 0); done(c);
      });
      view.set({ rows: m.rows, columns: m.columns, queries: whole ? tokens.queries : [], keys: whole ? tokens.keys : [], top: m.top, gamma: 0.5, unit: "attention weight, gamma 0.5", title: name, value: (q, k) => (values ? values[q * m.columns + k] : undefined), tile: async () => ({ image: await picture, x0: 0, x1: m.columns, y0: 0, y1: m.rows }) });
      view.canvas.setAttribute("aria-label", `attention of ${name}`);
    }
    function rows() {
      const o = here(), list = []; for (let i = 0; i < o.layers * o.heads; i++) if (o.exists[i] === 1) list.push(i);
      const body = (order) => order.map((i) => el("tr", {}, el("td", { text: headName(stack, Math.floor(i / o.heads), i % o.heads) }), ...o.metrics.map((m) => el("td", { text: number(m.values[i]) }))));
      const tb = el("tbody", {}, ...body(list.slice(0, 2000)));
      const sort = (m) => tb.replaceChildren(...body([...list].sort((a, b) => m.values[b] - m.values[a]).slice(0, 2000)));
      table.replaceChildren(el("table", { class: "hs-table" }, el("thead", {}, el("tr", {}, el("th", { text: "head" }), ...o.metrics.map((m) => el("th", {}, el("button", { type: "button", class: "hs-button", text: m.name, onclick: () => sort(m) }))))), tb));
    }
    const dark = window.matchMedia && matchMedia("(prefers-color-scheme: dark)").matches && !document.documentElement.hasAttribute("data-mantine-color-scheme");
    if (dark) document.documentElement.setAttribute("data-mantine-color-scheme", "dark");
    load();
  };
})();
