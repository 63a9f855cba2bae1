"""attn_implementation="foveate" for transformers (version 5): one call to `register`, then any model that uses its attention interface.

    from foveate.integrations import transformers as foveate_transformers
    foveate_transformers.register()
    model = AutoModel.from_pretrained(..., attn_implementation="foveate")     # or model.set_attn_implementation("foveate")

Two functions are registered, and both are needed: without a mask function transformers hands every layer attention_mask=None and
padded batches are silently wrong. What a model asks for and foveate cannot honour raises a sentence. Models outside the interface
(gptj, bloom, mpt, deberta and some forty others compute attention themselves) are not reached by any registered name.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import foveate

NAME = "foveate"

# What models and callers pass along that does not change the result of attention: positions are already in q and k (rotary) or in
# the mask (packing), the rest belongs to caches, losses and other outputs of the model.
_WITHOUT_EFFECT = frozenset(
    """
    position_ids cache_position position_embeddings use_cache past_key_values past_key_value encoder_hidden_states
    encoder_attention_mask token_type_ids num_items_in_batch labels logits_to_keep seq_idx output_hidden_states
    output_router_logits return_dict max_length_q max_length_k layer_idx mm_token_type_ids
    """.split()
)


def register() -> None:
    """Make attn_implementation="foveate" known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask that every layer of one kind receives: None, or bool [B, 1, Sq, Skv] with True = keep.

    None where a plain causal or full mask says it all, under the rules of transformers' own sdpa mask: `attention_forward` reads
    None exactly as those rules mean it. Padding, packing, windows and chunks come out as bool masks, which are complete: causality
    is in them.
    """
    return sdpa_mask(*args, **kwargs)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    deterministic: bool | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One attention layer. query [B, Hq, Sq, D], key [B, Hkv, Skv, D], value [B, Hkv, Skv, Dv] -> [B, Sq, Hq, Dv] and no weights.

    attention_mask: bool [B or 1, Hq or 1, Sq, Skv] (True = keep) or float (added); both are complete, causality is not applied on
    top. None: causal if `is_causal` (the module's attribute where the argument is absent) and Sq > 1. sliding_window counts the
    current token: w sees w - 1 tokens back. s_aux [Hq]: sink logits. position_bias: added to the scores, with its gradient.
    cu_seq_lens_q/k: sequences packed into one row, without attention_mask.
    """
    _refuse_unknown(module, output_attentions, kwargs)
    Sq, Skv = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and Sq > 1 and attention_mask is None
    if causal and Skv > Sq and cu_seq_lens_q is None:
        # A causal mask is left out with more keys than queries only for the first step on an empty static cache: the keys after
        # the queries are slots that nothing has filled yet.
        key, value = key[:, :, :Sq], value[:, :, :Sq]
        position_bias = None if position_bias is None else position_bias[..., :Sq]

    options: dict[str, Any] = {
        "causal": causal,
        "scale": scaling,
        "softcap": softcap,
        "sinks": s_aux,
        "dropout_p": dropout,
        "deterministic": bool(deterministic),
    }
    if sliding_window is not None and attention_mask is None:
        options["window"] = (sliding_window - 1, 0 if causal or Sq == 1 else sliding_window - 1)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    # With a mask as well, the mask decides: it was built from the same positions, and holds padding that cu_seq_lens lacks.
    if cu_seq_lens_q is not None and attention_mask is None:
        if cu_seq_lens_k is None or max_length_q is None or max_length_k is None:
            raise ValueError(
                "cu_seq_lens_q came without cu_seq_lens_k, max_length_q or max_length_k; "
                "pass all four (DataCollatorWithFlattening with return_flash_attn_kwargs=True does)"
            )
        if q.shape[0] != 1 or position_bias is not None:
            raise ValueError(
                f"cu_seq_lens_q describes sequences packed into one row without a position bias; this batch has {q.shape[0]} rows"
                f"{'' if position_bias is None else ' and a position bias'}: pass a padded batch with a 2-D attention_mask"
            )
        lengths = (cu_seq_lens_q.int(), cu_seq_lens_k.int(), int(max_length_q), int(max_length_k))
        return cast(Tensor, foveate.attention_varlen(q[0], k[0], v[0], *lengths, **options))[None], None

    mask, bias = _split_mask(attention_mask, position_bias)
    return cast(Tensor, foveate.attention(q, k, v, mask=mask, bias=bias, **options)), None


def _split_mask(attention_mask: Tensor | None, position_bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(mask, bias) as foveate takes them: what is bool, and the sum of what is added."""
    if attention_mask is None:
        return None, position_bias
    if attention_mask.ndim != 4:
        raise ValueError(
            f"attention_mask reached the attention layer as {list(attention_mask.shape)}; it takes [B, H or 1, Sq, Skv]: give the "
            "2-D padding mask to the model, whose masks come from the mask function registered by the same register()"
        )
    if attention_mask.dtype == torch.bool:
        return attention_mask, position_bias
    if not attention_mask.is_floating_point():
        raise TypeError(
            f"attention_mask has dtype {attention_mask.dtype}; a 4-D mask is bool (True = keep) or floating point (added to the scores)"
        )
    return None, attention_mask if position_bias is None else attention_mask + position_bias


def _refuse_unknown(module: torch.nn.Module, output_attentions: bool | None, kwargs: dict[str, Any]) -> None:
    if output_attentions:
        raise ValueError(
            "output_attentions=True: foveate never stores the attention weights; "
            'use model.set_attn_implementation("eager") for the runs that need them'
        )
    if kwargs.get("cache") is not None:
        raise ValueError(
            "continuous batching hands the layer its paged cache, which foveate's transformers integration does not serve; "
            "use generate(), or attn_implementation='sdpa' for generate_batch()"
        )
    unknown = [
        name
        for name, value in kwargs.items()
        if name not in _WITHOUT_EFFECT and value is not None and value is not False
    ]
    if unknown:
        raise TypeError(
            f"{type(module).__name__} passes {', '.join(sorted(unknown))} to its attention function; foveate does not know what that "
            "should change and does not ignore it: use another attn_implementation for this model"
        )
