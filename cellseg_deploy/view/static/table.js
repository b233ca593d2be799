// The table of cells, linked with the picture both ways.

import { element, rgb } from "/static/api.js";

const COLUMNS = [
  ["n", "Cell"], ["class", "Class"], ["area_px", "Area px"], ["equivalent_diameter_px", "Ø px"], ["circularity", "Round"], ["solidity", "Solid"],
];

export class Table {
  constructor(state, onPick) {
    this.state = state;
    this.onPick = onPick;
    this.sortBy = "n";
    this.descending = false;
    this.body = document.getElementById("rows");
    this.lines = new Map();
    for (const [key, words] of COLUMNS) {
      const button = element("button", { textContent: words, title: `Sort by ${words}` });
      button.addEventListener("click", () => this.sort(key));
      document.getElementById("columns").append(element("th", {}, button));
    }
    this.body.addEventListener("click", (event) => this.pick(event.target, event.shiftKey || event.ctrlKey || event.metaKey));
    this.body.addEventListener("keydown", (event) => this.key(event));
  }

  sort(key) {
    this.descending = this.sortBy === key && !this.descending;
    this.sortBy = key;
    this.draw();
  }

  draw() {
    const rows = [...this.state.rows.values()], key = this.sortBy, sign = this.descending ? -1 : 1;
    rows.sort((a, b) => sign * (a[key] < b[key] ? -1 : a[key] > b[key] ? 1 : 0) || a.n - b.n);
    this.lines.clear();
    this.body.replaceChildren(...rows.map((row) => this.line(row)));
    this.mark(false);
  }

  line(row) {
    const swatch = element("i", { className: "swatch" });
    swatch.style.background = this.state.colourOf(row);
    const first = element("td", {}, swatch, String(row.n));
    const cells = [row.class || "–", row.area_px, row.equivalent_diameter_px.toFixed(1), row.circularity.toFixed(2), row.solidity.toFixed(2)];
    const line = element("tr", { tabIndex: -1 }, first, ...cells.map((text) => element("td", { textContent: text })));
    line.dataset.n = row.n;
    if (!row.counted) { line.className = "out"; line.title = "not counted"; }
    this.lines.set(row.n, line);
    return line;
  }

  mark(scroll = true) {
    let last = null;
    for (const [n, line] of this.lines) {
      const isIn = this.state.selected.has(n);
      line.classList.toggle("selected", isIn);
      if (isIn) last = line;
    }
    const first = this.body.firstElementChild;
    if (first) for (const line of this.lines.values()) line.tabIndex = line === (last ?? first) ? 0 : -1;
    if (scroll && last) last.scrollIntoView({ block: "nearest" });
  }

  pick(target, adds) {
    const line = target.closest("tr");
    if (line) this.onPick(Number(line.dataset.n), adds);
  }

  key(event) {
    const line = event.target.closest("tr");
    const next = { ArrowDown: line?.nextElementSibling, ArrowUp: line?.previousElementSibling }[event.key];
    if (!next) return;
    event.preventDefault();
    event.stopPropagation();
    next.focus();
    this.pick(next, event.shiftKey);
  }
}

export { rgb };
