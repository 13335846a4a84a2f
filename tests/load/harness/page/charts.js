// Draws a chart as SVG into an element, as wide as that is, and again when its width changes. Knows nothing of results.
//
// A chart: {x: axis, y: axis, series: [{name, colour, kind, xs, ys}]}; an axis: {label, log, min, max, format}.
// Kinds: "line", "steps" (a value holds until the next), "points", "bars" (xs has one edge more than ys), "stack" (areas,
// each on top of those before it).
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 240;
const MARGIN = { left: 58, right: 14, top: 12, bottom: 40 };

function node(name, attributes, parent, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function formatNumber(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size >= 10000) return Math.round(value).toLocaleString("en");
  if (size >= 100) return value.toFixed(0);
  if (size >= 1) return String(+value.toFixed(size >= 10 ? 1 : 2));
  return String(+value.toPrecision(2));
}

function linearTicks(low, high, count) {
  const rough = (high - low) / count || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * unit).find((candidate) => candidate >= rough);
  const ticks = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) ticks.push(+at.toPrecision(12));
  return ticks;
}

function logTicks(low, high, count) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const n of [1, 2, 5]) ticks.push(n * 10 ** power);
  }
  const inside = ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  const tens = inside.filter((tick) => Number.isInteger(+Math.log10(tick).toFixed(6)));
  return inside.length > count && tens.length > 1 ? tens : inside;
}

// What a series reaches on its axes; a stack reaches the sum.
function extent(chart, which) {
  const axis = chart[which];
  let values = chart.series.flatMap((s) => (which === "x" ? s.xs : s.ys)).filter((v) => v !== null && Number.isFinite(v));
  if (which === "y" && chart.series.some((s) => s.kind === "stack")) {
    values = chart.series[0].xs.map((_, i) => chart.series.reduce((sum, s) => sum + (s.ys[i] || 0), 0));
  }
  if (axis.log) values = values.filter((v) => v > 0);
  let low = axis.min ?? (axis.log || which === "x" ? Math.min(...values) : 0);
  let high = axis.max ?? Math.max(...values);
  if (!values.length) [low, high] = axis.log ? [1, 10] : [0, 1];
  if (low >= high) high = axis.log ? low * 10 : low + 1;
  if (which === "y") [low, high] = axis.log ? [low / 1.2, high * 1.2] : [low, high * 1.05];
  return [low, high];
}

function scale(axis, [low, high], from, to) {
  const at = axis.log ? Math.log10 : (value) => value;
  const [first, last] = [at(low), at(high)];
  return (value) => from + ((at(axis.log ? Math.max(value, low) : value) - first) / (last - first)) * (to - from);
}

function drawAxes(svg, chart, ranges, x, y, width) {
  const bottom = HEIGHT - MARGIN.bottom;
  const ticksOf = (axis, range, count) => (axis.log ? logTicks : linearTicks)(range[0], range[1], count);
  for (const tick of ticksOf(chart.y, ranges.y, 5)) {
    node("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(tick), y2: y(tick) }, svg);
    const format = chart.y.format || formatNumber;
    node("text", { class: "tick", x: MARGIN.left - 6, y: y(tick) + 4, "text-anchor": "end" }, svg, format(tick));
  }
  for (const tick of ticksOf(chart.x, ranges.x, Math.max(3, Math.floor(width / 90)))) {
    node("line", { class: "grid", x1: x(tick), x2: x(tick), y1: bottom, y2: bottom + 4 }, svg);
    const format = chart.x.format || formatNumber;
    node("text", { class: "tick", x: x(tick), y: bottom + 17, "text-anchor": "middle" }, svg, format(tick));
  }
  node("line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: bottom, y2: bottom }, svg);
  const middle = (MARGIN.left + width - MARGIN.right) / 2;
  node("text", { class: "label", x: middle, y: HEIGHT - 5, "text-anchor": "middle" }, svg, chart.x.label);
}

function linePath(xs, ys, x, y, isStepped) {
  let path = "";
  xs.forEach((value, i) => {
    if (ys[i] === null || ys[i] === undefined) return;
    const to = `${x(value).toFixed(1)},${y(ys[i]).toFixed(1)}`;
    path += !path ? `M${to}` : isStepped ? `H${x(value).toFixed(1)}V${y(ys[i]).toFixed(1)}` : `L${to}`;
  });
  return path;
}

// What lies outside of the axes is cut off.
function plotArea(svg, width) {
  const id = `clip-${document.querySelectorAll("clipPath").length}`;
  const size = { x: MARGIN.left, y: 0, width: width - MARGIN.left - MARGIN.right, height: HEIGHT - MARGIN.bottom };
  node("rect", size, node("clipPath", { id }, svg));
  return node("g", { "clip-path": `url(#${id})` }, svg);
}

function drawSeries(svg, series, x, y, below) {
  const bottom = HEIGHT - MARGIN.bottom;
  if (series.kind === "points") {
    series.xs.forEach((value, i) => {
      if (series.ys[i] === null) return;
      node("circle", { cx: x(value).toFixed(1), cy: y(series.ys[i]).toFixed(1), r: 2.2, fill: series.colour, "fill-opacity": 0.55 }, svg);
    });
  } else if (series.kind === "bars") {
    series.ys.forEach((count, i) => {
      const [left, right] = [x(series.xs[i]), x(series.xs[i + 1])];
      const top = y(count);
      node("rect", { x: left.toFixed(1), y: top.toFixed(1), width: Math.max(0.5, right - left - 0.5).toFixed(1),
        height: Math.max(0, bottom - top).toFixed(1), fill: series.colour, "fill-opacity": series.opacity ?? 0.9 }, svg);
    });
  } else if (series.kind === "stack") {
    const upper = series.ys.map((value, i) => below[i] + (value || 0));
    const back = [...series.xs].reverse().map((value, i) => `L${x(value).toFixed(1)},${y(below[below.length - 1 - i]).toFixed(1)}`);
    node("path", { d: `${linePath(series.xs, upper, x, y)}${back.join("")}Z`, fill: series.colour, "fill-opacity": 0.85 }, svg);
    upper.forEach((value, i) => { below[i] = value; });
  } else {
    const d = linePath(series.xs, series.ys, x, y, series.kind === "steps");
    node("path", { d, fill: "none", stroke: series.colour, "stroke-width": 2, "stroke-dasharray": series.dash ?? "none" }, svg);
    if (series.kind === "line" && series.xs.length < 40) {
      series.xs.forEach((value, i) => {
        if (series.ys[i] !== null) node("circle", { cx: x(value), cy: y(series.ys[i]), r: 3, fill: series.colour }, svg);
      });
    }
  }
}

// What the pointer is over: of each series the value nearest in x.
function hover(svg, box, chart, ranges, width) {
  const note = box.querySelector(".note");
  svg.addEventListener("pointerleave", () => { note.textContent = ""; });
  svg.addEventListener("pointermove", (event) => {
    const share = (event.offsetX - MARGIN.left) / (width - MARGIN.left - MARGIN.right);
    const [low, high] = ranges.x;
    const at = chart.x.log ? low * (high / low) ** share : low + share * (high - low);
    const words = chart.series.filter((s) => s.xs.length).map((series) => {
      let best = 0;
      series.ys.forEach((_, i) => { if (Math.abs(series.xs[i] - at) < Math.abs(series.xs[best] - at)) best = i; });
      return `${series.name} ${(chart.y.format || formatNumber)(series.ys[best])} at ${(chart.x.format || formatNumber)(series.xs[best])}`;
    });
    note.textContent = words.join(" · ");
  });
}

function draw(box, chart) {
  const holder = box.querySelector(".plot");
  const width = Math.max(260, holder.clientWidth);
  holder.replaceChildren();
  const svg = node("svg", { width, height: HEIGHT, role: "img", "aria-label": box.querySelector("h3").textContent }, holder);
  const ranges = { x: extent(chart, "x"), y: extent(chart, "y") };
  const x = scale(chart.x, ranges.x, MARGIN.left, width - MARGIN.right);
  const y = scale(chart.y, ranges.y, HEIGHT - MARGIN.bottom, MARGIN.top);
  drawAxes(svg, chart, ranges, x, y, width);
  const below = chart.series.length ? chart.series[0].xs.map(() => 0) : [];
  const area = plotArea(svg, width);
  for (const series of chart.series) drawSeries(area, series, x, y, below);
  hover(svg, box, chart, ranges, width);
}

// A box with a title, what the colours mean, the plot and a line for what the pointer is over.
function addChart(parent, title, chart) {
  const box = document.createElement("section");
  box.className = "chart";
  const heading = document.createElement("h3");
  heading.textContent = title;
  const legend = document.createElement("p");
  legend.className = "legend";
  for (const series of chart.series) {
    const key = document.createElement("span");
    key.innerHTML = '<i></i>';
    key.firstChild.style.background = series.colour;
    key.append(series.name);
    legend.append(key);
  }
  const plot = document.createElement("div");
  plot.className = "plot";
  const note = document.createElement("p");
  note.className = "note";
  box.append(heading, legend, plot, note);
  parent.append(box);
  let lastWidth = 0;
  new ResizeObserver(() => {
    if (plot.clientWidth === lastWidth) return;
    lastWidth = plot.clientWidth;
    draw(box, chart);
  }).observe(plot);
}
