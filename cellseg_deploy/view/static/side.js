// The panel at the right: cells, labelling with other settings, export.

import { api, toast } from "/static/api.js";

const $ = (id) => document.getElementById(id);

export class Side {
  constructor(state, picture, { apply, guarded }) {
    Object.assign(this, { state, picture, apply, guarded, timer: null, model: null });
    for (const tab of document.querySelectorAll("[role=tab]")) tab.addEventListener("click", () => this.show(tab.dataset.tab));
    for (const id of ["task", "threshold", "diameter"]) $(id).addEventListener("input", () => this.changed(id));
    $("label-keep").addEventListener("click", () => this.keep());
    $("label-drop").addEventListener("click", () => this.close());
    $("export").addEventListener("click", () => this.export());
  }

  show(name) {
    for (const tab of document.querySelectorAll("[role=tab]")) {
      const isIt = tab.dataset.tab === name;
      tab.setAttribute("aria-selected", isIt);
      $(`tab-${tab.dataset.tab}`).hidden = !isIt;
    }
    if (name === "label" && !this.model) this.guarded(() => this.openModel());
    if (name !== "label") this.close();
  }

  async openModel() {
    $("model").textContent = "opening the model…";
    try {
      this.model = await api.model();
    } catch (error) {
      $("model").textContent = error.message;
      throw error;
    }
    $("model").textContent = `Model ${this.model.name}`;
    this.toTask();
  }

  toTask() {
    $("threshold").value = this.model.thresholds[$("task").value];
    $("threshold-value").textContent = this.model.thresholds[$("task").value].toFixed(2);
    this.isTasksOwn = true;
  }

  changed(id) {
    if (!this.model) return;
    if (id === "task") this.toTask();
    if (id === "threshold") { this.isTasksOwn = false; $("threshold-value").textContent = Number($("threshold").value).toFixed(2); }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.guarded(() => this.preview()), 250);
  }

  get settings() {
    const settings = { task: $("task").value };
    if (!this.isTasksOwn) settings.threshold = Number($("threshold").value);
    if ($("diameter").value) settings.cell_diameter_px = Number($("diameter").value);
    return settings;
  }

  async preview() {
    const id = this.state.id;
    $("preview").textContent = "labelling…";
    try {
      const found = await api.label(id, this.settings);
      if (id !== this.state.id) return;
      this.picture.preview = found.cells;
      $("preview").textContent = `${found.counted} cells counted, ${found.found} found (now ${this.state.last.counted})`;
      $("label-keep").disabled = $("label-drop").disabled = false;
      this.picture.draw();
    } catch (error) {
      $("preview").textContent = "";
      throw error;
    }
  }

  keep() {
    this.guarded(async () => {
      const content = await api.label(this.state.id, { ...this.settings, keep: true });
      this.close();
      this.apply(content);
    });
  }

  close() {
    this.picture.preview = null;
    $("preview").textContent = "";
    $("label-keep").disabled = $("label-drop").disabled = true;
    if (this.model) this.toTask();
    this.picture.draw();
  }

  export() {
    const kinds = [...document.querySelectorAll("[name=kind]:checked")].map((box) => box.value);
    $("exported").textContent = "writing…";
    this.guarded(async () => {
      try {
        const done = await api.export(kinds, $("everything").checked);
        $("exported").textContent = `${done.images} image${done.images > 1 ? "s" : ""}, ${done.files.length} files in ${this.state.run.title}/${done.folder}/`;
        toast($("exported").textContent);
      } catch (error) {
        $("exported").textContent = "";
        throw error;
      }
    });
  }
}
