"use strict";
// The page of runs: a chart for each quantity, over the same steps, and a table.

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const hidden = new Set();
const panels = [];
const DASHES = ["", "6 3", "2 3", "6 3 2 3"];
const GAP = 1.08; // of a range to the room that it is drawn in

const shown = () => data.runs.filter((run, number) => !hidden.has(number));
const withCurve = (key) => shown().filter((run) => run.curves[key]);
const known = (values) => values.filter((value) => value !== null);
const number = (value) => (value === null ? "-" : plain(Number(value.toPrecision(5)), 0));

function makeControls() {
  data.runs.forEach((run, place) => {
    const label = put(at("families"), "label", "", { title: run.folder });
    const box = put(label, "input", "", { type: "checkbox", value: place });
    box.checked = true;
    lineSwatch(label, run);
    label.append(run.name);
  });
  at("controls").addEventListener("input", refresh);
  at("all").addEventListener("click", () => checkAll(true));
  at("none").addEventListener("click", () => checkAll(false));
}

function checkAll(value) {
  for (const box of at("families").querySelectorAll("input")) box.checked = value;
  refresh();
}

function lineSwatch(parent, run) {
  const svg = draw(parent, "svg", { width: 18, height: 10, "aria-hidden": "true" });
  draw(svg, "line", { x1: 0, x2: 18, y1: 5, y2: 5, ...stroke(run), "stroke-width": 2.5 });
  return svg;
}

function stroke(run) {
  return { stroke: run.colour, "stroke-dasharray": DASHES[run.dashes] };
}

/** Draw everything that depends on the controls. */
function refresh() {
  hidden.clear();
  for (const box of at("families").querySelectorAll("input:not(:checked)")) hidden.add(Number(box.value));
  panels.forEach(drawPanel);
  table.fill(shown());
  at("count").textContent = `${shown().length} of ${data.runs.length}`;
}

function makePanel([key, title]) {
  const figure = put(at("panels"), "figure");
  const svg = draw(figure, "svg", { class: "chart", role: "img", "aria-label": `${title} by step` });
  const panel = { key, title, figure, svg };
  panel.chart = new Chart(svg, () => zoomed(panel));
  svg.addEventListener("pointermove", (event) => point(panel, event));
  svg.addEventListener("pointerleave", leave);
  panels.push(panel);
}

/** Show the same steps in all charts. */
function zoomed(changed) {
  for (const panel of panels) {
    panel.chart.part = { ...panel.chart.part, x: changed.chart.part.x };
    drawPanel(panel);
  }
}

function zoomSteps(factor) {
  const { chart } = panels[0];
  const [first, last] = chart.part.x;
  const [middle, half] = [(first + last) / 2, (factor * (last - first)) / 2];
  chart.show({ ...chart.part, x: [middle - half, middle + half] });
}

function resetAll() {
  for (const { chart } of panels) chart.part = { x: WHOLE, y: WHOLE };
  panels.forEach(drawPanel);
}

function drawPanel(panel) {
  const { key, chart, figure } = panel;
  const width = Math.max(300, figure.clientWidth);
  const all = data.runs.flatMap((run) => (run.curves[key] ? [run.curves[key]] : []));
  panel.axes = chart.axes({ width, height: 250 }, stepAxis(), valueAxis(panel, all));
  for (const run of withCurve(key)) drawCurve(panel, run);
  at("zoom").querySelector(".reset").disabled = !panels.some((other) => other.chart.zoomed);
}

/** The axes follow all runs, not those that are shown: a picture that jumps with each check box cannot be compared. */
function stepAxis() {
  const steps = data.runs.flatMap((run) => Object.values(run.curves).flatMap((curve) => curve.steps));
  const [low, high] = [Math.min(...ends(steps)), Math.max(...ends(steps))];
  return { kind: "linear", ends: low < high ? [low, high] : [low - 1, high + 1], label: "step" };
}

function valueAxis({ key, title }, curves) {
  const limits = curves.flatMap(({ least, most }) => (least === null ? [] : [least, most]));
  const asked = data.logScaled.includes(key) || (at("logarithmic").checked && key.endsWith("loss"));
  const kind = asked && limits.length && Math.min(...limits) > 0 ? "log10" : "linear";
  const stand = KINDS[kind].to;
  const [low, high] = limits.length ? [stand(Math.min(...limits)), stand(Math.max(...limits))] : [0, 1];
  const room = low < high ? ((high - low) * (GAP - 1)) / 2 : Math.abs(low) / 10 || 1;
  return { kind, ends: [low - room, high + room], label: title };
}

/** Return the least and the greatest value: too many arguments break Math.min. */
function ends(values) {
  return values.reduce(([low, high], x) => [Math.min(low, x), Math.max(high, x)], [Infinity, -Infinity]);
}

/** Draw a run's curve, pale beneath its smoothed one if there is one; where it ceases to be finite stands at the top. */
function drawCurve({ key, axes, chart }, run) {
  const { steps, values } = run.curves[key];
  const few = known(values).length <= 25;
  const weight = few ? 0 : Number(at("smoothing").value);
  const line = { class: "curve", ...stroke(run) };
  draw(axes.lines, "path", { ...line, d: path(axes, steps, values), class: weight ? "curve raw" : "curve" });
  if (weight) draw(axes.lines, "path", { ...line, d: path(axes, steps, smoothed(values, weight)) });
  values.forEach((value, i) => {
    if (!axes.x.shown(steps[i])) return;
    const x = axes.x.place(steps[i]);
    const lost = { class: "lost", stroke: run.colour };
    if (value === null && values[i - 1] !== null) mark(axes.marks, "lost", x, chart.frame.top, 4, lost);
    if (value !== null && few && axes.y.shown(value)) {
      draw(axes.marks, "circle", { cx: x, cy: axes.y.place(value), r: 2.5, fill: run.colour });
    }
  });
}

function path(axes, steps, values) {
  let pen = "M";
  return values.map((value, i) => {
    if (value === null) pen = "M";
    if (value === null) return "";
    const text = `${pen}${axes.x.place(steps[i]).toFixed(1)} ${axes.y.place(value).toFixed(1)}`;
    pen = "L";
    return text;
  }).join("");
}

/** Return the exponential moving average of what is known, without a bias to the first value. */
function smoothed(values, weight) {
  let [sum, whole] = [0, 0];
  return values.map((value) => {
    if (value === null) return null;
    [sum, whole] = [weight * sum + (1 - weight) * value, weight * whole + 1 - weight];
    return sum / whole;
  });
}

/** Show, at the pointer's step, a line in every chart, and each run's value in this one. */
function point(panel, event) {
  leave();
  const place = panel.chart.at(event);
  if (place.x < 0 || place.x > 1) return;
  const found = withCurve(panel.key).map((run) => [run, nearest(panel, run, event)]).filter(([, i]) => i >= 0);
  if (!found.length) return;
  const steps = found.map(([run, i]) => run.curves[panel.key].steps[i]);
  const box = panel.svg.getBoundingClientRect();
  const [step] = steps.sort((a, b) => away(panel, a, event, box) - away(panel, b, event, box));
  for (const { axes, chart } of panels) {
    const x = axes.x.place(step);
    draw(axes.lines, "line", { class: "cursor", x1: x, x2: x, y1: chart.frame.top, y2: chart.frame.bottom });
  }
  tell(panel, found, event);
}

function away(panel, step, event, box) {
  return Math.abs(panel.axes.x.place(step) - (event.clientX - box.left));
}

/** Return the place of the run's step that is nearest to the pointer. */
function nearest(panel, run, event) {
  const box = panel.svg.getBoundingClientRect();
  const { steps } = run.curves[panel.key];
  let best = -1;
  steps.forEach((step, i) => {
    if (best < 0 || away(panel, step, event, box) < away(panel, steps[best], event, box)) best = i;
  });
  return best;
}

function tell(panel, found, event) {
  const box = at("readout");
  box.replaceChildren();
  const rows = put(box, "table");
  for (const [run, i] of found) {
    const { steps, values } = run.curves[panel.key];
    const row = put(rows, "tr");
    lineSwatch(put(row, "td"), run);
    put(row, "td", run.name);
    put(row, "td", values[i] === null ? "not finite" : number(values[i]));
    put(row, "td", `step ${steps[i].toLocaleString("en")}`);
  }
  box.hidden = false;
  const left = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8);
  const above = event.clientY + 14 + box.offsetHeight > innerHeight;
  box.style.left = `${Math.max(8, left)}px`;
  box.style.top = `${above ? event.clientY - box.offsetHeight - 14 : event.clientY + 14}px`;
}

function leave() {
  at("readout").hidden = true;
  for (const line of document.querySelectorAll(".cursor")) line.remove();
}

const curve = (run, key) => run.curves[key] ?? { values: [], least: null, most: null, count: 0 };
const COLUMNS = [
  { key: "name", name: "run", value: (run) => run.name, text: (run) => run.name, words: true },
  { key: "folder", name: "folder", value: (run) => run.folder, text: (run) => run.folder, words: true },
  { key: "steps", name: "last step", value: (run) => run.lastStep, text: (run) => run.lastStep.toLocaleString("en") },
  ...[
    ["loss", "training loss, last", (run) => known(curve(run, "loss").values).at(-1) ?? null],
    ["evalLoss", "evaluation loss, least", (run) => curve(run, "eval/loss").least],
    ["evalAccuracy", "evaluation accuracy, best", (run) => curve(run, "eval/accuracy").most],
    ["throughput", "tokens/s, most", (run) => curve(run, "tokens_per_second").most],
  ].map(([key, name, value]) => ({ key, name, value, text: (run) => number(value(run)), rises: name.includes("loss") })),
  { key: "device", name: "device", value: (run) => run.device, text: (run) => run.device, words: true },
];

/** Say what the lines are. */
function describe() {
  const points = data.runs.flatMap((run) => Object.values(run.curves));
  const thin = points.some(({ count, steps }) => count > steps.length);
  at("summary").textContent =
    `${data.runs.length} run${data.runs.length > 1 ? "s" : ""}. Point at a line to read it; wheel or drag to zoom, ` +
    "double-click to see everything again." +
    (thin ? " Of long runs the least and the greatest value of each stretch are drawn." : "");
}

const table = new SortableTable(at("table"), COLUMNS, { key: null, up: true }, (row, run) =>
  row.cells[0].prepend(lineSwatch(row.cells[0], run)),
);
data.quantities.forEach(makePanel);
zoomButtons(at("zoom"), zoomSteps, resetAll);
makeControls();
describe();
refresh();
new ResizeObserver(() => panels.forEach(drawPanel)).observe(at("panels"));
