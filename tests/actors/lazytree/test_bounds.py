"""The bounds of a LAZY server: memory, time, and whom a store that hangs delays.  Real stores and mounts, forked servers."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors.lazytree import mounts
from actors.lazytree.objects import Objects
from actors.lazytree.wire import Progress, ReadFailed
from actors.mount.serve import serve
from supervisor.isolation import Isolation
from tests.actors.lazytree.harness import Tree, fork, fork_server, in_child, private_bytes, wait_in_time

MIB = 1 << 20
READS = 1000
PRIVATE_BYTES_MAX = 64 * MIB
STUCK = 130
READY_S = 0.05


@pytest.fixture
def trees() -> Iterator[list[Tree]]:
    trees: list[Tree] = []
    yield trees
    for tree in reversed(trees):  # the last one's store may lie on an earlier one
        tree.close()


@pytest.fixture
def isolation(tmp_path: Path) -> Iterator[Isolation]:
    with fork_server(tmp_path / "forks", "actors.mount.serve") as isolation:
        yield isolation


# --- memory


def queued(minor: int) -> int:
    """Requests without an answer, as the kernel counts them."""
    return int(Path(f"/sys/fs/fuse/connections/{minor}/waiting").read_text())


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def read_at_once(path: str, opened: int, go: int) -> None:
    """Open the file, say so, and when told to, read all of it at once, each MiB in a thread of its own."""
    threading.stack_size(64 << 10)
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # each request is what was asked for, and nothing is read ahead
    os.write(opened, b".")
    os.read(go, 1)
    wrong = []

    def read(number: int) -> None:
        with mmap.mmap(-1, MIB) as room:
            if os.preadv(file, [room], number * MIB) != MIB or room[:4] != number.to_bytes(4, "big") or any(room[-1000:]):
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(READS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.alone
def test_a_thousand_large_reads_at_once_take_little_memory(tmp_path: Path, trees: list[Tree], isolation: Isolation) -> None:
    tree = Tree(tmp_path, {"large": b""}, read_timeout_s=60)
    trees.append(tree)
    with open(tmp_path / "store/large", "wb") as file:
        for number in range(READS):
            os.pwrite(file.fileno(), number.to_bytes(4, "big"), number * MIB)
        file.truncate(READS * MIB)
    tree.list({"large": "large"})
    server = tree.serve(serve, isolation)
    path = tree.object_path("large")
    (said, opened), (told, go) = os.pipe(), os.pipe()
    readers = fork(lambda: read_at_once(path, opened, told))
    try:
        assert os.read(said, 1) == b"."
        os.kill(server.pid, signal.SIGSTOP)  # until all of them wait
        os.write(go, b".")
        wait_for(lambda: queued(tree.connection.minor) >= READS)
        os.kill(server.pid, signal.SIGCONT)
        peak_bytes = 0
        while os.waitid(os.P_PID, readers, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            peak_bytes = max(peak_bytes, private_bytes(server.pid))
            time.sleep(0.01)
    finally:
        os.kill(server.pid, signal.SIGCONT)
        for end in (said, opened, told, go):
            os.close(end)
        code = wait_in_time(readers)
    assert code == 0
    assert MIB < peak_bytes < PRIVATE_BYTES_MAX
    # It is given back: idle threads' stacks after ten seconds.
    wait_for(lambda: private_bytes(server.pid) < PRIVATE_BYTES_MAX / 2)


# --- a store that hangs


class HalfHanging:
    """A tree whose store hangs in part, on command: `slow/` in it is another FUSE mount, whose server is stopped."""

    def __init__(self, home: Path, trees: list[Tree], read_timeout_s: float) -> None:
        (home / "below").mkdir()
        below = Tree(home / "below", {f"slow-{number}": b"x" * 5000 for number in range(STUCK)}, read_timeout_s=60)
        trees.append(below)
        self.server_below = below.serve(serve)
        (home / "whole").mkdir()
        self.tree = Tree(home / "whole", {"ready": b"r" * 5000, "large": b"l" * MIB}, read_timeout_s)
        trees.append(self.tree)
        (home / "whole/store/slow").mkdir()
        mounts.bind(below.lazy, str(home / "whole/store/slow"))
        self.tree.keys.update(below.keys)
        paths = {name: f"slow/{Objects.path(key)}" for name, key in below.keys.items()}
        self.tree.list({"ready": "ready", "large": "large", **paths})

    def hang(self) -> None:
        os.kill(self.server_below.pid, signal.SIGSTOP)

    def read_stuck(self) -> int:
        """Have as many readers wait for the part that hangs → their process, which ends well when each has got its bytes or EIO."""

        def read(number: int) -> None:
            try:
                assert Path(self.tree.object_path(f"slow-{number}")).read_bytes() == b"x" * 5000
            except OSError as error:
                assert error.errno == errno.EIO

        def read_all() -> None:
            threads = [threading.Thread(target=read, args=(number,)) for number in range(STUCK)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        return fork(read_all)


@pytest.mark.alone
@pytest.mark.parametrize("name", ["ready", "large"])
def test_stuck_reads_delay_nobody_whose_data_is_ready(tmp_path: Path, trees: list[Tree], name: str) -> None:
    half = HalfHanging(tmp_path, trees, read_timeout_s=60)
    server = half.tree.serve(serve)
    path = half.tree.object_path(name)
    half.hang()
    readers = half.read_stuck()
    while server.receive(Progress).waiting < STUCK:
        pass

    def timed() -> float:
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begun = time.monotonic()
            assert len(file.read()) == os.fstat(file.fileno()).st_size
            return time.monotonic() - begun

    assert any(statistics.median(in_child(lambda: [timed() for _ in range(9)])) < READY_S for _ in range(10))
    os.kill(half.server_below.pid, signal.SIGCONT)
    assert wait_in_time(readers) == 0  # and who was stuck has lost nothing


@pytest.mark.alone
def test_a_read_ends_at_its_deadline_and_says_why(tmp_path: Path, trees: list[Tree]) -> None:
    half = HalfHanging(tmp_path, trees, read_timeout_s=0.5)
    server = half.tree.serve(serve)
    half.hang()
    begun = time.monotonic()
    readers = half.read_stuck()
    assert wait_in_time(readers) == 0
    assert time.monotonic() - begun < 30  # the store would hang for a minute
    reasons = {server.receive(ReadFailed).reason for _ in range(STUCK)}
    paths = [Objects.path(half.tree.keys[f"slow-{number}"]) for number in range(STUCK)]
    assert reasons == {f"slow/{path}: no content within 0.5 s" for path in paths}

    def is_read() -> bool:
        """Whether it is, in half a second: for a moment this machine may do nothing."""
        try:
            return Path(half.tree.object_path("ready")).read_bytes() == b"r" * 5000
        except OSError:
            return False

    wait_for(lambda: in_child(is_read))
