// How messages look. An element for each; what their buttons do is the caller's.

import { h } from "../shared.js";
import { renderMarkdown } from "./markdown.js";
import { renderTokens } from "./probabilities.js";

const names = { user: "You", assistant: "Reply" };

function button(text, onclick, more = {}) {
  return h("button", { type: "button", class: "plain small", onclick, ...more }, text);
}

/** actions: { copy, edit, regenerate, rate }, each with the message, and coloured: whether tokens show their probability. */
export function renderMessage(message, actions) {
  const body = h("div", { class: "body" });
  const foot = h("div", { class: "actions" });
  const head = h("h2", { class: "who" }, message.role === "user" ? names.user : (message.model ?? names.assistant));
  const element = h("li", { class: `message ${message.role}`, tabindex: -1 }, head, body, foot);
  fillMessage(element, message, actions);
  return element;
}

/** Again, after the message has changed. */
export function fillMessage(element, message, actions) {
  const [body, foot] = [element.querySelector(".body"), element.querySelector(".actions")];
  element.setAttribute("aria-busy", String(Boolean(message.running)));
  element.classList.toggle("running", Boolean(message.running));
  if (message.role === "user") {
    body.replaceChildren(h("div", { class: "text" }, message.content));
  } else if (actions.coloured && message.tokens?.length && !message.running) {
    body.replaceChildren(renderTokens(message.tokens));
  } else {
    body.replaceChildren(renderMarkdown(message.content, actions.copy));
  }
  if (message.note) body.append(h("p", { class: message.failed ? "note failed" : "note" }, message.note));
  foot.replaceChildren(...(message.running ? [statistics(message)] : buttons(message, actions)));
}

function buttons(message, actions) {
  const copy = button("Copy", () => actions.copy(message.content));
  if (message.role === "user") return [copy, button("Edit", () => actions.edit(message))];
  const rate = (rating, text) =>
    button(text, () => actions.rate(message, rating), {
      "aria-label": `${text} reply`, "aria-pressed": String(message.rating === rating), disabled: Boolean(message.rating),
    });
  const thumbs = message.id ? [rate("up", "Good"), rate("down", "Bad")] : [];
  return [copy, button("Regenerate", () => actions.regenerate(message)), ...thumbs, statistics(message)];
}

/** Tokens and times, as far as they are known. */
function statistics({ promptTokens, count, first, seconds }) {
  const parts = [];
  const rate = (count - 1) / Math.max(seconds - first, 1e-3);
  if (promptTokens !== undefined) parts.push(`${promptTokens} prompt tokens`);
  if (count) parts.push(`${count} tokens`);
  if (first !== undefined) parts.push(`first after ${first.toFixed(2)} s`);
  if (seconds !== undefined && count > 1) parts.push(`${seconds.toFixed(1)} s, ${rate.toFixed(0)} tokens/s`);
  return h("span", { class: "statistics" }, parts.join(" · "));
}

/** The message as a text box; onDone(text) or onDone(null). */
export function renderEditor(element, message, onDone) {
  const box = h("textarea", { rows: Math.min(12, message.content.split("\n").length + 1), "aria-label": "Edit the message" });
  box.value = message.content;
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      onDone(null);
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      onDone(box.value);
    }
  });
  element.querySelector(".body").replaceChildren(box);
  element.querySelector(".actions").replaceChildren(
    button("Send", () => onDone(box.value), { class: "primary small" }),
    button("Cancel", () => onDone(null)),
  );
  box.focus();
}
