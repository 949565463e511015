"""`run.py batch`: tasks as JSON lines in, results as JSON lines out, each as soon as it is there.

One thread, one connection: it waits for whichever comes first, an answer or the next line, and reads no further ahead than it may
submit.  A line that cannot become a task has a result too, which says why, and ends nothing.
"""

from __future__ import annotations

import argparse
import os
import select
from collections import deque
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import msgspec

from actors.gateway.client import Client
from actors.gateway.messages import Ended, Failed, Submit, TaskResult
from actors.gateway.submitting import UsageError, checked, new_task_id, specification
from actors.image.registry.login import parse_login
from actors.settings import Runtime, SandboxSection, Settings
from supervisor.frames import FrameError

LINE_BYTES_MAX: Final = 1 << 20
READ_BYTES: Final = 1 << 16


class Line(msgspec.Struct, forbid_unknown_fields=True):
    """A line of a batch.  Limits are texts such as `512Mi`, `500m`, `30s`, or numbers of bytes, cores, seconds."""

    image: str
    command: list[str]
    env: dict[str, str] = {}
    workspace: str | None = None
    cpu: str | float | None = None
    memory: str | float | None = None
    timeout: str | float | None = None
    runtime: Runtime | None = None
    login: dict[str, str] | None = None  # as for `submit --login`
    id: str | None = None


class Identified(msgspec.Struct):
    """As much of a line that is no `Line` as helps to recognise it."""

    id: str | None = None


class Pending(NamedTuple):
    line: int
    request: Submit


class Lines:
    """Cuts bytes into numbered lines, the last one also without a newline.  Pure."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._skipping = False  # the rest of a line that is over the bound, which has been given out as None
        self._number = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes | None]]:
        """(number from 1, line) of each line that is complete; None for one over the bound.  Blank lines are left out.

        An empty `data` is the end of input.
        """
        self._rest += data or b"\n"
        while (end := self._rest.find(b"\n")) >= 0:
            line = bytes(self._rest[:end])
            del self._rest[: end + 1]
            skipped, self._skipping = self._skipping, False
            if not skipped:
                self._number += 1
                if len(line) > LINE_BYTES_MAX:
                    yield self._number, None
                elif line.strip():
                    yield self._number, line
        if len(self._rest) > LINE_BYTES_MAX:
            if not self._skipping:
                self._number += 1
                yield self._number, None
            self._skipping = True
            self._rest.clear()


def task_of(line: bytes, defaults: SandboxSection) -> tuple[str, Any]:
    """(id, TaskSpec) of a line.  Raises UsageError, whose text says what is wrong with it."""
    try:
        given = msgspec.json.decode(line, type=Line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"not a task: {error}") from None
    try:
        login = None if given.login is None else parse_login(msgspec.json.encode(given.login))
    except ValueError as error:
        raise UsageError(f"login: {error}") from None
    spec = specification(msgspec.structs.asdict(given) | {"login": login}, defaults)
    task = given.id if given.id is not None else new_task_id()
    checked(task, spec)
    return task, spec


def identified(line: bytes | None) -> str | None:
    """The id in a line that is not a task, if there is one."""
    try:
        return msgspec.json.decode(line or b"", type=Identified).id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def refusal(line: int, task: str | None, error: str) -> dict[str, Any]:
    """The result of a line that became no task."""
    empty: dict[str, Any] = dict.fromkeys(TaskResult.__struct_fields__)
    return empty | {
        "task": task,
        "state": "failed",
        "error": f"line {line}: {error}",
        "sync": "none",
        "conflicts": [],
        "gaps": 0,
        "skipped": [],
        "line": line,
    }


class Batch:
    """A batch that reads `source`, a file descriptor, and has at most `parallel` tasks submitted and not ended."""

    def __init__(self, client: Client, source: int, parallel: int, defaults: SandboxSection) -> None:
        self._client = client
        self._source = source
        self._parallel = parallel
        self._defaults = defaults
        self._lines = Lines()
        self._read: deque[tuple[int, bytes | None]] = deque()
        self._at_end = False
        self._refused: deque[Pending] = deque()  # by a full queue: to be sent again when a task has ended
        self._open: dict[int, Pending] = {}

    def run(self) -> Iterator[dict[str, Any]]:
        """The results, as they come.  Raises what `Client.receive` raises."""
        while True:
            while len(self._open) < self._parallel and (self._refused or self._read):
                if self._refused:
                    self._send(self._refused.popleft())
                elif wrong := self._submit(*self._read.popleft()):
                    yield wrong
            if self._at_end and not (self._open or self._read or self._refused):
                return
            hungry = not self._at_end and not self._read and len(self._open) < self._parallel
            if self._wait(hungry):
                data = os.read(self._source, READ_BYTES)
                self._at_end = not data
                self._read.extend(self._lines.feed(data))
            while answer := self._client.receive(0):
                if isinstance(answer, Ended | Failed) and (result := self._answered(answer)):
                    yield result

    def _wait(self, hungry: bool) -> bool:
        """Wait for an answer, or also for input → whether there is some."""
        waiting = select.poll()
        if self._open:
            waiting.register(self._client, select.POLLIN)
        if hungry:
            waiting.register(self._source, select.POLLIN)
        return any(descriptor == self._source for descriptor, _ in waiting.poll())

    def _submit(self, number: int, line: bytes | None) -> dict[str, Any] | None:
        """Submit the task of a line → the result if it cannot be one."""
        if line is None:
            return refusal(number, None, f"longer than {LINE_BYTES_MAX} bytes")
        try:
            task, spec = task_of(line, self._defaults)
            self._send(Pending(number, Submit(self._client.number(), task, spec, True)))
        except (UsageError, FrameError) as error:
            return refusal(number, identified(line), str(error))
        return None

    def _send(self, pending: Pending) -> None:
        self._client.send(pending.request)
        self._open[pending.request.request] = pending

    def _answered(self, answer: Ended | Failed) -> dict[str, Any] | None:
        pending = self._open.pop(answer.request)
        if isinstance(answer, Ended):
            return {**msgspec.to_builtins(answer.result), "line": pending.line}
        if answer.kind == "busy" and self._open:
            self._refused.append(pending)
            self._parallel = len(self._open)  # more than that the daemon does not take
            return None
        return refusal(pending.line, pending.request.task, answer.error)


def batch(arguments: argparse.Namespace, settings: Settings) -> int:
    from actors.gateway.following import write

    try:
        source = 0 if arguments.file == "-" else os.open(arguments.file, os.O_RDONLY | os.O_CLOEXEC)
        os.read(source, 0)  # a directory, or what is open for writing only, says so here
    except OSError as error:
        raise UsageError(f"{arguments.file}: {error.strerror}") from None
    encode = msgspec.json.Encoder().encode
    for result in Batch(Client(settings.run.dir), source, arguments.parallel, settings.sandbox).run():
        write(1, encode(result) + b"\n")
    return 0
