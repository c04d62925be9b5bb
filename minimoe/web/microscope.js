"use strict";
// Draws the page from the data in it. All text enters the page as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 1500; // tokens drawn at a time
const state = { text: 0, layer: 0, choice: "first", expert: null, page: 0, token: null };
const unpacked = []; // the columns of each text that was looked at
const $ = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(1)}%`;

/** An element with attributes and children; a string becomes text. */
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "line", "polyline", "circle", "text", "title"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const fill = (id, ...children) => $(id).replaceChildren(...children);
const inLine = (text) => text.replace(/[\n\t]/g, "").replaceAll(" ", "␣");
const chip = (expert) => make("span", { class: `chip e${expert}` }, String(expert));

/** A column of integers: base64 → inflate → the typed array that it was. */
async function unpack({ type, content }) {
  const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
  const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new { Uint8Array, Uint16Array, Uint32Array }[type](await new Response(inflated).arrayBuffer());
}

async function columns(text) {
  if (!unpacked[text]) {
    const { shown, total, places, experts, weights } = data.tokens[text];
    const parts = await Promise.all([places, experts, weights].map(unpack));
    unpacked[text] = { shown, total, places: parts[0], experts: parts[1], weights: parts[2] };
  }
  return unpacked[text];
}

/** Where the choice of a token lies in a column (L, K, N). */
const at = (column, layer, choice, token) => (layer * data.active_experts + choice) * column.shown + token;

// The text

let column = null;

function drawText() {
  const pages = Math.ceil(column.shown / PAGE);
  const start = state.page * PAGE;
  const stop = Math.min(start + PAGE, column.shown);
  const drawn = document.createDocumentFragment();
  for (let token = start; token < stop; token++) {
    const text = data.vocabulary[column.places[token]];
    const ends = text.endsWith("\n"); // the line ends behind the token, whose number would else slip to the next
    drawn.append(drawToken(token, ends ? text.slice(0, -1) : text), ends ? "\n" : "");
  }
  fill("tokens", drawn);
  $("tokens").classList.toggle("either", state.choice === "either");
  $("page").value = state.page + 1;
  $("page").max = $("pages").textContent = pages;
  $("before").disabled = state.page === 0;
  $("after").disabled = state.page === pages - 1;
  const cut = column.shown < column.total ? `, of which this page holds the first ${column.shown.toLocaleString("en")}` : "";
  const range = `${(start + 1).toLocaleString("en")} to ${stop.toLocaleString("en")}`;
  $("range").textContent = `tokens ${range} of ${column.total.toLocaleString("en")}${cut}`;
  select(Math.min(Math.max(state.token ?? start, start), stop - 1), false);
}

function drawToken(token, text) {
  const first = state.choice === "second" ? 1 : 0;
  const last = state.choice === "either" ? data.active_experts - 1 : first;
  const chosen = [];
  for (let choice = first; choice <= last; choice++) chosen.push(column.experts[at(column, state.layer, choice, token)]);
  const span = make("span", { role: "option", "data-token": token, tabindex: -1, "data-expert": chosen.join("\n") });
  span.className = `e${chosen[0]}` + (chosen.length > 1 ? ` also${chosen[1]}` : "");
  if (state.expert !== null && !chosen.includes(state.expert)) span.className = "away";
  span.textContent = text;
  return span;
}

/** Makes a token the one that Tab reaches and the panel describes. */
function select(token, focus) {
  const here = $("tokens").querySelector("[aria-selected]");
  if (here) {
    here.removeAttribute("aria-selected");
    here.tabIndex = -1;
  }
  state.token = token;
  const span = $("tokens").children[token - state.page * PAGE];
  span.setAttribute("aria-selected", true);
  span.tabIndex = 0;
  if (focus) span.focus();
  describe(token);
}

function describe(token) {
  const rows = Array.from({ length: data.layers }, (_, layer) => {
    const cells = Array.from({ length: data.active_experts }, (_, choice) => {
      const place = at(column, layer, choice, token);
      const [expert, weight] = [column.experts[place], column.weights[place]];
      const bar = make("i", { class: `e${expert}` });
      bar.style.width = `${weight / 25}rem`;
      return make("div", { class: "weight" }, chip(expert), bar, `${weight}%`);
    });
    return make("tr", layer === state.layer ? { class: "now" } : {}, make("th", { scope: "row" }, String(layer)), make("td", {}, ...cells));
  });
  const head = make("tr", {}, make("th", { scope: "col" }, "layer"), make("th", { scope: "col" }, "expert and weight"));
  const count = `Token ${(token + 1).toLocaleString("en")} of ${column.total.toLocaleString("en")}`;
  const where = `${count}, place ${(token % data.context) + 1} of ${data.context} in its window`;
  fill(
    "detail",
    make("strong", {}, inLine(data.vocabulary[column.places[token]])),
    make("p", {}, where),
    make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)),
  );
}

/** The token drawn nearest above or below, as the eye finds it. */
function beside(token, direction) {
  const spans = $("tokens").children;
  const place = (span) => span.getClientRects()[0];
  const from = place(spans[token - state.page * PAGE]);
  let best = null;
  for (let i = token - state.page * PAGE + direction; spans[i]; i += direction) {
    const rect = place(spans[i]);
    const lines = (direction * (rect.top - from.top)) / from.height;
    if (lines < 0.5) continue;
    if (best && Math.abs(rect.top - best.top) > from.height / 2) break;
    const distance = Math.abs(rect.left - from.left);
    if (!best || distance < best.distance) best = { token: i + state.page * PAGE, top: rect.top, distance };
  }
  return best ? best.token : token;
}

function turn(page) {
  const last = Math.ceil(column.shown / PAGE) - 1;
  state.page = Math.min(Math.max(Number.isFinite(page) ? Math.trunc(page) : 0, 0), last);
  state.token = null;
  drawText();
}

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const [start, stop] = [state.page * PAGE, Math.min((state.page + 1) * PAGE, column.shown)];
  const moves = {
    ArrowRight: () => state.token + 1,
    ArrowLeft: () => state.token - 1,
    ArrowDown: () => beside(state.token, 1),
    ArrowUp: () => beside(state.token, -1),
    Home: () => start,
    End: () => stop - 1,
    PageDown: () => start + PAGE,
    PageUp: () => start - PAGE,
  };
  if (!(event.key in moves)) return;
  event.preventDefault();
  const token = Math.min(Math.max(moves[event.key](), 0), column.shown - 1);
  if (token < start || token >= stop) turn(Math.floor(token / PAGE));
  select(token, true);
}

// Tables and figures

/** A table of numbers, each on a ground as strong as its value is large; a scale of 0 to `most`. */
function heat(corner, heads, names, rows, format, most, now = {}) {
  const head = heads.map((name, i) => make("th", { scope: "col", class: now.column === i ? "now" : "" }, name));
  const body = rows.map((row, i) => {
    const cells = row.map((value) => {
      const cell = make("td", {}, value === null ? "–" : format(value));
      cell.style.setProperty("--value", value === null ? 0 : Math.min(value / most, 1) || 0);
      return cell;
    });
    return make("tr", {}, make("th", { scope: "row", class: now.row === i ? "now" : "" }, names[i]), ...cells);
  });
  const corners = make("th", { scope: "col" }, corner);
  const table = make("table", { class: "heat" }, make("thead", {}, make("tr", {}, corners, ...head)), make("tbody", {}, ...body));
  return scrolling(corner, table);
}

/** A frame in which a wide table is moved, by keyboard too. */
const scrolling = (label, table) => make("div", { class: "wide", tabindex: 0, role: "region", "aria-label": label }, table);

function drawLoad(chosen) {
  const loads = data.keys.map((key) => chosen.load[key]);
  const most = Math.max(...loads.flat(), 2 / data.experts);
  const length = (share) => `calc((100% - 3.5rem) * ${share / most})`; // leaves room for the number behind the longest bar
  const rows = Array.from({ length: data.experts }, (_, expert) => {
    const cells = loads.map((load) => {
      const [bar, fair, number] = [make("i", { class: `e${expert}` }), make("u"), make("b", {}, percent(load[expert]))];
      bar.style.width = number.style.left = length(load[expert]);
      fair.style.left = length(1 / data.experts);
      return make("td", {}, make("span", { class: "bar" }, bar, fair, number));
    });
    return make("tr", {}, make("th", { scope: "row" }, chip(expert)), ...cells);
  });
  const heads = ["expert", ...data.names].map((name) => make("th", { scope: "col" }, name));
  const bars = make("table", { class: "bars" }, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows));
  bars.style.minWidth = `${5 + 7 * loads.length}rem`;
  fill("load", scrolling("load by expert and text", bars));

  const key = data.keys[state.text];
  const ratios = data.by_layer.map((layer) => layer.choices[state.choice].load[key].map((share) => share * data.experts));
  const experts = Array.from({ length: data.experts }, (_, expert) => chip(expert));
  fill("load-by-layer", heat("layer", experts, layerNames(), ratios, (x) => x.toFixed(2), 3, { row: state.layer }));

  fill("difference", heat("bits", data.names, data.names, chosen.difference, (x) => x.toFixed(3), Math.max(0.25, ...chosen.difference.flat())));
  const along = [data.by_layer.map((layer) => layer.choices[state.choice].divergence)];
  const all = Math.log2(data.names.length);
  const table = heat("layer", layerNames(), [`all ${data.names.length} texts`], along, (x) => x.toFixed(3), all, { column: state.layer });
  fill("divergence", table);
}

const layerNames = () => Array.from({ length: data.layers }, (_, layer) => String(layer));

function drawFavourites(chosen) {
  const rows = chosen.favourites.map((favourites, expert) => {
    const tokens = favourites.map(({ text, seen, share, lift }) => {
      const name = make("code", {}, inLine(text));
      const title = `seen ${seen.toLocaleString("en")} times, ${percent(share)} of them sent to expert ${expert}`;
      return make("span", { class: "favourite", title }, name, make("small", {}, `×${lift.toFixed(1)}`));
    });
    return make("tr", {}, make("th", { scope: "row" }, chip(expert)), make("td", {}, ...(tokens.length ? tokens : ["none"])));
  });
  fill("favourites", make("table", {}, make("tbody", {}, ...rows)));
}

const RATES = { observed: "", shuffled: "2 3", load: "7 4", uniform: "12 3 2 3" }; // by name, the dashes of its line

function drawRepetition(chosen) {
  const names = ["observed", "uniform", "load", "shuffled"];
  const rows = data.keys.map((key) => names.map((name) => chosen.repetition[key][name]));
  fill("repetition", heat("text", names, data.names, rows, percent, Math.max(...rows.flat()), { row: state.text }));

  const key = data.keys[state.text];
  const lines = Object.keys(RATES).map((name) => data.by_layer.map((layer) => layer.choices[state.choice].repetition[key][name]));
  const [width, height, left, right, bottom] = [520, 260, 44, 84, 40];
  const top = Math.max(0.05, ...lines.flat()) * 1.1;
  const x = (layer) => left + ((width - left - right) * (data.layers === 1 ? 0.5 : layer / (data.layers - 1)));
  const y = (rate) => height - bottom - ((height - bottom - 10) * rate) / top;
  const label = `Share of neighbours in ${data.names[state.text]} that share an expert, by layer`;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const rate of ticks(top)) {
    svg.append(make("line", { class: "axis", x1: left, x2: width - right, y1: y(rate), y2: y(rate) }));
    svg.append(make("text", { x: left - 8, y: y(rate) + 4, "text-anchor": "end" }, `${+(100 * rate).toFixed(1)}%`));
  }
  const every = Math.ceil(data.layers / 16);
  for (let layer = 0; layer < data.layers; layer += every) {
    svg.append(make("text", { x: x(layer), y: height - bottom + 18, "text-anchor": "middle" }, String(layer)));
  }
  svg.append(make("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "layer"));
  const ends = spread(lines.map((line) => y(line[data.layers - 1])), 15);
  Object.keys(RATES).reverse().forEach((name) => {
    const i = Object.keys(RATES).indexOf(name);
    const points = lines[i].map((rate, layer) => `${x(layer)},${y(rate)}`).join(" ");
    const kind = name === "observed" ? "observed" : "null";
    svg.append(make("polyline", { class: kind, points, "stroke-dasharray": RATES[name] }));
    svg.append(make("text", { class: `label-${kind}`, x: width - right + 10, y: ends[i] + 4 }, name));
  });
  lines[0].forEach((rate, layer) => {
    const dot = make("circle", { class: "dot", cx: x(layer), cy: y(rate), r: layer === state.layer ? 6 : 3.5 });
    dot.append(make("title", {}, `layer ${layer}: ${percent(rate)}`));
    svg.append(dot);
  });
  fill("repetition-figure", svg);
}

/** About four round numbers from 0 to `top`. */
function ticks(top) {
  const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.25].find((candidate) => top / candidate <= 5) ?? 0.25;
  return Array.from({ length: Math.floor(top / step + 1e-9) + 1 }, (_, i) => i * step);
}

/** Heights moved apart until any two differ by `gap`, in their order. */
function spread(heights, gap) {
  const order = heights.map((_, i) => i).sort((a, b) => heights[a] - heights[b]);
  const moved = [...heights];
  for (let round = 0; round < 50; round++) {
    for (let i = 1; i < order.length; i++) {
      const short = (gap - (moved[order[i]] - moved[order[i - 1]])) / 2;
      if (short > 0) {
        moved[order[i]] += short;
        moved[order[i - 1]] -= short;
      }
    }
  }
  return moved;
}

function drawSureness() {
  const by = (name) => data.keys.map((key) => data.by_layer.map((layer) => layer[name][key]));
  const number = (x) => x.toFixed(2);
  const most = Math.log(data.experts);
  $("most-entropy").textContent = `ln ${data.experts} = ${number(most)}`;
  const now = { column: state.layer, row: state.text };
  fill("entropy", heat("layer", layerNames(), data.names, by("entropy"), number, most, now));
  fill("margin", heat("layer", layerNames(), data.names, by("margin"), number, Math.max(...by("margin").flat(), 1e-9), now));
}

function drawTogether() {
  const rows = data.by_layer[state.layer].co_activation.map((row, i) => row.map((share, j) => (i === j || !row[i] ? null : share / row[i])));
  const experts = () => Array.from({ length: data.experts }, (_, expert) => chip(expert));
  fill("co-activation", heat("sent to", experts(), experts(), rows, percent, Math.max(...rows.flat(), 1e-9)));
}

// What to look at

function radios(id, labels, chosen, choose) {
  labels.forEach((label, i) => {
    const input = make("input", { type: "radio", name: id, value: i });
    input.checked = i === chosen;
    input.addEventListener("change", () => choose(i));
    $(id).append(make("label", { title: label }, input, make("span", {}, label)));
  });
}

function drawKey() {
  $("key").classList.toggle("chosen", state.expert !== null);
  $("key").querySelectorAll("button").forEach((button, expert) => button.setAttribute("aria-pressed", state.expert === expert));
}

function drawStatistics() {
  const chosen = data.by_layer[state.layer].choices[state.choice];
  drawLoad(chosen);
  drawFavourites(chosen);
  drawRepetition(chosen);
  drawSureness();
  drawTogether();
}

async function show(changes) {
  Object.assign(state, changes);
  const loaded = await columns(state.text);
  if (loaded !== unpacked[state.text]) return; // another text was asked for meanwhile
  column = loaded;
  drawKey();
  drawText();
  drawStatistics();
  document.body.dataset.ready = `${state.text} ${state.layer} ${state.choice}`;
}

function begin() {
  const choices = Object.keys(data.by_layer[0].choices);
  radios("texts", data.names, 0, (text) => show({ text, page: 0, token: null }));
  radios("layers", layerNames(), 0, (layer) => show({ layer }));
  radios("choices", choices, 0, (i) => show({ choice: choices[i] }));
  for (let expert = 0; expert < data.experts; expert++) {
    const button = make("button", { type: "button", class: `chip e${expert}`, title: `show only expert ${expert}` }, String(expert));
    button.addEventListener("click", () => show({ expert: state.expert === expert ? null : expert }));
    $("key").append(button);
  }
  $("choices").hidden = choices.length < 2;
  $("together").hidden = choices.length < 2;
  $("differences").hidden = data.names.length < 2;
  const total = data.tokens.reduce((sum, text) => sum + text.total, 0).toLocaleString("en");
  $("facts").textContent =
    `${data.layers} layers, ${data.active_experts} of ${data.experts} experts for each token; ` +
    `${total} tokens in ${data.names.length} ${data.names.length > 1 ? "texts" : "text"}, read in windows of ${data.context}.`;

  const tokens = $("tokens");
  tokens.classList.add("numbered");
  $("numbers").addEventListener("change", (event) => tokens.classList.toggle("numbered", event.target.checked));
  tokens.addEventListener("keydown", onKey);
  tokens.addEventListener("focusin", (event) => event.target.dataset.token && select(Number(event.target.dataset.token), false));
  tokens.addEventListener("pointerover", (event) => event.target.dataset.token && describe(Number(event.target.dataset.token)));
  tokens.addEventListener("pointerleave", () => describe(state.token));
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("before").addEventListener("click", () => turn(state.page - 1));
  $("after").addEventListener("click", () => turn(state.page + 1));
  $("page").addEventListener("change", (event) => turn(Number(event.target.value) - 1));
  show({});
}

begin();
