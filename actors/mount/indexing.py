"""From a store's listing to what a task is mounted on: META, the object table, and small objects.

A store that is listed again and has not changed gives the same files; the last of some stores are kept open and copied, which
takes a tenth of the time.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass

import msgspec

from actors.lazytree import erofs, trees
from actors.lazytree.objects import Objects
from actors.lazytree.table import ObjectTable, Row, write_table
from actors.lazytree.trees import Trees, TreeSource
from actors.mount.journal import staged
from actors.mount.listing import TASK_GID, TASK_UID, Bounds, Found, Listing, list_store, open_beneath, open_store, write_listing
from actors.mount.source import StoredFile

META, TABLE = "meta.erofs", "table"  # in the task's directory
SMALL_BYTES_MAX = 64 << 10
CACHED_BYTES_MAX = 256 << 20
PIECE_BYTES_MAX = 1 << 20
LOOKED_AT_AGAIN_MAX = 2000  # of the objects that were missing the last time; a millisecond or two
KEPT_MAX = 8  # stores whose last META and table are kept; each at most some 400 bytes an entry

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NAMELESS = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
_encode_source = msgspec.msgpack.Encoder().encode


@dataclass(frozen=True)
class Indexed:
    """Entries listed; regular files that are not empty, the bytes of them, and how many of them may not be in OBJECTS; and what
    is not in the snapshot, with the reasons.
    """

    entries: int
    objects: int
    content_bytes: int
    missing: int
    skipped: list[tuple[bytes, str]]


class _Files:
    """META and table of a listing, without names, open for as long as somebody has this object.

    `looked_at`: of how many of the table's rows, from the first on, it is known whether OBJECTS has them; `absent`: which it had not.
    """

    def __init__(self, listing: Listing, digest: bytes, identity: bytes, directory: str) -> None:
        self.digest = digest
        self.filling = threading.Lock()
        self.looked_at = 0
        self.absent: list[int] = []
        self.looked_ns = 0  # when something was last evicted before that
        self.recorded = 0  # the inode of the record of its tree (`lazytree.trees`)
        self.meta = self.table = -1
        self.meta = os.open(directory, _NAMELESS, 0o600)  # on the disk where the copies will be
        self.table = os.open(directory, _NAMELESS, 0o600)
        tree, rows = _tree(listing, identity)
        with open(self.meta, "wb", closefd=False) as meta, open(self.table, "wb", closefd=False) as table:
            erofs.write(tree, meta)
            write_table(table, rows)
        self.objects, self.content_bytes = len(rows), sum(row.size_bytes for row in rows)

    def __del__(self) -> None:
        for descriptor in (self.meta, self.table):
            if descriptor >= 0:
                os.close(descriptor)


class StagedChanges(Exception):
    """The directory has what a task changed, which belongs to the listing that is there, and to no other."""


class Snapshot:
    """A store as it was listed; `put` gives it to a task, and may be called for any number of them."""

    def __init__(self, listing: Listing, entries: bytes, files: _Files) -> None:
        self._listing, self._entries, self._files = listing, entries, files

    def put(self, directory: str) -> Indexed:
        """Write listing, META and table into the task's `directory`.  Raises OSError, StagedChanges."""
        if staged(directory):
            raise StagedChanges(f"{directory}: a task has changed this workspace, and its changes are not in the store yet")
        files = self._files
        write_listing(directory, self._entries)
        _copy(files.table, os.path.join(directory, TABLE))
        _copy(files.meta, os.path.join(directory, META))  # the last: whoever finds it finds the others too
        missing = files.objects - files.looked_at + len(files.absent)
        return Indexed(len(self._listing.entries), files.objects, files.content_bytes, missing, self._listing.skipped)


class Indexer:
    """Indexes stores, from any thread, for the daemon with this run directory."""

    def __init__(self, run_dir: str = "") -> None:
        self._run_dir = run_dir
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, _Files] = OrderedDict()  # by the store's identity, the longest unused first

    def look(
        self,
        store: str,
        disk: str,
        objects: Objects,
        bounds: Bounds,
        small_bytes_max: int,
        small_s: float,
        holds: Sequence[str] = (),
    ) -> Snapshot:
        """List `store`, which is made if it is missing, for tasks whose directories are on the disk of the directory `disk`.

        Files of at most 64 KiB are copied to OBJECTS, for overlayfs binds an inode to the layer that has its object at first
        open; at most `small_bytes_max` in all, and for no longer than `small_s`: what remains is read when it is wanted, and
        the next time goes on from there.  All of them are held under each of the names `holds`.  Raises OSError, TreeTooLarge.
        """
        root = open_store(store)
        try:
            listing = list_store(root, bounds)
            entries = listing.encode()
            identity = f"{os.fstat(root).st_dev}:{listing.root.inode}:{store}".encode()
            digest = hashlib.sha256(identity + msgspec.msgpack.encode(listing.root) + entries).digest()
            files = self._kept_files(identity, digest)
            if files is None:
                files = _Files(listing, digest, identity, disk)
                self._keep(identity, files)
            if holds and files.objects:
                self._hold(holds, store, identity, files, objects)
            if files.filling.acquire(blocking=False):  # another listing of this store may be at it
                try:
                    _fill(root, files, objects, small_bytes_max, time.monotonic() + small_s)
                finally:
                    files.filling.release()
        finally:
            os.close(root)
        return Snapshot(listing, entries, files)

    def _hold(self, holds: Sequence[str], store: str, identity: bytes, files: _Files, objects: Objects) -> None:
        """Before anybody looks what is in OBJECTS.  Whatever is evicted nevertheless, LAZY answers for."""
        tree = f"store-{hashlib.sha256(identity).hexdigest()}"
        held = Trees(objects.descriptor, self._run_dir)
        try:
            for hold in holds:
                if not held.hold_again(hold, tree, files.recorded):
                    with closing(ObjectTable(f"/proc/self/fd/{files.table}")) as table:
                        files.recorded = held.hold(hold, tree, TreeSource(store=store), table.keys())
            trees.settled(objects.descriptor)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise

    def _kept_files(self, identity: bytes, digest: bytes) -> _Files | None:
        with self._lock:
            files = self._kept.get(identity)
            if files is None or files.digest != digest:
                return None
            self._kept.move_to_end(identity)
            return files

    def _keep(self, identity: bytes, files: _Files) -> None:
        with self._lock:
            self._kept[identity] = files
            self._kept.move_to_end(identity)
            if len(self._kept) > KEPT_MAX:
                self._kept.popitem(last=False)  # closed when nobody copies from it any more


def _tree(listing: Listing, identity: bytes) -> tuple[erofs.Node, list[Row]]:
    """META's tree, and the rows of its objects."""
    root = _node(listing.root)
    directories, rows = {b"": root}, []
    for found in listing.entries:
        node = _node(found)
        if node.children is not None:
            directories[found.path] = node
        elif found.size and stat.S_ISREG(found.mode):
            # The change time too: the object of a file that was rewritten and given its old time again is another one.
            version = f"{found.inode}:{found.size}:{found.mtime_ns}:{found.ctime_ns}".encode()
            node.size, node.key = found.size, hashlib.sha256(b"%s\0%s\0%s" % (identity, version, found.path)).hexdigest()
            source = StoredFile(found.path, found.inode, found.size, found.mtime_ns)
            rows.append(Row(node.key, found.size, _encode_source(source)))
        directory, _, name = found.path.rpartition(b"/")
        children = directories[directory].children
        assert children is not None
        children[name] = node
    return root, rows


def _node(found: Found) -> erofs.Node:
    node = erofs.Node(found.mode, TASK_UID, TASK_GID, found.mtime_ns, target=found.target)
    if stat.S_ISDIR(found.mode):
        node.children = {}
    return node


def _fill(root: int, files: _Files, objects: Objects, small_bytes_max: int, until_s: float) -> None:
    """Look again for what was missing; then on, from where it was left off, and copy the small ones."""
    evicted_ns = trees.last_eviction_ns(objects.descriptor)
    if evicted_ns != files.looked_ns:
        files.looked_at, files.absent, files.looked_ns = 0, [], evicted_ns
    if files.looked_at == files.objects and not files.absent:
        return
    with closing(ObjectTable(f"/proc/self/fd/{files.table}")) as table:
        again, rest = files.absent[:LOOKED_AT_AGAIN_MAX], files.absent[LOOKED_AT_AGAIN_MAX:]
        files.absent = [index for index in again if not objects.has(table.row(index).key)] + rest
        for index in range(files.looked_at, files.objects):
            row = table.row(index)
            there = objects.has(row.key)
            if not there and row.size_bytes <= SMALL_BYTES_MAX:
                small_bytes_max -= row.size_bytes
                if small_bytes_max < 0 or time.monotonic() >= until_s:
                    return
                there = _fill_one(root, row, objects)
            files.looked_at = index + 1
            if not there:
                files.absent.append(index)


def cache(store: str, directory: str, objects: Objects, rows: Iterable[int]) -> int:
    """Copy objects of the workspace indexed in the task's `directory` to OBJECTS → how many of them are there now.

    Each may have CACHED_BYTES_MAX; for what there is no room, nothing is copied.  Raises OSError, CorruptTable, IndexError.
    """
    cached = 0
    root = open_store(store)
    try:
        with closing(ObjectTable(os.path.join(directory, TABLE))) as table:
            for index in rows:
                row = table.row(index)
                if not (there := objects.has(row.key)) and row.size_bytes <= CACHED_BYTES_MAX:
                    there = _fill_one(root, row, objects)
                cached += there
    finally:
        os.close(root)
    return cached


def _fill_one(root: int, row: Row, objects: Objects) -> bool:
    """Copy a file to OBJECTS, if it still is, and stays, the version that was listed, and there is room for it."""
    stored = msgspec.msgpack.decode(row.source, type=StoredFile)
    try:
        file = open_beneath(root, stored.path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            raise
        return False  # it went
    try:
        before = os.fstat(file)
        with objects.create(stored.size) as copy:
            done = 0
            while done < stored.size and (count := _copy_range(file, copy.fileno(), stored.size - done, done)):
                done += count
            after = os.fstat(file)
            listed = (stored.inode, stored.size, stored.mtime_ns)
            seen = (after.st_ino, after.st_size, after.st_mtime_ns)
            if done != stored.size or seen != listed or before.st_ctime_ns != after.st_ctime_ns:
                return False
            objects.publish(copy, row.key)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        return False  # no room
    finally:
        os.close(file)
    return True


def _copy_range(source: int, target: int, size: int, place: int) -> int:
    """Copy up to `size` bytes at `place` → how many it were."""
    if size <= SMALL_BYTES_MAX:
        return os.pwrite(target, os.pread(source, size, place), place)
    try:
        return os.copy_file_range(source, target, min(size, PIECE_BYTES_MAX), place, place)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    # Between two file systems, of which one knows no other way.
    return os.pwrite(target, os.pread(source, min(size, PIECE_BYTES_MAX), place), place)


def _copy(source: int, path: str) -> None:
    """A copy of an open file, whole or not at all; where the file system can, it shares the blocks."""
    size = os.fstat(source).st_size
    with open(f"{path}.new", "wb") as file:
        done = 0
        while done < size:
            done += os.copy_file_range(source, file.fileno(), size - done, done, done)
    os.rename(f"{path}.new", path)
