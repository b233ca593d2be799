// Requests to the server. A refusal becomes an Error with the server's sentence.

async function ask(method, address, body, type = "application/json") {
  let response;
  try {
    response = await fetch(address, { method, body, headers: body === undefined ? {} : { "Content-Type": type } });
  } catch {
    throw new Error("cellseg-view does not answer; start it again and open the address that it prints. Corrections are saved.");
  }
  const isJson = (response.headers.get("Content-Type") || "").startsWith("application/json");
  const content = isJson ? await response.json() : { error: await response.text() };
  if (!response.ok) throw new Error(content.error || response.statusText);
  return content;
}

const image = (id) => `/api/images/${encodeURIComponent(id)}`;
const post = (address, content) => ask("POST", address, JSON.stringify(content ?? {}));

export const api = {
  run: () => ask("GET", "/api/run"),
  model: () => ask("GET", "/api/model"),
  cells: (id) => ask("GET", image(id)),
  edit: (id, edit) => post(`${image(id)}/edits`, edit),
  undo: (id) => post(`${image(id)}/undo`),
  redo: (id) => post(`${image(id)}/redo`),
  confirm: (id, value) => post(`${image(id)}/confirm`, { value }),
  label: (id, settings) => post(`${image(id)}/label`, settings),
  save: () => post("/api/save"),
  export: (kinds, everything) => post("/api/export", { kinds, everything }),
  upload: (file) => ask("POST", `/api/images?name=${encodeURIComponent(file.name)}`, file, "application/octet-stream"),
  thumbnail: (id) => `${image(id)}/thumbnail`,
  tile: (id, level, x, y) => `${image(id)}/tiles/${level}/${x}_${y}.jpg`,
};

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children); // strings become text, never HTML
  return made;
}

export function toast(words, isBad = false) {
  const shown = element("div", { textContent: words, className: isBad ? "bad" : "" });
  document.getElementById("toasts").append(shown);
  setTimeout(() => shown.remove(), isBad ? 9000 : 4000);
}

export const rgb = (colour) => `rgb(${colour.join(",")})`;
