/* What draws heads: a grid, a map with tiles, a strip of tokens, points, patches. Plain canvas, no network, no framework:
   the page, a static export and a notebook widget use this one file. */
(function () {
  "use strict";

  const cache = {};
  function lut(name) {
    if (cache[name]) return cache[name];
    const anchors = window.headscopePalettes[name];
    const out = new Uint8ClampedArray(256 * 3);
    const rgb = anchors.map((c) => [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16)));
    for (let i = 0; i < 255; i++) {
      const at = (i / 254) * (rgb.length - 1), low = Math.min(Math.floor(at), rgb.length - 2), f = at - low;
      for (let c = 0; c < 3; c++) out[3 * i + c] = Math.round(rgb[low][c] * (1 - f) + rgb[low + 1][c] * f);
    }
    return (cache[name] = out);
  }
  function colour(value, low, high, name, gamma) {
    let t = high > low ? (value - low) / (high - low) : 0;
    t = Math.max(0, Math.min(1, t));
    if (gamma && gamma !== 1) t = Math.pow(t, gamma);
    const i = Math.round(t * 254), l = lut(name);
    return [l[3 * i], l[3 * i + 1], l[3 * i + 2]];
  }
  const css = (c, a) => `rgba(${c[0]},${c[1]},${c[2]},${a === undefined ? 1 : a})`;

  function floats(text) {
    if (!text) return null;
    const raw = atob(text), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return new Float32Array(bytes.buffer);
  }
  function range(values) {
    let low = Infinity, high = -Infinity;
    for (const v of values) if (v === v) { if (v < low) low = v; if (v > high) high = v; }
    return low <= high ? [low, high] : [0, 1];
  }
  function scale(values) {
    let [low, high] = range(values);
    if (low < 0 && high > 0) { const m = Math.max(-low, high); return { low: -m, high: m, name: "blue_red" }; }
    return { low: low > 0 && low < 0.5 * high ? 0 : low, high: high > low ? high : low + 1e-9, name: "viridis" };
  }
  function number(v) {
    if (v === null || v === undefined || v !== v) return "–";
    const a = Math.abs(v);
    return a !== 0 && (a < 1e-3 || a >= 1e5) ? v.toExponential(2) : String(Number(v.toPrecision(4)));
  }
  function headName(stack, layer, head) { return `${!stack || stack === "text" ? "" : stack + "."}L${layer}H${head}`; }
  function visible(token) {
    if (token === "") return "∅";
    const text = String(token).replace(/\n/g, "⏎").replace(/\t/g, "⇥");
    return text.trim() === "" ? text.replace(/ /g, "␣") : text;
  }
  function theme(element) {
    const style = getComputedStyle(element || document.documentElement);
    const take = (name, other) => style.getPropertyValue(name).trim() || other;
    return {
      fg: take("--hs-fg", "#1a1b1e"), dim: take("--hs-dim", "#5c5f66"), bg: take("--hs-bg", "#ffffff"),
      line: take("--hs-line", "#ced4da"), accent: take("--hs-accent", "#d9480f"), pick: take("--hs-pick", "#c2255c"),
      hatch: take("--hs-hatch", "#868e96"),
    };
  }
  function el(tag, attributes, ...children) {
    const out = document.createElement(tag);
    for (const [k, v] of Object.entries(attributes || {})) {
      if (k === "class") out.className = v;
      else if (k === "text") out.textContent = v;
      else if (k.startsWith("on")) out.addEventListener(k.slice(2), v);
      else if (v !== null && v !== undefined) out.setAttribute(k, v);
    }
    out.append(...children);
    return out;
  }
  function sized(canvas, width, height) {
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const w = Math.max(1, Math.round(width)), h = Math.max(1, Math.round(height));
    if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) {
      canvas.width = Math.round(w * ratio); canvas.height = Math.round(h * ratio);
      canvas.style.width = w + "px"; canvas.style.height = h + "px";
    }
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, w, h);
    return context;
  }
  function hatch(context, x, y, w, h, stroke) {
    context.save();
    context.beginPath(); context.rect(x, y, w, h); context.clip();
    context.strokeStyle = stroke; context.lineWidth = 1; context.beginPath();
    const step = Math.max(3, Math.min(w, h) / 3);
    for (let d = -h; d < w; d += step) { context.moveTo(x + d, y + h); context.lineTo(x + d + h, y); }
    context.stroke(); context.restore();
  }
  const tooltip = (() => {
    let box = null;
    return {
      show(x, y, node) {
        if (!box) { box = el("div", { class: "hs-tip", role: "tooltip" }); document.body.append(box); }
        box.replaceChildren(node); box.style.display = "block";
        const r = box.getBoundingClientRect();
        box.style.left = Math.max(4, Math.min(x + 14, innerWidth - r.width - 8)) + "px";
        box.style.top = Math.max(4, y + 18 + r.height > innerHeight ? y - r.height - 10 : y + 18) + "px";
      },
      hide() { if (box) box.style.display = "none"; },
    };
  })();
  function rowsNode(title, rows, extra) {
    const node = el("div", {}, el("b", { text: title }));
    const table = el("table", {});
    for (const [k, v] of rows) table.append(el("tr", {}, el("td", { text: k }), el("td", { text: v })));
    node.append(table);
    if (extra) node.append(extra);
    return node;
  }
  function colourbar(node, low, high, name, unit, gamma) {
    const canvas = el("canvas", { width: 255, height: 1, "aria-hidden": "true" });
    const c = canvas.getContext("2d"), image = c.createImageData(255, 1), l = lut(name);
    for (let i = 0; i < 255; i++) {
      const t = gamma && gamma !== 1 ? Math.round(Math.pow(i / 254, gamma) * 254) : i;
      image.data.set([l[3 * t], l[3 * t + 1], l[3 * t + 2], 255], 4 * i);
    }
    c.putImageData(image, 0, 0);
    node.replaceChildren(el("span", { text: number(low) }), canvas, el("span", { text: number(high) }), el("span", { class: "hs-unit", text: unit || "" }));
  }

  /* ---- layer x head grid ------------------------------------------------------------------------------------------ */
  class Grid {
    constructor(root, on) {
      this.root = root; this.on = on || {}; this.zoom = 1; this.data = null; this.hover = -1; this.box = null;
      this.canvas = el("canvas", { class: "hs-canvas", tabindex: "0", role: "img" });
      root.replaceChildren(this.canvas);
      this.canvas.addEventListener("mousemove", (e) => this.moved(e));
      this.canvas.addEventListener("mouseleave", () => { this.hover = -1; tooltip.hide(); if (this.on.hover) this.on.hover(-1); this.draw(); });
      this.canvas.addEventListener("mousedown", (e) => { if (e.button === 0) { const p = this.at(e); this.box = { x0: p.x, y0: p.y, x1: p.x, y1: p.y, e }; e.preventDefault(); this.canvas.focus({ preventScroll: true }); } });
      window.addEventListener("mouseup", (e) => this.released(e));
      new ResizeObserver(() => this.draw()).observe(root);
    }
    /* data: rows, columns, values (row * columns + column), order (column of picture -> column of data) or null, sprite,
       thumb, low, high, palette, current, selected (Set), dimmed (Set or null), rowNames, columnNames, tip(index) */
    set(data) { this.data = Object.assign(this.data || {}, data); this.draw(); }
    size() {
      const d = this.data, left = d.left || 38, top = d.top || 18;
      const wide = Math.max(120, this.root.clientWidth - left - 6 - (d.slanted ? 70 : 0));
      const fit = wide / d.columns;
      const cap = d.sprite ? 96 : d.cap || 30;
      const w = Math.max(d.least || 4, Math.min(fit, cap)) * this.zoom;
      const h = d.sprite ? w : Math.max(Math.min(w, d.capHeight || 22), d.leastHeight || 7);
      return { left, top, w, h };
    }
    cell(row, position) { const s = this.size(); return [s.left + position * s.w, s.top + row * s.h, s.w, s.h]; }
    column(row, position) { const d = this.data; return d.order ? d.order[row * d.columns + position] : position; }
    position(row, column) { const d = this.data; if (!d.order) return column; for (let p = 0; p < d.columns; p++) if (d.order[row * d.columns + p] === column) return p; return column; }
    at(e) { const r = this.canvas.getBoundingClientRect(); return { x: e.clientX - r.left, y: e.clientY - r.top }; }
    index(p) {
      const d = this.data; if (!d) return -1;
      const s = this.size(), position = Math.floor((p.x - s.left) / s.w), row = Math.floor((p.y - s.top) / s.h);
      if (position < 0 || row < 0 || position >= d.columns || row >= d.rows) return -1;
      return row * d.columns + this.column(row, position);
    }
    moved(e) {
      const p = this.at(e);
      if (this.box) { this.box.x1 = p.x; this.box.y1 = p.y; this.draw(); return; }
      const i = this.index(p);
      if (i !== this.hover) { this.hover = i; if (this.on.hover) this.on.hover(i); this.draw(); }
      if (i < 0) tooltip.hide(); else if (this.data.tip) tooltip.show(e.clientX, e.clientY, this.data.tip(i));
    }
    released(e) {
      if (!this.box) return;
      const b = this.box; this.box = null;
      if (Math.abs(b.x1 - b.x0) + Math.abs(b.y1 - b.y0) < 6) {
        const i = this.index({ x: b.x0, y: b.y0 });
        if (i >= 0) { if (b.e.shiftKey || b.e.ctrlKey || b.e.metaKey) { if (this.on.toggle) this.on.toggle(i); } else if (this.on.open) this.on.open(i); }
      } else if (this.on.select) {
        const s = this.size(), d = this.data, found = [];
        const [x0, x1] = [b.x0, b.x1].sort((a, c) => a - c), [y0, y1] = [b.y0, b.y1].sort((a, c) => a - c);
        for (let row = 0; row < d.rows; row++) for (let p = 0; p < d.columns; p++) {
          const x = s.left + (p + 0.5) * s.w, y = s.top + (row + 0.5) * s.h;
          if (x >= x0 && x <= x1 && y >= y0 && y <= y1) { const i = row * d.columns + this.column(row, p); if (d.values[i] === d.values[i]) found.push(i); }
        }
        this.on.select(found, b.e.shiftKey);
      }
      this.draw();
    }
    draw() {
      const d = this.data; if (!d || !d.values || !this.root.clientWidth) return;
      const began = performance.now(), s = this.size(), t = theme(this.root);
      const width = s.left + d.columns * s.w + (d.slanted ? 74 : 4), height = s.top + d.rows * s.h + 4, c = sized(this.canvas, width, height);
      const gap = s.w >= 10 && !d.sprite ? 1 : 0, low = d.low, high = d.high, palette = d.palette || "viridis";
      if (d.sprite) {
        c.imageSmoothingEnabled = s.w < d.thumb[1];
        if (!d.order) c.drawImage(d.sprite, s.left, s.top, d.columns * s.w, d.rows * s.h);
        else for (let row = 0; row < d.rows; row++) for (let p = 0; p < d.columns; p++)
          c.drawImage(d.sprite, this.column(row, p) * d.thumb[1], row * d.thumb[0], d.thumb[1], d.thumb[0], s.left + p * s.w, s.top + row * s.h, s.w, s.h);
        c.strokeStyle = t.line; c.lineWidth = 0.5; c.beginPath();
        if (s.w >= 14) {
          for (let p = 0; p <= d.columns; p++) { c.moveTo(s.left + p * s.w, s.top); c.lineTo(s.left + p * s.w, s.top + d.rows * s.h); }
          for (let r = 0; r <= d.rows; r++) { c.moveTo(s.left, s.top + r * s.h); c.lineTo(s.left + d.columns * s.w, s.top + r * s.h); }
        }
        c.stroke();
      } else {
        /* One pixel a cell, stretched: 5120 cells are painted as fast as ten. */
        const small = document.createElement("canvas"); small.width = d.columns; small.height = d.rows;
        const sc = small.getContext("2d"), image = sc.createImageData(d.columns, d.rows), l = lut(palette), k = high > low ? 254 / (high - low) : 0;
        for (let row = 0; row < d.rows; row++) for (let p = 0; p < d.columns; p++) {
          const v = d.values[row * d.columns + this.column(row, p)], o = 4 * (row * d.columns + p);
          if (v !== v) continue;
          const i = Math.max(0, Math.min(254, Math.round((v - low) * k)));
          image.data[o] = l[3 * i]; image.data[o + 1] = l[3 * i + 1]; image.data[o + 2] = l[3 * i + 2]; image.data[o + 3] = 255;
        }
        sc.putImageData(image, 0, 0);
        c.imageSmoothingEnabled = false;
        c.drawImage(small, s.left, s.top, d.columns * s.w, d.rows * s.h);
        if (gap) {
          c.fillStyle = t.bg;
          for (let p = 1; p < d.columns; p++) c.fillRect(s.left + p * s.w - 0.5, s.top, 1, d.rows * s.h);
          for (let r = 1; r < d.rows; r++) c.fillRect(s.left, s.top + r * s.h - 0.5, d.columns * s.w, 1);
        }
      }
      for (let row = 0; row < d.rows; row++) for (let p = 0; p < d.columns; p++) {
        const i = row * d.columns + this.column(row, p), v = d.values[i], x = s.left + p * s.w, y = s.top + row * s.h;
        if (v !== v) { c.fillStyle = t.bg; c.fillRect(x, y, s.w, s.h); hatch(c, x, y, s.w, s.h, t.hatch); }
        else if (d.kept && !d.kept.has(i)) { c.fillStyle = t.bg; c.globalAlpha = 0.82; c.fillRect(x, y, s.w, s.h); c.globalAlpha = 1; }
        if (d.selected && d.selected.has(i)) { c.strokeStyle = t.accent; c.lineWidth = s.w < 9 ? 1 : 2; c.strokeRect(x + 1, y + 1, s.w - 2, s.h - 2); }
      }
      if (d.pinned >= 0) this.outline(c, d.pinned, t.dim, 2, [4, 2]);
      if (this.hover >= 0) this.outline(c, this.hover, t.fg, 1);
      if (d.current >= 0) this.outline(c, d.current, t.pick, 2.5);
      c.fillStyle = t.dim; c.font = "11px system-ui, sans-serif"; c.textAlign = "right"; c.textBaseline = "middle";
      const every = Math.max(1, Math.ceil(13 / s.h));
      for (let r = 0; r < d.rows; r += every) {
        const mark = d.rowMarks && d.rowMarks[r]; /* "current" or "selected": rows that are heads */
        if (mark) { c.fillStyle = mark === "current" ? t.pick : t.accent; c.font = "bold 11px system-ui, sans-serif"; }
        c.fillText(d.rowNames ? d.rowNames[r] : "L" + r, s.left - 5, s.top + (r + 0.5) * s.h);
        if (mark === "current") { c.strokeStyle = t.pick; c.lineWidth = 2; c.strokeRect(s.left, s.top + r * s.h, d.columns * s.w, s.h); }
        if (mark) { c.fillStyle = t.dim; c.font = "11px system-ui, sans-serif"; }
      }
      c.textAlign = "center"; c.textBaseline = "bottom";
      if (d.columnNames && d.slanted) {
        c.textAlign = "left";
        for (let p = 0; p < d.columns; p++) { c.save(); c.translate(s.left + (p + 0.6) * s.w, s.top - 4); c.rotate(-Math.PI / 4); c.fillText(d.columnNames[p], 0, 0); c.restore(); }
      } else if (!d.order) {
        const step = Math.max(1, Math.ceil(22 / s.w));
        for (let p = 0; p < d.columns; p += step) c.fillText(d.columnNames ? d.columnNames[p] : (s.w > 24 ? "H" : "") + p, s.left + (p + 0.5) * s.w, s.top - 4);
      } else { c.textAlign = "left"; c.fillText("heads sorted within each layer", s.left, s.top - 4); }
      if (this.box) {
        const b = this.box; c.strokeStyle = t.accent; c.setLineDash([4, 3]); c.lineWidth = 1.5;
        c.strokeRect(Math.min(b.x0, b.x1), Math.min(b.y0, b.y1), Math.abs(b.x1 - b.x0), Math.abs(b.y1 - b.y0)); c.setLineDash([]);
      }
      this.painted = performance.now() - began;
    }
    outline(c, i, stroke, width, dash) {
      const d = this.data, row = Math.floor(i / d.columns), [x, y, w, h] = this.cell(row, this.position(row, i % d.columns));
      c.strokeStyle = stroke; c.lineWidth = width; c.setLineDash(dash || []); c.strokeRect(x, y, w, h); c.setLineDash([]);
    }
    svg() {
      const d = this.data, s = this.size(), t = theme(this.root), out = [];
      const esc = (v) => String(v).replace(/[&<>"]/g, (m) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[m]);
      const width = s.left + d.columns * s.w + 4, height = s.top + d.rows * s.h + 4;
      out.push(`<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" font-family="sans-serif" font-size="11">`);
      out.push(`<rect width="100%" height="100%" fill="${t.bg}"/><defs><pattern id="h" width="5" height="5" patternUnits="userSpaceOnUse"><path d="M0 5L5 0" stroke="${t.hatch}"/></pattern></defs>`);
      for (let row = 0; row < d.rows; row++) {
        for (let p = 0; p < d.columns; p++) {
          const v = d.values[row * d.columns + this.column(row, p)], [x, y, w, h] = this.cell(row, p);
          const fill = v === v ? css(colour(v, d.low, d.high, d.palette || "viridis")) : "url(#h)";
          out.push(`<rect x="${x.toFixed(2)}" y="${y.toFixed(2)}" width="${w.toFixed(2)}" height="${h.toFixed(2)}" fill="${fill}"/>`);
        }
        out.push(`<text x="${s.left - 5}" y="${s.top + (row + 0.5) * s.h + 4}" text-anchor="end" fill="${t.fg}">${esc(d.rowNames ? d.rowNames[row] : "L" + row)}</text>`);
      }
      return out.join("") + "</svg>";
    }
  }

  /* ---- one head's map --------------------------------------------------------------------------------------------- */
  class MapView {
    constructor(root, on) {
      this.root = root; this.on = on || {}; this.view = null; this.tiles = []; this.hover = null; this.locked = null; this.ask = 0;
      this.canvas = el("canvas", { class: "hs-canvas", tabindex: "0", role: "img" });
      this.bar = el("div", { class: "hs-bar" });
      root.replaceChildren(this.canvas, this.bar);
      this.canvas.addEventListener("mousemove", (e) => this.moved(e));
      this.canvas.addEventListener("mouseleave", () => { if (!this.drag) { this.hover = null; tooltip.hide(); if (this.on.hover) this.on.hover(null); this.draw(); } });
      this.canvas.addEventListener("wheel", (e) => this.wheel(e), { passive: false });
      this.canvas.addEventListener("mousedown", (e) => { if (e.button === 0) { this.drag = { x: e.clientX, y: e.clientY, view: { ...this.view }, far: 0 }; e.preventDefault(); this.canvas.focus({ preventScroll: true }); } });
      window.addEventListener("mouseup", (e) => { const d = this.drag; this.drag = null; if (d && d.far < 5) { const c = this.cell(e); if (c && this.on.lock) this.on.lock(c); } });
      this.canvas.addEventListener("dblclick", () => this.reset());
      new ResizeObserver(() => { if (this.source) { this.draw(); this.refine(60); } }).observe(root);
    }
    /* source: rows, columns, queries, keys (texts), top, gamma, unit, tile({x0,x1,y0,y1,w}) -> {image,x0,x1,y0,y1},
       value(q, k) -> number or undefined */
    async set(source) {
      const same = this.source && this.source.rows === source.rows && this.source.columns === source.columns && source.keep;
      this.source = source;
      if (!same) this.view = { x0: 0, x1: source.columns, y0: 0, y1: source.rows };
      colourbar(this.bar, 0, source.top, "viridis", source.unit, source.gamma);
      const ask = ++this.ask, tile = await source.tile({ x0: 0, x1: source.columns, y0: 0, y1: source.rows, w: this.pixels() });
      if (ask !== this.ask) return false;
      this.tiles = [tile]; this.draw();
      if (same) this.refine(0);
      return true;
    }
    pixels() { return Math.min(1600, Math.round(Math.max(300, this.frame().w) * Math.min(window.devicePixelRatio || 1, 2))); }
    frame() {
      const wide = Math.max(220, this.root.clientWidth), left = 96, top = 8, below = 84;
      const w = wide - left - 10, ratio = this.view ? (this.view.y1 - this.view.y0) / (this.view.x1 - this.view.x0) : 1;
      const h = Math.min(w * Math.min(1, Math.max(0.25, ratio)), this.tall || 620);
      return { left, top, w: ratio > 0.9 && ratio < 1.1 ? Math.min(w, h) : w, h, wide, below };
    }
    reset() { if (!this.source) return; this.view = { x0: 0, x1: this.source.columns, y0: 0, y1: this.source.rows }; this.draw(); this.refine(0); if (this.on.view) this.on.view(this.view); }
    cell(e) {
      const r = this.canvas.getBoundingClientRect(), f = this.frame(), v = this.view; if (!v) return null;
      const x = v.x0 + ((e.clientX - r.left - f.left) / f.w) * (v.x1 - v.x0), y = v.y0 + ((e.clientY - r.top - f.top) / f.h) * (v.y1 - v.y0);
      if (x < v.x0 || x >= v.x1 || y < v.y0 || y >= v.y1) return null;
      return { q: Math.floor(y), k: Math.floor(x) };
    }
    moved(e) {
      if (!this.source || !this.view) return;
      if (this.drag) {
        const f = this.frame(), v = this.drag.view, dx = ((e.clientX - this.drag.x) / f.w) * (v.x1 - v.x0), dy = ((e.clientY - this.drag.y) / f.h) * (v.y1 - v.y0);
        this.drag.far = Math.max(this.drag.far, Math.abs(e.clientX - this.drag.x) + Math.abs(e.clientY - this.drag.y));
        if (this.drag.far >= 5) { this.view = this.clamp({ x0: v.x0 - dx, x1: v.x1 - dx, y0: v.y0 - dy, y1: v.y1 - dy }); this.draw(); this.refine(80); }
        return;
      }
      const c = this.cell(e);
      if (c && this.hover && c.q === this.hover.q && c.k === this.hover.k) return;
      this.hover = c; this.draw();
      if (this.on.hover) this.on.hover(c);
      if (!c) { tooltip.hide(); return; }
      this.point = [e.clientX, e.clientY]; this.tip();
    }
    tip() {
      const c = this.hover, s = this.source; if (!c || !this.point) return;
      const value = s.value(c.q, c.k);
      tooltip.show(...this.point, rowsNode(s.title || "", [
        ["query", `${c.q} ${visible(s.queries[c.q] === undefined ? "" : s.queries[c.q])}`], ["key", `${c.k} ${visible(s.keys[c.k] === undefined ? "" : s.keys[c.k])}`],
        ["weight", value === undefined ? "…" : value !== value ? "hidden" : value.toPrecision(6)],
      ]));
    }
    wheel(e) {
      if (!this.source) return;
      e.preventDefault();
      const r = this.canvas.getBoundingClientRect(), f = this.frame(), v = this.view, k = Math.exp(Math.max(-1, Math.min(1, e.deltaY / 240)));
      const fx = Math.max(0, Math.min(1, (e.clientX - r.left - f.left) / f.w)), fy = Math.max(0, Math.min(1, (e.clientY - r.top - f.top) / f.h));
      this.zoomTo(k, fx, fy);
    }
    zoomTo(k, fx, fy) {
      const v = this.view, w = v.x1 - v.x0, h = v.y1 - v.y0, nw = Math.max(4, Math.min(this.source.columns, w * k)), nh = Math.max(4, Math.min(this.source.rows, h * k));
      this.view = this.clamp({ x0: v.x0 + fx * (w - nw), x1: v.x0 + fx * (w - nw) + nw, y0: v.y0 + fy * (h - nh), y1: v.y0 + fy * (h - nh) + nh });
      this.draw(); this.refine(60);
    }
    clamp(v) {
      const s = this.source, w = Math.min(v.x1 - v.x0, s.columns), h = Math.min(v.y1 - v.y0, s.rows);
      const x0 = Math.max(0, Math.min(v.x0, s.columns - w)), y0 = Math.max(0, Math.min(v.y0, s.rows - h));
      return { x0, x1: x0 + w, y0, y1: y0 + h };
    }
    refine(wait) {
      clearTimeout(this.timer);
      this.timer = setTimeout(async () => {
        const v = this.view, s = this.source, ask = ++this.ask; if (!s) return;
        const tile = await s.tile({ x0: Math.floor(v.x0), x1: Math.ceil(v.x1), y0: Math.floor(v.y0), y1: Math.ceil(v.y1), w: this.pixels() }).catch(() => null);
        if (ask !== this.ask || !tile) return;
        this.tiles = [this.tiles[0], tile]; this.sharp = performance.now(); this.draw();
        if (this.on.view) this.on.view(v);
      }, wait);
    }
    draw() {
      const s = this.source, v = this.view; if (!s || !v || !this.root.clientWidth) return;
      const f = this.frame(), t = theme(this.root), c = sized(this.canvas, f.wide, f.top + f.h + f.below);
      const sx = f.w / (v.x1 - v.x0), sy = f.h / (v.y1 - v.y0);
      c.save(); c.beginPath(); c.rect(f.left, f.top, f.w, f.h); c.clip();
      hatch(c, f.left, f.top, f.w, f.h, t.line);
      for (const tile of this.tiles) if (tile) {
        c.imageSmoothingEnabled = tile.image.width > (tile.x1 - tile.x0) * sx * 1.01;
        c.drawImage(tile.image, f.left + (tile.x0 - v.x0) * sx, f.top + (tile.y0 - v.y0) * sy, (tile.x1 - tile.x0) * sx, (tile.y1 - tile.y0) * sy);
      }
      const cross = (cell, stroke) => {
        c.strokeStyle = stroke; c.lineWidth = 1;
        if (cell.q >= 0) c.strokeRect(f.left - 2, f.top + (cell.q - v.y0) * sy, f.w + 4, Math.max(1, sy));
        if (cell.k >= 0) c.strokeRect(f.left + (cell.k - v.x0) * sx, f.top - 2, Math.max(1, sx), f.h + 4);
      };
      if (this.locked) cross(this.locked, t.pick);
      if (this.hover) cross(this.hover, t.accent);
      c.restore();
      c.strokeStyle = t.line; c.lineWidth = 1; c.strokeRect(f.left, f.top, f.w, f.h);
      c.fillStyle = t.dim; c.font = "11px system-ui, sans-serif";
      const cut = (text, n) => (text.length > n ? text.slice(0, n - 1) + "…" : text);
      const ys = Math.max(1, Math.ceil(12 / sy)), xs = Math.max(1, Math.ceil(13 / sx));
      c.textAlign = "right"; c.textBaseline = "middle";
      for (let q = Math.ceil(v.y0 / ys) * ys; q < v.y1; q += ys) c.fillText(cut(`${visible(s.queries[q] === undefined ? "" : s.queries[q])} ${q}`, 15), f.left - 5, f.top + (q + 0.5 - v.y0) * sy);
      for (let k = Math.ceil(v.x0 / xs) * xs; k < v.x1; k += xs) {
        c.save(); c.translate(f.left + (k + 0.5 - v.x0) * sx, f.top + f.h + 5); c.rotate(-Math.PI / 3);
        c.fillText(cut(`${k} ${visible(s.keys[k] === undefined ? "" : s.keys[k])}`, 15), 0, 0); c.restore();
      }
      c.textAlign = "left"; c.fillText("key →", f.left + f.w - 34, f.top + f.h + f.below - 8); c.fillText("query ↓", 2, f.top + f.h + 16);
    }
    svg() {
      const s = this.source, f = this.frame(), v = this.view;
      return `<svg xmlns="http://www.w3.org/2000/svg" width="${f.wide}" height="${f.top + f.h + f.below}"><image href="${this.canvas.toDataURL()}" width="${f.wide}" height="${f.top + f.h + f.below}"/></svg>`;
    }
  }

  /* ---- tokens as text, image patches folded ------------------------------------------------------------------------ */
  class Strip {
    constructor(root, on) {
      this.root = root; this.on = on || {}; this.spans = []; root.classList.add("hs-strip");
      root.addEventListener("mouseover", (e) => { const i = this.which(e); if (i !== null && this.on.hover) this.on.hover(i); });
      root.addEventListener("mouseleave", () => { if (this.on.hover) this.on.hover(null); });
      root.addEventListener("click", (e) => { const i = this.which(e); if (i !== null && this.on.lock) this.on.lock(i); });
    }
    which(e) { const s = e.target.closest("[data-i]"); return s ? Number(s.dataset.i) : null; }
    set(tokens, kinds, generatedFrom) {
      const key = tokens; if (this.tokens === key) return;
      this.tokens = tokens; this.spans = new Array(tokens.length); const nodes = [];
      for (let i = 0; i < tokens.length; i++) {
        if (kinds && kinds[i] === 2) {
          let j = i; while (j < tokens.length && kinds[j] === 2) j++;
          if (j - i > 3) {
            const span = el("span", { class: "hs-token hs-image", "data-i": i, text: `▦ ${j - i} patches`, title: `image positions ${i} to ${j - 1}` });
            span.dataset.end = j; for (let k = i; k < j; k++) this.spans[k] = span; nodes.push(span); i = j - 1; continue;
          }
        }
        const special = kinds && kinds[i] === 0, made = kinds && kinds[i] === 3;
        const span = el("span", { class: "hs-token" + (special ? " hs-special" : "") + (made ? " hs-made" : ""), "data-i": i, text: visible(tokens[i]), title: `${i}` });
        this.spans[i] = span; nodes.push(span);
        if (String(tokens[i]).includes("\n")) nodes.push(el("br"));
      }
      this.root.replaceChildren(...nodes);
    }
    paint(weights, top, focus) {
      const sums = new Map();
      for (let i = 0; i < this.spans.length; i++) { const v = weights ? weights[i] : NaN; if (v === v && this.spans[i]) sums.set(this.spans[i], (sums.get(this.spans[i]) || 0) + v); }
      let last = null;
      for (let i = 0; i < this.spans.length; i++) {
        const span = this.spans[i]; if (!span || span === last) continue; last = span;
        const v = sums.get(span);
        /* Text stays readable: the accent colour by opacity, never under 4.5:1. */
        span.style.setProperty("--w", v === undefined ? 0 : Math.min(1, Math.sqrt(v / (top || 1))).toFixed(3));
        span.classList.toggle("hs-focus", focus !== null && focus !== undefined && (i === focus || Boolean(span.dataset.end && focus >= i && focus < Number(span.dataset.end))));
        span.title = `${i}${span.dataset.end ? "–" + (span.dataset.end - 1) : ""}${v === undefined ? "" : ": " + number(v)}`;
      }
    }
    mark(i, name, on) { const span = this.spans[i]; if (span) span.classList.toggle(name, on); }
  }

  /* ---- points ------------------------------------------------------------------------------------------------------ */
  class Scatter {
    constructor(root, on) {
      this.root = root; this.on = on || {}; this.hover = -1; this.lasso = null;
      this.canvas = el("canvas", { class: "hs-canvas", tabindex: "0", role: "img" }); root.replaceChildren(this.canvas);
      this.canvas.addEventListener("mousedown", (e) => { if (e.button === 0) { this.lasso = [this.at(e)]; this.shift = e.shiftKey; e.preventDefault(); } });
      this.canvas.addEventListener("mousemove", (e) => this.moved(e));
      this.canvas.addEventListener("mouseleave", () => { this.hover = -1; tooltip.hide(); if (this.on.hover) this.on.hover(-1); this.draw(); });
      window.addEventListener("mouseup", (e) => this.released(e));
      this.canvas.addEventListener("wheel", (e) => { e.preventDefault(); this.zoom(Math.exp(Math.max(-1, Math.min(1, e.deltaY / 240))), this.at(e)); }, { passive: false });
      this.canvas.addEventListener("dblclick", () => { this.view = null; this.draw(); });
      new ResizeObserver(() => this.draw()).observe(root);
    }
    /* data: x, y, value, low, high, palette, xName, yName, selected (Set of point numbers), current, tip(n) */
    set(data) { if (this.data && data.x && data.x !== this.data.x) this.view = null; this.data = Object.assign(this.data || {}, data); this.draw(); }
    at(e) { const r = this.canvas.getBoundingClientRect(); return [e.clientX - r.left, e.clientY - r.top]; }
    frame() { const w = Math.max(240, this.root.clientWidth); return { left: 56, top: 10, w: w - 70, h: Math.min(560, Math.max(300, w * 0.62)), wide: w }; }
    bounds() {
      if (this.view) return this.view;
      const [x0, x1] = range(this.data.x), [y0, y1] = range(this.data.y), px = (x1 - x0 || 1) * 0.05, py = (y1 - y0 || 1) * 0.05;
      return { x0: x0 - px, x1: x1 + px, y0: y0 - py, y1: y1 + py };
    }
    zoom(k, [px, py]) {
      const b = this.bounds(), f = this.frame(), fx = (px - f.left) / f.w, fy = 1 - (py - f.top) / f.h, w = b.x1 - b.x0, h = b.y1 - b.y0;
      this.view = { x0: b.x0 + fx * w * (1 - k), x1: b.x1 - (1 - fx) * w * (1 - k), y0: b.y0 + fy * h * (1 - k), y1: b.y1 - (1 - fy) * h * (1 - k) };
      this.draw();
    }
    place(n) { const b = this.b, f = this.f; return [f.left + ((this.data.x[n] - b.x0) / (b.x1 - b.x0)) * f.w, f.top + (1 - (this.data.y[n] - b.y0) / (b.y1 - b.y0)) * f.h]; }
    moved(e) {
      if (!this.data) return;
      const p = this.at(e);
      if (this.lasso) { this.lasso.push(p); this.draw(); return; }
      let best = -1, near = 100;
      for (let n = 0; n < this.data.x.length; n++) { const [x, y] = this.place(n), d = (x - p[0]) ** 2 + (y - p[1]) ** 2; if (d < near) { near = d; best = n; } }
      if (best !== this.hover) { this.hover = best; if (this.on.hover) this.on.hover(best); this.draw(); }
      if (best < 0) tooltip.hide(); else tooltip.show(e.clientX, e.clientY, this.data.tip(best));
    }
    released() {
      const line = this.lasso; if (!line) return; this.lasso = null;
      const far = line.reduce((m, p) => Math.max(m, Math.hypot(p[0] - line[0][0], p[1] - line[0][1])), 0);
      if (far < 6) { if (this.hover >= 0) { if (this.shift) this.on.toggle(this.hover); else this.on.open(this.hover); } }
      else {
        const found = [];
        for (let n = 0; n < this.data.x.length; n++) { const [x, y] = this.place(n); if (inside(line, x, y)) found.push(n); }
        this.on.select(found, this.shift);
      }
      this.draw();
    }
    draw() {
      const d = this.data; if (!d || !d.x || !this.root.clientWidth) return;
      const f = (this.f = this.frame()), b = (this.b = this.bounds()), t = theme(this.root), c = sized(this.canvas, f.wide, f.top + f.h + 44);
      c.strokeStyle = t.line; c.strokeRect(f.left, f.top, f.w, f.h);
      c.fillStyle = t.dim; c.font = "11px system-ui, sans-serif"; c.textAlign = "center"; c.textBaseline = "top";
      for (let i = 0; i <= 5; i++) {
        c.fillText(number(b.x0 + (i / 5) * (b.x1 - b.x0)), f.left + (i / 5) * f.w, f.top + f.h + 5);
        c.save(); c.textAlign = "right"; c.textBaseline = "middle"; c.fillText(number(b.y0 + (i / 5) * (b.y1 - b.y0)), f.left - 4, f.top + (1 - i / 5) * f.h); c.restore();
      }
      c.fillText(d.xName || "", f.left + f.w / 2, f.top + f.h + 22);
      c.save(); c.translate(10, f.top + f.h / 2); c.rotate(-Math.PI / 2); c.fillText(d.yName || "", 0, -4); c.restore();
      c.save(); c.beginPath(); c.rect(f.left, f.top, f.w, f.h); c.clip();
      const r = d.x.length > 1500 ? 2.4 : d.x.length > 300 ? 3.5 : 5, l = lut(d.palette || "viridis");
      for (let pass = 0; pass < 2; pass++) for (let n = 0; n < d.x.length; n++) {
        const chosen = d.selected && d.selected.has(n); if ((pass === 1) !== Boolean(chosen)) continue;
        const [x, y] = this.place(n), v = d.value ? d.value[n] : 0, i = v === v ? Math.max(0, Math.min(254, Math.round(((v - d.low) / (d.high - d.low || 1)) * 254))) : -1;
        c.fillStyle = i < 0 ? t.hatch : `rgb(${l[3 * i]},${l[3 * i + 1]},${l[3 * i + 2]})`;
        c.beginPath(); c.arc(x, y, chosen ? r + 1 : r, 0, 7); c.fill();
        if (chosen) { c.strokeStyle = t.accent; c.lineWidth = 2; c.stroke(); } else if (r > 3) { c.strokeStyle = t.line; c.lineWidth = 1; c.stroke(); }
      }
      for (const [n, stroke] of [[this.hover, t.fg], [d.current, t.pick]]) if (n >= 0) { const [x, y] = this.place(n); c.strokeStyle = stroke; c.lineWidth = 2; c.beginPath(); c.arc(x, y, r + 3, 0, 7); c.stroke(); }
      if (this.lasso) { c.strokeStyle = t.accent; c.fillStyle = t.accent; c.beginPath(); this.lasso.forEach((p, i) => (i ? c.lineTo(...p) : c.moveTo(...p))); c.closePath(); c.globalAlpha = 0.12; c.fill(); c.globalAlpha = 1; c.stroke(); }
      c.restore();
    }
  }
  function inside(line, x, y) {
    let found = false;
    for (let i = 0, j = line.length - 1; i < line.length; j = i++) {
      const [xi, yi] = line[i], [xj, yj] = line[j];
      if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) found = !found;
    }
    return found;
  }

  /* ---- patches over a picture --------------------------------------------------------------------------------------- */
  class Patches {
    constructor(root, on) {
      this.root = root; this.on = on || {}; this.hover = -1;
      this.canvas = el("canvas", { class: "hs-canvas", role: "img", tabindex: "0" }); root.replaceChildren(this.canvas);
      this.canvas.addEventListener("mousemove", (e) => { const i = this.index(e); if (i !== this.hover) { this.hover = i; this.draw(); if (this.on.hover) this.on.hover(i); }
        if (i < 0) tooltip.hide(); else { const p = this.panel; tooltip.show(e.clientX, e.clientY, rowsNode(`patch ${p.row[i]}, ${p.column[i]}`, [["position", p.positions[i]], ["weight", this.values ? number(this.values[p.positions[i]]) : "–"]])); } });
      this.canvas.addEventListener("mouseleave", () => { this.hover = -1; tooltip.hide(); this.draw(); });
      this.canvas.addEventListener("click", (e) => { const i = this.index(e); if (i >= 0 && this.on.pick) this.on.pick(this.panel.positions[i]); });
      new ResizeObserver(() => this.draw()).observe(root);
    }
    set(data) { Object.assign(this, data); this.draw(); }
    size() { const w = Math.min(this.root.clientWidth || 300, this.most || 460); const p = this.panel; return { w, h: (w * p.rows) / p.columns }; }
    index(e) {
      const r = this.canvas.getBoundingClientRect(), s = this.size(), p = this.panel;
      const col = Math.floor(((e.clientX - r.left) / s.w) * p.columns), row = Math.floor(((e.clientY - r.top) / s.h) * p.rows);
      if (!this.lookup || this.looked !== p) { this.lookup = new Map(p.positions.map((_, i) => [p.row[i] * 100000 + p.column[i], i])); this.looked = p; }
      const i = this.lookup.get(row * 100000 + col); return i === undefined ? -1 : i;
    }
    draw() {
      const p = this.panel; if (!p || !this.root.clientWidth) return;
      const s = this.size(), t = theme(this.root), c = sized(this.canvas, s.w, s.h), cw = s.w / p.columns, ch = s.h / p.rows;
      c.fillStyle = "#808080"; c.fillRect(0, 0, s.w, s.h);
      if (this.image && p.whole) { c.imageSmoothingEnabled = true; c.drawImage(this.image, 0, 0, s.w, s.h); }
      if (this.values) {
        const small = document.createElement("canvas"); small.width = p.columns; small.height = p.rows;
        const sc = small.getContext("2d"), image = sc.createImageData(p.columns, p.rows), l = lut("viridis"), top = this.top || 1e-9, opacity = this.opacity === undefined ? 0.75 : this.opacity;
        p.positions.forEach((at, i) => {
          const v = this.values[at], u = Math.sqrt(Math.max(0, Math.min(1, v / top))), j = Math.round(u * 254), o = 4 * (p.row[i] * p.columns + p.column[i]);
          if (v === v) image.data.set([l[3 * j], l[3 * j + 1], l[3 * j + 2], Math.round(255 * opacity * (this.flat ? 1 : 0.25 + 0.75 * u))], o);
        });
        sc.putImageData(image, 0, 0); c.imageSmoothingEnabled = false; c.drawImage(small, 0, 0, s.w, s.h);
      }
      const mark = (i, stroke) => { c.strokeStyle = stroke; c.lineWidth = 2; c.strokeRect(p.column[i] * cw, p.row[i] * ch, cw, ch); };
      if (this.hover >= 0) mark(this.hover, t.accent);
      if (this.query !== undefined && this.query !== null) { const i = p.positions.indexOf(this.query); if (i >= 0) mark(i, t.pick); }
    }
  }

  /* ---- lines and bars ------------------------------------------------------------------------------------------------ */
  function lines(root, series, options) {
    const o = options || {}, canvas = el("canvas", { class: "hs-canvas", role: "img", "aria-label": o.label || "" });
    const legend = el("div", { class: "hs-legend" });
    root.replaceChildren(canvas, legend);
    const t = theme(root), width = Math.max(240, root.clientWidth), h = o.height || 170, left = 54, w = width - left - 10, c = sized(canvas, width, h + 34);
    const all = series.flatMap((s) => s.y).filter((v) => v === v && v !== null), [low0, high0] = range(all), low = Math.min(o.zero === false ? low0 : 0, low0), top0 = o.zero === false ? high0 : Math.max(0, high0), high = top0 > low ? top0 : low + 1;
    const n = Math.max(2, ...series.map((s) => s.y.length)), px = (i) => left + (i / (n - 1)) * w, py = (v) => 6 + (1 - (v - low) / (high - low)) * h;
    c.strokeStyle = t.line; c.strokeRect(left, 6, w, h); c.fillStyle = t.dim; c.font = "11px system-ui, sans-serif";
    c.textAlign = "right"; c.textBaseline = "middle"; for (let i = 0; i <= 3; i++) c.fillText(number(low + (i / 3) * (high - low)), left - 4, py(low + (i / 3) * (high - low)));
    c.textAlign = "center"; c.textBaseline = "top"; const step = Math.ceil(n / 12); for (let i = 0; i < n; i += step) c.fillText(o.ticks && o.ticks[i] !== undefined ? visible(o.ticks[i]).slice(0, 9) : String(i), px(i), h + 10);
    c.textAlign = "center"; c.fillText(o.x || "", left + w / 2, h + 22);
    const dashes = [[], [6, 3], [2, 3], [8, 3, 2, 3]], colours = [t.pick, "#1c7ed6", "#2f9e44", t.dim];
    series.forEach((s, k) => {
      c.strokeStyle = colours[k % 4]; c.lineWidth = 2; c.setLineDash(dashes[k % 4]); c.beginPath(); let pen = false;
      s.y.forEach((v, i) => { if (v === null || v !== v) { pen = false; return; } if (pen) c.lineTo(px(i), py(v)); else c.moveTo(px(i), py(v)); pen = true; }); c.stroke();
      if (s.y.length === 1) { c.fillStyle = colours[k % 4]; c.fillRect(px(0) - 3, py(s.y[0]) - 3, 6, 6); }
      legend.append(el("span", { class: "hs-key", style: `--c:${colours[k % 4]}`, text: s.name }));
    });
    c.setLineDash([]);
    return canvas;
  }
  function bars(root, rows, options) {
    const o = options || {}, most = Math.max(1e-12, ...rows.map((r) => Math.abs(r.value)));
    root.replaceChildren(...rows.map((r) => el("div", { class: "hs-barrow" + (r.strong ? " hs-strong" : "") },
      el("span", { class: "hs-barname", text: r.name, title: r.name }),
      el("span", { class: "hs-bartrack" + (o.signed ? " hs-signed" : "") }, el("span", { class: "hs-barfill", style: o.signed ? `width:${((Math.abs(r.value) / most) * 50).toFixed(1)}%;margin-left:${(50 - (r.value < 0 ? (Math.abs(r.value) / most) * 50 : 0)).toFixed(1)}%` : `width:${((Math.abs(r.value) / most) * 100).toFixed(1)}%` })),
      el("span", { class: "hs-barvalue", text: (r.value > 0 && o.signed ? "+" : "") + number(r.value) + (r.note ? ` ${r.note}` : "") }))));
  }

  window.headscopeRender = { Grid, MapView, Strip, Scatter, Patches, lines, bars, lut, colour, css, floats, range, scale, number, headName, visible, theme, el, tooltip, rowsNode, colourbar, sized };
})();
