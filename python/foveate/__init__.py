"""Flash-style attention, fused softmax and KV-cache kernels for CPU and GPU, for any torch."""

from foveate._backends import UnsupportedError

__version__ = "0.1.0"

__all__ = ["UnsupportedError"]
