"""Models on foveate's kernels, and loading them from Hugging Face folders and GGUF files. `open_checkpoint`, `load_model`,
`convert`."""

from foveate.models.checkpoint.base import Checkpoint
from foveate.models.checkpoint.open import open_checkpoint
from foveate.models.conversion.converting import convert
from foveate.models.loading import load_model

__all__ = ["Checkpoint", "convert", "load_model", "open_checkpoint"]
