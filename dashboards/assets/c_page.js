/* The page's state, its address, what comes from the server, the keyboard. Views (d_*.js) subscribe to it. */
(function () {
  "use strict";
  const R = window.headscopeRender, { el } = R;
  const DEFAULTS = {
    model: "", run: "", prompt: "", image: "", chat: true, new: 24, view: "overview", stack: "", layer: 0, head: 0, q: null, k: null, dir: "from", metric: "", thumbs: false, sort: "none",
    top: 0, sel: "", norm: false, hide: false, gamma: 0.5, pin: "", pinrun: "", mean: false, sx: "pca", sy: "", thr: 0.3, rows: "", wb: "", wnew: 32, seed: 0, sample: false, temp: 1, saved: "", zoom: 1,
  };
  const VIEWS = ["overview", "head", "image", "map", "importance", "sinks", "workbench"];
  const subscribers = [], marks = {};
  let state = { ...DEFAULTS }, lastPush = 0, quiet = false, booted = false;

  function read(search) {
    const given = new URLSearchParams(search), found = {};
    for (const [key, other] of Object.entries(DEFAULTS)) {
      if (!given.has(key)) { found[key] = other; continue; }
      const text = given.get(key);
      if (typeof other === "boolean") found[key] = text === "1";
      else if (typeof other === "number" || key === "q" || key === "k") { const n = Number(text); found[key] = text !== "" && Number.isFinite(n) ? n : other; }
      else found[key] = text.slice(0, 20000);
    }
    if (!VIEWS.includes(found.view)) found.view = "overview";
    return found;
  }
  function address(s) {
    const out = new URLSearchParams();
    for (const [key, other] of Object.entries(DEFAULTS)) {
      const v = s[key];
      if (v === other || v === null || v === undefined || v === "" || (key === "prompt" && v.length > 1500)) continue;
      out.set(key, typeof v === "boolean" ? (v ? "1" : "0") : String(v));
    }
    const text = out.toString();
    return location.pathname + (text ? "?" + text : "");
  }
  function set(patch, how) {
    const changed = {};
    for (const [key, v] of Object.entries(patch)) if (key in DEFAULTS && state[key] !== v) changed[key] = v;
    if (!Object.keys(changed).length) return;
    state = { ...state, ...changed };
    if (how !== "none") {
      const url = address(state), now = performance.now(), steps = ["view", "run", "stack", "layer", "head", "metric", "sel", "pin", "saved"];
      const step = steps.some((k) => k in changed) && how !== "replace";
      /* A key held down is one step back, not forty. */
      if (step && now - lastPush > 350) history.pushState(null, "", url); else history.replaceState(null, "", url);
      if (step) lastPush = now;
    }
    announce(changed);
  }
  function announce(changed) {
    toControls(changed);
    props("state", { data: state });
    for (const f of subscribers) { try { f(state, changed); } catch (e) { console.error(e); problem(String(e.message || e)); } }
  }
  function subscribe(f) { subscribers.push(f); }
  window.addEventListener("popstate", () => {
    const next = read(location.search), changed = {};
    for (const key of Object.keys(DEFAULTS)) if (state[key] !== next[key]) changed[key] = next[key];
    state = next; if (Object.keys(changed).length) announce(changed);
  });

  /* Controls of Dash: id of the control -> key of the state. */
  const controls = {
    model: ["model", "value"], run: ["run", "value"], view: ["view", "value"], stack: ["stack", "value"], metric: ["metric", "value"], thumbs: ["thumbs", "checked"], sort: ["sort", "value"],
    top: ["top", "value"], zoom: ["zoom", "value"], norm: ["norm", "checked"], hide: ["hide", "checked"], gamma: ["gamma", "value"], dir: ["dir", "value"], mean: ["mean", "checked"], sx: ["sx", "value"], sy: ["sy", "value"],
    thr: ["thr", "value"], rows: ["rows", "value"], pinrun: ["pinrun", "value"], prompt: ["prompt", "value"], new: ["new", "value"], chat: ["chat", "checked"],
  };
  const shown = {};
  function props(id, values) { if (window.dash_clientside && dash_clientside.set_props) dash_clientside.set_props(id, values); }
  function toControls(changed) {
    for (const key of Object.keys(changed)) {
      const c = controls[key]; if (!c || shown[key] === state[key]) continue;
      shown[key] = state[key]; props("c-" + key, { [c[1]]: state[key] });
    }
  }
  function control(key, value) {
    if (!booted || value === undefined) return;
    if (value === null) value = DEFAULTS[key];
    if (shown[key] === value) return;
    shown[key] = value;
    if (key === "run") { if (value) openRun(value); return; }
    if (key === "model") { set({ model: value }, "replace"); return; }
    set({ [key]: value }, key === "prompt" || key === "new" || key === "chat" ? "replace" : undefined);
  }

  /* Server. */
  async function ask(path, options) {
    const o = options || {};
    let answer;
    try { answer = await fetch("api/" + path, o); } catch (e) { if (e.name === "AbortError") throw e; throw new Error("the server does not answer: is it still running?"); }
    if (!answer.ok) {
      let text = answer.statusText;
      try { text = (await answer.json()).error || text; } catch (e) { if (answer.status === 413) text = "too large: at most 32 MB"; }
      const error = new Error(text); error.status = answer.status; throw error;
    }
    return answer;
  }
  const getJson = async (path, signal) => (await ask(path, { signal })).json();
  const getFloats = async (path, signal) => new Float32Array(await (await ask(path, { signal })).arrayBuffer());
  const post = async (path, body) => (await ask(path, { method: "POST", headers: { "Content-Type": "application/json", "X-Headscope": "1" }, body: JSON.stringify(body || {}) })).json();

  /* Messages stay until they are dismissed. */
  function problem(text, id) {
    const host = document.getElementById("problems"); if (!host) return;
    if (id) for (const old of host.querySelectorAll(`[data-of="${id}"]`)) old.remove();
    if ([...host.children].some((c) => c.firstChild.textContent === text)) return;
    const box = el("div", { class: "hs-problem", "data-of": id || "" }, el("span", { text }), el("button", { type: "button", "aria-label": "dismiss", text: "×", onclick: () => box.remove() }));
    host.append(box); while (host.children.length > 5) host.firstChild.remove();
  }
  function solved(id) { const host = document.getElementById("problems"); if (host) for (const old of host.querySelectorAll(`[data-of="${id}"]`)) old.remove(); }
  function say(text) { const s = document.getElementById("status"); if (s) s.textContent = text; }
  async function guard(id, work) {
    const mark = (marks[id] = (marks[id] || 0) + 1);
    try { const out = await work(() => marks[id] === mark); if (marks[id] === mark) solved(id); return out; }
    catch (e) { if (e.name !== "AbortError" && marks[id] === mark) problem(e.message, id); return undefined; }
  }

  /* Runs. */
  const page = { info: null, overview: null, tokens: null };
  async function openRun(run) {
    await guard("run", async (current) => {
      say("opening the run");
      let info;
      try { info = await getJson("run/" + encodeURIComponent(run)); }
      catch (e) {
        if (e.status !== 404) throw e;
        let made;
        try { made = await post(`run/${encodeURIComponent(run)}/reopen`); }
        catch (again) { if (state.model && (state.prompt || state.image)) made = await post("run", wish()); else throw again; }
        if (made.job) { watch(made.job, { done: () => openRun(made.run), failed: (j) => problem(j.error, "run") }); say("tracing the prompt again"); set({ run: made.run }, "replace"); return; }
        info = await getJson("run/" + made.run);
      }
      if (current()) await use(info);
    });
  }
  async function use(info) {
    const stacks = Object.keys(info.stacks), stack = stacks.includes(state.stack) ? state.stack : stacks.includes("text") ? "text" : stacks[0];
    const s = info.stacks[stack];
    page.info = info; page.overviews = {};
    const patch = { run: info.id, stack, layer: Math.min(state.layer, s.layers - 1), head: Math.min(state.head, s.heads - 1), model: info.model || state.model };
    if (!info.saved) Object.assign(patch, { prompt: info.prompt, chat: info.chat, new: info.max_new_tokens, image: info.image || "" });
    if (state.q !== null && state.q >= s.queries) patch.q = null;
    props("c-stack", { data: stacks.map((v) => ({ value: v, label: v })), value: stack }); shown.stack = stack;
    document.body.dataset.open = info.id;
    const answer = document.getElementById("answer"); if (answer) { answer.textContent = info.answer || (info.silent ? "(nothing: the model ended its answer at once)" : ""); answer.hidden = !answer.textContent; answer.classList.toggle("hs-empty", !info.answer); }
    const welcome = document.getElementById("welcome"); if (welcome) welcome.hidden = true;
    const fresh = state.run !== info.id;
    set(patch, fresh && booted && state.run ? undefined : "replace"); props("state", { data: state });
    await loadOverview();
    for (const f of subscribers) { try { f(state, { run: true }); } catch (e) { console.error(e); problem(String(e.message || e)); } }
    say(`${info.title || "run"} is open`);
    document.body.dataset.ready = info.id;
    refreshPickers();
  }
  async function loadOverview() {
    const stack = state.stack; if (!page.info || !stack) return;
    await guard("overview", async (current) => {
      const data = await getJson(`run/${page.info.id}/overview/${stack}`);
      if (!current()) return;
      for (const m of data.metrics) for (const k of ["values", "se", "null"]) m[k] = R.floats(m[k]);
      data.exists = R.floats(data.exists);
      data.sprite = null;
      page.overview = data;
      const options = [["this prompt", "p:"], ["scores of the model", "s:"]].map(([group, start]) => ({ group, items: data.metrics.filter((m) => m.key.startsWith(start)).map((m) => ({ value: m.key, label: m.ready ? m.name : `${m.name} (not computed)` })) })).filter((g) => g.items.length);
      props("c-metric", { data: options });
      const axes = [{ group: "embedding", items: [{ value: "pca", label: "PCA" }, { value: "umap", label: "UMAP" }] }, { group: "values", items: data.metrics.filter((m) => m.ready).map((m) => ({ value: m.key, label: m.name })) }];
      props("c-sx", { data: axes }); props("c-sy", { data: axes.slice(1) });
      if (!data.metrics.some((m) => m.key === state.metric)) set({ metric: (data.metrics.find((m) => m.ready) || { key: "" }).key }, "replace");
    });
  }
  async function refreshPickers() {
    const found = await guard("pickers", () => getJson("models")); if (!found) return;
    const models = found.models.slice(); if (state.model && !models.includes(state.model)) models.push(state.model);
    props("c-model", { data: models.map((v) => ({ value: v, label: v.split("/").pop() || v })) });
    const runs = found.runs.map((r) => ({ value: r.value, label: r.label + (r.model ? ` · ${r.model.split("/").pop()}` : "") }));
    props("c-run", { data: runs }); props("c-pinrun", { data: runs });
    if (state.run) { shown.run = state.run; props("c-run", { value: state.run }); }
    if (state.model) { shown.model = state.model; props("c-model", { value: state.model }); }
    return found;
  }
  function wish(more) { return Object.assign({ model: state.model, prompt: state.prompt, image: state.image || null, chat: state.chat, max_new_tokens: Number(state.new) || 0, interventions: [] }, more || {}); }
  async function trace() {
    await guard("run", async () => {
      if (!state.model) throw new Error("pick a model first");
      const made = await post("run", wish());
      if (!made.job) { await openRun(made.run); return; }
      const answer = document.getElementById("answer"); if (answer) { answer.textContent = ""; answer.hidden = false; }
      say("tracing");
      watch(made.job, {
        token: (t) => { if (answer) { if (t.whole !== undefined) answer.textContent = t.whole; else answer.append(t.text); answer.dataset.at = Date.now() / 1000 - t.at; } },
        done: () => openRun(made.run), failed: (j) => problem(j.error, "run"), cancelled: () => say("tracing was stopped"),
      });
    });
  }

  /* Jobs: one stream of events for the tab. */
  const watched = new Map(), jobs = new Map();
  let source = null;
  function watch(job, handlers) {
    watched.set(job, handlers);
    /* It may have ended before its events were listened to. */
    getJson("job/" + job).then((j) => { if (watched.get(job) === handlers && ["done", "failed", "cancelled"].includes(j.state)) ended(j); }).catch(() => {});
  }
  function ended(j) { const h = watched.get(j.id); if (!h) return; watched.delete(j.id); if (h[j.state]) h[j.state](j); }
  function listen() {
    source = new EventSource("api/events");
    const on = (name, f) => source.addEventListener(name, (e) => f(JSON.parse(e.data)));
    on("job", (j) => { jobs.set(j.id, j); drawJobs(); if (["done", "failed", "cancelled"].includes(j.state)) { if (j.state === "failed" && !watched.has(j.id)) say(`${j.title} failed: ${j.error}`); ended(j); } for (const f of jobListeners) f(j); });
    on("progress", (p) => { const j = jobs.get(p.job); if (j) { Object.assign(j, p, { id: p.job }); drawJobs(); } call(p.job, "progress", p); });
    for (const name of ["token", "partial", "side", "control"]) on(name, (d) => call(d.job, name, d));
    on("note", (d) => say(d.text));
    source.onopen = () => { document.body.dataset.stream = "open"; solved("stream"); };
    source.onerror = () => { document.body.dataset.stream = "lost"; if (source.readyState === 2) setTimeout(listen, 2000); };
    getJson("jobs").then((found) => { for (const j of found.jobs.reverse()) jobs.set(j.id, j); drawJobs(); }).catch(() => {});
  }
  const jobListeners = [];
  /* By kind of job, what shows its result; views add theirs. A job that was resumed after a restart has nobody who waits for it. */
  const openers = {
    run: (j) => openRun(j.result.run),
    score: async (j) => { if (j.spec.run && (!state.run || state.model !== j.spec.model)) await openRun(j.spec.run); set({ view: "overview", stack: j.result.stack, metric: "s:" + j.result.score }); },
  };
  function call(job, name, data) { const h = watched.get(job); if (h && h[name]) h[name](data); }
  function drawJobs() {
    const host = document.getElementById("jobs"); if (!host) return;
    const all = [...jobs.values()].reverse(), running = all.filter((j) => ["queued", "running"].includes(j.state));
    const badge = document.getElementById("jobs-count"); if (badge) badge.textContent = running.length ? `Jobs (${running.length})` : "Jobs";
    host.replaceChildren(...all.slice(0, 30).map((j) => {
      const live = ["queued", "running"].includes(j.state), share = j.total ? Math.round((100 * j.done) / j.total) : j.state === "done" ? 100 : 0;
      const row = el("div", { class: "hs-job hs-" + j.state }, el("div", {}, el("b", { text: j.title }), el("span", { text: ` ${j.state}${!live && j.seconds ? ` in ${j.seconds.toFixed(1)} s` : ""}${j.total ? ` ${j.done}/${j.total}` : ""}${live && j.eta !== null && j.eta !== undefined ? `, ${j.eta} s to go` : ""}` })));
      if (live) { row.append(el("progress", { max: "100", ...(j.total ? { value: String(share) } : {}), "aria-label": j.title }), el("button", { type: "button", class: "hs-button", text: "Cancel", onclick: () => guard("cancel", () => post(`job/${j.id}/cancel`)) })); }
      if (j.state === "done" && openers[j.kind]) row.append(el("button", { type: "button", class: "hs-button", text: "Open", "aria-label": `open the result of ${j.title}`, onclick: () => guard("open", async () => { await openers[j.kind](await getJson("job/" + j.id)); props("jobs-drawer", { opened: false }); }) }));
      if (j.error) row.append(el("div", { class: "hs-cause", text: j.error }));
      return row;
    }));
    if (!all.length) host.replaceChildren(el("p", { class: "hs-empty", text: "No jobs yet: scores, evaluations and dissections appear here." }));
  }

  /* Selection and heads. */
  function parse(text) {
    const out = [];
    for (const t of (text || "").split(",")) {
      const m = /^(?:([A-Za-z_]\w*)\.)?L(\d+)H(\d+)(?:-(\d+))?$/.exec(t.trim()); if (!m) continue;
      for (let h = +m[3]; h <= Math.min(+(m[4] || m[3]), +m[3] + 4096); h++) out.push({ stack: m[1] || "text", layer: +m[2], head: h });
    }
    return out;
  }
  const list = () => parse(state.sel).map((h) => R.headName(h.stack, h.layer, h.head));
  /* A large selection as ranges (L0H0-63): all heads of a large model are a few hundred characters. */
  function pack(names) {
    if (names.length <= 64) return names.join(",");
    const rows = new Map(), out = [];
    for (const h of parse(names.join(","))) { const key = R.headName(h.stack, h.layer, ""); if (!rows.has(key)) rows.set(key, new Set()); rows.get(key).add(h.head); }
    for (const [key, set] of rows) {
      const heads = [...set].sort((a, b) => a - b);
      for (let i = 0; i < heads.length; ) { let j = i; while (heads[j + 1] === heads[j] + 1) j++; out.push(`${key}${heads[i]}${j > i ? "-" + heads[j] : ""}`); i = j + 1; }
    }
    return out.join(",");
  }
  function selected(stack) { const o = page.overview; const out = new Set(); if (o) for (const h of parse(state.sel)) if (h.stack === stack) out.add(h.layer * o.heads + h.head); return out; }
  function select(indices, add) {
    const o = page.overview, names = indices.map((i) => R.headName(o.stack, Math.floor(i / o.heads), i % o.heads));
    set({ sel: pack([...new Set([...(add ? list() : []), ...names])]) });
  }
  function toggle(name) { const all = list(), at = all.indexOf(name); if (at >= 0) all.splice(at, 1); else all.push(name); set({ sel: pack(all) }); }
  function current() { return R.headName(state.stack, state.layer, state.head); }
  function exists(layer, head) { const o = page.overview; return Boolean(o && layer >= 0 && head >= 0 && layer < o.layers && head < o.heads && o.exists[layer * o.heads + head] === 1); }
  function move(dl, dh) {
    const o = page.overview; if (!o) return;
    let { layer, head } = state;
    if (dh) { let i = layer * o.heads + head; do { i += dh; } while (i >= 0 && i < o.layers * o.heads && o.exists[i] !== 1); if (i < 0 || i >= o.layers * o.heads) return; layer = Math.floor(i / o.heads); head = i % o.heads; }
    if (dl) { do { layer += dl; } while (layer >= 0 && layer < o.layers && !exists(layer, head)); if (layer < 0 || layer >= o.layers) return; }
    set({ layer, head });
  }

  /* Keyboard. */
  const KEYS = [["← → or h l", "previous / next head"], ["↑ ↓ or k j", "layer up / down"], ["[ ]", "previous / next token"], ["Enter", "open the head"], ["1 … 7", "views"], ["s", "select or unselect the head"], ["p", "pin the head for comparison"], ["n", "row-normalise"], ["x", "hide sink columns"],
    ["d", "query to key / key to query"], ["t", "thumbnails"], ["/", "search a head, such as L3H1"], ["c", "show code"], ["Ctrl-Enter", "in the prompt: trace it"], ["?", "this sheet"], ["Esc", "unlock, close"]];
  document.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey) { if (e.key === "Enter" && e.target.id === "c-prompt") trace(); return; }
    const field = e.target.closest("input, textarea, select, [contenteditable=true], [role=listbox], [role=slider], [role=radiogroup], .ag-root");
    if (field && e.key !== "Escape") return;
    if (e.key !== "Escape" && [...document.querySelectorAll("[role=dialog]")].some((d) => d.checkVisibility())) return;
    const s = state, step = (d) => { const n = page.info && page.info.stacks[s.stack]; if (n) set({ q: Math.max(0, Math.min(n.queries - 1, (s.q === null ? (d > 0 ? -1 : n.queries) : s.q) + d)) }, "replace"); };
    const actions = {
      ArrowLeft: () => move(0, -1), h: () => move(0, -1), ArrowRight: () => move(0, 1), l: () => move(0, 1), ArrowUp: () => move(-1, 0), k: () => move(-1, 0), ArrowDown: () => move(1, 0), j: () => move(1, 0),
      "[": () => step(-1), "]": () => step(1), Enter: () => set({ view: "head" }), s: () => toggle(current()), p: () => set({ pin: s.pin === current() ? "" : current() }), n: () => set({ norm: !s.norm }), x: () => set({ hide: !s.hide }),
      d: () => set({ dir: s.dir === "from" ? "to" : "from" }), t: () => set({ thumbs: !s.thumbs }), "/": () => { const f = document.getElementById("find"); if (f) f.focus(); }, c: () => document.getElementById("show-code").click(), "?": () => document.getElementById("help").click(),
      Escape: () => { set({ q: null, k: null }, "replace"); R.tooltip.hide(); if (document.activeElement) document.activeElement.blur(); },
    };
    const view = VIEWS[Number(e.key) - 1];
    if (view) set({ view }); else if (actions[e.key] && !(e.key === "Enter" && e.target.closest("button, a"))) actions[e.key](); else return;
    e.preventDefault();
  });

  /* Files out. */
  function download(name, data, type) {
    const url = data instanceof Blob ? URL.createObjectURL(data) : URL.createObjectURL(new Blob([data], { type }));
    const a = el("a", { href: url, download: name }); document.body.append(a); a.click(); a.remove(); setTimeout(() => URL.revokeObjectURL(url), 5000);
  }
  function link() { return location.origin + address(state); }

  /* Pictures in. */
  async function addImage(file) {
    await guard("image", async () => {
      if (file.size > 32 * 2 ** 20) throw new Error("image must be at most 32 MB");
      const found = await (await ask("image", { method: "POST", headers: { "X-Headscope": "1", "Content-Type": "application/octet-stream" }, body: file })).json();
      const all = state.image.split(",").filter(Boolean); if (!all.includes(found.image)) set({ image: [...all, found.image].join(",") }, "replace");
    });
  }

  function themed() {
    const dark = document.documentElement.getAttribute("data-mantine-color-scheme") === "dark";
    document.documentElement.setAttribute("data-ag-theme-mode", dark ? "dark" : "light");
    for (const f of subscribers) f(state, { theme: true });
  }
  async function boot() {
    if (booted) return;
    state = read(location.search);
    for (const key of Object.keys(controls)) { shown[key] = state[key]; if (state[key] !== DEFAULTS[key] && key !== "run") props("c-" + key, { [controls[key][1]]: state[key] }); }
    new MutationObserver(themed).observe(document.documentElement, { attributes: true, attributeFilter: ["data-mantine-color-scheme"] });
    themed(); listen();
    const found = await refreshPickers();
    booted = true;
    for (const f of subscribers) f(state, { ...state, boot: true });
    document.body.dataset.booted = "1";
    if (state.run) await openRun(state.run);
    else if (state.model && state.prompt) await trace();
    else {
      if (!state.model && found && found.models.length) { set({ model: found.models[0] }, "replace"); shown.model = found.models[0]; props("c-model", { value: found.models[0] }); }
      const first = found && found.runs[0]; if (first && page.auto) await openRun(first.value);
      else { if (!state.prompt) { const box = document.getElementById("c-prompt"); if (box && box.value) set({ prompt: box.value }, "replace"); } const w = document.getElementById("welcome"); if (w) w.hidden = false; say(""); }
    }
  }
  window.hs = { get state() { return state; }, page, set, subscribe, control, ask, getJson, getFloats, post, problem, solved, say, guard, openRun, trace, watch, jobs, jobListeners, openers, parse, list, pack, selected, select, toggle, current, exists, move, KEYS, VIEWS, download, link, addImage, boot, props, wish, loadOverview, refreshPickers, DEFAULTS };
})();
