"""foveate.PagedKVCache: a page allocator over preallocated tensors, for `attention_with_kv_cache`."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from foveate.backend import native
from foveate.backend import triton as triton_backend
from foveate.backend.native import _C, runs_cuda_kernels
from foveate.backend.registry import Query
from foveate.files.locked import locked
from foveate.ops.attention.with_kv_cache import attention_with_kv_cache
from foveate.ops.attention.with_kv_cache_op import QUANTIZED
from foveate.ops.checks import check_integer

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, *QUANTIZED)

_native_copies = native.supports()


class CacheFull(RuntimeError):
    """There are not enough free pages for the call; the cache is as it was before it. `missing`: how many more it needs."""

    def __init__(self, message: str, missing: int = 0) -> None:
        super().__init__(message)
        self.missing = missing


class CacheStats(NamedTuple):
    sequences: int
    tokens: int  # summed over the sequences: a shared token counts for each
    total_pages: int
    used_pages: int
    free_pages: int
    shared_pages: int  # used by more than one sequence
    nbytes: int  # of the preallocated tensors


class PagedKVCache:
    """Keys and values of many sequences in pages of `page_size` tokens, shared by reference count (Kwon et al. 2023, arXiv 2309.06180).

    The memory is allocated once: k_pages [layers, pages, page_size, Hkv, D] and v_pages [..., Dv], and for int8 or float8_e4m3fn
    also k_scale and v_scale, fp32 [layers, pages, page_size, Hkv]. A sequence is an int from `create` or `fork`. For each step,
    `append` makes room in all layers, then `attend` writes and reads layer by layer:

        seq = cache.create()
        cache.append([seq], prompt_length)
        out = cache.attend(layer, q, k, v, seqs=[seq])      # for each layer

    values_in_keys: values are the last Dv elements of the keys, and v_pages a view of k_pages: the latent of MLA, held once. v is then
    given as what k ends with. int8 and float8_e4m3fn, whose keys and values have scales of their own, hold both.

    dtype: float32, bfloat16, float16 or float64, as q will have, or int8 or float8_e4m3fn for any q. Threads may share a cache, each with
    sequences of its own; a copy or a pickle of a cache is another one, with the same sequences.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int = 16,
        *,
        num_kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        values_in_keys: bool = False,
        num_layers: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        sizes = {
            "num_layers": num_layers, "num_pages": num_pages, "page_size": page_size, "num_kv_heads": num_kv_heads, "head_dim": head_dim,
            "head_dim_v": head_dim_v,
        }  # fmt: skip
        for name, size in sizes.items():
            if check_integer(name, size) < 1:
                raise ValueError(f"{name}={size} must be 1 or more")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype} cannot be stored; choose one of {', '.join(map(str, _DTYPES))}")
        if values_in_keys and head_dim_v > head_dim:
            raise ValueError(
                f"head_dim_v={head_dim_v} is more than the head_dim={head_dim} of the keys that hold the values"
            )
        if num_pages > torch.iinfo(torch.int32).max:
            raise ValueError(f"num_pages={num_pages} does not fit the block table's int32; use a larger page_size")
        self.page_size = page_size
        shape = (num_layers, num_pages, page_size, num_kv_heads)
        self.k_pages = torch.empty((*shape, head_dim), dtype=dtype, device=device)
        self._values_in_keys = values_in_keys and dtype not in QUANTIZED
        if self._values_in_keys:
            self.v_pages = self._values_of_keys(head_dim_v)
        else:
            self.v_pages = torch.empty((*shape, head_dim_v), dtype=dtype, device=device)
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None
        if dtype in QUANTIZED:
            self.k_scale = torch.empty(shape, dtype=torch.float32, device=device)
            self.v_scale = torch.empty(shape, dtype=torch.float32, device=device)
        self.lock = threading.RLock()
        self._references = [0] * num_pages
        self._holds: dict[int, int] = {}  # how often a page is held
        self._held_only: set[int] = set()  # pages whose one holder is a `hold`
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: page 0 is the first to be used
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next = 0
        self._tables: tuple[tuple[int, ...], Tensor, Tensor] | None = (
            None  # of the last call: seqs, block_table, lengths
        )

    def fresh(self) -> PagedKVCache:
        """An empty cache of the same sizes, with memory of its own."""
        layers, pages, page_size, heads, width = self.k_pages.shape
        return PagedKVCache(
            pages, page_size, num_kv_heads=heads, head_dim=width, head_dim_v=self.v_pages.shape[-1],
            values_in_keys=self._values_in_keys, num_layers=layers, dtype=self.k_pages.dtype, device=self.k_pages.device,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "lock"}
        return state | {"v_pages": self.v_pages.shape[-1]} if self._values_in_keys else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())
        if self._values_in_keys:
            self.v_pages = self._values_of_keys(state["v_pages"])

    def _values_of_keys(self, head_dim_v: int) -> Tensor:
        return self.k_pages[..., self.k_pages.shape[-1] - head_dim_v :]

    def create(self) -> int:
        """A new, empty sequence. It has no pages yet."""
        return self.create_from_pages(())

    @locked
    def create_from_pages(self, pages: Sequence[int]) -> int:
        """A new sequence whose first len(pages) * page_size tokens are those of `pages`, full pages in use, shared as by `fork`."""
        for page in pages:
            self._check_in_use(page)
        seq, self._next = self._next, self._next + 1
        self._pages[seq], self._lengths[seq] = list(pages), len(pages) * self.page_size
        for page in pages:
            self._refer(page)
        return seq

    def pages(self, seq: int) -> list[int]:
        """The pages of the sequence, in the order of its tokens; the last one may be partly filled."""
        self._check([seq])
        return list(self._pages[seq])

    @locked
    def hold(self, page: int) -> None:
        """Keeps a page that is in use, until `release`, also when all its sequences are freed. Holds count."""
        self._check_in_use(page)
        self._refer(page)
        self._holds[page] = self._holds.get(page, 0) + 1

    @locked
    def release(self, page: int) -> None:
        """Gives back one `hold`; the page becomes free if nothing else holds it."""
        self._check_in_use(page)
        if page in self._holds:
            self._holds[page] -= 1
            if not self._holds[page]:
                del self._holds[page]
        self._release(page)

    def references(self, page: int) -> int:
        """How many sequences and holds share the page; 0 if it is free."""
        return self._references[page]

    @property
    def held_only(self) -> int:
        """How many pages have no holder but one `hold`."""
        return len(self._held_only)

    @property
    def num_pages(self) -> int:
        """All pages, free or not."""
        return len(self._references)

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    @locked
    def fork(self, seq: int, length: int | None = None) -> int:
        """A new sequence that shares the first `length` tokens of `seq` (all by default), without copying anything.

        The page that both would write next is copied by the first `append` that needs it.
        """
        have = self.length(seq)
        length = have if length is None else length
        if not 0 <= length <= have:
            raise ValueError(f"length={length} to share must be between 0 and the {have} tokens of sequence {seq}")
        child = self.create()
        self._pages[child] = self._pages[seq][: self._pages_for(length)]
        self._lengths[child] = length
        for page in self._pages[child]:
            self._refer(page)
        return child

    @locked
    def append(self, seqs: Sequence[int], n: int = 1) -> None:
        """Makes room for n more tokens of each sequence: takes pages, copies a partly filled last page that is shared.

        Their keys and values are undefined until `attend` writes them. Raises CacheFull, and changes nothing, without enough pages.
        """
        self._check(seqs)
        if n < 0:
            raise ValueError(f"n={n} tokens cannot be appended; truncate() shortens a sequence")
        if n == 0 or not seqs:
            return
        # How many holders a page will have left when the sequences before this one have taken their copies.
        holders: dict[int, int] = {}
        copies = []
        needed = 0
        for seq in seqs:
            length = self._lengths[seq]
            needed += self._pages_for(length + n) - len(self._pages[seq])
            if length % self.page_size:
                page = self._pages[seq][-1]
                count = holders.setdefault(page, self._references[page])
                if count > 1:
                    holders[page] = count - 1
                    copies.append(seq)
        if needed + len(copies) > len(self._free):
            raise CacheFull(
                f"appending {n} tokens to {len(seqs)} sequences needs {needed + len(copies)} pages of {self.page_size} tokens, "
                f"{len(self._free)} of {len(self._references)} are free; free sequences or make the cache larger",
                needed + len(copies) - len(self._free),
            )
        if copies:
            self._copy_last_pages(copies)
        taken = []  # (row, column, page) of the block table
        for row, seq in enumerate(seqs):
            self._lengths[seq] += n
            pages = self._pages[seq]
            while len(pages) < self._pages_for(self._lengths[seq]):
                taken.append((row, len(pages), self._take()))
                pages.append(taken[-1][2])
        tables = self._tables
        if tables is None or copies or tables[0] != tuple(seqs):
            self._tables = None
        else:
            self._tables = tables[0], self._with_pages(tables[1], taken), tables[2] + n

    @locked
    def truncate(self, seq: int, length: int) -> None:
        """Forgets the tokens from `length` on, as speculative decoding does with rejected ones."""
        have = self.length(seq)
        if not 0 <= length <= have:
            raise ValueError(f"length={length} must be between 0 and the {have} tokens of sequence {seq}")
        keep = self._pages_for(length)
        for page in self._pages[seq][keep:]:
            self._release(page)
        del self._pages[seq][keep:]
        self._lengths[seq] = length
        self._tables = None

    @locked
    def free(self, seq: int) -> None:
        """Forgets the sequence; pages that no other sequence holds become free."""
        self.truncate(seq, 0)
        del self._pages[seq], self._lengths[seq]

    def length(self, seq: int) -> int:
        """The tokens of a sequence, those of the last `append` included. ValueError for one that is not there."""
        self._check([seq])
        return self._lengths[seq]

    def __contains__(self, seq: int) -> bool:
        return seq in self._lengths

    def __len__(self) -> int:
        return len(self._lengths)

    @locked
    def block_table(self, seqs: Sequence[int]) -> Tensor:
        """int32 [len(seqs), pages of the longest]; -1 beyond a sequence's pages."""
        return self._tables_of(seqs)[0]

    @locked
    def kv_lens(self, seqs: Sequence[int]) -> Tensor:
        """int32 [len(seqs)], the tokens of each sequence, those of the last `append` included."""
        return self._tables_of(seqs)[1]

    @overload
    def attend(
        self, layer: int, q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *, seqs: Sequence[int],
        return_lse: Literal[False] = False, **options: Any,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def attend(
        self, layer: int, q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *, seqs: Sequence[int],
        return_lse: Literal[True], **options: Any,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        seqs: Sequence[int],
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`attention_with_kv_cache` of q [len(seqs), Sq, Hq, D] on one layer, with its options.

        k, v [len(seqs), Snew, Hkv, D or Dv] become the last Snew tokens, for which `append(seqs, Snew)` has made room before.
        """
        if not 0 <= layer < len(self.k_pages):
            raise ValueError(f"layer={layer} is not one of the cache's {len(self.k_pages)} layers")
        table, lens = self._tables_of(seqs)
        if k is not None:
            new = k.shape[1]
            for seq in seqs:
                if self._lengths[seq] < new:
                    raise ValueError(
                        f"k has {new} new tokens, but sequence {seq} has room for {self._lengths[seq]}; "
                        f"call append(seqs, {new}) first"
                    )
            self.check_writable(seqs, new)
            lens = lens - new
        return attention_with_kv_cache(
            q, self.k_pages[layer], self.v_pages[layer], k=k, v=v, kv_lens=lens, block_table=table,
            k_scale=None if self.k_scale is None else self.k_scale[layer],
            v_scale=None if self.v_scale is None else self.v_scale[layer], **options,
        )  # fmt: skip

    def stats(self) -> CacheStats:
        """How many sequences, tokens and pages there are now, and the bytes of the tensors."""
        return CacheStats(
            sequences=len(self._lengths),
            tokens=sum(self._lengths.values()),
            total_pages=len(self._references),
            used_pages=len(self._references) - len(self._free),
            free_pages=len(self._free),
            shared_pages=sum(count > 1 for count in self._references),
            nbytes=sum(pool.nbytes for pool in self._pools()),
        )

    def _pools(self) -> list[Tensor]:
        """The memory of the pages."""
        values = None if self._values_in_keys else self.v_pages
        return [pool for pool in (self.k_pages, values, self.k_scale, self.v_scale) if pool is not None]

    def _pages_for(self, length: int) -> int:
        return -(-length // self.page_size)

    def _take(self) -> int:
        page = self._free.pop()
        self._references[page] = 1
        return page

    def _refer(self, page: int) -> None:
        self._references[page] += 1
        self._held_only.discard(page)

    def _release(self, page: int) -> None:
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free.append(page)
            self._held_only.discard(page)
        elif self._references[page] == 1 and page in self._holds:
            self._held_only.add(page)

    @torch.no_grad()
    def _copy_last_pages(self, seqs: Sequence[int]) -> None:
        """Each sequence gets a last page of its own. The old ones keep other holders, so none of them is taken as a new one."""
        old, new = [self._pages[seq][-1] for seq in seqs], [self._take() for _ in seqs]
        pools = self._pools()
        query = Query(self.k_pages.device.type, torch.float32)  # bytes, whatever the dtype
        if runs_cuda_kernels(query.device) and _native_copies(query) is None:
            for pool in pools:
                _C.copy_pages(pool, old, new)  # type: ignore[union-attr]
        elif triton_backend.serves(query) is None:
            from foveate.backend.triton.copy_pages import copy_pages

            for pool in pools:
                copy_pages(pool, old, new)
        else:
            for pool in pools:
                for source, target in zip(old, new):
                    pool[:, target].copy_(pool[:, source])
        for seq, source, target in zip(seqs, old, new):
            self._release(source)
            self._pages[seq][-1] = target

    def _check(self, seqs: Iterable[int]) -> None:
        seen = set()
        for seq in seqs:
            if seq not in self._lengths:
                raise ValueError(f"{seq!r} is not a sequence of this cache (never created, or freed)")
            if seq in seen:
                raise ValueError(f"sequence {seq} is given twice")
            seen.add(seq)

    def _check_in_use(self, page: int) -> None:
        if not 0 <= page < len(self._references) or self._references[page] == 0:
            raise ValueError(f"page {page} is not in use; only a page of a sequence can be held, released or shared")

    def check_writable(self, seqs: Sequence[int], new: int) -> None:
        """Tokens that another sequence shares must not be overwritten."""
        for seq in seqs:
            first = (self._lengths[seq] - new) // self.page_size
            for page in self._pages[seq][first:] if new else ():
                if self._references[page] > 1:
                    raise ValueError(
                        f"the last {new} tokens of sequence {seq} are shared with another sequence and cannot be written; "
                        f"call append(seqs, {new}) before attend, and fork after it"
                    )

    def _with_pages(self, table: Tensor, taken: list[tuple[int, int, int]]) -> Tensor:
        """A block table with more pages: cheaper than a new one from lists when the same sequences take one step after the other."""
        if not taken:
            return table
        widest = max(table.shape[1], *(column + 1 for _, column, _ in taken))
        table = torch.nn.functional.pad(table, (0, widest - table.shape[1]), value=-1)
        rows, columns, pages = zip(*taken)
        table[list(rows), list(columns)] = torch.tensor(pages, dtype=torch.int32, device=table.device)
        return table

    @locked
    def _tables_of(self, seqs: Sequence[int]) -> tuple[Tensor, Tensor]:
        key = tuple(seqs)
        if self._tables is None or self._tables[0] != key:
            self._check(key)
            widest = max((len(self._pages[seq]) for seq in key), default=0)
            rows = [self._pages[seq] + [-1] * (widest - len(self._pages[seq])) for seq in key]
            device = self.k_pages.device
            table = torch.tensor(rows, dtype=torch.int32, device=device).view(len(key), widest)
            lens = torch.tensor([self._lengths[seq] for seq in key], dtype=torch.int32, device=device)
            self._tables = key, table, lens
        return self._tables[1], self._tables[2]
