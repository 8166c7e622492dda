"use strict";
// A chart: a frame with axes and what stands in it; wheel, drag and buttons show a part of it.

const WHOLE = [0, 1];
const MIDDLE = { x: 0.5, y: 0.5 };
const LEAST_PART = 1 / 60;
const MARGIN = 11; // of marks at the edge, in pixels

/** A chart in an SVG element. `redraw` is called when another part of it is to be shown. */
class Chart {
  constructor(svg, redraw) {
    Object.assign(this, { svg, redraw, part: { x: WHOLE, y: WHOLE }, frame: null });
    svg.addEventListener("wheel", (event) => this.onWheel(event), { passive: false });
    svg.addEventListener("pointerdown", (event) => this.onDown(event));
    svg.addEventListener("dblclick", () => this.reset());
  }

  get zoomed() {
    return [this.part.x, this.part.y].some(([first, last]) => first > 0 || last < 1);
  }

  /**
   * Empty the chart and draw its axes.
   * @param {{width: number, height: number}} size of the SVG element.
   * @param x and y: {kind, ends, label} of `makeAxis`.
   * @return the axes, and what data are drawn in: `lines` ends at the frame, `marks` shows marks on its edge whole.
   */
  axes({ width, height }, x, y) {
    const { svg, part } = this;
    const frame = { left: 62, right: width - 14, top: 12, bottom: height - 46 };
    this.frame = frame;
    svg.replaceChildren();
    for (const [key, value] of Object.entries({ width, height, viewBox: `0 0 ${width} ${height}` })) {
      svg.setAttribute(key, value);
    }
    const across = makeAxis(x.kind, x.ends, [frame.left, frame.right], part.x, 68);
    const up = makeAxis(y.kind, y.ends, [frame.bottom, frame.top], part.y, 30);
    for (const [tick, text] of across.ticks) {
      const place = across.place(tick);
      draw(svg, "line", { class: "grid", x1: place, x2: place, y1: frame.top, y2: frame.bottom });
      draw(svg, "text", { x: place, y: frame.bottom + 19, "text-anchor": "middle" }, text);
    }
    for (const [tick, text] of up.ticks) {
      const place = up.place(tick);
      draw(svg, "line", { class: "grid", x1: frame.left, x2: frame.right, y1: place, y2: place });
      draw(svg, "text", { x: frame.left - 7, y: place + 4, "text-anchor": "end" }, text);
    }
    const middle = [(frame.left + frame.right) / 2, (frame.top + frame.bottom) / 2];
    draw(svg, "text", { class: "label", x: middle[0], y: height - 7, "text-anchor": "middle" }, x.label);
    const turned = { transform: `translate(14 ${middle[1]}) rotate(-90)`, "text-anchor": "middle" };
    draw(svg, "text", { class: "label", ...turned }, y.label);
    return { x: across, y: up, lines: this.plot(0), marks: this.plot(MARGIN) };
  }

  /** Return a new element that shows no more than the frame and a margin, in the coordinates of the chart. */
  plot(margin) {
    const { left, right, top, bottom } = this.frame;
    const [x, y, width, height] = [left - margin, top - margin, right - left + 2 * margin, bottom - top + 2 * margin];
    return draw(this.svg, "svg", { class: "plot", x, y, width, height, viewBox: `${x} ${y} ${width} ${height}` });
  }

  reset() {
    this.show({ x: WHOLE, y: WHOLE });
  }

  /** Show a part: {x: [first, last], y: ...} of what the axes have as a whole. */
  show(part) {
    this.part = { x: within(part.x), y: within(part.y) };
    this.redraw(this);
  }

  /** Show more or less about a place in the frame: a factor below 1 shows less. */
  zoom(factor, { x, y }) {
    const about = ([first, last], at) => {
      const centre = first + at * (last - first);
      return [centre + (first - centre) * factor, centre + (last - centre) * factor];
    };
    this.show({ x: about(this.part.x, x), y: about(this.part.y, y) });
  }

  /** Return where a pointer is in the frame, of 0 to 1. */
  at(event) {
    const box = this.svg.getBoundingClientRect();
    const { left, right, top, bottom } = this.frame;
    const x = (event.clientX - box.left - left) / (right - left);
    return { x, y: 1 - (event.clientY - box.top - top) / (bottom - top) };
  }

  onWheel(event) {
    const at = this.at(event);
    if (at.x < 0 || at.x > 1 || at.y < 0 || at.y > 1 || event.ctrlKey) return;
    event.preventDefault();
    this.zoom(1.0015 ** Math.max(-400, Math.min(400, event.deltaY)), at);
  }

  /** Let a mouse or a pen draw the rectangle that will be shown; a finger scrolls the page. */
  onDown(event) {
    if (event.button !== 0 || event.pointerType === "touch") return;
    const start = this.at(event);
    const box = draw(this.plot(0), "rect", { class: "selection" });
    const move = (moved) => this.select(box, start, this.at(moved));
    const up = (last) => {
      removeEventListener("pointermove", move);
      removeEventListener("pointerup", up);
      removeEventListener("pointercancel", up);
      box.parentElement.remove();
      if (last.type === "pointerup") this.showSelected(start, this.at(last));
    };
    addEventListener("pointermove", move);
    addEventListener("pointerup", up);
    addEventListener("pointercancel", up);
  }

  select(box, start, end) {
    const { left, right, top, bottom } = this.frame;
    const [x, y] = [[start.x, end.x].sort(ascending), [start.y, end.y].sort(ascending)];
    box.setAttribute("x", left + x[0] * (right - left));
    box.setAttribute("width", (x[1] - x[0]) * (right - left));
    box.setAttribute("y", bottom - y[1] * (bottom - top));
    box.setAttribute("height", (y[1] - y[0]) * (bottom - top));
  }

  showSelected(start, end) {
    const { left, right, top, bottom } = this.frame;
    const far = [Math.abs(end.x - start.x) * (right - left), Math.abs(end.y - start.y) * (bottom - top)];
    if (Math.min(...far) < 6) return; // a click
    const chosen = ([first, last], ...ends) => ends.sort(ascending).map((u) => first + u * (last - first));
    this.show({ x: chosen(this.part.x, start.x, end.x), y: chosen(this.part.y, start.y, end.y) });
  }
}

const ascending = (a, b) => a - b;

/** Return an interval as near as there is one within 0 and 1 that is not too small. */
function within([first, last]) {
  const size = Math.min(1, Math.max(LEAST_PART, last - first));
  const low = Math.min(1 - size, Math.max(0, (first + last - size) / 2));
  return [low, low + size];
}

/** Make buttons that zoom by a factor and reset. */
function zoomButtons(parent, zoom, reset) {
  const buttons = { "+": [0.6, "zoom in"], "−": [1 / 0.6, "zoom out"] };
  for (const [text, [factor, title]] of Object.entries(buttons)) {
    const button = put(parent, "button", text, { type: "button", title, "aria-label": title });
    button.addEventListener("click", () => zoom(factor));
  }
  const whole = put(parent, "button", "reset", { type: "button", title: "show everything", class: "reset" });
  whole.addEventListener("click", reset);
}
