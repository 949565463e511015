"""The client's end of the local gateway: blocking, in one thread, and indifferent to a restart of the daemon.

A :class:`Client` remembers the requests that have had no last answer.  When the connection ends it waits for the daemon to be back
and sends them again, which is safe for all of them but one (`messages`).  What goes wrong is a :class:`ClientError` with a
text for the user and an exit code.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Protocol

from actors.gateway.messages import (
    ANSWERS,
    EXIT_CODES,
    EXIT_NO_DAEMON,
    EXIT_NOT_PERMITTED,
    FRAME_BYTES_MAX,
    SOCKET_NAME,
    Answer,
    Failed,
    FailureKind,
    MountImage,
    Progress,
    Request,
    is_last,
)
from supervisor.frames import Codec, FrameBuffer, FrameError

ANSWER_TIMEOUT_S: Final = 60.0  # for a request that waits for nothing but a start of the root supervisor, and a disk
PATIENCE_S: Final = 60.0  # for a daemon that was there a moment ago
STARTING_S: Final = 60.0  # for a gateway whose keeper is there; a slow disk may take many for the state store
KEEPER_SOCKET: Final = "keeper.sock"  # in the run directory; see supervisor.keeper
POLL_MAX_MS: Final = (1 << 31) - 1  # poll(2) takes an int: 24 days
NOBODY_THERE: Final = (FileNotFoundError, NotADirectoryError, ConnectionRefusedError)


class SupportsFileno(Protocol):
    def fileno(self) -> int: ...


class ClientError(Exception):
    """What was asked for could not be had; the text is for the user."""

    exit_code = EXIT_CODES["internal"]


class NoDaemon(ClientError):
    """Nobody listens, or does any more."""

    exit_code = EXIT_NO_DAEMON


class NotPermitted(ClientError):
    """The socket is somebody else's."""

    exit_code = EXIT_NOT_PERMITTED


class RequestFailed(ClientError):
    """The daemon said no."""

    def __init__(self, kind: FailureKind, error: str) -> None:
        super().__init__(error)
        self.kind = kind
        self.exit_code = EXIT_CODES[kind]


class Client:
    """A connection to the daemon of `run_dir`: `connection`, or a new one.  Raises NoDaemon when there is none."""

    def __init__(self, run_dir: str | Path, patience_s: float = PATIENCE_S, connection: socket.socket | None = None) -> None:
        self._run_dir = Path(run_dir)
        self._patience_s = patience_s
        self._codec = Codec(*ANSWERS, size_bytes_max=FRAME_BYTES_MAX)
        self._open: dict[int, Request] = {}
        self._unread: list[Answer] = []
        self._last_number = 0
        self._reconnects = 0
        self._incoming = FrameBuffer(self._codec)
        self._socket = connection or connect(self._run_dir)

    def fileno(self) -> int:
        """The present connection's; another one after a restart of the daemon."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def number(self) -> int:
        """A number for the next request."""
        self._last_number += 1
        return self._last_number

    def send(self, request: Request) -> None:
        """Send a request.  Raises FrameError when it is over the bound, NoDaemon."""
        frame = self._codec.frame(request)
        self._open[request.request] = request
        try:
            self._socket.sendall(frame)
        except ConnectionError:
            pass  # the reader finds out, after what the daemon may have said before it hung up, and the request is sent again

    def receive(self, timeout_s: float | None = None, request: int | None = None) -> Answer | None:
        """The next answer, or the next one to `request`, while others are kept for later; None when there is none in time.

        `timeout_s`: None waits for ever, 0 does not wait; a daemon that has gone is waited for all the same.  Raises NoDaemon when
        it does not come back; ClientError when it breaks the protocol.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            for place, answer in enumerate(self._unread):
                if request is None or answer.request == request:
                    return self._unread.pop(place)
            if not self._read(deadline):
                return None

    def answers(self, request: Request, timeout_s: float | None = ANSWER_TIMEOUT_S) -> Iterator[Answer]:
        """Send a request → its answers, the last one included; each is waited for `timeout_s`, and again when the daemon was away.

        Raises RequestFailed for a `Failed`, and as `receive`.
        """
        self.send(request)
        while True:
            reconnects = self._reconnects
            answer = self.receive(timeout_s, request.request)
            if answer is None and self._reconnects > reconnects:
                continue  # what was sent again has all of its time: a Wait, for instance, which counts from its arrival
            if answer is None:
                raise ClientError(f"the daemon has not answered within {timeout_s:g} s: its log may say why")
            if isinstance(answer, Failed):
                raise RequestFailed(answer.kind, answer.error)
            yield answer
            if is_last(answer, request):
                return

    def ask(
        self, request: Request, timeout_s: float | None = ANSWER_TIMEOUT_S, progress: Callable[[str], None] | None = None
    ) -> Answer:
        """Send a request → its last answer; `progress` is told what it waits for.  Raises as `answers`."""
        for answer in self.answers(request, timeout_s):
            if isinstance(answer, Progress) and progress:
                progress(answer.text)
        return answer

    def _read(self, deadline: float | None) -> bool:
        """Take in what arrives next, however little; False when nothing does in time, or will at all."""
        if not readable(self, deadline):
            return False
        try:
            data = self._socket.recv(1 << 16)
        except ConnectionError:
            data = b""
        if not data and not self._open:
            return False  # nothing is expected; the next request finds out, and connects again
        if not data:
            self._reconnect()
            return True
        self._incoming.feed(data)
        try:
            for answer in self._incoming:
                self._take(answer)
        except FrameError as error:
            raise ClientError(
                f"the daemon's answer is not understood ({error}): is it of another version than this client?"
            ) from None
        return True

    def _take(self, answer: Answer) -> None:
        if answer.request == 0 and isinstance(answer, Failed):
            raise RequestFailed(answer.kind, answer.error)
        if answer.request not in self._open:
            return  # its last answer came twice: before a restart of the daemon, and after it
        if is_last(answer, self._open[answer.request]):
            del self._open[answer.request]
        self._unread.append(answer)

    def _reconnect(self) -> None:
        self._socket.close()
        self._incoming = FrameBuffer(self._codec)
        deadline = time.monotonic() + self._patience_s
        while True:
            self._socket = wait_connect(self._run_dir, deadline)
            try:
                for request in list(self._open.values()):
                    if isinstance(request, MountImage):
                        # Sent twice, it could leave a lease that nobody knows.
                        error = "the daemon went away before it answered: `image ls` shows whether there is a lease now"
                        self._take(Failed(request.request, "internal", error))
                    else:
                        self._socket.sendall(self._codec.frame(request))
                self._reconnects += 1
                return
            except ConnectionError:
                self._socket.close()


def readable(source: SupportsFileno, deadline: float | None) -> bool:
    """Wait until `source` can be read or has ended, at the latest until `deadline` (monotonic; None: for ever) → whether it has."""
    waiting = select.poll()
    waiting.register(source.fileno(), select.POLLIN)
    while True:
        left_ms = None if deadline is None else max(0.0, (deadline - time.monotonic()) * 1000)
        if waiting.poll(None if left_ms is None else min(left_ms, POLL_MAX_MS)):
            return True
        if left_ms is not None and left_ms <= POLL_MAX_MS:
            return False


def connect(run_dir: Path) -> socket.socket:
    """Connect to the gateway of `run_dir`; one that is about to start is waited for.  Raises NoDaemon, NotPermitted."""
    try:
        return _connect(run_dir / SOCKET_NAME, socket.SOCK_STREAM)
    except NOBODY_THERE:
        pass
    try:
        _connect(run_dir / KEEPER_SOCKET, socket.SOCK_SEQPACKET).close()
    except NOBODY_THERE:
        raise NoDaemon(_how_to_start(run_dir)) from None
    return wait_connect(run_dir, time.monotonic() + STARTING_S)


def wait_connect(run_dir: Path, deadline: float) -> socket.socket:
    """Connect to the gateway of `run_dir` as soon as one listens there, at the latest at `deadline` (monotonic).

    Raises NoDaemon, NotPermitted.
    """
    from actors.gateway.arrival import watch_nearest  # not needed, and so not loaded, by nearly every command

    while True:
        try:
            signs = watch_nearest(run_dir)
        except PermissionError:
            raise _not_permitted(run_dir) from None
        # First watch, then try: what appears in between is an event.
        with signs:
            try:
                return _connect(run_dir / SOCKET_NAME, socket.SOCK_STREAM)
            except NOBODY_THERE:
                if not readable(signs, deadline):
                    raise NoDaemon(_how_to_start(run_dir)) from None


def _connect(path: Path, kind: int) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, kind)
    try:
        connection.connect(os.fspath(path))
    except PermissionError:
        connection.close()
        raise _not_permitted(path) from None
    except OSError:
        connection.close()
        raise
    return connection


def _not_permitted(path: Path) -> NotPermitted:
    return NotPermitted(f"permission denied: {path} is for root only; become root, or name your own daemon by AERIE_RUN_DIR")


def _how_to_start(run_dir: Path) -> str:
    return (
        f"no daemon listens on {run_dir / SOCKET_NAME}: start one with `run.py daemon`, or as a service with conf/aerie.service; "
        "AERIE_RUN_DIR (or [run] dir in the settings) says which one is meant"
    )
