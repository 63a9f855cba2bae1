"""Text2Text: text in, text out with an encoder-decoder (T5): greedy, sampled, or by beam search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.generation.beam import BeamSearch, Hypothesis
from foveate.generation.params import SamplingParams
from foveate.generation.sampler import Row, sample
from foveate.models import load_model, open_checkpoint
from foveate.models.t5 import T5, T5Cache
from foveate.tokenizer import Tokenizer


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
        if isinstance(path_or_model, nn.Module):
            model = path_or_model
        else:
            checkpoint = open_checkpoint(path_or_model)
            if checkpoint.config.get("model_type") != "t5":
                raise ValueError(
                    f"{path_or_model} is of architecture {checkpoint.config.get('model_type')!r}; text to text needs 't5', an "
                    "encoder-decoder; causal models generate with foveate.LLM"
                )
            model = load_model(checkpoint, device=device, dtype=dtype, quantization=quantization, progress=progress)
            tokenizer = tokenizer or checkpoint.tokenizer()
        if not isinstance(model, T5):
            raise TypeError(f"Text2Text takes a foveate.models.t5.T5, got {type(model).__name__}")
        if tokenizer is None:
            raise ValueError(f"there is no tokenizer: {path_or_model} has no tokenizer.json; pass tokenizer=")
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, text: str | Sequence[str], *, batch_size: int = 8, **options: Any) -> Any:
        """The output for a text, a str, or for each of a list of texts, list[str], read `batch_size` at a time.

        options: those of `generate`. With a seed, a text's sample does not depend on the batch size.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be 1 or more")
        sources = [self.tokenizer.encode(t) for t in texts]
        outputs: list[str] = []
        for at in range(0, len(sources), batch_size):
            found = self.generate(sources[at : at + batch_size], first=at, **options)
            outputs += [self.tokenizer.decode(ids) for ids in found]
        return outputs[0] if isinstance(text, str) else outputs

    @torch.inference_mode()
    def generate(
        self,
        sources: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        first: int = 0,
    ) -> list[list[int]]:
        """The output's token ids for each source, with the end token if one came within max_new_tokens.

        temperature 0 is greedy; above it, ids are drawn from the top_k most probable (0: all) within the nucleus top_p. seed: the
        same draws each time, for source i those of number first + i. num_beams > 1: beam search as in transformers' generate, with
        score = sum of log-probabilities / length ** length_penalty and early_stopping True, False or "never" (see BeamSearch).
        ValueError for empty sources and options that contradict each other.
        """
        if any(len(source) == 0 for source in sources):
            raise ValueError("a source has no tokens; an encoder needs at least the end token that the tokenizer adds")
        params = SamplingParams(max_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        if num_beams > 1:
            if temperature != 0:
                raise ValueError(
                    f"num_beams={num_beams} searches and temperature={temperature} draws; choose one of them"
                )
            return [found[0].tokens for found in self.beam_search(
                sources, num_beams, max_new_tokens, length_penalty=length_penalty, early_stopping=early_stopping
            )]  # fmt: skip
        if num_beams < 1:
            raise ValueError(f"num_beams={num_beams} must be 1 or more")
        if not sources:
            return []
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        outputs = [[self.model.config.start_id] for _ in sources]
        rows = [Row(params, output, seed=seed, sample=first + i) for i, output in enumerate(outputs)]
        cache = self._encode(sources)
        running = set(range(len(sources)))
        for _ in range(max_new_tokens):
            tokens = torch.tensor([[output[-1]] for output in outputs], device=self._device)
            logits = self.model.logits(self.model.decode(tokens, cache)[:, -1])
            for i, token in enumerate(sample(logits, rows).tokens):
                outputs[i].append(token if i in running else self.model.config.pad_id)
                if token in self.tokenizer.eos_ids:
                    running.discard(i)
            if not running:
                break
        return [self._cut(output[1:]) for output in outputs]

    @torch.inference_mode()
    def beam_search(
        self,
        sources: Sequence[Sequence[int]],
        num_beams: int,
        max_new_tokens: int,
        *,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
    ) -> list[list[Hypothesis]]:
        """The num_beams best outputs (tokens, score) of each source, best first."""
        if not sources:
            return []
        search = BeamSearch(
            len(sources), num_beams, max_new_tokens, self.tokenizer.eos_ids, length_penalty=length_penalty,
            early_stopping=early_stopping,
        )  # fmt: skip
        cache = self._encode(sources)
        tokens = torch.full((len(sources) * num_beams,), self.model.config.start_id, device=self._device)
        while not search.done:
            logits = self.model.logits(self.model.decode(tokens[:, None], cache)[:, -1])
            parents, tokens = search.step(logits.float().log_softmax(-1))
            tokens = tokens.to(self._device)
            cache.reorder(parents.to(self._device))
        return search.results()

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

    def _cut(self, tokens: list[int]) -> list[int]:
        """Up to and with the first end token."""
        end = next((i for i, token in enumerate(tokens) if token in self.tokenizer.eos_ids), len(tokens))
        return tokens[: end + 1]
