"""Carrying steps out: what is to be published is prepared under a private name, durable, and then renamed into place.

A step is done only while the store is as it was when the step was decided on.  `Store.lock` keeps the syncs of other tasks from
coming between that look and the step; for others the gap is microseconds.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass

from actors.mount.copying import FileChanged, copy_settled
from actors.mount.listing import TASK_GID, TASK_UID, Entry, entry_of, open_beneath
from actors.mount.staging import parent, staged_entry
from actors.mount.steps import Action, Step, described, is_directory, same_version
from actors.mount.store import DIRECTORY, FILE, STALE, Store

FILES_OPEN_MAX = 128

_libc = ctypes.CDLL(None, use_errno=True)
_RENAME_NOREPLACE = 1


@dataclass(frozen=True, slots=True)
class Prepared:
    """A step ready to be carried out: what is at `temporary`, if anything, takes the name, and is then described, if need be.

    The store has `reached` then, and with it `wanted` is dealt with.
    """

    step: Step
    temporary: bytes
    wanted: Entry | None
    reached: Entry | None
    describe: bool = False


class Publisher:
    """Carries out one sync's steps in `store`; `upper` is a descriptor of the staging directory.

    `listing`: of a task that goes on, which may still read from the store what it lists; None: it has ended.  Raises OSError
    everywhere.
    """

    def __init__(self, store: Store, upper: int, listing: Mapping[bytes, Entry] | None = None) -> None:
        self._store = store
        self._upper = upper
        self._listing = listing
        self._linked: dict[tuple[int, int], tuple[bytes, Entry]] = {}  # staged (inode, ctime) of several names: its copy
        self._unsynced: set[bytes] = set()
        self._unsynced_files: list[int] = []

    def close(self) -> None:
        for file in self._unsynced_files:
            os.close(file)

    def prepare(self, step: Step, going: bool = False) -> Prepared | None:
        """Make what `step` is to publish; None when what it is made from has changed.

        `going`: the name `step.source` is to go before this one comes.
        """
        wanted = step.wanted
        try:
            match step.action:
                case Action.PUT:
                    return self._put(step)
                case Action.LINK:
                    return self._link(step, going)
                case Action.MKDIR:
                    with self._store.private_name("dir") as (directory, name):
                        os.mkdir(name, 0o700, dir_fd=directory)
                        made = open_beneath(directory, name, DIRECTORY)
                        try:
                            os.fchown(made, TASK_UID, TASK_GID)
                            os.fchmod(made, stat.S_IMODE(step.mode))
                        finally:
                            os.close(made)
                    return Prepared(step, name, wanted, Entry(step.mode))
                case Action.SYMLINK:
                    assert wanted is not None and wanted.target is not None
                    with self._store.private_name("symlink") as (directory, name):
                        os.symlink(wanted.target, name, dir_fd=directory)
                        os.chown(name, TASK_UID, TASK_GID, dir_fd=directory, follow_symlinks=False)
                    return Prepared(step, name, wanted, wanted)
                case Action.DESCRIBE:
                    return self._described(step)
                case Action.REMOVE:
                    return Prepared(step, b"", None, None)
        except FileChanged:
            return None
        except OSError as error:
            if error.errno not in STALE:
                raise
            return None

    def _put(self, step: Step) -> Prepared | None:
        assert step.wanted is not None and step.wanted.content is not None
        source = open_beneath(self._upper, step.of, FILE)
        try:
            status = os.fstat(source)
            if status.st_ino != step.wanted.content[0]:
                return None
            with self._store.private_name("put") as (directory, name):
                reached = self._link_again(status, directory, name) if status.st_nlink > 1 else None
                if reached is None:
                    status, reached = self._copy(source, directory, name, step.mode, None)
                    if status.st_nlink > 1:
                        self._linked[status.st_ino, status.st_ctime_ns] = self._store.private + b"/" + name, reached
        finally:
            os.close(source)
        return Prepared(step, name, staged_entry(status), reached)

    def _link_again(self, status: os.stat_result, directory: int, name: bytes) -> Entry | None:
        """Another name for the copy of a staged file that has several; None when there is none, or it was changed since."""
        linked, copied = self._linked.get((status.st_ino, status.st_ctime_ns), (b"", None))
        if copied is None or self._store.look(linked) != copied:
            return None
        with self._store.open_parent(linked) as (at, other):
            os.link(other, name, src_dir_fd=at, dst_dir_fd=directory, follow_symlinks=False)
        if entry_of(os.stat(name, dir_fd=directory, follow_symlinks=False)) == copied:
            return copied
        os.unlink(name, dir_fd=directory)
        return None

    def _link(self, step: Step, going: bool) -> Prepared | None:
        wanted = step.wanted
        assert wanted is not None
        with self._store.private_name("link") as (directory, name), self._store.open_parent(step.source) as (at, source):
            os.link(source, name, src_dir_fd=at, dst_dir_fd=directory, follow_symlinks=False)
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            found = entry_of(status)
            if found is None or found.content != step.version:
                os.unlink(name, dir_fd=directory)
                return None
            as_it_is = (found.mode, found.mtime_ns) == (step.mode, wanted.mtime_ns)
            if as_it_is or (going and status.st_nlink == 2):
                reached = described(found, Entry(step.mode, wanted.mtime_ns))
                return Prepared(step, name, wanted, reached, describe=not as_it_is)
            # It has other names, which keep mode and time.
            file = open_beneath(directory, name, FILE)
            try:
                os.unlink(name, dir_fd=directory)
                _, reached_copy = self._copy(file, directory, name, step.mode, wanted.mtime_ns)
            finally:
                os.close(file)
            return Prepared(step, name, wanted, reached_copy)

    def _described(self, step: Step) -> Prepared | None:
        wanted, expected = step.wanted, step.expected
        assert wanted is not None and expected is not None
        file = open_beneath(self._store.root, step.where, FILE)
        try:
            if is_directory(expected) or os.fstat(file).st_nlink == 1:
                reached = described(expected, Entry(step.mode, wanted.mtime_ns))
                return Prepared(step, b"", wanted, reached, describe=True)
            if not same_version(entry_of(os.fstat(file)), expected):
                return None
            # A hard link in the store: to the task it was a file of its own, and the other names stay as they are.
            with self._store.private_name("put") as (directory, name):
                _, reached_copy = self._copy(file, directory, name, step.mode, wanted.mtime_ns)
            return Prepared(step, name, wanted, reached_copy)
        finally:
            os.close(file)

    def _copy(self, source: int, directory: int, name: bytes, mode: int, mtime_ns: int | None) -> tuple[os.stat_result, Entry]:
        """Copy an open file to a private name, not yet durable; returns the source's status, and the copy's entry."""
        copy = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
        if len(self._unsynced_files) >= FILES_OPEN_MAX:
            self.sync_prepared()
        self._unsynced_files.append(copy)
        try:
            status = copy_settled(source, copy, writers=self._listing is not None)
        except FileChanged:
            os.unlink(name, dir_fd=directory)  # it may be large, and the next sync far
            raise
        os.fchown(copy, TASK_UID, TASK_GID)
        os.fchmod(copy, stat.S_IMODE(mode))
        mtime_ns = status.st_mtime_ns if mtime_ns is None else mtime_ns
        os.utime(copy, ns=(mtime_ns, mtime_ns))
        made = os.fstat(copy)
        return status, Entry(made.st_mode, made.st_mtime_ns, (made.st_ino, made.st_size, made.st_mtime_ns))

    def sync_prepared(self) -> None:
        """Make the content of everything prepared so far durable."""
        while self._unsynced_files:
            file = self._unsynced_files.pop()
            try:
                os.fsync(file)
            finally:
                os.close(file)

    def carry_out(self, prepared: Prepared) -> bool:
        """Do the step, if the store is as it is expected to be; False when it is not.  To be called with the lock."""
        step = prepared.step
        if not same_version(self._store.look(step.where), step.expected):
            return False
        try:
            with self._store.open_parent(step.where) as (directory, name):
                if step.action is Action.REMOVE and is_directory(step.expected):
                    os.rmdir(name, dir_fd=directory)
                elif step.action is Action.REMOVE:
                    os.unlink(name, dir_fd=directory)
                elif prepared.temporary and not self._publish(prepared, directory, name):
                    return False
                if prepared.describe and not self._describe(directory, name, prepared.reached):
                    return False
        except OSError as error:
            if error.errno not in STALE:
                raise
            return False
        self._unsynced.add(parent(step.where))
        return True

    def _publish(self, prepared: Prepared, directory: int, name: bytes) -> bool:
        with self._store.open_parent(self._store.private + b"/" + prepared.temporary) as (private, temporary):
            if prepared.describe and os.stat(temporary, dir_fd=private, follow_symlinks=False).st_nlink > 1:
                return False  # the old name did not go
            replaced = prepared.step.expected
            if self._listing is not None and replaced is not None and replaced.content is not None:
                listed = self._listing.get(prepared.step.where)
                if listed is not None and listed.content == replaced.content:
                    self._store.put_aside(directory, name, replaced.content)
            _rename(private, temporary, directory, name, replace=replaced is not None)
        if prepared.wanted is not None and prepared.wanted.content is not None:
            inode, _, ctime_ns = prepared.wanted.content
            linked, copied = self._linked.get((inode, ctime_ns), (b"", None))
            if copied is not None and linked == self._store.private + b"/" + prepared.temporary:
                self._linked[inode, ctime_ns] = prepared.step.where, copied
        return True

    def _describe(self, directory: int, name: bytes, reached: Entry | None) -> bool:
        """Give an entry its mode and time, the time last: by it another sync sees that the mode was set too."""
        assert reached is not None
        file = open_beneath(directory, name, FILE)
        try:
            status = os.fstat(file)
            if reached.content is not None and (status.st_ino, status.st_nlink) != (reached.content[0], 1):
                return False
            os.fchmod(file, stat.S_IMODE(reached.mode))
            if reached.content is not None:
                os.utime(file, ns=(reached.mtime_ns, reached.mtime_ns))
            os.fsync(file)
            return True
        finally:
            os.close(file)

    def move(self, old: bytes, new: bytes) -> bool:
        """Rename a directory; False when the store is no longer so that this is possible.  To be called with the lock."""
        try:
            with self._store.open_parent(old) as (source, name), self._store.open_parent(new) as (target, to):
                _rename(source, name, target, to, replace=False)
        except OSError as error:
            if error.errno not in STALE:
                raise
            return False
        self._unsynced.update((parent(old), parent(new)))
        return True

    def sync_names(self) -> None:
        """Make durable what was carried out: the names, in each directory where some changed."""
        while self._unsynced:
            try:
                directory = open_beneath(self._store.root, self._unsynced.pop(), DIRECTORY)
            except OSError as error:
                if error.errno not in STALE:  # removed since, which its own directory says
                    raise
                continue
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


def _rename(source: int, name: bytes, target: int, to: bytes, replace: bool) -> None:
    if _libc.renameat2(source, name, target, to, 0 if replace else _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(to))
