"""attn_implementation="foveate" for transformers (version 5): one call to `register`, then any model that uses its attention interface.

    from foveate.integrations import transformers as foveate_transformers
    foveate_transformers.register()
    model = AutoModel.from_pretrained(..., attn_implementation="foveate")     # or model.set_attn_implementation("foveate")

Two functions are registered, and both are needed: without a mask function transformers hands every layer attention_mask=None and
padded batches are silently wrong. What a model asks for and foveate cannot honour raises a sentence. Models outside the interface
(gptj, bloom, mpt, deberta and some forty others compute attention themselves) are not reached by any registered name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask

import foveate
from foveate.integrations.transformers.causal_mask import CausalMask, stored
from foveate.integrations.transformers.sparse import mask_of_blocks, mask_of_indices

NAME = "foveate"
_ADDS_MASKS: dict[type, bool] = {}

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
    """The mask that every layer of one kind receives: None, or bool [B, 1, Sq, Skv] with True = keep. transformers' sdpa rules.

    None: every key is visible to every query. Plain causal comes as a `CausalMask`, which is not stored; padding, packing, windows and
    chunks as stored masks, which are complete: causality is in them. Where torch.compile or export traces the model, plain causal is
    stored too. Models that declare no support of sdpa calculate with masks that are added: theirs are floating.
    """
    config = kwargs.get("config")
    adds = config is not None and _adds_masks(type(config))
    if not kwargs.get("allow_is_causal_skip", True) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return (eager_mask if adds else sdpa_mask)(*args, **{**kwargs, "allow_is_causal_skip": False})
    call = inspect.signature(sdpa_mask).bind(*args, **kwargs)
    call.apply_defaults()
    said = call.arguments
    mask = sdpa_mask(*args, **{**kwargs, "allow_is_bidirectional_skip": False})
    if mask is not None:
        return eager_mask(*args, **kwargs) if adds else mask
    offset = int(said["q_offset"]) - int(said["kv_offset"])
    if offset >= said["kv_length"] - 1:
        return None
    dtype = kwargs["dtype"] if adds else torch.bool
    return CausalMask(said["batch_size"], said["q_length"], said["kv_length"], offset, said["device"], dtype)


@torch.compiler.assume_constant_result
def _adds_masks(config_class: type) -> bool:
    if config_class not in _ADDS_MASKS:
        models = [m for m in _subclasses(PreTrainedModel) if getattr(m, "config_class", None) is config_class]
        _ADDS_MASKS[config_class] = any(not getattr(model, "_supports_sdpa", False) for model in models)
    return _ADDS_MASKS[config_class]


def _subclasses(cls: Any) -> Iterator[Any]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


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
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    sinks: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One attention layer. query [B, Hq, Sq, D], key [B, Hkv, Skv, D], value [B, Hkv, Skv, Dv] -> [B, Sq, Hq, Dv] and no weights.

    The result is that of the model's eager attention: attention_mask alone says which keys a query sees. bool [B or 1, Hq or 1, Sq,
    Skv] (True = keep), float (added), or None, which is every key, whatever `module.is_causal` says. is_causal=True in the call
    without a mask is causal for as many keys as queries, and refused for more, where eager, sdpa and FlashAttention differ.
    s_aux [Hq]: sink logits; sinks, broadcasting to [B, Hq, Sq, 1]: one for each query. position_bias: added to the scores, with its
    gradient. indices [B, Sq, n], block_indices [B, groups, Sq, n]: keys, or blocks of keys, that an indexer left for each query.
    cu_seq_lens_q/k: sequences packed into one row, with a plain causal mask or none. sliding_window adds nothing to a mask, which
    holds it already.
    """
    _refuse_unknown(module, output_attentions, kwargs)
    # What the mask says: stored, causal from `offset` on, or every key
    Sq, Skv = query.shape[2], key.shape[2]
    causal, window = False, None
    if isinstance(attention_mask, CausalMask) and attention_mask.shape[-2:] == (Sq, Skv):
        offset = attention_mask.offset
        attention_mask = stored(attention_mask) if offset is None else None
    else:
        offset = None
        if attention_mask is None and is_causal and Sq > 1:
            if Sq != Skv and cu_seq_lens_q is None:
                raise ValueError(
                    f"{type(module).__name__} asks for is_causal=True with {Sq} queries, {Skv} keys and no mask, which does not say "
                    "which keys a query sees: pass a mask [B, 1, Sq, Skv] (transformers.masking_utils.create_causal_mask makes it)"
                )
            offset = 0
    # The same as options of attention, over the keys that are filled
    sparse = _sparse_mask(module, query.shape[1], Skv, indices, block_indices)
    if cu_seq_lens_q is not None:
        causal = offset is not None
    elif offset is not None and Sq + offset > Skv:
        window = (None, Sq + offset - Skv)
    elif offset is not None:
        # The keys after the last query's own are slots of a static cache that nothing has filled.
        causal, seen = True, slice(Sq + offset)
        key, value = key[:, :, seen], value[:, :, seen]
        sparse = None if sparse is None else sparse[..., seen]
        if position_bias is not None and position_bias.shape[-1] == Skv:
            position_bias = position_bias[..., seen]

    options: dict[str, Any] = {
        "causal": causal,
        "window": window,
        "scale": scaling,
        "softcap": softcap,
        "sinks": s_aux,
        "dropout_p": dropout,
        "deterministic": bool(deterministic),
    }
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    # With a stored mask as well, the mask decides: it was built from the same positions, and holds padding that cu_seq_lens lacks.
    if cu_seq_lens_q is not None and attention_mask is None:
        lengths = _packed_lengths(q, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        others = {"position_bias": position_bias, "indices": indices, "block_indices": block_indices, "sinks": sinks}
        if given := [name for name, x in others.items() if x is not None]:
            raise ValueError(
                f"cu_seq_lens_q describes packed sequences, which foveate does not serve together with {', '.join(given)}: "
                "pass a padded batch with a 2-D attention_mask"
            )
        if sliding_window is not None:
            options["window"] = (sliding_window - 1, 0 if causal else sliding_window - 1)
        return cast(Tensor, foveate.attention_varlen(q[0], k[0], v[0], *lengths, **options))[None], None

    mask, bias = _split_mask(attention_mask, position_bias)
    mask = sparse if mask is None else mask if sparse is None else mask & sparse
    if sinks is None:
        return cast(Tensor, foveate.attention(q, k, v, mask=mask, bias=bias, **options)), None
    # One more logit without a value takes its share of each row: out * exp(lse) / (exp(lse) + exp(sink)).
    out, lse = foveate.attention(q, k, v, mask=mask, bias=bias, return_lse=True, **options)
    kept = torch.sigmoid(lse - sinks.squeeze(-1).to(lse.dtype))
    return (out * kept.transpose(1, 2)[..., None]).to(out.dtype), None


def _sparse_mask(
    module: torch.nn.Module, Hq: int, Skv: int, indices: Tensor | None, block_indices: Tensor | None
) -> Tensor | None:
    """bool, True at the keys that the model's indexer has left, before its causal or padding mask."""
    if indices is not None:
        return mask_of_indices(indices, Skv)
    if block_indices is None:
        return None
    size = getattr(getattr(module, "indexer", None), "block_size", None)
    if size is None:
        raise TypeError(
            f"{type(module).__name__} passes block_indices, but has no indexer.block_size that says how many keys a block holds: "
            "use another attn_implementation for this model"
        )
    return mask_of_blocks(block_indices, size, Hq, Skv)


def _packed_lengths(
    q: Tensor, cu_q: Tensor, cu_k: Tensor | None, max_q: int | None, max_k: int | None
) -> tuple[Tensor, Tensor, int, int]:
    if cu_k is None or max_q is None or max_k is None:
        raise ValueError(
            "cu_seq_lens_q came without cu_seq_lens_k, max_length_q or max_length_k; "
            "pass all four (DataCollatorWithFlattening with return_flash_attn_kwargs=True does)"
        )
    if q.shape[0] != 1:
        raise ValueError(
            f"cu_seq_lens_q describes sequences packed into one row; this batch has {q.shape[0]} rows: "
            "pass a padded batch with a 2-D attention_mask"
        )
    return cu_q.int(), cu_k.int(), int(max_q), int(max_k)


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
