"""foveate.LLM: a causal language model from a checkpoint, and text from it."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from foveate.cache.paged import PagedKVCache
from foveate.cache.view import CacheView
from foveate.generation import memory
from foveate.generation.beam_request import beam_request
from foveate.generation.decode_graph import DecodeGraph
from foveate.generation.draft_model import load_draft
from foveate.generation.engine import Engine, EngineStats
from foveate.generation.outputs import RequestOutput
from foveate.generation.params import SamplingParams
from foveate.generation.prompts import as_prompt, as_prompts, check_messages, conversations
from foveate.generation.runner import fastest, graphs
from foveate.models import Checkpoint, load_model, open_checkpoint
from foveate.models.loading import checked_device, checked_dtype
from foveate.models.quantizing import check_quantization
from foveate.models.registry import architecture_of
from foveate.progress import ProgressBar

Prompt: TypeAlias = "str | Sequence[int]"
Messages: TypeAlias = "Sequence[Mapping[str, Any]]"
_CACHE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_CACHE_SHARE = 0.25  # of the free memory, by default


class LLM:
    """Text from a checkpoint: a Hugging Face folder, a .gguf file, the name of an installed package that holds one, or a folder with a
    LoRA adapter in peft's format, whose base is the one that it names or `base`. adapter: such a folder, where path is its base; it is
    merged into the weights. `load_adapter` keeps adapters beside them, for requests to choose.

        llm = LLM("path/to/model", quantization="q4_0")
        [output] = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=40))
        print(output.outputs[0].text)

    device, dtype, quantization, imatrix, progress: as `foveate.models.load_model` takes them. On the CPU `NativeDecoder` runs the model
    where it can; `runs_on` says what does, and why.

    max_model_len: tokens of prompt and output together; by default what the model was made for, or what the cache holds if that is less.
    Models with RoPE factors for short and for long texts (Phi 3 and 4) take the short ones unless more than their first context is given.
    The cache is allocated once: num_pages of page_size tokens, or kv_cache_bytes, by default up to a quarter of the free memory.
    kv_cache_dtype: "int8" or "fp8" store keys and values in a byte; None is the model's dtype.
    max_batch, max_prefill_tokens, enable_prefix_caching: see Engine.
    cuda_graphs: on a CUDA device, replays decode steps from CUDA graphs (`DecodeGraph`), for one page of cache more; None: where that is
    possible, which `runs_on` says; True: ValueError where it is not; False: never.
    draft_model: a smaller checkpoint with the same tokens that guesses draft_tokens tokens at a time, which this model checks in one step
    (speculative decoding): changes the speed, never the tokens. See `DraftModel`. draft_quantization: of its weights, with the names of
    quantization, "none" for unpacked ones; None: as quantization says.

    default_params: what generate, stream and chat use for params=None: SamplingParams() with the checkpoint's generation_config
    (temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens; do_sample=false is temperature 0).
    Several threads may call at once: their requests run in the same batches.
    """

    def __init__(
        self,
        path: str | Path | Checkpoint,
        *,
        base: str | Path | None = None,
        adapter: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        quantization: str | None = None,
        imatrix: str | Path | None = None,
        kv_cache_dtype: str | torch.dtype | None = None,
        max_model_len: int | None = None,
        num_pages: int | None = None,
        kv_cache_bytes: int | None = None,
        page_size: int = 16,
        max_batch: int = 64,
        max_prefill_tokens: int = 512,
        enable_prefix_caching: bool = True,
        cuda_graphs: bool | None = None,
        draft_model: str | Path | Checkpoint | None = None,
        draft_tokens: int = 4,
        draft_quantization: str | None = None,
        progress: bool | None = None,
    ) -> None:
        if adapter is not None:
            if base is not None or isinstance(path, Checkpoint):
                raise ValueError(f"adapter={str(adapter)!r} goes with the path of its base, and nothing else")
            path, base = adapter, path
        checkpoint = open_checkpoint(path, base)
        _check_causal(checkpoint)
        dtype = checked_dtype(dtype)
        _check_integers(max_model_len=max_model_len, max_batch=max_batch, page_size=page_size)
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch} must be 1 or more")
        if draft_quantization is not None and draft_model is None:
            raise ValueError(
                f"draft_quantization={draft_quantization!r} packs a draft model; give draft_model, or leave it out"
            )
        check_quantization(draft_quantization, argument="draft_quantization")
        self.device = checked_device(device)
        if cuda_graphs and self.device.type != "cuda":
            raise ValueError(
                f'cuda_graphs=True, but the device is {self.device}; use device="cuda", or omit cuda_graphs'
            )

        # The weights, and what runs them
        fits = memory.check_model_fits(checkpoint, self.device, dtype, quantization)
        module: Any = load_model(
            checkpoint, device=self.device, dtype=dtype, quantization=quantization, imatrix=imatrix, progress=progress
        )
        if getattr(module, "lm_head", module) is None:
            raise ValueError(f"{checkpoint.path} has no language-model head; it is one for foveate.Embedder")
        module.requires_grad_(False)
        self.tokenizer = checkpoint.tokenizer()
        self.generation_config = checkpoint.generation_config
        self.default_params = default_params(checkpoint.generation_config)
        self.config = module.config
        cache_dtype = _cache_dtype(kv_cache_dtype, module)  # before its weights are packed
        self.model, self.runs_on = fastest(module, self.device, fits)
        in_graphs = False
        if self.device.type == "cuda":
            in_graphs, sentence = graphs(module, cuda_graphs)
            self.runs_on += f"; {sentence}"

        # The cache; padding rows of CUDA graphs write to a scratch page of their own
        pages = _pages(
            self.config, cache_dtype, self.device, page_size, num_pages, kv_cache_bytes, max_model_len, max_batch
        )
        context = getattr(module, "set_context", lambda wanted: wanted or self.config.max_positions)(max_model_len)
        self.max_model_len = min(context, pages * page_size)
        cache = PagedKVCache(
            pages + (1 if in_graphs else 0),
            page_size,
            dtype=cache_dtype,
            device=self.device,
            **memory.cache_sizes(self.config),
        )

        draft = None
        if draft_model is not None:
            draft, sentence = load_draft(
                draft_model, target=self.config, tokenizer=self.tokenizer, device=self.device,
                quantization=quantization if draft_quantization is None else draft_quantization, num_pages=pages, page_size=page_size,
                tokens=draft_tokens, max_prefill_tokens=max_prefill_tokens,
            )  # fmt: skip
            self.runs_on += f"; {sentence}"
        self.engine = Engine(
            self.model, cache, tokenizer=self.tokenizer, eos_ids=_eos_ids(self.tokenizer, checkpoint.generation_config, checkpoint.config),
            max_length=self.max_model_len, max_batch=max_batch, max_prefill_tokens=max_prefill_tokens,
            enable_prefix_caching=enable_prefix_caching, decode=DecodeGraph(module, cache, graphs=True) if in_graphs else None,
            draft=draft,
        )  # fmt: skip
        self.engine.adapters.architecture = architecture_of(checkpoint.config)
        self._ids = itertools.count()
        self._inboxes: dict[str, list[RequestOutput]] = {}  # of the requests that run

    @property
    def stats(self) -> EngineStats:
        """The engine's counters since the LLM was made."""
        return self.engine.stats

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """A LoRA adapter in peft's format of this model, kept beside the weights: `generate(..., adapter=name)` uses it, in one batch with
        requests of others and of none. Its requests run on torch modules, slower than a merged one. CheckpointError for another model's,
        and for one that adapts the head or the embedding."""
        with self.engine.lock:
            self.engine.adapters.load(name, folder)

    def unload_adapter(self, name: str) -> None:
        """ValueError for one that is not loaded."""
        with self.engine.lock:
            self.engine.adapters.unload(name)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        adapter: str | None = None,
    ) -> list[RequestOutput]:
        """One output per prompt, in order. params: one for all, or one each. adapter: the name of one that `load_adapter` has loaded.

        A prompt is a text, token ids in a list, array or tensor of one dimension, or vLLM's {"prompt": text} and
        {"prompt_token_ids": ids}.

        All run in one batch; a prompt with num_beams > 1 runs after the others. progress: a bar on stderr; None shows it for several
        prompts in a terminal. ValueError, before anything runs, for a prompt that is empty, longer than the context or too long for
        the cache; an output ends with "length" where the context ends, even before max_tokens.
        """
        texts = as_prompts(prompts)
        wanted = self._params(params, len(texts))
        tokens = [self._tokens(text) for text in texts]
        for ids, p in zip(tokens, wanted):
            self.engine.check(ids, p)
        if adapter is not None and any(p.num_beams > 1 for p in wanted):
            raise ValueError(
                f"adapter={adapter!r} with num_beams > 1: beam search runs the model itself; use LLM(path, adapter=...)"
            )
        outputs: dict[int, RequestOutput] = {}
        place: dict[str, int] = {}
        written = 0
        if progress is None:
            progress = len(texts) > 1 and sys.stderr.isatty()
        try:
            with ProgressBar(
                "generating", "bar", "count", "remaining", "note", total=len(texts), shown=progress
            ) as bar:
                inbox: list[RequestOutput] = []
                for i, (text, ids, p) in enumerate(zip(texts, tokens, wanted)):
                    if p.num_beams == 1:
                        place[self._add(ids, p, text, inbox, adapter=adapter)] = i
                while len(outputs) < len(place):
                    for output in self._take(inbox, weights_fixed=True):
                        outputs[place[output.request_id]] = output
                        written += len(output.outputs[0].token_ids)
                        bar.advance(1, f"{written} tokens")
                for i, (text, ids, p) in enumerate(zip(texts, tokens, wanted)):
                    if p.num_beams > 1:
                        prompt = text if isinstance(text, str) else None
                        with self.engine.lock:
                            outputs[i] = beam_request(self.engine, f"beam-{next(self._ids)}", ids, p, prompt)
                        written += len(outputs[i].outputs[0].token_ids)
                        bar.advance(1, f"{written} tokens")
        finally:
            for request_id in place:
                self._forget(request_id)
        return [outputs[i] for i in range(len(texts))]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The text of one sample, in pieces as it comes; the pieces together are the `text` of generate. Closing it ends the request.

        A piece never ends within a character, and holds back what may be the beginning of a stop string.
        """
        [params] = self._params(params, 1)
        if params.samples > 1 or params.num_beams > 1:
            raise ValueError(
                f"n={params.n}, num_beams={params.num_beams}: only one sample can be streamed; use generate"
            )
        ids = self._tokens(prompt)
        self.engine.check(ids, params)
        return self._stream(ids, params, prompt)

    def _stream(self, ids: list[int], params: SamplingParams, prompt: Prompt) -> Iterator[str]:
        inbox: list[RequestOutput] = []
        request_id = self._add(ids, params, prompt, inbox, stream=True)
        shown, finished = 0, False
        try:
            while not finished:
                for output in self._take(inbox):
                    text, finished = output.outputs[0].text, output.finished
                    if len(text) > shown:
                        yield text[shown:]
                        shown = len(text)
        finally:
            self._forget(request_id)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **template: Any,
    ) -> RequestOutput | list[RequestOutput] | Iterator[str]:
        """The assistant's reply to [{"role": ..., "content": ...}, ...], by the checkpoint's chat template; for a list of conversations
        a list of replies. stream: as `stream`.

        template: what `Tokenizer.apply_chat_template` takes: tools, documents, chat_template, add_generation_prompt,
        continue_final_message, and the template's own switches such as enable_thinking; chat_template_kwargs are more of these.
        """
        chats, several = conversations(messages)
        prompts = [
            self.encode_chat(conversation, **(dict(chat_template_kwargs or {}) | template)) for conversation in chats
        ]
        if several:
            if stream:
                raise ValueError(f"stream=True with {len(prompts)} conversations: only one can be streamed")
            return self.generate(prompts, params)
        return self.stream(prompts[0], params) if stream else self.generate(prompts, params)[0]

    def encode_chat(self, messages: Messages, **template: Any) -> list[int]:
        """The prompt of `chat` for one conversation, as token ids. template: as `chat` takes it."""
        conversation = list(messages) if isinstance(messages, Iterable) else messages
        check_messages(conversation)
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer, so it cannot chat; pass token ids to generate")
        prompt = self.tokenizer.apply_chat_template(conversation, **template)
        return self.tokenizer.encode(prompt, add_special_tokens=False)

    def encode(self, text: str) -> list[int]:
        """The token ids of a prompt, with those that the model puts before one. ValueError without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer; pass token ids instead of text")
        return self.tokenizer.encode(text)

    @torch.inference_mode()
    def perplexity(self, text: Prompt) -> float:
        """exp of the mean negative log-likelihood of each token after the first; beyond the context in windows without overlap."""
        with self.engine.lock:
            return self._perplexity(self._tokens(text))

    def _perplexity(self, ids: list[int]) -> float:
        if len(ids) < 2:
            raise ValueError(f"the text has {len(ids)} tokens; perplexity needs at least 2")
        total, counted, step = 0.0, 0, self.engine.scheduler.max_prefill_tokens
        for start in range(0, len(ids) - 1, self.max_model_len - 1):
            window = torch.tensor(ids[start : start + self.max_model_len], device=self.device)
            seq = self.engine.cache.create()
            try:
                for at in range(0, len(window) - 1, step):
                    part = window[at : min(at + step, len(window) - 1)]
                    self.engine.append([seq], len(part))
                    hidden = self.model.hidden(part[None], CacheView(self.engine.cache, [seq], len(part)))[0]
                    logprobs = self.model.logits(hidden).float().log_softmax(-1)
                    following = window[at + 1 : at + 1 + len(part)]
                    total -= float(logprobs.gather(1, following[:, None]).double().sum())
                    counted += len(part)
            finally:
                self.engine.cache.free(seq)
        return math.exp(total / counted)

    def _tokens(self, prompt: Prompt) -> list[int]:
        plain = as_prompt(prompt)
        return self.encode(plain) if isinstance(plain, str) else plain

    def _params(self, params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or self.default_params] * count
        if len(params) != count:
            raise ValueError(f"{count} prompts have {len(params)} params; give one for all, or one for each")
        return list(params)

    def _add(
        self, ids: list[int], params: SamplingParams, prompt: Prompt, inbox: list[RequestOutput], stream: bool = False,
        adapter: str | None = None,
    ) -> str:  # fmt: skip
        """inbox: where the request's outputs go, whichever call makes the step that they come from."""
        request_id = str(next(self._ids))
        with self.engine.lock:
            text = prompt if isinstance(prompt, str) else None
            self.engine.add(request_id, ids, params, prompt=text, stream=stream, adapter=adapter)
            self._inboxes[request_id] = inbox
        return request_id

    def _take(self, inbox: list[RequestOutput], *, weights_fixed: bool = False) -> list[RequestOutput]:
        """The outputs that have arrived, after a step if there are none; those of other calls, as a stream half read, wait in theirs.

        weights_fixed: of the Engine, where no code of the caller's runs between steps.
        """
        with self.engine.lock:
            if not inbox:
                self.engine.weights_fixed = weights_fixed
                try:
                    outputs = self.engine.step()
                finally:
                    self.engine.weights_fixed = False
                for output in outputs:
                    self._inboxes[output.request_id].append(output)
            taken = inbox[:]
            inbox.clear()
        return taken

    def _forget(self, request_id: str) -> None:
        with self.engine.lock:
            self.engine.abort(request_id)
            self._inboxes.pop(request_id, None)

    def __reduce__(self) -> Any:
        raise TypeError(
            "an LLM cannot be pickled or copied, as its cache, threads and native code belong to this process; make one in each process: "
            "LLM(path, ...)"
        )


def default_params(generation_config: dict[str, Any]) -> SamplingParams:
    """SamplingParams() with what a generation_config.json sets."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    settings = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
    if "top_k" in settings:
        settings["top_k"] = int(settings["top_k"])
    if generation_config.get("max_new_tokens"):
        settings["max_tokens"] = generation_config["max_new_tokens"]
    if generation_config.get("do_sample") is False:
        settings["temperature"] = 0.0
    try:
        return SamplingParams(**settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the checkpoint's generation_config.json cannot be followed: {error}") from error


def _check_integers(**values: Any) -> None:
    for name, value in values.items():
        if value is not None and not isinstance(value, int):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}; it must be an integer")


def _cache_dtype(wanted: str | torch.dtype | None, module: torch.nn.Module) -> torch.dtype:
    """That of keys and values; None and "auto" are the model's own."""
    if wanted in (None, "auto"):
        weights = itertools.chain(module.parameters(), module.buffers())
        return next(x.dtype for x in weights if x.is_floating_point())
    dtype = _CACHE_DTYPES.get(str(wanted), wanted)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f'kv_cache_dtype={wanted!r} must be "int8", "fp8", a torch.dtype or None')
    return dtype


def _check_causal(checkpoint: Checkpoint) -> None:
    architecture = architecture_of(checkpoint.config)
    if not architecture.continues_text:
        raise ValueError(
            f"{checkpoint.path} is a {checkpoint.config['model_type']} model, which does not continue text; it is one for "
            f"{architecture.suited}"
        )


def _eos_ids(tokenizer: Any, *configs: dict[str, Any]) -> set[int]:
    if tokenizer is not None:
        return tokenizer.eos_ids
    ids: Any = next((c["eos_token_id"] for c in configs if c.get("eos_token_id") is not None), [])
    return {ids} if isinstance(ids, int) else set(ids)


def _pages(
    config: Any, dtype: torch.dtype, device: torch.device, page_size: int, num_pages: int | None,
    kv_cache_bytes: int | None, max_model_len: int | None, max_batch: int,
) -> int:  # fmt: skip
    """How many pages the cache gets."""
    if num_pages is not None and kv_cache_bytes is not None:
        raise ValueError("num_pages and kv_cache_bytes both say how large the cache is; give one of them")
    if max_model_len is not None and not 1 < max_model_len <= config.max_positions:
        raise ValueError(
            f"max_model_len={max_model_len} must be from 2 to the model's {config.max_positions} positions"
        )
    if page_size < 1:
        raise ValueError(f"page_size={page_size} must be 1 or more")
    page_bytes = memory.token_bytes(config, dtype) * page_size
    longest = -(-(max_model_len or config.max_positions) // page_size)
    if num_pages is None:
        free = memory.available(device)
        budget = kv_cache_bytes or int(_CACHE_SHARE * (2**32 if free is None else free))
        num_pages = min(budget // page_bytes, longest * max_batch)
    if num_pages < 1 or (max_model_len is not None and num_pages < longest):
        raise ValueError(
            f"the cache is too small: one sequence of {max_model_len or page_size} tokens needs "
            f"{memory.gigabytes((longest if max_model_len else 1) * page_bytes)} ({longest if max_model_len else 1} pages), and there is "
            f"room for {max(num_pages, 0)} pages; raise kv_cache_bytes or num_pages, lower max_model_len, or store it as "
            'kv_cache_dtype="int8"'
        )
    return num_pages
