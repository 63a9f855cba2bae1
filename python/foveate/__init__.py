"""Flash-style attention, fused softmax and KV-cache kernels for CPU and GPU, for any torch."""

from foveate._backends import UnsupportedError
from foveate._relative_bias import RelativeBias
from foveate.attention import attention, merge_attention
from foveate.attention_varlen import attention_varlen
from foveate.kv_cache import attention_with_kv_cache

__version__ = "0.1.0"

__all__ = [
    "RelativeBias",
    "UnsupportedError",
    "attention",
    "attention_varlen",
    "attention_with_kv_cache",
    "merge_attention",
]
