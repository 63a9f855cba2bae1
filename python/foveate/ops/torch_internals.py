"""What foveate uses of torch that torch does not promise to keep, in one place and by plain names.

None stands for what a torch lacks; whoever asks then takes the longer way. `forward_ad._current_level` is the level of forward-mode
differentiation, -1 outside of it; it is read where it is used, since it changes and a function around it would cost its call.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd import forward_ad  # noqa: F401

# torch.func: whether any of its transforms is active; what a transform has made of a tensor, and the tensor within.
transforms_are_active = torch._C._are_functorch_transforms_active
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
is_batched_tensor = torch._C._functorch.is_batchedtensor
is_legacy_batched_tensor = torch._C._functorch.is_legacy_batchedtensor
unwrapped = torch._C._functorch.get_unwrapped
innermost_transform = getattr(torch._C._functorch, "peek_interpreter_stack", None)
VMAP: Any = torch._C._functorch.TransformType.Vmap

# What may stand between a call and a kernel: dispatch modes, torch.jit.trace, a profiler, hooks for saved tensors.
dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
tracing_state = getattr(torch._C, "_get_tracing_state", None)
profiler_is_on = torch.autograd._profiler_enabled
saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)

FakeTensor = torch._subclasses.FakeTensor
without_torch_function: Any = torch._C.DisableTorchFunction
no_torch_function: Any = torch._C._disabled_torch_function_impl


def recordable() -> AbstractContextManager[Any]:
    """Within it autograd records, also where a dispatch mode (a FLOP counter, selective checkpointing) has excluded it."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
