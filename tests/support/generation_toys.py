"""A tiny model, a byte-level tokenizer and slow oracles for the tests of generation."""

from __future__ import annotations

import copy
import functools
import json
import random
from pathlib import Path

import pytest
import torch

import foveate
from foveate.generation import Engine
from foveate.generation.decode_graph import DecodeGraph
from foveate.models.gpt2 import GPT2, GPT2Config
from foveate.models.llama import Llama, LlamaConfig
from foveate.tokenizer import Tokenizer

EOS = 0
TEXT = [
    "the quick brown fox jumps over the lazy dog, again and again: the quick brown fox!",
    '{"name": "value", "count": 12, "list": [1, 2, 3], "flag": true, "nothing": null}',
    "naïve café über 東京 😀 — déjà vu",
]


@functools.cache
def tokenizer() -> Tokenizer:
    """Byte-level BPE of about 330 tokens, <eos> = 0, <user> = 1 special."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<eos>", "<user>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 3, trainer)
    template = "{% for m in messages %}<user>{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    return Tokenizer(backend, config={"eos_token_id": EOS}, chat_template=template)


@functools.cache
def model(vocab: int = 336, seed: int = 0, positions: int = 256) -> Llama:
    """Random weights, large enough for confident and varied choices."""
    torch.manual_seed(seed)
    made = Llama(
        LlamaConfig(
            vocab_size=vocab, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
            max_positions=positions, windows=(None, None),
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.35)
    return made.eval().requires_grad_(False)


def cache(num_pages: int = 64, page_size: int = 4) -> foveate.PagedKVCache:
    made = foveate.PagedKVCache(num_pages, page_size, num_kv_heads=2, head_dim=8, num_layers=2, dtype=torch.float32)
    made.k_pages.fill_(float("nan"))
    made.v_pages.fill_(float("nan"))
    return made


@functools.cache
def gpt2():
    """Random weights, of the size of model()."""
    torch.manual_seed(2)
    sizes = {"vocab_size": 336, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "n_inner": None}
    made = GPT2(GPT2Config.from_hf({"model_type": "gpt2", "activation_function": "gelu_new", **sizes}))
    for parameter in made.requires_grad_(False).parameters():
        parameter.normal_(0, 0.3)
    return made.eval()


def cache_for(model, num_pages=64, dtype=torch.float32, device="cpu") -> foveate.PagedKVCache:
    """Empty, of NaN where the dtype has it, in pages of 4 tokens."""
    c = model.config
    sizes = {"num_kv_heads": c.num_kv_heads, "head_dim": c.head_dim, "num_layers": c.num_layers}
    made = foveate.PagedKVCache(num_pages, 4, **sizes, dtype=dtype, device=device)
    if dtype.is_floating_point:
        made.k_pages.fill_(float("nan"))
        made.v_pages.fill_(float("nan"))
    return made


def engine(num_pages: int = 64, page_size: int = 4, **options) -> Engine:
    options = {"tokenizer": tokenizer(), "eos_ids": {EOS}} | options
    return Engine(options.pop("model", None) or model(), cache(num_pages, page_size), **options)


def padded_engine(model, num_pages=64, padded=True, dtype=torch.float32, **options) -> Engine:
    """On a DecodeGraph, without graphs, with one page more for the padding rows; padded=False: the same without it."""
    cache = cache_for(model, num_pages + padded, dtype)
    decode = DecodeGraph(model, cache, graphs=False) if padded else None
    return Engine(model, cache, eos_ids={EOS}, decode=decode, **options)


def spread(of: Engine, prompts, params, seed=0) -> dict[str, list[list[int]]]:
    """Requests that join at random steps, so that the batch grows and shrinks; {request: token ids of its samples}."""
    rng, waiting, found = random.Random(seed), list(enumerate(prompts)), {}
    while waiting or of.has_work:
        while waiting and (rng.random() < 0.4 or not of.has_work):
            i, prompt = waiting.pop(0)
            of.add(str(i), prompt, params[i])
        found |= {o.request_id: [sample.token_ids for sample in o.outputs] for o in of.step()}
    # No page is lost, and the scratch page stays.
    assert of.cache.free_pages + len(of.scheduler.prefix or ()) == of.num_pages
    return found


def native_model():
    """The model on NativeDecoder, or a skip."""
    native_decoder = pytest.importorskip("foveate.models.native_decoder")
    made = copy.deepcopy(model())
    reason = native_decoder.NativeDecoder.unsupported(made)
    if reason is not None:
        pytest.skip(reason)
    return native_decoder.NativeDecoder(made)


def prompts(count: int, low: int = 3, high: int = 30, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [torch.randint(2, 330, (length,), generator=generator).tolist() for length in lengths]


def greedy(prompt: list[int], new: int, of: Llama | None = None) -> list[int]:
    """By whole forward passes without a cache; ends with EOS."""
    tokens, of = list(prompt), of or model()
    while len(tokens) < len(prompt) + new:
        tokens.append(int(of(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


def drain(of: Engine) -> dict:
    """{request id: its last output}"""
    outputs = {}
    while of.has_work:
        outputs |= {output.request_id: output for output in of.step()}
    return outputs


def check_pages(of: Engine) -> None:
    """All pages are free or held by the prefix cache alone."""
    assert len(of.cache) == 0
    held = 0 if of.scheduler.prefix is None else len(of.scheduler.prefix)
    assert of.cache.free_pages + held == of.cache.num_pages


def folder(path: Path, positions: int = 256, **generation_config) -> Path:
    """The toy model and tokenizer as a Hugging Face folder."""
    from safetensors.torch import save_file

    made, config = model(), model().config
    save_file({name: value.contiguous() for name, value in made.state_dict().items()}, path / "model.safetensors")
    tokenizer().backend.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_layers, "rms_norm_eps": config.norm_eps,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads, "dtype": "float32",
        "max_position_embeddings": positions, "eos_token_id": EOS, "tie_word_embeddings": False,
    }))  # fmt: skip
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS, **generation_config}))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": tokenizer().chat_template}))
    return path


def adapter(path: Path, seed: int, layer: str | None = None) -> Path:
    """A LoRA adapter of the toy model in peft's format, with an update that matters; layer: only this one."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    modules = {name: m for name, m in model().named_modules() if name.endswith(("q_proj", "v_proj", "down_proj"))}
    if layer is not None:
        modules = {layer: next(iter(modules.values()))}
    stored = {}
    for name, module in modules.items():
        for part, shape in {"A": (4, module.in_features), "B": (module.out_features, 4)}.items():
            stored[f"base_model.model.{name}.lora_{part}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    save_file(stored, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "base_model_name_or_path": None}
    settings |= {"target_modules": sorted({name.rpartition(".")[2] for name in modules}), "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path
