"""Attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928): how much of each input token is mixed into chosen rows by all layers."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.inspect.recording import Recorder
from foveate.ops.attention.weights import attention_weights

_BLOCK = 256  # rows of a layer's attention in memory at a time


def rollout(recorder: Recorder) -> Tensor:
    """fp32 [rows, tokens]: the chosen rows of (A_L + 1) / 2 @ ... @ (A_1 + 1) / 2, A a layer's attention, the mean over its heads.

    From the top down, so that it costs the rows' own products and one block of attention at a time, never [tokens, tokens].
    """
    rows, S = list(recorder.wanted.rows), recorder.tokens
    device = recorder.keys[0].device
    mixed = torch.zeros(len(rows), S, device=device)
    mixed[range(len(rows)), rows] = 1.0
    for layer in reversed(range(recorder.parts.num_layers)):
        q, k, options = torch.cat(recorder.queries[layer], 1), recorder.keys[layer], recorder.options[layer]
        moved = torch.zeros_like(mixed)
        for start in range(0, S, _BLOCK):
            block = range(start, min(start + _BLOCK, S))
            share = mixed[:, start : block.stop]
            if share.any():  # rows after the last chosen one of a causal model have none
                moved += share @ attention_weights(q, k, rows=block, **options)[0].float().mean(0)
        mixed = (mixed + moved) / 2
    return mixed.cpu()
