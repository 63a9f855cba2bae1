"""Quantising a loaded model: which linear layer gets which format, and how much the errors of each column cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.nn import PackedLinear
from foveate.progress import ProgressBar
from foveate.quantization.gguf_blocks import block_size
from foveate.quantization.names import QUANTISABLE, SEARCHED

_HEADS = ("lm_head", "cls.predictions.decoder")  # of causal models and T5, of BERT
# Where a row is not whole super-blocks of 256: a format of blocks of 32 that is no less exact.
_OF_SHORT_ROWS = {"q4_k": "q4_1", "q5_k": "q8_0", "q6_k": "q8_0"}
# What is read of a text for an importance matrix: more changes little, and takes its time.
_CHUNK, _MOST_TOKENS = 512, 2**16

_LONGEST_PATH = 240  # characters; more are a text


def packed_format(name: str, quantization: str, in_features: int) -> str:
    """What `load_model` packs the linear layer of this name in. The head's errors would reach every token: it has 6 bits or more."""
    wanted = quantization
    if name in _HEADS:
        wanted = "q6_k" if quantization in _OF_SHORT_ROWS else "q8_0"
    return _OF_SHORT_ROWS[wanted] if in_features % block_size(wanted)[0] and wanted in _OF_SHORT_ROWS else wanted


def check_quantization(quantization: str | None, importance: object = None, argument: str = "quantization") -> None:
    """ValueError, with the name of the argument, for a format that `load_model` does not know."""
    if quantization not in (None, "none", *QUANTISABLE):
        known = ", ".join(repr(name) for name in (None, "none", *QUANTISABLE))
        raise ValueError(f"{argument}={quantization!r} is not one of {known}")
    if importance is not None and quantization not in SEARCHED:
        raise ValueError(
            f"imatrix= weighs the errors of {', '.join(SEARCHED)}; quantization={quantization!r} takes none: leave it out"
        )


def quantize_model(
    model: nn.Module, quantization: str, importance: Mapping[str, Tensor] | None = None,
    advance: Callable[[int], None] = lambda weights: None,
) -> None:  # fmt: skip
    """Replaces each nn.Linear by a PackedLinear, one after the other, so that one layer's weights are there twice at most.

    importance: of `importance_of`; layers that are not in it are quantised without. advance: called with the weights that are done.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            if module.in_features % 32:
                raise ValueError(
                    f"{name} has {module.in_features} input features, but {quantization} packs blocks of 32; use quantization='none'"
                )
            form = packed_format(name, quantization, module.in_features)
            found = None if importance is None or form not in SEARCHED else importance.get(name)
            model.set_submodule(name, PackedLinear.from_linear(module, form, found))
            advance(module.weight.numel())


def importance_of(model: nn.Module, tokenizer: Any, text: str | Path, progress: bool = False) -> dict[str, Tensor]:
    """For each linear layer that the text reaches the mean of the squares of each input feature, fp32 [in], under its name.

    text: a text, or the path of a file with one, of which the first 65536 tokens count. The model reads it in pieces of 512 tokens.
    ValueError for a text of less than 32 tokens, and for models that do not read one text (encoder-decoders).
    """
    if tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer, which imatrix= needs to read its text")
    if not hasattr(model, "hidden"):
        raise ValueError(f"imatrix= is for decoders; {type(model).__name__} is none")
    ids = tokenizer.encode(_read(text))[:_MOST_TOKENS]
    if len(ids) < 32:
        raise ValueError(f"the text of imatrix= has {len(ids)} tokens; some thousands are of use, and 32 the least")
    device = next(model.parameters()).device
    pieces = torch.tensor(ids, device=device).split(min(_CHUNK, getattr(model.config, "max_positions", _CHUNK)))
    with (
        _observed(model) as sums,
        torch.inference_mode(),
        ProgressBar("reading the text", "bar", "remaining", total=len(pieces), shown=progress) as bar,
    ):
        for piece in pieces:
            model(piece[None])
            bar.advance(1)
    return {name: (total / count).float() for name, (total, count) in sums.items() if count}


def _read(text: str | Path) -> str:
    if isinstance(text, str) and (len(text) > _LONGEST_PATH or "\n" in text or not Path(text).is_file()):
        if len(text) <= _LONGEST_PATH and text.endswith((".txt", ".md", ".jsonl", ".dat", ".gguf")):
            raise FileNotFoundError(f"imatrix={text!r} looks like the name of a file, and there is none")
        return text
    try:
        return Path(text).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"imatrix={str(text)!r} is not UTF-8 text: {error}; give a text that the model should know"
        ) from None


@contextmanager
def _observed(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, int]]]:
    """{name: (sums of squares fp64 [in], rows)} of the linear layers' inputs while the context lasts."""
    sums: dict[str, tuple[Tensor, int]] = {}

    def observer(name: str) -> Callable[..., None]:
        def observe(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).float()
            total, count = sums.get(name, (0, 0))
            sums[name] = (total + rows.square().sum(0, dtype=torch.float64), count + len(rows))

        return observe

    handles = [
        module.register_forward_pre_hook(observer(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, PackedLinear))
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
