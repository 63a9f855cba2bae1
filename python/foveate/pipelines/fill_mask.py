"""FillMask: what stands at a hidden token with BERT and its kin, as transformers' pipeline("fill-mask") finds it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.pipelines.encoder import TOKENS_PER_BATCH, as_texts, batches, load_encoder, run_packed
from foveate.tokenizer import Tokenizer


class FillMask:
    """The most probable tokens at each mask of a text (Devlin et al. 2018, arXiv 1810.04805).

        fill = FillMask("path to a BERT with a masked-LM head")
        fill("The capital of France is [MASK].")
        # [{"score": 0.42, "token": 3000, "token_str": "paris", "sequence": "the capital of france is paris."}, ...]

    path_or_model: what `load_model` takes, or a BertForMaskedLM together with its tokenizer.
    """

    def __init__(
        self, path_or_model: str | Path | nn.Module, tokenizer: Tokenizer | None = None, **options: Any
    ) -> None:
        """options: device, dtype, quantization and progress, see `load_model`."""
        loaded = load_encoder(path_or_model, tokenizer, task="filling masks", head="masked-lm", **options)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        known = self.tokenizer.backend.token_to_id
        usual = next((token for token in ("[MASK]", "<mask>") if known(token) is not None), "[MASK]")
        self.mask_token = self.tokenizer.special.get("mask_token", usual)
        mask = known(self.mask_token)
        if mask is None:
            raise ValueError(f"the tokenizer has no token {self.mask_token!r}; a masked language model needs one")
        self._mask = mask

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        top_k: int = 5,
        targets: Sequence[str] | None = None,
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ) -> list[Any]:
        """The top_k of {"score", "token", "token_str", "sequence"} for the mask of a text; with several masks a list of them each.

        score: the softmax over the vocabulary. targets: only these tokens. For a list of texts a list. ValueError for a text
        without a mask, a text longer than the model's positions, and a target that is not a token of the vocabulary.
        """
        if top_k < 1:
            raise ValueError(f"top_k={top_k} must be 1 or more")
        chosen = None if targets is None else torch.tensor([self._target(t) for t in targets])
        texts = as_texts(text)
        encodings = self.tokenizer.backend.encode_batch(texts)
        for entry, encoding in zip(texts, encodings):
            if self._mask not in encoding.ids:
                raise ValueError(f"the text has no {self.mask_token}: {entry!r:.80}")
        results: list[Any] = [None] * len(texts)
        for batch in batches([len(e.ids) for e in encodings], tokens_per_batch):
            chunk = [encodings[i] for i in batch]
            logits, _ = run_packed(self.model, chunk, self._masked_logits)
            counts = [e.ids.count(self._mask) for e in chunk]
            for i, rows in zip(batch, logits.float().softmax(-1).cpu().split(counts)):
                found = self._answers(encodings[i].ids, rows, top_k, chosen)
                results[i] = found[0] if len(found) == 1 else found
        return results[0] if isinstance(text, str) else results

    def _masked_logits(self, ids: Tensor, types: Tensor, packed: Any) -> Tensor:
        """[masks, vocab]: only they go through the head."""
        hidden = self.model.bert(ids, types, packed=packed)
        return self.model.logits(hidden[ids == self._mask])

    def _answers(
        self, ids: list[int], scores: Tensor, top_k: int, targets: Tensor | None
    ) -> list[list[dict[str, Any]]]:
        places = [at for at, token in enumerate(ids) if token == self._mask]
        known = self.tokenizer.vocab_size  # the embedding may have more rows
        candidates = torch.arange(min(known, scores.shape[-1])) if targets is None else targets
        answers: list[list[dict[str, Any]]] = []
        for at, row in zip(places, scores):
            best = row[candidates].topk(min(top_k, len(candidates)))
            answers.append([])
            for score, i in zip(best.values.tolist(), best.indices.tolist()):
                token = int(candidates[i])
                filled = [token if place == at else entry for place, entry in enumerate(ids)]
                # the other masks of a text with several stay readable
                text = self.tokenizer.decode(filled, skip_special_tokens=len(places) == 1)
                answers[-1].append(
                    {
                        "score": score,
                        "token": token,
                        "token_str": self.tokenizer.decode([token], False),
                        "sequence": text,
                    }
                )
        return answers

    def _target(self, text: str) -> int:
        token = self.tokenizer.backend.token_to_id(text)
        if token is None:
            pieces = self.tokenizer.backend.encode(text, add_special_tokens=False).tokens
            raise ValueError(f"the target {text!r} is not a token of the vocabulary; it is made of {pieces}")
        return token
