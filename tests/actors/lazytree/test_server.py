"""The LAZY server over sources that are slow, stuck, wrong or raise: real connections, forked servers."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from actors.lazytree import server as lazytree_server
from actors.lazytree.server import Reads, SourceError, drop_privileges, serve_tree
from actors.lazytree.table import ObjectTable, Row, write_table
from actors.lazytree.wire import Progress, ReadFailed, ServeTree
from supervisor.channel import Channel
from supervisor.frames import Codec
from tests.actors.lazytree.harness import SERVER_CODEC, Tree, fork, in_child, wait_in_time

STUCK = 130


class Moody:
    """A source whose answer depends on the object: ready, stuck, short, long, refusing or raising."""

    def name(self, row: Row) -> str:
        return "it"

    async def read(self, index: int, row: Row, offset: int, size: int) -> bytes:
        mood = row.source.split(b"stored-")[1] if b"stored-" in row.source else b""
        if b"stuck" in mood:
            await trio.sleep_forever()
        if b"short" in mood:
            return bytes(size - 1)
        if b"long" in mood:
            return bytes(size + 1)
        if b"refuse" in mood:
            raise SourceError("the registry says no")
        if b"raise" in mood:
            raise RuntimeError("odd \udcff text" + "x" * 100_000)
        return bytes(offset % 251 for offset in range(offset, offset + size))


def serve_moody(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    order: ServeTree = Codec(ServeTree).decode(arguments)
    table = ObjectTable(order.table)
    drop_privileges(order.uid, order.gid)
    serve_tree(Channel(end, SERVER_CODEC), descriptors[0], order, table, Moody())


def make(home: Path, *moods: str, read_timeout_s: float = 60.0) -> Tree:
    return Tree(home, {f"stored-{mood}": b"x" * 5000 for mood in moods}, read_timeout_s)


@pytest.fixture
def trees() -> Iterator[list[Tree]]:
    trees: list[Tree] = []
    yield trees
    for tree in trees:
        tree.close()


CONTENT = bytes(offset % 251 for offset in range(5000))


def read_object(tree: Tree, mood: str) -> bytes:
    return in_child(lambda: Path(tree.object_path(f"stored-{mood}")).read_bytes())


def test_names_and_attributes(tmp_path: Path, trees: list[Tree]) -> None:
    tree = make(tmp_path, "ready")
    trees.append(tree)
    tree.serve(serve_moody)
    path = tree.object_path("stored-ready")

    def look() -> None:
        seen = os.stat(path)
        assert (seen.st_mode, seen.st_size, seen.st_uid, seen.st_nlink) == (stat.S_IFREG | 0o444, 5000, 0, 1)
        assert stat.S_IMODE(os.stat(tree.lazy).st_mode) == stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o555
        for missing in ("zz", "AB", "0", "000", "é", "00/" + "0" * 62, path[len(tree.lazy) + 1 :].upper(), "00/short"):
            with pytest.raises(FileNotFoundError):
                os.stat(f"{tree.lazy}/{missing}")
        assert os.statvfs(tree.lazy).f_namemax == 255
        with pytest.raises(OSError) as raised:
            open(path, "wb").close()
        assert raised.value.errno == errno.EROFS
        with open(path, "rb", buffering=0) as file:
            assert os.pread(file.fileno(), 100, 4990) == CONTENT[4990:] and os.pread(file.fileno(), 1, 5000) == b""

    in_child(look)


@pytest.mark.parametrize(
    ("mood", "reason"),
    [
        ("short", "the source gave another number of bytes than it was asked for"),
        ("long", "the source gave another number of bytes than it was asked for"),
        ("refuse", "the registry says no"),
        ("raise", ("RuntimeError: odd \\udcff text" + "x" * 8192)[:8192]),
        ("stuck", "it: no content within 0.2 s"),
    ],
)
def test_what_cannot_be_had_is_eio_with_a_reason_and_the_mount_lives(
    tmp_path: Path, trees: list[Tree], mood: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazytree_server, "HEARTBEAT_S", 0.1)
    tree = make(tmp_path, mood, "ready", read_timeout_s=0.2 if mood == "stuck" else 60)
    trees.append(tree)
    server = tree.serve(serve_moody)
    for _ in range(2):
        with pytest.raises(OSError) as raised:
            read_object(tree, mood)
        assert raised.value.errno == errno.EIO
    assert server.receive(ReadFailed) == ReadFailed(tree.keys[f"stored-{mood}"], reason)
    assert read_object(tree, "ready") == CONTENT
    for _ in range(5):  # told once: nothing but heartbeats follows
        assert isinstance(server.channel.receive(60)[0], Progress)


def test_stuck_reads_do_not_keep_a_ready_one_waiting(tmp_path: Path, trees: list[Tree]) -> None:
    tree = make(tmp_path, "ready", *(f"stuck-{number}" for number in range(STUCK)), read_timeout_s=600)
    trees.append(tree)
    server = tree.serve(serve_moody)

    def read_stuck() -> None:
        def read(number: int) -> None:
            with pytest.raises(OSError):
                Path(tree.object_path(f"stored-stuck-{number}")).read_bytes()

        threads = [threading.Thread(target=read, args=(number,)) for number in range(STUCK)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    readers = fork(read_stuck)
    while server.receive(Progress).waiting < STUCK:
        pass

    def timed() -> float:
        begun = time.monotonic()
        assert Path(tree.object_path("stored-ready")).read_bytes() == CONTENT
        return time.monotonic() - begun

    assert in_child(timed) < 30  # 1 ms on a quiet machine; the stuck ones take ten minutes
    tree.servers[-1].kill()
    tree.serve(serve_moody)  # all of them are asked again
    while tree.servers[-1].receive(Progress).waiting < STUCK:
        pass
    tree.close()
    trees.clear()
    assert wait_in_time(readers) == 0


def test_a_parent_that_does_not_listen_is_not_waited_for(tmp_path: Path, trees: list[Tree]) -> None:
    tree = make(tmp_path, *(f"refuse-{number}" for number in range(400)), "ready")
    trees.append(tree)
    server = tree.serve(serve_moody)

    def fail() -> int:
        count = 0
        for number in range(400):
            try:
                Path(tree.object_path(f"stored-refuse-{number}")).read_bytes()
            except OSError:
                count += 1
        return count

    assert in_child(fail) == 400
    assert read_object(tree, "ready") == CONTENT
    told = {server.receive(ReadFailed).key for _ in range(400)}  # kept until somebody listened
    assert len(told) == 400


# --- Reads alone


class Counted:
    def __init__(self) -> None:
        self.calls = 0
        self.gate = trio.Event()

    def name(self, row: Row) -> str:
        return "it"

    async def read(self, index: int, row: Row, offset: int, size: int) -> bytes:
        self.calls += 1
        await self.gate.wait()
        return b"%d" % index * size


def test_identical_reads_are_one_and_different_ones_are_not(tmp_path: Path) -> None:
    with open(tmp_path / "table", "wb") as file:
        write_table(file, [Row(f"{number:02x}" * 32, 100, b"") for number in range(2)])

    async def scenario() -> None:
        source, told = Counted(), list[ReadFailed]()
        reads = Reads(ObjectTable(str(tmp_path / "table")), source, 5.0, told.append)
        answers: list[bytes | None] = []

        async def read(index: int, offset: int, size: int) -> None:
            answers.append(await reads.read(index, offset, size))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(read, 0, 0, 4)
                nursery.start_soon(read, 1, 0, 4)
                nursery.start_soon(read, 0, 98, 4)
            await trio.testing.wait_all_tasks_blocked()
            assert source.calls == 3
            source.gate.set()
        assert sorted(answer or b"" for answer in answers) == [b"00"] * 10 + [b"0000"] * 10 + [b"1111"] * 10
        assert await reads.read(0, 0, 4) == b"0000" and source.calls == 4  # nothing is kept
        assert await reads.read(0, 100, 4) == b"" and await reads.read(0, 200, 4) == b"" and source.calls == 4
        assert told == []

    trio.run(scenario)


def test_everybody_who_waits_for_a_failure_gets_it_and_it_is_told_once(tmp_path: Path) -> None:
    with open(tmp_path / "table", "wb") as file:
        write_table(file, [Row("ab" * 32, 100, b"stored-refuse")])

    async def scenario() -> None:
        told = list[ReadFailed]()
        reads = Reads(ObjectTable(str(tmp_path / "table")), Moody(), 5.0, told.append)
        assert await reads.read(0, 0, 4) is None and await reads.read(0, 4, 4) is None
        assert told == [ReadFailed("ab" * 32, "the registry says no")]

    trio.run(scenario)
