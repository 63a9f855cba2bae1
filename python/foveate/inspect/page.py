"""The page of an inspection: one file of HTML that needs nothing from anywhere else. page.html has its looks and its script."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from foveate.inspect.results import Inspection

_TEMPLATE = Path(__file__).with_name("page.html")
_STEPS = 65535  # a probability is stored in 16 bits: to 1.5e-5
MAX_BYTES = 256 * 1024 * 1024


def page(inspection: Inspection, title: str) -> str:
    """ValueError for more attention than a browser can hold."""
    if inspection.attention is not None and inspection.attention.numel() * 8 // 3 > MAX_BYTES:
        raise ValueError(
            f"{inspection.attention.numel()} numbers of attention make a page of more than {MAX_BYTES >> 20} MiB; choose fewer layers, "
            "heads or rows, or write JSON"
        )
    data = inspection.to_dict()
    if inspection.attention is not None:
        data["attention"]["weights"] = _packed(inspection.attention)
    if inspection.rollout is not None:
        data["rollout"] = _packed(inspection.rollout)
    text = _TEMPLATE.read_text(encoding="utf-8")
    return text.replace("__TITLE__", html.escape(title)).replace("__DATA__", _json_for_script(data))


def _packed(x: Tensor) -> str:
    """Little-endian 16-bit integers in base64."""
    whole = (x.clamp(0, 1) * _STEPS).round().to("cpu").numpy().astype("<u2")
    return base64.b64encode(whole.tobytes()).decode()


def _json_for_script(data: Any) -> str:
    """JSON in which no token can end the script element or begin a comment."""
    text = json.dumps(data)  # with escapes for everything beyond ASCII
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
