"use strict";
// Drawing: SVG elements, markers, and the two small charts of a chosen point.

const SVG = "http://www.w3.org/2000/svg";

/** Return an SVG element, appended to its parent. */
function draw(parent, name, attributes = {}, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== "") element.textContent = text;
  parent.append(element);
  return element;
}

/** Return an HTML element, appended to its parent. Text is never read as HTML. */
function put(parent, name, text = "", attributes = {}) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  parent.append(element);
  return element;
}

/** Outlines about (0, 0) for a radius of 1. */
const OUTLINES = {
  circle: "M1 0A1 1 0 1 1-1 0A1 1 0 1 1 1 0Z",
  square: "M-.88-.88H.88V.88H-.88Z",
  triangle: "M0-1.15L1.1.85H-1.1Z",
  down: "M0 1.15L1.1-.85H-1.1Z",
  diamond: "M0-1.25L1.25 0L0 1.25L-1.25 0Z",
  plus: "M-.4-1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z",
  lost: "M-.9-.9L.9 .9M.9-.9L-.9 .9",
  cross: "M-1.05-.5L-.5-1.05L0-.55L.5-1.05L1.05-.5L.55 0L1.05 .5L.5 1.05L0 .55L-.5 1.05L-1.05 .5L-.55 0Z",
};

/** Return a marker at (x, y). */
function mark(parent, shape, x, y, radius, attributes) {
  const options = { "vector-effect": "non-scaling-stroke", transform: `translate(${x} ${y}) scale(${radius})` };
  return draw(parent, "path", { d: OUTLINES[shape], ...options, ...attributes });
}

/** Return a small picture of a family's marker. */
function swatch(parent, family) {
  const svg = draw(parent, "svg", { width: 12, height: 12, "aria-hidden": "true" });
  mark(svg, family.marker, 6, 6, 4.5, { fill: family.colour });
  return svg;
}

/** Return the points that none of as few bytes or fewer beats, by bytes. */
function front(points, bytes) {
  const known = points.filter((point) => point.accuracy !== null);
  const sorted = known.sort((a, b) => bytes(a) - bytes(b) || b.accuracy - a.accuracy);
  let best = -1;
  return sorted.filter((point) => {
    const better = point.accuracy > best;
    best = Math.max(best, point.accuracy);
    return better;
  });
}

/** Return an accuracy in words: that of a run whose numbers were lost is none. */
function told(accuracy, digits = 3) {
  return accuracy === null ? "diverged" : accuracy.toFixed(digits);
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length / 2;
  return sorted.length % 2 ? sorted[Math.floor(middle)] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** Draw accuracy against learning rate: each run, and a line through the medians. */
function rateChart(parent, point, family) {
  const [width, height, left, right, top, bottom] = [280, 120, 30, 272, 8, 98];
  const title = `Accuracy against learning rate, best at ${rate(point.lr)}`;
  const svg = draw(parent, "svg", { viewBox: `0 0 ${width} ${height}`, class: "rates", role: "img", "aria-label": title });
  const rates = [...new Set(point.runs.map(([lr]) => lr))].sort((a, b) => a - b);
  const [low, high] = [Math.log(rates[0]), Math.log(rates.at(-1))];
  const inner = [left + 18, right - 18];
  const x = (lr) => (high > low ? inner[0] + ((inner[1] - inner[0]) * (Math.log(lr) - low)) / (high - low) : 150);
  const y = (accuracy) => bottom + (top - bottom) * accuracy;
  for (const value of [0, 0.5, 1]) {
    draw(svg, "line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) });
    draw(svg, "text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" }, value);
  }
  const shown = thinned(rates, 4);
  for (const lr of shown) draw(svg, "text", { x: x(lr), y: height - 5, "text-anchor": "middle" }, rate(lr));
  const known = point.runs.filter(([, accuracy]) => accuracy !== null);
  const whole = rates.filter((lr) => known.some((run) => run[0] === lr));
  const line = whole.map((lr) => [x(lr), y(median(known.filter((run) => run[0] === lr).map((run) => run[1])))]);
  draw(svg, "polyline", { class: "curve", points: line.join(" "), stroke: family.colour });
  for (const [lr, accuracy, seed, status] of point.runs) {
    const group = draw(svg, "g", { class: "run" });
    if (accuracy === null) mark(group, "lost", x(lr), bottom, 3.5, { class: "lost", stroke: family.colour });
    else draw(group, "circle", { cx: x(lr), cy: y(accuracy), r: 3, fill: family.colour });
    draw(group, "title", {}, `lr ${rate(lr)}, seed ${seed}: ${told(accuracy)} ${accuracy === null ? "" : status}`.trim());
  }
}

/** Draw a bar for each test segment. */
function segmentBars(parent, point, family) {
  const names = Object.keys(point.segments);
  const [width, step, left, right] = [280, 17, 74, 236];
  const options = { viewBox: `0 0 ${width} ${names.length * step + 2}`, class: "segments", role: "img" };
  const svg = draw(parent, "svg", { ...options, "aria-label": "Accuracy on each test segment" });
  names.forEach((name, i) => {
    const value = point.segments[name];
    const y = i * step + 2;
    draw(svg, "text", { x: left - 6, y: y + 11, "text-anchor": "end" }, name);
    draw(svg, "rect", { x: left, y, width: right - left, height: step - 5, fill: "var(--line)", opacity: 0.5 });
    const bar = { x: left, y, width: (right - left) * (value ?? 0), height: step - 5, fill: family.colour };
    draw(svg, "rect", { class: "bar", ...bar });
    draw(svg, "text", { x: right + 6, y: y + 11 }, value === null ? "none" : value.toFixed(3));
  });
}
