"""What to evict: decided, not done.  Pure.

    trees, oldest first     1 a     2 a b     3 b c         a tree that is held, or cannot be had again: its objects stay
    objects by their age    (none) x    1 -    2 a    3 b c  as old as the youngest tree that has them; x is in none

The first of these go until enough is gone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

HIGH, LOW = (
    0.95,
    0.90,
)  # of the cap: above the first it is evicted, down to the second, so that who publishes seldom has to wait
FREE_MARGIN_BYTES = 256 << 20  # over the minimum of free disk, for the same


@dataclass(frozen=True)
class Kept:
    """An object that is here.  `young`: it is newer than the oldest work that is going on, and so may be part of it."""

    size_bytes: int
    young: bool = False


@dataclass(frozen=True)
class Used:
    """A tree: its objects' keys, and when it was used last."""

    name: str
    keys: Collection[bytes]
    used_ns: int


def excess_bytes(
    taken_bytes: int, wanted_bytes: int, cap_bytes: int, free_bytes: int, free_bytes_min: int, waited_for: bool = False
) -> int:
    """How many bytes should go, when so many are taken and free; 0: none.

    `waited_for`: somebody was refused, who wanted so many bytes; what is larger than the cap is not waited for.
    """
    excess = 0
    if waited_for or taken_bytes > HIGH * cap_bytes:
        room = wanted_bytes if wanted_bytes <= cap_bytes else 0
        excess = taken_bytes - min(int(LOW * cap_bytes), cap_bytes - room)
    wanted_free = free_bytes_min + FREE_MARGIN_BYTES // 2
    if free_bytes < wanted_free or (waited_for and free_bytes < free_bytes_min + FREE_MARGIN_BYTES + wanted_bytes):
        excess = max(excess, free_bytes_min + FREE_MARGIN_BYTES + wanted_bytes - free_bytes)
    return max(0, excess)


class Eviction:
    """Which objects of `kept` may go, and in which order, when `trees` are known and the objects of `held` stay.

    A tree's objects go only when it has been found that it can be had again, which costs something to find out: so `next_question`
    names the trees in the order in which it matters.
    """

    def __init__(self, kept: Mapping[bytes, Kept], trees: Iterable[Used], held: Iterable[Collection[bytes]]) -> None:
        self._kept = kept
        self._staying: set[bytes] = set()
        for keys in held:
            self._staying.update(keys)
        youngest: dict[bytes, int] = {}  # the tree, by its place, from which an object has its age
        self._trees: list[Used] = []
        for tree in sorted(trees, key=lambda tree: (tree.used_ns, tree.name)):
            mine = [key for key in tree.keys if key in kept and key not in self._staying]
            if mine:  # else it makes no difference
                youngest.update(dict.fromkeys(mine, len(self._trees)))
                self._trees.append(tree)
        self._answered = 0  # so many of the trees
        self._by_tree: list[list[bytes]] = [[] for _ in self._trees]
        self._orphans: list[bytes] = []
        for key, object in kept.items():
            if (place := youngest.get(key)) is not None:
                self._by_tree[place].append(key)
            elif key not in self._staying and not object.young:
                self._orphans.append(key)

    def next_question(self, wanted_bytes: int) -> str | None:
        """The tree of which must be known whether it can be had again before so many bytes are found; None: they are, or never will be."""
        found = sum(self._kept[key].size_bytes for key, _ in self.chosen(wanted_bytes))
        if found >= wanted_bytes or self._answered == len(self._trees):
            return None
        return self._trees[self._answered].name

    def answer(self, fetchable: bool) -> None:
        """Whether the tree that `next_question` named can be had again, now."""
        if not fetchable:
            # Also those that a younger tree has: this one could not get them.
            self._staying.update(self._trees[self._answered].keys)
        self._answered += 1

    def chosen(self, wanted_bytes: int) -> Iterator[tuple[bytes, str | None]]:
        """The objects that go, for so many bytes or as many as there are, and the tree that they have their age from."""
        left = wanted_bytes
        for key, tree in self._in_order():
            if left <= 0:
                return
            yield key, tree
            left -= self._kept[key].size_bytes

    def _in_order(self) -> Iterator[tuple[bytes, str | None]]:
        for key in self._orphans:
            yield key, None
        # Of every tree up to here it is known whether it can be had again.
        for tree, keys in zip(self._trees[: self._answered], self._by_tree, strict=False):
            for key in keys:
                if key not in self._staying:
                    yield key, tree.name
