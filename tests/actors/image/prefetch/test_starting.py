"""What a program reads at its start, read ahead of it; a real program, libraries and mounts, and a server that answers no more."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from actors.image.prefetch.program import parse
from actors.image.prefetch.starting import FILES_MAX, PLACES_MAX, ask_for, read_program
from actors.image.wire import ReadProgram
from actors.lazytree import mounts
from actors.mount.serve import serve
from supervisor.frames import Codec
from tests.actors.image.prefetch.test_program import elf
from tests.actors.lazytree.harness import Tree, fork, in_child, wait_in_time
from tests.actors.lazytree.test_bounds import queued, wait_for

PROGRAM = "/bin/ls"


def found(name: str, directories: tuple[str, ...]) -> Path:
    return next(path for place in directories if (path := Path(place) / name).exists())


def files() -> dict[str, bytes]:
    """The program, in `opt`, its interpreter and libraries where this host has them, a script, and what none of them needs."""
    program = parse(
        Path(PROGRAM).read_bytes().__getitem__ and (lambda at, size: Path(PROGRAM).read_bytes()[at : at + size]), PROGRAM
    )
    whole = {"opt/ls": Path(PROGRAM), program.interpreter[1:]: Path(program.interpreter)}
    whole |= {str(path)[1:]: path for path in (found(name, program.directories) for name in program.needed)}
    others = {"opt/script": b"#!/opt/ls -l\n", "opt/none": b"\x7fELF of no kind", "other": b"other" * 1000}
    return {name: path.read_bytes() for name, path in whole.items()} | others


FILES = files()

pytestmark = pytest.mark.alone  # what the kernel reads ahead is a hint to it, and on a loaded machine it may leave some


class Ahead:
    """A tree with these files, all of them open and none of them read."""

    def __init__(self, home: Path) -> None:
        self.tree = Tree(home, FILES)
        self._server = self.tree.serve(serve)
        mounts.mount_erofs(str(home / "meta.erofs"), self.tree.meta)
        self._layers = [str(home / "objects"), self.tree.lazy]
        mounts.mount_overlay(self.tree.merged, [self.tree.meta], self._layers)
        self._files = {name: os.open(f"{self.tree.merged}/{name}", os.O_RDONLY) for name in FILES}

    def read(self, name: str, path: str = "/opt") -> None:
        """Have the program's files read, by a process of its own, to its end."""
        order = ReadProgram(self.tree.meta, self._layers, name, path, 1000, 1000)
        end, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with end, other:
            assert wait_in_time(fork(lambda: read_program(end, [], Codec(ReadProgram).encode(order)))) == 0
        wait_for(lambda: queued(self.tree.connection.minor) == 0)

    def is_there(self, expected: set[str]) -> set[str]:
        """The files that can be read while the server answers nobody; `expected` have more time for that."""
        os.kill(self._server.pid, signal.SIGSTOP)
        wait_for(lambda: Path(f"/proc/{self._server.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        there = set()
        for name, file in self._files.items():
            try:
                time_s = 60.0 if name in expected else 1.0
                assert in_child(lambda file=file: os.pread(file, 1 << 24, 0), time_s) == FILES[name]  # type: ignore[misc]
            except TimeoutError:
                continue
            there.add(name)
        return there

    def close(self) -> None:
        os.kill(self._server.pid, signal.SIGCONT)
        for file in self._files.values():
            os.close(file)
        self.tree.close()


@pytest.fixture
def ahead(tmp_path: Path) -> Iterator[Ahead]:
    with closing(Ahead(tmp_path)) as ahead:
        yield ahead


NEEDLESS = {"other", "opt/none", "opt/script"}


@pytest.mark.parametrize("name", ["/opt/ls", "ls"])
def test_all_that_a_program_needs_is_there_when_it_begins(ahead: Ahead, name: str) -> None:
    ahead.read(name)
    assert ahead.is_there(expected := set(FILES) - NEEDLESS) == expected


def test_a_script_needs_what_its_interpreter_needs(ahead: Ahead) -> None:
    ahead.read("script")
    assert ahead.is_there(expected := set(FILES) - NEEDLESS | {"opt/script"}) == expected


def test_what_is_no_program_needs_nothing(ahead: Ahead) -> None:
    for name in ("opt/ls", "", "/", "/opt", "/missing", "a\0b", "/opt/none"):
        ahead.read(name)
    assert ahead.is_there(set()) <= {"opt/none"}


def test_however_much_a_program_says_that_it_needs_little_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = tuple(f"lib{number}.so" for number in range(200))
    (tmp_path / "program").write_bytes(elf(True, "<", ":".join(f"/nowhere/{number}" for number in range(200)), libraries))
    looked: list[str] = []
    opened = os.open

    def counted(path: str, flags: int) -> int:
        looked.append(path)
        return opened(path, flags)

    monkeypatch.setattr(os, "open", counted)
    assert ask_for(str(tmp_path / "program"), "") == [str(tmp_path / "program")]
    assert len(looked) < 1 + FILES_MAX * PLACES_MAX


def test_nothing_of_it_stays_mounted(ahead: Ahead) -> None:
    before = mounts.mounts_below(str(ahead.tree.home))
    ahead.read("ls")
    assert mounts.mounts_below(str(ahead.tree.home)) == before
