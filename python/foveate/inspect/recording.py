"""What watches a forward pass: attention of chosen rows, and the stream after each layer. No model code is written twice here.

A causal model hands q, k and v of each layer to its cache, an encoder to its `PackedSequences`: the objects below stand there, record,
and attend. Forward hooks on the layers see the stream between them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.inspect.parts import Parts
from foveate.inspect.wanted import Wanted
from foveate.models.sequences import PackedSequences
from foveate.ops.attention.dense import attention
from foveate.ops.attention.weights import attention_weights
from foveate.ops.rotary import apply_rotary


class Recorder:
    """Records one text of `tokens` tokens, whose forward pass may come in chunks: `first` is where the one that runs begins.

    attention: fp32 [layers, heads, rows, tokens] on the CPU. stream: fp32 [layers of the model + 1, rows, hidden], the first one what
    the first layer reads. queries, keys: of each layer with its options, kept for a rollout.
    """

    def __init__(self, parts: Parts, wanted: Wanted, tokens: int) -> None:
        self.parts, self.wanted, self.tokens, self.first = parts, wanted, tokens, 0
        self.attention: Tensor | None = None
        if wanted.attention:
            self.attention = torch.zeros(len(wanted.layers), len(wanted.heads), len(wanted.rows), tokens)
        self.stream: Tensor | None = None
        self.queries: list[list[Tensor]] = [[] for _ in range(parts.num_layers)]
        self.keys: list[Tensor] = []
        self.options: list[dict[str, Any]] = []
        self._layer = 0  # of the encoder's next call

    def attended(self, layer: int, q: Tensor, k: Tensor, options: dict[str, Any]) -> None:
        """q [1, new, Hq, D] of the tokens from `first` on, k [1, first + new, Hkv, D]."""
        if self.wanted.rollout:
            self.queries[layer].append(q)
            if self.first == 0:
                self.options.append(options)
        if self.attention is None or layer not in self.wanted.layers:
            return
        here = self.rows_here(q.shape[1])
        if here:
            rows = [self.wanted.rows[i] - self.first for i in here]
            weights = attention_weights(q, k, rows=rows, heads=self.wanted.heads, **options)[0]
            for place, recorded in enumerate(self.wanted.layers):
                if recorded == layer:
                    self.attention[place, :, here, : k.shape[1]] = weights.float().cpu()

    def rows_here(self, new: int) -> list[int]:
        """Places among the wanted rows of those in the chunk that runs."""
        return [i for i, row in enumerate(self.wanted.rows) if self.first <= row < self.first + new]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Keeps the stream after each layer while it is open, if the logit lens is wanted."""
        self._layer = 0
        if not self.wanted.lens_top:
            yield
            return
        calls = 0

        def keep(x: Tensor) -> None:
            nonlocal calls
            if self.stream is None:
                shape = (self.parts.num_layers + 1, len(self.wanted.rows), x.shape[-1])
                self.stream = torch.zeros(shape, dtype=torch.float32, device=x.device)
            here = self.rows_here(x.shape[1])
            if here:
                self.stream[calls, here] = x[0, [self.wanted.rows[i] - self.first for i in here]].float()
            calls += 1

        def before(module: Any, args: tuple[Any, ...]) -> None:
            if calls == 0:
                keep(args[0])

        hooks = [self.parts.layers[0].register_forward_pre_hook(before)]
        hooks += [layer.register_forward_hook(lambda module, args, out: keep(out)) for layer in self.parts.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def next_layer(self) -> int:
        self._layer += 1
        return self._layer - 1


class RecordingCache:
    """Stands for a CacheView of one sequence: keys and values lie in memory of their own, as long as the text."""

    def __init__(self, recorder: Recorder, device: torch.device) -> None:
        self._recorder, self._device = recorder, device
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self.new = 0
        self.seqs = [0]

    @property
    def capacity(self) -> int:
        return self._recorder.tokens

    @property
    def lens(self) -> Tensor:
        return torch.tensor([self._recorder.first], dtype=torch.int32, device=self._device)

    def positions(self) -> Tensor:
        first = self._recorder.first
        return torch.arange(first, first + self.new, device=self._device)[None]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, batch_invariant: bool = False, rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None, rotary_interleaved: bool = False, **options: Any,
    ) -> Tensor:  # fmt: skip
        recorder, first = self._recorder, self._recorder.first
        end = first + q.shape[1]
        if rotary_cos is not None and rotary_sin is not None:
            q, k = apply_rotary(q, k, rotary_cos[first:end], rotary_sin[first:end], interleaved=rotary_interleaved)
        if layer == len(self._keys):
            self._keys.append(k.new_empty(1, recorder.tokens, *k.shape[2:]))
            self._values.append(v.new_empty(1, recorder.tokens, *v.shape[2:]))
        self._keys[layer][:, first:end], self._values[layer][:, first:end] = k, v
        k, v = self._keys[layer][:, :end], self._values[layer][:, :end]
        recorder.attended(layer, q, k, options)
        recorder.keys = self._keys
        return attention(q, k, v, **options)


@dataclass(frozen=True)
class RecordingSequences(PackedSequences):
    """Stands for the `PackedSequences` of one text."""

    recorder: Any = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keys: PackedSequences | None = None, **options: Any) -> Tensor:
        recorder = self.recorder
        recorder.attended(recorder.next_layer(), q, k, options)
        if recorder.wanted.rollout:
            recorder.keys.append(k)
        return attention(q, k, v, **options)

    def attend_batch(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return self.attend(q, k, v, **options)


def recording_sequences(recorder: Recorder, device: torch.device) -> RecordingSequences:
    plain = PackedSequences.of([recorder.tokens]).to(device)
    return RecordingSequences(plain.cu_seqlens, plain.positions, plain.longest, recorder)
