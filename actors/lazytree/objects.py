"""OBJECTS: the content that is on this node's disk, one file an object, shared by every image, workspace and daemon on it.

An object is there whole or not at all.  It is written as a file without a name (O_TMPFILE) and linked to its name when it is complete,
so a crash of the writer leaves nothing.  A crash of the *machine* can leave a name whose content never reached the disk, and
overlayfs would serve it: so `sync` records what is durable, and after a reboot `forget_unsynced` removes what was published later.

What they take of the disk is counted (`ledger`), and bounded: what would be too much is not published, which is no error of
anybody's, for content that is not here is fetched.  What is here may be evicted when no tree that has it is mounted (`trees`).

Objects are root's and 0444; what a task may do with a file is decided by META alone, execution included.  Only root publishes.  A LAZY
server has dropped to the task's uid and only reads; what it has fetched it can hand on as a descriptor, for root to check and publish.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import BinaryIO

from actors.lazytree.ledger import Ledger, sum_of, taken_bytes

PREFIXES = frozenset(f"{number:02x}" for number in range(256))
COUNTS_MAX = 5  # while others go on publishing
_SYNCED = "synced"  # a file; objects whose change time is up to its modification time are durable

_libc = ctypes.CDLL(None, use_errno=True)


class Objects:
    """The object directory, opened once: nothing but its descriptor is used afterwards.  Made, with its 256 prefixes, if missing.

    Who publishes does so in one thread at a time.
    """

    def __init__(self, directory: str) -> None:
        self._ledger: Ledger | None = None
        self._taken_bytes = 0
        os.makedirs(directory, mode=0o755, exist_ok=True)
        self.descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for prefix in PREFIXES.difference(os.listdir(self.descriptor)):
            try:
                os.mkdir(prefix, 0o755, dir_fd=self.descriptor)
            except FileExistsError:
                pass  # another daemon was faster
        try:
            os.close(os.open(_SYNCED, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self.descriptor))
            os.utime(_SYNCED, (0, 0), dir_fd=self.descriptor)
        except FileExistsError:
            pass

    @staticmethod
    def path(key: str) -> str:
        """The object's path in the directory, and in LAZY: "ab/<62 hex>"."""
        return f"{key[:2]}/{key[2:]}"

    def has(self, key: str) -> bool:
        return os.access(self.path(key), os.F_OK, dir_fd=self.descriptor, follow_symlinks=False)

    @property
    def ledger(self) -> Ledger:
        """Where it is counted what this process adds and takes away."""
        if self._ledger is None:
            self._ledger = Ledger(self.descriptor)
        return self._ledger

    def create(self, size_bytes: int = 0) -> BinaryIO:
        """A new file without a name, to be written, published and closed; closed without being published it never was.

        `size_bytes`: what it is going to take of the disk.  Raises NoRoom when that is too much, OSError.
        """
        self.ledger.admit(size_bytes)
        descriptor = os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o444, dir_fd=self.descriptor)
        return os.fdopen(descriptor, "wb")

    def publish(self, file: BinaryIO, key: str) -> bool:
        """Name a created file, whose content is complete and checked; False when the object was there already.  Not yet durable."""
        file.flush()
        os.fchmod(file.fileno(), 0o444)  # whatever the umask said
        ledger = self.ledger
        size = ledger.begin_publishing(key, file.fileno())
        try:
            os.link(f"/proc/self/fd/{file.fileno()}", self.path(key), dst_dir_fd=self.descriptor, follow_symlinks=True)
        except FileExistsError:
            size = 0
            return False
        except BaseException:
            size = 0
            raise
        finally:
            ledger.end_publishing(size)
        return True

    def replace(self, file: BinaryIO, key: str) -> None:
        """Put a created file, whose content is complete and checked, in the place of an object that is damaged.  Not yet durable.

        Who has the damaged one open keeps it.
        """
        file.flush()
        os.fchmod(file.fileno(), 0o444)
        unnamed = f".{key}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unnamed, dir_fd=self.descriptor)
        os.link(f"/proc/self/fd/{file.fileno()}", unnamed, dst_dir_fd=self.descriptor, follow_symlinks=True)
        # What is counted is what was published, and so is this.
        os.rename(unnamed, self.path(key), src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def has_of_size(self, key: str, size_bytes: int) -> bool:
        """Whether the object is there; one of another size is damaged, and removed."""
        try:
            if os.stat(self.path(key), dir_fd=self.descriptor, follow_symlinks=False).st_size == size_bytes:
                return True
        except FileNotFoundError:
            return False
        self.ledger.unlink(key, size_bytes)
        return False

    def sync(self) -> None:
        """Make all objects published so far durable, with one syncfs(2), and record it."""
        mark = os.open(_SYNCED, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self.descriptor)
        try:
            # The file system's own clock: what was linked before this has an earlier change time, or the same.
            os.fchmod(mark, 0o600)
            durable_ns = os.fstat(mark).st_ctime_ns
            if _libc.syncfs(self.descriptor):
                raise OSError(ctypes.get_errno(), f"syncfs: {os.strerror(ctypes.get_errno())}")
            os.utime(mark, ns=(durable_ns, durable_ns))
            os.fsync(mark)
        finally:
            os.close(mark)

    def forget_unsynced(self) -> int:
        """Remove what was published after the last `sync`, which the disk may have only in part; returns how many objects.

        For the first start after a reboot, before anything is mounted.  What is left is counted anew.
        """
        removed = self._go_through(os.stat(_SYNCED, dir_fd=self.descriptor).st_mtime_ns)
        self.count()
        return removed

    def count(self) -> None:
        """Count anew what all objects take."""
        for _ in range(COUNTS_MAX):
            before = sum_of(self.descriptor)
            self._taken_bytes = 0
            self._go_through(None)
            if self.ledger.recount(self._taken_bytes, before):
                return

    def _go_through(self, durable_ns: int | None) -> int:
        """Remove all that is not durable, if that matters, and add the rest up → how many were removed."""
        removed = 0
        for prefix in PREFIXES:
            directory = os.open(prefix, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.descriptor)
            try:
                for name in os.listdir(directory):
                    try:
                        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                        if durable_ns is not None and status.st_ctime_ns > durable_ns:
                            os.unlink(name, dir_fd=directory)
                            removed += 1
                        else:
                            self._taken_bytes += taken_bytes(status, name, directory)
                    except FileNotFoundError:
                        pass  # evicted just now
            finally:
                os.close(directory)
        return removed

    def close(self) -> None:
        if self._ledger is not None:
            self._ledger.close()
        os.close(self.descriptor)
