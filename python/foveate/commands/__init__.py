"""The commands of `foveate` that use the model layer; `foveate.cli` lists them."""
