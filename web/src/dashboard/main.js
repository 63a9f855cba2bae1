// The dashboard: reads /metrics every two seconds and shows the last minute.

import "../theme.css";
import "./dashboard.css";
import { byId, call, h, readSettings, setUpTheme, writeSettings } from "../shared.js";
import { sparkline } from "./chart.js";
import { PANELS } from "./panels.js";
import { parseMetrics } from "./prometheus.js";

const [EVERY, WINDOW, KEPT] = [2000, 60_000, 150]; // milliseconds, milliseconds, points of a line
const readings = []; // { time, metrics } of the last minute
const rows = []; // { value, format, warn, history, number, chart } of each line of the panels

for (const [heading, entries] of PANELS) {
  const list = h("dl", {});
  for (const [label, value, format, warn] of entries) {
    const [number, chart] = [h("span", { class: "number" }, "–"), h("span", { class: "line" })];
    list.append(h("div", {}, h("dt", {}, label), h("dd", {}, chart, number)));
    rows.push({ value, format, warn, history: [], number, chart });
  }
  byId("panels").append(h("section", { "aria-label": heading }, h("h2", {}, heading), list));
}

function show() {
  const [before, now] = [readings[0], readings.at(-1)];
  const model = { model_name: byId("model").value };
  const view = { before: before.metrics, now: now.metrics, span: (now.time - before.time) / 1000, model };
  for (const row of rows) {
    const found = row.value(view);
    const value = Number.isFinite(found) ? found : undefined;
    row.history.push(value);
    if (row.history.length > KEPT) row.history.shift();
    row.number.textContent = value === undefined ? "–" : row.format(value);
    row.number.classList.toggle("warn", row.warn !== undefined && value > row.warn);
    row.chart.replaceChildren(sparkline(row.history, Math.max(30, row.history.length)));
  }
}

function showModels(metrics) {
  const names = [...new Set((metrics.get("foveate:model_ready") ?? []).map(({ labels }) => labels.model_name))];
  const select = byId("model");
  if (names.length === select.options.length) return;
  select.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
}

function showCanary({ status, rounds, finished, prompts }) {
  const place = byId("canary");
  if (status === "off") return place.replaceChildren(h("p", { class: "hint" }, "Off: the server has been started without --canary."));
  const when = finished ? new Date(finished * 1000).toLocaleTimeString() : "not yet";
  const items = prompts.map(({ result, why, expected }) => {
    const prompt = typeof expected.prompt === "string" ? expected.prompt : `${expected.prompt.length} token ids`;
    return h("tr", {}, h("td", {}, prompt.slice(0, 80)), h("td", { class: `result ${result}` }, result), h("td", {}, why ?? ""));
  });
  const head = h("tr", {}, ...["Golden prompt", "Result", "Why"].map((name) => h("th", {}, name)));
  place.replaceChildren(
    h("p", {}, h("span", { class: `result ${status}` }, status), ` after ${rounds} rounds, the last one at ${when}`),
    h("div", { class: "wide" }, h("table", {}, h("thead", {}, head), h("tbody", {}, ...items))),
  );
}

/** /ready is no error when it says 503: it says what it waits for. */
async function readiness() {
  const { status, waiting_for: waiting } = await (await fetch("ready")).json();
  return [status, waiting.join("; ")];
}

async function read() {
  const metrics = parseMetrics(await (await call("metrics")).text());
  const time = performance.now();
  readings.push({ time, metrics });
  while (readings.length > 2 && time - readings[1].time > WINDOW) readings.shift();
  showModels(metrics);
  show();
  showCanary(await (await call("canary")).json());
  const [status, why] = await readiness();
  byId("state").className = `result ${status}`;
  byId("state").textContent = why ? `${status}: ${why}` : status;
}

function fault(error) {
  byId("notice").textContent = error.status === 401 ? "This server needs an API key." : (error?.message ?? "");
  byId("notice").hidden = !error;
  byId("key-form").hidden = error?.status !== 401;
}

async function run() {
  for (;;) {
    if (!document.hidden) await read().then(() => (byId("notice").hidden = byId("key-form").hidden = true), fault);
    await new Promise((resolve) => setTimeout(resolve, EVERY));
  }
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  writeSettings({ ...readSettings(), key: byId("key").value });
  read().then(() => (byId("notice").hidden = byId("key-form").hidden = true), fault);
});
byId("model").addEventListener("change", () => {
  for (const row of rows) row.history.length = 0;
  if (readings.length) show();
});
setUpTheme(byId("theme"));
run();
