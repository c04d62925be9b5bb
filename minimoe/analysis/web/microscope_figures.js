"use strict";
// The tables and figures below the text. microscope.js defines the helpers that they use, and draws them.

/** The largest number in rows, but at least `least`. Math.max(...) fails if there are too many numbers. */
const largest = (rows, least = 1e-9) => rows.flat().reduce((a, b) => Math.max(a, b), least);

/** A table of numbers. The larger a number, the stronger its background, on a scale from 0 to `most`. */
function heat(corner, heads, names, rows, format, most, now = {}) {
  const whole = (name) => (typeof name === "string" ? { title: name } : {}); // if the cell has no room for the whole name
  const head = heads.map((name, i) =>
    make("th", { scope: "col", class: now.column === i ? "now" : "", ...whole(name) }, name),
  );
  const body = rows.map((row, i) => {
    const cells = row.map((value) => {
      const cell = make("td", {}, value === null ? "–" : format(value));
      cell.style.setProperty("--value", value === null ? 0 : Math.min(value / most, 1) || 0);
      return cell;
    });
    return make("tr", {}, make("th", { scope: "row", class: now.row === i ? "now" : "", ...whole(names[i]) }, names[i]), ...cells);
  });
  const corners = make("th", { scope: "col" }, corner);
  const table = make(
    "table",
    { class: "heat" },
    make("thead", {}, make("tr", {}, corners, ...head)),
    make("tbody", {}, ...body),
  );
  return scrolling(corner, table);
}

/** A frame in which a wide table can be scrolled, also with the keyboard. */
const scrolling = (label, table) =>
  make("div", { class: "wide", tabindex: 0, role: "region", "aria-label": label }, table);

function drawLoad(chosen) {
  const loads = data.keys.map((key) => chosen.load[key]);
  const most = largest(loads, 2 / data.experts);
  const length = (share) => `calc((100% - 3.5rem) * ${share / most})`; // leaves room for the number after the longest bar
  const rows = Array.from({ length: data.experts }, (_, expert) => {
    const cells = loads.map((load) => {
      const [bar, fair, number] = [make("i", { class: `e${expert}` }), make("u"), make("b", {}, percent(load[expert]))];
      bar.style.width = number.style.left = length(load[expert]);
      fair.style.left = length(1 / data.experts);
      return make("td", {}, make("span", { class: "bar" }, bar, fair, number));
    });
    return make("tr", {}, make("th", { scope: "row" }, chip(expert)), ...cells);
  });
  const heads = ["expert", ...data.names].map((name) => make("th", { scope: "col", title: name }, name));
  const bars = make(
    "table",
    { class: "bars" },
    make("thead", {}, make("tr", {}, ...heads)),
    make("tbody", {}, ...rows),
  );
  bars.style.minWidth = `${5 + 7 * loads.length}rem`;
  fill("load", scrolling("load by expert and text", bars));

  const key = data.keys[state.text];
  const ratios = data.by_layer.map((layer) =>
    layer.choices[state.choice].load[key].map((share) => share * data.experts),
  );
  const experts = Array.from({ length: data.experts }, (_, expert) => chip(expert));
  fill(
    "load-by-layer",
    heat("layer", experts, layerNames(), ratios, (x) => x.toFixed(2), 3, { row: state.layer }),
  );

  fill(
    "difference",
    heat(
      "bits",
      data.names,
      data.names,
      chosen.difference,
      (x) => x.toFixed(3),
      Math.max(0.25, ...chosen.difference.flat()),
    ),
  );
  const along = [data.by_layer.map((layer) => layer.choices[state.choice].divergence)];
  const all = Math.log2(data.names.length);
  const table = heat("layer", layerNames(), [`all ${data.names.length} texts`], along, (x) => x.toFixed(3), all, {
    column: state.layer,
  });
  fill("divergence", table);
}

const layerName = (layer) => String(layer + data.first_layer); // the layers before the first with a router are dense
const layerNames = () => Array.from({ length: data.layers }, (_, layer) => layerName(layer));

function drawFavourites(chosen) {
  const rows = chosen.favourites.map((favourites, expert) => {
    const tokens = favourites.map(({ text, seen, share, lift }) => {
      const name = make("code", {}, inLine(text));
      const title = `seen ${seen.toLocaleString("en")} times, ${percent(share)} of them sent to expert ${expert}`;
      return make("span", { class: "favourite", title }, name, make("small", {}, `×${lift.toFixed(1)}`));
    });
    return make(
      "tr",
      {},
      make("th", { scope: "row" }, chip(expert)),
      make("td", {}, ...(tokens.length ? tokens : ["none"])),
    );
  });
  fill("favourites", make("table", {}, make("tbody", {}, ...rows)));
}

const RATES = { observed: "", shuffled: "2 3", load: "7 4", uniform: "12 3 2 3" }; // the dashes of each line, by its name

function drawRepetition(chosen) {
  const names = ["observed", "uniform", "load", "shuffled"];
  const rows = data.keys.map((key) => names.map((name) => chosen.repetition[key][name]));
  fill("repetition", heat("text", names, data.names, rows, percent, largest(rows), { row: state.text }));

  const key = data.keys[state.text];
  const lines = Object.keys(RATES).map((name) =>
    data.by_layer.map((layer) => layer.choices[state.choice].repetition[key][name]),
  );
  const [width, height, left, right, bottom] = [520, 260, 44, 84, 40];
  const top = Math.max(0.05, ...lines.flat()) * 1.1;
  const x = (layer) => left + (width - left - right) * (data.layers === 1 ? 0.5 : layer / (data.layers - 1));
  const y = (rate) => height - bottom - ((height - bottom - 10) * rate) / top;
  const label = `How often neighbours in ${data.names[state.text]} share an expert, by layer`;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const rate of ticks(top)) {
    svg.append(make("line", { class: "axis", x1: left, x2: width - right, y1: y(rate), y2: y(rate) }));
    svg.append(make("text", { x: left - 8, y: y(rate) + 4, "text-anchor": "end" }, `${+(100 * rate).toFixed(1)}%`));
  }
  const every = Math.ceil(data.layers / 16);
  for (let layer = 0; layer < data.layers; layer += every) {
    svg.append(make("text", { x: x(layer), y: height - bottom + 18, "text-anchor": "middle" }, layerName(layer)));
  }
  svg.append(make("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "layer"));
  const ends = spread(
    lines.map((line) => y(line[data.layers - 1])),
    15,
  );
  Object.keys(RATES)
    .reverse()
    .forEach((name) => {
      const i = Object.keys(RATES).indexOf(name);
      const points = lines[i].map((rate, layer) => `${x(layer)},${y(rate)}`).join(" ");
      const kind = name === "observed" ? "observed" : "null";
      svg.append(make("polyline", { class: kind, points, "stroke-dasharray": RATES[name] }));
      svg.append(make("text", { class: `label-${kind}`, x: width - right + 10, y: ends[i] + 4 }, name));
    });
  lines[0].forEach((rate, layer) => {
    const dot = make("circle", { class: "dot", cx: x(layer), cy: y(rate), r: layer === state.layer ? 6 : 3.5 });
    dot.append(make("title", {}, `layer ${layerName(layer)}: ${percent(rate)}`));
    svg.append(dot);
  });
  fill("repetition-figure", svg);
}

/** About four round numbers from 0 to `top`. */
function ticks(top) {
  const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.25].find((candidate) => top / candidate <= 5) ?? 0.25;
  return Array.from({ length: Math.floor(top / step + 1e-9) + 1 }, (_, i) => i * step);
}

/** The heights in the same order, moved apart until any two differ by at least `gap`. */
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
  fill(
    "margin",
    heat("layer", layerNames(), data.names, by("margin"), number, largest(by("margin")), now),
  );
}

function drawTogether() {
  const rows = data.by_layer[state.layer].co_activation.map((row, i) =>
    row.map((share, j) => (i === j || !row[i] ? null : share / row[i])),
  );
  const experts = () => Array.from({ length: data.experts }, (_, expert) => chip(expert));
  fill("co-activation", heat("sent to", experts(), experts(), rows, percent, largest(rows)));
}
