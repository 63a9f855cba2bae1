"""Flash-style attention, fused softmax and KV-cache kernels for CPU and GPU, for any torch."""

from foveate._backends import UnsupportedError
from foveate.kv_cache import attention_with_kv_cache

__version__ = "0.1.0"

__all__ = ["UnsupportedError", "attention_with_kv_cache"]
