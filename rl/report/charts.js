"use strict";
// Curves as SVG. Everything is made of elements and text nodes; nothing here is ever parsed as HTML.
const json = (id) => { const node = document.getElementById(id); return node ? JSON.parse(node.textContent) : null; };
const make = (tag, kind, text) => {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  if (text !== undefined) node.textContent = text;
  return node;
};
const draw = (parent, tag, attributes, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
};
const WIDTH = 560, LEFT = 56, RIGHT = 12, TOP = 10, BOTTOM = 24, SMOOTH_FROM = 30;
const HEIGHTS = { lines: 262, bars: 262, strip: 118 };
const round = (value) => Math.round(value * 10) / 10;

function show(value, unit) {
  if (unit === "share") return Number((100 * value).toPrecision(3)) + " %";
  if (unit === "s") return value >= 120 ? Number((value / 60).toPrecision(3)) + " min" : Number(value.toPrecision(3)) + " s";
  if (Math.abs(value) >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return String(Number(value.toPrecision(4)));
}

function ticksOf(low, high, target) {
  // Round numbers inside low..high: 1, 2 or 5 times a power of ten apart.
  if (!(high > low)) return [low];
  const rough = (high - low) / target, power = 10 ** Math.floor(Math.log10(rough));
  const gap = [1, 2, 5, 10].map((m) => m * power).reduce((a, b) => (Math.abs(b - rough) < Math.abs(a - rough) ? b : a));
  const ticks = [];
  for (let k = Math.ceil(low / gap - 1e-9); k <= Math.floor(high / gap + 1e-9); k++) ticks.push(Number((k * gap).toPrecision(12)));
  return ticks;
}

function smooth(values) {
  // Centred moving median: unlike a mean it keeps the step of a jump.
  const half = Math.max(1, Math.floor(values.length / 24));
  return values.map((_, i) => {
    const window = values.slice(Math.max(0, i - half), i + half + 1).sort((a, b) => a - b);
    const middle = window.length >> 1;
    return window.length % 2 ? window[middle] : (window[middle - 1] + window[middle]) / 2;
  });
}

function linesOf(panel, runs) {
  const isMany = runs.length > 1, lines = [];
  runs.forEach((run, r) => panel.lines.forEach(([label, name], i) => {
    const curve = run.curves[name];
    if (!curve) return;
    let [x, y, low, high] = curve;
    if (panel.band && i === 0) {
      const [from, to] = panel.band.map((end) => new Map(run.curves[end] ? run.curves[end][0].map((s, k) => [s, run.curves[end][1][k]]) : []));
      if (x.every((s) => from.has(s) && to.has(s))) { low = x.map((s) => from.get(s)); high = x.map((s) => to.get(s)); }
    }
    const of = isMany && panel.lines.length > 1 ? run.name + ", " + label : isMany ? run.name : label;
    lines.push({ label: of, color: 1 + ((isMany ? r : i) % 8), x, y, low, high });
  }));
  return lines;
}

function stack(lines) {
  // Each area reaches down to the axis and is covered by those drawn after it, so that no seam shows between them.
  const sums = new Map();
  for (const line of lines) line.top = line.x.map((s, i) => { sums.set(s, (sums.get(s) || 0) + Math.max(0, line.y[i])); return sums.get(s); });
  return Math.max(...sums.values()) || 1;
}

function pitchOf(runs) {
  // Steps between two points; in a long run each point covers several steps.
  const gaps = runs.flatMap((run) => Object.entries(run.curves)).filter(([name]) => !name.startsWith("heldout/"))
    .map(([, [x]]) => (x.length > 1 ? (x[x.length - 1] - x[0]) / (x.length - 1) : 1));
  return gaps.length ? Math.max(1, Math.min(...gaps)) : 1;
}

function chart(panel, runs, range, pitch) {
  const box = make("div", "panel"), legend = make("div", "legend"), lines = linesOf(panel, runs);
  const isBars = panel.kind === "bars" && runs.length === 1, height = HEIGHTS[panel.kind], bottom = height - BOTTOM;
  legend.append(make("span", "unit", runs.length > 1 ? `${panel.lines[0][0]} (${panel.unit})` : panel.unit));
  for (const line of lines) {
    const key = make("span", "key");
    key.append(make("i", "swatch c" + line.color), line.label);
    legend.append(key);
  }
  let [low, high] = [0, 1];
  if (isBars && lines.length) high = stack(lines);
  const gaps = height > 160 ? 4 : 2;
  let ticks = ticksOf(low, high, gaps);
  if (!panel.is_share) {
    if (!isBars) {
      const values = lines.flatMap((line) => [...line.y, ...(line.low || []), ...(line.high || [])]);
      [low, high] = [Math.min(...values), Math.max(...values)];
    }
    if (high - low < 1e-12 * Math.max(1, Math.abs(high))) [low, high] = high ? [high - Math.abs(high) / 10, high + Math.abs(high) / 10] : [0, 1];
    ticks = ticksOf(low, high, gaps);
    if (ticks.length < 2) ticks = ticksOf(low, high, 2 * gaps);
    const gap = ticks.length > 1 ? ticks[1] - ticks[0] : high - low; // the axis ends on ticks: no curve is cut by the frame
    [low, high] = [Math.floor(low / gap + 1e-9) * gap, Math.ceil(high / gap - 1e-9) * gap];
    ticks = Array.from({ length: Math.round((high - low) / gap) + 1 }, (_, k) => Number((low + k * gap).toPrecision(12)));
  }
  const atX = (step) => round(LEFT + ((step - range[0]) / (range[1] - range[0])) * (WIDTH - LEFT - RIGHT));
  const atY = (value) => round(bottom - ((value - low) / (high - low)) * (bottom - TOP));
  const svg = draw(null, "svg", { class: "plot", viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": panel.lines.map((l) => l[0]).join(", ") });
  for (const tick of ticks) {
    draw(svg, "path", { class: "grid", d: `M${LEFT} ${atY(tick)}H${WIDTH - RIGHT}` });
    draw(svg, "text", { x: LEFT - 6, y: atY(tick), dy: 4, class: "end" }, show(tick, panel.unit));
  }
  for (const tick of ticksOf(range[0], range[1], 6).filter(Number.isInteger))
    draw(svg, "text", { x: atX(tick), y: bottom + 16, class: atX(tick) > WIDTH - RIGHT - 16 ? "end" : "middle" }, tick.toLocaleString("en"));
  draw(svg, "text", { x: LEFT - 14, y: bottom + 16, class: "end" }, panel.axis || "step");
  for (const line of isBars ? [...lines].reverse() : lines) {
    const color = " c" + line.color, points = (ys) => line.x.map((s, i) => `${atX(s)},${atY(ys[i])}`);
    if (isBars) {
      const half = (pitch / 2) * ((WIDTH - LEFT - RIGHT) / (range[1] - range[0])), side = half > 4 ? half - 1 : half;
      draw(svg, "path", { class: "fill" + color, d: line.x.map((s, i) => `M${round(atX(s) - side)} ${bottom}V${atY(line.top[i])}H${round(atX(s) + side)}V${bottom}z`).join("") });
      continue;
    }
    if (line.low && line.x.length > 1) draw(svg, "polygon", { class: "band" + color, points: [...points(line.high), ...points(line.low).reverse()].join(" ") });
    else if (line.low) draw(svg, "path", { class: "line" + color, d: `M${points(line.low)[0]}L${points(line.high)[0]}` });
    const isLong = line.x.length > SMOOTH_FROM;
    draw(svg, "polyline", { class: "line" + color + (isLong ? " raw" : ""), points: points(line.y).join(" ") });
    if (isLong) draw(svg, "polyline", { class: "line" + color, points: points(smooth(line.y)).join(" ") });
    else line.x.forEach((s, i) => draw(svg, "circle", { class: "dot" + color, cx: atX(s), cy: atY(line.y[i]), r: 2.5 }));
  }
  draw(svg, "path", { class: "axis", d: `M${LEFT} ${bottom}H${WIDTH - RIGHT}` });
  box.append(legend, svg);
  pointAt(box, svg, lines, { range, bottom, atX, panel });
  return box;
}

function pointAt(box, svg, lines, { range, bottom, atX, panel }) {
  const unit = panel.unit, axis = panel.axis || "step";
  // Under the pointer: the values at the nearest step.
  const steps = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const guide = draw(svg, "path", { class: "guide", d: "" }), tip = make("div", "tip");
  tip.hidden = true;
  box.append(tip);
  svg.addEventListener("pointerleave", () => { tip.hidden = true; guide.setAttribute("d", ""); });
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect(), x = ((event.clientX - frame.left) / frame.width) * WIDTH;
    const wanted = range[0] + ((x - LEFT) / (WIDTH - LEFT - RIGHT)) * (range[1] - range[0]);
    const step = steps.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
    guide.setAttribute("d", `M${atX(step)} ${TOP}V${bottom}`);
    tip.replaceChildren(make("strong", "", `${axis} ${show(step, "")}`));
    for (const line of lines) {
      const i = line.x.indexOf(step);
      if (i < 0) continue;
      const row = make("div", "key"), ends = line.low && line.high[i] > line.low[i] ? ` [${show(line.low[i], unit)}, ${show(line.high[i], unit)}]` : "";
      row.append(make("i", "swatch c" + line.color), `${line.label}: ${show(line.y[i], unit)}${ends}`);
      tip.append(row);
    }
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX - frame.left + 14, frame.width - tip.offsetWidth) + "px";
  });
}

function sparkline(cell, runs) {
  const curve = runs[0].curves[cell.dataset.spark];
  if (!curve) return;
  const [x, y] = curve, low = Math.min(...y), high = Math.max(...y), span = x[x.length - 1] - x[0] || 1;
  const at = (value) => round(high > low ? 21 - ((value - low) / (high - low)) * 18 : 12), atX = (step) => round(2 + ((step - x[0]) / span) * 112);
  const svg = draw(cell, "svg", { class: "spark", viewBox: "0 0 120 24" });
  for (const bound of [cell.dataset.low, cell.dataset.high].filter((b) => b !== "" && b > low && b < high)) draw(svg, "path", { class: "bound", d: `M2 ${at(bound)}H114` });
  draw(svg, "polyline", { class: "line c1", points: x.map((s, i) => `${atX(s)},${at(y[i])}`).join(" ") });
  draw(svg, "circle", { class: "dot c1", cx: atX(x[x.length - 1]), cy: at(y[y.length - 1]), r: 2 });
}

(() => {
  const runs = json("curves"), figures = json("figure-list");
  if (!runs) return;
  const steps = runs.flatMap((run) => Object.values(run.curves).flatMap((curve) => [curve[0][0], curve[0][curve[0].length - 1]]));
  const pitch = pitchOf(runs), range = [Math.min(...steps) - pitch / 2, Math.max(...steps) + pitch / 2];
  const fill = (place, cards) => {
    for (const figure of cards) {
      const card = make("figure", "card"), head = make("figcaption");
      head.append(make("h3", "", figure.title), make("p", "", figure.note));
      card.append(head, ...figure.panels.map((panel) => chart(panel, runs, range, pitch)));
      place.append(card);
    }
  };
  const more = document.getElementById("more-figures");
  fill(document.getElementById("figures"), figures.first);
  if (more) more.closest("details").addEventListener("toggle", () => { if (!more.childElementCount) fill(more, figures.more); });
  for (const cell of document.querySelectorAll("[data-spark]")) sparkline(cell, runs);
})();

(() => {
  // Load of experts, layer by expert, in per cent of an even one.
  for (const { step, load } of json("experts") || []) {
    const card = make("figure", "card"), canvas = make("canvas", "heat"), pen = canvas.getContext("2d");
    [canvas.width, canvas.height] = [load[0].length, load.length];
    const image = pen.createImageData(canvas.width, canvas.height);
    load.flat().forEach((value, i) => {
      const end = value < 100 ? [30, 80, 190] : [215, 95, 0], t = value < 100 ? 1 - value / 100 : Math.min(1, (value - 100) / 200);
      image.data.set([...end.map((to) => 205 + t * (to - 205)), 255], 4 * i);
    });
    pen.putImageData(image, 0, 0);
    card.append(make("h3", "", `Step ${step}: idlest ${Math.min(...load.flat())} %, busiest ${Math.max(...load.flat())} %`), canvas);
    document.getElementById("heat-maps").append(card);
  }
})();
