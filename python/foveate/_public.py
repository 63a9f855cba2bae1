"""What `import foveate` brings beside the model layer: the functions on tensors. `foveate.__all__` has these names too."""

from foveate import drop_in, nn
from foveate._explain import explain
from foveate._loss_extras import CrossEntropyOutput
from foveate._relative_bias import RelativeBias
from foveate.attention import attention, merge_attention
from foveate.attention_varlen import attention_varlen
from foveate.backend.info import backends, info
from foveate.backend.registry import UnsupportedError
from foveate.cache_view import CacheView
from foveate.files.checked import CheckpointError
from foveate.glu import geglu, swiglu
from foveate.kv_cache import attention_with_kv_cache
from foveate.loss import cross_entropy, linear_cross_entropy
from foveate.norm import rms_norm
from foveate.paged_kv_cache import CacheFull, PagedKVCache
from foveate.rotary import apply_rotary
from foveate.sdpa import sdpa
from foveate.softmax import log_softmax, softmax

__all__ = [
    "CacheFull",
    "CacheView",
    "CheckpointError",
    "CrossEntropyOutput",
    "PagedKVCache",
    "RelativeBias",
    "UnsupportedError",
    "apply_rotary",
    "attention",
    "attention_varlen",
    "attention_with_kv_cache",
    "backends",
    "cross_entropy",
    "drop_in",
    "explain",
    "geglu",
    "info",
    "linear_cross_entropy",
    "log_softmax",
    "merge_attention",
    "nn",
    "rms_norm",
    "sdpa",
    "softmax",
    "swiglu",
]
