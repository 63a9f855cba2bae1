// What programs do with OpenAI's client, against the server whose address is given; the findings are one JSON object on stdout.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "unused", maxRetries: 0 });
const tool = JSON.parse(process.argv[3]);
const messages = [{ role: "user", content: "naïve" }];
const found = {};

found.models = (await client.models.list()).data.map((model) => model.id);

const whole = await client.chat.completions.create({ model: "toy", messages, max_tokens: 20, seed: 2 });
found.content = whole.choices[0].message.content;
found.usage = whole.usage.total_tokens;

const stream = await client.chat.completions.create({
  model: "toy", messages, max_tokens: 20, seed: 2, stream: true, stream_options: { include_usage: true },
});
found.deltas = "";
for await (const chunk of stream) {
  found.deltas += chunk.choices[0]?.delta.content ?? "";
  found.streamedUsage = chunk.usage?.total_tokens ?? found.streamedUsage;
}

const completion = { model: "toy", prompt: "the quick", max_tokens: 10, seed: 2 };
found.completion = (await client.completions.create(completion)).choices[0].text;
found.completionDeltas = "";
for await (const chunk of await client.completions.create({ ...completion, stream: true })) {
  found.completionDeltas += chunk.choices[0].text;
}

const called = { model: "toy", messages, tools: [tool], tool_choice: "required", seed: 3 };
found.call = (await client.chat.completions.create(called)).choices[0].message.tool_calls[0].function;
const runner = client.chat.completions.stream(called); // puts the pieces together itself
found.streamedCall = (await runner.finalChatCompletion()).choices[0].message.tool_calls[0].function;

const input = { model: "toy", input: "naïve", max_output_tokens: 12, temperature: 0 };
found.response = (await client.responses.create(input)).output_text;
found.responseDeltas = "";
for await (const event of await client.responses.create({ ...input, stream: true })) {
  if (event.type === "response.output_text.delta") found.responseDeltas += event.delta;
}

// The client asks for base64 when the caller names no format.
found.embedding = (await client.embeddings.create({ model: "embed", input: "ada" })).data[0].embedding;
found.floats = (await client.embeddings.create({ model: "embed", input: "ada", encoding_format: "float" })).data[0].embedding;

const fault = async (make) => {
  try {
    await make();
  } catch (error) {
    return { kind: error.constructor.name, status: error.status, param: error.param, code: error.code, message: error.message };
  }
};
found.unknown = await fault(() => client.completions.create({ ...completion, model: "gpt-3" }));
found.refused = await fault(() => client.completions.create({ ...completion, temperature: -1 }));
found.long = await fault(() => client.completions.create({ ...completion, prompt: Array(9000).fill(5) }));

// A stream that the program leaves: the client aborts the request.
for await (const chunk of await client.completions.create({ ...completion, max_tokens: 1500, ignore_eos: true, stream: true })) {
  found.left = chunk.id;
  break;
}
console.log(JSON.stringify(found));
