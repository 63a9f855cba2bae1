import assert from "node:assert/strict";
import { test } from "node:test";
import { events } from "../src/chat/api.js";
import { readTokens } from "../src/chat/probabilities.js";

/** A response that brings these bytes in pieces of `size`. */
function response(text, size) {
  const bytes = new TextEncoder().encode(text);
  const body = new ReadableStream({
    start(controller) {
      for (let i = 0; i < bytes.length; i += size) controller.enqueue(bytes.slice(i, i + size));
      controller.close();
    },
  });
  return { body };
}

async function all(text, size) {
  const found = [];
  for await (const event of events(response(text, size))) found.push(event);
  return found;
}

test("events are the same however the bytes are cut, and comments are skipped", async () => {
  const text = ': keep-alive\n\ndata: {"a": "é😀"}\n\ndata: {"a": "data: \\n\\n"}\n\ndata: [DONE]\n\ndata: {"late": 1}\n\n';
  for (let size = 1; size < text.length; size++) assert.deepEqual(await all(text, size), [{ a: "é😀" }, { a: "data: \n\n" }]);
});

test("an error within a stream, and a stream that is cut off, are errors", async () => {
  await assert.rejects(all('data: {"error": {"message": "the engine failed"}}\n\n', 9), /the engine failed/);
  await assert.rejects(all('data: {"a": 1}\n\n', 9), /ended before the reply did/);
});

test("a character that spans tokens stands with the last of them, and what follows the reply is left out", () => {
  const token = (bytes) => ({ token: "?", bytes, logprob: -1, top_logprobs: [] });
  const found = readTokens([token([0x61]), token([0xf0, 0x9f]), token([0x98, 0x80]), token([0x3c, 0x7c])], "a😀");
  assert.deepEqual(found.map(({ text }) => text), ["a", "", "😀"]);
});
