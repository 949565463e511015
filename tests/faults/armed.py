"""`run.py` as it is, but for its root supervisor and the isolated processes of ISOLATED: each can be killed between any two of its
durable operations.

    python tests/faults/armed.py daemon        (and what the daemon starts: `process root`, `process fork-server` …)

Nothing of this is in the program, and nothing in the program knows of it: what a process does to disk, mounts, processes and held
descriptors is seen from outside its code, by CPython's audit hook (sys.addaudithook) and at the places that the hook cannot see
(`wrap`, `wrap_isolated`).  So a durable operation that is written tomorrow is seen as well, and `failpoints` finds it missing in its
table.

A directory, `FAILPOINTS` in the environment, is how a test speaks to it:

    trace     every operation, a line each, as it is about to begin
    armed     [task, names, how]: a process that is about to begin one of these operations takes its name out and kills itself, and
              before that the keeper when `how` is "with its keeper" (for a root supervisor only); "hang": its thread goes on no more

An operation's name has the task's id replaced by TASK, and what differs from run to run by a word (`operation_name`); an isolated
process's begins with who it is.  Words before it: "after": it is over; "torn": a file was opened for writing, and nothing is in it yet,
or half of what was to be added is; "halfway": some of a tree is removed.  fsync(2) is none: who is killed after it leaves what who is
killed before it does.  (What a power cut leaves is another matter, and not seen here.)
"""

from __future__ import annotations

import fcntl
import functools
import gc
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
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
    "os.utime": (0, 3),
}
KILL, WITH_ITS_KEEPER, HANG = "kill", "with its keeper", "hang"
ISOLATED = ("syncer", "output mover", "image builder", "image prefetcher", "evictor", "checker")


class Operations:
    """Sees them, and dies at the one that is armed."""

    def __init__(self, directory: Path, who: str = "") -> None:
        """`who`: the isolated process that this is; "" for a root supervisor."""
        self._directory = directory
        self._who = f"{who}: " if who else ""
        self._places = [
            (os.environ[variable], word)
            for variable, word in (("AERIE_STATE_DIR", "STATE"), ("AERIE_RUN_DIR", "RUN"), ("AERIE_OUTPUT_FILE_DIR", "LOGS"))
        ]
        self._trace = os.open(directory / "trace", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._here = threading.local()

    # --- what is reached ---

    def reach(self, operation: str, torn: Callable[[], object] | None = None) -> None:
        """An operation is about to begin."""
        if getattr(self._here, "looking", False):
            return  # an operation of this class's own
        self._here.looking = True
        try:
            begun = [self._who + operation, *([f"{self._who}torn {operation}"] if torn is not None else ())]
            os.write(self._trace, "".join(f"{name}\n" for name in begun).encode())
            with open(self._directory / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # others of these processes, and threads, may be about to die as well
                hangs = self._die_if_armed(begun, torn)
            if hangs:
                threading.Event().wait()
        finally:
            self._here.looking = False

    def _die_if_armed(self, begun: list[str], torn: Callable[[], object] | None) -> bool:
        """→ whether it is not to die, but to hang."""
        try:
            task, points, how = json.loads((self._directory / "armed").read_text())
        except FileNotFoundError:
            return False
        for name in begun:
            if (point := operation_name(name, task)) in points:
                points.remove(point)
                if name != begun[0]:
                    assert torn is not None
                    torn()
                (self._directory / "next").write_text(json.dumps([task, points, how]))
                os.rename(self._directory / "next", self._directory / "armed")
                if how == HANG:
                    return True
                if how == WITH_ITS_KEEPER:
                    os.kill(os.getppid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
        return False

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
                self._open(os.path.join(getattr(self._here, "directory", ""), os.fsdecode(path)), flags)
        elif event in PATHS:
            at, directory = PATHS[event]
            path = os.fsdecode(arguments[at]) if not isinstance(arguments[at], int) else f"/proc/self/fd/{arguments[at]}"
            if directory is not None and arguments[directory] not in (-1, None) and not path.startswith("/"):
                path = os.path.join(path_of(arguments[directory]), path)
            if path.startswith("/proc/self/fd/"):
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
            if os.path.isdir(path):
                return  # a file without a name is opened by its directory's (O_TMPFILE), and goes with this process
            tells = flags & (os.O_CREAT | os.O_TRUNC) or Path(path).is_fifo()  # that it was opened is seen afterwards
            opened = partial_open(path, flags) if tells and not path.startswith(GROUPS) else None
            self.reach(f"write {shown}", torn=opened)

    def _shown(self, path: str) -> str | None:
        """A path as names have it; None when it is not the daemon's, or a name no longer."""
        if path.endswith(" (deleted)"):
            return None
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

    def wrap_isolated(self) -> None:
        """The same for an isolated process."""
        from actors.mount import publish
        from actors.mount.journal import Journal
        from supervisor.channel import Channel

        opened, write, pwrite, splice = os.open, os.write, os.pwrite, os.splice
        rename, append_batch, send = publish._rename, Journal.append, Channel.send

        def open_in(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            self._here.directory = "" if dir_fd is None else path_of(dir_fd)  # the hook is not told
            try:
                return opened(path, flags, mode, dir_fd=dir_fd)
            finally:
                self._here.directory = ""

        def append(file: int, data: Any) -> int:
            self._add(file, lambda: write(file, data[: len(data) // 2]))
            return write(file, data)

        def append_at(file: int, data: Any, offset: int) -> int:
            self._add(file, lambda: pwrite(file, data[: len(data) // 2], offset))
            return pwrite(file, data, offset)

        def append_from(source: int, file: int, *arguments: Any, **options: Any) -> int:
            self._add(file)
            return splice(source, file, *arguments, **options)

        def rename_in(source: int, name: bytes, target: int, to: bytes, replace: bool) -> None:
            if shown := self._shown(os.path.join(path_of(target), os.fsdecode(to))):
                self.reach(f"rename {shown}")
            rename(source, name, target, to, replace)

        def append_named(journal: Any, batch: Any) -> None:
            self._here.what = "settled " if batch.settled else "intended "
            append_batch(journal, batch)
            self._here.what = ""

        def say(channel: Channel, message: Any, *arguments: Any, **options: Any) -> None:
            if type(message).__name__ not in ("Progress", "Streaming"):
                self.reach(f"say {type(message).__name__}")
            send(channel, message, *arguments, **options)

        os.open, os.write, os.pwrite, os.splice = open_in, append, append_at, append_from
        publish._rename = rename_in
        Journal.append = append_named  # type: ignore[method-assign]
        Channel.send = say  # type: ignore[method-assign]

    def _add(self, file: int, torn: Callable[[], object] | None = None) -> None:
        """Something is about to be added to an open file."""
        if getattr(self._here, "looking", False) or not (shown := self._shown(path_of(file))):
            return
        if not (shown.endswith(".lock") or shown.startswith("RUN/processes/")):  # a beat is for those who look at it meanwhile
            self.reach(f"add {getattr(self._here, 'what', '')}{shown}", torn)


def path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


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
    name = re.sub(r"TASK\.\d+", "TASK.N", name.replace(f"-conflict-{task}", "-conflict-TASK"))
    name = re.sub(r"sha256(?:[:-]|%3A)[0-9a-f]{64}", "DIGEST", name)
    name = re.sub(r"mount-[0-9a-f]{8}-\d+-\d+-[0-9a-f]+", "LEASE", name)
    name = re.sub(r"/[0-9a-f]{2}/[0-9a-f]{62}", "/OBJECT", name)
    name = re.sub(r"cache/\.[0-9a-f]{64}", "cache/.OBJECT", name)
    name = re.sub(r"/[0-9a-f]{2}(?=$| )", "/PREFIX", name)
    name = re.sub(r"DIGEST\.[0-9a-f]{16}\.(trace|pack)", r"DIGEST.WORKLOAD.\1", name)
    name = re.sub(r"DIGEST\.[0-9a-f]{16}\.tmp", "DIGEST.tmp", name)
    name = re.sub(r"(\.aerie-sync/TASK/[a-z]+)-[0-9a-f-]+", r"\1", name)
    name = re.sub(r"(holds|daemons)/(\.?)[0-9a-f]{16}", r"\1/\2DAEMON", name)
    name = re.sub(r"store-[0-9a-f]{64}", "STORE", name)
    name = re.sub(r"(cache/\S*\.\S+)\.\d+\.\d{6,}$", r"\1", name)
    name = re.sub(r"ledgers/\d+", "ledgers/N", name)
    name = re.sub(r"processes/\d+-\d+", "processes/N", name)
    name = re.sub(r"RUN/\.\d+", "RUN/.PID", name)
    return re.sub(r"127\.0\.0\.1:\d+/\S+", "IMAGE", name)


def spawn_root(spawn: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """`parts.spawn`, but for a root supervisor: this keeper has loaded its program, once, and it is forked from there.

    Loading takes longer than all the rest of a recovery.
    """
    if argv[-2:] != ["process", "root"]:
        return spawn(argv)
    import actors.node  # noqa: F401

    gc.collect()
    gc.freeze()  # what is the keeper's is never collected in its child: it would close descriptors that have another meaning there
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            leave_keeper()
            code = main(["process", "root"])
        except Exception:  # noqa: BLE001 (whatever it is, it is the end of this process)
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def leave_keeper() -> None:
    """Be as a program that was just started by it."""
    from supervisor.boot import leave_fork_server, name_process

    leave_fork_server([])
    os.dup2(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), 0)
    name_process("python")


def run_armed(run_entry: Callable[..., None], request: Any, end: int, descriptors: list[int]) -> None:
    """`forkserver.run_entry`, but for the processes of ISOLATED."""
    if request.name in ISOLATED:
        operations = Operations(Path(os.environ["FAILPOINTS"]), request.name)
        operations.wrap_isolated()
        sys.addaudithook(operations.hear)
    run_entry(request, end, descriptors)


def main(arguments: list[str]) -> int:
    sys.path.insert(0, str(ROOT))
    import actors.daemon
    import run
    import supervisor.parts

    actors.daemon.PROGRAM = Path(__file__).resolve()  # what the keeper, and the tree, start is this file again
    supervisor.parts.RESET_S = 0.0  # a part that is killed a hundred times on purpose is started at once each time
    supervisor.parts.spawn = functools.partial(spawn_root, supervisor.parts.spawn)
    if arguments == ["process", "root"]:
        import actors.cache.actor
        import actors.mount.syncer
        import actors.output.actor

        actors.mount.syncer.RETRY_S = 0.3  # what could not be synced is tried again while the test waits
        actors.cache.actor.UNMOUNT_S = 0.02
        actors.mount.syncer.RESTART_S = actors.output.actor.RESTART_S = 0.0
        operations = Operations(Path(os.environ["FAILPOINTS"]))
        operations.wrap()
        sys.addaudithook(operations.hear)
    if arguments == ["process", "fork-server"]:
        import supervisor.forkserver

        supervisor.forkserver.run_entry = functools.partial(run_armed, supervisor.forkserver.run_entry)
    run.hold_standard_streams()
    return run.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
