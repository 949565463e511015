"""The first moments of an isolated process: what a fork of the fork server does before it becomes its entry.

An entry is a function ``serve(end, descriptors, arguments)``: `end` its channel's socket, `descriptors` what came with the
request, `arguments` the msgpack of one message.  It returns (exit code 0) or raises (exit code 1, traceback on stderr).
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import signal
import socket
from pathlib import Path

from supervisor.forkprotocol import Fork
from supervisor.lockfile import LockFile, take_place

PR_SET_NAME = 15  # prctl(2)
ENDING = (signal.SIGTERM, signal.SIGINT)  # blocked while a process is forked, until it has handlers of its own

_place: LockFile | None = None  # one to a process, like the process's name


def name_process(name: str) -> None:
    """Show `name` (its first 15 bytes) in /proc/PID/comm, and so in ps and top."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, os.fsencode(name)[:15], 0, 0, 0)


def only_these(keep: list[int]) -> None:
    """Close every descriptor but 0, 1, 2 and `keep`: a copy left open in a child would keep a pipe or a mount alive."""
    low = 3
    for descriptor in sorted(set(keep)):
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


def beat() -> None:
    """Show that this process's event loop turns, if it was started with a lock: who looks after it reads that there."""
    if _place is not None:
        _place.beat()


def leave_fork_server(keep: list[int]) -> None:
    """Be a process of one's own, just forked: with these descriptors, and nothing else of the fork server's."""
    # The fork server's handlers are not ours, and a child of it is ended by SIGTERM and SIGINT like any process.
    signal.set_wakeup_fd(-1)
    for number in (*ENDING, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    os.setsid()  # a terminal's ^C is for the keeper, which drains; it must not reach a process that serves a mount
    only_these(keep)
    faulthandler.enable()  # SIGABRT too: how a watchdog asks a hung process where it is before killing it


def run_entry(request: Fork, end: int, descriptors: list[int]) -> None:
    """Become the process asked for, whose life is one call of its entry ("package.module:function")."""
    global _place
    if request.lock:
        # Of two processes that two starters started in place of one (the keeper and the root supervisor, say), or that nobody knows
        # of any more, one is ended here, and is dead before the other one touches what they would share.  Before all else: one that
        # is stopped without its lock would be found by nobody.
        _place = take_place(Path(request.lock))
    name_process(request.name)
    module, _, function = request.entry.partition(":")
    serve = getattr(importlib.import_module(module), function)
    serve(socket.socket(fileno=end), descriptors, request.arguments)
