"""Flash-style attention, fused softmax and KV-cache kernels for CPU and GPU, for any torch."""

from foveate._backends import UnsupportedError
from foveate.loss import cross_entropy, linear_cross_entropy
from foveate.norm import rms_norm
from foveate.rotary import apply_rotary
from foveate.softmax import log_softmax, softmax

__version__ = "0.1.0"

__all__ = [
    "UnsupportedError",
    "apply_rotary",
    "cross_entropy",
    "linear_cross_entropy",
    "log_softmax",
    "rms_norm",
    "softmax",
]
