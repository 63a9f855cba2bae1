import assert from "node:assert/strict";
import { test } from "node:test";
import { increase, parseMetrics, quantile, sum } from "../src/dashboard/prometheus.js";

const reading = (a, b, c) =>
  parseMetrics(`# HELP x of something\nx_bucket{le="0.1",model_name="m"} ${a}\nx_bucket{le="0.2",model_name="m"} ${b}
x_bucket{le="+Inf",model_name="m"} ${c}\nvllm:y_total{model_name="a \\"b\\", {c}"} 3.0\nvllm:y_total{model_name="d"} 1e2\nz 5`);

test("labels may hold quotes, commas and braces", () => {
  const metrics = reading(1, 2, 3);
  assert.equal(sum(metrics, "vllm:y_total"), 103);
  assert.equal(sum(metrics, "vllm:y_total", { model_name: "d" }), 100);
  assert.equal(metrics.get("vllm:y_total")[0].labels.model_name, 'a \\"b\\", {c}');
  assert.equal(sum(metrics, "z"), 5);
  assert.equal(sum(metrics, "nothing"), undefined);
});

test("quantiles are of what came between two readings, linear within a bucket", () => {
  assert.equal(quantile(reading(5, 5, 5), reading(7, 9, 9), "x", 0.5, { model_name: "m" }), 0.1);
  assert.ok(Math.abs(quantile(reading(5, 5, 5), reading(7, 9, 9), "x", 0.75) - 0.15) < 1e-12);
  assert.equal(quantile(reading(5, 5, 5), reading(5, 5, 5), "x", 0.5), undefined);
  assert.equal(quantile(reading(0, 0, 0), reading(0, 0, 4), "x", 0.9), 0.2); // beyond the last bound: the bound
});

test("a counter that has fallen belongs to a server that was started again", () => {
  assert.equal(increase(reading(5, 9, 9), reading(2, 3, 4), "x_bucket", { le: "0.1" }), 2);
});
