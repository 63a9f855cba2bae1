"""A model's files: Hugging Face folders, GGUF files, adapters; `open_checkpoint` chooses and reads all but the weights."""
