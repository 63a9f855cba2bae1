"""Full pages of finished and running sequences, found again by the tokens that they and all pages before them hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from foveate.paged_kv_cache import PagedKVCache


@dataclass(eq=False)
class Node:
    key: tuple[int, tuple[int, ...]]  # id of the parent (0 at the beginning), tokens of the page
    id: int
    page: int
    parent: Node | None
    children: int = 0


class PrefixCache:
    """A tree of full pages: a node is found by its parent and the tokens of its page, so equal tokens after another beginning differ.

    Each page of the tree is held (PagedKVCache.hold), so it outlives its sequence. `evict` gives back the least recently used pages
    that no sequence holds, the ends of branches first.
    """

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
        self._nodes: OrderedDict[tuple[int, tuple[int, ...]], Node] = OrderedDict()  # least recently used first
        self._next = 1

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, tokens: Sequence[int], most: int) -> list[Node]:
        """The full pages that hold the beginning of `tokens`, `most` tokens of it at the most."""
        size, parent, chain = self.cache.page_size, 0, []
        for at in range(0, most - size + 1, size):
            node = self._nodes.get((parent, tuple(tokens[at : at + size])))
            if node is None:
                break
            chain.append(node)
            parent = node.id
        for node in reversed(chain):  # so that a page is newer than those after it
            self._nodes.move_to_end(node.key)
        return chain

    def insert(self, parent: Node | None, tokens: Sequence[int], page: int) -> Node:
        """The node of a full page with these tokens after `parent`. If equal tokens are there already, their page stays."""
        key = (0 if parent is None else parent.id, tuple(tokens))
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = Node(key, self._next, page, parent)
            self._next += 1
            if parent is not None:
                parent.children += 1
            self.cache.hold(page)
        return node

    def evictable(self) -> int:
        """Pages that `evict` could free."""
        return sum(self.cache.references(node.page) == 1 for node in self._nodes.values())

    def evict(self, count: int) -> int:
        """Frees up to `count` pages; how many it freed."""
        for freed in range(count):
            unused = [node for node in self._nodes.values() if self.cache.references(node.page) == 1]
            if not unused:
                return freed
            # Only a page that was computed twice can be unused before one that is in use; then nothing finds what comes after it.
            node = next((node for node in unused if node.children == 0), unused[0])
            del self._nodes[node.key]
            if node.parent is not None:
                node.parent.children -= 1
            self.cache.release(node.page)
        return count

    def clear(self) -> None:
        self.evict(len(self._nodes))
