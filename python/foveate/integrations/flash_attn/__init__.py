"""The flash_attn package (version 2), with its names, parameters and meaning, on every device and dtype of foveate.

    from foveate.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
    from foveate.integrations.flash_attn.bert_padding import unpad_input, pad_input

Below it, as there: flash_attn_interface, bert_padding, layers.rotary, losses.cross_entropy, ops.layer_norm, ops.rms_norm,
ops.triton.layer_norm, ops.triton.cross_entropy, ops.triton.rotary, modules.mha. FlashAttention-3's functions are in
`foveate.integrations.flash_attn_3`.

A program that says `import flash_attn` runs unmodified after

    from foveate.integrations import flash_attn
    flash_attn.install()          # before the program imports it

Shapes are [B, S, H, D], packed [total, H, D]. Hkv divides Hq. causal is aligned to the bottom right: the last query sees the last
key. window_size=(left, right) shows query i the keys i + Sk - Sq - left to i + Sk - Sq + right, -1 is unlimited. softcap=0.0 is
off. alibi_slopes, fp32 [Hq] or [B, Hq], adds -slope * |i + Sk - Sq - j|. A row that sees no key gives zeros.

return_attn_probs=True gives (out, lse, S_dmask) with lse fp32 [B, Hq, Sq], or [Hq, total] packed. S_dmask is empty without dropout.
With dropout it is [B, Hq, Sq, Sk], exp(score - the row's largest score) with a negative sign where dropout has struck: this one
stores the scores, and is for tests.
"""

from __future__ import annotations

from foveate.integrations.flash_attn import bert_padding as bert_padding
from foveate.integrations.flash_attn._install import install as install
from foveate.integrations.flash_attn._install import uninstall as uninstall
from foveate.integrations.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = "2.8.3"  # whose functions these are

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
