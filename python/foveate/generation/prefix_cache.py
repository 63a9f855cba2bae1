"""Full pages of finished and running sequences, found again by the tokens that they and all pages before them hold."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from foveate.cache.paged import PagedKVCache


@dataclass(eq=False)
class Node:
    key: tuple[
        Hashable, tuple[int, ...]
    ]  # id of the parent (at the beginning a root, which is no id), tokens of the page
    id: int
    page: int
    parent: Node | None
    used: int  # when, by the tree's clock
    children: int = 0
    alive: bool = True


class PrefixCache:
    """Trees of full pages, one for each root, since other weights have other keys, and some callers share no pages: a node is found by
    its parent and the tokens of its page, so equal tokens after another beginning differ.

    A root is 0, a number below, or anything hashable that is no number.

    Each page of the tree is held (PagedKVCache.hold), so it outlives its sequence. `evict` gives back the least recently used pages
    that no sequence holds, the ends of branches first.
    """

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
        self._nodes: OrderedDict[tuple[Hashable, tuple[int, ...]], Node] = OrderedDict()  # least recently used first
        self._clock = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, tokens: Sequence[int], most: int, root: Hashable = 0) -> list[Node]:
        """The full pages that hold the beginning of `tokens`, `most` tokens of it at the most."""
        size, chain = self.cache.page_size, []
        parent: Hashable = root
        for at in range(0, most - size + 1, size):
            node = self._nodes.get((parent, tuple(tokens[at : at + size])))
            if node is None:
                break
            chain.append(node)
            parent = node.id
        self._clock += 1
        for node in reversed(chain):  # so that a page is newer than those after it
            node.used = self._clock
            self._nodes.move_to_end(node.key)
        return chain

    def insert(self, parent: Node | None, tokens: Sequence[int], page: int, root: Hashable = 0) -> Node:
        """The node of a full page with these tokens after `parent`. If equal tokens are there already, their page stays."""
        key = (root if parent is None else parent.id, tuple(tokens))
        node = self._nodes.get(key)
        if node is None:
            self._clock += 1
            node = self._nodes[key] = Node(key, self._clock, page, parent, self._clock)
            if parent is not None:
                parent.children += 1
            self.cache.hold(page)
        return node

    def evictable(self) -> int:
        """Pages that `evict` could free."""
        return self.cache.held_only

    def evict(self, count: int) -> int:
        """Frees up to `count` pages; how many it freed."""
        freed = 0
        while freed < count and (ends := self._ends(count - freed)):
            for start in ends:
                node: Node | None = start
                # An end of a branch, then what it leaves as an end, unless that was used since.
                while node is not None and freed < count and node.alive and not node.children and self._unused(node):
                    self._remove(node)
                    freed += 1
                    parent = node.parent
                    node = parent if parent is not None and parent.used <= node.used else None
        if freed == count:
            return freed
        # A page that was computed twice can be unused before one that is in use. Nothing finds then what comes after it.
        for node in list(self._nodes.values()):
            if freed < count and self._unused(node):
                self._remove(node)
                freed += 1
        return freed

    def _ends(self, most: int) -> list[Node]:
        """Up to `most` unused ends of branches, the least recently used first."""
        unused = (node for node in self._nodes.values() if not node.children and self._unused(node))
        return list(itertools.islice(unused, most))

    def _unused(self, node: Node) -> bool:
        return self.cache.references(node.page) == 1

    def _remove(self, node: Node) -> None:
        del self._nodes[node.key]
        node.alive = False
        if node.parent is not None:
            node.parent.children -= 1
        self.cache.release(node.page)

    def clear(self) -> None:
        self.evict(len(self._nodes))
