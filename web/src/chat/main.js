// The chat page: one conversation on the screen, one reply at a time.

import "../theme.css";
import "./chat.css";
import { byId, h, readSettings, setUpTheme, writeSettings } from "../shared.js";
import { hasTemplate, listModels, sendFeedback, streamReply } from "./api.js";
import { fillMessage, renderEditor, renderMessage } from "./messages.js";
import { readTokens } from "./probabilities.js";
import { sampling, setUpSettings } from "./settings.js";
import { loadConversations, makeConversation, removeConversation, saveConversation } from "./store.js";

let conversations = loadConversations();
let current = conversations[0] ?? makeConversation();
let running = null; // { conversation, message, controller } of the reply that is being written
let template = true; // whether the model has a chat template
const elements = new Map(); // of the messages on the screen

const [input, scroll, list] = [byId("input"), byId("scroll"), byId("messages")];

// ---- the screen ------------------------------------------------------------------------------------------------------

const actions = {
  get coloured() {
    return Boolean(readSettings().probabilities);
  },
  async copy(text) {
    await navigator.clipboard.writeText(text).then(() => announce("Copied."), () => notice("The browser does not let this page copy."));
  },
  edit(message) {
    if (running) return;
    const element = elements.get(message);
    renderEditor(element, message, (text) => {
      if (text === null || !text.trim()) {
        fillMessage(element, message, actions);
        return input.focus();
      }
      current.messages.splice(current.messages.indexOf(message));
      submit(text);
    });
  },
  regenerate(message) {
    if (running) return;
    current.messages.splice(current.messages.indexOf(message));
    reply();
  },
  async rate(message, rating) {
    try {
      await sendFeedback(message.id, rating);
      message.rating = rating;
      save(current);
      announce("Thank you.");
    } catch (error) {
      notice(error.message);
    }
    fillMessage(elements.get(message), message, actions);
  },
};

function announce(text) {
  byId("live").textContent = text;
}

function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

function show() {
  elements.clear();
  for (const message of current.messages) elements.set(message, renderMessage(message, actions));
  list.replaceChildren(...elements.values());
  byId("empty").hidden = current.messages.length > 0;
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
  showConversations();
  scroll.scrollTop = scroll.scrollHeight;
}

function showConversations() {
  const entries = conversations.map((conversation) => {
    const title = conversation.title || "New conversation";
    const open = h("button", {
      type: "button", class: "open", "aria-current": conversation === current ? "true" : false, onclick: () => choose(conversation),
    }, title);
    const remove = h("button", { type: "button", class: "icon", "aria-label": `Delete “${title}”`, onclick: () => forget(conversation) }, "✕");
    return h("li", {}, open, remove);
  });
  byId("conversations").replaceChildren(...entries);
}

function choose(conversation) {
  current = conversation;
  notice("");
  closeMenu();
  show();
  input.focus();
}

function forget(conversation) {
  if (running?.conversation === conversation) running.controller.abort();
  removeConversation(conversation);
  conversations = conversations.filter((other) => other !== conversation);
  choose(conversation === current ? (conversations[0] ?? makeConversation()) : current);
}

function save(conversation) {
  if (!conversations.includes(conversation)) {
    if (!conversation.messages.length) return;
    conversations.unshift(conversation);
  }
  if (!saveConversation(conversation)) notice("The browser has no room for this conversation; delete an older one.");
}

// ---- a reply -----------------------------------------------------------------------------------------------------------

function submit(text) {
  current.messages.push({ role: "user", content: text });
  reply();
}

/** The messages as the API takes them: what the user and the model said, under the system prompt. */
function messagesToSend(conversation) {
  const { system } = readSettings();
  const said = conversation.messages.filter((message) => message.content && !message.running);
  return [...(system ? [{ role: "system", content: system }] : []), ...said.map(({ role, content }) => ({ role, content }))];
}

async function reply() {
  const conversation = current;
  const model = byId("model").value;
  const message = { role: "assistant", content: "", model, running: true };
  const messages = messagesToSend(conversation);
  conversation.messages.push(message);
  const controller = new AbortController();
  running = { conversation, message, controller };
  notice("");
  save(conversation);
  show();
  announce("The reply begins.");
  const began = performance.now();
  const since = () => (performance.now() - began) / 1000;
  const content = [];
  let painting = 0;
  const paint = () => {
    painting = 0;
    const element = elements.get(message);
    if (!element) return; // another conversation is on the screen
    const follow = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
    fillMessage(element, message, actions);
    if (follow) scroll.scrollTop = scroll.scrollHeight;
  };
  try {
    const options = { model, messages, template, sampling: sampling(), probabilities: actions.coloured, signal: controller.signal };
    for await (const part of streamReply(options)) {
      if (part.text) {
        message.first ??= since();
        message.content += part.text;
        message.count = (message.count ?? 0) + 1; // until the server says how many
      }
      content.push(...part.tokens);
      message.id = part.id;
      if (part.reason === "length") message.note = "Cut off at the maximum number of tokens.";
      if (part.usage) [message.promptTokens, message.count] = [part.usage.prompt_tokens, part.usage.completion_tokens];
      painting ||= setTimeout(paint, message.content.length > 10_000 ? 200 : 30);
    }
    if (!message.content) message.note = "The reply is empty.";
  } catch (error) {
    const stopped = error.name === "AbortError";
    Object.assign(message, { failed: !stopped, note: stopped ? "Stopped." : error.message });
  }
  clearTimeout(painting);
  message.running = false;
  message.seconds = since();
  message.tokens = readTokens(content, message.content);
  running = null;
  if (conversation.messages.includes(message)) save(conversation);
  show();
  announce(message.note ?? `The reply has ended, with ${message.count} tokens.`);
  if (document.activeElement === document.body) input.focus();
}

// ---- models ------------------------------------------------------------------------------------------------------------

async function loadModels() {
  const [select, before] = [byId("model"), readSettings().model];
  try {
    const names = await listModels();
    select.replaceChildren(...names.map((name) => h("option", { value: name, selected: name === before }, name)));
    select.disabled = names.length === 0;
    notice(names.length ? "" : "No model here writes text; the server has encoders only.");
    await modelChanged();
  } catch (error) {
    notice(error.status === 401 ? "This server needs an API key: enter it under Settings." : error.message);
    return;
  }
}

async function modelChanged() {
  const name = byId("model").value;
  if (!name) return;
  writeSettings({ ...readSettings(), model: name });
  try {
    template = await hasTemplate(name);
    byId("about-model").textContent = template ? name : `${name} has no chat template: it continues your text.`;
    byId("probabilities").disabled = !template;
    byId("health").textContent = "";
  } catch (error) {
    if (error.status !== 503) throw error;
    byId("health").textContent = "The model is being loaded …";
    setTimeout(() => modelChanged().catch((failure) => notice(failure.message)), 1000);
  }
}

// ---- keys and buttons --------------------------------------------------------------------------------------------------

function closeMenu() {
  document.body.classList.remove("menu");
  byId("menu").setAttribute("aria-expanded", "false");
}

function grow() {
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, 240)}px`;
}

function showProbabilities() {
  byId("probabilities").setAttribute("aria-pressed", String(actions.coloured));
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = input.value;
  if (!text.trim() || running || byId("model").disabled) return;
  input.value = "";
  grow();
  submit(text);
});
input.addEventListener("input", grow);
input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("composer").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || byId("settings").open) return;
  if (document.body.classList.contains("menu")) closeMenu();
  else running?.controller.abort();
});
byId("stop").addEventListener("click", () => {
  running?.controller.abort();
  input.focus();
});
byId("new").addEventListener("click", () => choose(makeConversation()));
byId("model").addEventListener("change", () => modelChanged().catch((error) => notice(error.message)));
byId("menu").addEventListener("click", () => {
  const open = document.body.classList.toggle("menu");
  byId("menu").setAttribute("aria-expanded", String(open));
  if (open) byId("new").focus();
});
byId("shade").addEventListener("click", closeMenu);
byId("probabilities").addEventListener("click", () => {
  writeSettings({ ...readSettings(), probabilities: !actions.coloured });
  showProbabilities();
  const known = current.messages.some((message) => message.tokens?.length);
  if (actions.coloured && !known) announce("The next reply will have its tokens coloured by their probability.");
  show();
});
window.addEventListener("pagehide", () => {
  if (!running) return;
  Object.assign(running.message, { running: false, note: "The page was left before the reply ended." });
  save(running.conversation);
});

setUpTheme(byId("theme"));
setUpSettings({
  onKey: loadModels,
  onForget() {
    running?.controller.abort();
    conversations.forEach(removeConversation);
    conversations = [];
    byId("settings").close();
    choose(makeConversation());
  },
});
showProbabilities();
show();
input.focus();
loadModels();
