/* Image, map of heads, importance, sinks. */
(function () {
  "use strict";
  const R = window.headscopeRender, { el, number, headName, visible } = R, hs = window.hs, page = hs.page, parts = (hs.parts2 = {});
  const $ = (id) => document.getElementById(id);

  /* ---- image ---- */
  let shown = null;
  async function image() {
    const s = hs.state; if (s.view !== "image" || !page.info) return;
    await hs.guard("image-view", async (current) => {
      const key = page.info.id + s.stack;
      if (!shown || shown.key !== key) {
        const found = await hs.getJson(`run/${page.info.id}/images/${s.stack}`); if (!current()) return;
        shown = { key, ...found, views: [] };
        const host = $("image-panels"); host.replaceChildren();
        if (!found.panels.length) host.append(el("p", { class: "hs-empty", text: page.info.images.length ? `The stack ${s.stack} sees no image patches: choose another stack above.` : "This prompt has no picture. Choose one beside the prompt, and trace again." }));
        for (const panel of found.panels) {
          const box = el("div", { class: "hs-panel" }, el("h2", { text: `${panel.name}: ${panel.rows} × ${panel.columns} patches` })), at = el("div", {}); box.append(at); host.append(box);
          const view = new R.Patches(at, { pick: (i) => pick(i) }); view.set({ panel }); shown.views.push(view);
          view.canvas.setAttribute("aria-label", `attention over ${panel.name}`);
          if (panel.source) { const picture = new Image(); picture.onload = () => view.set({ image: picture }); picture.src = `api/image/${panel.source}.png`; }
        }
        const special = $("image-special"); special.replaceChildren(...found.special.map((x) => el("button", { type: "button", class: "hs-button", "data-position": x.position, text: `${x.token} (${x.position})`, onclick: () => pick(x.position) })));
        steps();
      }
      if (!shown.panels.length) { $("image-note").textContent = ""; $("hops").replaceChildren(); return; }
      await paint(current);
    });
    hops();
  }
  function queryOf() {
    const s = hs.state, info = page.info.stacks[s.stack], tokens = page.info.tokens[s.stack];
    if (s.q !== null && s.q < info.queries) return s.q;
    if (s.stack !== "text") return shown && shown.special.length ? shown.special[0].position : 0;
    const made = tokens.phase ? tokens.phase.indexOf("generated") : -1; return made > 0 ? made - 1 : info.queries - 1;
  }
  function pick(i) {
    const s = hs.state;
    if (s.stack === "text" || s.dir === "to") hs.set({ k: i, dir: "to" }, "replace"); else hs.set({ q: i, k: null }, "replace");
  }
  hs.imageFrom = () => hs.set({ dir: "from", k: null }, "replace");
  async function paint(current) {
    const s = hs.state, to = s.dir === "to" && s.k !== null, at = to ? s.k : queryOf(), info = page.info, tokens = info.tokens[s.stack];
    const list = hs.parse(s.sel).filter((h) => h.stack === s.stack), many = s.mean && list.length;
    const heads = many ? list.slice(0, 64).map((h) => headName(h.stack, h.layer, h.head)).join(",") : hs.current();
    const values = await hs.getFloats(`run/${info.id}/looks/${s.stack}?heads=${heads}&q=${at}&direction=${to ? "to" : "from"}`); if (!current()) return;
    const onImage = shown.panels.flatMap((p) => p.positions.map((i) => values[i])), [, top] = R.range(onImage), sum = onImage.reduce((a, b) => a + (b === b ? b : 0), 0);
    if (to && s.stack === "text") {
      /* A patch was clicked: which tokens look at it. */
      for (const v of shown.views) v.set({ values: null, query: at });
      if (!parts.looked) parts.looked = new R.Strip($("image-tokens"), { lock: (i) => hs.set({ q: i, k: null, dir: "from" }, "replace") });
      parts.looked.set(tokens.queries, tokens.kind); let most = 0; for (const v of values) if (v > most) most = v; parts.looked.paint(values, most, null);
      $("image-note").textContent = `Tokens that look at patch ${at}${many ? `, mean of ${list.length} heads` : `, ${hs.current()}`}: brightest has ${number(most)}. Click a token to see what it looks at.`;
    } else {
      for (const v of shown.views) v.set({ values, top: Math.max(top, 1e-9), query: s.stack === "text" ? null : at, opacity: Number($("opacity").value) / 100 });
      if (s.stack === "text") { if (!parts.looked) parts.looked = new R.Strip($("image-tokens"), { lock: (i) => hs.set({ q: i, k: null, dir: "from" }, "replace") }); parts.looked.set(tokens.queries, tokens.kind); parts.looked.paint(null, 1, at); }
      else if (parts.looked) { $("image-tokens").replaceChildren(); parts.looked = null; }
      const name = s.stack === "text" ? `token ${at} “${visible(tokens.queries[at])}”${tokens.produced && tokens.produced[at] ? ` (produces “${visible(tokens.produced[at])}”)` : ""}` : `position ${at} “${visible(tokens.keys[at])}”`;
      $("image-note").textContent = `${to ? "Looked at from" : "Attention of"} ${name}, ${many ? `mean of ${list.length} heads` : hs.current()}: ${number(sum)} of the row is on patches; brightest patch ${number(top)} (scale 0 to that, square root).`;
    }
    $("image-from").hidden = !to;
    R.colourbar($("image-bar"), 0, top, "viridis", "attention weight", 0.5);
    $("image-panels").dataset.drawn = `${hs.current()}/${at}`;
    const slider = $("step"); if (slider && !slider.disabled && document.activeElement !== slider) slider.value = at;
  }
  function steps() {
    const s = hs.state, tokens = page.info.tokens[s.stack], slider = $("step"), made = tokens.phase ? tokens.phase.map((p, i) => (p === "generated" ? i : -1)).filter((i) => i > 0) : [];
    slider.disabled = !made.length; $("step-box").hidden = !made.length;
    if (made.length) { slider.min = made[0] - 1; slider.max = made[made.length - 1]; slider.value = queryOf(); }
  }
  async function hops() {
    const s = hs.state, host = $("hops"); if (!host || s.view !== "image") return;
    if (s.stack === "text" || !shown || !shown.panels.length) { host.replaceChildren(); return; }
    const mark = (hops.mark = (hops.mark || 0) + 1);
    try {
      const d = await hs.getJson(`run/${page.info.id}/hops/${s.stack}/${s.layer}/${s.head}`); if (mark !== hops.mark) return;
      const box = el("div", {}); host.replaceChildren(el("h2", { text: "k-hop profile" }), el("p", { class: "hs-dim", text: "Mean attention of a patch on the patches exactly k steps away (Chebyshev)." }), box);
      R.lines(box, [{ name: hs.current(), y: d.head }, ...(d.layer ? [{ name: `mean of layer ${s.layer}`, y: d.layer }] : []), { name: "uniform attention", y: d.uniform }], { x: "k, patches", label: `k-hop profile of ${hs.current()}` });
    } catch (e) { if (mark === hops.mark) host.replaceChildren(el("p", { class: "hs-empty", text: e.message })); }
  }

  /* ---- map of heads ---- */
  let embedded = null;
  async function scatter() {
    const s = hs.state, o = page.overview; if (s.view !== "map" || !o) return;
    if (!parts.scatter) parts.scatter = new R.Scatter($("scatter-host"), {
      open: (n) => { const i = embedded.index[n]; hs.set({ layer: Math.floor(i / page.overview.heads), head: i % page.overview.heads }); }, toggle: (n) => { const i = embedded.index[n]; hs.toggle(headName(page.overview.stack, Math.floor(i / page.overview.heads), i % page.overview.heads)); },
      select: (found, add) => lassoed(found.map((n) => embedded.index[n]), add),
    });
    await hs.guard("map", async (current) => {
      hs.props("c-sy", { disabled: !hs.metric(s.sx) });
      const xm = hs.metric(s.sx), ym = hs.metric(s.sy) || o.metrics.find((m) => m.ready && m !== xm), key = page.info.id + o.stack + s.sx + (xm ? s.sy : "");
      if (!embedded || embedded.key !== key) {
        if (xm && xm.values && ym) {
          const index = [...o.exists.keys()].filter((i) => o.exists[i] === 1 && xm.values[i] === xm.values[i] && ym.values[i] === ym.values[i]);
          embedded = { key, index, x: index.map((i) => xm.values[i]), y: index.map((i) => ym.values[i]), note: `${xm.name} (${xm.unit}) against ${ym.name} (${ym.unit})`, xName: xm.name, yName: ym.name };
        } else {
          $("map-note").textContent = s.sx === "umap" ? "computing UMAP" : "computing";
          const d = await hs.getJson(`run/${page.info.id}/embedding/${o.stack}?method=${s.sx === "umap" ? "umap" : "pca"}`); if (!current()) return;
          embedded = { key, ...d, xName: `${d.method.toUpperCase()} 1`, yName: `${d.method.toUpperCase()} 2` };
        }
        archetypes();
      }
      const m = hs.metric(s.metric), at = new Map(embedded.index.map((i, n) => [i, n])), selected = new Set([...hs.selected(o.stack)].map((i) => at.get(i)).filter((n) => n !== undefined));
      const value = m && m.values ? embedded.index.map((i) => m.values[i]) : null, look = m && m.values ? R.scale(value) : { low: 0, high: 1, name: "viridis" };
      parts.scatter.set({ x: embedded.x, y: embedded.y, value, low: look.low, high: look.high, palette: look.name, xName: embedded.xName, yName: embedded.yName, selected, current: at.get(s.layer * o.heads + s.head) === undefined ? -1 : at.get(s.layer * o.heads + s.head),
        tip: (n) => { const i = embedded.index[n]; return R.rowsNode(headName(o.stack, Math.floor(i / o.heads), i % o.heads), [[embedded.xName, number(embedded.x[n])], [embedded.yName, number(embedded.y[n])], ...(m && m.values ? [[m.name, number(m.values[i])]] : [])]); } });
      parts.scatter.canvas.setAttribute("aria-label", `map of ${embedded.x.length} heads; the table of the overview has the same heads`);
      if (m && m.values) R.colourbar($("scatter-bar"), look.low, look.high, look.name, `${m.name}, ${m.unit}`);
      $("map-note").textContent = `${embedded.note}. ${embedded.x.length} heads; draw a lasso to select.`; $("scatter-host").dataset.points = embedded.x.length;
    });
  }
  function lassoed(indices, add) { hs.select(indices, add); hs.say(`${indices.length} heads selected`); }
  async function archetypes() {
    const host = $("archetypes"); if (!host) return; const o = page.overview;
    await hs.guard("archetypes", async (current) => {
      const d = await hs.getJson(`run/${page.info.id}/archetypes/${o.stack}`); if (!current()) return;
      const cards = d.archetypes.map((a, n) => {
        const [h, w] = d.size, c = el("canvas", { width: w, height: h, class: "hs-arche" }), x = c.getContext("2d"), image = x.createImageData(w, h), values = R.floats(a.map), [, top] = R.range(values);
        values.forEach((v, i) => { const rgb = R.colour(v, 0, top, "viridis", 0.5); image.data.set([...rgb, 255], 4 * i); }); x.putImageData(image, 0, 0);
        return el("button", { type: "button", class: "hs-card", title: "select these heads", onclick: () => lassoed(a.heads, false) }, c, el("span", { text: `${n + 1}: ${a.heads.length} heads` }));
      });
      const train = el("button", { type: "button", class: "hs-button", id: "do-archetypes", text: "Train the autoencoder (about a minute)", onclick: () => hs.guard("archetypes", async () => { const made = await hs.post("archetypes", { run: page.info.id, stack: o.stack }); train.disabled = true; hs.watch(made.job, { done: archetypes, failed: (j) => { train.disabled = false; hs.problem(j.error, "archetypes"); }, cancelled: () => { train.disabled = false; } }); }) });
      host.replaceChildren(el("h2", { text: "Pattern archetypes" }), el("p", { class: "hs-dim", text: d.note }), el("div", { class: "hs-row" }, ...cards), ...(d.note.startsWith("autoencoder") ? [] : [train])); host.dataset.count = d.archetypes.length;
    });
  }

  /* ---- importance ---- */
  function importance() {
    const s = hs.state, o = page.overview; if (s.view !== "importance" || !o) return;
    const all = o.metrics.filter((m) => m.ready), scores = all.filter((m) => m.key.startsWith("s:")), used = all;
    const by = hs.metric(s.metric) && hs.metric(s.metric).ready ? hs.metric(s.metric) : used[0]; if (!by) return;
    const top = hs.ranks(by).order.slice(0, Math.max(5, s.top || 40)), n = used.length, values = new Float32Array(top.length * n), raw = new Float32Array(top.length * n);
    used.forEach((m, j) => { const r = hs.ranks(m); top.forEach((i, row) => { raw[row * n + j] = m.values[i]; values[row * n + j] = m.values[i] === m.values[i] ? 1 - (r.out[i] - 1) / Math.max(1, r.count - 1) : NaN; }); });
    if (!parts.importance) parts.importance = new R.Grid($("importance-host"), { open: (i) => { const h = parts.importance.heads[Math.floor(i / parts.importance.n)]; hs.set({ layer: Math.floor(h / page.overview.heads), head: h % page.overview.heads }); }, toggle: (i) => { const h = parts.importance.heads[Math.floor(i / parts.importance.n)], g = page.overview; hs.toggle(headName(g.stack, Math.floor(h / g.heads), h % g.heads)); } });
    Object.assign(parts.importance, { heads: top, n });
    const chosen = hs.selected(o.stack), here = s.layer * o.heads + s.head;
    parts.importance.set({
      rowMarks: top.map((i) => (i === here ? "current" : chosen.has(i) ? "selected" : "")), rows: top.length, columns: n, values, low: 0, high: 1, palette: "viridis", left: 84, top: 118, cap: 60, capHeight: 17, leastHeight: 15, slanted: true, current: -1, selected: new Set(), pinned: -1, rowNames: top.map((i) => headName(o.stack, Math.floor(i / o.heads), i % o.heads)), columnNames: used.map((m) => m.name),
      tip: (i) => { const row = Math.floor(i / n), m = used[i % n]; return R.rowsNode(headName(o.stack, Math.floor(top[row] / o.heads), top[row] % o.heads), [[m.name, `${number(raw[i])} ${m.unit}`], ["rank", `${hs.ranks(m).out[top[row]]} / ${hs.ranks(m).count}`]]); },
    });
    parts.importance.canvas.setAttribute("aria-label", `${top.length} heads by ${n} metrics, coloured by rank`);
    R.colourbar($("importance-bar"), 0, 1, "viridis", "share of heads that rank lower");
    $("importance-note").textContent = `The ${top.length} first heads by ${by.name}, under every number there is (${scores.length} computed score${scores.length === 1 ? "" : "s"}; ${o.metrics.length - all.length} more can be computed). A click chooses a head, shift-click selects it.`;
    agreement(used); missing(o);
  }
  const GROUPS = [["Importance", ["ablation", "direct_effect", "logit_attribution", "attribution_patching", "activation_patching", "head_gates", "write_norm", "entry_influence", "vit_importance"]], ["Retrieval and copying", ["induction", "prefix_matching", "copying", "ov_copying", "qk_matching", "retrieval", "query_mass"]], ["Vision", ["vision_aware_divergence", "local_vision_divergence", "image_mass", "image_centric", "visual_sink_share", "grounding"]], ["Shape", ["entropy", "sink", "effective_keys", "top_k_mass", "selection_margin", "attention_distance", "redundancy"]]];
  function missing(o) {
    const host = $("importance-compute"), absent = new Map(o.metrics.filter((m) => !m.ready).map((m) => [m.name, m])), known = new Set(GROUPS.flatMap((g) => g[1]));
    const groups = [...GROUPS, ["Other", [...absent.keys()].filter((n) => !known.has(n))]].map(([title, names]) => [title, names.filter((n) => absent.has(n))]).filter(([, names]) => names.length);
    host.replaceChildren(...(groups.length ? [el("span", { class: "hs-dim", text: "compute (as background jobs):" })] : []), ...groups.map(([title, names]) => el("button", { type: "button", class: "hs-button", text: `${title} (${names.length})`, title: names.join(", "), onclick: () => names.forEach((n) => hs.compute(n)) })));
  }
  function agreement(used) {
    const host = $("agreement-host"), n = used.length; if (!host || n < 2) { if (host) host.replaceChildren(); return; }
    const rank = used.map((m) => { const r = hs.ranks(m); return [...r.out].map((v) => (v ? v : NaN)); }), values = new Float32Array(n * n);
    for (let a = 0; a < n; a++) for (let b = 0; b < n; b++) {
      let sa = 0, sb = 0, saa = 0, sbb = 0, sab = 0, c = 0;
      for (let i = 0; i < rank[a].length; i++) { const x = rank[a][i], y = rank[b][i]; if (x === x && y === y) { sa += x; sb += y; saa += x * x; sbb += y * y; sab += x * y; c++; } }
      const den = Math.sqrt((c * saa - sa * sa) * (c * sbb - sb * sb)); values[a * n + b] = den > 0 ? (c * sab - sa * sb) / den : NaN;
    }
    if (!parts.agreement) parts.agreement = new R.Grid(host, { open: (i) => { const a = parts.agreement.used, x = a[Math.floor(i / a.length)].key, y = a[i % a.length].key; hs.set({ view: "map", sx: x, sy: y }); } });
    parts.agreement.used = used;
    parts.agreement.set({ rows: n, columns: n, values, low: -1, high: 1, palette: "blue_red", left: 150, top: 118, cap: 34, capHeight: 24, slanted: true, current: -1, selected: new Set(), pinned: -1, rowNames: used.map((m) => m.name.slice(0, 24)), columnNames: used.map((m) => m.name.slice(0, 24)), tip: (i) => R.rowsNode(`${used[Math.floor(i / n)].name} and ${used[i % n].name}`, [["Spearman's rho", number(values[i])], ["click", "scatter of the two"]]) });
    parts.agreement.canvas.setAttribute("aria-label", "rank agreement of the metrics, Spearman's rho");
  }
  function dissected(d) {
    const host = $("dissect-host"), box = el("div", {}), other = el("div", {});
    const note = (r) => `(${(100 * r.mass).toFixed(1)} % of the map${r.change === null ? "" : `; ${r.change >= 0 ? "+" : ""}${number(r.change)} nats on the answer`})`;
    host.replaceChildren(el("h2", { text: `${d.head}, part by part` }), el("p", { class: "hs-dim", text: "Partial pruning: a part of the head's map is set to zero, and the model's output is compared. Jensen-Shannon divergence from the plain output, bits (0 to 1)." }), el("h2", { text: "The part set to zero" }), box, el("h2", { text: "The same, rows made to sum to 1 again" }), other);
    R.bars(box, d.rows.map((r) => ({ name: r.name, value: r.zeroed, note: note(r) }))); R.bars(other, d.rows.map((r) => ({ name: r.name, value: r.renormalised }))); host.dataset.rows = d.rows.length;
  }
  hs.openers.dissect = async (j) => { if (page.info === null || page.info.id !== j.result.run) await hs.openRun(j.result.run); const h = hs.parse(j.result.head)[0]; hs.set({ view: "importance", stack: h.stack, layer: h.layer, head: h.head }); dissected(j.result); };
  hs.openers.archetypes = async (j) => { if (page.info === null || page.info.id !== j.spec.run) await hs.openRun(j.spec.run); embedded = null; hs.set({ view: "map", stack: j.spec.stack }); scatter(); };
  hs.dissect = () => hs.guard("dissect", async () => {
    const host = $("dissect-host"), name = hs.current(), draw = dissected;
    host.replaceChildren(el("p", { class: "hs-empty", text: `${name} is being taken apart` }));
    const made = await hs.post("dissect", { run: page.info.id, head: name });
    hs.watch(made.job, { partial: (p) => draw(p.partial), done: async (j) => draw((await hs.getJson("job/" + j.id)).result), failed: (j) => { host.replaceChildren(); hs.problem(j.error, "dissect"); }, cancelled: () => hs.say("the dissection was stopped") });
  });

  /* ---- sinks ---- */
  async function sinks() {
    const s = hs.state; if (s.view !== "sinks" || !page.info || !page.overview) return;
    await hs.guard("sinks", async (current) => {
      const d = await hs.getJson(`run/${page.info.id}/sinks/${s.stack}?threshold=${s.thr}&rows=${encodeURIComponent(s.rows || "")}`); if (!current()) return;
      hs.props("c-rows", { data: [{ value: "", label: "all rows" }, ...d.groups.map((g) => ({ value: g, label: `${g} rows` }))].filter((x, i, a) => a.length > 2 || i > 0 || true) });
      const matrix = R.floats(d.matrix), on = R.floats(d.on_sinks), names = d.keys.map((k) => `${k.position} ${visible(k.token)}`.slice(0, 12));
      if (!parts.sinkGrid) parts.sinkGrid = new R.Grid($("sink-matrix"), { open: (i) => hs.set({ view: "head", k: parts.sinkKeys[i % parts.sinkKeys.length].position, dir: "to", layer: Math.floor(i / parts.sinkKeys.length) }) });
      parts.sinkKeys = d.keys; const [, most] = R.range(matrix);
      parts.sinkGrid.set({ rows: d.layers, columns: d.keys.length, values: matrix, low: 0, high: most, palette: "viridis", top: 84, cap: 40, slanted: true, columnNames: names, current: -1, selected: new Set(), pinned: -1, order: null,
        tip: (i) => R.rowsNode(`layer ${Math.floor(i / d.keys.length)}, key ${names[i % d.keys.length]}`, [["received", `${number(matrix[i])} of each row (mean over heads)`], ["heads with a sink here", `${(100 * d.keys[i % d.keys.length].share).toFixed(1)} %`]]) });
      parts.sinkGrid.canvas.setAttribute("aria-label", "attention received by layer and key");
      R.colourbar($("sink-bar"), 0, most, "viridis", "mean attention received, fraction of row mass");
      if (!parts.sinkHeads) parts.sinkHeads = new R.Grid($("sink-heads"), { open: (i) => { const g = page.overview; hs.set({ layer: Math.floor(i / g.heads), head: i % g.heads, view: "head" }); }, toggle: (i) => { const g = page.overview; hs.toggle(headName(g.stack, Math.floor(i / g.heads), i % g.heads)); }, select: (f, add) => hs.select(f, add) });
      parts.sinkHeads.set({ rows: d.layers, columns: d.heads, values: on, low: 0, high: 1, palette: "viridis", order: null, current: s.layer * d.heads + s.head, selected: hs.selected(s.stack), pinned: -1, tip: (i) => R.rowsNode(headName(s.stack, Math.floor(i / d.heads), i % d.heads), [["on sink tokens", number(on[i])]]) });
      parts.sinkHeads.canvas.setAttribute("aria-label", "share of attention on sink tokens by head");
      const found = d.keys.filter((k) => k.share > 0);
      $("sink-list").replaceChildren(el("h2", { text: `Sink tokens: ${d.n_sinks}` }), found.length ? el("table", { class: "hs-table" }, el("tr", {}, ...["key", "token", "heads", "mean received"].map((t) => el("th", { text: t }))), ...found.slice(0, 20).map((k) => el("tr", {}, el("td", { text: k.position }), el("td", { text: visible(k.token) }), el("td", { text: `${(100 * k.share).toFixed(1)} %` }), el("td", { text: number(k.mass) })))) : el("p", { class: "hs-empty", text: `No key receives more than ${d.threshold} of the rows of any head. Lower the threshold.` }));
      $("sink-list").dataset.count = d.n_sinks;
    });
  }
  hs.showActivations = () => hs.guard("activations", async () => {
    const host = $("massive"); host.textContent = "running the model";
    try {
      const d = await hs.getJson(`run/${page.info.id}/activations`), box = el("div", {}), any = d.rows.filter((r) => r.massive), best = d.rows.reduce((a, b) => (b.ratio > a.ratio ? b : a));
      host.replaceChildren(el("h2", { text: "Massive activations" }), el("p", { class: "hs-dim", text: `${d.sites}. ${any.length ? `Massive (above 100 and 1000 × the median) in ${any.length} layers.` : "None is above 100 and 1000 times the median."} Largest ratio ${number(best.ratio)} at layer ${best.layer}, position ${best.position} “${visible(best.token)}”, dimension ${best.dim}.` }), box);
      R.lines(box, [{ name: "largest magnitude", y: d.rows.map((r) => r.largest) }, { name: "median magnitude", y: d.rows.map((r) => r.median) }], { x: "layer", label: "largest and median magnitude of the residual stream by layer" });
    } catch (e) { host.replaceChildren(); throw e; }
  });

  hs.announceStack = () => { embedded = null; shown = null; image(); scatter(); importance(); sinks(); };
  hs.subscribe((s, changed) => {
    const any = (...keys) => keys.some((k) => k in changed);
    if (changed.run === true) { shown = null; embedded = null; for (const id of ["dissect-host", "massive", "hops"]) if ($(id)) $(id).replaceChildren(); }
    if (any("run", "view", "layer", "head", "q", "k", "dir", "mean", "sel", "theme")) image();
    if (any("run", "view", "sx", "sy", "metric", "sel", "layer", "head", "theme")) scatter();
    if (any("run", "view", "metric", "top", "theme", "layer", "head", "sel")) importance();
    if (any("run", "view", "thr", "rows", "sel", "layer", "head", "theme")) sinks();
  });
  document.addEventListener("input", (e) => {
    if (e.target.id === "step") hs.set({ q: Number(e.target.value), k: null, dir: "from" }, "replace");
    if (e.target.id === "opacity" && shown) for (const v of shown.views) v.set({ opacity: Number(e.target.value) / 100 });
  });
})();
