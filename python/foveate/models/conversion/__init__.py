"""Writing a checkpoint in another format: GGUF files and Hugging Face folders. `foveate.models.convert`."""
