"""Text2Text: text in, text out with an encoder-decoder (T5): greedy, sampled, or by beam search."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.generation import repetition
from foveate.generation.beam import BeamSearch, Hypothesis
from foveate.generation.detokenizer import Detokenizer
from foveate.generation.params import SamplingParams
from foveate.generation.sampler import Row, sample
from foveate.generation.stops import StopStrings
from foveate.models import load_model, open_checkpoint
from foveate.models.registry import model_types
from foveate.models.t5 import T5, T5Cache
from foveate.pipelines.encoder import as_texts
from foveate.tokenizer import Tokenizer


@dataclass(frozen=True)
class Text2TextParams:
    """How outputs are made; ValueError for values out of range and options that contradict each other.

    temperature 0 is greedy; above it, ids are drawn from the top_k most probable (0: all) within the nucleus top_p; seed: the same
    draws each time. num_beams > 1: beam search as in transformers' generate, with score = sum of log-probabilities /
    length ** length_penalty and early_stopping True, False or "never" (see BeamSearch). num_return_sequences: outputs for each source,
    the best beams or independent samples. min_new_tokens: no end before. repetition_penalty r: logits (of beams, log-probabilities) of
    tokens that have come are divided by r if positive and multiplied if negative. no_repeat_ngram_size: no n-gram comes twice; 0: off.
    stop: texts that end an output; they are not part of it.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, least in {
            "num_beams": 1,
            "num_return_sequences": 1,
            "min_new_tokens": 0,
            "no_repeat_ngram_size": 0,
        }.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be {least} or more")
        self.sampling()  # checks the others
        if self.num_beams > 1 and self.temperature != 0:
            raise ValueError(
                f"num_beams={self.num_beams} searches and temperature={self.temperature} draws; choose one of them"
            )
        most = self.num_beams if self.temperature == 0 else self.num_return_sequences
        if self.num_return_sequences > most:
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} needs as many beams, or a temperature: num_beams={self.num_beams}, "
                f"temperature={self.temperature}"
            )

    def sampling(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_new_tokens, min_tokens=self.min_new_tokens, temperature=self.temperature, top_k=self.top_k,
            top_p=self.top_p, seed=self.seed, repetition_penalty=self.repetition_penalty, stop=list(self.stop) or None,
        )  # fmt: skip


def default_params(generation_config: dict[str, Any]) -> Text2TextParams:
    """Those of a generation_config.json; max_length and min_length there count the decoder's first token."""
    names = {field.name for field in dataclasses.fields(Text2TextParams)} - {
        "seed",
        "stop",
        "temperature",
        "top_k",
        "top_p",
    }
    found = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
    for new, old in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if new not in found and generation_config.get(old):
            found[new] = max(generation_config[old] - 1, 0)
    if generation_config.get("do_sample"):
        found["temperature"] = 1.0
        drawing = ("temperature", "top_k", "top_p")
        found |= {name: generation_config[name] for name in drawing if generation_config.get(name) is not None}
    try:
        return Text2TextParams(**found)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the checkpoint's generation_config.json cannot be followed: {error}") from error


class Text2Text:
    """An encoder-decoder with its tokenizer.

        translate = Text2Text("path to a T5")
        translate("translate English to German: The house is small.")

    path_or_model: what `load_model` takes, or a foveate.models.t5.T5 together with its tokenizer.
    """

    def __init__(
        self,
        path_or_model: str | Path | nn.Module,
        tokenizer: Tokenizer | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        quantization: str | None = None,
        progress: bool | None = None,
    ) -> None:
        self.default_params = Text2TextParams()
        if isinstance(path_or_model, nn.Module):
            model = path_or_model
        else:
            checkpoint = open_checkpoint(path_or_model)
            if checkpoint.config.get("model_type") not in model_types(encoder_decoder=True):
                raise ValueError(
                    f"{path_or_model} is of architecture {checkpoint.config.get('model_type')!r}; text to text needs 't5', an "
                    "encoder-decoder; causal models generate with foveate.LLM"
                )
            model = load_model(checkpoint, device=device, dtype=dtype, quantization=quantization, progress=progress)
            tokenizer = tokenizer or checkpoint.tokenizer()
            self.default_params = default_params(checkpoint.generation_config)
        if not isinstance(model, T5):
            raise TypeError(f"Text2Text takes a foveate.models.t5.T5, got {type(model).__name__}")
        if tokenizer is None:
            raise ValueError(f"there is no tokenizer: {path_or_model} has no tokenizer.json; pass tokenizer=")
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, text: str | Sequence[str], *, batch_size: int = 8, **options: Any) -> Any:
        """The output for a text, a str, or for each of a list of texts, list[str], read `batch_size` at a time.

        options: the fields of Text2TextParams; those that are not given are `default_params`, the checkpoint's own. With
        num_return_sequences above 1, a list of outputs in place of an output. With a seed, a text's sample does not depend on the
        batch size.
        """
        params = dataclasses.replace(self.default_params, **options)
        texts = as_texts(text)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be 1 or more")
        sources = [self.tokenizer.encode(t) for t in texts]
        found: list[list[int]] = []
        for at in range(0, len(sources), batch_size):
            found += self._generate(sources[at : at + batch_size], params, first=at)
        written = [self._text(ids, params) for ids in found]
        n = params.num_return_sequences
        outputs: list[Any] = written if n == 1 else [written[at : at + n] for at in range(0, len(written), n)]
        return outputs[0] if isinstance(text, str) else outputs

    def stream(self, text: str, **options: Any) -> Iterator[str]:
        """The output of one text in pieces as they come; the pieces together are what a call gives. Not for beams."""
        params = dataclasses.replace(self.default_params, **options)
        if params.num_beams > 1 or params.num_return_sequences > 1:
            raise ValueError(
                f"num_beams={params.num_beams}, num_return_sequences={params.num_return_sequences}: only one output can be streamed"
            )
        [source] = [self.tokenizer.encode(t) for t in as_texts([text])]
        return self._stream(source, params)

    def _stream(self, source: list[int], params: Text2TextParams) -> Iterator[str]:
        shown, ids = "", list[int]()
        for tokens in self._steps([source], params, 0):
            ids += [token for token in tokens if token is not None]
            whole = self._text(ids, params)
            if not whole.endswith("\ufffd") and whole.startswith(shown) and len(whole) > len(shown):
                yield whole[len(shown) :]
                shown = whole
        if len(whole := self._text(ids, params)) > len(shown):
            yield whole[len(shown) :]

    def generate(self, sources: Sequence[Sequence[int]], *, first: int = 0, **options: Any) -> list[list[int]]:
        """The output's token ids for each source, with the end token if one came within max_new_tokens.

        options: the fields of Text2TextParams, `default_params` where they are not given. first: sources are drawn for as those of
        numbers first, first + 1 ... With num_return_sequences n, n outputs follow each other for a source. ValueError for empty sources.
        """
        return self._generate(sources, dataclasses.replace(self.default_params, **options), first)

    def _generate(self, sources: Sequence[Sequence[int]], params: Text2TextParams, first: int) -> list[list[int]]:
        if any(len(source) == 0 for source in sources):
            raise ValueError("a source has no tokens; an encoder needs at least the end token that the tokenizer adds")
        if not sources:
            return []
        if params.num_beams > 1:
            found = self.beam_search(sources, params)
            return [hypothesis.tokens for best in found for hypothesis in best[: params.num_return_sequences]]
        n = params.num_return_sequences
        outputs: list[list[int]] = [[] for _ in range(n * len(sources))]
        for tokens in self._steps([source for source in sources for _ in range(n)], params, first * n):
            for output, token in zip(outputs, tokens):
                if token is not None:
                    output.append(token)
        return outputs

    @torch.inference_mode()
    def _steps(
        self, sources: Sequence[Sequence[int]], params: Text2TextParams, first: int
    ) -> Iterator[list[int | None]]:
        """The next token of each source, step by step; None for those that have ended."""
        sampling, ends = params.sampling(), self.tokenizer.eos_ids
        seed = int(torch.randint(2**62, ())) if params.seed is None else params.seed
        outputs = [[self.model.config.start_id] for _ in sources]
        size = params.no_repeat_ngram_size
        rows = [
            Row(
                sampling,
                output,
                seed=seed,
                sample=first + i,
                end_ids=ends,
                forbidden=_forbidden(output, size) if size else None,
            )
            for i, output in enumerate(outputs)
        ]
        readers = [(Detokenizer(self.tokenizer), StopStrings(params.stop)) for _ in sources] if params.stop else []
        cache = self._encode(sources)
        running = set(range(len(sources)))
        for _ in range(params.max_new_tokens):
            tokens = torch.tensor([[output[-1]] for output in outputs], device=self._device)
            logits = self.model.logits(self.model.decode(tokens, cache)[:, -1])
            chosen: list[int | None] = list(sample(logits, rows).tokens)
            for i, token in enumerate(chosen):
                if i not in running:
                    chosen[i] = None
                    outputs[i].append(self.model.config.pad_id)
                    continue
                outputs[i].append(token)  # type: ignore[arg-type]
                stopped = bool(readers) and readers[i][1].push(readers[i][0].push(token))  # type: ignore[arg-type]
                if token in ends or stopped:
                    running.discard(i)
            yield chosen
            if not running:
                return

    @torch.inference_mode()
    def beam_search(self, sources: Sequence[Sequence[int]], params: Text2TextParams) -> list[list[Hypothesis]]:
        """The num_beams best outputs (tokens, score) of each source, best first."""
        if not sources:
            return []
        search = BeamSearch(
            len(sources), params.num_beams, params.max_new_tokens, self.tokenizer.eos_ids, length_penalty=params.length_penalty,
            early_stopping=params.early_stopping, stops=(lambda ids: self._stopped(ids, params)) if params.stop else None,
        )  # fmt: skip
        start = self.model.config.start_id
        cache = self._encode(sources)
        tokens = torch.full((len(sources) * params.num_beams,), start, device=self._device)
        while not search.done:
            logits = self.model.logits(self.model.decode(tokens[:, None], cache)[:, -1])
            log_probs = repetition.apply(
                logits.float().log_softmax(-1), [[start, *row] for row in search.running], repetition_penalty=params.repetition_penalty,
                no_repeat_ngram_size=params.no_repeat_ngram_size,
                end_ids=sorted(self.tokenizer.eos_ids) if search.length < params.min_new_tokens else (),
            )  # fmt: skip
            parents, tokens = search.step(log_probs)
            tokens = tokens.to(self._device)
            cache.reorder(parents.to(self._device))
        return search.results()

    def _stopped(self, ids: Sequence[int], params: Text2TextParams) -> bool:
        text = self.tokenizer.decode(ids)
        return any(stop in text for stop in params.stop)

    def _text(self, ids: Sequence[int], params: Text2TextParams) -> str:
        text = self.tokenizer.decode(ids)
        ends = [at for stop in params.stop if (at := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text

    @property
    def _device(self) -> torch.device:
        return self.model.encoder.final_layer_norm.weight.device  # an embedding may be packed, a norm never

    def _encode(self, sources: Sequence[Sequence[int]]) -> T5Cache:
        """Padded on the right."""
        device = self._device
        lengths = torch.tensor([len(source) for source in sources])
        tokens = torch.full((len(sources), int(lengths.max())), self.model.config.pad_id)
        for row, source in zip(tokens, sources):
            row[: len(source)] = torch.tensor(source)
        mask: Tensor | None = None
        if int(lengths.min()) < tokens.shape[1]:
            mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).to(device)
        return T5Cache(self.model, self.model.encode(tokens.to(device), mask), mask)


def _forbidden(tokens: list[int], size: int) -> Any:
    """For the sampler, which passes the output only: n-grams count with the decoder's first token."""
    rule = repetition.no_repeat_ngrams(size)
    return lambda output: rule(tokens)
