"""Modules: foveate.nn.MultiheadAttention, with torch.nn.MultiheadAttention's constructor and state dict, and foveate.nn.PackedLinear."""

from foveate.nn.multihead_attention import MultiheadAttention
from foveate.nn.packed_linear import PackedLinear

__all__ = ["MultiheadAttention", "PackedLinear"]
