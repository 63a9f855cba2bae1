"""convert: a checkpoint as a GGUF file or as a Hugging Face folder, quantised or in another dtype."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from foveate.files.checked import CheckpointError
from foveate.models.checkpoint.base import Checkpoint
from foveate.models.checkpoint.gguf import GgufCheckpoint
from foveate.models.checkpoint.open import open_checkpoint
from foveate.models.conversion import gguf_writer, safetensors_writer
from foveate.models.conversion.gguf_tensors import FLOAT_KINDS, MIXES
from foveate.models.loading import checked_dtype, load_model
from foveate.models.quantizing import check_quantization, importance_of
from foveate.progress import ProgressBar

FORMATS = ("gguf", "safetensors")


def convert(
    model: str | Path | Checkpoint,
    out: str | Path,
    *,
    to: str | None = None,
    quantization: str | None = None,
    imatrix: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    base: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> Path:
    """Writes a checkpoint, or what `open_checkpoint` takes, as `out` in another format, and returns its path.

    to: "gguf", a file that llama.cpp reads, with the tokenizer and the chat template in it, or "safetensors", a folder that transformers
    reads; None: by the name of `out`, "gguf" if it ends in .gguf.
    quantization, for GGUF: "q8_0", "q4_0", "q4_1", "q4_k", "q5_k", "q6_k", "iq4_nl", or "q4_k_m" and "q5_k_m", in which attn_v and
    ffn_down of half of the layers have 6 bits; "none" expands all to dtype; None keeps the blocks of a GGUF file. The head has 6 bits or
    more, norms, biases and routers stay fp32, and rows that are no multiple of 256 take "q4_1" or "q8_0" for K formats.
    imatrix: a text, or the path of a file with one, see `load_model`: the model reads it before it is quantised.
    dtype: of what is not quantised; the checkpoint's by default, and bfloat16 for a GGUF file that is expanded. base: of an adapter.
    force: replaces `out`, which is otherwise left alone with FileExistsError. A conversion that fails leaves no `out`.

    One tensor is in memory at a time, of a folder one shard of 4 GB. ValueError (CheckpointError) for what the format has no place for:
    an architecture, a tokenizer, a RoPE scaling that GGUF's metadata do not name.
    """
    out = Path(out).expanduser()
    to = to or ("gguf" if out.suffix == ".gguf" else "safetensors")
    if to not in FORMATS:
        raise ValueError(f"to={to!r} is not one of {', '.join(FORMATS)}")
    if quantization in MIXES:
        check_quantization(MIXES[quantization], imatrix)
    else:
        check_quantization(quantization, imatrix)
    if to == "safetensors" and quantization not in (None, "none"):
        raise ValueError(
            f"quantization={quantization!r} has blocks of GGUF, for which safetensors has no place; write --to gguf, or give a dtype alone"
        )
    wanted = checked_dtype(dtype)
    if wanted is torch.float64:
        raise ValueError("dtype=float64 is not written; choose float32, bfloat16 or float16")
    _check_place(out, to, force)
    checkpoint = open_checkpoint(model, base)
    from_gguf = isinstance(checkpoint, GgufCheckpoint)
    sources = checkpoint.file.paths if isinstance(checkpoint, GgufCheckpoint) else [checkpoint.path]
    if out.resolve() in [source.resolve() for source in sources]:
        raise ValueError(f"{out} is the model itself; write to another place")
    chosen = wanted or (torch.bfloat16 if from_gguf else _stored_dtype(checkpoint))
    shown = sys.stderr.isatty() if progress is None else progress
    importance = _importance(checkpoint, imatrix, shown)
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with ProgressBar(f"writing {out.name}", "bar", "remaining", total=_weights(checkpoint), shown=shown) as bar:
            if to == "safetensors":
                partial.mkdir()
                safetensors_writer.write_folder(checkpoint, partial, chosen, bar.advance)
            elif isinstance(checkpoint, GgufCheckpoint):
                gguf_writer.from_gguf(checkpoint, partial, quantization, chosen, importance, bar.advance)
            else:
                gguf_writer.from_model(checkpoint, partial, quantization, chosen, importance, bar.advance)
        _remove(out)
        partial.rename(out)
    finally:
        _remove(partial)
    return out


def _check_place(out: Path, to: str, force: bool) -> None:
    if out.exists() and not force:
        raise FileExistsError(f"{out} is there already; give another name, or force=True (--force) to replace it")
    if out.is_dir() and to == "gguf":
        raise IsADirectoryError(
            f"{out} is a folder, and a GGUF file is one file; name a file in it, such as {out / 'model.gguf'}"
        )
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").exists():
        raise FileExistsError(
            f"{out} is a folder with other things than a model, and is not replaced; give another name"
        )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of most of the weights, if GGUF has a type for it; bfloat16 where they are of other libraries' formats."""
    weights = checkpoint.weights()
    sizes: dict[torch.dtype, int] = {}
    for name in weights.names():
        value = weights.get(name)
        if isinstance(value, Tensor) and value.dtype in FLOAT_KINDS:
            sizes[value.dtype] = sizes.get(value.dtype, 0) + value.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.bfloat16)


def _weights(checkpoint: Checkpoint) -> int:
    weights = checkpoint.weights()
    if isinstance(checkpoint, GgufCheckpoint) and checkpoint.file is not None:
        return sum(int(torch.Size(t.shape).numel()) for t in checkpoint.file.tensors.values())
    return sum(int(torch.Size(weights.get(name).shape).numel()) for name in weights.names())


def _importance(checkpoint: Checkpoint, imatrix: str | Path | None, progress: bool) -> Mapping[str, Tensor]:
    if imatrix is None:
        return {}
    if not hasattr(checkpoint, "tokenizer") or checkpoint.tokenizer() is None:
        raise CheckpointError(f"{checkpoint.path} has no tokenizer, which imatrix needs to read its text")
    model = load_model(checkpoint, progress=progress)
    return importance_of(model, checkpoint.tokenizer(), imatrix, progress)
