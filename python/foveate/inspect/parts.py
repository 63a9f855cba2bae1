"""Where in a model its embedding, layers and head are, told by its class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from foveate.models import bert, deberta, gpt2, llama, modernbert

_HEADS: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("causal", (llama.Llama, gpt2.GPT2)),
    ("masked-lm", (bert.BertForMaskedLM, modernbert.ModernBertForMaskedLM)),
    ("classes", (bert.BertForSequenceClassification, modernbert.ModernBertForSequenceClassification)),
    ("answers", (bert.BertForQuestionAnswering,)),
)


@dataclass(frozen=True)
class Parts:
    """kind: "causal", "masked-lm", "classes", "answers", or "encoder" for one without a head that is known here.

    layers: the modules, each once, though ALBERT runs them several times. norm: after the last layer, None without one.
    """

    model: Any
    kind: str
    embedding: nn.Module
    layers: tuple[nn.Module, ...]
    num_layers: int
    num_heads: int
    norm: nn.Module | None

    @property
    def has_vocabulary(self) -> bool:
        """Whether hidden states can be read as distributions over tokens."""
        return self.kind in ("causal", "masked-lm") and getattr(self.model, "lm_head", self.model) is not None

    def read(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of the stream between two layers, as if no layer followed."""
        return self.model.logits(hidden if self.norm is None else self.norm(hidden))


def parts_of(model: Any) -> Parts:
    """The parts of a model of foveate.models, or of what an LLM runs. ValueError for another one."""
    if not isinstance(model, nn.Module):  # a NativeDecoder stands before the modules that it was built from
        model = getattr(model, "model", model)
    kind = next((name for name, classes in _HEADS if isinstance(model, classes)), "encoder")
    if isinstance(model, llama.Llama):
        decoder = model.model
        return _parts(model, kind, decoder.embed_tokens, decoder.layers, decoder.norm)
    if isinstance(model, gpt2.GPT2):
        return _parts(model, kind, model.transformer.wte, model.transformer.h, model.transformer.ln_f)
    encoder = getattr(model, "bert", model)
    if isinstance(encoder, deberta.Deberta):
        return _parts(model, kind, encoder.embeddings.word_embeddings, encoder.encoder.layer, None)
    if isinstance(encoder, bert.Bert):
        layers: Any = encoder.encoder["layer"]
        return _parts(model, kind, encoder.embeddings.word_embeddings, layers, None)
    if isinstance(encoder, modernbert.ModernBert):
        embedding: Any = encoder.embeddings["tok_embeddings"]
        return _parts(model, kind, embedding, encoder.layers, encoder.final_norm)
    raise ValueError(
        f"foveate.inspect looks into causal models and encoders of foveate.models; it does not know the parts of a "
        f"{type(model).__name__}"
    )


def _parts(model: Any, kind: str, embedding: nn.Module, layers: Any, norm: nn.Module | None) -> Parts:
    config = model.config
    return Parts(model, kind, embedding, tuple(layers), config.num_layers, config.num_heads, norm)
