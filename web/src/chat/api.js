// The requests of the chat: models, streamed replies, feedback.

import { ApiError, call } from "../shared.js";

/** Those that write text; encoders have no length of context. */
export async function listModels() {
  const { data } = await (await call("v1/models")).json();
  return data.filter((model) => model.max_model_len !== null).map((model) => model.id);
}

/** Whether the model was made for conversations; without a template it continues text. */
export async function hasTemplate(model) {
  const found = await (await call(`tokenizer_info?model=${encodeURIComponent(model)}`)).json();
  return Boolean(found.chat_template);
}

export async function sendFeedback(id, rating) {
  await call("v1/feedback", { body: { id, rating } });
}

/** The data of server-sent events, parsed, until [DONE]. ApiError for an error within the stream. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError(0, "The connection ended before the reply did.");
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      if (!block.startsWith("data: ")) continue; // a comment that keeps the connection open
      if (block === "data: [DONE]") return;
      const event = JSON.parse(block.slice(6));
      if (event.error) throw new ApiError(0, event.error.message);
      yield event;
    }
  }
}

/** What of a reply is new: { id, text, tokens, reason, usage }, each where the server says it. */
export async function* streamReply({ model, messages, template, sampling, probabilities, signal }) {
  const body = { model, stream: true, stream_options: { include_usage: true }, ...sampling };
  if (template) {
    Object.assign(body, { messages }, probabilities ? { logprobs: true, top_logprobs: 5 } : {});
  } else {
    body.prompt = messages.map((message) => message.content).join("");
    body.max_tokens ??= 200;
  }
  const path = template ? "v1/chat/completions" : "v1/completions";
  for await (const event of events(await call(path, { body, signal }))) {
    const [choice] = event.choices;
    yield {
      id: event.id,
      text: choice?.delta?.content ?? choice?.text ?? "",
      tokens: choice?.logprobs?.content ?? [],
      reason: choice?.finish_reason,
      usage: event.usage,
    };
  }
}
