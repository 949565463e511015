"""Eviction carried out.

What is here is looked through without any lock, and registries are asked, which may take long.  Then it is removed, a batch at a
time with the lock, each after one more look which trees are mounted or were used since.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from actors.cache.eviction import Eviction, Kept, Used
from actors.lazytree import trees
from actors.lazytree.ledger import sum_of, take_up, taken_bytes
from actors.lazytree.objects import PREFIXES, Objects
from actors.lazytree.trees import Tree, TreeSource

BATCH_S, PAUSE_S = 0.05, 0.01  # with the lock, for which mounts wait; and without it
LOCK_S = 5.0
KEEP_NS = 3600 * 10**9  # then the record of a tree of which nothing is left goes
CLOCK_NS = 10**9  # how much a file's change time and the clock may differ


@dataclass
class Report:
    """What was done: objects removed, bytes of them that are free already; and whether it was less than was asked for."""

    objects: int = 0
    freed_bytes: int = 0
    short: bool = False
    evicted: dict[str, int] = field(default_factory=dict)  # tree → objects, for the log


def evict(objects: Objects, wanted_bytes: int, has: Callable[[TreeSource], bool], alive: Callable[[], None]) -> Report:
    """Remove objects of `wanted_bytes` or as many as may go.  `has`: whether a tree can be had again; `alive` is called now and then.

    May be killed at any instruction.  Raises OSError.
    """
    directory = objects.descriptor
    report = Report()
    with trees.evicting(directory, LOCK_S) as mine:
        if not mine:
            report.short = True
            return report
        report.freed_bytes += objects.ledger.forget_freed()
        trees.held(directory)  # without those of daemons that are no more
        trees.remove_abandoned(directory)
    if wanted_bytes <= report.freed_bytes:
        return report
    known = trees.trees(directory)
    kept = scan(objects, alive)
    for key in take_up(directory):  # after that: what was found is counted, or somebody says that he is about to
        kept.pop(key, None)
    eviction = Eviction(kept, map(_used, known), (_keys(tree) for tree in trees.held(directory)))
    for tree in known:
        if time.time_ns() - tree.used_ns > KEEP_NS and kept.keys().isdisjoint(_keys(tree)):
            trees.forget(directory, tree)
    sources = {tree.name: tree.source for tree in known}
    while (question := eviction.next_question(wanted_bytes)) is not None:
        eviction.answer(has(sources[question]))
    chosen = list(eviction.chosen(wanted_bytes))
    _remove(objects, chosen, known, kept, report, alive)
    report.short = report.freed_bytes < wanted_bytes
    return report


def scan(objects: Objects, alive: Callable[[], None] = lambda: None) -> dict[bytes, Kept]:
    """All objects that are here."""
    working_ns = min(sum_of(objects.descriptor).since_ns or 1 << 62, time.time_ns()) - CLOCK_NS
    found: dict[bytes, Kept] = {}
    for prefix in sorted(PREFIXES):
        alive()
        descriptor = os.open(prefix, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=objects.descriptor)
        try:
            for name in os.listdir(descriptor):
                try:
                    status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                    key = bytes.fromhex(prefix + name)
                except (FileNotFoundError, ValueError):
                    continue  # somebody removed it, or put there what is no object
                found[key] = Kept(taken_bytes(status, name, descriptor), status.st_ctime_ns >= working_ns)
        finally:
            os.close(descriptor)
    return found


def _remove(
    objects: Objects,
    chosen: list[tuple[bytes, str | None]],
    known: Iterable[Tree],
    kept: Mapping[bytes, Kept],
    report: Report,
    alive: Callable[[], None],
) -> None:
    """Remove what was chosen, except for what was taken into use meanwhile."""
    directory = objects.descriptor
    used = {tree.name: tree.used_ns for tree in known}
    oldest_first = sorted(known, key=lambda tree: (tree.used_ns, tree.name))
    place = {tree.name: number for number, tree in enumerate(oldest_first)}
    broken = 0  # so many of these may lack something from now on
    at = 0
    while at < len(chosen):
        alive()
        with trees.evicting(directory, LOCK_S) as mine:
            if not mine:
                return
            staying: set[bytes] = set()
            for tree in trees.held(directory):
                staying.update(_keys(tree))
            for tree in trees.trees(directory, other_than=used):
                staying.update(_keys(tree))
            trees.note_eviction(directory)
            until_s = time.monotonic() + BATCH_S
            while at < len(chosen) and time.monotonic() < until_s:
                key, name = chosen[at]
                at += 1
                if key in staying:
                    continue
                if name is not None and place[name] >= broken:
                    # Before anything of a tree goes; the older ones may have the same objects.
                    for tree in oldest_first[broken : place[name] + 1]:
                        trees.no_longer_whole(directory, tree.name)
                    broken = place[name] + 1
                report.freed_bytes += objects.ledger.unlink(key.hex())
                report.objects += 1
                report.evicted[name or ""] = report.evicted.get(name or "", 0) + 1
        time.sleep(PAUSE_S)  # whoever waits for the lock, which it looks at now and then, has it now


def _used(tree: Tree) -> Used:
    return Used(tree.name, _keys(tree), tree.used_ns)


def _keys(tree: Tree) -> frozenset[bytes]:
    keys = tree.keys
    return frozenset(keys[at : at + trees.KEY_BYTES] for at in range(0, len(keys), trees.KEY_BYTES))
