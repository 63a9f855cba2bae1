"""Changes of a model for its training: LoRA, faster linear layers, gradient checkpointing, new weights."""
