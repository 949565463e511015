"""A workspace as a task has it, without the daemon: a real overlay over a real META, with every object in OBJECTS."""

from __future__ import annotations

import fcntl
import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from actors.lazytree import mounts
from actors.lazytree.objects import Objects
from actors.lazytree.table import ObjectTable
from actors.mount.indexing import META, TABLE, Indexed, Indexer
from actors.mount.journal import JOURNAL
from actors.mount.listing import Bounds
from actors.mount.source import StoredFile
from actors.mount.sync import Outcome, sync

TASK_ID = 1000
OLD_NS = 1_000_000_000_000_000_000  # when the store's files were last written, long before the test


def as_task(directory: Path, work: Callable[[], object], uid: int = TASK_ID) -> None:
    """Do `work` in a process of the task's user that is in `directory`, and fail if it fails."""
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir(directory)  # as root: the directories above are none of the task's business
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.umask(0o022)
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001 (this process has no other way out)
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0, "what the task did failed; its traceback is on stderr"


class Workspace:
    """`store`, the task's own `directory`, and, while it is mounted, `root`: what the task sees."""

    def __init__(self, home: Path, store: Path, task: str = "t1") -> None:
        self.task, self.store = task, store
        self.directory, self.root, self.meta = home / task, home / f"{task}.root", home / f"{task}.meta"
        self.objects = home / "objects"
        for path in (self.directory, self.root, self.meta):
            path.mkdir()

    @property
    def upper(self) -> Path:
        return self.directory / "upper"

    def index(self) -> Indexed:
        objects = Objects(str(self.objects))
        try:
            listed = (
                Indexer()
                .look(str(self.store), str(self.directory), objects, Bounds(), 1 << 20, 3600.0)
                .put(str(self.directory))
            )
            table = ObjectTable(str(self.directory / TABLE))
            for row in map(table.row, range(len(table))):
                if not objects.has(row.key):
                    source = msgspec.msgpack.decode(row.source, type=StoredFile)
                    with objects.create() as copy:
                        with open(os.path.join(os.fsencode(self.store), source.path), "rb") as file:
                            shutil.copyfileobj(file, copy)
                        objects.publish(copy, row.key)
            table.close()
            return listed
        finally:
            objects.close()

    def mount(self) -> None:
        mounts.mount_erofs(str(self.directory / META), str(self.meta))
        if not self.upper.exists():
            mounts.make_upper(str(self.upper), str(self.directory / "work"), str(self.meta))
        upper, work = str(self.upper), str(self.directory / "work")
        mounts.mount_overlay(str(self.root), [str(self.meta)], [str(self.objects)], upper, work)

    def unmount(self) -> None:
        for path in (self.root, self.meta):
            mounts.unmount(str(path), lazily=True)

    def begin(self) -> Workspace:
        self.index()
        self.mount()
        return self

    def run(self, work: Callable[[], object], uid: int = TASK_ID) -> None:
        """Do `work` as the task, in its workspace."""
        as_task(self.root, work, uid)

    def sync(self, running: bool = False) -> Outcome:
        return sync(str(self.store), str(self.directory), self.task, Bounds(), running)

    @contextmanager
    def locked_journal(self) -> Iterator[None]:
        """As if a sync of this workspace were under way."""
        with open(self.directory / JOURNAL, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def tree(self) -> dict[str, Any]:
        """What the store has, by path: a file's content and mode, a link's target, a directory's mode."""
        return contents(self.store)


def contents(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_dir():
            found[name] = path.stat().st_mode & 0o7777
        elif path.is_file():
            found[name] = (path.read_bytes(), path.stat().st_mode & 0o7777)
        else:
            found[name] = "special"
    return found


def write(path: Path | str, content: bytes | str, mode: int = 0o644, old: bool = True) -> None:
    """Write a file as the store's owner would have, once upon a time."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    if old:
        os.utime(path, ns=(OLD_NS, OLD_NS))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store = tmp_path / "store"
    store.mkdir()
    os.chown(store, TASK_ID, TASK_ID)
    return store


@pytest.fixture
def workspaces(tmp_path: Path, store: Path) -> Iterator[Callable[[str], Workspace]]:
    """Makes workspaces over the one store, and unmounts them in the end."""
    made: list[Workspace] = []

    def make(task: str = "t1") -> Workspace:
        made.append(Workspace(tmp_path, store, task))
        return made[-1]

    yield make
    for workspace in made:
        workspace.unmount()


@pytest.fixture
def workspace(workspaces: Callable[[str], Workspace]) -> Workspace:
    return workspaces("t1")
