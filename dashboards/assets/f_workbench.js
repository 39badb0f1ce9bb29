/* The workbench: interventions as cards, before and after streamed, and what the change is worth. */
(function () {
  "use strict";
  const R = window.headscopeRender, { el, number, visible } = R, hs = window.hs, page = hs.page, $ = (id) => document.getElementById(id);
  let offered = null, job = null, last = null;
  const read = () => { try { const v = JSON.parse(hs.state.wb || "[]"); return Array.isArray(v) ? v : []; } catch (e) { return []; } };
  const write = (cards) => hs.set({ wb: cards.length ? JSON.stringify(cards) : "" }, "replace");

  async function load() {
    if (offered) return offered;
    offered = (await hs.getJson("cards")).cards;
    const select = $("add-card");
    select.replaceChildren(el("option", { value: "", text: "Add an intervention…" }), ...offered.map((c) => { const o = el("option", { value: c.name, text: c.missing ? `${c.name} (from Python: ${c.missing})` : `${c.name}: ${c.summary}`.slice(0, 110) }); o.disabled = Boolean(c.missing); return o; }));
    const probes = (await hs.getJson("probes")).probes;
    $("probe").replaceChildren(...probes.map((p) => el("option", { value: p.value, title: p.summary, text: `${p.label}: ${p.summary}`.slice(0, 90) })));
    return offered;
  }
  function field(card, spec, n) {
    return (f) => {
      const value = f.name in spec.settings ? spec.settings[f.name] : f.default, id = `card-${n}-${f.name}`;
      const keep = (v) => { const cards = read(); if (!cards[n]) return; if (v === "" || v === undefined) delete cards[n].settings[f.name]; else cards[n].settings[f.name] = v; write(cards); };
      let input;
      if (f.kind === "heads") {
        input = el("input", { id, type: "text", value: value || "", placeholder: f.required ? "L3H1,L5H0-3" : "all", onchange: (e) => keep(e.target.value.trim()) });
        return el("label", { class: "hs-field hs-wide", title: f.help }, el("span", { text: f.name + (f.required ? " *" : "") }), el("span", { class: "hs-row" }, input, el("button", { type: "button", class: "hs-button", text: `Use selection (${hs.parse(hs.state.sel).length})`, onclick: () => { keep(hs.state.sel); draw(); } })));
      }
      if (f.kind === "choice") { input = el("select", { id, onchange: (e) => keep(e.target.value) }, ...f.choices.map((c) => el("option", { value: c, text: c }))); input.value = value === null ? f.choices[0] : value; }
      else if (f.kind === "flag") { input = el("input", { id, type: "checkbox", onchange: (e) => keep(e.target.checked) }); input.checked = Boolean(value); }
      else if (f.kind === "number" || f.kind === "integer") input = el("input", { id, type: "number", step: f.kind === "integer" ? "1" : "any", value: value === null || value === undefined ? "" : value, onchange: (e) => keep(e.target.value === "" ? "" : Number(e.target.value)) });
      else input = el("input", { id, type: "text", value: value === null || value === undefined ? "" : Array.isArray(value) ? value.join(",") : value, placeholder: f.required ? f.help.slice(0, 60) : "default", size: f.required ? "34" : null, onchange: (e) => keep(e.target.value) });
      return el("label", { class: "hs-field", title: f.help }, el("span", { text: f.name + (f.required ? " *" : "") }), input);
    };
  }
  async function draw() {
    const host = $("cards"); if (!host || hs.state.view !== "workbench") return;
    const known = await hs.guard("cards", load); if (!known) return;
    const cards = read();
    host.replaceChildren(...cards.map((spec, n) => {
      const card = known.find((c) => c.name === spec.name); spec.settings = spec.settings || {};
      if (!card) return el("div", { class: "hs-box" }, el("p", { text: `${spec.name} is not registered here` }));
      return el("div", { class: "hs-box hs-intervention", "data-name": spec.name }, el("div", { class: "hs-row" }, el("b", { text: card.name }), el("span", { class: "hs-dim", text: card.stacks.includes("any") ? "any stack" : card.stacks.join(", ") }), el("span", { class: "hs-fill" }), el("button", { type: "button", class: "hs-button", "aria-label": `remove ${card.name}`, text: "×", onclick: () => { const c = read(); c.splice(n, 1); write(c); draw(); } })),
        el("p", { class: "hs-dim", text: card.summary + (card.needs ? ` Needs: ${card.needs}.` : "") }), el("div", { class: "hs-fields" }, ...card.fields.map(field(card, spec, n))));
    }), ...(cards.length ? [] : [el("p", { class: "hs-empty", text: "No intervention yet: add one above. Its heads can be the selection; VHR, VAR and PAI choose for themselves." })]));
    saved();
  }
  function wish() { options(); const s = hs.state; return hs.wish({ interventions: read(), max_new_tokens: s.wnew || 32, seed: s.seed, do_sample: s.sample, temperature: s.temp || 1 }); }
  /* Options of a run live in the address, as all else does. */
  function options() { hs.set({ wnew: Number($("wb-new").value) || 32, seed: Number($("wb-seed").value) || 0, sample: $("wb-sample").checked, temp: Number($("wb-temperature").value) || 1 }, "replace"); }
  function showOptions(s) { for (const [id, v] of [["wb-new", s.wnew], ["wb-seed", s.seed], ["wb-temperature", s.temp]]) if (document.activeElement !== $(id)) $(id).value = v; $("wb-sample").checked = s.sample; $("wb-temperature").disabled = !s.sample; }
  async function run() {
    await hs.guard("workbench", async () => {
      if (!hs.state.model) throw new Error("pick a model first");
      /* What is shown is of an earlier wish from here on, whether this one is taken or not. */
      clear(); let made;
      try { made = await hs.post("generate", wish()); } catch (e) { $("verdict").textContent = ""; throw e; }
      job = made.job; busy(true); hs.set({ saved: "" }, "replace");
      let side = "before";
      hs.watch(job, {
        side: (d) => { side = d.side; const t = $("text-" + side); t.textContent = ""; t.classList.add("hs-live"); },
        token: (d) => { const t = $("text-" + d.side); if (d.whole !== undefined) t.textContent = d.whole; else t.append(d.text); t.dataset.at = String(Date.now() / 1000 - d.at); },
        partial: (d) => { for (const s of ["before", "after"]) $("text-" + s).classList.remove("hs-live"); diff(d.partial); $("verdict").textContent = "measuring the change against random heads"; },
        control: (d) => { $("verdict").textContent = `random heads ${d.done} / ${d.total}`; },
        done: async (j) => { busy(false); show((await hs.getJson("job/" + j.id)).result); }, failed: (j) => { busy(false); $("verdict").textContent = ""; hs.problem(j.error, "workbench"); },
        cancelled: () => { busy(false); $("verdict").textContent = "stopped; the model is as it was"; },
      });
    });
  }
  function clear() { last = null; for (const s of ["before", "after"]) { $("text-" + s).textContent = ""; $("text-" + s).classList.remove("hs-live"); } $("verdict").textContent = "running"; delete $("verdict").dataset.done; for (const id of ["effect", "curves", "wb-after-buttons"]) $(id).replaceChildren(); }
  function busy(on) { $("wb-run").disabled = on; $("wb-stop").disabled = !on; if (!on) for (const s of ["before", "after"]) $("text-" + s).classList.remove("hs-live"); }
  function diff(r) {
    for (const side of ["before", "after"]) $("text-" + side).replaceChildren(...r.diff.filter((d) => d[side]).map((d) => el(d.op === "equal" ? "span" : side === "before" ? "del" : "ins", { text: d[side] })));
  }
  function show(r) {
    last = r; diff(r); $("verdict").textContent = r.verdict; $("verdict").dataset.done = "1";
    const e = r.effect, host = $("effect"); host.replaceChildren();
    if (e.change !== null && e.change !== undefined) {
      const box = el("div", {}); host.append(el("h2", { text: "Log-probability of the plain answer, change in nats" }), box);
      R.bars(box, [{ name: "this change", value: e.change, strong: true }, ...(e.random || []).map((x, i) => ({ name: `random heads ${i + 1}: ${x.heads}`, value: x.change }))], { signed: true });
      if (e.why) host.append(el("p", { class: "hs-dim", text: e.why }));
      const token = el("div", {}); host.append(el("h2", { text: "By token of the plain answer" }), token);
      R.lines(token, [{ name: "plain", y: e.plain }, { name: "changed", y: e.changed }], { x: "token", ticks: e.tokens, zero: true, label: "log-probability by token, plain and changed" });
    } else if (e.why) host.append(el("p", { class: "hs-dim", text: e.why }));
    const c = r.curves, curves = $("curves"); curves.replaceChildren();
    if (c.before.image_mass) { const box = el("div", {}); curves.append(el("h2", { text: "Attention on the image, by generated token" }), box); R.lines(box, [{ name: "before", y: c.before.image_mass }, { name: "after", y: c.after.image_mass || [] }], { x: "token", label: "image mass by step" }); }
    if (c.before.vhd) { const box = el("div", {}); curves.append(el("h2", { text: "Vision-aware head divergence, by token of the plain answer" }), box); R.lines(box, [{ name: "mean over heads", y: c.before.vhd }], { x: "token", label: "VHD by step" }); }
    for (const x of [c.before, c.after]) if (x.why && !curves.childElementCount) curves.append(el("p", { class: "hs-dim", text: x.why }));
    const button = (text, f, id) => el("button", { type: "button", class: "hs-button", text, id, onclick: f });
    $("wb-after-buttons").replaceChildren(
      button("Save", () => hs.guard("save", async () => { const s = await hs.post(`job/${job}/save`); hs.set({ saved: s.saved }); hs.say("saved"); saved(); }), "wb-save"),
      button("Export JSON", () => hs.download("headscope-generate.json", JSON.stringify({ format: "headscope-generate", version: 1, model: r.spec.model, prompt: r.spec.prompt, chat: r.spec.chat, max_new_tokens: r.spec.max_new_tokens, seed: r.spec.seed, do_sample: r.spec.do_sample, temperature: r.spec.temperature, interventions: r.spec.interventions }, null, 1), "application/json"), "wb-export"),
      button("Look at the heads before", () => hs.openRun(r.runs.before)), button("Look at the heads after", () => hs.openRun(r.runs.after)),
      button("Compare the head, before and after", async () => { await hs.openRun(r.runs.before); hs.set({ pinrun: r.runs.after, view: "head" }); }));
  }
  async function saved() {
    const found = await hs.guard("saved", () => hs.getJson("saved")); if (!found) return;
    const select = $("saved"); select.replaceChildren(el("option", { value: "", text: found.saved.length ? "Open a saved result…" : "no saved results yet" }), ...found.saved.map((s) => el("option", { value: s.value, text: s.label }))); select.value = hs.state.saved;
  }
  async function open(name) {
    if (!name) return;
    await hs.guard("saved", async () => {
      const held = await hs.getJson("saved/" + name), spec = held.spec; job = name;
      hs.set({ wb: JSON.stringify(spec.interventions), prompt: spec.prompt, chat: spec.chat, image: spec.image || "", model: spec.model, saved: name, wnew: spec.max_new_tokens, seed: spec.seed, sample: spec.do_sample, temp: spec.temperature });
      await draw(); show(held.result);
    });
  }
  const pct = (v) => `${(100 * v).toFixed(0)} %`;
  function judged(d) {
    const host = $("evaluation"), so = `of ${d.n}${d.n < d.total ? ` so far (of ${d.total})` : ""}`;
    if (!d.figures) { host.replaceChildren(el("p", { text: `${d.probe}: plain ${pct(d.plain)} (${d.plain_interval.map(pct).join(" to ")}), changed ${pct(d.changed)} (${d.changed_interval.map(pct).join(" to ")}); ${d.lost} lost, ${d.won} won, ${so}.` })); return; }
    const cell = (e) => (e ? `${number(e[0])} (${number(e[1])} to ${number(e[2])})` : "–");
    host.replaceChildren(el("p", { text: `${d.probe}, ${so} pictures; in brackets 95 % intervals that resample pictures.` }), el("table", { class: "hs-table" }, el("tr", {}, ...["figure", "plain", "changed", "difference"].map((t) => el("th", { text: t }))), ...d.figures.map((f) => el("tr", {}, el("td", { text: f.name + (f.lower ? " (lower is better)" : "") }), el("td", { text: cell(f.plain) }), el("td", { text: cell(f.changed) }), el("td", { text: cell(f.difference) })))));
  }
  hs.openers.evaluate = (j) => { hs.set({ view: "workbench", model: j.spec.model, wb: JSON.stringify(j.spec.interventions || []) }); draw(); judged(j.result); $("evaluation").dataset.done = "1"; };
  hs.openers.generate = async (j) => { const spec = j.spec; job = j.id; hs.set({ view: "workbench", wb: JSON.stringify(spec.interventions), prompt: spec.prompt, chat: spec.chat, image: spec.image || "", model: spec.model, wnew: spec.max_new_tokens, seed: spec.seed, sample: spec.do_sample, temp: spec.temperature }); await draw(); show(j.result); };
  async function evaluate() {
    await hs.guard("evaluate", async () => {
      const host = $("evaluation"), made = await hs.post("evaluate", { model: hs.state.model, probe: $("probe").value, n: Number($("probe-n").value) || 20, interventions: read() });
      const tell = judged;
      host.replaceChildren(el("p", { class: "hs-empty", text: "queued; you can go on browsing" })); host.dataset.job = made.job;
      hs.watch(made.job, { partial: (p) => tell(p.partial), done: async (j) => { tell((await hs.getJson("job/" + j.id)).result); host.dataset.done = "1"; }, failed: (j) => { host.replaceChildren(); hs.problem(j.error, "evaluate"); }, cancelled: () => hs.say("the evaluation was stopped") });
    });
  }
  document.addEventListener("click", (e) => {
    const b = e.target.closest("button"); if (!b) return;
    const f = { "wb-run": run, "wb-stop": () => job && hs.guard("stop", () => hs.post(`job/${job}/cancel`)), "wb-evaluate": evaluate, trace: hs.trace, "do-logits": hs.showLogits, "do-examples": hs.showExamples, "do-dissect": hs.dissect, "do-massive": hs.showActivations, "zoom-in": () => hs.mapZoom(0.5), "zoom-out": () => hs.mapZoom(2), "zoom-all": () => hs.mapZoom(0), "image-choose": () => $("image-file").click(), "image-from": hs.imageFrom,
      "export-png": () => hs.export("png"), "export-svg": () => hs.export("svg"), "export-csv": () => hs.export("csv"), "export-npz": () => hs.export("npz"), "copy-link": copy, "do-export-html": exportHtml }[b.id];
    if (f) f();
  });
  async function copy() {
    const text = hs.link();
    try { await navigator.clipboard.writeText(text); hs.say("the link is copied"); }
    catch (e) { const t = el("textarea", { class: "hs-out" }); t.value = text; document.body.append(t); t.select(); document.execCommand("copy"); t.remove(); hs.say("the link is copied"); }
    document.body.dataset.link = text;
  }
  async function exportHtml() { await hs.guard("export", async () => { if (!page.info) throw new Error("trace a prompt first"); const a = el("a", { href: `api/run/${page.info.id}/page.html?heads=${encodeURIComponent(hs.state.sel)}`, download: "" }); document.body.append(a); a.click(); a.remove(); }); }
  document.addEventListener("change", (e) => {
    if (["wb-new", "wb-seed", "wb-sample", "wb-temperature"].includes(e.target.id)) options();
    if (e.target.id === "add-card" && e.target.value) {
      const card = offered.find((c) => c.name === e.target.value), settings = {}; if (card.fields.some((f) => f.kind === "heads" && f.required) && hs.state.sel) settings.heads = hs.state.sel;
      write([...read(), { name: card.name, settings }]); e.target.value = ""; draw();
    }
    if (e.target.id === "saved") open(e.target.value);
    if (e.target.id === "image-file" && e.target.files[0]) { hs.addImage(e.target.files[0]); e.target.value = ""; }
  });
  document.addEventListener("dragover", (e) => { if (e.dataTransfer && [...e.dataTransfer.types].includes("Files")) e.preventDefault(); });
  document.addEventListener("drop", (e) => { const f = e.dataTransfer && e.dataTransfer.files[0]; if (f) { e.preventDefault(); hs.addImage(f); } });
  function host() {
    /* Native inputs: React must not own what scripts fill. */
    const file = $("file-slot"); if (file && !file.childElementCount) file.append(el("input", { id: "image-file", type: "file", accept: "image/*", hidden: "" }));
    const fill = (id, ...nodes) => { const n = $(id); if (n && !n.childElementCount) n.append(...nodes); };
    fill("step-slot", el("input", { id: "step", type: "range", min: "0", max: "1", "aria-label": "generated token" })); fill("opacity-slot", el("input", { id: "opacity", type: "range", min: "0", max: "100", value: "75", "aria-label": "opacity" }));
    fill("add-slot", el("select", { id: "add-card", "aria-label": "add an intervention" })); fill("saved-slot", el("select", { id: "saved", "aria-label": "saved results" })); fill("probe-slot", el("select", { id: "probe", "aria-label": "probe" }), el("input", { id: "probe-n", type: "number", min: "1", max: "200", value: "20", "aria-label": "samples" }));
    const field = (text, input) => el("label", { class: "hs-field" }, el("span", { text }), input);
    fill("options-slot", field("new tokens", el("input", { id: "wb-new", type: "number", min: "1", max: "4096", value: "32" })), field("seed", el("input", { id: "wb-seed", type: "number", min: "0", value: "0" })), field("sample", el("input", { id: "wb-sample", type: "checkbox" })), field("temperature", el("input", { id: "wb-temperature", type: "number", min: "0.05", step: "0.05", max: "10", value: "1" })));
  }
  hs.hostInputs = host;
  hs.subscribe((s, changed) => {
    if ("boot" in changed) { host(); const n = $("help-keys"); if (n) n.replaceChildren(...hs.KEYS.map(([k, t]) => el("tr", {}, el("td", {}, el("kbd", { text: k })), el("td", { text: t })))); }
    if ($("wb-new") && ["boot", "wnew", "seed", "sample", "temp"].some((k) => k in changed)) showOptions(s);
    if ("view" in changed || "boot" in changed) draw();
    if ("sel" in changed || "theme" in changed) { if (s.view === "workbench") { draw(); if (last && "theme" in changed) show(last); } }
    if ("wb" in changed && s.view === "workbench" && !document.activeElement.closest("#cards")) draw();
    if ("boot" in changed && s.saved) open(s.saved);
  });
})();
