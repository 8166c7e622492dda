"use strict";
// The page: what is shown, the frontier, the chosen point, the table.

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const familyOf = Object.fromEntries(data.families.map((family) => [family.name, family]));
const hidden = new Set();
let chosen = null;
let order = { key: "bytes", up: true };

const bytes = (point) => point.bytes[at("convolution").checked ? 1 : 0];
const visible = (points) => points.filter((point) => !hidden.has(point.family));
const shownPublished = () => (at("published").checked ? visible(data.published) : []);

const COLUMNS = [
  ["family", "mixer", (p) => p.family],
  ["label", "configuration", (p) => p.label],
  ["bytes", "state bytes", (p) => bytes(p).toLocaleString("en")],
  ["accuracy", "accuracy", (p) => p.accuracy.toFixed(4)],
  ["low", "min", (p) => p.low.toFixed(4)],
  ["high", "max", (p) => p.high.toFixed(4)],
  ["seeds", "seeds", (p) => p.seeds],
  ["lr", "best lr", (p) => rate(p.lr)],
  ["params", "parameters", (p) => (p.params ?? 0).toLocaleString("en")],
];
const WORDS = ["family", "label"];

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
  const svg = at("chart");
  const width = Math.max(300, at("frontier").clientWidth);
  const height = Math.max(320, Math.min(560, width * 0.62));
  const [left, right, top, bottom] = [52, width - 12, 10, height - 48];
  svg.replaceChildren();
  for (const [key, value] of Object.entries({ width, height, viewBox: `0 0 ${width} ${height}` })) {
    svg.setAttribute(key, value);
  }
  // The axes follow the data, not the filter: a picture that jumps with each check box cannot be compared.
  const all = [...data.points, ...(at("published").checked ? data.published : [])];
  const x = byteScale(all.map(bytes), left, right, at("linear").checked);
  const y = accuracyScale(bottom, top, at("errors").checked);
  drawAxes(svg, x, y, { left, right, top, bottom, height });
  for (const point of shownPublished()) drawPublished(svg, point, x.place(bytes(point)), y.place(point.accuracy));
  for (const family of data.families) drawFamily(svg, family, x.place, y.place);
}

function drawAxes(svg, x, y, { left, right, top, bottom, height }) {
  for (const tick of x.ticks) {
    draw(svg, "line", { class: "grid", x1: x.place(tick), x2: x.place(tick), y1: top, y2: bottom });
    draw(svg, "text", { x: x.place(tick), y: bottom + 20, "text-anchor": "middle" }, short(tick));
  }
  for (const [value, text] of y.ticks) {
    draw(svg, "line", { class: "grid", x1: left, x2: right, y1: y.place(value), y2: y.place(value) });
    draw(svg, "text", { x: left - 7, y: y.place(value) + 4, "text-anchor": "end" }, text);
  }
  draw(svg, "text", { x: (left + right) / 2, y: height - 8, "text-anchor": "middle" }, "state of one sequence, fp32");
}

function drawPublished(svg, point, x, y) {
  const group = drawGroup(svg, point, x, y, "published");
  mark(group, point.marker, x, y, 4.5, { class: "hollow", stroke: familyOf[point.family].colour });
}

/** Draw what marks and tells a point, and let pointer and keys choose it. */
function drawGroup(svg, point, x, y, kind) {
  const words = [point.family, point.label, point.source && "published"].filter(Boolean).join(", ");
  const name = `${words}: ${short(bytes(point))}, accuracy ${point.accuracy.toFixed(3)}`;
  const group = draw(svg, "g", { class: kind, tabindex: -1, role: "button", "aria-label": name });
  group.point = point;
  draw(group, "circle", { class: "ring", cx: x, cy: y, r: 9 });
  for (const event of ["pointerenter", "focus", "click"]) group.addEventListener(event, () => choose(point));
  return group;
}

/** Draw a family's front, then its points, each with its range over seeds and a generous area to hit. */
function drawFamily(svg, family, x, y) {
  const points = visible(data.points).filter((point) => point.family === family.name);
  const line = front(points, bytes).map((point) => [x(bytes(point)), y(point.accuracy)]);
  if (line.length > 1) draw(svg, "polyline", { class: "front", points: line.join(" "), stroke: family.colour });
  for (const point of points) {
    const place = [x(bytes(point)), y(point.accuracy)];
    const group = drawGroup(svg, point, ...place, "point");
    if (point.seeds > 1) {
      const ends = { x1: place[0], x2: place[0], y1: y(point.low), y2: y(point.high) };
      draw(group, "line", { class: "span", stroke: family.colour, ...ends });
    }
    mark(group, family.marker, ...place, 5, { class: "mark", fill: family.colour });
    draw(group, "circle", { class: "hit", cx: place[0], cy: place[1], r: 10 });
  }
}

/** Return the groups of all points that are shown, by bytes. */
function groups() {
  const found = [...at("chart").querySelectorAll(".point, .published")];
  return found.sort((a, b) => bytes(a.point) - bytes(b.point) || a.point.accuracy - b.point.accuracy);
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
  facts([["state", size], ["accuracy", point.accuracy.toFixed(3)], ["published", point.source]]);
}

function showPoint(point) {
  const [panel, family] = [at("details"), familyOf[point.family]];
  put(panel, "h2", `${point.family} ${point.label}`);
  const layers = put(panel, "ol", "", { "aria-label": "layers" });
  for (const layer of point.layers) put(layers, "li", layer);
  const spread = point.seeds > 1 ? ` (${point.low.toFixed(3)} to ${point.high.toFixed(3)}, ${point.seeds} seeds)` : "";
  facts([
    ["accuracy", point.accuracy.toFixed(3) + spread],
    ["state", `${bytes(point).toLocaleString("en")} bytes`],
    ["whole cache", `${(point.state_bytes ?? 0).toLocaleString("en")} bytes`],
    ["parameters", (point.params ?? 0).toLocaleString("en")],
    [point.status, `after ${(point.steps ?? 0).toLocaleString("en")} steps`],
    ["all runs", `${Math.round(point.seconds).toLocaleString("en")} s`],
    ...(point.settings.length ? [["settings", point.settings.join(", ")]] : []),
    ["row", `${point.id} (${point.sweep})`],
  ]);
  put(panel, "h3", "Accuracy against learning rate");
  rateChart(panel, point, family);
  put(panel, "h3", `Test segments (tokens x pairs), lr ${rate(point.lr)}`);
  segmentBars(panel, point, family);
}

/** Make the table's head: a button in each column sorts by it. */
function makeTable() {
  const row = put(at("table").tHead, "tr");
  for (const [key, name] of COLUMNS) {
    const head = put(row, "th", "", { scope: "col", class: WORDS.includes(key) ? "words" : "" });
    head.key = key;
    put(head, "button", name, { type: "button" }).addEventListener("click", () => sortBy(key));
  }
}

function sortBy(key) {
  order = { key, up: order.key === key ? !order.up : WORDS.includes(key) || key === "bytes" };
  fillTable();
  showChosen();
}

function compare(a, b) {
  const value = (point) => (order.key === "bytes" ? bytes(point) : point[order.key]);
  const [left, right] = order.up ? [value(a), value(b)] : [value(b), value(a)];
  return typeof left === "string" ? left.localeCompare(right, "en", { numeric: true }) : left - right;
}

function fillTable() {
  const points = visible(data.points).sort(compare);
  for (const head of at("table").tHead.rows[0].cells) {
    if (head.key !== order.key) head.removeAttribute("aria-sort");
    else head.setAttribute("aria-sort", order.up ? "ascending" : "descending");
    head.firstChild.textContent = COLUMNS.find(([key]) => key === head.key)[1];
    if (head.key === order.key) head.firstChild.textContent += order.up ? " ▲" : " ▼";
  }
  at("table").tBodies[0].replaceChildren(...points.map(tableRow));
  at("count").textContent = `${points.length} of ${data.points.length}`;
}

function tableRow(point) {
  const row = document.createElement("tr");
  row.point = point;
  for (const [key, , text] of COLUMNS) {
    const cell = put(row, "td", "", { class: WORDS.includes(key) ? "words" : "" });
    if (key === "family") swatch(cell, familyOf[point.family]);
    if (key === "label") put(cell, "button", text(point), { type: "button" });
    else cell.append(text(point));
  }
  for (const event of ["pointerenter", "focusin", "click"]) row.addEventListener(event, () => choose(point));
  return row;
}

/** Say what the numbers are, and what made them. */
function describe() {
  const { runs, device, versions, revision, command } = data.made;
  const tokens = data.tokens.map((count) => count.toLocaleString("en")).join(" or ");
  const sources = data.sources.map((source) => `${source.marker}: ${source.name}`);
  at("summary").textContent =
    `${data.points.length} configurations from ${runs} runs: the best learning rate of each seed, then the median over seeds.`;
  at("caption").textContent =
    `Accuracy, mean over all test segments, against bytes of state after ${tokens} tokens; lines: no smaller state does ` +
    "better; bars: lowest to highest seed" +
    (sources.length ? `; hollow: published (${sources.join("; ")}).` : ".");
  const made = { Device: device, Versions: versions, Revision: revision, Command: command };
  for (const [name, values] of Object.entries(made)) {
    if (values.length) put(at("made"), "div", `${name}: ${values.join(", ")}`);
  }
}

makeControls();
makeTable();
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
