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

PR_SET_NAME = 15  # prctl(2)
ENDING = (signal.SIGTERM, signal.SIGINT)  # blocked while a process is forked, until it has handlers of its own


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


def run_entry(name: str, entry: str, end: int, descriptors: list[int], arguments: bytes) -> None:
    """Become the process `name`, whose life is one call of `entry` ("package.module:function")."""
    name_process(name)
    # The fork server's handlers are not ours, and a child of it is ended by SIGTERM and SIGINT like any process.
    signal.set_wakeup_fd(-1)
    for number in (*ENDING, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    os.setsid()  # a terminal's ^C is for the keeper, which drains; it must not reach a process that serves a mount
    only_these([end, *descriptors])
    faulthandler.enable()  # SIGABRT too: how a watchdog asks a hung process where it is before killing it
    module, _, function = entry.partition(":")
    serve = getattr(importlib.import_module(module), function)
    serve(socket.socket(fileno=end), descriptors, arguments)
