"""Whether a staging directory has changed since it was last looked at, told without reading the listing it lies over.

A sync that finds nothing to do costs as much as the store has entries; this costs as much as the task has staged.  Everything that a
sync would act on moves a change time: of the file that was written or described, of the directory in which a name came or went.
A page that is mapped, dirty and writable moves none, but the sync that copied the file has cleaned it, or the file's change time is
another since that sync began (`copying`).
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import threading

from actors.mount.listing import Bounds, TreeTooLarge, open_beneath

_ENTRY = struct.Struct("<QqI")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


def fingerprint(upper: int, bounds: Bounds) -> bytes:
    """A digest of names, inodes and change times of what is staged in the directory open at `upper`.

    No content is read and no link followed.  Raises OSError (a directory went meanwhile), TreeTooLarge.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(_ENTRY.pack(0, os.fstat(upper).st_ctime_ns, 0))
    entries, waiting = 0, [b""]
    while waiting:
        path = waiting.pop()
        if (path.count(b"/") + 2 if path else 1) > bounds.depth_max:
            raise TreeTooLarge(f"{os.fsdecode(path)!r} lies deeper than {bounds.depth_max} directories")
        directory = open_beneath(upper, path, _DIRECTORY)
        try:
            with os.scandir(directory) as items:
                for item in items:
                    status = item.stat(follow_symlinks=False)
                    name = os.fsencode(item.name)
                    digest.update(_ENTRY.pack(status.st_ino, status.st_ctime_ns, len(name)) + name)
                    entries += 1
                    if stat.S_ISDIR(status.st_mode):
                        waiting.append(path + b"/" + name if path else name)
        finally:
            os.close(directory)
        if entries > bounds.entries_max:
            raise TreeTooLarge(f"more than {bounds.entries_max} entries are staged")
    return digest.digest()


class Changes:
    """What the tasks' staging directories were like when they were last in their stores, in this process's memory alone: a sync too
    many after a restart does no harm.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._synced: dict[str, bytes] = {}  # by directory

    def look(self, directory: str, bounds: Bounds) -> bytes | None:
        """The fingerprint of the staging directory; None when it is what `synced` was told last.  Raises as `fingerprint`."""
        upper = os.open(directory, _DIRECTORY | os.O_CLOEXEC)
        try:
            now = fingerprint(upper, bounds)
        finally:
            os.close(upper)
        with self._lock:
            return None if self._synced.get(directory) == now else now

    def synced(self, directory: str, then: bytes) -> None:
        """The store has everything of the directory as it was `then`, and perhaps more."""
        with self._lock:
            self._synced[directory] = then

    def forget(self, directory: str) -> None:
        with self._lock:
            self._synced.pop(directory, None)
