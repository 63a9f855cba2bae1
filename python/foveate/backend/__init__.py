"""Who computes: the registry that chooses, the compiled kernels (`native`), the Triton kernels, and the definition in torch."""
