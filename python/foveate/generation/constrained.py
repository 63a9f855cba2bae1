"""Output that follows a JSON schema or a regular expression, by llguidance: which tokens may come next, as a mask."""

from __future__ import annotations

import copy
import json
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.files.locked import locked
from foveate.generation.detokenizer import special_ids
from foveate.generation.params import SamplingParams

_BEFORE = "\x02"  # a character that no token of several characters begins with or contains
_KEPT = 32  # grammars that are not compiled again


class GrammarCompiler:
    """Grammars for one tokenizer; vocab_size: columns of the model's logits, at least the tokenizer's ids."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._vocabulary: Any = (
            None  # llguidance's form of the tokenizer: takes a second, so it waits for the first grammar
        )
        self._compiled: OrderedDict[str, Grammar] = OrderedDict()  # the latest last
        self.lock = threading.RLock()

    @locked
    def compile(self, params: SamplingParams) -> Grammar | None:
        """None for parameters without a grammar. ValueError for a schema or expression that llguidance refuses, with its reason."""
        if params.json_schema is None and params.regex is None:
            return None
        try:
            import llguidance
        except ImportError as error:
            raise ImportError(
                'json_schema and regex need llguidance, which is not installed: pip install "foveate[constrained]"'
            ) from error
        if self._tokenizer is None:
            raise ValueError("json_schema and regex need a tokenizer, and this model has none")
        matcher = llguidance.LLMatcher
        if params.regex is not None:
            kind, grammar = "regex", matcher.grammar_from_regex(ascii_digits(params.regex))
        else:
            schema = params.json_schema if isinstance(params.json_schema, str) else json.dumps(params.json_schema)
            # Spaces as json.dumps writes them: free ones let a weak model add them for ever.
            style: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
            kind, grammar = "json_schema", matcher.grammar_from_json_schema(schema, overrides=style)
        if grammar in self._compiled:
            self._compiled.move_to_end(grammar)
            return self._compiled[grammar]
        if self._vocabulary is None:
            self._vocabulary = llguidance.LLTokenizer(
                llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size)),
                n_vocab=self._vocab_size,
                eos_token=sorted(self._tokenizer.eos_ids) or None,
            )
        wrong, messages = matcher.validate_grammar_with_warnings(grammar, self._vocabulary)
        if wrong:
            raise ValueError(f"{kind} cannot be followed: {messages[0]}")
        compiled = self._compiled[grammar] = Grammar(matcher(self._vocabulary, grammar), self._vocab_size)
        if len(self._compiled) > _KEPT:
            self._compiled.popitem(last=False)
        return compiled


class _Vocabulary:
    """What llguidance asks of a tokenizer. A text that looks like a special token is made of the tokens of its characters."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        special = special_ids(tokenizer)
        self._backend = copy.deepcopy(tokenizer.backend)
        self._backend.encode_special_tokens = True
        self.tokens = [
            b"\xff<[%d]>" % token
            if token in special or tokenizer.backend.id_to_token(token) is None
            else tokenizer.id_to_bytes(token)
            for token in range(vocab_size)
        ]
        self.special_token_ids = sorted(token for token in special if token < vocab_size)
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = min(tokenizer.eos_ids, default=0)

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        before = self._encode(_BEFORE)
        ids = self._encode(_BEFORE + text)
        # SentencePiece puts a space before a text, which does not belong to what continues one
        return ids[len(before) :] if ids[: len(before)] == before else self._encode(text)

    def _encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids


def ascii_digits(regex: str) -> str:
    """The expression with \\d as [0-9] and \\D as [^0-9], as in JSON Schema: Unicode has some 700 others, which few readers expect."""
    written, inside, at = "", False, 0
    while at < len(regex):
        two = regex[at : at + 2]
        if two[0] == "\\":
            digits = {"\\d": "0-9" if inside else "[0-9]", "\\D": two if inside else "[^0-9]"}
            written += digits.get(two, two)
            at += len(two)
            continue
        inside = two[0] == "[" or (inside and two[0] != "]")
        written += two[0]
        at += 1
    return written


class Grammar:
    """A compiled grammar; each sample follows it with a matcher of its own."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def matcher(self) -> Matcher:
        return Matcher(self._matcher.deep_copy(), self._vocab_size)


class Matcher:
    """One sample's place in a grammar. error: None, or why llguidance gave up, such as a grammar that grew beyond its limits."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._bits = np.zeros((vocab_size + 31) // 32, dtype=np.int32)
        self.error: str | None = None

    def allowed(self) -> Tensor:
        """bool [vocab], True for the tokens that may come next; for all of them after an error, which `consume` then reports."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            return torch.ones(self._vocab_size, dtype=torch.bool)
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._vocab_size]
        return torch.from_numpy(bits).bool()

    def consume(self, token: int) -> bool:
        """Goes on by a token; True if the output is complete and nothing may follow. Sets `error`."""
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]  # what follows is a dump of the parser
            self.error = f"the grammar cannot be followed any further: {reason}"
            return False
        return self._matcher.is_stopped()
