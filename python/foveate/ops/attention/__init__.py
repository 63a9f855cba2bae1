"""Attention: dense, varlen, over a KV cache; with score_mod, nested tensors and vmap; which kernel serves a call."""
