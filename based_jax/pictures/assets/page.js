"use strict";
// The page: what is shown, the frontier, the chosen point, the table.

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const familyOf = Object.fromEntries(data.families.map((family) => [family.name, family]));
const hidden = new Set();
let chosen = null;

const bytes = (point) => point.bytes[at("convolution").checked ? 1 : 0];
const visible = (points) => points.filter((point) => !hidden.has(point.family));
const shownPublished = () => (at("published").checked ? visible(data.published) : []);

const count = (value) => (value ?? null)?.toLocaleString("en") ?? "-";
const COLUMNS = [
  { key: "family", name: "mixer", text: (p) => p.family, words: true },
  { key: "label", name: "configuration", text: () => "", words: true },
  { key: "bytes", name: "state bytes", value: bytes, text: (p) => count(bytes(p)), rises: true },
  { key: "accuracy", name: "accuracy", text: (p) => told(p.accuracy, 4) },
  { key: "low", name: "min", text: (p) => told(p.low, 4) },
  { key: "high", name: "max", text: (p) => told(p.high, 4) },
  { key: "seeds", name: "seeds", text: (p) => p.seeds },
  { key: "lost", name: "diverged runs", text: (p) => p.lost },
  { key: "lr", name: "best lr", text: (p) => rate(p.lr) },
  { key: "params", name: "parameters", text: (p) => count(p.params) },
].map((column) => ({ value: (p) => p[column.key] ?? null, ...column }));

/** Make the check boxes and the buttons. */
function makeControls() {
  for (const family of data.families) {
    const ours = data.points.filter((point) => point.family === family.name).length;
    const label = put(at("families"), "label");
    const box = put(label, "input", "", { type: "checkbox", value: family.name });
    box.checked = true;
    swatch(label, family);
    label.append(ours ? family.name : `${family.name} (published)`);
  }
  at("controls").addEventListener("change", refresh);
  at("all").addEventListener("click", () => checkAll(true));
  at("none").addEventListener("click", () => checkAll(false));
}

function checkAll(value) {
  for (const box of at("families").querySelectorAll("input")) box.checked = value;
  refresh();
}

/** Draw everything that depends on the controls. */
function refresh() {
  hidden.clear();
  for (const box of at("families").querySelectorAll("input:not(:checked)")) hidden.add(box.value);
  drawChart();
  fillTable();
  showChosen();
}

/** Draw the frontier as wide as there is room. */
function drawChart() {
  const width = Math.max(300, at("frontier").clientWidth);
  const height = Math.max(320, Math.min(560, width * 0.62));
  // The axes follow the data, not the filter: a picture that jumps with each check box cannot be compared.
  const all = [...data.points, ...(at("published").checked ? data.published : [])];
  const axes = chart.axes({ width, height }, byteAxis(all.map(bytes)), accuracyAxis());
  for (const point of shownPublished()) if (isInside(axes, point)) drawPublished(axes, point);
  for (const family of data.families) drawFamily(axes, family);
  at("zoom").querySelector(".reset").disabled = !chart.zoomed;
}

function byteAxis(sizes) {
  const label = "state of one sequence, fp32";
  const [low, high] = [Math.min(...sizes), Math.max(...sizes)];
  if (at("linear").checked) return { kind: "bytes", ends: [0, high * 1.04], label };
  return { kind: "log2bytes", ends: [Math.log2(low) - 0.4, Math.log2(high) + 0.4], label };
}

/** Return the axis of accuracies; where points diverged there is room for them below 0. */
function accuracyAxis() {
  const low = data.points.some((point) => point.lostSeeds) ? -0.06 : 0;
  if (!at("errors").checked) return { kind: "accuracy", ends: [low, 1], label: "accuracy, mean over tests" };
  return { kind: "errors", ends: [3 * low, depth(1)], label: "accuracy, by log of error" };
}

function isInside(axes, point) {
  return axes.x.shown(bytes(point)) && (point.accuracy === null || axes.y.shown(point.accuracy));
}

function drawPublished(axes, point) {
  const place = [axes.x.place(bytes(point)), axes.y.place(point.accuracy)];
  const group = drawGroup(axes.marks, point, ...place, "published");
  mark(group, point.marker, ...place, 4.5, { class: "hollow", stroke: familyOf[point.family].colour });
}

/** Draw what marks and tells a point, and let pointer and keys choose it. */
function drawGroup(parent, point, x, y, kind) {
  const words = [point.family, point.label, point.source && "published"].filter(Boolean).join(", ");
  const value = point.accuracy === null ? "diverged" : `accuracy ${told(point.accuracy)}`;
  const name = `${words}: ${short(bytes(point))}, ${value}`;
  const group = draw(parent, "g", { class: kind, tabindex: -1, role: "button", "aria-label": name });
  group.point = point;
  draw(group, "circle", { class: "ring", cx: x, cy: y, r: 9 });
  for (const event of ["pointerenter", "focus", "click"]) group.addEventListener(event, () => choose(point));
  return group;
}

/** Draw a family's front, then its points. */
function drawFamily(axes, family) {
  const points = visible(data.points).filter((point) => point.family === family.name);
  const line = front(points, bytes).map((point) => [axes.x.place(bytes(point)), axes.y.place(point.accuracy)]);
  const form = { class: "front", points: line.join(" "), stroke: family.colour };
  if (line.length > 1) draw(axes.lines, "polyline", form);
  for (const point of points) if (isInside(axes, point)) drawPoint(axes, point, family);
}

/** Draw a point with its range over seeds and a generous area to hit; what diverged is marked at the lower edge. */
function drawPoint(axes, point, family) {
  const [x, edge] = [axes.x.place(bytes(point)), chart.frame.bottom];
  const y = point.accuracy === null ? edge : axes.y.place(point.accuracy);
  const group = drawGroup(axes.marks, point, x, y, "point");
  if (point.accuracy !== null && point.seeds > 1) {
    const ends = { x1: x, x2: x, y1: axes.y.place(point.low), y2: axes.y.place(point.high) };
    draw(group, "line", { class: "span", stroke: family.colour, ...ends });
  }
  if (point.lostSeeds) mark(group, "lost", x, edge, 4.5, { class: "lost", stroke: family.colour });
  if (point.accuracy !== null) mark(group, family.marker, x, y, 5, { class: "mark", fill: family.colour });
  draw(group, "circle", { class: "hit", cx: x, cy: y, r: 10 });
}

/** Return the groups of all points that are shown, by bytes. */
function groups() {
  const found = [...at("chart").querySelectorAll(".point, .published")];
  const height = (group) => group.point.accuracy ?? -1;
  return found.sort((a, b) => bytes(a.point) - bytes(b.point) || height(a) - height(b));
}

/** Move from point to point with the arrow keys: the chart is one stop of the Tab key. */
function onKey(event) {
  const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 };
  const found = groups();
  const place = found.indexOf(document.activeElement);
  const ends = { Home: 0, End: found.length - 1 };
  const next = event.key in ends ? ends[event.key] : place + steps[event.key];
  if (place < 0 || Number.isNaN(next)) return;
  event.preventDefault();
  found[Math.max(0, Math.min(found.length - 1, next))].focus();
}

function choose(point) {
  if (point === chosen) return;
  chosen = point;
  showChosen();
}

/** Mark the chosen point in chart and table, and show what is known about it. */
function showChosen() {
  const found = groups();
  for (const group of found) {
    group.classList.toggle("chosen", group.point === chosen);
    group.setAttribute("tabindex", -1);
  }
  (found.find((group) => group.point === chosen) ?? found[0])?.setAttribute("tabindex", 0);
  for (const row of at("table").tBodies[0].rows) row.classList.toggle("chosen", row.point === chosen);
  at("details").replaceChildren();
  if (!chosen) put(at("details"), "p", "Point at a marker, or reach the chart with Tab and move with the arrow keys.");
  else if (chosen.source) showPublished(chosen);
  else showPoint(chosen);
}

function facts(pairs) {
  const list = put(at("details"), "dl");
  for (const [name, value] of pairs) {
    put(list, "dt", name);
    put(list, "dd", value);
  }
}

function showPublished(point) {
  put(at("details"), "h2", `${point.family} ${point.label}`);
  const size = `${bytes(point).toLocaleString("en")} bytes`;
  facts([["state", size], ["accuracy", told(point.accuracy)], ["published", point.source]]);
}

function showPoint(point) {
  const [panel, family] = [at("details"), familyOf[point.family]];
  put(panel, "h2", `${point.family} ${point.label}`);
  const layers = put(panel, "ol", "", { "aria-label": "layers" });
  for (const layer of point.layers) put(layers, "li", layer);
  const spread = point.seeds > 1 ? ` (${told(point.low)} to ${told(point.high)}, ${point.seeds} seeds)` : "";
  facts([
    ["accuracy", told(point.accuracy) + spread],
    ...(point.lost ? [["diverged", `${point.lost} of ${point.runs.length} runs`]] : []),
    ["state", `${bytes(point).toLocaleString("en")} bytes`],
    ["whole cache", `${count(point.state_bytes)} bytes`],
    ["parameters", count(point.params)],
    [point.status, `after ${count(point.steps)} steps`],
    ["all runs", `${Math.round(point.seconds).toLocaleString("en")} s`],
    ...(point.settings.length ? [["settings", point.settings.join(", ")]] : []),
    ["row", `${point.id} (${point.sweep})`],
  ]);
  put(panel, "h3", "Accuracy against learning rate");
  rateChart(panel, point, family);
  put(panel, "h3", `Test segments (tokens x pairs), lr ${rate(point.lr)}`);
  segmentBars(panel, point, family);
}

function fillTable() {
  const points = visible(data.points);
  table.fill(points);
  at("count").textContent = `${points.length} of ${data.points.length}`;
}

/** Add to a row of the table its marker, and let pointer and keys choose its point. */
function dressRow(row, point) {
  row.point = point;
  const [family, label] = row.cells;
  family.prepend(swatch(family, familyOf[point.family]));
  put(label, "button", point.label, { type: "button" });
  for (const event of ["pointerenter", "focusin", "click"]) row.addEventListener(event, () => choose(point));
  row.classList.toggle("chosen", point === chosen);
}

/** Say what the numbers are, and what made them. */
function describe() {
  const { runs, device, versions, revision, command } = data.made;
  const tokens = data.tokens.map((count) => count.toLocaleString("en")).join(" or ");
  const sources = data.sources.map((source) => `${source.marker}: ${source.name}`);
  const lost = data.points.reduce((sum, point) => sum + point.lost, 0);
  const diverged = lost ? ` ${lost} of the runs diverged and count as no accuracy (marked × at the lower edge).` : "";
  at("summary").textContent =
    `${data.points.length} configurations from ${runs} runs: the best learning rate of each seed, then the median over ` +
    `seeds.${diverged}`;
  at("caption").textContent =
    `Accuracy, mean over all test segments, against bytes of state after ${tokens} tokens; lines: no smaller state does ` +
    "better; bars: lowest to highest seed" +
    (sources.length ? `; hollow: published (${sources.join("; ")}).` : ".");
  const made = { Device: device, Versions: versions, Revision: revision, Command: command };
  for (const [name, values] of Object.entries(made)) {
    if (values.length) put(at("made"), "div", `${name}: ${values.join(", ")}`);
  }
}

const chart = new Chart(at("chart"), () => {
  drawChart();
  showChosen();
});
zoomButtons(at("zoom"), (factor) => chart.zoom(factor, MIDDLE), () => chart.reset());
const table = new SortableTable(at("table"), COLUMNS, { key: "bytes", up: true }, dressRow);
makeControls();
describe();
refresh();
at("chart").addEventListener("keydown", onKey);
new ResizeObserver(() => {
  if (Number(at("chart").getAttribute("width")) === Math.max(300, at("frontier").clientWidth)) return;
  const inChart = at("chart").contains(document.activeElement);
  drawChart();
  showChosen();
  if (inChart) at("chart").querySelector('[tabindex="0"]')?.focus();
}).observe(at("frontier"));
