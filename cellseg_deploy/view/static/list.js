// The list of images, those that need a look first where that is asked for.

import { api, element } from "/static/api.js";

const needsLook = (image) => Boolean(image.error) || Object.keys(image.warnings).length > 0;
const SHOWN = {
  all: () => true,
  look: needsLook,
  open: (image) => !image.confirmed && !image.error,
  corrected: (image) => image.edits > 0,
};

export class List {
  constructor(onOpen) {
    this.onOpen = onOpen;
    this.images = [];
    this.current = null;
    this.box = document.getElementById("list");
    this.filter = document.getElementById("filter");
    this.filter.addEventListener("change", () => this.draw());
    this.box.addEventListener("click", (event) => this.take(event.target.closest("li")));
    this.box.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.take(event.target.closest("li"));
    });
    // Thumbnails are asked for when they come into view: a run may have thousands of images.
    this.watcher = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries)
        if (isIntersecting && !target.src) { target.src = target.dataset.src; this.watcher.unobserve(target); }
    }, { root: this.box, rootMargin: "200px" });
  }

  get shown() { return this.images.filter(SHOWN[this.filter.value]); }

  draw() {
    const look = this.images.filter(needsLook).length, done = this.images.filter((image) => image.confirmed).length;
    const sum = this.images.reduce((all, image) => all + (image.counted ?? 0), 0);
    const n = this.images.length;
    document.getElementById("totals").textContent = [
      `${n} image${n === 1 ? "" : "s"}`, `${sum} cell${sum === 1 ? "" : "s"} counted`,
      `${look} need${look === 1 ? "s" : ""} a look`, `${done} confirmed`,
    ].map((fact) => fact.replaceAll(" ", "\u00a0")).join("\u00a0· "); // lines break between facts only
    this.box.replaceChildren(...this.shown.map((image) => this.item(image)));
    this.mark();
  }

  item(image) {
    let picture = element("div", { className: "nothing", textContent: "!" });
    if (image.has_picture && !image.error) {
      picture = element("img", { alt: "", width: 64, height: 48 });
      picture.dataset.src = api.thumbnail(image.id);
      this.watcher.observe(picture);
    }
    const said = element("div", {});
    if (image.error) said.append(element("span", { className: "bad", textContent: "failed" }));
    else if (image.counted === null || image.counted === undefined) said.append(element("span", { textContent: "not counted yet" }));
    else said.append(element("span", { textContent: `${image.counted} cells` }));
    if (Object.keys(image.warnings).length) said.append(element("span", { className: "warn", textContent: "⚠" }));
    if (image.edits) said.append(element("span", { className: "warn", textContent: `${image.edits} edit${image.edits > 1 ? "s" : ""}` }));
    if (image.confirmed) said.append(element("span", { className: "good", textContent: "✓" }));
    const words = element("div", {}, element("b", { textContent: image.name }), said);
    const title = [image.name, image.error, ...Object.values(image.warnings)].filter(Boolean).join("\n");
    const item = element("li", { role: "option", tabIndex: 0, title }, picture, words);
    item.dataset.id = image.id;
    return item;
  }

  update(id, changes) {
    const image = this.images.find((each) => each.id === id);
    Object.assign(image, changes);
    const old = [...this.box.children].find((item) => item.dataset.id === id);
    if (old) old.replaceWith(this.item(image));
    this.mark();
    const sum = this.images.reduce((all, each) => all + (each.counted ?? 0), 0);
    const totals = document.getElementById("totals");
    totals.textContent = totals.textContent.replace(/\d+ cells counted/, `${sum} cells counted`)
      .replace(/\d+ confirmed/, `${this.images.filter((each) => each.confirmed).length} confirmed`);
  }

  mark() {
    for (const item of this.box.children) {
      const isIt = item.dataset.id === this.current;
      item.setAttribute("aria-selected", isIt);
      if (isIt) item.scrollIntoView({ block: "nearest" });
    }
  }

  step(by) {
    const shown = this.shown, at = shown.findIndex((image) => image.id === this.current);
    const next = shown[at < 0 ? 0 : at + by];
    if (next) this.onOpen(next.id);
  }

  take(item) { if (item) this.onOpen(item.dataset.id); }
}
