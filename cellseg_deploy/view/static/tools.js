// Tools that act on the picture, with the mouse and with the keys alone.

export const HINTS = {
  select: "",
  draw: "Drag around a cell, or: arrows move the cross, Space sets a point, Enter ends · Esc",
  split: "Drag a line across a cell, or: arrows move the cross, Space sets a point, Enter ends · Esc",
};
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Tools {
  // onLine(tool, points): a line or outline was finished. onClick(point, adds): a click with the select tool.
  constructor(picture, { onLine, onClick }) {
    this.picture = picture;
    this.onLine = onLine;
    this.tool = "select";
    this.isDown = false;
    const canvas = picture.canvas;
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.up(event));
    canvas.addEventListener("wheel", (event) => { event.preventDefault(); picture.zoom(event); }, { passive: false });
    picture.viewer.addHandler("canvas-click", (event) => {
      if (!event.quick) return;
      const original = event.originalEvent, point = picture.toImage(original);
      if (point) onClick(point, original.shiftKey || original.ctrlKey || original.metaKey);
    });
    for (const button of document.querySelectorAll("[data-tool]")) {
      button.addEventListener("click", () => { this.choose(button.dataset.tool); button.blur(); });
    }
    this.choose("select");
  }

  choose(tool) {
    this.tool = tool;
    this.picture.line = [];
    this.picture.cross = null;
    this.picture.stage.classList.toggle("drawing", tool !== "select");
    document.getElementById("hint").textContent = HINTS[tool];
    for (const button of document.querySelectorAll("[data-tool]")) button.setAttribute("aria-pressed", button.dataset.tool === tool);
    this.picture.draw();
  }

  down(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    this.picture.canvas.setPointerCapture(event.pointerId);
    this.isDown = true;
    this.picture.cross = null;
    this.picture.line = [this.picture.toImage(event)];
  }

  move(event) {
    if (!this.isDown) return;
    const point = this.picture.toImage(event), line = this.picture.line, [x, y] = line[line.length - 1];
    if (Math.hypot(point[0] - x, point[1] - y) * this.picture.view.scale >= 2) line.push(point);
    this.picture.draw();
  }

  up(event) {
    if (!this.isDown) return;
    this.isDown = false;
    this.picture.line.push(this.picture.toImage(event));
    this.finish();
  }

  finish() {
    const line = this.picture.line.map(([x, y]) => [Math.round(x * 10) / 10, Math.round(y * 10) / 10]);
    this.picture.line = [];
    this.picture.draw();
    if (line.length >= (this.tool === "draw" ? 3 : 2)) this.onLine(this.tool, line);
  }

  // Returns whether the key was one of the tool's.
  key(event) {
    const picture = this.picture, arrow = ARROWS[event.key];
    if (!picture.view) return false;
    if (this.tool === "select") {
      if (!arrow) return false;
      picture.pan(60 * arrow[0], 60 * arrow[1]);
      return true;
    }
    if (arrow) {
      const step = (event.shiftKey ? 20 : 4) / picture.view.scale, [x, y] = picture.cross ?? picture.centre();
      picture.cross = [x + step * arrow[0], y + step * arrow[1]];
    } else if (event.key === " ") {
      picture.cross ??= picture.centre();
      picture.line.push([...picture.cross]);
    } else if (event.key === "Backspace" && picture.line.length) {
      picture.line.pop();
    } else if (event.key === "Enter" && picture.line.length) {
      if (picture.cross && this.tool === "split") picture.line.push([...picture.cross]);
      this.finish();
    } else return false;
    picture.draw();
    return true;
  }
}
