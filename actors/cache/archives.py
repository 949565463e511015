"""Archives: which of them go when all together are too large, and their removal.

Their directory may be shared with daemons of this node and of others.  Nobody's goes that is mounted: a daemon that has an image
mounted has a shared lock on its archive (`image.archive.hold`), which daemons on other nodes see, and on this node its mount shows
also when the daemon is dead.  An archive's modification time is that of its last use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from actors.cache.eviction import LOW
from actors.image.archives.archive import Archive
from actors.image.errors import ArchiveInvalid
from actors.lazytree import trees
from actors.lazytree.mounts import mounts_below
from actors.lazytree.objects import Objects
from actors.lazytree.trees import TreeSource

YOUNG_S = 60.0  # so long after its last use an archive stays: somebody may be about to mount it
SUFFIX = ".aerie"
SAMPLE = 64  # objects


class Found(NamedTuple):
    """An archive, by the name of its file."""

    name: str
    size_bytes: int
    used_s: float


class Gone(NamedTuple):
    archives: int
    freed_bytes: int
    short: bool


def candidates(found: Iterable[Found], mounted: frozenset[str], bytes_max: int, now_s: float) -> list[Found]:
    """The archives that may go, the longest unused first, when all together are over the bound.  Pure."""
    found = list(found)
    if sum(each.size_bytes for each in found) <= bytes_max:
        return []
    free = [each for each in found if each.name not in mounted and now_s - each.used_s > YOUNG_S]
    return sorted(free, key=lambda each: (each.used_s, each.name))


def evict(directory: str, bytes_max: int, has: Callable[[TreeSource], bool]) -> Gone:
    """Remove archives until all that are left take LOW of the bound, if there are as many that may go."""
    found = look(directory)
    total = sum(each.size_bytes for each in found)
    if total <= bytes_max:
        return Gone(0, 0, False)
    removed = freed = 0
    for each in candidates(found, _mounted(directory), bytes_max, time.time()):
        if total - freed <= LOW * bytes_max:
            break
        if has(_source(directory, each)) and _remove(os.path.join(directory, each.name)):
            removed, freed = removed + 1, freed + each.size_bytes
    return Gone(removed, freed, total - freed > bytes_max)


def look(directory: str) -> list[Found]:
    """The archives in the directory, each with what lies beside it: traces, and packs."""
    sizes: dict[str, int] = {}
    used: dict[str, float] = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            stem, dot, _ = entry.name.partition(".")
            if not stem or not dot:
                continue  # being written, or nothing of ours
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                sizes[stem] = sizes.get(stem, 0) + status.st_size
                if entry.name == stem + SUFFIX:
                    used[stem] = status.st_mtime
    return [Found(stem + SUFFIX, sizes[stem], used_s) for stem, used_s in used.items()]


def record_trees(objects: int, directory: str) -> None:
    """Record the trees of archives that nobody has recorded, and of which something is here.

    Those of a build that was not mounted yet, or an older version's.
    """
    for each in look(directory):
        tree = each.name.removesuffix(SUFFIX)
        if not trees.is_recorded(objects, tree):
            with contextlib.suppress(OSError, ArchiveInvalid):
                archive = Archive.open(os.path.join(directory, each.name), checked=True)
                with contextlib.closing(archive.objects()) as table:
                    # The directory may have archives of a whole fleet.
                    step = -(-len(table) // SAMPLE) or 1
                    paths = (Objects.path(table.row(index).key) for index in range(0, len(table), step))
                    if any(os.access(path, os.F_OK, dir_fd=objects) for path in paths):
                        trees.record(objects, tree, source_of(archive), table.keys(), each.used_s)


def source_of(archive: Archive, reference: str = "", private: bool = False) -> TreeSource:
    """Where an image can be had, by the reference, or by its builder's."""
    info = archive.info
    return TreeSource(reference or info.reference, [layer.digest for layer in info.layers], private=private)


def _source(directory: str, found: Found) -> TreeSource:
    try:
        return source_of(Archive.open(os.path.join(directory, found.name), checked=True))
    except (OSError, ArchiveInvalid):
        # What cannot be read is of no use to anybody: it would be built again.
        return TreeSource(store="damaged")


def _mounted(directory: str) -> frozenset[str]:
    """The archives that are mounted on this node, by anybody."""
    sources = {mount.source for mount in mounts_below("/") if mount.kind == "erofs"}
    return frozenset(Path(source).name for source in sources if Path(source).parent == Path(directory))


def _remove(path: str) -> bool:
    """Remove an archive, with its traces and packs, unless somebody holds it."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        directory, name = os.path.split(path)
        # First what is of no use without it: if this process is killed, the next one finds the archive, and so all of it.
        for beside in os.listdir(directory):
            if beside.startswith(name.removesuffix(SUFFIX) + ".") and beside != name:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(directory, beside))
        os.unlink(path)  # whoever opened it, and waits for the lock, sees that it has no name
        return True
    except (BlockingIOError, FileNotFoundError):
        return False
    finally:
        os.close(file)
