// A reply, each token coloured by its probability: the less probable, the stronger.

import { h } from "../shared.js";

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(logprob > -2.3 ? 0 : 2)} %`;
const shown = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥") || "(part of a character)";

/**
 * [{ text, logprob, top: [[text, logprob], ...] }]: a character that spans tokens is written with the last of them, and what follows
 * the reply, such as the token that ends it, is left out.
 */
export function readTokens(content, reply) {
  const decoder = new TextDecoder();
  const found = [];
  let length = 0;
  for (const { token, bytes, logprob, top_logprobs } of content) {
    if (length >= reply.length) break;
    const text = bytes?.length ? decoder.decode(new Uint8Array(bytes), { stream: true }) : token;
    length += text.length;
    found.push({ text, logprob, top: top_logprobs.map((other) => [other.token, other.logprob]) });
  }
  return found;
}

/** Arrow keys go from token to token; what is known of one stands below. */
export function renderTokens(tokens) {
  const detail = h("p", { class: "token-detail", role: "status" }, "Point at a token, or go through them with the arrow keys.");
  const spans = tokens.map(({ text, logprob }, i) => {
    const span = h("span", { class: "token", "data-index": i }, text);
    span.style.setProperty("--surprise", Math.min(1, -logprob / 5).toFixed(3));
    return span;
  });
  let current = -1;
  const select = (i) => {
    spans[current]?.classList.remove("current");
    current = Math.max(0, Math.min(spans.length - 1, i));
    spans[current].classList.add("current");
    const { text, logprob, top } = tokens[current];
    const others = top.map(([other, value]) => `“${shown(other)}” ${percent(value)}`).join(", ");
    detail.textContent = `“${shown(text)}” ${percent(logprob)}${others && `; most probable: ${others}`}`;
  };
  const move = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !spans.length) return;
    event.preventDefault();
    select(current + step);
  };
  const point = (event) => event.target.dataset.index && select(Number(event.target.dataset.index));
  const attributes = { class: "tokens", tabindex: 0, role: "group", "aria-label": "The reply by tokens", onkeydown: move };
  const text = h("div", { ...attributes, onmouseover: point, onclick: point }, ...spans);
  return h("div", {}, text, detail);
}
