"""foveate.inspect.Inspector: what a model does with a text, and what its output rests on."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from foveate.inspect.attribution import Score, Subject, attribute
from foveate.inspect.forward import CHUNK, Pass
from foveate.inspect.parts import parts_of
from foveate.inspect.results import Inspection
from foveate.inspect.texts import token_texts
from foveate.inspect.wanted import MAX_WEIGHTS, places, wanted
from foveate.models import Checkpoint, load_model, open_checkpoint
from foveate.pipelines import QuestionAnswerer
from foveate.tokenizer import Tokenizer

if TYPE_CHECKING:
    from foveate.generation.llm import LLM
    from foveate.pipelines import Embedder, FillMask, TextClassifier

METHODS = ("gradient x input", "integrated gradients")


class Inspector:
    """Looks into a causal model (Llama's family, GPT-2) or an encoder (BERT's family, ModernBERT).

        inspector = Inspector("path/to/model")
        found = inspector.inspect("The capital of France is", rows=[-1], lens_top=3)
        found.attention          # fp32 [layers, heads, 1, tokens]
        found.to_html("page.html")

    source: what `load_model` takes (a Hugging Face folder, a .gguf file, an installed package's name); a model of foveate.models with
    tokenizer=; or an LLM or a pipeline that is there already, whose weights are then not loaded twice. labels: names of the classes of
    a model that was passed. Nothing is recorded but in its own calls; a model that generates at the same time is not slowed down.
    """

    def __init__(
        self,
        source: str | Path | Checkpoint | nn.Module | LLM | QuestionAnswerer | TextClassifier | FillMask | Embedder,
        tokenizer: Tokenizer | None = None,
        *,
        labels: Sequence[str] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        quantization: str | None = None,
        progress: bool | None = None,
    ) -> None:
        self._lock: Any = contextlib.nullcontext()
        config: dict[str, Any] = {}
        self._owned = isinstance(source, (str, Path, Checkpoint))
        if isinstance(source, (str, Path, Checkpoint)):
            checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
            config = checkpoint.config
            model: Any = load_model(
                checkpoint, device=device, dtype=dtype, quantization=quantization, progress=progress
            )
            tokenizer = tokenizer or checkpoint.tokenizer()
        elif isinstance(source, nn.Module):
            model = source
        else:
            model, tokenizer = source.model, tokenizer or source.tokenizer
            labels = labels or getattr(source, "labels", None)
            engine = getattr(source, "engine", None)
            if engine is not None:
                self._lock = engine.lock
        self.parts = parts_of(model)
        self.model, self.tokenizer = self.parts.model.eval(), tokenizer
        if labels is None and self.parts.kind == "classes":
            known = config.get("id2label") or {}
            labels = [str(known.get(str(i), f"LABEL_{i}")) for i in range(self.model.config.num_labels)]
        self.labels = list(labels or ())

    def inspect(
        self,
        text: str | Sequence[int],
        text_pair: str | None = None,
        *,
        attention: bool = True,
        layers: int | Sequence[int] | None = None,
        heads: int | Sequence[int] | None = None,
        rows: int | Sequence[int] | None = None,
        lens_top: int | None = None,
        choices: bool | None = None,
        top: int = 5,
        rollout: bool = False,
        max_weights: int = MAX_WEIGHTS,
    ) -> Inspection:
        """One forward pass over the text, or token ids, or for encoders a pair of texts, and what was asked for of it.

        attention: the weights of `layers` and `heads` (None: all) for the tokens `rows` (None: the last 32), negative ones count from
        the end. rollout: of the same rows, over all layers (`foveate.inspect.rollout`); it keeps q and k of all layers meanwhile.
        lens_top: so many most probable tokens of each layer's stream at these rows (None: 3 where the model has a vocabulary, else 0).
        choices: each token's log-probability, rank and entropy and its `top` alternatives; of a masked language model the
        distribution at the token itself, which it sees. A causal model runs in chunks of 512 tokens.

        ValueError for a text without tokens or longer than the model's positions, for places that there are not, for more than
        max_weights numbers of attention, and for a lens into a model without a language-model head.
        """
        ids, types = self._encode(text, text_pair)
        vocabulary = self.parts.has_vocabulary
        asked = wanted(
            self.parts, len(ids), attention=attention, layers=layers, heads=heads, rows=rows,
            lens_top=(3 if vocabulary else 0) if lens_top is None else lens_top, top=top,
            choices=vocabulary if choices is None else choices, rollout=rollout, max_weights=max_weights,
        )  # fmt: skip
        with self._lock:
            if self._owned:  # RoPE with factors for short and for long texts; those of an LLM are its own affair
                getattr(self.model, "set_context", lambda length: None)(len(ids))
            run = Pass(self.parts, ids, asked, self.texts, types=types, chunk=CHUNK)
            while not run.step():
                pass
            return run.result()

    def attribute(
        self,
        text: str | Sequence[int],
        text_pair: str | None = None,
        *,
        method: str = "gradient x input",
        target: str | int | None = None,
        row: int = -1,
        steps: int = 32,
        baseline: str | int | torch.Tensor | None = None,
    ) -> Inspection:
        """How much each token adds to a score: attributions of `Inspection`.

        target: of a language model the token (text or id) whose logit at `row` is the score, None for the most probable one; of a
        classifier the class (name or number), None for the most probable one. A model for question answering: text is the question,
        text_pair the context, and two scores are attributed, the logits of the best answer's start and end.
        method: "gradient x input", or "integrated gradients" from a baseline in `steps` steps; `gap` says how far its sum is from the
        difference of the scores. baseline: None for the mean of all embeddings, a token (text or id) whose embedding stands at every
        place, or embeddings [size] or [tokens, size] (zeros are a bad choice for models with RMSNorm, which jumps there). With packed
        weights in blocks the gradient is that of the weights' values, as if activations were not rounded.
        """
        if method not in METHODS:
            raise ValueError(f"method={method!r} is not one of {', '.join(map(repr, METHODS))}")
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 4096:
            raise ValueError(f"steps={steps!r} must be an integer from 1 to 4096")
        if baseline is not None and method == METHODS[0]:
            raise ValueError(f"baseline={baseline!r} belongs to the method 'integrated gradients'; leave it out")
        result: dict[str, Any] | None = None
        with self._lock:
            if self.parts.kind == "answers":
                subject, scores, result = self._answer(text, text_pair)
            else:
                subject, scores = self.subject(text, text_pair, target=target, row=row)
            base = baseline if isinstance(baseline, torch.Tensor) else None
            if baseline is not None and not isinstance(baseline, torch.Tensor):
                token = torch.tensor(self._token(baseline, "baseline"), device=subject.embeddings().device)
                with torch.no_grad():
                    base = self.parts.embedding(token)
            attributions = attribute(subject, scores, method, steps, base)
        ids = subject.ids
        return Inspection(type(self.model).__name__, ids, self.texts(ids), attributions=attributions, result=result)

    def subject(
        self, text: str | Sequence[int], text_pair: str | None = None, *, target: str | int | None = None, row: int = -1
    ) -> tuple[Subject, list[tuple[str, Score]]]:
        """What `attribute` differentiates: the text before the model, and each score with its name."""
        kind = self.parts.kind
        if kind == "answers":
            return self._answer(text, text_pair)[:2]
        ids, types = self._encode(text, text_pair)
        subject = Subject(self.parts, ids, types)
        if kind == "encoder" or not (self.parts.has_vocabulary or kind == "classes"):
            raise ValueError(
                f"a {type(self.model).__name__} has no head that gives a score, so there is nothing to attribute; take a model for "
                "text, classes or answers"
            )
        with torch.no_grad():
            outputs = subject.outputs(subject.embeddings())
        if kind == "classes":
            chosen = int(outputs[0].argmax()) if target is None else self._class(target)
            return subject, [(f"logit of {self.labels[chosen]}", lambda out: out[:, chosen])]
        (place,) = places("row", "tokens", row, len(ids))

        def logits(hidden: Any) -> Any:
            return self.model.logits(hidden[:, place])

        with torch.no_grad():
            token = int(logits(outputs)[0].argmax()) if target is None else self._token(target, "target")
        name = f"logit of {self.texts([token])[0]!r} at token {place}"
        return subject, [(name, lambda out: logits(out)[:, token])]

    def texts(self, ids: Sequence[int]) -> list[str]:
        """Each token by itself, with the space before it where it has one."""
        return token_texts(self.tokenizer, ids)

    def _encode(self, text: str | Sequence[int], text_pair: str | None) -> tuple[list[int], list[int] | None]:
        if text_pair is not None and self.parts.kind == "causal":
            raise ValueError("text_pair is for encoders, which read two texts; a causal model takes one")
        types = None
        if isinstance(text, str):
            if self.tokenizer is None:
                raise ValueError("there is no tokenizer; pass tokenizer=, or token ids instead of a text")
            if self.parts.kind == "causal":
                ids = self.tokenizer.encode(text)
            else:
                pair = (text,) if text_pair is None else (text, text_pair)
                encoding = self.tokenizer.backend.encode(*pair)
                ids, types = encoding.ids, encoding.type_ids
        else:
            if text_pair is not None:
                raise ValueError("text_pair goes with a text, not with token ids; join the ids yourself")
            ids = [int(token) for token in text]
            vocab = self.model.config.vocab_size
            wrong = next((token for token in ids if not 0 <= token < vocab), None)
            if wrong is not None:
                raise ValueError(f"the text has the token id {wrong}; this model's ids go from 0 to {vocab - 1}")
        if not ids:
            raise ValueError("the text has no tokens; there is nothing to look at")
        return ids, types

    def _token(self, given: str | int, name: str) -> int:
        vocab = self.model.config.vocab_size
        if isinstance(given, int) and not isinstance(given, bool):
            if not 0 <= given < vocab:
                raise ValueError(f"{name}={given} is no token id; this model's ids go from 0 to {vocab - 1}")
            return given
        if not isinstance(given, str) or self.tokenizer is None:
            raise TypeError(f"{name}={given!r} must be a token id" + ("" if self.tokenizer is None else " or a text"))
        known = self.tokenizer.backend.token_to_id(given)
        if known is not None:
            return known
        ids = self.tokenizer.encode(given, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"{name}={given!r} is {len(ids)} tokens, {self.texts(ids)}; give one of them (a space before a word counts)"
            )
        return ids[0]

    def _class(self, target: str | int) -> int:
        if isinstance(target, str) and target in self.labels:
            return self.labels.index(target)
        if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(self.labels):
            return target
        raise ValueError(
            f"target={target!r} is no class of this model; there are {', '.join(map(repr, self.labels))}, by name or number"
        )

    def _answer(self, question: Any, context: str | None) -> tuple[Subject, list[tuple[str, Score]], dict[str, Any]]:
        if not isinstance(question, str) or not isinstance(context, str):
            raise ValueError("a model for question answering takes two texts: the question, and the context")
        if self.tokenizer is None:
            raise ValueError("there is no tokenizer; pass tokenizer=")
        answerer = QuestionAnswerer(self.model, self.tokenizer)
        window = answerer.best_window(question, context)
        subject = Subject(self.parts, window.ids, window.types)
        start, end = window.start, window.end
        text = self.texts(window.ids)
        scores: list[tuple[str, Score]] = [
            (f"logit of the start at token {start} ({text[start].strip()!r})", lambda out: out[0][:, start]),
            (f"logit of the end at token {end} ({text[end].strip()!r})", lambda out: out[1][:, end]),
        ]
        return subject, scores, window.answer
