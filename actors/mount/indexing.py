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
from dataclasses import dataclass, field

import msgspec

from actors.lazytree import erofs
from actors.lazytree.objects import Objects
from actors.lazytree.table import Row, write_table
from actors.mount.listing import TASK_GID, TASK_UID, Bounds, Found, Listing, list_store, open_beneath, open_store, write_listing
from actors.mount.source import StoredFile
from actors.mount.staging import parent

META, TABLE = "meta.erofs", "table"  # in the task's directory
SMALL_BYTES_MAX = 64 << 10
KEPT_MAX = 8  # stores whose last META and table are kept; each at most some 400 bytes an entry

_NAMELESS = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
_encode_source = msgspec.msgpack.Encoder().encode


@dataclass(frozen=True)
class Indexed:
    """Entries listed; regular files that are not empty, the bytes of them, and how many are not in OBJECTS, as far as was
    looked; and what is not in the snapshot, with the reasons.
    """

    entries: int
    objects: int
    content_bytes: int
    missing: int
    skipped: list[tuple[bytes, str]]


class _Files:
    """A META and a table without names, open for as long as somebody has this object; `indexed` says what they are of."""

    __slots__ = ("digest", "indexed", "meta", "table")

    def __init__(self, digest: bytes, indexed: Indexed, directory: str) -> None:
        self.digest, self.indexed = digest, indexed
        self.meta = self.table = -1
        self.meta = os.open(directory, _NAMELESS, 0o600)  # on the disk where the copies will be
        self.table = os.open(directory, _NAMELESS, 0o600)

    def __del__(self) -> None:
        for descriptor in (self.meta, self.table):
            if descriptor >= 0:
                os.close(descriptor)


class Indexer:
    """Indexes stores, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, _Files] = OrderedDict()  # by the store's identity, the longest unused first

    def index(
        self, store: str, directory: str, objects: Objects, bounds: Bounds, small_bytes_max: int, small_s: float
    ) -> Indexed:
        """List `store`, which is made if it is missing, and write listing, META and table into the task's `directory`.

        Files of at most 64 KiB are copied to OBJECTS on the way, for overlayfs binds an inode to the layer that has its object
        at first open; at most `small_bytes_max` in all, and for no longer than `small_s`: what remains is read when it is
        wanted.  Raises OSError, TreeTooLarge.
        """
        root = open_store(store)
        try:
            listing = list_store(root, bounds)
            entries = listing.encode()
            identity = f"{os.fstat(root).st_dev}:{listing.root.inode}:{store}".encode()
            digest = hashlib.sha256(identity + msgspec.msgpack.encode(listing.root) + entries).digest()
            with self._lock:
                files = self._kept.get(identity)
                if files is not None:
                    self._kept.move_to_end(identity)
            if files is None or files.digest != digest:
                build = _Build(root, identity, objects, small_bytes_max, time.monotonic() + small_s)
                files = build.files(listing, digest, directory)
                if not build.small_missing:
                    self._keep(identity, files)
        finally:
            os.close(root)
        write_listing(directory, entries)
        _copy(files.table, os.path.join(directory, TABLE))
        _copy(files.meta, os.path.join(directory, META))  # the last: whoever finds it finds the others too
        return files.indexed

    def _keep(self, identity: bytes, files: _Files) -> None:
        with self._lock:
            self._kept[identity] = files
            self._kept.move_to_end(identity)
            if len(self._kept) > KEPT_MAX:
                self._kept.popitem(last=False)  # closed when nobody copies from it any more


def _copy(source: int, path: str) -> None:
    """A copy of an open file, whole or not at all; where the file system can, it shares the blocks."""
    size = os.fstat(source).st_size
    with open(f"{path}.new", "wb") as file:
        done = 0
        while done < size:
            done += os.copy_file_range(source, file.fileno(), size - done, done, done)
    os.rename(f"{path}.new", path)


@dataclass
class _Build:
    root: int
    identity: bytes
    objects: Objects
    small_bytes_left: int
    small_until_s: float
    rows: list[Row] = field(default_factory=list)
    content_bytes: int = 0
    missing: int = 0
    small_missing: int = 0

    def files(self, listing: Listing, digest: bytes, directory: str) -> _Files:
        tree = self.tree(listing)
        indexed = Indexed(len(listing.entries), len(self.rows), self.content_bytes, self.missing, listing.skipped)
        files = _Files(digest, indexed, directory)
        with open(files.meta, "wb", closefd=False) as meta, open(files.table, "wb", closefd=False) as table:
            erofs.write(tree, meta)
            write_table(table, self.rows)
        return files

    def tree(self, listing: Listing) -> erofs.Node:
        root = _node(listing.root)
        directories = {b"": root}
        for found in listing.entries:
            node = _node(found)
            if found.size and stat.S_ISREG(found.mode):
                node.size, node.key = found.size, self.object(found)
            elif node.children is not None:
                directories[found.path] = node
            children = directories[parent(found.path)].children
            assert children is not None
            children[found.path.rpartition(b"/")[2]] = node
        return root

    def object(self, found: Found) -> str:
        """The key of a file's object, which gets a row in the table."""
        # The change time too: the object of a file that was rewritten and given its old time again is another one.
        version = f"{found.inode}:{found.size}:{found.mtime_ns}:{found.ctime_ns}".encode()
        key = hashlib.sha256(b"%s\0%s\0%s" % (self.identity, version, found.path)).hexdigest()
        self.rows.append(Row(key, found.size, _encode_source(StoredFile(found.path, found.inode, found.size, found.mtime_ns))))
        self.content_bytes += found.size
        if not self.objects.has(key) and not self.fill(found, key):
            self.missing += 1
            self.small_missing += found.size <= SMALL_BYTES_MAX
        return key

    def fill(self, found: Found, key: str) -> bool:
        """Copy a small file to OBJECTS, if it still is, and stays, the version that was listed."""
        if found.size > min(SMALL_BYTES_MAX, self.small_bytes_left) or time.monotonic() >= self.small_until_s:
            return False
        try:
            file = open_beneath(self.root, found.path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
                raise
            return False  # it went
        try:
            content = os.read(file, found.size + 1)
            now = os.fstat(file)
        finally:
            os.close(file)
        # One look after the read is enough: what was read was this version if the file still is.
        version = (found.inode, found.size, found.mtime_ns, found.ctime_ns)
        if (now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns) != version or len(content) != found.size:
            return False
        with self.objects.create() as copy:
            copy.write(content)
            self.objects.publish(copy, key)
        self.small_bytes_left -= found.size
        return True


def _node(found: Found) -> erofs.Node:
    node = erofs.Node(found.mode, TASK_UID, TASK_GID, found.mtime_ns, target=found.target)
    if stat.S_ISDIR(found.mode):
        node.children = {}
    return node
