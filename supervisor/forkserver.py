"""The fork server: one single-threaded process with the heavy imports preloaded, from which every isolated process is forked.

A fork costs about 10 ms and shares the imports' memory; a fresh interpreter would cost ten times both.  The server knows
its children only to reap them: its death hurts none of them, and whoever started it starts another, which takes its place at the
same path; who asks in between waits for it there (`isolation`).
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import multiprocess  # type: ignore[import-untyped]

from supervisor.boot import ENDING, name_process, run_entry
from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.forkprotocol import REQUESTS, Fork, Forked, ForkFailed
from supervisor.frames import FrameError, Message
from supervisor.lockfile import LockFile
from supervisor.pulse import BEAT_S
from supervisor.sockets import listen_at


class ForkServer:
    """Serves fork requests on `listener` until SIGTERM.  `packages`: an entry must be in one of them.

    `beat` is called every `pulse.BEAT_S`.
    """

    def __init__(self, listener: socket.socket, packages: Sequence[str], beat: Callable[[], None]) -> None:
        self._beat = beat
        self._listener = listener
        self._packages = tuple(packages)
        self._context = multiprocess.get_context("fork")
        self._selector = selectors.DefaultSelector()
        self._stopping = False
        self._sockets: list[socket.socket] = [listener]

    def run(self) -> None:
        wake_end, wake = socket.socketpair()
        for end in (wake_end, wake, self._listener):
            end.setblocking(False)
        self._sockets += [wake_end, wake]
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._stop)
        self._selector.register(wake_end, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        beat_s = 0.0
        while not self._stopping:
            if time.monotonic() >= beat_s:
                beat_s = time.monotonic() + BEAT_S
                self._beat()
            for key, _ in self._selector.select(max(0.0, beat_s - time.monotonic())):
                if key.fileobj is wake_end:
                    wake_end.recv(4096)
                    multiprocess.active_children()  # reaps what ended; this process is the only one that waits for them
                elif key.fileobj is self._listener:
                    self._accept()
                else:
                    self._answer(key.data)

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return  # the client gave up before it was its turn
        self._sockets.append(connection)
        self._selector.register(connection, selectors.EVENT_READ, Channel(connection, REQUESTS))

    def _answer(self, channel: Channel) -> None:
        try:
            request, descriptors = channel.receive(0)
        except ChannelTimeout:
            return
        except ChannelClosed:
            self._selector.unregister(channel.socket)
            self._sockets.remove(channel.socket)
            channel.close()
            return
        except FrameError as error:
            reply(channel, ForkFailed(str(error)))
            return
        pidfd = -1
        try:
            pid = self._fork(request, descriptors)
            # Not a race: nobody but this thread reaps, so the pid cannot have been given to another process yet.
            pidfd = os.pidfd_open(pid)
            reply(channel, Forked(pid), [pidfd])
        except (OSError, ValueError) as error:
            reply(channel, ForkFailed(f"{request.name}: {error}"))
        finally:
            for descriptor in (*descriptors, pidfd):
                if descriptor >= 0:
                    os.close(descriptor)

    def _fork(self, request: Fork, descriptors: list[int]) -> int:
        module, _, function = request.entry.partition(":")
        if module.partition(".")[0] not in self._packages or not function or not descriptors:
            raise ValueError(f"{request.entry} is no entry, or it came without a channel")
        process = self._context.Process(target=self._become, args=(request, descriptors), daemon=False)
        # A signal that comes before the child has given up this process's handlers waits until it has, and is not lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        return int(process.pid)

    def _become(self, request: Fork, descriptors: list[int]) -> None:
        # In the child.  The server's socket objects must forget their descriptors before these are closed: collected
        # later, they would close whatever then has the same number.
        for end in self._sockets:
            end.detach()
        self._selector.close()
        run_entry(request, descriptors[0], descriptors[1:])


def reply(channel: Channel, message: Message, descriptors: Sequence[int] = ()) -> None:
    try:
        channel.send(message, descriptors, 0)
    except (ChannelClosed, ChannelTimeout):
        pass  # who asked is gone or does not listen; a child whose channel nobody holds ends by itself


def main(path: Path, lock: Path, preload: Sequence[str]) -> NoReturn:
    """Serve on a socket at `path`; `preload` are the modules that hold the entries."""
    name_process("fork server")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # before anybody can find it: a terminal's ^C is for the keeper
    faulthandler.enable()  # SIGABRT, which the keeper sends to a fork server that hangs, tells where
    place = LockFile(lock)
    if not place.acquire():
        os._exit(0)  # another one lives, and the keeper finds it by this lock
    for module in preload:
        importlib.import_module(module)
    # Collected now and frozen, so that no collection in a child touches, and so copies, the pages shared with us.
    gc.collect()
    gc.freeze()
    packages = sorted({module.split(".")[0] for module in preload})
    ForkServer(listen_at(path, socket.SOCK_SEQPACKET), packages, place.beat).run()
    os._exit(0)  # not sys.exit: multiprocess would wait for the children, which are to outlive this process
