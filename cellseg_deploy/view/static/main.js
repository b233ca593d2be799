// The page: one image is open; every change of it is made by the server, and what comes back is shown.

import { api, element, rgb, toast } from "/static/api.js";
import { List } from "/static/list.js";
import { Picture } from "/static/picture.js";
import { Side } from "/static/side.js";
import { Table } from "/static/table.js";
import { Tools } from "/static/tools.js";

const $ = (id) => document.getElementById(id);
const state = {
  run: null, id: null, rows: new Map(), selected: new Set(), last: {},
  colourOf(row) {
    const known = this.run.classes.find((each) => each.name === row.class);
    return rgb(known ? known.rgb : this.run.counted_rgb);
  },
};
const picture = new Picture($("stage"), state);
const table = new Table(state, (n, adds) => { select(n, adds); const row = state.rows.get(n); if (row) picture.show(row); });
const list = new List(open);
const tools = new Tools(picture, { onLine: finishLine, onClick: (point, adds) => select(picture.cellAt(point), adds) });
const side = new Side(state, picture, { apply, guarded });
let waiting = Promise.resolve(), saving = null;

// Requests that change something go one after the other; a refusal is said.
function guarded(work) {
  waiting = waiting.then(work).catch((error) => toast(error.message, true));
  return waiting;
}

async function start() {
  state.run = await api.run();
  document.title = `${state.run.title} – cellseg-view`;
  $("title").textContent = state.run.title;
  state.run.classes.forEach((each, index) => {
    const swatch = element("i", { className: "swatch" });
    swatch.style.background = rgb(each.rgb);
    const button = element("button", { title: `Class of the selected cells: ${each.name} (${index + 1})` }, swatch, each.name, element("kbd", { textContent: index + 1 }));
    button.addEventListener("click", () => setClass(index));
    $("classes").append(button);
  });
  list.images = state.run.images;
  list.draw();
  for (const notice of state.run.notices) toast(notice, true);
  const first = list.images.find((image) => image.id === location.hash.slice(1)) ?? list.images.find((image) => !image.error);
  if (first) await open(first.id);
}

function open(id) {
  return guarded(async () => {
    const image = list.images.find((each) => each.id === id);
    list.current = state.id = id;
    history.replaceState(null, "", `#${id}`);
    state.rows = new Map();
    state.selected.clear();
    side.close();
    list.mark();
    $("count").textContent = "";
    $("problem").hidden = true;
    try {
      if (image.error) throw new Error(image.error);
      if (image.counted === null || image.counted === undefined) $("hint").textContent = "counting…";
      const content = await api.cells(id);
      state.rows = new Map(content.cells.map((row) => [row.n, row]));
      $("notes").textContent = content.warnings.join("\n");
      await picture.open(id, content.width, content.height, state.run.tile_size);
      take(content);
      table.draw();
    } catch (error) {
      picture.close();
      table.draw();
      $("problem").textContent = error.message;
      $("problem").hidden = false;
    }
    tools.choose("select");
  });
}

// Show the state of the corrections that an answer tells.
function take(content) {
  state.last = content;
  const out = new Set(content.not_counted);
  for (const row of state.rows.values()) row.counted = !out.has(row.n);
  const others = content.found - content.counted;
  $("count").replaceChildren(element("b", { textContent: content.counted }), "cells", others ? `, ${others} more not counted` : "");
  if (content.edits) $("count").append(element("span", { className: "edited", textContent: `${content.edits} edit${content.edits > 1 ? "s" : ""}` + (content.before == null ? "" : `, ${content.before} found by the run`) }));
  $("undo").disabled = !content.can_undo;
  $("redo").disabled = !content.can_redo;
  $("confirm").setAttribute("aria-pressed", content.confirmed);
  list.update(state.id, { counted: content.counted, cells: content.found, edits: content.edits, confirmed: content.confirmed });
  buttons();
}

// Take over the cells that a change made, and select them.
function apply(content) {
  for (const n of content.removed) { state.rows.delete(n); state.selected.delete(n); }
  for (const row of content.cells) state.rows.set(row.n, row);
  take(content);
  if (content.cells.length) state.selected = new Set(content.cells.length <= 12 ? content.cells.map((row) => row.n) : []);
  table.draw();
  table.mark();
  picture.draw();
  buttons();
  clearTimeout(saving);
  saving = setTimeout(() => api.save().catch(() => {}), 2000);
}

const change = (work) => guarded(async () => { const id = state.id, content = await work(id); if (id === state.id) apply(content); });
const edit = (content) => change((id) => api.edit(id, content));

function select(n, adds) {
  if (!adds) state.selected.clear();
  if (n !== null) state.selected.has(n) && adds ? state.selected.delete(n) : state.selected.add(n);
  table.mark();
  picture.draw();
  buttons();
}

function buttons() {
  const some = state.selected.size > 0;
  $("merge").disabled = state.selected.size < 2;
  $("delete").disabled = !some;
  for (const button of $("classes").children) button.disabled = !some;
}

function remove() { if (state.selected.size) edit({ op: "delete", cells: [...state.selected] }); }
function merge() {
  if (state.selected.size < 2) toast("Select two cells or more that touch: Shift and a click", true);
  else edit({ op: "merge", cells: [...state.selected] });
}
function setClass(index) {
  const known = state.run.classes[index];
  if (known && state.selected.size) edit({ op: "class", cells: [...state.selected], class: known.name });
}

function finishLine(tool, points) {
  if (tool === "draw") edit({ op: "draw", outline: points });
  else {
    const cell = crossed(points);
    if (cell === null) toast("The line crosses no cell: begin and end it outside of the cell", true);
    else edit({ op: "split", cell, line: points });
  }
}

// The cell in which most of the line lies.
function crossed(points) {
  const within = new Map();
  for (let i = 1; i < points.length; i++) {
    const [ax, ay] = points[i - 1], [bx, by] = points[i], steps = Math.max(1, Math.ceil(Math.hypot(bx - ax, by - ay) / 2));
    for (let k = 0; k < steps; k++) {
      const n = picture.cellAt([ax + ((bx - ax) * k) / steps, ay + ((by - ay) * k) / steps]);
      if (n !== null) within.set(n, (within.get(n) ?? 0) + 1);
    }
  }
  const chosen = [...within.entries()].filter(([n]) => state.selected.size !== 1 || !within.has([...state.selected][0]) || state.selected.has(n));
  return chosen.length ? chosen.sort((a, b) => b[1] - a[1])[0][0] : null;
}

function stepCell(by, adds = false) {
  const numbers = [...table.lines.keys()], current = [...state.selected].pop();
  if (!numbers.length) return;
  const n = numbers[(numbers.indexOf(current) + by + numbers.length) % numbers.length];
  if (adds) state.selected.delete(n); // select() would take it out again
  select(n, adds);
  picture.show(state.rows.get(n));
}

const undo = () => change(api.undo), redo = () => change(api.redo);
const confirmImage = () => change((id) => api.confirm(id, !state.last.confirmed));
function toggleOutlines() {
  picture.showOutlines = !picture.showOutlines;
  $("outlines").setAttribute("aria-pressed", picture.showOutlines);
  picture.draw();
}

const KEYS = [
  ["V", "select", () => tools.choose("select")], ["D", "draw a cell", () => tools.choose("draw")], ["S", "split a cell", () => tools.choose("split")],
  ["M", "merge the selected cells", merge], ["X", "delete the selected cells (also Del)", remove], ["Delete", "", remove], ["Backspace", "", remove],
  ["1 … 9", "class of the selected cells", null], [".", "next cell", () => stepCell(1)], [",", "cell before", () => stepCell(-1)],
  [">", "add the next cell to the selection", () => stepCell(1, true)], ["<", "add the cell before", () => stepCell(-1, true)],
  ["Z", "undo (also Ctrl+Z)", undo], ["Y", "redo (also Ctrl+Y)", redo], ["C", "confirm the image, or take that back", confirmImage],
  ["N", "next image", () => list.step(1)], ["P", "image before", () => list.step(-1)], ["O", "outlines on or off", toggleOutlines],
  ["F", "whole picture", () => picture.fit()], ["+", "zoom in", () => picture.zoomBy(1.4)], ["-", "zoom out", () => picture.zoomBy(1 / 1.4)],
  ["Arrows", "move the picture, or the cross while drawing (Shift: faster)", null], ["Escape", "no tool, nothing selected", () => { tools.choose("select"); select(null, false); }],
  ["?", "this list", showKeys],
];

function showKeys() {
  const rows = KEYS.filter(([, words]) => words).map(([key, words]) => element("tr", {}, element("td", {}, element("kbd", { textContent: key })), element("td", { textContent: words })));
  const close = element("button", { textContent: "Close" });
  close.addEventListener("click", () => $("keys").close());
  $("keys").replaceChildren(element("table", {}, element("tbody", {}, ...rows)), close);
  $("keys").showModal();
}

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest("input:not([type=checkbox]):not([type=range]), select, textarea, dialog");
  if (isTyping || event.altKey || (event.key === "Enter" || event.key === " ") && event.target.closest("button, li")) return;
  const key = event.key.length === 1 ? event.key.toUpperCase() : event.key;
  if (event.ctrlKey || event.metaKey) {
    if (key === "Z" || key === "Y") { event.preventDefault(); key === "Y" || event.shiftKey ? redo() : undo(); }
    return;
  }
  if (event.target.type === "range" && key.startsWith("Arrow")) return;
  if (tools.key(event)) return event.preventDefault();
  if (/^[1-9]$/.test(key)) return setClass(Number(key) - 1);
  const found = KEYS.find(([name, , work]) => work && name === key);
  if (found) { event.preventDefault(); found[2](); }
});

for (const [id, work] of Object.entries({ merge, delete: remove, undo, redo, confirm: confirmImage, outlines: toggleOutlines, help: showKeys, fit: () => picture.fit() })) {
  $(id).addEventListener("click", () => { work(); $(id).blur(); });
}

// ---------------------------------------------------------------------------------------------------- adding an image

async function add(files) {
  for (const file of files) {
    toast(`${file.name}: counting…`);
    await guarded(async () => {
      const image = await api.upload(file);
      list.images.push(image);
      list.draw();
    });
    const image = list.images.find((each) => each.name.startsWith("uploads/") && each.counted == null);
    if (image) { await open(image.id); toast(`${file.name}: ${state.last.counted} cells`); }
  }
}

let depth = 0;
const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
addEventListener("dragenter", (event) => { if (hasFiles(event)) { depth++; $("drop").hidden = false; } });
addEventListener("dragleave", (event) => { if (hasFiles(event) && --depth <= 0) $("drop").hidden = true; });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => { event.preventDefault(); depth = 0; $("drop").hidden = true; add([...event.dataTransfer.files]); });
$("file").addEventListener("change", () => { add([...$("file").files]); $("file").value = ""; });

window.cellsegView = { state, picture, tools, settled: () => waiting }; // for tests and the console
start().catch((error) => { $("problem").textContent = error.message; $("problem").hidden = false; });
