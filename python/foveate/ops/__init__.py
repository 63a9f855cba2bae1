"""What a call means: the public functions on tensors, their checks, op schemas, fakes and gradients."""
