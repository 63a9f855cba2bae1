"""diffusers on foveate: its native attention backend, through which every pipeline goes unless told otherwise.

    from foveate.integrations import diffusers as foveate_diffusers
    foveate_diffusers.enable()             # and .disable(); or `with foveate_diffusers.enabled(): ...`

diffusers calls torch's scaled_dot_product_attention from two places, its attention processors and its "native" backend; both are
reached by `foveate.drop_in.sdpa`, which this is under another name. Pipelines whose backend is another ("flash", "xformers", set by
set_attention_backend or DIFFUSERS_ATTN_BACKEND) are not: `check` names them.
"""

from __future__ import annotations

import sys
from typing import Any

from foveate import drop_in


def enabled() -> drop_in.sdpa:
    """A context manager and decorator: `foveate.drop_in.sdpa()`, after `check`."""
    check()
    return drop_in.sdpa()


def enable() -> None:
    """For the process, until `disable`."""
    enabled().enable()


def disable() -> None:
    drop_in.sdpa().disable()


def check() -> None:
    """Raise RuntimeError if diffusers' attention backend is one that torch's function does not serve."""
    dispatch: Any = sys.modules.get("diffusers.models.attention_dispatch")
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    if registry is None:
        return  # not imported yet, or a version without backends
    active = registry.get_active_backend()
    name = str(getattr(active[0] if isinstance(active, tuple) else active, "value", active))
    if not name.startswith(("native", "_native")):
        raise RuntimeError(
            f"diffusers' attention backend is {name!r}, which does not go through torch's scaled_dot_product_attention; "
            'choose "native" (set_attention_backend, or DIFFUSERS_ATTN_BACKEND=native)'
        )
