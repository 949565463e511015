"""Entries of isolated processes, for the tests of the fork server, of workers and of the keeper."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

from supervisor.boot import beat as beat_lock
from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.frames import Codec, Message


class Say(Message, frozen=True):
    text: str


class Crash(Message, frozen=True):
    pass


class Report(Message, frozen=True):
    """What a process says of itself; `descriptors`: what each open one is."""

    text: str
    pid: int
    session: int
    name: str
    descriptors: dict[int, str]
    pykka: bool


TO_CHILD = Codec(Say, Crash, size_bytes_max=128 << 10)
FROM_CHILD = Codec(Report, Say)


def echo(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Says what it was started with, and answers each Say with a Report, until its channel is closed."""
    channel = Channel(end, TO_CHILD)
    channel.send(report(TO_CHILD.decode(arguments).text))
    while True:
        try:
            message, _ = channel.receive(None)
        except ChannelClosed:
            return
        match message:
            case Say(text):
                channel.send(report(text))
            case Crash():
                raise RuntimeError("as it was told")


def write(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Writes its arguments' text into the descriptor that came along, and ends."""
    os.write(descriptors[0], TO_CHILD.decode(arguments).text.encode())


def chatter(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Says as many things as its arguments' text says, and ends at once."""
    channel = Channel(end, TO_CHILD)
    for number in range(int(TO_CHILD.decode(arguments).text)):
        channel.send(Say(str(number)))


def beat(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Gives a sign of life twenty times a second, and ends when its channel is closed."""
    channel = Channel(end, TO_CHILD)
    while True:
        try:
            channel.send(Say("beat"), timeout_s=0)
        except ChannelTimeout:
            pass
        except ChannelClosed:
            return
        try:
            channel.receive(0.05)
        except ChannelTimeout:
            pass
        except ChannelClosed:
            return


def post(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Under a standing order: writes its pid and a line end into the descriptor that came along, and beats until it is killed."""
    os.write(descriptors[0], b"%d\n" % os.getpid())
    while True:
        beat_lock()
        time.sleep(0.02)


def done(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Waits for its channel to be closed or for any message, and ends with success."""
    end.recv(100)


def fail(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Writes its pid like `post`, and fails."""
    os.write(descriptors[0], b"%d\n" % os.getpid())
    os._exit(1)


def babble(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Breaks the protocol, and goes on for ever."""
    end.send(b"garbage")
    threading.Event().wait()


def hang_up(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Closes its channel, and goes on for ever."""
    end.close()
    threading.Event().wait()


def outlive(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Goes on whatever happens to its channel, like a process that serves a mount."""
    signal.pause()


def leave_behind(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Forks a child that has all its descriptors, says that child's pid, and is killed."""
    child = os.fork()
    if child == 0:
        signal.pause()
    Channel(end, TO_CHILD).send(Say(str(child)))
    os.kill(os.getpid(), signal.SIGKILL)


def report(text: str) -> Report:
    descriptors = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            descriptors[int(number)] = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            pass  # the one that listed them
    with open("/proc/self/comm") as comm:
        name = comm.read().strip()
    return Report(text, os.getpid(), os.getsid(0), name, descriptors, "pykka" in sys.modules)
