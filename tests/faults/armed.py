"""`run.py` as it is, but for its root supervisor, which can be killed between any two of its durable operations.

    python tests/faults/armed.py daemon        (and what the daemon starts: `process root`, `process fork-server` …)

Nothing of this is in the program, and nothing in the program knows of it: what a root supervisor does to disk, mounts, processes
and held descriptors is seen from outside its code, by CPython's audit hook (sys.addaudithook) and at the four places that the
hook cannot see (`_wrap`).  So a durable operation that is written tomorrow is seen as well, and `failpoints` finds it missing in its
table.

A directory, `FAILPOINTS` in the environment, is how a test speaks to it:

    trace     every operation, a line each, as it is about to begin
    armed     [task, names, keeper]: a root supervisor that is about to begin one of these operations takes its name out and kills
              itself, and before that its keeper when `keeper` is true

An operation's name has the task's id replaced by TASK, and what differs from run to run by a word (`operation_name`).  Words before it:
"after": it is over; "torn": a file was opened for writing, and nothing is in it yet; "halfway": some of a tree is removed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WRITING = os.O_WRONLY | os.O_RDWR | os.O_TRUNC | os.O_CREAT
GROUPS = "/sys/fs/cgroup/"
CHANGES = re.compile(r"\s*(INSERT|UPDATE|DELETE)(?: OR REPLACE)?(?: INTO| FROM)? (\w+)(?: SET (\w+))?")
BOOT = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # a boot id
VERBS_THAT_LOOK = ("state", "--version")
PATHS = {  # audit event → which of its arguments are (path, descriptor of the directory it is below)
    "os.mkdir": (0, 2),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.chmod": (0, 2),
    "os.chown": (0, 3),
    "os.link": (1, 3),
    "os.rename": (1, 3),
    "os.symlink": (1, 2),
    "os.truncate": (0, None),
}


class Operations:
    """Sees them, and dies at the one that is armed."""

    def __init__(self, directory: Path, state: str, run: str) -> None:
        self._directory = directory
        self._places = ((state, "STATE"), (run, "RUN"))
        self._trace = os.open(directory / "trace", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._here = threading.local()

    # --- what is reached ---

    def reach(self, operation: str, torn: Callable[[], object] | None = None) -> None:
        """An operation is about to begin."""
        if getattr(self._here, "looking", False):
            return  # an operation of this class's own
        self._here.looking = True
        try:
            os.write(self._trace, f"{operation}\n".encode())
            if torn is not None:
                os.write(self._trace, f"torn {operation}\n".encode())
            try:
                task, points, keeper = json.loads((self._directory / "armed").read_text())
            except FileNotFoundError:
                return
            name = operation_name(operation, task)
            if name in points:
                points.remove(name)
            elif torn is not None and f"torn {name}" in points:
                points.remove(f"torn {name}")
                torn()
            else:
                return
            (self._directory / "next").write_text(json.dumps([task, points, keeper]))
            os.rename(self._directory / "next", self._directory / "armed")
            if keeper:
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            self._here.looking = False

    @contextmanager
    def around(self, operation: str) -> Iterator[None]:
        self.reach(operation)
        yield
        self.reach(f"after {operation}")

    # --- what the interpreter tells of ---

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The audit hook."""
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes, os.PathLike)) and isinstance(flags, int) and flags & WRITING:
                self._open(os.fsdecode(path), flags)
        elif event in PATHS:
            at, directory = PATHS[event]
            path = os.fsdecode(arguments[at]) if not isinstance(arguments[at], int) else f"/proc/self/fd/{arguments[at]}"
            if directory is not None and arguments[directory] not in (-1, None) and not path.startswith("/"):
                path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[directory]}"), path)
            if path.startswith("/proc/self/fd/") and (event != "os.link"):
                path = os.readlink(path)
            if shown := self._shown(path):
                self._on_path(event.removeprefix("os."), shown)
        elif event == "os.kill" and arguments[1]:
            self.reach(f"signal {signal.Signals(arguments[1]).name} by pid")

    def _on_path(self, verb: str, shown: str) -> None:
        tree = getattr(self._here, "tree", None)
        if tree is None:
            self.reach(f"{verb} {shown}")
        elif verb in ("remove", "rmdir"):
            self._here.removed += 1
            if self._here.removed == 2:
                self.reach(f"halfway {tree}")

    def _open(self, path: str, flags: int) -> None:
        if shown := self._shown(path):
            making = flags & (os.O_CREAT | os.O_TRUNC) and flags & os.O_TMPFILE != os.O_TMPFILE
            opened = partial_open(path, flags) if making and not path.startswith(GROUPS) else None
            self.reach(f"write {shown}", torn=opened)

    def _shown(self, path: str) -> str | None:
        """A path as names have it; None when it is not the daemon's."""
        if path.startswith(GROUPS) and "/aerie-" in path:
            return "GROUP/" + path.partition("/aerie-")[2].partition("/")[2]
        for place, word in self._places:
            if path.startswith(place + "/"):
                return word + path[len(place) :]
        return None

    # --- what it does not tell of ---

    def wrap(self) -> None:
        """Put this object around the operations that no audit event tells of, and around those whose end counts as well."""
        import shutil
        import sqlite3
        import subprocess

        from actors.lazytree import mounts
        from supervisor.descriptors import Descriptors
        from supervisor.isolation import Isolation

        operations = self

        class Kernel:
            """`mounts._libc`: its calls that mount and unmount."""

            def __init__(self, libc: Any) -> None:
                self._libc = libc

            def __getattr__(self, name: str) -> Any:
                return getattr(self._libc, name)

            def move_mount(self, mounted: int, empty: bytes, at: int, target: bytes, flags: int) -> Any:
                with operations.around(f"mount {operations._shown(os.fsdecode(target))}"):
                    return self._libc.move_mount(mounted, empty, at, target, flags)

            def umount2(self, target: bytes, flags: int) -> Any:
                operations.reach(f"unmount {operations._shown(os.fsdecode(target))}")
                return self._libc.umount2(target, flags)

        mounts._libc = Kernel(mounts._libc)

        def wrapped(owner: Any, name: str, named: Callable[..., str | None]) -> None:
            original = getattr(owner, name)

            def call(*arguments: Any, **options: Any) -> Any:
                operation = named(*arguments, **options)
                if operation is None:
                    return original(*arguments, **options)
                with operations.around(operation):
                    return original(*arguments, **options)

            setattr(owner, name, call)

        wrapped(Descriptors, "keep", lambda _, given, *__: f"keep {' '.join(sorted(given))}")
        wrapped(Descriptors, "drop", lambda _, *names: f"drop {' '.join(sorted(names))}" if names else None)
        wrapped(Isolation, "start", lambda _, name, *__, **___: f"isolate {name}")
        wrapped(subprocess.Popen, "__init__", lambda _, argv, *__, **___: program_name(argv))
        wrapped(signal, "pidfd_send_signal", lambda _, number, *__: f"signal {signal.Signals(number).name}" if number else None)

        class Database(sqlite3.Connection):
            """A connection whose commits have names: what was changed."""

            def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
                if sql.startswith("BEGIN"):
                    self.changes: list[str] = []
                elif re.match(CHANGES, sql):
                    self.changes.append(statement_name(sql, *values))
                elif sql == "COMMIT":
                    for change in self.changes:
                        operations.reach(f"commit {change}")
                    done = super().execute(sql)
                    for change in self.changes:
                        operations.reach(f"after commit {change}")
                    return done
                return super().execute(sql, *values)

        connect = sqlite3.connect
        sqlite3.connect = lambda *given, **options: connect(*given, factory=Database, **options)  # type: ignore[assignment]

        remove_tree = shutil.rmtree

        def rmtree(path: Any, *arguments: Any, **options: Any) -> None:
            shown = operations._shown(os.fspath(path))
            if shown is None or getattr(operations._here, "tree", None) or not os.path.lexists(path):
                return remove_tree(path, *arguments, **options)
            operations.reach(f"rmtree {shown}")
            operations._here.tree, operations._here.removed = f"rmtree {shown}", 0
            try:
                remove_tree(path, *arguments, **options)
            finally:
                operations._here.tree = None

        shutil.rmtree = rmtree


def partial_open(path: str, flags: int) -> Callable[[], object]:
    """A function that opens a file as it is about to be opened, and writes nothing."""
    return lambda: os.open(path, flags & ~os.O_EXCL, 0o600)


def statement_name(sql: str, values: Any = ()) -> str:
    """A statement that changes the store: its verb, table and first column, and the task that it is about."""
    found = re.match(CHANGES, sql)
    assert found, sql
    verb, table, column = found.groups()
    about = [
        value for value in values if isinstance(value, str) and re.fullmatch(r"[\w.-]+", value) and not BOOT.fullmatch(value)
    ]
    return f"{verb} {table}{f'.{column}' if column else ''} {' '.join(about)}".rstrip()


def program_name(argv: Any) -> str | None:
    """A program that is started: a runtime with its verb."""
    words = [os.fspath(word) for word in argv]
    if any(word in VERBS_THAT_LOOK for word in words):
        return None
    program = os.path.basename(words[0])
    if program == "ldconfig":  # ctypes asks it where a library is
        return None
    if "/proc/self/fd/" in words[0]:
        program = "crun"
    verb = next((word for word in words[1:] if word in ("create", "start", "delete", "kill")), "")
    if "stand-in" in words:
        program = "stand-in"
    return f"start {program} {verb}".rstrip()


def operation_name(operation: str, task: str) -> str:
    """The operation's name in the table, for a test whose task is `task`."""
    operation = operation.replace("%2F", "/")
    name = re.sub(rf"(?<![\w-]){re.escape(task)}(?![\w-])", "TASK", operation)
    name = re.sub(r"TASK\.\d+", "TASK.N", name)
    name = re.sub(r"sha256(?:[:-]|%3A)[0-9a-f]{64}", "DIGEST", name)
    name = re.sub(r"mount-[0-9a-f]{8}-\d+-\d+-[0-9a-f]+", "LEASE", name)
    name = re.sub(r"/[0-9a-f]{2}(?=$| )", "/PREFIX", name)
    name = re.sub(r"RUN/\.\d+", "RUN/.PID", name)
    return re.sub(r"127\.0\.0\.1:\d+/\S+", "IMAGE", name)


def main(arguments: list[str]) -> int:
    sys.path.insert(0, str(ROOT))
    import actors.daemon
    import run
    import supervisor.parts

    actors.daemon.PROGRAM = Path(__file__).resolve()  # what the keeper, and the tree, start is this file again
    supervisor.parts.RESET_S = 0.0  # a part that is killed a hundred times on purpose is started at once each time
    if arguments == ["process", "root"]:
        state, run_dir = os.environ["AERIE_STATE_DIR"], os.environ["AERIE_RUN_DIR"]
        import actors.mount.syncer

        actors.mount.syncer.RETRY_S = 1.0  # what could not be synced is tried again while the test waits
        operations = Operations(Path(os.environ["FAILPOINTS"]), state, run_dir)
        operations.wrap()
        sys.addaudithook(operations.hear)
    run.hold_standard_streams()
    return run.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
