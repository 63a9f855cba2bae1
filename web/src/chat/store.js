// Conversations, each an entry of this browser's local storage; nothing of them is anywhere else.

const PREFIX = "foveate.conversation.";

export function makeConversation() {
  return { id: crypto.randomUUID?.() ?? String(Date.now() + Math.random()), title: "", updated: Date.now(), messages: [] };
}

/** The latest first. */
export function loadConversations() {
  const found = [];
  for (let i = 0; i < localStorage.length; i++) {
    const name = localStorage.key(i);
    if (!name.startsWith(PREFIX)) continue;
    try {
      const conversation = JSON.parse(localStorage.getItem(name));
      if (Array.isArray(conversation.messages)) found.push(conversation);
    } catch {
      localStorage.removeItem(name); // cut off by an older browser
    }
  }
  return found.sort((a, b) => b.updated - a.updated);
}

/** False when the browser has no room left. Tokens with their probabilities are kept for the page's life only. */
export function saveConversation(conversation) {
  const { messages } = conversation;
  const title = messages.find((message) => message.role === "user")?.content.trim().slice(0, 60) ?? "";
  Object.assign(conversation, { title, updated: Date.now() });
  const kept = messages.map(({ tokens, ...message }) => message);
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify({ ...conversation, messages: kept }));
    return true;
  } catch {
    return false;
  }
}

export function removeConversation(conversation) {
  localStorage.removeItem(PREFIX + conversation.id);
}
