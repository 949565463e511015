"""One directory store, for one task's sync: looking at it, and the private names in it.

Every path goes through openat2(2) from the store's descriptor: no symbolic link leads out of it.  `.aerie-sync/TASK/` in its
root is this task's own, for what is to be published: on the store's file system by that, and to be renamed into place; and for
versions put aside, which the task's LAZY server, as its user, opens by their names.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator

from actors.mount.copying import equal
from actors.mount.listing import (
    ASIDE,
    RESERVED,
    Entry,
    Version,
    aside_name,
    entry_of,
    open_beneath,
    open_store,
    private_directory,
)
from actors.mount.staging import parent
from actors.mount.steps import is_directory

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
FILE = os.O_RDONLY | os.O_NONBLOCK
REMOVED_MAX = 100  # times that others' syncs remove a directory while it is being opened
# The store, or staging, is no longer what it was when it was looked at.
STALE = frozenset((errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.EISDIR, errno.ENXIO))


class Store:
    """The store at `path`, which is made when it is missing, open at `root`; `upper` is a descriptor of the staging directory.

    It is a `steps.View`, which remembers what it has seen until `forget`.  `private` is the path of the task's own directory in
    it.  Raises OSError, here and everywhere.
    """

    def __init__(self, path: str, task: str, upper: int) -> None:
        self._upper = upper
        self.root = open_store(path)
        self.private = private_directory(task)
        self._task = os.fsencode(task)
        self._token = os.urandom(8).hex()
        self._numbers = 0
        self._private_made = False
        self._seen: dict[bytes, Entry | None] = {}

    def close(self) -> None:
        os.close(self.root)

    # What is there

    def get(self, path: bytes) -> Entry | None:
        if path not in self._seen:
            self._seen[path] = self.look(path)
        return self._seen[path]

    def children(self, path: bytes) -> list[bytes]:
        try:
            directory = open_beneath(self.root, path, DIRECTORY)
        except OSError as error:
            if error.errno not in STALE:
                raise
            return []
        try:
            names = [os.fsencode(name) for name in os.listdir(directory)]
        finally:
            os.close(directory)
        return [path + b"/" + name if path else name for name in names]

    def same_content(self, path: bytes, of: bytes) -> bool:
        with contextlib.ExitStack() as opened:
            files = []
            for directory, name in ((self.root, path), (self._upper, of)):
                try:
                    file = open_beneath(directory, name, FILE)
                except OSError as error:
                    if error.errno not in STALE:
                        raise
                    return False
                opened.callback(os.close, file)
                files.append(file)
            return equal(*files)

    def look(self, path: bytes) -> Entry | None:
        """What is at `path` now; a kind that no listing has is an entry with nothing but its mode."""
        try:
            opened = open_beneath(self.root, path, os.O_PATH)
        except OSError as error:
            if error.errno not in STALE:
                raise
            return None
        try:
            status = os.fstat(opened)
            if stat.S_ISLNK(status.st_mode):
                return Entry(status.st_mode, target=os.readlink(b"", dir_fd=opened))
            return entry_of(status) or Entry(status.st_mode)
        finally:
            os.close(opened)

    def directory_inode(self, path: bytes) -> int | None:
        """The inode of the directory at `path`; None when there is none."""
        try:
            opened = open_beneath(self.root, path, os.O_PATH | os.O_DIRECTORY)
        except OSError as error:
            if error.errno not in STALE:
                raise
            return None
        try:
            return os.fstat(opened).st_ino
        finally:
            os.close(opened)

    def forget(self) -> None:
        """Look again at everything."""
        self._seen.clear()

    # Private names

    def recover(self) -> dict[Version, bytes]:
        """Remove what an earlier sync of this task left behind, but for what was put aside, and links: each may be the last
        name of a file that is still to be renamed.  Returns those, by version.
        """
        spares = {}
        for path in self.children(self.private):
            if path.rpartition(b"/")[2].startswith(ASIDE):
                continue
            entry = self.look(path)
            if entry is not None and entry.content is not None and path.rpartition(b"/")[2].startswith(b"link"):
                spares[entry.content] = path
            else:
                self._remove(path, entry)
        return spares

    def clean(self) -> None:
        """Remove the private directory and what is in it: nothing is unfinished any more."""
        for path in self.children(self.private):
            self._remove(path, self.look(path))
        for path in (self.private, RESERVED):
            try:
                self._remove(path, Entry(stat.S_IFDIR))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):  # other tasks' are in there
                    raise

    def _remove(self, path: bytes, entry: Entry | None) -> None:
        with self.open_parent(path) as (directory, name):
            if is_directory(entry):
                os.rmdir(name, dir_fd=directory)
            else:
                os.unlink(name, dir_fd=directory)

    @contextlib.contextmanager
    def open_parent(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        """A descriptor of the directory that `path` is in, and its name there."""
        directory = open_beneath(self.root, parent(path), DIRECTORY)
        try:
            yield directory, path.rpartition(b"/")[2]
        finally:
            os.close(directory)

    def _open_private(self) -> int:
        """A descriptor of this task's private directory, which is made, and made ours, at first use."""
        try:
            if self._private_made:
                with contextlib.suppress(FileNotFoundError):
                    return open_beneath(self.root, self.private, DIRECTORY)
            self._private_made = True
            for _ in range(REMOVED_MAX):
                # The sync of another task, at its end, may remove the directory that both have theirs in, as long as it is empty.
                with contextlib.suppress(FileNotFoundError):
                    return self._make_private()
            return self._make_private()
        except OSError as error:
            if error.errno not in STALE:
                raise
            # No later look would find it otherwise: this is for somebody to put right.
            text = f"{os.fsdecode(self.private)} in the store is no directory of a sync's: {error.strerror}"
            raise OSError(errno.EPERM, text) from None

    def _make_private(self) -> int:
        with contextlib.ExitStack() as opened:
            directory = self.root
            for name in (RESERVED, self._task):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o711, dir_fd=directory)
                directory = open_beneath(directory, name, DIRECTORY)
                opened.callback(os.close, directory)
                # Whoever else may write to the store must not write here: what lies here is published as it is.  Names that
                # are to be published nobody can guess.
                os.fchmod(directory, 0o711)
                os.fchown(directory, os.geteuid(), os.getegid())
            return os.dup(directory)

    @contextlib.contextmanager
    def private_name(self, kind: str) -> Iterator[tuple[int, bytes]]:
        directory = self._open_private()
        self._numbers += 1
        try:
            yield directory, f"{kind}-{self._token}-{self._numbers}".encode()
        finally:
            os.close(directory)

    def put_aside(self, directory: int, name: bytes, content: Version) -> None:
        """Give the file that has this content, at `name` in an open directory, a private name besides: the task may still read it."""
        private = self._open_private()
        try:
            # It may have the name by an earlier sync: no other inode can have that number meanwhile.
            with contextlib.suppress(FileExistsError):
                os.link(name, aside_name(content[0]), src_dir_fd=directory, dst_dir_fd=private, follow_symlinks=False)
        finally:
            os.close(private)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep syncs of other tasks out."""
        fcntl.flock(self.root, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self.root, fcntl.LOCK_UN)
