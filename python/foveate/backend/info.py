"""foveate.backends and foveate.info: what is compiled in, and what of it can run on this machine."""

from __future__ import annotations

import platform

import torch

from foveate._version import __version__
from foveate.backend import native
from foveate.backend import triton as triton_backend
from foveate.backend.registry import ORDER, registered


def backends() -> dict[str, str | None]:
    """Each backend's name with None if it can run here, else the sentence why not. `explain` answers for one call."""
    served = {backend for _, backend in registered()}
    answers = {name: None if name in served else f"this version has no {name} kernels" for name in ORDER}
    if native.missing_reason is not None:
        answers["native"] = native.missing_reason
    if "triton" in served:
        answers["triton"] = triton_backend.missing_reason()
    return answers


class Info(dict[str, object]):
    """A dict that prints as one line for each entry."""

    def __str__(self) -> str:
        width = max(map(len, self))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.items())


def info() -> Info:
    """What is compiled and what this machine can run: versions, backends, instruction sets, CUDA, threads. Printable."""
    facts = Info(foveate=__version__, torch=torch.__version__, python=platform.python_version())
    facts.update({f"backend {name}": answer or "available" for name, answer in backends().items()})
    if native.missing_reason is None:
        facts["cpu target"] = native._C.cpu_target()
        facts["cpu targets"] = ", ".join(
            name if runs_here else f"{name} (not on this CPU)" for name, runs_here in native._C.cpu_targets()
        )
        cuda = native._C.cuda_info() if hasattr(native._C, "cuda_info") else {"compiled": False}
        facts.update({f"cuda {name}": value for name, value in cuda.items()})
        facts["cuda kernels"] = (
            "tested in an emulator, not yet run on a GPU" if native._C.has_cuda_kernels() else "none"
        )
    facts["triton kernels"] = "tested in triton's interpreter, not yet run on a GPU"
    facts["threads"] = torch.get_num_threads()
    return facts
