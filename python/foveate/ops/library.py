"""torch.ops.foveate.*: one place where schemas meet implementations.

`Library.define/impl` rather than `torch.library.custom_op`: a third of the overhead per call. Gradients are
`autograd.Function`s in the op's own file, which call these ops forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# torch's names of the devices whose tensors have memory. "PrivateUse1" stands for those that an extension of torch brings.
DEVICE_KEYS = ("CPU", "CUDA", "XPU", "MPS", "HPU", "PrivateUse1")

_library = torch.library.Library("foveate", "DEF")


def define(schema: str, *, impl: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `schema` with one implementation for every kind of device (the backend table chooses below it) and a fake kernel for
    shapes; returns the overload to call."""
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in DEVICE_KEYS:
        _library.impl(name, impl, key)
    torch.library.register_fake(f"foveate::{name}", fake, lib=_library)
    return getattr(torch.ops.foveate, name).default


def vmap(name: str, rule: Callable[..., Any]) -> None:
    """Give the op `name` its batching rule: rule(info, in_dims, *args) -> (outputs, out_dims)."""
    torch.library.register_vmap(f"foveate::{name}", rule, lib=_library)
