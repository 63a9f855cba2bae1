"""The pseudo-log-likelihood of texts under a masked language model (Salazar et al. 2020, arXiv 1910.14659)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from foveate.pipelines import FillMask
from foveate.pipelines.encoder import run_packed

_BATCH = 64  # masked copies in one pass


class _Encoding(NamedTuple):
    ids: list[int]
    type_ids: list[int]


def token_log_likelihoods(fill: FillMask, text: str) -> list[tuple[int, float]]:
    """For each token but the special ones its id and its log-probability while it alone is masked."""
    encoding: Any = fill.tokenizer.backend.encode(text)
    mask = fill.tokenizer.backend.token_to_id(fill.mask_token)
    special = getattr(encoding, "special_tokens_mask", [0] * len(encoding.ids))
    places = [at for at, one in enumerate(special) if not one]
    found: list[tuple[int, float]] = []
    for start in range(0, len(places), _BATCH):
        part = places[start : start + _BATCH]
        copies = []
        for at in part:
            ids = list(encoding.ids)
            ids[at] = mask
            copies.append(_Encoding(ids, list(encoding.type_ids)))
        logits, _ = run_packed(fill.model, copies, fill._masked_logits)
        wanted = torch.tensor([encoding.ids[at] for at in part], device=logits.device)
        chosen = logits.float().log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        found += [(encoding.ids[at], value) for at, value in zip(part, chosen.tolist())]
    return found


def pair_scores(fill: FillMask, first: str, second: str) -> tuple[float, float]:
    """The sums over the tokens that both texts have in common, in order, as CrowS-Pairs compares them (Nangia et al. 2020,
    arXiv 2010.00133): what differs is given, so its frequency does not count."""
    from difflib import SequenceMatcher

    a, b = token_log_likelihoods(fill, first), token_log_likelihoods(fill, second)
    blocks = SequenceMatcher(None, [t for t, _ in a], [t for t, _ in b], autojunk=False).get_matching_blocks()
    left = sum(value for block in blocks for _, value in a[block.a : block.a + block.size])
    right = sum(value for block in blocks for _, value in b[block.b : block.b + block.size])
    return left, right


def totals(fill: FillMask, texts: Sequence[str]) -> list[float]:
    return [sum(value for _, value in token_log_likelihoods(fill, text)) for text in texts]
