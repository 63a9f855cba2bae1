// The dialog: system prompt, sampling, key.

import { byId, h, readSettings, writeSettings } from "../shared.js";

// [field of the API, what it is called, type of its input, attributes]
const FIELDS = [
  ["max_tokens", "Max tokens", "number", { min: 1, step: 1, placeholder: "to the end of the context" }],
  ["temperature", "Temperature", "number", { min: 0, max: 2, step: 0.05, placeholder: "default" }],
  ["top_p", "Top p", "number", { min: 0, max: 1, step: 0.01, placeholder: "default" }],
  ["top_k", "Top k", "number", { min: 0, step: 1, placeholder: "default" }],
  ["min_p", "Min p", "number", { min: 0, max: 1, step: 0.01, placeholder: "default" }],
  ["repetition_penalty", "Repetition penalty", "number", { min: 0.01, max: 2, step: 0.05, placeholder: "default" }],
  ["seed", "Seed", "number", { step: 1, placeholder: "new each time" }],
  ["stop", "Stop at", "text", { placeholder: "nothing" }],
];

/** onKey: called after the key has changed; onForget: to delete all conversations. */
export function setUpSettings({ onKey, onForget }) {
  const dialog = byId("settings");
  const inputs = new Map();
  for (const [name, label, type, attributes] of FIELDS) {
    const input = h("input", { type, id: `setting-${name}`, ...attributes });
    inputs.set(name, input);
    byId("sampling").append(h("label", {}, label, input));
  }
  inputs.set("system", byId("system"));
  inputs.set("key", byId("key"));
  for (const [name, input] of inputs) {
    input.addEventListener("change", () => {
      if (!input.checkValidity()) return input.reportValidity();
      writeSettings({ ...readSettings(), [name]: input.value });
      if (name === "key") onKey();
    });
  }
  byId("open-settings").addEventListener("click", () => {
    const settings = readSettings();
    for (const [name, input] of inputs) input.value = settings[name] ?? "";
    dialog.showModal();
  });
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  byId("forget").addEventListener("click", () => {
    if (confirm("Delete all conversations from this browser?")) onForget();
  });
}

/** The fields that are set, as the API takes them. */
export function sampling() {
  const settings = readSettings();
  const found = {};
  for (const [name, , type] of FIELDS) {
    const value = settings[name];
    if (value === undefined || value === "") continue;
    found[name] = type === "number" ? Number(value) : value;
  }
  return found;
}
