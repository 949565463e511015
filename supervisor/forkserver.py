"""The fork server: one single-threaded process with the heavy imports preloaded, from which every isolated process is forked.

A fork costs a few milliseconds and shares the imports' memory; a fresh interpreter would cost a hundred times as long.  One child, the
*spare*, is forked before anybody asks and becomes what is asked for next, which makes it less: a reader may be waiting for that.

The server knows its children only to reap them: its death hurts none of them, and whoever started it starts another, which takes its
place at the same path; who asks in between waits for it there (`isolation`).
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
from typing import Any, NoReturn

import multiprocess  # type: ignore[import-untyped]

from supervisor.boot import ENDING, leave_fork_server, name_process, run_entry
from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.forkprotocol import REQUESTS, Fork, Forked, ForkFailed
from supervisor.frames import FrameError, Message
from supervisor.lockfile import LockFile
from supervisor.pulse import BEAT_S
from supervisor.sockets import listen_at

SPARE_S = 0.005  # without a request, until another spare is forked: one that comes meanwhile need not wait for that


class ForkServer:
    """Serves fork requests on `listener` until SIGTERM.  `packages`: an entry must be in one of them.

    `beat` is called every `pulse.BEAT_S`; `warm_up` in the spare, while it waits for nobody.
    """

    def __init__(
        self,
        listener: socket.socket,
        packages: Sequence[str],
        beat: Callable[[], None],
        warm_up: Callable[[], None] = lambda: None,
    ) -> None:
        self._beat = beat
        self._warm_up = warm_up
        self._listener = listener
        self._packages = tuple(packages)
        self._context = multiprocess.get_context("fork")
        self._selector = selectors.DefaultSelector()
        self._stopping = False
        self._sockets: list[socket.socket] = [listener]
        self._spare: tuple[Any, Channel] | None = None  # its multiprocess.Process, and where it hears what it is to be

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
            pause_s = max(0.0, beat_s - time.monotonic())
            events = self._selector.select(pause_s if self._spare else min(pause_s, SPARE_S))
            if not events and self._spare is None:
                self._fork_spare()
            for key, _ in events:
                if key.fileobj is wake_end:
                    wake_end.recv(4096)
                    multiprocess.active_children()  # reaps what ended; this process is the only one that waits for them
                    if self._spare is not None and not self._spare[0].is_alive():
                        self._take_spare()[1].close()
                elif key.fileobj is self._listener:
                    self._accept()
                else:
                    self._answer(key.data)
        if self._spare is not None:
            spare, channel = self._take_spare()
            channel.close()
            spare.kill()
            spare.join()

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
        if self._spare is not None:
            spare, channel = self._take_spare()
            try:
                channel.send(request, descriptors, 0)
                return int(spare.pid)
            except (ChannelClosed, ChannelTimeout):
                pass  # somebody has killed it
            finally:
                channel.close()
        return int(self._start(self._become, request, descriptors).pid)

    def _start(self, target: Callable[..., None], *arguments: Any) -> Any:
        process = self._context.Process(target=target, args=arguments, daemon=False)
        # A signal that comes before the child has given up this process's handlers waits until it has, and is not lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        return process

    def _fork_spare(self) -> None:
        channel, end = Channel.pair(REQUESTS)
        self._sockets.append(channel.socket)
        with end:
            self._spare = self._start(self._become_any, end), channel

    def _take_spare(self) -> tuple[Any, Channel]:
        assert self._spare is not None
        taken, self._spare = self._spare, None
        self._sockets.remove(taken[1].socket)
        return taken

    # --- in the child ---

    def _become(self, request: Fork, descriptors: list[int]) -> None:
        self._leave(descriptors)
        run_entry(request, descriptors[0], descriptors[1:])

    def _become_any(self, end: socket.socket) -> None:
        name_process("spare")
        self._leave([end.fileno()])
        self._warm_up()
        channel = Channel(end, REQUESTS)
        try:
            request, descriptors = channel.receive(None)
        except ChannelClosed:
            return  # the fork server is no more
        channel.close()
        run_entry(request, descriptors[0], descriptors[1:])

    def _leave(self, keep: list[int]) -> None:
        # The server's socket objects must forget their descriptors before these are closed: collected later, they would
        # close whatever then has the same number.
        for end in self._sockets:
            end.detach()
        self._selector.close()
        leave_fork_server(keep)


def reply(channel: Channel, message: Message, descriptors: Sequence[int] = ()) -> None:
    try:
        channel.send(message, descriptors, 0)
    except (ChannelClosed, ChannelTimeout):
        pass  # who asked is gone or does not listen; a child whose channel nobody holds ends by itself


def main(path: Path, lock: Path, preload: Sequence[str], warm_up: Callable[[], None] = lambda: None) -> NoReturn:
    """Serve on a socket at `path`; `preload` are the modules that hold the entries.

    `warm_up` is called in each process that is forked before anybody asks for it: it does what most entries begin with, and so takes
    the copies of memory that they would wait for.
    """
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
    ForkServer(listen_at(path, socket.SOCK_SEQPACKET), packages, place.beat, warm_up).run()
    os._exit(0)  # not sys.exit: multiprocess would wait for the children, which are to outlive this process
