"""Block formats of quantised weights: GGUF's blocks as they lie in files, and the panels that the kernels read."""
