"""The programs that the tests of the fork server and of the keeper start: `python programs_under_test.py WHAT DIRECTORY …`.

The root supervisor here does what it is told on `root.sock`, and what files in the directory say, each once: `exit`, to end with
that code as soon as it is started; `stubborn`, not to end at SIGTERM.  Where there is `patient`, nobody takes anybody for hung.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from supervisor.frames import Codec, Message

ENTRIES = "tests.supervisor.processes_under_test"
DRAIN_TIMEOUT_S = 0.5


class Put(Message, frozen=True):
    """Hold files with these contents."""

    texts: dict[str, str]
    data: dict[str, bytes] = {}


class Remove(Message, frozen=True):
    names: list[str]


class Appoint(Message, frozen=True):
    """Start this entry, and leave a standing order for it; it is given what is held as `along`."""

    name: str
    entry: str
    along: list[str] = []
    silence_s: float = 30.0


class Discharge(Message, frozen=True):
    name: str


class Ask(Message, frozen=True):
    pass


class Holds(Message, frozen=True):
    """The answer to each: everything that is held, and by whom; `error`: why what was asked was not done."""

    pid: int
    keeper: int
    stand_in: bool
    texts: dict[str, str]
    data: dict[str, bytes]
    descriptors: int
    error: str = ""
    standing: dict[str, int | None] = {}


TO_ROOT = Codec(Put, Remove, Appoint, Discharge, Ask, size_bytes_max=4 << 20)
FROM_ROOT = Codec(Holds, size_bytes_max=4 << 20)


def main(what: str, directory: Path) -> int:
    from supervisor.keeper import Plan, run_keeper

    if (directory / "patient").exists():
        be_patient()
    plan = Plan(directory, argv("root", directory), argv("fork-server", directory), DRAIN_TIMEOUT_S)
    match what:
        case "keeper":
            return run_keeper(plan)
        case "take-over":
            return run_keeper(plan, take_over=True)
        case "stand-in":
            return run_keeper(plan, stand_in=True)
        case "keeper-of-a-program":
            script = directory / "program"
            script.write_text("#!/bin/sh\nexec " + " ".join(argv("root", directory)) + "\n")
            script.chmod(0o700)
            return run_keeper(Plan(directory, [str(script)], argv("fork-server", directory), DRAIN_TIMEOUT_S))
        case "keeper-of-nothing":  # until somebody makes the program; it has patience with a drain
            return run_keeper(Plan(directory, [str(directory / "program")], argv("fork-server", directory), 60.0))
        case "impatient":
            from supervisor import succession

            succession.TAKE_S = 4.0
            return run_keeper(plan)
        case "fork-server":
            from supervisor.forkserver import main as serve_forks

            serve_forks(directory / "forkserver.sock", directory / "forkserver.lock", [ENTRIES])
        case "root":
            return root(directory)
    raise ValueError(what)


def be_patient() -> None:
    """Of a process that never beats the silence begins with its start: stopped later than that, it would be killed at once.

    And a keeper that is lost is waited for until it has ended.
    """
    from functools import partial

    from supervisor import descriptors, parts
    from supervisor.pulse import Pulse

    parts.Pulse = descriptors.Pulse = partial(Pulse, silence_s=600.0, begin_s=600.0)  # type: ignore[assignment,misc]
    descriptors.END_S = 60.0


def root(directory: Path) -> int:
    from supervisor.channel import Channel, ChannelClosed
    from supervisor.descriptors import Descriptors
    from supervisor.events import EventLog
    from supervisor.lockfile import LockFile
    from supervisor.sockets import listen_at
    from supervisor.watch import Watcher

    def drain(*_: object) -> None:
        if (directory / "stubborn").exists():
            (directory / "stubborn").unlink()
            return
        (directory / "drained").touch()
        os._exit(0)

    signal.signal(signal.SIGTERM, drain)
    if (directory / "exit").exists():
        code = int((directory / "exit").read_text())
        (directory / "exit").unlink()
        return code
    lock = LockFile(directory / "root.lock")
    if not lock.acquire():
        return 1
    watcher = Watcher()
    if (directory / "beats").exists():
        watcher.every_beat(lock.beat)
    watcher.start()
    descriptors = Descriptors(
        directory / "keeper.sock", argv("stand-in", directory), watcher, EventLog(directory / "events").append
    )
    descriptors.connect()
    listener = listen_at(directory / "root.sock", socket.SOCK_SEQPACKET)
    while True:
        connection, _ = listener.accept()
        channel = Channel(connection, TO_ROOT)
        try:
            while True:
                message, _ = channel.receive(None)
                hear(watcher)
                error = do(directory, descriptors, message)
                channel.send(holds(descriptors, error))
        except ChannelClosed:
            channel.close()


def hear(watcher: Any) -> None:
    """Have done with all that the keeper has said until now: its thread comes to this when it has handled that."""
    heard, ready = threading.Event(), os.eventfd(1)
    watcher.readable(ready, heard.set)
    assert heard.wait(60)
    os.close(ready)


def do(directory: Path, descriptors: Any, message: Message) -> str:
    try:
        match message:
            case Appoint():
                appoint(directory, descriptors, message)
            case Discharge(name):
                descriptors.dismiss(name)
            case Put(texts, data):
                files = {}
                for name, text in texts.items():
                    files[name] = os.memfd_create(name)
                    os.write(files[name], text.encode())
                descriptors.keep(files, data)
            case Remove(names):
                descriptors.drop(*names)
    except ValueError as error:
        return str(error)
    return ""


def appoint(directory: Path, descriptors: Any, wanted: Appoint) -> None:
    import msgspec

    from supervisor.isolation import Isolation
    from supervisor.keeping import StandingOrder
    from tests.supervisor.processes_under_test import FROM_CHILD, Say

    lock = str(directory / f"{wanted.name}.lock")
    order = StandingOrder(wanted.name, wanted.entry, msgspec.msgpack.encode(Say("")), wanted.along, lock, wanted.silence_s)
    along = [descriptors.get(name) for name in wanted.along]
    process = Isolation(str(directory / "forkserver.sock")).start(
        wanted.name, wanted.entry, Say(""), FROM_CHILD, along, timeout_s=60.0, lock=lock
    )
    descriptors.stand(wanted.name, order, os.dup(process.pidfd), os.dup(process.channel.fileno()))
    process.close()


def standing(descriptors: Any) -> dict[str, int | None]:
    from supervisor.pidfd import pid_of

    found = {}
    for name in descriptors.orders():
        process = descriptors.standing(name)
        found[name] = pid_of(process.pidfd)
        process.close()
    return found


def holds(descriptors: Any, error: str) -> Holds:
    names = descriptors.names()
    return Holds(
        os.getpid(),
        descriptors.welcome.pid,
        descriptors.welcome.stand_in,
        {name: os.pread(descriptors.get(name), 100, 0).decode() for name in names},
        {name: descriptors.data(name) for name in names if descriptors.data(name)},
        len(os.listdir("/proc/self/fd")),
        error,
        standing(descriptors),
    )


def argv(what: str, directory: Path) -> list[str]:
    return [sys.executable, os.path.abspath(__file__), what, str(directory)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
