"""The process "workspace mount TASK", whole: a store read through META :: OBJECTS :: LAZY, and the server killed under it."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.lazytree import mounts
from actors.lazytree.table import ObjectTable
from actors.lazytree.wire import Progress, ReadFailed
from actors.mount.serve import serve
from actors.mount.wire import ReadWhole
from tests.actors.lazytree.harness import Tree, fork, in_child, wait_in_time

FILES = {
    "hello": b"from the store\n",
    "empty": b"",
    "deep/er/random": random.Random(7).randbytes(3 << 20),
    "odd": random.Random(8).randbytes((1 << 20) + 13),
}


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    tree = Tree(tmp_path, {**FILES, "busybox": Path("/bin/busybox").read_bytes()})
    yield tree
    tree.close()


def test_content_is_read_executed_and_copied_up(tree: Tree) -> None:
    server = tree.serve(serve)
    tree.mount()

    def use() -> None:
        for name, content in FILES.items():
            assert Path(tree.merged, name).read_bytes() == content
        ran = subprocess.run([f"{tree.merged}/busybox", "echo", "alive"], capture_output=True, check=True)
        assert ran.stdout == b"alive\n"
        os.rename(f"{tree.merged}/deep", f"{tree.merged}/moved")
        with open(f"{tree.merged}/moved/er/random", "r+b") as file:
            file.write(b"changed")
        assert Path(tree.merged, "moved/er/random").read_bytes() == b"changed" + FILES["deep/er/random"][7:]

    in_child(use)
    root = in_child(lambda: os.stat(tree.merged))
    assert (root.st_mode & 0o7777, root.st_uid, root.st_gid, root.st_mtime_ns // 10**18) == (0o750, 1000, 1000, 1)
    assert Path(tree.home, "store/deep/er/random").read_bytes() == FILES["deep/er/random"]
    deadline = time.monotonic() + 60
    while server.receive(Progress).waiting:  # a beat from before, or the kernel reads ahead still
        assert time.monotonic() < deadline


def test_objects_come_before_lazy(tree: Tree) -> None:
    with tree.objects.create() as file:
        file.write(b"from the cache\n")
        tree.objects.publish(file, tree.keys["hello"])
    server = tree.serve(serve)
    tree.mount()
    server.kill()
    assert in_child(lambda: Path(tree.merged, "hello").read_bytes()) == b"from the cache\n"


def test_the_server_has_no_privileges_and_no_way_back(tree: Tree) -> None:
    server = tree.serve(serve)
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{server.pid}/status").read_text().splitlines() if ":\t" in line)
    assert status["Uid"].split() == ["1000"] * 4 and status["Gid"].split() == ["1000"] * 4
    assert not status["Groups"].split() and status["NoNewPrivs"] == "1"
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
    assert os.stat(f"/proc/{server.pid}/mem").st_uid == 0  # not dumpable: the task's uid cannot read it


def test_a_read_after_the_store_changed_fails_with_the_reason(tree: Tree) -> None:
    server = tree.serve(serve)
    tree.mount()
    Path(tree.home, "store/hello").write_bytes(b"from the future")
    with pytest.raises(OSError) as raised:
        in_child(lambda: Path(tree.merged, "hello").read_bytes())
    assert raised.value.errno == errno.EIO
    assert server.receive(ReadFailed) == ReadFailed(tree.keys["hello"], "hello: changed in the store since the task began")
    assert in_child(lambda: Path(tree.merged, "odd").read_bytes()) == FILES["odd"]


def test_it_ends_when_its_mount_does_and_not_when_its_parent_does(tree: Tree) -> None:
    server = tree.serve(serve)
    server.channel.close()
    tree.mount()
    time.sleep(1.2)  # a heartbeat has met the closed channel
    assert in_child(lambda: Path(tree.merged, "hello").read_bytes()) == FILES["hello"]
    mounts.unmount(tree.merged)
    mounts.unmount(tree.lazy)
    assert server.wait() == 0


def test_readers_do_not_notice_that_servers_are_killed(tree: Tree) -> None:
    tree.serve(serve)
    tree.mount()
    stop = Path(tree.home, "stop")
    digests = {name: hashlib.sha256(content).digest() for name, content in FILES.items()}

    def read() -> None:
        while True:
            for name, digest in digests.items():
                with open(f"{tree.merged}/{name}", "rb", buffering=0) as file:
                    assert hashlib.sha256(file.read()).digest() == digest, name
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                # Past the page cache of the overlay: the object itself.
                if digest != hashlib.sha256(b"").digest():
                    with open(tree.object_path(name), "rb", buffering=0) as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                        assert hashlib.sha256(file.read()).digest() == digest, name
            subprocess.run([f"{tree.merged}/busybox", "true"], check=True)
            if stop.exists():
                break

    readers = [fork(read) for _ in range(2)]
    for _ in range(60):
        time.sleep(random.uniform(0, 0.06))  # at any moment of a read
        tree.servers[-1].kill()
        tree.serve(serve)
    stop.touch()
    for reader in readers:
        assert wait_in_time(reader) == 0


def test_a_request_outstanding_at_the_kill_is_answered_by_the_next_server(tree: Tree) -> None:
    tree.serve(serve)
    tree.servers[-1].kill()
    begun = time.monotonic()
    reading, writing = os.pipe()

    def read() -> None:
        os.write(writing, b".")
        assert Path(tree.object_path("odd")).read_bytes() == FILES["odd"]

    reader = fork(read)
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    tree.serve(serve)
    assert wait_in_time(reader) == 0
    assert time.monotonic() - begun < 50  # and not when its time is over


def test_nothing_is_left(tmp_path: Path) -> None:
    tree = Tree(tmp_path, FILES)
    server = tree.serve(serve)
    tree.mount()
    for mount in mounts.mounts_below(str(tmp_path)):
        mounts.unmount(mount.target)
    assert server.wait() == 0
    tree.close()
    shutil.rmtree(tmp_path)


def test_what_was_read_as_a_whole_is_told_once(tree: Tree) -> None:
    server = tree.serve(serve)
    tree.mount()
    table = ObjectTable(str(tree.home / "table"))
    large, odd = (table.find(tree.keys[name]) for name in ("deep/er/random", "odd"))

    def start_of_odd() -> None:
        with open(f"{tree.merged}/odd", "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no readahead
            file.read(4096)

    in_child(start_of_odd)
    in_child(Path(tree.merged, "deep/er/random").read_bytes)
    assert server.receive(ReadWhole).rows == [large]
    in_child(Path(tree.merged, "odd").read_bytes)
    assert server.receive(ReadWhole).rows == [odd]
