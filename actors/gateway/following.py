"""Showing a task's output here while it is printed there: its exact bytes, read from the journal, not from the daemon."""

from __future__ import annotations

import codecs
import os
import select
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from itertools import groupby
from pathlib import Path
from typing import Final

import msgspec
from inotify_simple import INotify

from actors.gateway.arrival import watch_nearest
from actors.gateway.client import Client, RequestFailed
from actors.gateway.messages import Ended, Failed, Progress, TaskResult
from actors.output.follower import Follower
from actors.output.journal import Chunk

DESCRIPTORS: Final = {"stdout": 1, "stderr": 2}

Show = Callable[[Iterable[Chunk]], None]


def show_bytes(chunks: Iterable[Chunk]) -> None:
    """Write what the task printed to the streams it printed it to.  Gaps are no bytes of the task's: `result` counts them."""
    for stream, parts in groupby(chunks, key=lambda chunk: chunk.stream):
        if stream in DESCRIPTORS:
            write(DESCRIPTORS[stream], b"".join(part.data for part in parts))


def json_shower() -> Show:
    """A function that writes chunks as JSON lines `{"stream", "text"}`, gaps too; what is not UTF-8 is shown as U+FFFD."""
    # One to a stream, since a chunk may end in the middle of a character.
    decoders = {stream: codecs.getincrementaldecoder("utf-8")("replace") for stream in (*DESCRIPTORS, "gap")}

    def show(chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            row = {"stream": chunk.stream, "text": decoders[chunk.stream].decode(chunk.data)}
            write(1, msgspec.json.encode(row) + b"\n")

    return show


def write(descriptor: int, data: bytes) -> None:
    """All of `data`, past every buffer of Python's, also to what another program has made non-blocking.  Raises OSError."""
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:
            waiting = select.poll()
            waiting.register(descriptor, select.POLLOUT)
            waiting.poll()


def show_present(directory: Path, ended: bool, show: Show) -> None:
    """Show what there is of a task's output; nothing when it has not had its turn, or never got so far."""
    try:
        opened = Follower(directory)
    except FileNotFoundError:
        return
    with closing(opened) as follower:
        _drain(follower, show)
        if ended:
            show(follower.finish())


def follow(client: Client, request: int, directory: Path, show: Show, progress: Callable[[str], None]) -> TaskResult:
    """Show a task's output until `request`, a Submit or Wait without a time-out that has been sent, is answered → the result.

    Raises RequestFailed, and what `Client.receive` raises.
    """
    watched = _watch(directory)
    try:
        while True:
            result = _result(client, request, progress)
            if isinstance(watched, Follower):
                _drain(watched, show)
                if result:
                    show(watched.finish())
            elif result:
                show_present(directory, True, show)
            if result:
                return result
            waiting = select.poll()
            waiting.register(client, select.POLLIN)
            waiting.register(watched, select.POLLIN)
            waiting.poll()
            if not isinstance(watched, Follower):
                watched.close()
                watched = _watch(directory)
    finally:
        watched.close()


def _watch(directory: Path) -> Follower | INotify:
    """A follower of the directory, or, as long as it is missing, what says that it may be there."""
    while True:
        signs = watch_nearest(directory)
        if not directory.is_dir():
            return signs
        signs.close()
        with suppress(FileNotFoundError):  # the task has just been forgotten
            return Follower(directory)


def _result(client: Client, request: int, progress: Callable[[str], None]) -> TaskResult | None:
    """Take the answers that are there → the result, once it is among them."""
    while answer := client.receive(0):
        match answer:
            case Progress(_, text):
                progress(text)
            case Failed(_, kind, error):
                raise RequestFailed(kind, error)
            case Ended(number, result) if number == request:
                return result
    return None


def _drain(follower: Follower, show: Show) -> None:
    while chunks := follower.read():
        show(chunks)
