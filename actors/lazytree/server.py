"""LAZY: a FUSE server (pyfuse3) that answers for the objects of one tree, read-only, as /ab/<62 hex>.

It may be killed at any instruction.  Its parent holds /dev/fuse and the kernel's INIT request, and starts another on the same
connection; readers wait meanwhile.  That works because

- node ids are made of the object's index in the tree's table, so a new server knows every id that the kernel remembers; a file handle is
  its node id;
- content is immutable, so a request that the old server has answered in part, or answered and not lived to see it, can be served again;
- libfuse does not know: it is given one end of a socket pair, is fed the recorded INIT through the other, and finds the real /dev/fuse
  in the first one's place (dup2) when it writes its reply.

The server has no path, no capability and no descriptor on its own mount once it serves, so neither a hostile store nor a close of
its own can hang it.  What it does not know, or could not verify, is EIO within a bounded time, and its reason goes to the parent.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import resource
import socket
import stat
import struct
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import pyfuse3
import trio

from actors.lazytree.table import ObjectTable, Row
from actors.lazytree.wire import Progress, ReadFailed, Ready, ServeTree
from supervisor.boot import beat
from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.frames import Message

P = ParamSpec("P")
R = TypeVar("R")

HEARTBEAT_S = 1.0  # on the channel, for the parent
BEAT_S = 0.25  # in the lock, for the keeper
TASKS_MAX = 1024  # requests in the server at once; a stuck one must not keep a ready one in the kernel's queue
CACHED_S = 1 << 30  # names and attributes never change
AGAIN_S = 0.5
"""The kernel asks a second time for what its readahead did not get: a reader would wait twice as long for its EIO."""
FAILURES_MAX = 1024  # distinct ones that are told to the parent, within `tell_again_s`
REASON_CHARACTERS_MAX = 8192

_FIRST_OBJECT = 2  # node id of the object at index 0; 1 is the root
_DIRECTORIES = 1 << 40  # node id of the directory "00"; ids of objects are below
_NOTIFY_RESEND = struct.Struct("<IiQ").pack(16, 7, 0)
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38

_libc = ctypes.CDLL(None, use_errno=True)


class SourceError(Exception):
    """Content cannot be had, or is not what the tree lists; `reason` is for the task's record."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Source(Protocol):
    """Where the content of a tree's objects comes from."""

    def name(self, row: Row) -> str:
        """What the object is, for a reason."""
        ...

    async def read(self, index: int, row: Row, offset: int, size: int) -> bytes | bytearray:
        """Exactly `size` bytes (within the object) at `offset` of the object in `row`, checked; or SourceError.

        May be cancelled (the reader's time is up).  Blocking work belongs in a thread that can be abandoned.  A thousand may be called
        at once: few of them may hold content, and none while it waits for what may be slow.
        """
        ...


class Observer(Protocol):
    """Who is told what is asked of a tree, before it is answered."""

    def opened(self, index: int) -> None:
        """The object at that index of the table was opened."""
        ...

    def read(self, index: int, offset: int, size: int) -> None:
        """`size` bytes at `offset` of it were asked for, at least one of which there is."""
        ...


class _Flight:
    """A read that is under way, and everybody who wants the same bytes."""

    def __init__(self) -> None:
        self.landed = trio.Event()
        self.data: bytes | bytearray | None = None  # None: it failed


class Reads:
    """Reads from a source: identical ones are one, each ends within `timeout_s`, and each distinct failure is told.

    Once; or again when it comes again after `tell_again_s`, for a tree whose readers come and go.
    """

    def __init__(
        self,
        table: ObjectTable,
        source: Source,
        timeout_s: float,
        tell: Callable[[ReadFailed], None],
        tell_again_s: float = math.inf,
    ) -> None:
        self._table = table
        self._source = source
        self._timeout_s = timeout_s
        self._tell = tell
        self._flights: dict[tuple[int, int, int], _Flight] = {}
        self._tell_again_s = tell_again_s
        self._told: dict[ReadFailed, float] = {}  # when, the earliest first
        self._late: dict[
            int, tuple[float, str]
        ] = {}  # what failed after a long time, until when it is not tried again, and why

    async def read(self, index: int, offset: int, size: int) -> bytes | bytearray | None:
        """The bytes of the object there, fewer only at its end; None when they cannot be had."""
        row = self._table.row(index)
        size = min(size, row.size_bytes - offset)
        if size <= 0:
            return b""
        key = (index, offset, size)
        flight = self._flights.get(key)
        if flight is not None:
            await flight.landed.wait()
            return flight.data
        flight = self._flights[key] = _Flight()
        try:
            flight.data = await self._fetch(index, row, offset, size)
        finally:
            del self._flights[key]
            flight.landed.set()
        return flight.data

    async def _fetch(self, index: int, row: Row, offset: int, size: int) -> bytes | bytearray | None:
        begun = trio.current_time()
        until, reason = self._late.pop(index, (0.0, ""))
        if begun < until:
            self._late[index] = until, reason
            self._fail(row, reason)
            return None
        reason = f"{self._source.name(row)}: no content within {self._timeout_s:g} s"
        with trio.move_on_after(self._timeout_s):
            try:
                data = await self._source.read(index, row, offset, size)
            except SourceError as error:
                reason = error.reason
            except Exception as error:  # noqa: BLE001 (a fault of one read must not be the end of the mount)
                traceback.print_exc()
                reason = f"{type(error).__name__}: {error}"
            else:
                if len(data) == size:
                    return data
                reason = "the source gave another number of bytes than it was asked for"
        now = trio.current_time()
        if now - begun > AGAIN_S:
            if len(self._late) >= FAILURES_MAX:
                self._late.clear()
            self._late[index] = now + AGAIN_S, reason
        self._fail(row, reason)
        return None

    def _fail(self, row: Row, reason: str) -> None:
        # Whatever an exception's text holds, it must fit a message.
        failure = ReadFailed(row.key, reason.encode("utf-8", "backslashreplace").decode()[:REASON_CHARACTERS_MAX])
        now = trio.current_time()
        while self._told and now - next(iter(self._told.values())) >= self._tell_again_s:
            del self._told[next(iter(self._told))]
        if failure not in self._told and len(self._told) < FAILURES_MAX:
            self._told[failure] = now
            self._tell(failure)


def _answered(
    handler: Callable[Concatenate[LazyTree, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[LazyTree, P], Coroutine[Any, Any, R]]:
    """Count a request, and let no exception but FUSEError out: pyfuse3 would end the mount."""

    @wraps(handler)
    async def answer(self: LazyTree, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self.waiting += 1
        try:
            return await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception:  # noqa: BLE001 (see above)
            traceback.print_exc()
            raise pyfuse3.FUSEError(errno.EIO) from None
        finally:
            self.waiting -= 1
            self.answered += 1

    return answer


class LazyTree(pyfuse3.Operations):
    """The requests that overlayfs makes.

    Not here, and so answered with ENOSYS, once for the life of the connection: flush (close() of a file on the mount never waits for
    a server), getxattr and listxattr (a third of all requests otherwise).
    """

    supports_dot_lookup = False

    def __init__(self, table: ObjectTable, reads: Reads, connect: Callable[[], None], observer: Observer | None) -> None:
        super().__init__()
        self._table = table
        self._reads = reads
        self._connect = connect
        self._observer = observer
        self.answered = 0
        self.waiting = 0

    def init(self) -> None:
        self._connect()

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.entry_timeout = entry.attr_timeout = CACHED_S
        if inode == pyfuse3.ROOT_INODE or _DIRECTORIES <= inode < _DIRECTORIES + 256:
            entry.st_mode, entry.st_nlink = stat.S_IFDIR | 0o555, 2
        else:
            entry.st_mode, entry.st_nlink = stat.S_IFREG | 0o444, 1
            entry.st_size = self._table.row(self._index(inode)).size_bytes
        return entry

    def _index(self, inode: int) -> int:
        index = inode - _FIRST_OBJECT
        if not 0 <= index < len(self._table):
            raise pyfuse3.FUSEError(errno.ENOENT)
        return index

    @_answered
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    @_answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        text = name.decode("ascii", "replace")
        if parent_inode == pyfuse3.ROOT_INODE:
            number = int(text, 16) if len(text) == 2 and set(text) <= set("0123456789abcdef") else None
            if number is not None:
                return self._attributes(_DIRECTORIES + number)
        else:
            index = self._table.find(f"{parent_inode - _DIRECTORIES:02x}{text}")
            if index is not None:
                return self._attributes(_FIRST_OBJECT + index)
        raise pyfuse3.FUSEError(errno.ENOENT)

    @_answered
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()  # overlayfs asks, and takes the length of names from it
        data.f_bsize = data.f_frsize = 4096
        data.f_namemax = 255
        return data

    @_answered
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        index = self._index(inode)
        if self._observer is not None:
            self._observer.opened(index)
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    @_answered
    async def read(self, fh: int, off: int, size: int) -> bytes | bytearray:  # type: ignore[override]  # it takes any buffer
        index = self._index(fh)
        if self._observer is not None and (within := min(size, self._table.row(index).size_bytes - off)) > 0:
            self._observer.read(index, off, within)
        data = await self._reads.read(index, off, size)
        if data is None:
            raise pyfuse3.FUSEError(errno.EIO)
        return data

    async def release(self, fh: int) -> None:
        pass

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        pass  # nothing is kept for a node id


class Report:
    """What the parent is told: that the server serves, its heartbeat and its failures.  It never waits for the parent to listen."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._unsent: deque[Message] = deque()
        self._closed = False

    def tell(self, message: Message) -> None:
        """Say it now, so that of a failure the parent hears before its reader does; later, if nobody listens just now."""
        self._unsent.append(message)
        self._send()

    async def run(self, tree: LazyTree) -> None:
        while not self._closed:
            self._send(Progress(tree.answered, tree.waiting))
            await trio.sleep(HEARTBEAT_S)

    def _send(self, heartbeat: Message | None = None) -> None:
        try:
            while self._unsent:
                self._channel.send(self._unsent[0], timeout_s=0)
                self._unsent.popleft()
            if heartbeat is not None:
                self._channel.send(heartbeat, timeout_s=0)
        except ChannelTimeout:
            pass  # the rest is kept; a heartbeat would be of no use later
        except ChannelClosed:  # the parent is being replaced; the mount is served on
            self._closed = True
            self._unsent.clear()


def drop_privileges(uid: int, gid: int) -> None:
    """Become `uid`:`gid` for good: no other group, no capability, none to be gained by exec.

    Not dumpable: a task has the same uid and must not trace this process nor read its memory; root still may, pidfd_getfd(2) included.
    """
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)  # from 0 to another: all capabilities go
    for option, value in ((_PR_SET_NO_NEW_PRIVS, 1), (_PR_SET_DUMPABLE, 0)):
        if _libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)):
            raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")


def _bound_memory() -> None:
    """Have the C library give back the memory of every read that is over, whichever thread it was made in, and open enough files."""
    _libc.mallopt(_M_ARENA_MAX, 1)
    _libc.mallopt(_M_MMAP_THRESHOLD, 64 << 10)  # said once, it stays; by itself it would grow with the first read
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4 * TASKS_MAX, hard), hard))


def warm_up() -> None:
    """Turn an event loop for a moment, in a process that may become a server.

    Half of what a server takes to begin is copies of the memory that it touches first; readers of a killed one need not wait for these.
    """

    async def turn() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, 0)
            with trio.move_on_after(0.001):
                await trio.Event().wait()

    trio.run(turn)


def serve_tree(
    channel: Channel,
    fuse_descriptor: int,
    arguments: ServeTree,
    table: ObjectTable,
    source: Source,
    beside: Callable[[Callable[[Message], None]], Awaitable[None]] | None = None,
    tell_again_s: float = math.inf,
    observer: Observer | None = None,
) -> None:
    """Serve until the mount is gone.  It takes a closed channel for a parent that is being replaced, and goes on.

    `beside` runs as long, once the server serves; what it is given tells the parent a message, without waiting.  `tell_again_s`: as for
    `Reads`.
    """
    _bound_memory()
    trio.run(_serve_tree, channel, fuse_descriptor, arguments, table, source, beside, tell_again_s, observer)


async def _serve_tree(
    channel: Channel,
    fuse_descriptor: int,
    arguments: ServeTree,
    table: ObjectTable,
    source: Source,
    beside: Callable[[Callable[[Message], None]], Awaitable[None]] | None,
    tell_again_s: float,
    observer: Observer | None,
) -> None:
    report = Report(channel)
    reads = Reads(table, source, arguments.read_timeout_s, report.tell, tell_again_s)
    connected = trio.Event()
    feeder, session = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    session_descriptor = session.detach()
    os.set_blocking(session_descriptor, False)

    def connect() -> None:
        os.dup2(fuse_descriptor, session_descriptor, inheritable=False)
        os.set_blocking(session_descriptor, False)
        os.close(fuse_descriptor)
        connected.set()

    tree = LazyTree(table, reads, connect, observer)
    pyfuse3.init(tree, f"/dev/fd/{session_descriptor}", set())
    feeder.send(arguments.init_request)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_run_session, nursery.cancel_scope)
        await connected.wait()
        feeder.close()
        if arguments.replacement:
            # What the dead server had read and not answered is queued again.  After the INIT reply, or INIT itself would be; and before
            # anything else is read here (this task was woken before pyfuse3 can ask for more), or that would be served twice.
            os.write(session_descriptor, _NOTIFY_RESEND)
        report.tell(Ready())
        nursery.start_soon(report.run, tree)
        nursery.start_soon(_beat)
        if beside is not None:
            nursery.start_soon(beside, report.tell)


async def _beat() -> None:
    while True:
        beat()
        await trio.sleep(BEAT_S)


async def _run_session(scope: trio.CancelScope) -> None:
    await pyfuse3.main(min_tasks=1, max_tasks=TASKS_MAX)
    scope.cancel()  # the mount is gone
