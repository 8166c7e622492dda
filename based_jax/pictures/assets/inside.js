"use strict";
// A look inside a model: maps to point at, norms of states, and what layers are worth.

const found = JSON.parse(document.getElementById("data").textContent);
const pointed = document.getElementById("told");
const SHADES = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];
const LINES = ["#4c96f5", "#dd7610", "#27722a", "#bd432f", "#894d97", "#568f8c", "#d1719e", "#646e46"];

/** Return the red, green and blue of a shade from 0 to 255, between its two nearest. */
function shade(value) {
  const place = (value / 255) * (SHADES.length - 1);
  const low = Math.min(Math.floor(place), SHADES.length - 2);
  const parts = (text) => [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
  const [a, b] = [parts(SHADES[low]), parts(SHADES[low + 1])];
  return a.map((x, i) => x + (b[i] - x) * (place - low));
}

/** Return the length of rows whose lower triangle has so many numbers. */
const tokensOf = (map) => Math.round((Math.sqrt(8 * map.weights.length + 1) - 1) / 2);

/** Draw one head's map. */
function drawMap(map) {
  const tokens = tokensOf(map);
  const figure = put(document.getElementById("maps"), "figure");
  const name = `layer ${map.layer}, ${map.mixer}, head ${map.head}`;
  const canvas = put(figure, "canvas", "", { width: tokens, height: tokens, role: "img", "aria-label": name });
  const keys = Math.exp(map.entropy).toFixed(1);
  put(figure, "figcaption", `${name}: range ${map["effective range"].toFixed(1)} tokens, ${keys} keys`);
  const context = canvas.getContext("2d");
  const image = context.createImageData(tokens, tokens);
  let i = 0;
  for (let query = 0; query < tokens; query++) {
    for (let key = 0; key <= query; key++) {
      image.data.set([...shade(map.weights[i++]), 255], 4 * (query * tokens + key));
    }
  }
  context.putImageData(image, 0, 0);
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const at = (offset, size) => Math.min(tokens - 1, Math.max(0, Math.floor((offset / size) * tokens)));
    const [query, key] = [at(event.clientY - box.top, box.height), at(event.clientX - box.left, box.width)];
    const weight = key > query ? 0 : (map.weights[(query * (query + 1)) / 2 + key] / 255) ** 2;
    pointed.textContent = `${name}: query ${query} reads ${(100 * weight).toFixed(1)} % of key ${key}`;
  });
}

/** Draw the norms of all layers by the logarithm. */
function drawNorms() {
  const [width, height, left, bottom] = [720, 260, 46, 30];
  const svg = document.getElementById("norms");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const all = found.norms.flat().filter((x) => x > 0).map(Math.log10);
  const [low, high] = [Math.floor(Math.min(...all)), Math.ceil(Math.max(...all))];
  const tokens = found.norms[0].length;
  const x = (t) => left + ((width - left - 120) * t) / Math.max(tokens - 1, 1);
  const y = (value) => height - bottom - ((height - bottom - 10) * (value - low)) / Math.max(high - low, 1);
  for (let power = low; power <= high; power++) {
    draw(svg, "path", { d: `M${left} ${y(power)}H${x(tokens - 1)}`, stroke: "var(--line)" });
    draw(svg, "text", { x: left - 6, y: y(power) + 4, "text-anchor": "end" }, `1e${power}`);
  }
  draw(svg, "text", { x: x((tokens - 1) / 2), y: height - 6, "text-anchor": "middle" }, `tokens read, 1 to ${tokens}`);
  const ends = [];
  found.norms.forEach((norms, layer) => {
    const colour = LINES[layer % LINES.length];
    const line = norms.map((norm, t) => `${t ? "L" : "M"}${x(t)} ${y(Math.log10(Math.max(norm, 10 ** low)))}`);
    draw(svg, "path", { d: line.join(""), fill: "none", stroke: colour, "stroke-width": 1.5 });
    ends.push([y(Math.log10(Math.max(norms[tokens - 1], 10 ** low))), `${layer} ${found.kinds[layer]}`, colour]);
  });
  let last = -Infinity;
  for (const [place, text, colour] of ends.sort((a, b) => a[0] - b[0])) {
    last = Math.max(place, last + 14);
    draw(svg, "text", { x: x(tokens - 1) + 6, y: last + 4, style: `fill: ${colour}` }, text);
  }
}

/** Fill the table of layers left out. */
function fillTable() {
  const [head, body] = document.querySelectorAll("#removals thead, #removals tbody");
  const titles = put(head, "tr");
  for (const title of ["layer", "mixer", "accuracy without it", "loss", "accuracy lost"]) put(titles, "th", title);
  for (const removal of found.removals) {
    const row = put(body, "tr");
    const values = [removal.accuracy, removal.loss, removal.cost].map((value) => value.toFixed(3));
    for (const value of [removal.layer, removal.kind, ...values]) put(row, "td", String(value));
  }
}

document.getElementById("summary").textContent = found.kinds.map((kind, i) => `${i} ${kind}`).join(", ");
found.maps.forEach(drawMap);
drawNorms();
fillTable();
