"""Make `import flash_attn` mean foveate's module, for programs that are not to be changed."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

_HERE = "foveate.integrations.flash_attn"
_MODULES = (
    "",
    ".flash_attn_interface",
    ".bert_padding",
    ".layers",
    ".layers.rotary",
    ".losses",
    ".losses.cross_entropy",
    ".ops",
    ".ops.layer_norm",
    ".ops.rms_norm",
    ".ops.triton",
    ".ops.triton.layer_norm",
    ".ops.triton.cross_entropy",
    ".ops.triton.rotary",
    ".modules",
    ".modules.mha",
)
_installed: dict[str, ModuleType | None] = {}  # name: what was there before


def install(*, replace: bool = False) -> None:
    """From now on `import flash_attn` gives `foveate.integrations.flash_attn`, and `import flash_attn_interface` FlashAttention-3's names.

    For the whole process, until `uninstall`. What took functions from another flash_attn before keeps them. Raises RuntimeError if
    another flash_attn or flash_attn_interface has been imported, unless replace=True.

    transformers and some others ask the installed distributions, not the modules, whether there is a flash_attn, and go on without
    it; for transformers use `foveate.integrations.transformers.register`.
    """
    if _installed:
        return
    wanted = {f"flash_attn{name}": _HERE + name for name in _MODULES}
    wanted["flash_attn_interface"] = "foveate.integrations.flash_attn_3"
    others = [name for name in ("flash_attn", "flash_attn_interface") if name in sys.modules]
    if others and not replace:
        raise RuntimeError(
            f"another {' and '.join(others)} has been imported already; call install() before the program imports it, "
            "or install(replace=True)"
        )
    modules = {name: importlib.import_module(ours) for name, ours in wanted.items()}
    # Every other submodule of the real package goes out of sight too: half of one and half of the other would be neither.
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        _installed[name] = sys.modules.pop(name)
    for name, module in modules.items():
        _installed.setdefault(name, sys.modules.get(name))
        sys.modules[name] = module


def uninstall() -> None:
    """Undo `install`: what was imported under these names before is there again."""
    for name, before in _installed.items():
        if before is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = before
    _installed.clear()
