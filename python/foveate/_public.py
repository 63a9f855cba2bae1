# ruff: noqa: F401
"""What `import foveate` brings beside the model layer: the functions on tensors. All names here are of `foveate.__all__`."""

from foveate import drop_in, nn
from foveate.backend.info import backends, info
from foveate.backend.registry import UnsupportedError
from foveate.cache.paged import CacheFull, PagedKVCache
from foveate.cache.view import CacheView
from foveate.files.checked import CheckpointError
from foveate.ops.attention.dense import attention, merge_attention
from foveate.ops.attention.explain import explain
from foveate.ops.attention.relative_bias import RelativeBias
from foveate.ops.attention.sdpa import sdpa
from foveate.ops.attention.varlen import attention_varlen
from foveate.ops.attention.weights import attention_weights
from foveate.ops.attention.with_kv_cache import attention_with_kv_cache
from foveate.ops.cross_entropy import CrossEntropyOutput, cross_entropy, linear_cross_entropy
from foveate.ops.glu import geglu, swiglu
from foveate.ops.rms_norm import rms_norm
from foveate.ops.rotary import apply_rotary
from foveate.ops.softmax import log_softmax, softmax
