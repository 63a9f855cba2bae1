"""Text2Text: text in, text out with an encoder-decoder (T5, BART, Marian, NLLB, ...): greedy, sampled, or by beam search."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from foveate.files.checked import check
from foveate.generation import repetition
from foveate.generation.bad_words import BadWords
from foveate.generation.beam import BeamSearch, Hypothesis
from foveate.generation.detokenizer import Detokenizer, special_ids
from foveate.generation.sampler import SamplingState, no_choice, sample
from foveate.generation.stops import StopStrings
from foveate.generation.token_rules import TokenRules
from foveate.models import Checkpoint, load_model, open_checkpoint
from foveate.models.checkpoint.schemas import GENERATION
from foveate.models.encoder_decoder import DecoderCache, EncoderDecoder
from foveate.models.registry import model_types
from foveate.models.t5 import T5
from foveate.pipelines.encoder import as_texts
from foveate.pipelines.languages import find_languages, prompt
from foveate.pipelines.text2text_params import Text2TextParams, default_params, settings_names
from foveate.tokenizer import Tokenizer

__all__ = ["Text2Text", "Text2TextParams"]


class Text2Text:
    """An encoder-decoder with its tokenizer.

        write = Text2Text("path to a T5")
        write("summarize: The house is small.")
        translate = Text2Text("path to an NLLB", source_language="eng_Latn", target_language="deu_Latn")
        translate("The house is small.")

    path_or_model: what `load_model` takes, or a foveate.models.encoder_decoder.EncoderDecoder together with its tokenizer.
    source_language, target_language: of all calls that do not name others; see Text2TextParams.
    """

    def __init__(
        self,
        path_or_model: str | Path | Checkpoint | nn.Module,
        tokenizer: Tokenizer | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        quantization: str | None = None,
        progress: bool | None = None,
        source_language: str | None = None,
        target_language: str | None = None,
    ) -> None:
        self.default_params = Text2TextParams()
        self.task_params: dict[str, Any] = {}
        model_type, tokenizer_config = None, {}
        if isinstance(path_or_model, nn.Module):
            model: Any = path_or_model
        else:
            checkpoint = open_checkpoint(path_or_model)
            model_type, known = checkpoint.config.get("model_type"), model_types(encoder_decoder=True)
            if model_type not in known:
                raise ValueError(
                    f"{path_or_model} is of architecture {model_type!r}; text to text needs an encoder-decoder, which are "
                    f"{', '.join(known)}; causal models generate with foveate.LLM"
                )
            model = load_model(checkpoint, device=device, dtype=dtype, quantization=quantization, progress=progress)
            tokenizer = tokenizer or checkpoint.tokenizer()
            tokenizer_config = checkpoint.tokenizer_config
            self.task_params = checkpoint.config.get("task_specific_params") or {}
            self.default_params = default_params(_settings(checkpoint), getattr(model.config, "max_positions", None))
        if not isinstance(model, EncoderDecoder) or not hasattr(model, "lm_head"):
            raise TypeError(
                f"Text2Text takes a foveate.models.encoder_decoder.EncoderDecoder, got {type(model).__name__}"
            )
        if tokenizer is None:
            raise ValueError(f"there is no tokenizer: {path_or_model} has no tokenizer.json; pass tokenizer=")
        self.model, self.tokenizer = model, tokenizer
        self._languages = find_languages(model_type, tokenizer, tokenizer_config)
        target = target_language or (tokenizer_config.get("tgt_lang") if self.languages else None)
        self.default_params = dataclasses.replace(
            self.default_params, source_language=source_language, target_language=target
        )
        self._sources(self.default_params, [])  # the languages are checked

    @property
    def languages(self) -> list[str]:
        """The codes that source_language and target_language may be; [] for a model that is not told languages by tokens."""
        return [] if self._languages is None else self._languages.codes

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, text: str, *, num_return_sequences: int, batch_size: int = 8, truncate: bool = False, **options: Any
    ) -> str | list[str]: ...
    @overload
    def __call__(
        self,
        text: Sequence[str],
        *,
        num_return_sequences: int,
        batch_size: int = 8,
        truncate: bool = False,
        **options: Any,
    ) -> list[str] | list[list[str]]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, text: str, *, batch_size: int = 8, truncate: bool = False, **options: Any
    ) -> str: ...
    @overload
    def __call__(
        self, text: Sequence[str], *, batch_size: int = 8, truncate: bool = False, **options: Any
    ) -> list[str]: ...
    def __call__(
        self, text: str | Sequence[str], *, batch_size: int = 8, truncate: bool = False, **options: Any
    ) -> str | list[str] | list[list[str]]:
        """The output for a text, a str, or for each of a list of texts, list[str], read `batch_size` at a time.

        options: the fields of Text2TextParams; those that are not given are `default_params`, the checkpoint's own. With
        num_return_sequences above 1, a list of outputs in place of an output. With a seed, a text's sample does not depend on the
        batch size. truncate: a text that is longer than the model's positions is cut, its end token kept; else it is a ValueError.
        """
        params = dataclasses.replace(self.default_params, **options)
        texts = as_texts(text)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be 1 or more")
        sources = self._sources(params, texts, truncate)
        found: list[list[int]] = []
        for at in range(0, len(sources), batch_size):
            found += self._generate(sources[at : at + batch_size], params, first=at)
        written = [self._text(ids, params) for ids in found]
        n = params.num_return_sequences
        outputs: list[Any] = written if n == 1 else [written[at : at + n] for at in range(0, len(written), n)]
        return outputs[0] if isinstance(text, str) else outputs

    def count(self, text: str, **options: Any) -> int:
        """The tokens of a source, with those that stand for its language and its end."""
        return len(self._sources(dataclasses.replace(self.default_params, **options), [text])[0])

    @property
    def max_source_tokens(self) -> int | None:
        """The most tokens of one text; None: any number."""
        return getattr(self.model.config, "max_positions", None)

    def _sources(self, params: Text2TextParams, texts: Sequence[str], truncate: bool = False) -> list[list[int]]:
        source, target, known = params.source_language, params.target_language, self._languages
        if known is not None:
            if texts and target is None and known.needs_target and params.forced_bos_token_id is None:
                raise ValueError(
                    f"this model writes {len(known.codes)} languages; name one of `languages` by target_language={known.codes[0]!r}"
                )
            if source is None and target is None:
                sources = [self.tokenizer.encode(text) for text in texts]
            else:
                known.check(source, target)
                sources = [known.source(text, source, target) for text in texts]
        else:
            sources = [self.tokenizer.encode(self._prompt(source, target) + text) for text in texts or [""]][
                : len(texts)
            ]
        longest = self.max_source_tokens
        if longest is not None and truncate:
            sources = [ids if len(ids) <= longest else self._cut(ids, longest) for ids in sources]
        return sources

    def _prompt(self, source: str | None, target: str | None) -> str:
        """What stands before a text for a model that has no tokens of languages."""
        if target is not None and isinstance(self.model, T5):
            return prompt(source, target, self.task_params)
        if target is not None or source is not None:
            raise ValueError(
                f"source_language={source!r} and target_language={target!r} mean nothing to this model: its tokenizer has no tokens of "
                "languages; omit them"
            )
        return ""

    def _cut(self, ids: list[int], longest: int) -> list[int]:
        """Without the last tokens of the text; what the tokenizer adds after it stays."""
        ends = len(ids)
        while ends > 0 and (ids[ends - 1] in self.tokenizer.eos_ids or ids[ends - 1] in special_ids(self.tokenizer)):
            ends -= 1
        after = ids[ends:]
        return [*ids[: longest - len(after)], *after]

    def _decided(self, params: Text2TextParams) -> Text2TextParams:
        """With what the target's language decides."""
        if self._languages is not None and params.target_language is not None:
            params = dataclasses.replace(params, **self._languages.target(params.target_language))
        longest = self.max_source_tokens  # of the target alike
        if longest is not None and params.max_new_tokens > longest:
            raise ValueError(
                f"max_new_tokens={params.max_new_tokens} is more than the model's {longest} positions; lower it"
            )
        return params

    def stream(self, text: str, **options: Any) -> Iterator[str]:
        """The output of one text in pieces as they come; the pieces together are what a call gives. Not for beams."""
        params = dataclasses.replace(self.default_params, **options)
        if params.num_beams > 1 or params.num_return_sequences > 1:
            raise ValueError(
                f"num_beams={params.num_beams}, num_return_sequences={params.num_return_sequences}: only one output can be streamed"
            )
        [source] = self._sources(params, as_texts([text]))
        return self._stream(source, self._decided(params))

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
        params = self._decided(params)
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
        start = self._start(params)
        outputs = [[start] for _ in sources]
        rules = [self._rules(params, source) for source in sources]
        ruled = _has_rules(params)
        forced = params.forced_bos_token_id is not None or params.forced_eos_token_id is not None
        rows = [
            SamplingState(
                sampling, output, seed=seed, sample=first + i, forbidden=_unless_forced(rule) if ruled else None,
                mask=_Forced(rule, output, self._vocab, self._device) if forced else None,
            )
            for i, (output, rule) in enumerate(zip(outputs, rules))
        ]  # fmt: skip
        readers = [(Detokenizer(self.tokenizer), StopStrings(params.stop)) for _ in sources] if params.stop else []
        cache = self._encode(sources)
        running = set(range(len(sources)))
        for _ in range(params.max_new_tokens):
            tokens = torch.tensor([[output[-1]] for output in outputs], device=self._device)
            logits = self.model.logits(self.model.decode(tokens, cache)[:, -1])
            chosen: list[int | None] = list(sample(logits, rows).tokens)
            for i, token in enumerate(chosen):
                if token == -1 and i in running:
                    raise ValueError(no_choice(logits[i], rows[i]))
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
        start = self._start(params)
        rules = [self._rules(params, source) for source in sources for _ in range(params.num_beams)]
        cache = self._encode(sources)
        tokens = torch.full((len(sources) * params.num_beams,), start, device=self._device)
        while not search.done:
            logits = self.model.logits(self.model.decode(tokens[:, None], cache)[:, -1])
            log_probs = repetition.apply(
                logits.float().log_softmax(-1),
                search.running,
                rules,
                start=start,
                repetition_penalty=params.repetition_penalty,
            )
            if params.renormalize_logits:
                log_probs = log_probs.log_softmax(-1)
            parents, tokens = search.step(log_probs)
            tokens = tokens.to(self._device)
            cache.reorder(parents.to(self._device))
        return search.results()

    def _start(self, params: Text2TextParams) -> int:
        start = params.decoder_start_token_id
        return self.model.config.start_id if start is None else start

    @property
    def _vocab(self) -> int:
        return getattr(self.model.config, "decoder_vocab_size", self.model.config.vocab_size)

    def _rules(self, params: Text2TextParams, source: Sequence[int]) -> TokenRules:
        return TokenRules(
            start=self._start(params), end_ids=self.tokenizer.eos_ids, min_tokens=params.min_new_tokens,
            forced_first=self._checked(params, "forced_bos_token_id"), forced_last=self._checked(params, "forced_eos_token_id"),
            last=params.max_new_tokens - 1, no_repeat_ngram_size=params.no_repeat_ngram_size,
            source_ngram_size=params.encoder_no_repeat_ngram_size, source=source, bad_words=params.bad_words_ids,
            suppressed=[token for token in params.suppress_tokens if 0 <= token < self._vocab],
            watch=self._bad_words(params),
        )  # fmt: skip

    def _bad_words(self, params: Text2TextParams) -> Callable[[Sequence[int]], list[int]] | None:
        """The ids that may not follow the given ones; by whole outputs, as the rows of a beam search are not those of the step before."""
        if not params.bad_words:
            return None
        words = BadWords(params.bad_words, self.tokenizer)
        return lambda output: words.watch()(output)

    def _checked(self, params: Text2TextParams, name: str) -> list[int]:
        for token in params.forced(name):
            if not 0 <= token < self._vocab:
                raise ValueError(f"{name}={token} is not an id of the model's vocabulary of {self._vocab}")
        return params.forced(name)

    def _stopped(self, ids: Sequence[int], params: Text2TextParams) -> bool:
        text = self.tokenizer.decode(ids)
        return any(stop in text for stop in params.stop)

    def _text(self, ids: Sequence[int], params: Text2TextParams) -> str:
        text = self.tokenizer.decode(ids)
        ends = [at for stop in params.stop if (at := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text

    @property
    def _device(self) -> torch.device:
        return self.model.device

    def _encode(self, sources: Sequence[Sequence[int]]) -> DecoderCache:
        """Padded on the right."""
        device = self._device
        lengths = torch.tensor([len(source) for source in sources])
        tokens = torch.full((len(sources), int(lengths.max())), self.model.config.pad_id)
        for row, source in zip(tokens, sources):
            row[: len(source)] = torch.tensor(source)
        mask: Tensor | None = None
        if int(lengths.min()) < tokens.shape[1]:
            mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).to(device)
        return DecoderCache(self.model, self.model.encode(tokens.to(device), mask), mask)


class _Forced:
    """For the sampler: which ids may come at this step of an output, whose list begins with the start token."""

    def __init__(self, rules: TokenRules, output: list[int], vocab: int, device: torch.device) -> None:
        self._rules, self._output = rules, output
        self._all = torch.ones(vocab, dtype=torch.bool, device=device)

    def __call__(self) -> Tensor:
        forced = self._rules.forced(len(self._output) - 1)
        if not forced:
            return self._all
        allowed = torch.zeros_like(self._all)
        allowed[forced] = True
        return allowed


def _unless_forced(rules: TokenRules) -> Callable[[Sequence[int]], list[int]]:
    return lambda output: [] if rules.forced(len(output)) else rules.forbidden(output)


def _has_rules(params: Text2TextParams) -> bool:
    """Whether any token may be forbidden."""
    return bool(
        params.min_new_tokens or params.no_repeat_ngram_size or params.encoder_no_repeat_ngram_size or params.bad_words
        or params.bad_words_ids or params.suppress_tokens
    )  # fmt: skip


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """generation_config.json, or, of a checkpoint from before it, what config.json says in its place."""
    if checkpoint.generation_config:
        return checkpoint.generation_config
    found = {name: checkpoint.config[name] for name in settings_names() if checkpoint.config.get(name) is not None}
    found.pop("decoder_start_token_id", None)  # the model's own
    check(found, GENERATION, checkpoint.path)
    return found
