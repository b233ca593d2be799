"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  let pictures = null; // megabytes, at the end of the page: parsed when first needed
  const picture = (i) => {
    if (document.readyState === "loading") return "";
    pictures ??= JSON.parse($("small").textContent);
    return pictures[i] ? "data:image/jpeg;base64," + pictures[i] : "";
  };
  const make = (name, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...children);
    return element;
  };

  // ---- enlarge
  const large = $("large");
  let at = -1;
  function enlarge(i) {
    const one = data.images[i];
    if (!one) return;
    at = i;
    const img = large.querySelector("img"), small = picture(i);
    img.onerror = () => { img.onerror = null; small ? (img.src = small) : img.removeAttribute("src"); };
    img.alt = one.name;
    one.file || small ? (img.src = one.file || small) : img.removeAttribute("src");
    large.querySelector("p").textContent = [one.name, one.note, one.flag].filter(Boolean).join(" · ");
    if (!large.open) large.showModal();
  }
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-image]");
    if (button) enlarge(Number(button.dataset.image));
  });
  $("close").onclick = () => large.close();
  large.onclick = (event) => { if (event.target === large) large.close(); };
  large.onkeydown = (event) => {
    if (event.key === "ArrowRight") enlarge(Math.min(at + 1, data.images.length - 1));
    if (event.key === "ArrowLeft") enlarge(Math.max(at - 1, 0));
  };

  // ---- sort and filter
  const text = new Intl.Collator(undefined, { numeric: true });
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.onclick = () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => {
          const cell = row.cells[column];
          if (cell.dataset.v === undefined) return cell.textContent;
          return cell.dataset.v === "" ? NaN : Number(cell.dataset.v);
        };
        const rows = [...table.tBodies[0].rows].map((row, i) => [key(row), i, row]);
        rows.sort(([a, i], [b, j]) => {
          if (typeof a === "number") {
            if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b) || i - j; // empty ones last
            return (down ? b - a : a - b) || i - j;
          }
          return (down ? text.compare(b, a) : text.compare(a, b)) || i - j;
        });
        table.tBodies[0].append(...rows.map(([, , row]) => row));
      };
    });
  }
  const filter = () => {
    const part = $("filter").value.toLowerCase(), only = $("only").checked;
    let n = 0;
    for (const row of $("table").tBodies[0].rows) {
      row.hidden = (only && !row.classList.contains("flagged")) || !row.cells[0].textContent.toLowerCase().includes(part);
      n += !row.hidden;
    }
    $("matches").textContent = part || only ? `${n} ${n === 1 ? "image" : "images"}` : "";
  };
  $("filter").oninput = $("only").onchange = filter;

  // ---- pictures, a page at a time
  if ($("gallery")) {
    const PER_PAGE = 60, pages = Math.ceil(data.images.length / PER_PAGE);
    let page = 0;
    const show = () => {
      const first = page * PER_PAGE;
      $("gallery").replaceChildren(...data.images.slice(first, first + PER_PAGE).map((one, k) => {
        const button = make("button", { className: one.flag ? "flagged" : "" });
        button.dataset.image = first + k;
        const source = picture(first + k);
        if (source) button.append(make("img", { src: source, alt: "", loading: "lazy", decoding: "async" }));
        const caption = make("span", {}, `${one.name} · ${one.note}`);
        if (one.flag) caption.append(make("br"), make("i", {}, "⚠ " + one.flag));
        button.append(caption);
        return button;
      }));
      $("page").textContent = `${first + 1}–${Math.min(first + PER_PAGE, data.images.length)} of ${data.images.length}`;
      $("previous").disabled = page === 0;
      $("next").disabled = page + 1 >= pages;
    };
    $("previous").onclick = () => { page--; show(); };
    $("next").onclick = () => { page++; show(); };
    const fill = () => { show(); window.removeEventListener("beforeprint", fill); };
    window.addEventListener("beforeprint", fill);
    const wait = () => new IntersectionObserver((seen, observer) => {
      if (seen.some((one) => one.isIntersecting)) { observer.disconnect(); fill(); }
    }, { rootMargin: "600px" }).observe($("pictures"));
    document.addEventListener("DOMContentLoaded", wait);
  }

  // ---- print everything that can be opened
  const closed = [];
  window.addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details:not([open])")) if (!part.querySelector("pre")) { closed.push(part); part.open = true; }
  });
  window.addEventListener("afterprint", () => { for (const part of closed.splice(0)) part.open = false; });

  // ---- figures
  const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#1b2733"]; // Okabe and Ito
  const DASHES = [null, "6,3", "2,2", "8,2,2,2", "10,4", "4,4", "1,3"];
  const STYLE = { fontFamily: "system-ui, sans-serif", fontSize: "12px", background: "white", color: "#1b2733" };
  const short = (name) => (name.length > 28 ? name.slice(0, 13) + "…" + name.slice(-13) : name);

  function save(blob, name) {
    const link = make("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  function svgText(svg) {
    const copy = svg.cloneNode(true), box = svg.viewBox.baseVal;
    copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    copy.setAttribute("width", box.width);
    copy.setAttribute("height", box.height);
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [key, value] of Object.entries({ width: box.width, height: box.height, fill: "white" })) rect.setAttribute(key, value);
    copy.querySelector("style")?.after(rect) ?? copy.prepend(rect);
    return [new XMLSerializer().serializeToString(copy), box];
  }
  function figure(name, title, note, svg) {
    const asSvg = make("button", { textContent: "SVG", title: "Download as SVG" });
    const asPng = make("button", { textContent: "PNG", title: "Download as PNG" });
    asSvg.onclick = () => save(new Blob([svgText(svg)[0]], { type: "image/svg+xml" }), name + ".svg");
    asPng.onclick = () => {
      const [source, box] = svgText(svg), img = new Image();
      img.onload = () => {
        const canvas = make("canvas", { width: box.width * 3, height: box.height * 3 });
        canvas.getContext("2d").drawImage(img, 0, 0, canvas.width, canvas.height);
        canvas.toBlob((blob) => save(blob, name + ".png"));
      };
      img.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(source);
    };
    const caption = make("figcaption", {}, make("b", {}, title), asPng, asSvg);
    if (note) caption.append(make("span", { className: "hint", textContent: note }));
    const whole = make("figure", { id: "figure-" + name }, caption, svg);
    return whole;
  }
  const box = $("figures"), counts = data.counts;
  if (counts.points.length) {
    const points = counts.points.map(([group, count, image], i) => ({ group: counts.groups[group], count, image, shift: (((i * 0.618034) % 1) - 0.5) * 16 }));
    const by = d3.group(points, (point) => point.shift);
    box.append(figure("counts", "Counted cells per image",
      "box: quartiles, line: median; a dot is an image" + (counts.left_out ? `; ${counts.left_out} more groups are in the table` : ""),
      Plot.plot({
        style: STYLE, marginBottom: 40, width: 640, marginLeft: 170, marginRight: 20, height: 60 + 44 * counts.groups.length,
        x: { label: "counted cells", grid: true, nice: true, zero: true }, y: { label: null, domain: counts.groups, tickFormat: short },
        marks: [
          Plot.boxX(points, { x: "count", y: "group", fill: "#dbe6ee", stroke: "#5b6b7a", r: 0, opacity: 0.9 }),
          ...[...by].slice(0, 400).map(([shift, part]) => Plot.dot(part, { x: "count", y: "group", dy: shift, r: 2.2, fill: "#0072b2", fillOpacity: 0.55 })),
          ...(by.size > 400 ? [Plot.tickX(points, { x: "count", y: "group", stroke: "#0072b2", strokeOpacity: 0.2, insetTop: 8, insetBottom: 8 })] : []),
        ],
      })));
  }
  for (const one of data.distributions) {
    let groups = Object.entries(one.groups);
    const crowded = groups.length > COLOURS.length;
    const n = one.edges.length - 1;
    const lines = groups.map(([group, shares]) => shares.flatMap((y, i) => [{ x: one.edges[i], y, group }, { x: one.edges[i + 1], y, group }]));
    box.append(figure(one.name, one.title, one.note + (crowded ? "; one grey line per group" : ""), Plot.plot({
      style: STYLE, marginBottom: 40, width: 640, height: 300, marginLeft: 50, marginRight: 20,
      x: { label: one.title, nice: false, domain: [one.edges[0], one.edges[n]] }, y: { label: "% of the cells", grid: true, percent: true },
      marks: [
        ...(lines.length === 1 ? [Plot.areaY(lines[0], { x: "x", y: "y", fill: COLOURS[0], fillOpacity: 0.15 })] : []),
        ...lines.map((line, i) => Plot.lineY(line, { x: "x", y: "y", strokeWidth: crowded ? 1 : 1.8, stroke: crowded ? "#5b6b7a" : COLOURS[i], strokeOpacity: crowded ? 0.4 : 1, strokeDasharray: crowded ? null : DASHES[i] })),
        ...(crowded || lines.length === 1 ? [] : groups.map(([group], i) => Plot.text([short(group)], { frameAnchor: one.name === "area" ? "top-right" : "top-left", dx: one.name === "area" ? -4 : 8, dy: 4 + 15 * i, fill: COLOURS[i], fontWeight: 600 }))),
        Plot.ruleY([0]),
      ],
    })));
  }
  if (data.classes.names) {
    const cells = Object.entries(data.classes.groups).flatMap(([group, numbers]) => {
      const sum = d3.sum(numbers) || 1;
      return numbers.map((number, i) => ({ group, name: data.classes.names[i], share: number / sum, number }));
    });
    const groups = Object.keys(data.classes.groups);
    box.append(figure("classes", "Classes", "share of the cells that the count rule admits", Plot.plot({
      style: STYLE, marginBottom: 40, width: 640, marginLeft: 170, marginTop: 40, marginRight: 20, height: 80 + 36 * groups.length,
      x: { label: "% of the cells", percent: true }, y: { label: null, domain: groups, tickFormat: short }, color: { domain: data.classes.names, range: COLOURS },
      marks: [
        Plot.barX(cells, { x: "share", y: "group", fill: "name", insetTop: 3, insetBottom: 3 }),
        ...data.classes.names.map((name, i) => Plot.text([`■ ${name}`], { frameAnchor: "top-left", dx: 120 * i, dy: -22, fill: COLOURS[i % COLOURS.length], fontWeight: 600 })),
      ],
    })));
  }

  // ---- thresholds
  if ($("slider")) {
    const draw = () => {
      const one = data.thresholds[$("which").value], step = one.steps[$("slider").value];
      $("at").textContent = step.threshold.toFixed(2) + (step.threshold === one.used ? " (of the run)" : "");
      $("found").textContent = `${step.counted} counted, ${step.cells} found`;
      const [width, height] = one.size;
      const ns = "http://www.w3.org/2000/svg";
      const svg = document.createElementNS(ns, "svg");
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      const img = document.createElementNS(ns, "image");
      for (const [key, value] of Object.entries({ width, height, href: "data:image/jpeg;base64," + one.picture })) img.setAttribute(key, value);
      svg.append(img);
      for (const [paths, colour, dash] of [[step.outlines, "#00ff50", ""], [step.others, "#55606a", "5,4"]]) {
        const path = document.createElementNS(ns, "path");
        const d = paths.map((p) => "M" + p.reduce((s, v, i) => s + (i % 2 ? "," : i ? "L" : "") + v, "") + "Z").join("");
        for (const [key, value] of Object.entries({ d, fill: "none", stroke: colour, "stroke-width": Math.max(1, width / 500), "stroke-dasharray": dash })) path.setAttribute(key, value);
        svg.append(path);
      }
      $("drawing").replaceChildren(svg);
      const steps = one.steps;
      $("curve").replaceChildren(figure("threshold", "Counted cells by threshold", short(one.name), Plot.plot({
        style: STYLE, marginBottom: 40, width: 480, height: 300, x: { label: "foreground threshold", domain: [0, 1] }, y: { label: "counted", zero: true, grid: true, nice: true },
        marks: [Plot.lineY(steps, { x: "threshold", y: "counted", stroke: COLOURS[0] }), Plot.dot(steps, { x: "threshold", y: "counted", r: 2.5, fill: COLOURS[0] }), Plot.dot([step], { x: "threshold", y: "counted", r: 6, stroke: COLOURS[5], strokeWidth: 2 }), Plot.ruleY([0])],
      })));
    };
    $("slider").oninput = draw;
    $("which").onchange = () => draw();
    $("slider").value = d3.leastIndex(data.thresholds[0].steps, (step) => Math.abs(step.threshold - data.thresholds[0].used));
    draw();
  }
})();
