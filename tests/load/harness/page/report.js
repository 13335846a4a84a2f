// Lays out a result of `pagoda load`: figures, then charts; of a search for the knee also its stages, of two results
// one beside the other. Reads RESULTS, a list of {name, result}.
"use strict";

const COLOURS = { blue: "#2b6cb0", red: "#c0392b", green: "#2f7d4f", orange: "#d9822b", grey: "#8a94a0", violet: "#7d3c98" };
const PAIR = [COLOURS.blue, COLOURS.orange];
const BLOCK_COLOURS = { referenced: COLOURS.red, cached: COLOURS.orange, free: "#b9c4cf", host_cached: COLOURS.violet, host_free: "#d7cbe0" };
const OUTCOME_COLOURS = { completed: COLOURS.blue, cancelled: COLOURS.orange, disconnected: COLOURS.violet, failed: COLOURS.red };
const METRICS = { ttft: "Time to first token", tpot: "Time per output token", itl: "Between messages", e2el: "End to end" };

const main = document.querySelector("main");

function element(name, text, parent, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  if (parent) parent.append(made);
  return made;
}

function ms(value) {
  if (value === null || value === undefined) return "–";
  return value >= 10000 ? `${formatNumber(value / 1000)} s` : `${formatNumber(value)} ms`;
}

function tiles(result) {
  const box = element("div", undefined, main, "tiles");
  const add = (label, value) => {
    const tile = element("div", undefined, box);
    element("b", value, tile);
    element("span", label, tile);
  };
  add(`of ${formatNumber(result.num_requests)} requests completed`, formatNumber(result.completed));
  add("requests/s", formatNumber(result.request_throughput));
  add("output tokens/s", formatNumber(result.output_throughput));
  add("first token, median", ms(result.median_ttft_ms));
  add("first token, p99", ms(result.p99_ttft_ms));
  add("per token, median", ms(result.median_tpot_ms));
  if (result.good_share !== null) add("good requests", `${formatNumber(100 * result.good_share)} %`);
  if (result.server?.prefix_hit_rate != null) add("prefix hits", `${formatNumber(100 * result.server.prefix_hit_rate)} %`);
}

function table(parent, heads, rows) {
  const scroller = element("div", undefined, parent, "scroller");
  const made = element("table", undefined, scroller);
  const head = element("tr", undefined, element("thead", undefined, made));
  heads.forEach((text) => element("th", text, head));
  const body = element("tbody", undefined, made);
  for (const cells of rows) {
    const row = element("tr", undefined, body);
    cells.forEach((text, i) => element(i ? "td" : "th", text, row, i && heads[i] === "" ? "words" : undefined));
  }
}

function percentilesOf(result, metric) {
  const names = Object.keys(result).map((key) => key.match(/^p([\d.]+)_(\w+)_ms$/)).filter((m) => m && m[2] === metric);
  return names.map((m) => m[1]);
}

function latencyTable(parent, result) {
  const shown = Object.keys(METRICS).filter((metric) => `mean_${metric}_ms` in result);
  if (!shown.length) return;
  const percentiles = percentilesOf(result, shown[0]);
  const rows = shown.map((metric) => [METRICS[metric], ...["mean", ...percentiles.map((p) => `p${p}`)].map((p) => ms(result[`${p}_${metric}_ms`]))]);
  table(parent, ["from when due", "mean", ...percentiles.map((p) => `p${p}`)], rows);
}

function countsTable(parent, result) {
  const rows = [["completed", formatNumber(result.completed), ""]];
  if (result.cancelled) rows.push(["cancelled", formatNumber(result.cancelled), "we asked for it"]);
  if (result.disconnected) rows.push(["disconnected", formatNumber(result.disconnected), "we left in mid-stream"]);
  for (const failure of result.failures) {
    const back = failure.with_retry_delay ? `; ${failure.with_retry_delay} say when to come back, after ${formatNumber(failure.mean_retry_delay_s)} s on average` : "";
    rows.push([failure.status, formatNumber(failure.count), failure.detail + back]);
  }
  table(parent, ["how requests went", "count", ""], rows);
}

function complaints(result) {
  const words = [...result.generator.complaints];
  if (result.is_interrupted) words.push("the run was interrupted");
  if (words.length) element("p", `These figures are not the server's alone: ${words.join("; ")}.`, main, "warning");
}

function bars(histogram, name, colour, opacity) {
  const total = histogram.counts.reduce((sum, count) => sum + count, 0) || 1;
  return { name, colour, opacity, kind: "bars", xs: histogram.edges_ms, ys: histogram.counts.map((count) => (100 * count) / total) };
}

function ttftOverTime(result) {
  const { due_s, ttft_ms, outcome } = result.points;
  return Object.entries(OUTCOME_COLOURS).map(([name, colour]) => {
    const chosen = due_s.map((_, i) => i).filter((i) => outcome[i] === name && ttft_ms[i] !== null);
    return { name, colour, kind: "points", xs: chosen.map((i) => due_s[i]), ys: chosen.map((i) => ttft_ms[i]) };
  }).filter((series) => series.xs.length);
}

// A pool that is hardly used shows what is in it, not how much is free.
function blockChart(parent, server, seconds) {
  const states = Object.keys(BLOCK_COLOURS).filter((state) => state in server.blocks);
  const numBlocks = states.reduce((sum, state) => sum + server.blocks[state][0], 0);
  const isMostlyFree = Math.min(...server.blocks.free) > 0.8 * numBlocks;
  const shown = states.filter((state) => !isMostlyFree || !state.endsWith("free"));
  addChart(parent, `KV blocks by state, of ${formatNumber(numBlocks)}${isMostlyFree ? " (the others are free)" : ""}`, {
    x: seconds, y: {},
    series: shown.map((state) => ({ name: state.replace("_", " "), colour: BLOCK_COLOURS[state], kind: "stack", xs: server.at_s, ys: server.blocks[state] })),
  });
}

function runCharts(parent, result) {
  const seconds = { label: "seconds since the start", min: 0 };
  addChart(parent, "Time to first token, by when the request was due", { x: seconds, y: { log: true, format: ms }, series: ttftOverTime(result) });
  addChart(parent, "Between messages (ITL)", {
    x: { label: "milliseconds", log: true }, y: { format: (v) => `${formatNumber(v)} %` },
    series: [bars(result.itl_histogram, "share of the gaps", COLOURS.blue)],
  });
  const bySecond = result.output_tokens_by_second;
  addChart(parent, "Output tokens in each second", {
    x: seconds, y: {}, series: [{ name: "tokens", colour: COLOURS.green, kind: "steps", xs: bySecond.map((_, i) => i), ys: bySecond }],
  });
  const server = result.server?.series;
  const concurrency = result.concurrency_by_second;
  const sent = { name: "sent by us", colour: COLOURS.grey, kind: "steps", xs: concurrency.map((_, i) => i), ys: concurrency };
  const ran = server ? [
    { name: "running", colour: COLOURS.blue, kind: "steps", xs: server.at_s, ys: server.num_running },
    { name: "waiting", colour: COLOURS.orange, kind: "steps", xs: server.at_s, ys: server.num_waiting },
  ] : [];
  addChart(parent, "Requests at once", { x: seconds, y: {}, series: [sent, ...ran] });
  if (server) {
    blockChart(parent, server, seconds);
  }
}

function showRun(result) {
  complaints(result);
  tiles(result);
  const tables = element("div", undefined, main, "tables");
  latencyTable(tables, result);
  countsTable(tables, result);
  runCharts(element("div", undefined, main, "charts"), result);
}

function kneeCharts(parent, results) {
  const rate = { label: "requests per second offered", log: true };
  const lines = (metric, format) => results.flatMap(({ name, result }, number) => ["50", "99"].map((p) => ({
    name: results.length > 1 ? `${name} p${p}` : `p${p}`, kind: "line", dash: p === "50" ? "none" : "6 3",
    colour: results.length > 1 ? PAIR[number] : p === "50" ? COLOURS.blue : COLOURS.red,
    xs: result.stages.map((s) => s.offered_rps), ys: result.stages.map((s) => format(s, p)),
  })));
  addChart(parent, "Time to first token against rate", { x: rate, y: { log: true, format: ms }, series: lines("ttft", (s, p) => s[`p${p}_ttft_ms`]) });
  addChart(parent, "Time per output token against rate", { x: rate, y: { log: true, format: ms }, series: lines("tpot", (s, p) => s[`p${p}_tpot_ms`]) });
  const plain = (names) => results.flatMap(({ name, result }, number) => names.map(([label, colour, value]) => ({
    name: results.length > 1 ? `${name} ${label}` : label, kind: "line", colour: results.length > 1 ? PAIR[number] : colour,
    xs: result.stages.map((s) => s.offered_rps), ys: result.stages.map(value),
  })));
  addChart(parent, "Good requests against rate", { x: rate, y: { format: (v) => `${formatNumber(v)} %` }, series: plain([["kept every limit", COLOURS.green, (s) => 100 * s.good_share]]) });
  addChart(parent, "Output tokens per second against rate", { x: rate, y: {}, series: plain([["tokens/s", COLOURS.blue, (s) => s.output_throughput]]) });
}

function showKnee(result) {
  const limits = result.settings.measures.goodput_ms.map(([name, limit]) => `${name} ≤ ${ms(limit)}`).join(", ");
  const rate = formatNumber(result.knee_rps);
  const words = result.knee_rps === null ? "No stage kept its share of good requests"
    : result.is_knee_beyond ? `The knee is beyond the last stage of ${rate} requests per second` : `The knee: ${rate} requests per second`;
  element("p", `${words} (${formatNumber(100 * result.knee_share)} % of them with ${limits}).`, main, "lead");
  kneeCharts(element("div", undefined, main, "charts"), [{ name: "", result }]);
  const rows = result.stages.map((s) => [formatNumber(s.offered_rps), `${formatNumber(100 * s.good_share)} %`, formatNumber(s.output_throughput), ms(s.p50_ttft_ms), ms(s.p99_ttft_ms), ms(s.p50_tpot_ms), ms(s.p99_tpot_ms), formatNumber(s.failed)]);
  table(main, ["requests/s", "good", "tokens/s", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "failed"], rows);
  const choice = element("p", "One stage: ", main, "choice");
  const select = element("select", undefined, choice);
  result.stages.forEach((stage, i) => { element("option", `${formatNumber(stage.offered_rps)} requests/s`, select).value = i; });
  const last = result.stages.findLastIndex((stage) => stage.offered_rps === result.knee_rps);
  select.value = last < 0 ? result.stages.length - 1 : last;
  const before = main.childNodes.length;
  const show = () => {
    while (main.childNodes.length > before) main.lastChild.remove();
    showRun(result.stages[select.value]);
  };
  select.addEventListener("change", show);
  show();
}

function showPair(results) {
  table(main, ["", ...results.map(({ name }) => name), "second over first"], COMPARISON);
  const charts = element("div", undefined, main, "charts");
  if (results.every(({ result }) => result.stages)) return kneeCharts(charts, results);
  if (results.some(({ result }) => result.stages)) return undefined;
  for (const [key, title] of [["ttft_histogram", "Time to first token"], ["itl_histogram", "Between messages (ITL)"]]) {
    addChart(charts, title, {
      x: { label: "milliseconds", log: true }, y: { format: (v) => `${formatNumber(v)} %` },
      series: results.map(({ name, result }, i) => bars(result[key], name, PAIR[i], 0.55)),
    });
  }
  addChart(charts, "Output tokens in each second", {
    x: { label: "seconds since the start", min: 0 }, y: {},
    series: results.map(({ name, result }, i) => ({ name, colour: PAIR[i], kind: "steps", xs: result.output_tokens_by_second.map((_, s) => s), ys: result.output_tokens_by_second })),
  });
  return undefined;
}

function showHead(results) {
  for (const { name, result } of results) {
    const machine = result.machine;
    if (results.length > 1) element("h2", name, main);
    element("p", `${result.model_id} on ${machine.processor}, ${machine.num_cores} cores, ${machine.memory_gib} GiB; ${result.date}; load ${formatNumber(machine.load_average)} at the end`, main, "machine");
    element("code", result.command, main, "command");
  }
}

showHead(RESULTS);
if (RESULTS.length > 1) showPair(RESULTS);
else if (RESULTS[0].result.stages) showKnee(RESULTS[0].result);
else showRun(RESULTS[0].result);
