// What the page does when it is clicked: themes, sorted tables, samples of a cell, saved figures.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// Themes: the system's, until the reader chooses.
const root = document.documentElement;
const themeButton = document.getElementById("theme");
const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemIsDark.matches);
const labelTheme = () => { themeButton.textContent = isDark() ? "Light" : "Dark"; };
themeButton.hidden = false;
themeButton.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  labelTheme();
});
systemIsDark.addEventListener("change", labelTheme);
labelTheme();

// Tables: by the keys of the cells, as numbers if all are; rows without a figure come last.
function sortRows(rows, key, descending) {
  const known = rows.filter((row) => key(row) !== "");
  const numbers = known.every((row) => !Number.isNaN(Number(key(row))));
  known.sort((a, b) => (numbers ? key(a) - key(b) : key(a).localeCompare(key(b))));
  if (descending) known.reverse();
  return [...known, ...rows.filter((row) => key(row) === "")];
}

for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const descending = head.getAttribute("aria-sort") === "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const body = table.tBodies[0];
    body.append(...sortRows([...body.rows], (row) => row.cells[column].dataset.key, descending));
  }));
}

// Heatmaps: one stop for the Tab key each, arrow keys within.
const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

// A button over each cell, of the numbers that the page has of it.
function layCells(map) {
  const { task, checkpoint } = map.dataset;
  const grid = data.grids[task];
  const [left, top, width, height] = map.dataset.frame.split(" ").map(Number);
  for (const [column, row, correct, samples, cut] of JSON.parse(map.dataset.cells)) {
    let label = `${data.names[checkpoint]}, ${grid.lengths[column]} tokens, depth ${grid.depths[row]} %: `
      + `${correct} of ${samples} right`;
    if (cut !== undefined) label += `, of prompts cut to ${cut} tokens`;
    const make = (tag, attributes) => {
      const made = document.createElementNS(map.namespaceURI, tag);
      for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
      return made;
    };
    const cell = make("g", {
      class: "cell", role: "button", tabindex: "-1", "aria-label": label, "data-column": column,
      "data-row": row, "data-key": `${grid.columns[column]}/${grid.rows[row]}`,
    });
    const title = make("title", {});
    title.textContent = label;
    const place = { x: left + column * width, y: top + row * height, width, height };
    cell.append(title, make("rect", place));
    map.append(cell);
  }
}

function prepare(map) {
  if (map.firstElementChild) return;
  layCells(map);
  const cells = [...map.querySelectorAll(".cell")];
  cells[0].setAttribute("tabindex", "0");
  const place = (cell) => [Number(cell.dataset.column), Number(cell.dataset.row)];
  // The nearest cell in that direction: grids may have gaps.
  const neighbour = (cell, [dx, dy]) => {
    const [x, y] = place(cell);
    const distance = (other) => {
      const [column, row] = place(other);
      const along = (column - x) * dx + (row - y) * dy;
      const aside = Math.abs((column - x) * dy) + Math.abs((row - y) * dx);
      return along > 0 ? along + 1000 * aside : Infinity;
    };
    const next = cells.reduce((best, other) => (distance(other) < distance(best) ? other : best));
    return distance(next) < Infinity ? next : undefined;
  };
  map.addEventListener("keydown", (event) => {
    const cell = event.target.closest(".cell");
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      showSamples(cell);
    } else if (event.key in steps) {
      event.preventDefault();
      const next = neighbour(cell, steps[event.key]);
      if (!next) return;
      cell.setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      next.focus();
    }
  });
  map.addEventListener("click", (event) => {
    const cell = event.target.closest(".cell");
    if (cell) showSamples(cell);
  });
}

// Heatmaps that are folded away are prepared when they are opened.
for (const map of document.querySelectorAll("g.cells")) {
  const folded = map.closest("details");
  if (folded) folded.addEventListener("toggle", () => prepare(map));
  else prepare(map);
}

function showSamples(cell) {
  const { task, checkpoint } = cell.parentElement.dataset;
  const chosen = Number(checkpoint);
  const found = data.samples[task][cell.dataset.key] || [];
  const samples = found.filter((sample) => sample.answers.some((answer) => answer.checkpoint === chosen));
  document.getElementById("samples-title").textContent = cell.getAttribute("aria-label");
  const body = document.getElementById("samples-body");
  body.replaceChildren();
  if (!samples.length) {
    body.append(element("p", "There are no logged samples of this cell: lm_eval --log_samples writes them."));
  }
  const right = (sample) => sample.answers.find((answer) => answer.checkpoint === chosen).right;
  samples.sort((a, b) => right(a) - right(b) || a.sample - b.sample);  // failures first
  for (const sample of samples) body.append(describe(sample, chosen));
  document.getElementById("samples").showModal();
}

function describe(sample, chosen) {
  const article = element("article");
  const list = element("dl");
  const add = (name, content, className) => {
    const description = element("dd", undefined, className);
    description.append(content);
    const term = element("dt", name);
    list.append(term, description);
    return term;
  };
  add("Sample", `${sample.sample}, a prompt of ${sample.tokens.toLocaleString("en")} tokens`);
  add("Needle", excerpt(sample));
  add("Asked", sample.question);
  add("Expected", sample.expected);
  const answers = [...sample.answers].sort((a, b) => (b.checkpoint === chosen) - (a.checkpoint === chosen));
  for (const answer of answers) {
    const term = add(data.names[answer.checkpoint], answer.generated, answer.right ? "right" : "wrong");
    if (answer.checkpoint === chosen) term.className = "chosen";
  }
  article.append(list);
  return article;
}

function excerpt(sample) {
  const begin = sample.excerpt.indexOf(sample.needle);
  const parts = document.createDocumentFragment();
  if (begin < 0) {
    parts.append(sample.needle);
    return parts;
  }
  const before = sample.excerpt.slice(0, begin);
  const after = sample.excerpt.slice(begin + sample.needle.length);
  parts.append(before && `… ${before}`, element("mark", sample.needle), after && `${after} …`);
  return parts;
}

// Figures are saved as on paper: black on white, without what is there for clicks.
const PNG_SCALE = 300 / 72;  // dots per point

function standalone(figure) {
  const svg = figure.querySelector("svg").cloneNode(true);
  for (const cells of svg.querySelectorAll("g.cells")) cells.remove();
  const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  svg.setAttribute("width", `${width}pt`);
  svg.setAttribute("height", `${height}pt`);
  const ground = document.createElementNS(svg.namespaceURI, "rect");
  for (const [name, value] of Object.entries({ width, height, fill: "#ffffff" })) {
    ground.setAttribute(name, value);
  }
  svg.prepend(ground);
  let text = new XMLSerializer().serializeToString(svg);
  for (const [name, value] of Object.entries(data.colors)) text = text.replaceAll(`var(${name})`, value);
  return { text, width, height };
}

function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

for (const button of document.querySelectorAll("[data-save]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const figure = button.closest("figure");
    const { text, width, height } = standalone(figure);
    const blob = new Blob([text], { type: "image/svg+xml" });
    if (button.dataset.save === "svg") {
      download(blob, `${figure.dataset.name}.svg`);
      return;
    }
    const image = new Image();
    image.src = URL.createObjectURL(blob);
    await image.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [width * PNG_SCALE, height * PNG_SCALE].map(Math.round);
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((png) => download(png, `${figure.dataset.name}.png`));
    URL.revokeObjectURL(image.src);
  });
}
