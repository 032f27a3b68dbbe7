"use strict";
// The page is views of window.PAGE, which the report wrote from records. Nothing here computes a statistic but means
// over the tasks that the reader chose, and their intervals over seeds.
const PAGE = window.PAGE;
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999"];
// Student's t, 97.5 %, by degrees of freedom.
const T = [NaN, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131, 2.12, 2.11, 2.101, 2.093];
const byId = (id) => document.getElementById(id);
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
function half(values) {
  if (values.length < 2) return null;
  const centre = mean(values);
  const variance = values.reduce((sum, v) => sum + (v - centre) ** 2, 0) / (values.length - 1);
  return (T[values.length - 1] ?? 1.96) * Math.sqrt(variance / values.length);
}
const points = (value) => (value === null || Number.isNaN(value) ? "n/a" : (100 * value).toFixed(1));
const withHalf = (value, width) => (value === null ? "n/a" : width === null ? points(value) : `${points(value)} ± ${points(width)}`);
const count = (value) => (value === null ? "n/a" : Math.round(value).toLocaleString("en"));

// ---------------------------------------------------------------- the leaderboard

function suite() { return PAGE.suites[Number(byId("suite").value)]; }

/** Rows that pass the filters, each with the mean over the chosen tasks, seed by seed. */
function shownRows() {
  const chosen = [...byId("tasks").querySelectorAll("input:checked")].map((box) => box.value);
  const preset = byId("preset").value;
  const size = byId("size").value === "" ? Infinity : Number(byId("size").value);
  const name = byId("name").value.trim().toLowerCase();
  return suite().rows
    .filter((row) => (preset === "any" || row.baseline || row.preset === preset) && (row.parameters ?? 0) <= size)
    .filter((row) => row.label.toLowerCase().includes(name))
    .map((row) => {
      const lists = chosen.map((task) => row.scores[task] ?? []);
      const seeds = Math.max(0, ...lists.map((list) => list.length));
      const means = [];
      for (let seed = 0; seed < seeds; seed += 1) {
        const values = lists.map((list) => list[seed] ?? null);
        // A mean over fewer tasks would not compare: an undefined score leaves the seed's mean undefined.
        if (values.every((value) => value !== null)) means.push(mean(values));
      }
      return { ...row, chosen, mean: means.length ? mean(means) : null, half: half(means) };
    });
}

function drawBoard() {
  const rows = shownRows();
  const tasks = rows.length ? rows[0].chosen : [];
  const columns = [
    { title: "method", key: "label", words: true },
    { title: "mean", key: "mean", show: (row) => recordButton(withHalf(row.mean, row.half), row.cells) },
    { title: "parameters", key: "parameters", show: (row) => count(row.parameters) },
    { title: "step / bare forward", key: "step", show: (row) => (row.step === null ? "n/a" : row.step.toFixed(2)) },
    { title: "one more task", key: "added", show: (row) => count(row.added) },
    { title: "merges", key: "merges", words: true },
    { title: "rate", key: "rate", show: (row) => row.rate.toPrecision(2) },
    { title: "seeds", key: "seeds", value: (row) => row.seeds.length, show: (row) => String(row.seeds.length) },
    ...tasks.map((task) => ({ title: task, value: (row) => taskMean(row, task), show: (row) => points(taskMean(row, task)) })),
    { title: "status", key: "status", words: true, value: (row) => row.status.join(", "), show: (row) => row.status.join(", ") },
  ];
  sortable("board", columns, rows, { column: 1, descending: true });
  byId("count").textContent = `${rows.length} of ${suite().rows.length} methods are shown, mean over ${tasks.length} of ${suite().tasks.length} tasks.`;
  drawCosts(rows);
  writeCsv(columns, rows);
}

function taskMean(row, task) {
  const known = (row.scores[task] ?? []).filter((value) => value !== null);
  return known.length ? mean(known) : null;
}

const drawn = new Map(); // table -> its DataTable and the order that the reader chose

/** Fill a table and let the reader sort it. The order chosen before outlives a change of the filters. */
function sortable(id, columns, rows, first) {
  const before = drawn.get(id);
  if (before) before.made.destroy(); // puts another element in the table's place
  const table = byId(id);
  const order = before?.order ?? first;
  const valueOf = (column, row) => (column.value ? column.value(row) : row[column.key]);
  const cell = (column, row, index) => {
    const value = valueOf(column, row);
    const shown = column.show ? column.show(row) : String(value ?? "n/a");
    // What is not known sorts below every number.
    const attributes = { "data-order": column.words ? String(value) : String(value ?? -1e300) };
    return element(index === 0 ? "th" : "td", index === 0 ? { scope: "row", ...attributes } : attributes, shown);
  };
  table.replaceChildren(
    element("thead", {}, element("tr", {}, ...columns.map((column) => element("th", { scope: "col" }, column.title)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...columns.map((column, index) => cell(column, row, index))))),
  );
  const types = columns.map((column, index) => ({
    select: index, type: column.words ? "string" : "html", ...(index === order.column ? { sort: order.descending ? "desc" : "asc" } : {}),
  }));
  const made = new simpleDatatables.DataTable(table, { paging: false, searchable: false, fixedColumns: false, columns: types, labels: { noRows: "No method passes the filters", info: "" } });
  const entry = { made, order };
  made.on("datatable.sort", (column, direction) => { entry.order = { column, descending: direction === "desc" }; });
  drawn.set(id, entry);
}

function writeCsv(columns, rows) {
  const text = (column, row) => {
    const value = column.value ? column.value(row) : row[column.key];
    return `"${String(value ?? "").replaceAll('"', '""')}"`;
  };
  const lines = [columns.map((column) => `"${column.title}"`), ...rows.map((row) => columns.map((column) => text(column, row)))];
  byId("csv").href = `data:text/csv;charset=utf-8,${encodeURIComponent(lines.map((line) => line.join(",")).join("\r\n"))}`;
}

// ---------------------------------------------------------------- records

function recordButton(text, cells) {
  return element("button", { type: "button", "data-cells": cells.join(" ") }, text);
}

// One listener for all tables: sorting makes their cells anew.
document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-cells]");
  if (button) showRecords(button.dataset.cells.split(" "));
});

function showRecords(cells) {
  const known = cells.map((cell) => [cell, PAGE.records[cell]]).filter(([, record]) => record);
  byId("record-title").textContent = known.map(([, record]) => `${record.method}, seed ${record.seed}`).join("; ");
  const facts = [];
  for (const [cell, record] of known) {
    const path = `${record.folder}/records/${record.method.replaceAll(/[^A-Za-z0-9._-]/g, "_")}-s${record.seed}-${cell}.json`;
    const lines = { Record: path, Command: record.command, Machine: record.machine, Code: record.commit ?? "unknown", Begun: record.started, Packages: record.packages };
    for (const [term, value] of Object.entries(lines)) facts.push(element("dt", {}, term), element("dd", {}, element("code", {}, value)));
  }
  byId("record-facts").replaceChildren(...facts);
  byId("record").showModal();
}

function drawRecords() {
  const rows = Object.entries(PAGE.records).map(([cell, record]) => ({ cell, ...record }));
  sortable("table-records", [
    { title: "method", key: "method", words: true }, { title: "seed", key: "seed" }, { title: "status", key: "status", words: true },
    { title: "folder", key: "folder", words: true }, { title: "machine", key: "machine", words: true },
    { title: "record", key: "cell", words: true, show: (row) => recordButton(row.cell, [row.cell]) },
  ], rows, { column: 0, descending: false });
}

// ---------------------------------------------------------------- questions

const verdictOf = (pair) => (pair.decided ? `decided, p ${pair.p < 0.001 ? "< 0.001" : pair.p.toFixed(3)}` : pair.seeds > 1 ? `undecided, p ${pair.p.toFixed(3)}` : "undecided: one seed");

/** The difference of two methods in every suite that has both. */
function answerPair() {
  const [first, second] = [byId("first").value, byId("second").value];
  if (first === second) { byId("answer-pair").textContent = "They are the same method."; return; }
  const found = PAGE.suites.flatMap((one) => one.pairs
    .filter((pair) => [pair.first, pair.second].includes(first) && [pair.first, pair.second].includes(second))
    .map((pair) => { const value = (pair.first === first ? 1 : -1) * pair.difference; return `${one.name}: ${value >= 0 ? "+" : ""}${value.toFixed(1)} ± ${pair.half.toFixed(1)} points (${verdictOf(pair)})`; }));
  byId("answer-pair").textContent = found.length ? `${found.join("; ")}.` : "No suite has runs of both with a seed in common.";
}

/** Answers that are read from the rows of the chosen suite. */
function answerQuestions() {
  const rows = suite().rows.filter((row) => !row.baseline);
  const list = (known, show) => (known.length ? `${known.map((row) => `${row.label} ${show(row)}`).join(", ")}.` : "Not measured in this suite.");
  byId("answer-conflict").textContent = PAGE.conflict;
  byId("answer-added").textContent = `Trained numbers: ${list(rows.filter((row) => row.added !== null), (row) => count(row.added))}`;
  const timed = rows.filter((row) => row.step !== null).sort((a, b) => a.step - b.step);
  byId("answer-speed").replaceChildren(`A training step in forwards of the bare model: ${list(timed, (row) => row.step.toFixed(1))} `, element("a", { href: "#speed" }, "Speed"));
  const merges = (word) => rows.filter((row) => row.merges === word).map((row) => row.label).join(", ") || "none";
  byId("answer-merge").textContent = `One update for all tasks: ${merges("yes")}. One per task: ${merges("per task")}. Not at all: ${merges("no")}.`;
  const best = rows.filter((row) => row.status.includes("ok"))[0];
  byId("answer-record").replaceChildren(...(best ? [recordButton(`the records of ${best.label}`, best.cells)] : ["a mean of the leaderboard"]));
}

function startQuestions() {
  const names = [...new Set(PAGE.suites.flatMap((one) => one.rows.filter((row) => !row.baseline).map((row) => row.label)))];
  for (const [id, wanted] of [["first", "ept"], ["second", "moelora"]]) {
    byId(id).replaceChildren(...names.map((name) => element("option", { value: name }, name)));
    byId(id).value = names.includes(wanted) ? wanted : names[id === "first" ? 0 : Math.min(1, names.length - 1)] ?? "";
    byId(id).addEventListener("change", answerPair);
  }
  answerPair();
}

// ---------------------------------------------------------------- charts

// The library overwrites a chart's label with the description of what is drawn.
const LABELS = new Map([...document.querySelectorAll(".chart")].map((chart) => [chart.id, chart.getAttribute("aria-label")]));

function embed(id, spec) {
  const ink = dark.matches ? "#e8e8e8" : "#1c1c1c";
  const grid = dark.matches ? "#3a3f48" : "#e3e3e3";
  const config = {
    background: "transparent", font: "system-ui, sans-serif", view: { stroke: "transparent" }, range: { category: COLOURS },
    axis: { labelColor: ink, titleColor: ink, gridColor: grid, domainColor: ink, tickColor: ink, labelFontSize: 12, titleFontSize: 12 },
    legend: { labelColor: ink, titleColor: ink, labelFontSize: 12 }, title: { color: ink }, header: { labelColor: ink, titleColor: ink }, text: { fill: ink },
  };
  return vegaEmbed(byId(id), { $schema: "https://vega.github.io/schema/vega-lite/v6.json", description: LABELS.get(id), width: "container", height: 280, autosize: { type: "fit", contains: "padding" }, ...spec, config }, { actions: false, renderer: "svg" });
}

function costPoints(rows, axis) {
  const known = rows.filter((row) => row.mean !== null && row[axis] !== null && row[axis] > 0)
    .map((row) => ({ method: row.label, cost: row[axis], score: 100 * row.mean, low: 100 * (row.mean - (row.half ?? 0)), high: 100 * (row.mean + (row.half ?? 0)) }));
  spreadLabels(known, axis === "parameters" ? Math.log : (cost) => cost);
  const front = known.filter((one) => !known.some((other) => other !== one && other.cost <= one.cost && other.score >= one.score && (other.cost < one.cost || other.score > one.score)));
  return { known, front };
}

/** Move the names of neighbours apart: by so many pixels that no two stand on one line. */
function spreadLabels(known, scale) {
  const range = (values) => Math.max(...values) - Math.min(...values) || 1;
  const width = range(known.map((one) => scale(one.cost)));
  const height = range(known.flatMap((one) => [one.low, one.high]));
  const placed = [];
  for (const one of [...known].sort((a, b) => b.score - a.score)) {
    const near = placed.filter((other) => Math.abs(scale(other.cost) - scale(one.cost)) < 0.2 * width);
    const pixel = (-250 * one.score) / height;
    one.shift = Math.max(0, ...near.map((other) => other.line + 13 - pixel));
    placed.push({ cost: one.cost, line: pixel + one.shift });
  }
}

function drawCosts(rows) {
  const titles = { parameters: "trainable parameters", step: "training step over the bare model's forward" };
  for (const [axis, id] of [["parameters", "chart-parameters"], ["step", "chart-step"]]) {
    const { known, front } = costPoints(rows, axis);
    byId(id).parentElement.hidden = !known.length;
    if (axis === "step") byId("untimed").hidden = known.length > 0;
    if (!known.length) continue;
    const x = { field: "cost", type: "quantitative", title: titles[axis], scale: axis === "parameters" ? { type: "log" } : { zero: false }, axis: { format: "~s", labelOverlap: true } };
    // One colour and one shape for a method, whichever methods a chart shows.
    const scale = { domain: suite().rows.map((row) => row.label) };
    const colour = { field: "method", type: "nominal", title: null, legend: null, scale };
    const shape = { field: "method", type: "nominal", legend: null, scale };
    const tooltip = ["method", "cost", "score", "low", "high"].map((field) => ({ field, format: field === "method" ? undefined : ",.4~g" }));
    embed(id, {
      data: { values: known },
      layer: [
        { data: { values: front }, mark: { type: "line", strokeDash: [4, 3], color: "#888" }, encoding: { x, y: { field: "score", type: "quantitative" } } },
        { mark: { type: "rule" }, encoding: { x, y: { field: "low", type: "quantitative", title: "mean score", scale: { zero: false } }, y2: { field: "high" }, color: colour } },
        { mark: { type: "point", filled: true, size: 90 }, encoding: { x, y: { field: "score", type: "quantitative" }, color: colour, shape, tooltip } },
        { mark: { type: "text", dx: 8, dy: { expr: "datum.shift" }, align: "left", fontSize: 12 }, encoding: { x, y: { field: "score", type: "quantitative" }, text: { field: "method" } } },
      ],
    });
  }
  sortable("table-costs", [
    { title: "method", key: "label", words: true }, { title: "mean", key: "mean", show: (row) => withHalf(row.mean, row.half) },
    { title: "parameters", key: "parameters", show: (row) => count(row.parameters) },
    { title: "step / bare forward", key: "step", show: (row) => (row.step === null ? "n/a" : row.step.toFixed(2)) },
  ], rows, { column: 1, descending: true });
}

function drawCurves() {
  const axis = byId("curve-axis").value;
  const values = suite().curves.filter((point) => point[axis] !== null);
  const drawnLabels = new Set(values.map((point) => point.label));
  const scale = { domain: suite().rows.map((row) => row.label) };
  const legend = { title: null, values: scale.domain.filter((label) => drawnLabels.has(label)), orient: "bottom", columns: byId("chart-curves").clientWidth < 600 ? 3 : 8, symbolSize: 400, symbolStrokeWidth: 2 };
  embed("chart-curves", {
    data: { values },
    transform: [{ window: [{ op: "mean", field: "loss", as: "smooth" }], frame: [-2, 2], groupby: ["label"], sort: [{ field: "step" }] }],
    mark: { type: "line", strokeWidth: 2 },
    encoding: {
      x: { field: axis, type: "quantitative", title: axis }, y: { field: "smooth", type: "quantitative", title: "task loss, mean of five points", scale: { zero: false } },
      color: { field: "label", type: "nominal", legend, scale }, strokeDash: { field: "label", type: "nominal", legend, scale },
      tooltip: [{ field: "label" }, { field: "step" }, { field: "loss", format: ".4f" }],
    },
  });
  const last = new Map(values.map((point) => [point.label, point]));
  sortable("table-curves", [
    { title: "method", key: "label", words: true }, { title: "step", key: "step" },
    { title: "seconds", key: "seconds", show: (row) => (row.seconds === null ? "n/a" : row.seconds.toFixed(0)) }, { title: "task loss", key: "loss", show: (row) => row.loss.toFixed(3) },
  ], [...last.values()], { column: 3, descending: false });
}

function drawPairs() {
  byId("endpoint").replaceChildren(suite().endpoint);
  const pairs = suite().pairs;
  const names = [...new Set(pairs.flatMap((pair) => [pair.first, pair.second]))];
  const table = byId("matrix");
  if (!names.length) { table.replaceChildren(element("caption", {}, "No two methods have runs of two seeds in common.")); return; }
  const found = new Map(pairs.flatMap((pair) => [[`${pair.first}|${pair.second}`, { ...pair, sign: 1 }], [`${pair.second}|${pair.first}`, { ...pair, sign: -1 }]]));
  const head = element("tr", {}, element("th", { scope: "col" }, "row minus column"), ...names.map((name) => element("th", { scope: "col" }, name)));
  const body = names.map((row) => element("tr", {}, element("th", { scope: "row" }, row), ...names.map((column) => {
    const pair = found.get(`${row}|${column}`);
    if (!pair) return element("td", {}, "-");
    const value = pair.sign * pair.difference;
    const text = `${value >= 0 ? "+" : ""}${value.toFixed(1)} ± ${pair.half.toFixed(1)}`;
    return element("td", { class: pair.decided ? "decided" : "", title: `p after Holm: ${pair.p.toPrecision(2)}` }, text);
  })));
  table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
}

function drawRouting() {
  const run = suite().routing[Number(byId("routed").value)];
  if (!run) { byId("chart-routing").replaceChildren("No run of this suite recorded its routing."); byId("table-routing").replaceChildren(); return; }
  embed("chart-routing", {
    data: { values: run.cells }, width: undefined, autosize: undefined, height: undefined,
    facet: { column: { field: "task", title: null } }, resolve: { scale: { color: "shared" } },
    spec: {
      width: 110, height: 160, mark: "rect",
      encoding: {
        x: { field: "expert", type: "ordinal", title: "expert", axis: { labelAngle: 0 } }, y: { field: "layer", type: "ordinal", title: "layer" },
        color: { field: "gate", type: "quantitative", title: "mean gate", scale: { scheme: "viridis" } },
        tooltip: [{ field: "task" }, { field: "layer" }, { field: "expert" }, { field: "gate" }],
      },
    },
  });
  sortable("table-routing", ["task", "layer", "expert", "gate"].map((key) => ({ title: key, key, words: key === "task" })), run.cells, { column: 3, descending: true });
}

// ---------------------------------------------------------------- finished tables

function drawTables(id, tables, empty) {
  const home = byId(id);
  if (!tables.length) { home.replaceChildren(element("p", {}, empty)); return; }
  const [parts, later] = [[], []];
  tables.forEach((table, index) => {
    const made = element("table", { id: `${id}-${index}` });
    const numbers = (text) => { const value = parseFloat(text.replaceAll(",", "")); return Number.isNaN(value) ? null : value; };
    parts.push(element("h3", {}, table.title), element("div", { class: "wide" }, made));
    parts.push(...table.notes.map((note) => element("p", { class: "note" }, note)));
    if (table.figure) parts.push(element("img", { src: table.figure, alt: `${table.title}, as a figure; the table above has the numbers`, style: "max-width: 100%; background: #fff" }));
    const columns = table.columns.map((title, at) => {
      const words = table.rows.every((row) => numbers(row[at]) === null);
      return { title, words, value: (row) => (words ? row[at] : numbers(row[at])), show: (row) => row[at] };
    });
    later.push(() => sortable(made.id, columns, table.rows, { column: -1, descending: false }));
  });
  home.replaceChildren(...parts);
  later.forEach((draw) => draw()); // the library needs tables that stand in the page
}

// ---------------------------------------------------------------- start

function chooseSuite() {
  const chosen = suite();
  const presets = [...new Set(chosen.rows.filter((row) => !row.baseline).map((row) => row.preset))];
  byId("preset").replaceChildren(element("option", { value: "any" }, "any"), ...presets.map((preset) => element("option", { value: preset }, preset)));
  const legend = byId("tasks").querySelector("legend");
  byId("tasks").replaceChildren(legend, ...chosen.tasks.map((task) => {
    const box = element("input", { type: "checkbox", value: task, onchange: drawBoard });
    box.checked = true;
    return element("label", {}, box, ` ${task}`);
  }));
  byId("routed").replaceChildren(...chosen.routing.map((run, index) => element("option", { value: index }, `${run.method}, seed ${run.seed}`)));
  drawBoard(); drawCurves(); drawPairs(); drawRouting(); answerQuestions();
}

/** The same by the results folder, which may hold no suite. */
function showFolder(folder) {
  const found = PAGE.suites.find((one) => one.folder.split("/").pop() === folder);
  if (found) showSuite(found.key);
}

/** The evidence of a suite stands in sections that show one suite: choose that one. */
function showSuite(key) {
  const at = PAGE.suites.findIndex((one) => one.key === key);
  if (at < 0) return;
  byId("suite").value = String(at);
  chooseSuite();
}

function start() {
  const answers = PAGE.answers.map((one) => element("div", { class: "answer" },
    element("p", {}, element("strong", {}, one.question), " ", element("span", { class: "strength" }, one.strength)),
    element("p", {}, one.answer, ...one.links.flatMap((link) => [" ", element("a", { href: link.section, onclick: () => showFolder(link.folder) }, link.text)]))));
  byId("verdict-text").replaceChildren(...answers, ...PAGE.verdict.map((entry) => element("p", {}, element("strong", {}, `${entry.question} `), entry.answer, " ", ...(entry.link ? [element("a", { href: entry.link, onclick: () => showSuite(entry.suite) }, "Evidence")] : []))));
  byId("suite").replaceChildren(...PAGE.suites.map((one, index) => element("option", { value: index }, `${one.name} (${one.steps} steps)`)));
  byId("suite").addEventListener("change", chooseSuite);
  for (const id of ["preset", "size", "name"]) byId(id).addEventListener("input", drawBoard);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("curve-axis").addEventListener("change", drawCurves);
  byId("routed").addEventListener("change", drawRouting);
  dark.addEventListener("change", chooseSuite);
  startQuestions();
  if (PAGE.suites.length) chooseSuite();
  drawRecords();
  drawTables("mechanisms-body", PAGE.mechanisms, "No mechanisms were run: python -m benchmarks.run --suite mechanisms");
  drawTables("speed-body", PAGE.speed, "No speed table: python -m benchmarks.speed --backbone minilm --methods all");
  drawTables("claims-body", PAGE.claims, "No table of claims: python -m benchmarks.claims");
}
start();
