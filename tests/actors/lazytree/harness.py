"""Real servers for the tests: forked processes in place of the fork server, real mounts, and reads that cannot hang a test."""

from __future__ import annotations

import gc
import hashlib
import os
import pickle
import select
import signal
import socket
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pyfuse3  # noqa: F401 (what the fork server has preloaded)
import trio  # noqa: F401

from actors.lazytree import erofs, mounts
from actors.lazytree.objects import Objects
from actors.lazytree.table import Row, write_table
from actors.lazytree.wire import Progress, ReadFailed, Ready, ServeTree
from actors.mount.source import StoredFile
from actors.mount.wire import ReadWhole
from supervisor.channel import Channel
from supervisor.frames import Codec, Message
from supervisor.isolation import Isolation
from supervisor.sockets import connect_to

T = TypeVar("T")
M = TypeVar("M", bound=Message)
Entry = Callable[[socket.socket, list[int], bytes], None]

SERVER_CODEC = Codec(Ready, Progress, ReadFailed, ReadWhole)


def fork(run: Callable[[], None]) -> int:
    """A child that does nothing but `run`: exit code 0, or 1 with a traceback on stderr."""
    gc.freeze()  # as the fork server does: else the child's first collection makes a copy of all that pytest has
    pid = os.fork()
    if pid:
        gc.unfreeze()
        return pid
    code = 1
    try:
        run()
        code = 0
    except BaseException:  # noqa: BLE001 (whatever it was: the copy of pytest must not go on)
        traceback.print_exc()
    finally:
        os._exit(code)


def in_child(run: Callable[[], T], timeout_s: float = 60.0) -> T:
    """What `run` returns or raises, in a child, which may get stuck on a mount as this process may not."""
    reading, writing = os.pipe()

    def child() -> None:
        os.close(reading)
        try:
            outcome: tuple[bool, Any] = (True, run())
        except Exception as error:  # noqa: BLE001 (it is raised again in the parent)
            outcome = (False, error)
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(outcome, pipe)

    pid = fork(child)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        if not select.select([pipe], [], [], timeout_s)[0]:
            os.kill(pid, signal.SIGKILL)
            raise TimeoutError(f"nothing within {timeout_s} s")
        good, value = pickle.load(pipe)
    os.waitpid(pid, 0)
    if not good:
        raise value
    result: T = value
    return result


def wait_in_time(pid: int, timeout_s: float = 60.0) -> int:
    """The exit code of a child that should end by itself; it is killed when it does not."""
    descriptor = os.pidfd_open(pid)
    try:
        if not select.select([descriptor], [], [], timeout_s)[0]:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextmanager
def fork_server(home: Path, *preload: str) -> Iterator[Isolation]:
    """A real one, for tests that count memory.

    What a fork of pytest shares with it becomes the fork's own, byte by byte, as pytest goes on and writes there.
    """
    home.mkdir()
    place = f"Path({str(home / 'socket')!r}), Path({str(home / 'lock')!r})"
    program = f"from pathlib import Path; from supervisor.forkserver import main; main({place}, {preload!r})"
    with subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[3]) as process:
        try:
            if (connection := connect_to(home / "socket", socket.SOCK_SEQPACKET, 60.0)) is not None:
                connection.close()  # it is there, and whoever asks it for something has all of its patience for that
            yield Isolation(str(home / "socket"))
        finally:
            process.kill()


def private_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


class Server:
    """A forked server and the parent's end of its channel."""

    def __init__(self, entry: Entry, descriptor: int, order: ServeTree) -> None:
        self.channel, end = Channel.pair(SERVER_CODEC)
        arguments = Codec(ServeTree).encode(order)

        def run() -> None:
            self.channel.close()
            entry(end, [descriptor], arguments)

        self.pid = fork(run)
        self.code: int | None = None  # once it has ended, -n after signal n
        end.close()

    def receive(self, kind: type[M], timeout_s: float = 60.0) -> M:
        """The next message of that kind; heartbeats and others before it are passed over."""
        deadline = time.monotonic() + timeout_s
        while True:
            message, _ = self.channel.receive(max(0.01, deadline - time.monotonic()))
            if isinstance(message, kind):
                return message

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """The exit code, when it has ended."""
        self.channel.close()
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code


class Isolated(Server):
    """One that a fork server has forked, and reaps: its exit code is nobody's to know here."""

    def __init__(self, isolation: Isolation, entry: Entry, descriptor: int, order: ServeTree) -> None:
        name = f"{entry.__module__}:{entry.__qualname__}"
        self._process = isolation.start("server", name, order, SERVER_CODEC, [descriptor])
        self.channel, self.pid, self.code = self._process.channel, self._process.pid, None

    def kill(self) -> None:
        self._process.signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        assert select.select([self._process.pidfd], [], [], 60.0)[0]
        self._process.close()
        self.code = 0
        return self.code


class Tree:
    """META :: OBJECTS :: LAZY of a store with given files, in `home`; its servers come and go."""

    def __init__(self, home: Path, files: dict[str, bytes], read_timeout_s: float = 60.0) -> None:
        self.home = home
        for name in ("store", "lazy", "meta", "merged"):
            (home / name).mkdir()
        self.lazy, self.meta, self.merged = (str(home / name) for name in ("lazy", "meta", "merged"))
        self.objects = Objects(str(home / "objects"))
        self.keys: dict[str, str] = {}
        rows = []
        root = erofs.Node(stat.S_IFDIR | 0o750, 1000, 1000, 10**18, children={})
        for name, content in files.items():
            path = home / "store" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(0o644)
            status = path.stat()
            key = hashlib.sha256(name.encode()).hexdigest()
            version = StoredFile(name.encode(), status.st_ino, status.st_size, status.st_mtime_ns)
            rows.append(Row(key, len(content), msgspec.msgpack.encode(version)))
            self.keys[name] = key
            directory = root
            for part in Path(name).parts[:-1]:
                assert directory.children is not None
                directory = directory.children.setdefault(
                    part.encode(), erofs.Node(stat.S_IFDIR | 0o755, 1000, 1000, children={})
                )
            assert directory.children is not None
            mode = stat.S_IFREG | (0o755 if content.startswith(b"\x7fELF") else 0o644)
            directory.children[path.name.encode()] = erofs.Node(
                mode, 1000, 1000, status.st_mtime_ns, len(content), key=key if content else None
            )
        with open(home / "table", "wb") as file:
            write_table(file, rows)
        with open(home / "meta.erofs", "wb") as file:
            erofs.write(root, file)
        self.fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self.connection = mounts.mount_fuse(self.lazy, self.fuse)
        self.order = ServeTree(
            str(home / "table"), str(home / "store"), self.connection.init_request, read_timeout_s=read_timeout_s
        )
        self.servers: list[Server] = []

    def list(self, paths: dict[str, str]) -> None:
        """Serve the objects of these names, whose keys are known, with what lies at these paths of the store now."""
        rows = []
        for name, path in paths.items():
            status = in_child(lambda path=path: os.stat(self.home / "store" / path))  # type: ignore[misc]
            version = StoredFile(path.encode(), status.st_ino, status.st_size, status.st_mtime_ns)
            rows.append(Row(self.keys[name], status.st_size, msgspec.msgpack.encode(version)))
        with open(self.home / "table", "wb") as file:
            write_table(file, rows)

    def serve(self, entry: Entry, isolation: Isolation | None = None) -> Server:
        """A server, the first or a replacement, that is Ready: a fork of this process, or of that fork server."""
        replacement = bool(self.servers)
        order = msgspec.structs.replace(self.order, replacement=replacement)
        server = Isolated(isolation, entry, self.fuse, order) if isolation else Server(entry, self.fuse, order)
        self.servers.append(server)
        server.receive(Ready)
        if not replacement:
            mounts.tune_fuse(self.connection.minor)
        return server

    def mount(self) -> None:
        mounts.mount_erofs(str(self.home / "meta.erofs"), self.meta)
        upper, work = str(self.home / "upper"), str(self.home / "work")
        mounts.make_upper(upper, work, self.meta)
        mounts.mount_overlay(self.merged, [self.meta], [str(self.home / "objects"), self.lazy], upper, work)

    def object_path(self, name: str) -> str:
        return f"{self.lazy}/{Objects.path(self.keys[name])}"

    def close(self) -> None:
        """Unmount everything and end every server; afterwards nothing is mounted below `home`."""
        mounts.abort_fuse(self.lazy, self.connection.minor)
        for mount in mounts.mounts_below(str(self.home)):
            mounts.unmount(mount.target, lazily=True)
        os.close(self.fuse)
        self.objects.close()
        for server in self.servers:
            if server.code is None:
                server.kill()
        assert mounts.mounts_below(str(self.home)) == []
