// What the dashboard shows: for each number how it follows from the metrics.

import { increase, quantile, sum } from "./prometheus.js";

const seconds = (value) => (value < 0.1 ? `${(1000 * value).toFixed(1)} ms` : value < 10 ? `${value.toFixed(2)} s` : `${value.toFixed(0)} s`);
const percent = (value) => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`;
const number = (value) => (Number.isInteger(value) ? value.toLocaleString("en") : value.toFixed(value < 10 ? 2 : 0));
const bytes = (value) => `${(value / 2 ** 30).toFixed(2)} GiB`;

/** Each row takes a view { before, now, span, model } and gives a number, or undefined where there is none yet. */
const gauge = (name, labels) => (v) => sum(v.now, name, { ...v.model, ...labels });
const added = (name, labels) => (v) => increase(v.before, v.now, name, { ...v.model, ...labels });
const rate = (name, labels) => (v) => v.span && added(name, labels)(v) / v.span;
const at = (name, q) => (v) => quantile(v.before, v.now, name, q, v.model);
const share = (part, whole) => (v) => (whole(v) ? part(v) / whole(v) : undefined);

const ended = (reason) => added("vllm:request_success_total", reason && { finished_reason: reason });
const anyServer = (name) => (v) => sum(v.now, name);

/** [heading, [[label, value, format, warn?: above it the number is marked], ...]] */
export const PANELS = [
  ["Load", [
    ["Tokens/s", rate("vllm:generation_tokens_total"), number],
    ["Prompt tokens/s", rate("vllm:prompt_tokens_total"), number],
    ["Running", gauge("vllm:num_requests_running"), number],
    ["Waiting", gauge("vllm:num_requests_waiting"), number],
    ["Turned away", added("vllm:admission_rejections_total"), number, 0],
  ]],
  ["Times", [
    ["First token, median", at("vllm:time_to_first_token_seconds", 0.5), seconds],
    ["First token, p95", at("vllm:time_to_first_token_seconds", 0.95), seconds],
    ["Per token, median", at("vllm:inter_token_latency_seconds", 0.5), seconds],
    ["Per token, p95", at("vllm:inter_token_latency_seconds", 0.95), seconds],
    ["Whole reply, p95", at("vllm:e2e_request_latency_seconds", 0.95), seconds],
    ["In the queue, p95", at("vllm:request_queue_time_seconds", 0.95), seconds],
  ]],
  ["Engine", [
    ["Cache in use", gauge("vllm:kv_cache_usage_perc"), percent, 0.95],
    ["Prefix hits", share(added("vllm:prefix_cache_hits_total"), added("vllm:prefix_cache_queries_total")), percent],
    ["Step, p95", at("foveate:engine_step_seconds", 0.95), seconds],
    ["Age of the step", gauge("foveate:engine_stalled_seconds"), seconds, 30],
    ["Failed steps", gauge("foveate:engine_failed_steps"), number, 0],
    ["Memory", anyServer("process_resident_memory_bytes"), bytes],
  ]],
  ["Ends", [
    ["Stopped", ended("stop"), number],
    ["At the length", ended("length"), number],
    ["The client left", ended("abort"), number],
    ["Errors", ended("error"), number, 0],
  ]],
  ["Quality", [
    ["Log-probability", gauge("foveate:reply_logprob_mean"), number],
    ["Entropy", gauge("foveate:reply_entropy_mean"), number],
    ["Ended by length", gauge("foveate:reply_length_share"), percent],
    ["Empty", gauge("foveate:reply_empty_share"), percent, 0.1],
    ["Repeat themselves", gauge("foveate:reply_repeated_share"), percent, 0.2],
    ["Schemas that failed", added("foveate:schema_failures_total"), number, 0],
    ["Prompt lengths, PSI", gauge("foveate:prompt_length_psi"), number, 0.25],
    ["Scripts, PSI", gauge("foveate:prompt_script_psi"), number, 0.25],
    ["Thumbs up", gauge("foveate:feedback_total", { rating: "up" }), number],
    ["Thumbs down", gauge("foveate:feedback_total", { rating: "down" }), number],
  ]],
];
