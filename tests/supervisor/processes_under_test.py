"""Entries of isolated processes, for the tests of the fork server and the keeper."""

from __future__ import annotations

import os
import signal
import socket
import sys

from supervisor.channel import Channel, ChannelClosed
from supervisor.frames import Codec, Message


class Say(Message, frozen=True):
    text: str


class Crash(Message, frozen=True):
    pass


class Report(Message, frozen=True):
    text: str
    pid: int
    descriptors: list[int]
    pykka: bool


TO_CHILD = Codec(Say, Crash)
FROM_CHILD = Codec(Report)


def echo(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Answers each Say with a Report, until its channel is closed."""
    channel = Channel(end, TO_CHILD)
    greeting = TO_CHILD.decode(arguments)
    channel.send(report(greeting.text, descriptors))
    while True:
        try:
            message, _ = channel.receive(None)
        except ChannelClosed:
            return
        match message:
            case Say(text):
                channel.send(report(text, descriptors))
            case Crash():
                raise RuntimeError("as it was told")


def wait(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Goes on for ever, like a process that serves a mount."""
    signal.pause()


def report(text: str, descriptors: list[int]) -> Report:
    opened = [int(name) for name in os.listdir("/proc/self/fd")]
    return Report(
        text, os.getpid(), sorted(number for number in opened if number > 2)[: len(descriptors) + 3], "pykka" in sys.modules
    )
