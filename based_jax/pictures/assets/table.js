"use strict";
// A table whose columns sort it: by numbers where they hold numbers; what has no value comes last.

/**
 * Columns are {key, name, text(item), value(item), words}; `dress(row, item)` adds to a row what the page needs.
 * The order is {key, up}, as the items come where the key is null. */
class SortableTable {
  constructor(table, columns, order, dress) {
    Object.assign(this, { table, columns, order, dress, items: [] });
    const row = put(table.tHead, "tr");
    for (const column of columns) {
      const head = put(row, "th", "", { scope: "col", class: column.words ? "words" : "" });
      head.column = column;
      put(head, "button", column.name, { type: "button" }).addEventListener("click", () => this.sort(column));
    }
  }

  /** Sort by a column: numbers that are sorted first fall, unless the column says otherwise; again, the other way. */
  sort(column) {
    const up = this.order.key === column.key ? !this.order.up : Boolean(column.words || column.rises);
    this.order = { key: column.key, up };
    this.fill(this.items);
  }

  /** Show these items. */
  fill(items) {
    this.items = items;
    for (const head of this.table.tHead.rows[0].cells) {
      const sorted = head.column.key === this.order.key;
      head.firstChild.textContent = head.column.name + (sorted ? (this.order.up ? " ▲" : " ▼") : "");
      if (sorted) head.setAttribute("aria-sort", this.order.up ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    }
    const sorted = this.order.key === null ? items : [...items].sort((a, b) => this.compare(a, b));
    this.table.tBodies[0].replaceChildren(...sorted.map((item) => this.row(item)));
  }

  compare(a, b) {
    const { value } = this.columns.find((column) => column.key === this.order.key);
    const [left, right] = [value(a), value(b)];
    if (left === null || right === null) return (left === null) - (right === null);
    const rising = typeof left === "string" ? left.localeCompare(right, "en", { numeric: true }) : left - right;
    return this.order.up ? rising : -rising;
  }

  row(item) {
    const row = document.createElement("tr");
    for (const { text, words } of this.columns) put(row, "td", text(item), { class: words ? "words" : "" });
    this.dress(row, item);
    return row;
  }
}
