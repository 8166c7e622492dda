"use strict";
// Scales: from values to pixels, with ticks where they are round, for the part of an axis that is shown.

const LEAST_ERROR = 1e-3;

/** Return an accuracy in how far it has come: 0 of none, 1 with each tenth of the errors. */
const depth = (y) => -Math.log10(Math.max(1 - y, LEAST_ERROR));

/**
 * What an axis may be: `to` takes a value to where it stands, `from` back, and `ticks(low, high)` yields lists of round
 * values between two, each finer than the one before; `text` writes one, given the distance to the next.
 */
const KINDS = {
  linear: { to: (x) => x, from: (x) => x, ticks: roundValues, text: plain },
  log10: { to: Math.log10, from: (x) => 10 ** x, ticks: decades, text: plain },
  bytes: { to: (x) => x, from: (x) => x, ticks: roundBytes, text: short },
  log2bytes: { to: Math.log2, from: (x) => 2 ** x, ticks: octaves, text: short },
  accuracy: { to: (x) => x, from: (x) => x, ticks: roundAccuracies, text: plain },
  errors: { to: depth, from: (x) => 1 - 10 ** -x, ticks: errorValues, text: errorText },
};

/**
 * Return an axis of a kind of `KINDS`.
 * @param {[number, number]} ends where it stands as a whole, as `to` of the kind has it.
 * @param {[number, number]} pixels where it begins and ends.
 * @param {[number, number]} part what is shown of it, of 0 to 1.
 * @param {number} spacing pixels between ticks, at least.
 */
function makeAxis(kind, [start, end], [from, to], [first, last], spacing) {
  const { to: stand, from: value, ticks, text } = KINDS[kind];
  const [low, high] = [start + first * (end - start), start + last * (end - start)];
  const place = (x) => from + ((to - from) * (stand(x) - low)) / (high - low);
  const slack = 1e-6 * (high - low);
  const shown = (x) => stand(x) >= low - slack && stand(x) <= high + slack;
  const most = Math.abs(to - from) / spacing;
  let chosen = [];
  for (const found of ticks(value(low), value(high))) {
    const inside = found.filter(shown);
    chosen = chosen.length ? chosen : thinned(inside, most);
    if (inside.length > most) break;
    chosen = inside;
  }
  const step = chosen.length > 1 ? Math.abs(chosen[1] - chosen[0]) : 0;
  return { place, shown, ticks: chosen.map((x) => [x, text(x, step)]) };
}

/** Yield multiples of 10, 5, 2, 1 times a power of ten. */
function* roundValues(low, high) {
  const top = 10 ** Math.ceil(Math.log10(Math.max(high - low, 1e-12)));
  for (let unit = top; unit > (high - low) / 200; unit /= 10) {
    for (const part of [1, 0.5, 0.2]) yield multiples(unit * part, low, high);
  }
}

function* roundAccuracies(low, high) {
  for (const values of roundValues(low, high)) yield values.filter((y) => y >= -1e-9 && y <= 1 + 1e-9);
}

function* roundBytes(low, high) {
  const top = 2 ** Math.ceil(Math.log2(high - low));
  for (let unit = top; unit > (high - low) / 200; unit /= 2) yield multiples(unit, low, high);
}

function multiples(unit, low, high) {
  const first = Math.ceil(low / unit - 1e-9);
  const count = Math.floor(high / unit + 1e-9) - first + 1;
  return Array.from({ length: Math.max(0, count) }, (_, i) => Number(((first + i) * unit).toPrecision(12)));
}

/** Yield powers of two, every fourth, every second, all, then parts of what is between them. */
function* octaves(low, high) {
  const [first, last] = [Math.floor(Math.log2(low)), Math.ceil(Math.log2(high))];
  const powers = Array.from({ length: last - first + 1 }, (_, i) => first + i);
  for (const step of [4, 2, 1]) yield powers.filter((n) => n % step === 0).map((n) => 2 ** n);
  for (const parts of [2, 4, 8, 16]) {
    yield powers.flatMap((n) => Array.from({ length: parts }, (_, i) => 2 ** n * (1 + i / parts)));
  }
}

/** Yield powers of ten, every sixth, third, second, all, then multiples of them. */
function* decades(low, high) {
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const powers = Array.from({ length: last - first + 1 }, (_, i) => first + i);
  for (const step of [6, 3, 2, 1]) yield powers.filter((n) => n % step === 0).map((n) => 10 ** n);
  for (const parts of [[1, 3], [1, 2, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9]]) {
    yield powers.flatMap((n) => parts.map((part) => Number((part * 10 ** n).toPrecision(6))));
  }
  yield* roundValues(low, high);
}

/** Yield accuracies with round errors: 0.9, 0.99, then 0.5, 0.8, 0.9, 0.95, then all between. */
function* errorValues(low, high) {
  for (const parts of [[1], [1, 5], [1, 2, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9]]) {
    const errors = [0, -1, -2, -3].flatMap((n) => parts.map((part) => part * 10 ** n));
    const values = errors.filter((error) => error <= 1 && error >= LEAST_ERROR * 0.999).map((error) => 1 - error);
    yield values.map((y) => Number(y.toPrecision(6))).sort((a, b) => a - b);
  }
  yield* roundAccuracies(low, high);
}

function errorText(y, step) {
  return depth(y) >= -Math.log10(LEAST_ERROR) - 1e-9 ? "≥ 0.999" : plain(y, step);
}

/** Return a number in few characters: 0.25, 30k, 2M, 1e-4. */
function plain(x, step) {
  const size = Math.abs(x);
  if (size >= 1e4 || (size >= 1e3 && step >= 100)) {
    for (const [unit, power] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
      if (size >= power) return `${Number((x / power).toPrecision(5))}${unit}`;
    }
  }
  if (size > 0 && size < 1e-3) return x.toExponential().replace(/(\.\d{2})\d*/, "$1");
  return String(Number(x.toPrecision(6)));
}

/** Return bytes as text: "39,780 B" is exact, "38.8 KiB" is short. */
function short(bytes) {
  for (const [unit, size] of [["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (bytes >= size) return `${Number((bytes / size).toPrecision(3))} ${unit}`;
  }
  return `${Math.round(bytes)} B`;
}

/** Return a learning rate in few characters. */
function rate(lr) {
  return lr.toExponential(Number.isInteger(Number(lr.toExponential().split("e")[0])) ? 0 : 1);
}

/** Return at most `most` of the values, evenly taken, the first one always. */
function thinned(values, most) {
  const step = Math.max(1, Math.ceil(values.length / Math.max(1, Math.floor(most))));
  return values.filter((_, i) => i % step === 0);
}
