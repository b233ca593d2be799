// The picture: OpenSeadragon for the pixels, a canvas above it for outlines, selection and what is being drawn.

import { api, rgb } from "/static/api.js";

const NOT_COUNTED = "rgb(255,160,0)";

export class Picture {
  constructor(stage, state) {
    this.stage = stage;
    this.state = state;
    this.canvas = stage.querySelector("#overlay");
    this.line = []; // what is being drawn, in px of the image
    this.cross = null; // crosshair of the keyboard, in px of the image
    this.preview = null; // rows of other labels
    this.showOutlines = true;
    this.viewer = OpenSeadragon({
      element: stage.querySelector("#picture"), showNavigationControl: false, showNavigator: true, navigatorId: "navigator", navigatorAutoFade: false,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: false }, keyboardNavEnabled: false, animationTime: 0.25,
      maxZoomPixelRatio: 12, visibilityRatio: 0.3, imageSmoothingEnabled: true, zoomPerScroll: 1.3, drawer: "canvas",
    });
    for (const event of ["update-viewport", "open", "resize"]) this.viewer.addHandler(event, () => this.draw());
    this.viewer.innerTracker.keyHandler = null;
    new ResizeObserver(() => this.draw()).observe(stage);
  }

  async open(id, width, height, tileSize) {
    const top = Math.max(1, Math.ceil(Math.log2(Math.max(width, height))));
    const maxLevel = Math.max(width, height) <= 1 ? 0 : top;
    const done = new Promise((resolve) => this.viewer.addOnceHandler("open", resolve));
    this.viewer.open({ width, height, tileSize, tileOverlap: 0, minLevel: Math.min(8, maxLevel), maxLevel,
      getTileUrl: (level, x, y) => api.tile(id, level, x, y) });
    await done;
  }

  close() { this.viewer.close(); this.draw(); }

  // Pixels of the canvas per px of the image, and the place of the image's corner.
  get view() {
    const item = this.viewer.world.getItemAt(0);
    if (!item) return null;
    const origin = item.imageToViewerElementCoordinates(new OpenSeadragon.Point(0, 0));
    const along = item.imageToViewerElementCoordinates(new OpenSeadragon.Point(1000, 0));
    return { scale: (along.x - origin.x) / 1000, x: origin.x, y: origin.y };
  }

  toImage(event) {
    const box = this.canvas.getBoundingClientRect(), view = this.view;
    return view && [(event.clientX - box.left - view.x) / view.scale, (event.clientY - box.top - view.y) / view.scale];
  }

  centre() {
    const view = this.view;
    return [(this.canvas.clientWidth / 2 - view.x) / view.scale, (this.canvas.clientHeight / 2 - view.y) / view.scale];
  }

  cellAt([x, y]) {
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    for (const row of this.state.rows.values()) {
      const [left, top, width, height] = row.box;
      if (x >= left && y >= top && x <= left + width && y <= top + height &&
          context.isPointInPath(pathOf(row), x, y, "evenodd")) return row.n;
    }
    return null;
  }

  show(row) {
    const item = this.viewer.world.getItemAt(0), [left, top, width, height] = row.box;
    const seen = item.viewportToImageRectangle(this.viewer.viewport.getBounds());
    const isInside = left >= seen.x && top >= seen.y && left + width <= seen.x + seen.width && top + height <= seen.y + seen.height;
    if (!isInside || width / seen.width < 0.02) {
      const around = 4 * Math.max(width, height), rect = new OpenSeadragon.Rect(row.at[0] - around, row.at[1] - around, 2 * around, 2 * around);
      this.viewer.viewport.fitBounds(item.imageToViewportRectangle(rect));
    }
  }

  zoom(event) {
    const box = this.canvas.getBoundingClientRect();
    const point = this.viewer.viewport.pointFromPixel(new OpenSeadragon.Point(event.clientX - box.left, event.clientY - box.top));
    this.viewer.viewport.zoomBy(event.deltaY < 0 ? 1.3 : 1 / 1.3, point);
  }

  pan(dx, dy) { this.viewer.viewport.panBy(this.viewer.viewport.deltaPointsFromPixels(new OpenSeadragon.Point(dx, dy))); }

  // About the selected cell, so that it stays in view, or the middle.
  zoomBy(factor) {
    const row = this.state.rows.get([...this.state.selected].pop()), item = this.viewer.world.getItemAt(0);
    if (!item) return;
    const centre = row && item.imageToViewportCoordinates(new OpenSeadragon.Point(...row.at));
    const isSeen = centre && this.viewer.viewport.getBounds().containsPoint(centre);
    this.viewer.viewport.zoomBy(factor, isSeen ? centre : undefined);
  }

  fit() { this.viewer.viewport.goHome(); }

  draw() {
    const { canvas } = this, ratio = window.devicePixelRatio || 1;
    const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d"), view = this.view;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    if (!view || !this.viewer.isOpen()) return;
    const { viewport } = this.viewer, isWhole = viewport.getZoom(true) <= 1.1 * viewport.getHomeZoom();
    document.getElementById("navigator").style.visibility = isWhole ? "hidden" : "visible";
    const scale = view.scale * ratio;
    context.setTransform(scale, 0, 0, scale, view.x * ratio, view.y * ratio);
    const px = ratio / scale; // one CSS px, in px of the image
    const seen = [-view.x / view.scale, -view.y / view.scale, canvas.clientWidth / view.scale, canvas.clientHeight / view.scale];
    const rows = this.preview ?? [...this.state.rows.values()];
    const apart = scale > 0.5 ? 0 : 2 ** Math.floor(Math.log2(1 / scale)); // at most one px of the screen, in px of the image
    if (this.showOutlines) for (const row of rows) this.outline(context, row, px, seen, apart);
    if (!this.preview) for (const n of this.state.selected) this.mark(context, this.state.rows.get(n), px);
    this.drawLine(context, px);
  }

  outline(context, row, px, [x, y, width, height], apart) {
    const [left, top, w, h] = row.box;
    if (left > x + width || top > y + height || left + w < x || top + h < y) return;
    const path = pathOf(row, apart), colour = this.state.colourOf(row);
    context.lineJoin = "round";
    context.setLineDash([]);
    if (Math.max(w, h) > 14 * px) { // a rim would hide a smaller cell
      context.strokeStyle = "rgba(0,0,0,.55)";
      context.lineWidth = 3.4 * px;
      context.stroke(path);
    }
    context.strokeStyle = row.counted || row.class ? colour : NOT_COUNTED;
    context.lineWidth = 1.8 * px;
    if (!row.counted) context.setLineDash([5 * px, 4 * px]);
    context.stroke(path);
    context.setLineDash([]);
  }

  mark(context, row, px) {
    if (!row) return;
    context.fillStyle = "rgba(255,255,255,.28)";
    context.fill(pathOf(row), "evenodd");
    context.strokeStyle = "#fff";
    context.lineWidth = 2.6 * px;
    context.stroke(pathOf(row));
  }

  drawLine(context, px) {
    const points = this.cross && this.line.length ? [...this.line, this.cross] : this.line;
    if (points.length > 1) {
      context.beginPath();
      points.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
      for (const [colour, wide] of [["#000", 4], ["#ffe14d", 2]]) {
        context.strokeStyle = colour;
        context.lineWidth = wide * px;
        context.stroke();
      }
    }
    if (this.cross) {
      const [x, y] = this.cross, arm = 11 * px;
      context.beginPath();
      context.moveTo(x - arm, y); context.lineTo(x + arm, y); context.moveTo(x, y - arm); context.lineTo(x, y + arm);
      context.strokeStyle = "#ffe14d";
      context.lineWidth = 2 * px;
      context.stroke();
    }
  }
}

const paths = new WeakMap();

// Corners of a ring [x, y, x, y, ...] without those nearer than `apart` to the one kept before: thousands of cells on one
// screen are drawn quickly, and no corner moves by more.
export function thinned(ring, apart) {
  const kept = [ring[0], ring[1]];
  for (let i = 2; i < ring.length; i += 2)
    if (Math.hypot(ring[i] - kept.at(-2), ring[i + 1] - kept.at(-1)) >= apart) kept.push(ring[i], ring[i + 1]);
  return kept.length < 8 ? ring : kept;
}

function pathOf(row, apart = 0) {
  const known = paths.get(row) ?? new Map();
  let path = known.get(apart);
  if (!path) {
    path = new Path2D();
    for (const whole of row.rings) {
      const ring = apart ? thinned(whole, apart) : whole;
      path.moveTo(ring[0], ring[1]);
      for (let i = 2; i < ring.length; i += 2) path.lineTo(ring[i], ring[i + 1]);
      path.closePath();
    }
    paths.set(row, known.set(apart, path));
  }
  return path;
}

export { rgb };
