// What the chat and the dashboard share: elements, settings kept in this browser, the theme, requests with the key.

const SETTINGS = "foveate.settings";

/** An element: h("button", { class: "plain", onclick }, "Copy", ...). Children that are strings become text, never HTML. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

export const byId = (id) => document.getElementById(id);

export function readSettings() {
  try {
    return JSON.parse(localStorage.getItem(SETTINGS)) ?? {};
  } catch {
    return {};
  }
}

export function writeSettings(settings) {
  localStorage.setItem(SETTINGS, JSON.stringify(settings));
}

/** Follows the system until one of the two is chosen. */
export function setUpTheme(button) {
  const order = ["system", "light", "dark"];
  const show = () => {
    const theme = readSettings().theme ?? "system";
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
  };
  button.addEventListener("click", () => {
    const theme = readSettings().theme ?? "system";
    writeSettings({ ...readSettings(), theme: order[(order.indexOf(theme) + 1) % order.length] });
    show();
  });
  show();
}

/** A refusal of the server, in its own sentence. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** fetch with the key; ApiError unless the answer is good. Paths are relative, so that a proxy may put the server under any prefix. */
export async function call(path, { body, signal } = {}) {
  const headers = {};
  const { key } = readSettings();
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const method = body === undefined ? "GET" : "POST";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer. Is it running?");
  }
  if (!response.ok) {
    const text = await response.text();
    let message;
    try {
      message = JSON.parse(text).error.message;
    } catch {
      message = text.slice(0, 200) || `The server answered with status ${response.status}.`;
    }
    throw new ApiError(response.status, message);
  }
  return response;
}
