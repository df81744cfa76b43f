"use strict";
// The curves of a report: SVG drawn from the data in the page, with zoom, read-out, log scale and hidden lines.
// Text from the data is only ever set as text, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const host = document.getElementById("charts");
  const tip = document.getElementById("tip");
  const NS = "http://www.w3.org/2000/svg";
  const PAD = { left: 58, right: 14, top: 10, bottom: 26 };
  const view = { range: null }; // the steps that all charts show; null is all of them
  const charts = [];

  const svg = (parent, tag, attributes, text) => {
    const node = document.createElementNS(NS, tag);
    for (const name in attributes) node.setAttribute(name, attributes[name]);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  };
  const html = (parent, tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  };

  const number = (value) => {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-3) return value.toExponential(2);
    return size < 10 ? value.toFixed(4) : size < 1000 ? value.toFixed(2) : value.toFixed(1);
  };
  const onAxis = (value) => {
    const size = Math.abs(value);
    if (size && (size >= 1e6 || size < 1e-4)) return value.toExponential(1).replace(/\.0e/, "e");
    return String(Number(value.toPrecision(6)));
  };
  const steps = (value) => Math.round(value).toLocaleString("en-US");

  // places for labels: round numbers, or powers of ten
  const ticks = (low, high, count) => {
    const raw = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find((k) => k * power >= raw * 0.999) * power;
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9 && found.length < 30; i++) found.push(i * step);
    return found;
  };
  const logTicks = (low, high) => {
    const found = [];
    const decades = Math.log10(high / low);
    const each = Math.max(1, Math.ceil(decades / 6));
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += each)
      for (const k of decades < 2.2 ? [1, 2, 5] : [1]) {
        const value = k * 10 ** e;
        if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
      }
    return found.length > 1 ? found : ticks(low, high, 4).filter((value) => value > 0);
  };

  // position of the first step that is not below x
  const lowerBound = (xs, x) => {
    let low = 0, high = xs.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle + 1; else high = middle;
    }
    return low;
  };
  const nearest = (xs, x) => {
    const i = lowerBound(xs, x);
    return i === 0 ? 0 : i === xs.length || x - xs[i - 1] <= xs[i] - x ? i - 1 : i;
  };
  const nameOf = (line) =>
    line.name ?? (line.style === "member" || line.run !== undefined && !data.groups ? data.runs[line.run] : data.groups[line.group]);
  const colorOf = (line) => `var(--s${line.color % 8})`;
  const dashOf = (line) => ["", "7 4", "2 3", "9 3 2 3"][Math.floor(line.color / 8) % 4];

  const redraw = () => charts.forEach((chart) => chart.draw());
  const zoomTo = (range) => {
    view.range = range;
    redraw();
  };
  const zoomBy = (factor, at) => {
    const [a, b] = view.range ?? extent;
    const low = Math.max(extent[0], at - (at - a) * factor), high = Math.min(extent[1], at + (b - at) * factor);
    if (high - low >= Math.min(2, extent[1] - extent[0])) zoomTo(low <= extent[0] && high >= extent[1] ? null : [low, high]);
  };
  const every = data.charts.flatMap((chart) => chart.lines).filter((line) => line.x.length);
  const extent = [Math.min(...every.map((line) => line.x[0])), Math.max(...every.map((line) => line.x[line.x.length - 1]))];

  const make = (spec) => {
    const figure = html(host, "figure", "chart");
    const caption = html(figure, "figcaption");
    html(caption, "h3", "", spec.title);
    const reset = html(caption, "button", "", "all steps");
    const log = html(caption, "button", "", "log scale");
    const canvas = svg(figure, "svg", { tabindex: "0", role: "img", "aria-label": `${spec.title} over steps; arrow keys read values, + and - zoom` });
    const legend = html(figure, "div", "legend");
    const hidden = new Set();
    const clip = `clip${charts.length}`;
    const state = { log: false, drag: null, at: null };
    let place = null; // what the last drawing has measured

    // one entry a name: its thin and its thick line come and go together
    const entries = new Map();
    for (const line of spec.lines) {
      if (line.style === "member") continue;
      if (!entries.has(nameOf(line))) entries.set(nameOf(line), line);
    }
    for (const [name, line] of entries) {
      const button = html(legend, "button");
      html(button, "i", `key s${line.color % 8}${line.color >= 8 ? " dashed" : ""}`);
      button.append(name);
      button.setAttribute("aria-pressed", "false");
      button.title = "show or hide";
      button.addEventListener("click", () => {
        if (!hidden.delete(line.color)) hidden.add(line.color);
        button.setAttribute("aria-pressed", hidden.has(line.color));
        draw();
      });
    }
    const marks = spec.title === "lr" ? [] : data.marks;

    const range = (lines, x0, x1) => {
      let low = Infinity, high = -Infinity;
      for (const line of lines) {
        const to = Math.min(line.x.length, lowerBound(line.x, x1) + 1);
        for (let i = Math.max(0, lowerBound(line.x, x0) - 1); i < to; i++)
          for (const value of line.lo ? [line.lo[i], line.hi[i]] : [line.y[i]])
            if (value !== null && (!state.log || value > 0)) {
              low = Math.min(low, value);
              high = Math.max(high, value);
            }
      }
      if (low > high) return [state.log ? 0.1 : 0, 1];
      if (low === high) return state.log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
      if (state.log) return [low / (high / low) ** 0.04, high * (high / low) ** 0.04];
      return [low - (high - low) * 0.04, high + (high - low) * 0.04];
    };

    const path = (line, from, to, values, X, Y) => {
      let told = "", pen = "M", gap = true;
      for (let i = from; i < to; i++) {
        const value = values[i];
        if (value === null || (state.log && value <= 0)) {
          pen = "M";
          gap = true;
          continue;
        }
        told += `${pen}${X(line.x[i]).toFixed(1)} ${Y(value).toFixed(1)}`;
        if (gap && (i + 1 >= to || values[i + 1] === null)) told += "h0.01"; // a lone value is a dot
        pen = "L";
        gap = false;
      }
      return told;
    };

    const draw = () => {
      const width = canvas.clientWidth, height = canvas.clientHeight;
      if (!width || !every.length) return;
      canvas.setAttribute("viewBox", `0 0 ${width} ${height}`);
      canvas.replaceChildren();
      const lines = spec.lines.filter((line) => !hidden.has(line.color) && line.x.length);
      let [x0, x1] = view.range ?? extent;
      if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
      const [y0, y1] = range(lines, x0, x1);
      const inner = { w: width - PAD.left - PAD.right, h: height - PAD.top - PAD.bottom };
      const X = (x) => PAD.left + (inner.w * (x - x0)) / (x1 - x0);
      const Y = state.log
        ? (y) => PAD.top + inner.h * (1 - Math.log(y / y0) / Math.log(y1 / y0))
        : (y) => PAD.top + inner.h * (1 - (y - y0) / (y1 - y0));
      place = { lines, x0, x1, X, Y, inner };
      const defs = svg(svg(canvas, "defs", {}), "clipPath", { id: clip });
      svg(defs, "rect", { x: PAD.left, y: PAD.top - 2, width: inner.w, height: inner.h + 4 });
      for (const y of state.log ? logTicks(y0, y1) : ticks(y0, y1, 5)) {
        svg(canvas, "line", { class: "gridline", x1: PAD.left, x2: width - PAD.right, y1: Y(y), y2: Y(y) });
        svg(canvas, "text", { x: PAD.left - 7, y: Y(y) + 4, "text-anchor": "end" }, onAxis(y));
      }
      const base = height - PAD.bottom;
      svg(canvas, "line", { class: "axis", x1: PAD.left, x2: width - PAD.right, y1: base, y2: base });
      for (const x of ticks(x0, x1, Math.max(3, Math.floor(inner.w / 75)))) {
        if (x !== Math.round(x)) continue;
        const anchor = X(x) > width - 40 ? "end" : "middle";
        svg(canvas, "text", { x: X(x), y: height - 8, "text-anchor": anchor }, x === 0 ? "step 0" : steps(x));
      }
      const area = svg(canvas, "g", { "clip-path": `url(#${clip})` });
      for (const mark of marks)
        if (mark.x >= x0 && mark.x <= x1) {
          const line = svg(area, "line", { class: "mark", x1: X(mark.x), x2: X(mark.x), y1: PAD.top, y2: base });
          svg(line, "title", {}, `${mark.label}, step ${steps(mark.x)}`);
        }
      const order = { raw: 0, member: 1, main: 2, mean: 3 };
      for (const line of [...lines].sort((a, b) => order[a.style] - order[b.style])) {
        const from = Math.max(0, lowerBound(line.x, x0) - 1), to = Math.min(line.x.length, lowerBound(line.x, x1) + 1);
        if (line.lo && !(state.log && line.lo.some((value) => value <= 0))) {
          const there = path(line, from, to, line.hi, X, Y);
          let back = "";
          for (let i = to - 1; i >= from; i--) back += `L${X(line.x[i]).toFixed(1)} ${Y(line.lo[i]).toFixed(1)}`;
          if (to > from) svg(area, "path", { class: "band", d: `${there}${back}Z`, style: `fill:${colorOf(line)}` });
        }
        const style = `stroke:${colorOf(line)}`;
        svg(area, "path", { class: `curve ${line.style}`, d: path(line, from, to, line.y, X, Y), style,
          "stroke-dasharray": line.style === "raw" ? "" : dashOf(line), "stroke-linecap": "round" });
        if (line.style === "main" && to - from <= 30)
          for (let i = from; i < to; i++)
            if (line.y[i] !== null && (!state.log || line.y[i] > 0))
              svg(area, "circle", { cx: X(line.x[i]), cy: Y(line.y[i]), r: 2.2, style: `fill:${colorOf(line)}` });
      }
      place.over = svg(canvas, "g", {});
      reset.hidden = view.range === null;
      if (state.at !== null) read(state.at, null);
    };

    // the value of each line at its step nearest to the pointer
    const read = (x, pointer) => {
      if (!place) return;
      const { lines, X, Y, over } = place;
      const thick = lines.filter((line) => line.style !== "raw" && line.style !== "member");
      const guides = thick.length ? thick : lines;
      let snapped = null;
      for (const line of guides) {
        const at = line.x[nearest(line.x, x)];
        if (snapped === null || Math.abs(at - x) < Math.abs(snapped - x)) snapped = at;
      }
      over.replaceChildren();
      tip.replaceChildren();
      if (snapped === null || snapped < place.x0 || snapped > place.x1) return void hide();
      state.at = x;
      svg(over, "line", { class: "cross", x1: X(snapped), x2: X(snapped), y1: PAD.top, y2: PAD.top + place.inner.h });
      html(tip, "div", "note", `step ${steps(snapped)}`);
      const seen = new Set();
      for (const line of [...guides, ...lines.filter((one) => one.style === "raw")]) {
        const i = nearest(line.x, snapped), value = line.y[i];
        if (Math.abs(line.x[i] - snapped) > (place.x1 - place.x0) * 0.05) continue;
        if (value !== null && (!state.log || value > 0))
          svg(over, "circle", { cx: X(line.x[i]), cy: Y(value), r: 3.6, style: `fill:${colorOf(line)}` });
        const row = html(tip, "div");
        html(row, "i", `key s${line.color % 8}`);
        const again = seen.has(nameOf(line)) ? " (single step)" : "";
        const off = line.x[i] === snapped ? "" : ` at ${steps(line.x[i])}`;
        html(row, "span", "", nameOf(line) + again + off);
        html(row, "b", "", value === null ? "not finite" : number(value) + (line.lo ? ` (${number(line.lo[i])} to ${number(line.hi[i])})` : ""));
        seen.add(nameOf(line));
      }
      const box = canvas.getBoundingClientRect();
      const left = pointer ? pointer.clientX : box.left + X(snapped), top = pointer ? pointer.clientY : box.top + 20;
      tip.style.display = "block";
      const past = left + 18 + tip.offsetWidth > innerWidth - 6;
      tip.style.left = `${Math.max(6, past ? left - tip.offsetWidth - 14 : left + 16)}px`;
      tip.style.top = `${Math.max(6, Math.min(top + 14, innerHeight - tip.offsetHeight - 6))}px`;
    };
    const hide = () => {
      tip.style.display = "none";
      state.at = null;
      place?.over?.replaceChildren();
    };
    const stepAt = (event) => {
      const share = (event.clientX - canvas.getBoundingClientRect().left - PAD.left) / place.inner.w;
      return place.x0 + Math.min(1, Math.max(0, share)) * (place.x1 - place.x0);
    };

    canvas.addEventListener("pointerdown", (event) => {
      if (!place || event.button !== 0) return;
      state.drag = { from: stepAt(event), x: event.clientX };
      try { canvas.setPointerCapture(event.pointerId); } catch { /* a pointer that is already gone */ }
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!place) return;
      const x = stepAt(event);
      if (state.drag && Math.abs(event.clientX - state.drag.x) > 5) {
        hide();
        const [a, b] = [state.drag.from, x].sort((p, q) => p - q);
        svg(place.over, "rect", { class: "zoom", x: place.X(a), y: PAD.top, width: place.X(b) - place.X(a), height: place.inner.h });
      } else read(x, event);
    });
    canvas.addEventListener("pointerup", (event) => {
      const drag = state.drag;
      state.drag = null;
      if (!drag || Math.abs(event.clientX - drag.x) <= 5) return;
      const [a, b] = [drag.from, stepAt(event)].sort((p, q) => p - q);
      hide();
      if (b - a >= Math.min(2, extent[1] - extent[0])) zoomTo([a, b]); else draw();
    });
    canvas.addEventListener("pointercancel", () => { state.drag = null; hide(); });
    canvas.addEventListener("pointerleave", hide);
    canvas.addEventListener("blur", hide);
    canvas.addEventListener("dblclick", () => zoomTo(null));
    canvas.addEventListener("wheel", (event) => {
      if (!place || !(event.ctrlKey || event.metaKey || event.shiftKey || document.activeElement === canvas)) return; // else the page scrolls
      event.preventDefault();
      zoomBy((event.deltaY || event.deltaX) > 0 ? 1.25 : 0.8, stepAt(event));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      if (!place) return;
      const middle = (place.x0 + place.x1) / 2, at = state.at ?? middle;
      const far = (place.x1 - place.x0) / 40;
      const act = {
        ArrowLeft: () => read(Math.max(place.x0, at - far), null), ArrowRight: () => read(Math.min(place.x1, at + far), null),
        "+": () => zoomBy(0.7, at), "-": () => zoomBy(1.4, at), Escape: () => { hide(); zoomTo(null); },
      }[event.key];
      if (act) { event.preventDefault(); act(); }
    });
    log.setAttribute("aria-pressed", "false");
    log.addEventListener("click", () => {
      state.log = !state.log;
      log.setAttribute("aria-pressed", state.log);
      draw();
    });
    reset.addEventListener("click", () => zoomTo(null));
    log.hidden = !spec.lines.some((line) => line.y.some((value) => value > 0));
    charts.push({ draw });
    return canvas;
  };

  if (host) {
    const watcher = new ResizeObserver(redraw);
    data.charts.forEach(make);
    watcher.observe(host);
    redraw();
  }
})();
