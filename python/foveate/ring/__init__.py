"""Attention over a sequence whose tokens are spread over several processes."""

from foveate.ring.attention import ring_attention
from foveate.ring.layout import gather_sequence, sequence_multiple, sequence_positions, split_sequence

__all__ = ["gather_sequence", "ring_attention", "sequence_multiple", "sequence_positions", "split_sequence"]
