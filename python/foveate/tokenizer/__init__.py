"""Tokenizer: a `tokenizers.Tokenizer` with what generation needs: special ids, the bytes of a token, the chat template."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from foveate.files.checked import is_there, library_errors
from foveate.tokenizer.chat_template import render

NEED = 'is not installed: pip install "foveate[models]"'
_HERE = "\u2402goes on here\u2402"  # marks the end of a message that is to be continued


class Tokenizer:
    """backend: the tokenizers.Tokenizer, whose padding and truncation are switched off.

    bos_id, pad_id: int | None. eos_ids: the ids that end a text, of generation_config, config and tokenizer_config together.
    special: the text of each special token, {"bos_token": "<s>", ...}, as chat templates use them; one that tokenizer_config has as null
    is not there.
    """

    def __init__(
        self,
        backend: Any,
        *,
        config: dict[str, Any] | None = None,
        generation_config: dict[str, Any] | None = None,
        tokenizer_config: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.backend = backend
        backend.no_padding()
        backend.no_truncation()
        self.chat_template = chat_template
        self.special = {key: _text(value) for key, value in (tokenizer_config or {}).items() if _is_token(key, value)}
        self._configs = (generation_config or {}, config or {})
        ends = self._ends()
        self.eos_ids = set(ends)
        bos, pad = self._special_id("bos"), self._special_id("pad")
        self.bos_id: int | None = bos if isinstance(bos, int) else None
        self.pad_id: int | None = pad if isinstance(pad, int) else None
        for key, token in (("bos_token", self.bos_id), ("eos_token", ends[0] if ends else None)):
            if key not in (tokenizer_config or {}) and token is not None:
                self.special[key] = backend.id_to_token(token) or ""

    @classmethod
    def from_file(cls, file: Path, **options: Any) -> Tokenizer:
        """From a tokenizer.json."""
        return cls(read_backend(file), **options)

    def _ends(self) -> list[int]:
        """A chat model whose turn's end only one of the files names would go on for ever by the others."""
        ends: list[int] = []
        for config in self._configs:
            named = config.get("eos_token_id")
            ends += [named] if isinstance(named, int) else named or []
        text = self.special.get("eos_token")
        if text is not None and (token := self.backend.token_to_id(text)) is not None:
            ends.append(token)
        return [token for token in dict.fromkeys(ends) if token != -1]

    def _special_id(self, name: str) -> int | list[int] | None:
        for config in self._configs:
            if config.get(f"{name}_token_id") not in (None, -1):  # -1: none, in older files of transformers
                return config[f"{name}_token_id"]
        text = self.special.get(f"{name}_token")
        return None if text is None else self.backend.token_to_id(text)

    @property
    def vocab_size(self) -> int:
        """Added tokens included. A model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Special tokens written in the text become their ids. add_special_tokens: those that the model's post-processor adds."""
        if not isinstance(text, str):
            raise TypeError(f"encode takes a str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has the lone surrogate {text[error.start]!r} at character {error.start}, no Unicode text; it comes from "
                "bytes that are not UTF-8: decode them with their own encoding"
            ) from None
        with library_errors(f"the tokenizer cannot encode {text[:40]!r}"):
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Bytes that are no UTF-8 become U+FFFD, those around them stay: SentencePiece's decoder would replace the whole run of bytes."""
        with library_errors(f"the tokenizer cannot decode {len(ids)} ids"):
            text = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        if "\ufffd" not in text or self._byte_kind != "pieces":
            return text
        skipped = {token for token, entry in self._added.items() if entry.special} if skip_special_tokens else set()
        known = [token for token in ids if token not in skipped and self.backend.id_to_token(token) is not None]
        whole = b"".join(self.id_to_bytes(token) for token in known).decode("utf-8", "replace")
        return whole if text.startswith(" ") else whole.removeprefix(" ")

    @functools.cached_property
    def _added(self) -> dict[int, Any]:
        return self.backend.get_added_tokens_decoder()

    @functools.cached_property
    def _byte_kind(self) -> str:
        """How tokens spell bytes, as the decoder says: "bytes" (byte-level BPE), "wordpiece", or "pieces" (SentencePiece)."""
        decoder = self.backend.decoder
        state = "" if decoder is None else decoder.__getstate__().decode()
        kinds = set(re.findall(r'"type":\s*"(\w+)"', state))
        if "ByteLevel" in kinds:
            return "bytes"
        return "wordpiece" if "WordPiece" in kinds else "pieces"

    def id_to_bytes(self, token: int) -> bytes:
        """The bytes that the token adds to a text; may be part of a UTF-8 character. Added tokens, special ones too: their text.

        ValueError for an id that the tokenizer does not have.
        """
        data = self._bytes.get(token)
        if data is None:
            data = self._bytes[token] = self._bytes_of(token)
        return data

    @functools.cached_property
    def _bytes(self) -> dict[int, bytes]:
        """What `id_to_bytes` has found."""
        return {}

    def _bytes_of(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].content.encode()
        text = self.backend.id_to_token(token)
        if text is None:
            raise ValueError(f"the token {token} is not in the vocabulary of {self.vocab_size}")
        if self._byte_kind == "bytes":
            table = _byte_of_character()
            return bytes(table[c] for c in text) if all(c in table for c in text) else text.encode()
        if self._byte_kind == "wordpiece":
            return (text[2:] if text.startswith("##") else " " + text).encode()
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", text):
            return bytes([int(match[1], 16)])
        return text.replace("\u2581", " ").encode()

    def apply_chat_template(
        self,
        messages: Iterable[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for messages [{"role": ..., "content": ...}], by the checkpoint's Jinja template, rendered in a sandbox in a
        process of its own, within 2 s of the processor and 256 MB (`foveate.tokenizer.chat_template`).

        variables are passed to the template, e.g. tools=[...] or enable_thinking=False; tools and documents are None where they are not
        given. continue_final_message: the prompt ends within the last message, which the model is to go on with; needs
        add_generation_prompt=False. chat_template: in place of the checkpoint's. ValueError without a template, or with what it refuses.
        """
        template = chat_template or self.chat_template
        if template is None:
            raise ValueError("this checkpoint has no chat template; write the prompt yourself and use generate")
        if importlib.util.find_spec("jinja2") is None:
            raise ImportError(f"jinja2 {NEED}")
        conversation = [dict(message) for message in messages]
        if continue_final_message:
            if add_generation_prompt:
                raise ValueError(
                    "continue_final_message goes on with the last message; pass add_generation_prompt=False with it"
                )
            if not conversation or not isinstance(conversation[-1].get("content"), str):
                raise ValueError("continue_final_message needs a last message whose content is a text")
            conversation[-1]["content"] += _HERE + " "
        values = {
            "tools": None, "documents": None, **self.special, "add_generation_prompt": add_generation_prompt, **variables,
        }  # fmt: skip
        prompt = render(template, {"messages": conversation, **values})
        return _until_here(prompt) if continue_final_message else prompt


def _until_here(prompt: str) -> str:
    """What stands before the mark; where the template has trimmed the message, which took the space after it, its end is trimmed too."""
    at = prompt.rfind(_HERE)
    if at < 0:
        raise ValueError("the chat template changes or drops the last message, so it cannot be continued")
    return prompt[:at] if prompt.startswith(_HERE + " ", at) else prompt[:at].rstrip()


def read_backend(file: Path) -> Any:
    """The tokenizers.Tokenizer of a tokenizer.json."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"tokenizers {NEED}") from error
    if not is_there(file):
        raise FileNotFoundError(f"{file} is not there")
    with library_errors(f"{file} is not a tokenizer that the tokenizers library can read"):
        return tokenizers.Tokenizer.from_file(str(file))


def _is_token(key: str, value: Any) -> bool:
    return key.endswith("_token") and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))


def _text(value: str | dict[str, Any]) -> str:
    return value if isinstance(value, str) else value["content"]


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes the printable Latin-1 bytes as themselves and the other 68 as the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
