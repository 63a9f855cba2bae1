"""Embedder: a vector for each text, with encoders and decoders, as sentence-transformers makes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.models import load_model, open_checkpoint
from foveate.models.checkpoint.huggingface import SafetensorsWeights
from foveate.models.registry import model_types
from foveate.models.sequences import PackedSequences
from foveate.pipelines.encoder import TOKENS_PER_BATCH, as_texts, batches, run_packed
from foveate.tokenizer import Tokenizer


def _segments(hidden: Tensor, packed: PackedSequences) -> tuple[Tensor, Tensor, Tensor]:
    """[total, hidden] in fp32, the text of each token, and the tokens of each text as a column."""
    lengths = packed.cu_seqlens.diff().long()
    text = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), lengths)
    return hidden[0].float(), text, lengths[:, None].float()


def _sum(hidden: Tensor, packed: PackedSequences) -> Tensor:
    x, text, lengths = _segments(hidden, packed)
    return x.new_zeros(len(lengths), x.shape[1]).index_add_(0, text, x)


def _mean(hidden: Tensor, packed: PackedSequences) -> Tensor:
    return _sum(hidden, packed) / packed.cu_seqlens.diff()[:, None]


def _mean_sqrt(hidden: Tensor, packed: PackedSequences) -> Tensor:
    return _sum(hidden, packed) / packed.cu_seqlens.diff()[:, None].sqrt()


def _weighted_mean(hidden: Tensor, packed: PackedSequences) -> Tensor:
    """Later tokens of a decoder have seen more: weights 1, 2, 3 ... (Muennighoff 2022, arXiv 2202.08904)."""
    x, text, lengths = _segments(hidden, packed)
    weights = (packed.positions + 1)[:, None].float()
    return x.new_zeros(len(lengths), x.shape[1]).index_add_(0, text, x * weights) / (lengths * (lengths + 1) / 2)


def _max(hidden: Tensor, packed: PackedSequences) -> Tensor:
    return torch.stack([rows.amax(0) for rows in hidden[0].float().split(packed.cu_seqlens.diff().tolist())])


# By the names of sentence-transformers' pooling_mode_... keys.
POOLINGS: dict[str, Callable[[Tensor, PackedSequences], Tensor]] = {
    "cls_token": lambda hidden, packed: hidden[0, packed.starts].float(),
    "lasttoken": lambda hidden, packed: hidden[0, packed.cu_seqlens[1:].long() - 1].float(),
    "max_tokens": _max,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "mean_tokens": _mean,
    "weightedmean_tokens": _weighted_mean,
}
_SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


class Embedder:
    """Vectors whose similarity is that of the texts (Reimers and Gurevych 2019, arXiv 1908.10084).

        embed = Embedder("path to a sentence-transformers folder, a BERT or a decoder such as Qwen3-Embedding")
        a, b = embed.encode(["A cat sat there.", "There was a cat."])
        embed.similarity(a[None], b[None])      # [[0.85]]

    path_or_model: what `load_model` takes, or a model together with its tokenizer. pooling: how the vectors of a text's tokens become
    one, "mean_tokens", "cls_token", "lasttoken", "max_tokens", "mean_sqrt_len_tokens" or "weightedmean_tokens"; normalize: to length 1.
    None takes both from the folder's modules.json; without one, the mean for encoders, the last token for decoders, not normalised.
    Its Dense modules come between the two.
    max_seq_length: of a text in tokens; None: what the folder says, at most the model's positions.
    """

    def __init__(
        self,
        path_or_model: str | Path | nn.Module,
        tokenizer: Tokenizer | None = None,
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        max_seq_length: int | None = None,
        **options: Any,
    ) -> None:
        """options: device, dtype, quantization and progress, see `load_model`."""
        folder: dict[str, Any] = {}
        if isinstance(path_or_model, nn.Module):
            self.model: Any = path_or_model
        else:
            checkpoint = open_checkpoint(path_or_model)
            head = "encoder" if checkpoint.config.get("model_type") in model_types(heads=True) else None
            self.model = load_model(checkpoint, head=head, **options)
            tokenizer = tokenizer or checkpoint.tokenizer()
            folder = read_sentence_transformers(checkpoint.path)
            if checkpoint.config.get("pooling") in POOLINGS:  # of a GGUF file
                folder.setdefault("pooling", checkpoint.config["pooling"])
        if tokenizer is None:
            raise ValueError(f"there is no tokenizer: {path_or_model} has no tokenizer.json; pass tokenizer=")
        self.tokenizer = tokenizer
        self._decoder = hasattr(self.model, "hidden")
        if not self._decoder and not hasattr(self.model, "pool"):
            raise ValueError(
                f"a {type(self.model).__name__} has no hidden states of a text; take an encoder or a decoder"
            )
        self.pooling = pooling or folder.get("pooling") or ("lasttoken" if self._decoder else "mean_tokens")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling={self.pooling!r} is not one of {', '.join(POOLINGS)}")
        self.normalize: bool = bool(folder.get("normalize")) if normalize is None else normalize
        device = next(self.model.parameters()).device
        self.dense = nn.Sequential(*folder.get("dense", ())).to(device)  # empty without Dense modules
        widths = [layer.out_features for layer in self.dense if isinstance(layer, nn.Linear)]
        self.dimension: int = widths[-1] if widths else self.model.config.hidden_size
        self.prompts: dict[str, str] = folder.get("prompts", {})
        self.default_prompt_name: str | None = folder.get("default_prompt_name")
        self.similarity_fn_name: str = folder.get("similarity_fn_name") or "cosine"
        positions = self.model.config.max_positions
        self.max_seq_length: int = min(max_seq_length or folder.get("max_seq_length") or positions, positions)

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        truncate: bool = False,
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ) -> Tensor:
        """fp32 [texts, self.dimension] on the CPU; [self.dimension] for a str. Texts are packed by length: there is no padding.

        prompt: put before each text; prompt_name: one of self.prompts; by default the folder's default prompt, if it has one.
        ValueError for a text without tokens, and for one of more than max_seq_length, unless truncate cuts it there, special tokens kept.
        """
        before = self._prompt(prompt, prompt_name)
        entries = [before + text for text in as_texts(texts)]
        encodings = self.tokenizer.backend.encode_batch(entries)
        empty = next((i for i, encoding in enumerate(encodings) if not encoding.ids), None)
        if empty is not None:
            raise ValueError(f"the text {empty} has no tokens, and so no vector; give one that is not empty")
        longest = max(range(len(entries)), key=lambda i: len(encodings[i].ids), default=None)
        if longest is not None and len(encodings[longest].ids) > self.max_seq_length:
            if not truncate:
                raise ValueError(
                    f"the text {longest} has {len(encodings[longest].ids)} tokens, and max_seq_length is {self.max_seq_length}; "
                    "split it, or pass truncate=True to use its beginning only"
                )
            encodings = self._truncated(entries)
        rows = torch.empty(len(entries), self.dimension)
        for batch in batches([len(e.ids) for e in encodings], tokens_per_batch):
            hidden, packed = run_packed(self.model, [encodings[i] for i in batch], self._hidden)
            with torch.inference_mode():
                pooled = self.dense(POOLINGS[self.pooling](hidden, packed))
                rows[batch] = (nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled).cpu()
        return rows[0] if isinstance(texts, str) else rows

    def similarity(self, a: Tensor, b: Tensor) -> Tensor:
        """[texts of a, texts of b] by self.similarity_fn_name: "cosine", "dot", or minus the "euclidean" or "manhattan" distance."""
        if self.similarity_fn_name == "dot":
            return a @ b.t()
        if self.similarity_fn_name == "cosine":
            return nn.functional.normalize(a, dim=-1) @ nn.functional.normalize(b, dim=-1).t()
        return -torch.cdist(a, b, p=2.0 if self.similarity_fn_name == "euclidean" else 1.0)

    def _hidden(self, ids: Tensor, types: Tensor, packed: PackedSequences) -> Tensor:
        return self.model.hidden(ids, packed=packed) if self._decoder else self.model(ids, types, packed=packed)

    def _prompt(self, prompt: str | None, prompt_name: str | None) -> str:
        if prompt is not None:
            return prompt
        name = prompt_name if prompt_name is not None else self.default_prompt_name
        if name is None:
            return ""
        if name not in self.prompts:
            raise ValueError(
                f"prompt_name={name!r} is not one of {', '.join(self.prompts) or 'none: the folder has no prompts'}"
            )
        return self.prompts[name]

    def _truncated(self, texts: list[str]) -> list[Any]:
        """By a copy of the tokenizer, of which truncation is a state that calls in other threads would meet."""
        backend: Any = type(self.tokenizer.backend).from_str(self.tokenizer.backend.to_str())
        backend.enable_truncation(self.max_seq_length)
        return backend.encode_batch(texts)


def read_sentence_transformers(folder: Path) -> dict[str, Any]:
    """What a sentence-transformers folder says: pooling, normalize, max_seq_length, prompts ...; {} without a modules.json.

    dense: the layers of its Dense modules, in fp32. ValueError for modules other than Transformer, Pooling, Dense and Normalize, and for
    a Dense behind Normalize.
    """
    if not folder.is_dir() or not (folder / "modules.json").exists():
        return {}
    found: dict[str, Any] = {"normalize": False}
    for module in _read(folder / "modules.json", list):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            found["pooling"] = _pooling(folder / str(module.get("path", "")) / "config.json")
        elif kind == "Dense":
            if found["normalize"]:
                raise ValueError(
                    f"{folder} has a Dense module behind Normalize; only Dense before Normalize is supported"
                )
            found.setdefault("dense", []).extend(_dense(folder / str(module.get("path", ""))))
        elif kind == "Normalize":
            found["normalize"] = True
        elif kind != "Transformer":
            raise ValueError(
                f"{folder} has a module {module.get('type')!r}; known are Transformer, Pooling, Dense and Normalize"
            )
    if (folder / "sentence_bert_config.json").exists():
        config = _read(folder / "sentence_bert_config.json", dict)
        found["max_seq_length"] = config.get("max_seq_length")
    if (folder / "config_sentence_transformers.json").exists():
        config = _read(folder / "config_sentence_transformers.json", dict)
        found |= {
            key: config[key] for key in ("prompts", "default_prompt_name", "similarity_fn_name") if config.get(key)
        }
    name = found.get("similarity_fn_name", "cosine")
    if name not in _SIMILARITIES:
        raise ValueError(f"{folder} names the similarity {name!r}; known are {', '.join(_SIMILARITIES)}")
    return found


_DENSE_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "Tanh": nn.Tanh, "Identity": nn.Identity, "ReLU": nn.ReLU, "GELU": nn.GELU, "Sigmoid": nn.Sigmoid, "SiLU": nn.SiLU,
}  # fmt: skip


def _dense(folder: Path) -> list[nn.Module]:
    """A linear layer and its activation, of a Dense module's folder."""
    config = _read(folder / "config.json", dict)
    name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if name not in _DENSE_ACTIVATIONS:
        raise ValueError(
            f"{folder} has the activation {config['activation_function']!r}; known are {', '.join(_DENSE_ACTIVATIONS)}"
        )
    weights = SafetensorsWeights(folder)
    stored = {key.removeprefix("linear."): weights.get(key).float() for key in weights.names()}
    shape = (config.get("out_features"), config.get("in_features"))
    if "weight" not in stored or tuple(stored["weight"].shape) != shape:
        found = list(stored["weight"].shape) if "weight" in stored else "no weight"
        raise ValueError(
            f"{folder} has {found}, and its config.json asks for a weight of {list(shape)}; download it again"
        )
    layer = nn.utils.skip_init(nn.Linear, shape[1], shape[0], bias="bias" in stored)
    layer.load_state_dict(stored)
    return [layer.eval(), _DENSE_ACTIVATIONS[name]()]


def _pooling(file: Path) -> str:
    config = _read(file, dict)
    modes = [
        key.removeprefix("pooling_mode_") for key, value in config.items() if key.startswith("pooling_mode_") and value
    ]
    if not modes and config.get("pooling_mode"):
        modes = [config["pooling_mode"]]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(f"{file} asks for the pooling {modes}; one of {', '.join(POOLINGS)} is supported")
    return modes[0]


def _read(file: Path, kind: type) -> Any:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(
            f"{file} must hold a JSON {'list' if kind is list else 'object'}, not a {type(value).__name__}"
        )
    return value
