"""DecodeGraph: the step of one token per sequence, on static buffers, so that a CUDA graph can replay it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.cache.paged import PagedKVCache
from foveate.cache.view import StaticCacheView
from foveate.models.addresses import Addresses
from foveate.ops.attention.with_kv_cache_op import not_capturable

_MIN_PAGES = 16  # the narrowest block table: 256 tokens in pages of 16
_WARM_UPS = 2  # torch asks for a few runs before a capture, in which libraries allocate and choose their kernels


class Decoded(NamedTuple):
    """hidden [B, hidden] after the final norm and logits [B, vocab]. With graphs, the next step overwrites both."""

    hidden: Tensor
    logits: Tensor


class _Bucket:
    """The static inputs of all steps of `rows` sequences with up to `pages` pages, and how to run them.

    Rows beyond the batch are padding: token 0 as the first token of a sequence on the scratch page.
    """

    def __init__(self, cache: PagedKVCache, rows: int, pages: int, scratch: int) -> None:
        device = cache.k_pages.device
        self.tokens = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self.lens = torch.zeros(rows, dtype=torch.int32, device=device)
        self.block_table = torch.full((rows, pages), scratch, dtype=torch.int32, device=device)
        self.view = StaticCacheView(cache, self.lens, self.block_table)
        self.scratch, self.used = scratch, 0
        self.run: Callable[[], Decoded] | None = None

    def load(self, tokens: Sequence[int], lens: Tensor, block_table: Tensor) -> None:
        """lens [B], the tokens before the new ones; block_table [B, pages or fewer], -1 beyond a sequence's pages."""
        B, pages = block_table.shape
        self.tokens[:B].copy_(torch.tensor(tokens)[:, None])
        self.lens[:B].copy_(lens)
        # Entries that no sequence uses stay page numbers, so that a kernel may load them before it looks at the lengths.
        torch.clamp(block_table, min=0, out=self.block_table[:B, :pages])
        if self.used > B:
            self.tokens[B:].zero_()
            self.lens[B:].zero_()
            self.block_table[B:].fill_(self.scratch)
        self.used = B


class DecodeGraph:
    """Decode steps of a causal model of `foveate.models` on a PagedKVCache, replayed from CUDA graphs.

        decode = DecodeGraph(model, cache)
        cache.append(seqs)                          # room for one token each
        hidden, logits = decode(tokens, seqs)       # tokens: one id each; logits [len(seqs), vocab]

    A step of a small model is hundreds of short kernels, and launching them can take longer than running them. A CUDA graph launches
    them all at once, but with the same shapes and addresses every time. So the batch is padded to the next power of two and the
    block table to one of 16, 32, 64, ... pages; each such pair is captured when it first occurs, after a warm-up on a side stream,
    and replayed afterwards (`captures` counts). Padding rows write to a scratch page, which is taken from the cache for good.

    graphs None: captured where that is possible; `runs_on` says which, and `eager` is None or the reason why steps run as plain calls,
    on the same padded buffers. False: never captured. True: ValueError where it is not possible: on a device other than CUDA, or
    where the reference backend serves attention, which reads lengths on the host.

    A graph keeps the addresses of the weights: where they have changed (`Addresses`), all graphs are captured anew. One thread at a time.
    """

    def __init__(self, model: Any, cache: PagedKVCache, *, graphs: bool | None = None) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(
                f"DecodeGraph runs the modules of foveate.models, not {type(model).__name__}; give it the model itself"
            )
        config: Any = model.config
        self.model: Any = model
        self.cache = cache
        self.eager = "graphs=False" if graphs is False else self.unsupported(model)
        if graphs and self.eager is not None:
            raise ValueError(f"graphs=True, but {self.eager}; leave it out to run without graphs")
        self.captures = 0
        # A sequence of no more pages than this covers every position of the model.
        self._most_pages: int = -(-config.max_positions // cache.page_size)
        self._scratch = _take_page(cache)
        self._buckets: dict[tuple[int, int], _Bucket] = {}
        self._pool: Any = None
        self._addresses = Addresses(model)
        self.looks_at_weights = True  # see NativeDecoder
        self._tables: list[Any] = []  # rotary tables that graphs point to, also after the model has made longer ones

    @staticmethod
    def unsupported(model: torch.nn.Module) -> str | None:
        """None, or the sentence why a decode step of the model cannot be captured."""
        tensors = [*model.parameters(), *model.buffers()]
        device = tensors[0].device
        if device.type != "cuda":
            return f"CUDA graphs need a CUDA device, and the model is on {device}"
        if getattr(getattr(model, "config", None), "experts", None) is not None:
            return "which experts a step runs is read on the host"
        dtype = next(x.dtype for x in tensors if x.is_floating_point())
        return not_capturable(device.type, dtype)

    @property
    def runs_on(self) -> str:
        return (
            "decode steps in CUDA graphs" if self.eager is None else f"decode steps without CUDA graphs: {self.eager}"
        )

    @torch.inference_mode()
    def __call__(self, tokens: Sequence[int], seqs: Sequence[int]) -> Decoded:
        """The step of sequences for which `cache.append(seqs)` has been called; tokens: the id of each one's new token.

        Raises ValueError where the cache does: unknown or repeated sequences, a new token on a page that another sequence shares.
        """
        if len(tokens) != len(seqs) or not seqs:
            raise ValueError(
                f"{len(tokens)} tokens for {len(seqs)} sequences; a decode step has one token for each, and at least one"
            )
        for seq in seqs:
            if self.cache.length(seq) == 0:
                raise ValueError(f"sequence {seq} has no room for its token; call cache.append(seqs) before the step")
        table, lens = self.cache.block_table(seqs), self.cache.kv_lens(seqs) - 1
        self.cache.check_writable(seqs, 1)
        if self.eager is None and self.looks_at_weights and self._addresses.changed():
            self._buckets.clear()
            self._pool, self._tables, self._addresses = None, [], Addresses(self.model)
        bucket = self._bucket(len(seqs), table.shape[1])
        bucket.load(tokens, lens, table)
        if bucket.run is None:
            bucket.run = self._plain(bucket) if self.eager is not None else self._capture(bucket)
        hidden, logits = bucket.run()
        return Decoded(hidden[: len(seqs)], logits[: len(seqs)])

    def _bucket(self, batch: int, pages: int) -> _Bucket:
        rows = _power_of_two(batch)
        width = max(pages, min(self._most_pages, _power_of_two(max(pages, _MIN_PAGES))))
        if (rows, width) not in self._buckets:
            self._buckets[rows, width] = _Bucket(self.cache, rows, width, self._scratch)
        return self._buckets[rows, width]

    def _step(self, bucket: _Bucket) -> Decoded:
        hidden = self.model.hidden(bucket.tokens, bucket.view)[:, 0]
        return Decoded(hidden, self.model.logits(hidden))

    def _plain(self, bucket: _Bucket) -> Callable[[], Decoded]:
        return lambda: self._step(bucket)

    def _capture(self, bucket: _Bucket) -> Callable[[], Decoded]:
        """Runs the loaded step as a warm-up, which writes the keys that the replay writes again, and captures it.

        All graphs share one memory pool: what one returns is used before another one runs.
        """
        device = bucket.tokens.device
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    self._step(bucket)
            current.wait_stream(side)
            try:
                with torch.cuda.graph(graph, pool=self._pool):
                    decoded = self._step(bucket)
            except RuntimeError as error:
                raise RuntimeError(
                    f"the decode step of {type(self.model).__name__} could not be captured in a CUDA graph: {error}; run it without "
                    "graphs (LLM(..., cuda_graphs=False))"
                ) from error
        self._pool = self._pool or graph.pool()
        self.captures += 1
        for name in ("rotary", "local_rotary"):
            if hasattr(self.model, name):
                self._tables.append(dict(getattr(self.model, name)._tables))

        def replay() -> Decoded:
            graph.replay()
            return decoded

        return replay


def _power_of_two(n: int) -> int:
    """The next one, n included."""
    return 1 << (n - 1).bit_length()


def _take_page(cache: PagedKVCache) -> int:
    """A page that belongs to no sequence any more, but is held."""
    seq = cache.create()
    cache.append([seq])
    [page] = cache.pages(seq)
    cache.hold(page)
    cache.free(seq)
    return page
