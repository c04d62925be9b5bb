"use strict";
// Draws the page from the data that it contains. All text is inserted as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 1500; // tokens drawn at a time
const state = { text: 0, layer: 0, choice: "first", expert: null, page: 0, token: null };
const unpacked = []; // the columns of each text that was shown so far
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

/** The index of a token's choice in a column (L, K, N). */
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
    const ends = text.endsWith("\n"); // drawn after the token, or its number would slip to the next line
    drawn.append(drawToken(token, ends ? text.slice(0, -1) : text), ends ? "\n" : "");
  }
  fill("tokens", drawn);
  $("tokens").classList.toggle("either", state.choice === "either");
  $("tokens").classList.toggle("two-digits", data.experts > 10 && data.experts <= 100);
  $("tokens").classList.toggle("three-digits", data.experts > 100);
  $("page").value = state.page + 1;
  $("page").max = $("pages").textContent = pages;
  $("before").disabled = state.page === 0;
  $("after").disabled = state.page === pages - 1;
  const cut =
    column.shown < column.total ? `, of which this page has the first ${column.shown.toLocaleString("en")}` : "";
  const range = `${(start + 1).toLocaleString("en")} to ${stop.toLocaleString("en")}`;
  $("range").textContent = `tokens ${range} of ${column.total.toLocaleString("en")}${cut}`;
  select(Math.min(Math.max(state.token ?? start, start), stop - 1), false);
}

function drawToken(token, text) {
  const first = state.choice === "second" ? 1 : 0;
  const last = state.choice === "either" ? data.active_experts - 1 : first;
  const chosen = [];
  for (let choice = first; choice <= last; choice++)
    chosen.push(column.experts[at(column, state.layer, choice, token)]);
  while (chosen.at(-1) === data.experts) chosen.pop(); // the number of no expert
  const span = make("span", { role: "option", "data-token": token, tabindex: -1, "data-expert": chosen.join("\n") });
  span.className = (chosen.length ? `e${chosen[0]}` : "") + (chosen.length > 1 ? ` also${chosen[1]}` : "");
  if (state.expert !== null && !chosen.includes(state.expert)) span.className = "away";
  span.textContent = text;
  return span;
}

/** Selects a token: Tab reaches it, and the panel describes it. */
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
  $("detail").hidden = false;
  const rows = Array.from({ length: data.layers }, (_, layer) => {
    const cells = Array.from({ length: data.active_experts }, (_, choice) => {
      const place = at(column, layer, choice, token);
      const [expert, weight] = [column.experts[place], column.weights[place]];
      const bar = make("i", { class: `e${expert}` });
      bar.style.width = `${weight / 25}rem`;
      return expert === data.experts ? null : make("div", { class: "weight" }, chip(expert), bar, `${weight}%`);
    }).filter((cell) => cell !== null);
    return make(
      "tr",
      layer === state.layer ? { class: "now" } : {},
      make("th", { scope: "row" }, layerName(layer)),
      make("td", {}, ...(cells.length ? cells : ["none"])),
    );
  });
  const head = make("tr", {}, make("th", { scope: "col" }, "layer"), make("th", { scope: "col" }, "expert and weight"));
  const count = `Token ${(token + 1).toLocaleString("en")} of ${column.total.toLocaleString("en")}`;
  const where = `${count}, position ${(token % data.context) + 1} of ${data.context} in its window`;
  fill(
    "detail",
    closer(),
    make("strong", {}, inLine(data.vocabulary[column.places[token]])),
    make("p", {}, where),
    make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)),
  );
}

/** Marks the token under the pointer, and describes it; without one, the selected token is described again. */
function point(span) {
  $("tokens").querySelector(".pointed")?.classList.remove("pointed");
  span?.classList.add("pointed");
  describe(span ? Number(span.dataset.token) : state.token);
}

/** On a narrow screen the panel lies over the text, so it can be closed; the next token that is pointed at opens it. */
function closer() {
  const button = make("button", { type: "button", class: "close", "aria-label": "Close this panel" }, "×");
  button.addEventListener("click", () => ($("detail").hidden = true));
  return button;
}

/** The nearest token on the line above or below, by its position on the screen. */
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
  $("key")
    .querySelectorAll("button")
    .forEach((button, expert) => button.setAttribute("aria-pressed", state.expert === expert));
}

function drawStatistics() {
  const choices = data.by_layer[state.layer].choices;
  const chosen = choices[state.choice];
  drawLoad(Object.values(choices).at(-1)); // all choices: an expert that is seldom first may still do much work
  drawFavourites(chosen);
  drawRepetition(chosen);
  drawSureness();
  drawTogether();
}

async function show(changes) {
  Object.assign(state, changes);
  const loaded = await columns(state.text);
  if (loaded !== unpacked[state.text]) return; // another text was chosen in the meantime
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
    const button = make(
      "button",
      { type: "button", class: `chip e${expert}`, title: `show only expert ${expert}` },
      String(expert),
    );
    button.addEventListener("click", () => show({ expert: state.expert === expert ? null : expert }));
    $("key").append(button);
  }
  $("choices").hidden = choices.length < 2;
  $("together").hidden = choices.length < 2;
  $("differences").hidden = data.names.length < 2;
  const total = data.tokens.reduce((sum, text) => sum + text.total, 0).toLocaleString("en");
  $("facts").textContent =
    `${data.layers} layers, ${Number(data.mean_active_experts.toFixed(2))} of ${data.experts} experts per token; ` +
    `${total} tokens in ${data.names.length} ${data.names.length > 1 ? "texts" : "text"}, read in windows of ${data.context} tokens.`;

  const bar = () => document.documentElement.style.setProperty("--bar", `${$("controls").offsetHeight}px`);
  new ResizeObserver(bar).observe($("controls")); // whatever sticks or scrolls below the bar needs its height

  const tokens = $("tokens");
  tokens.classList.add("numbered");
  $("numbers").addEventListener("change", (event) => tokens.classList.toggle("numbered", event.target.checked));
  tokens.addEventListener("keydown", onKey);
  tokens.addEventListener(
    "focusin",
    (event) => event.target.dataset.token && select(Number(event.target.dataset.token), false),
  );
  tokens.addEventListener(
    "pointerover",
    (event) => event.target.dataset.token && point(event.target),
  );
  tokens.addEventListener("pointerleave", () => point(null));
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("before").addEventListener("click", () => turn(state.page - 1));
  $("after").addEventListener("click", () => turn(state.page + 1));
  $("page").addEventListener("change", (event) => turn(Number(event.target.value) - 1));
  show({});
}

begin();
