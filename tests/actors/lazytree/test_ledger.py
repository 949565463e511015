from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.lazytree.ledger import Limits, NoRoom, set_limits, sum_of, taken_bytes, unlinked_bytes, wanted_bytes
from actors.lazytree.mounts import mount_overlay, unmount
from actors.lazytree.objects import Objects
from tests.actors.lazytree.harness import fork

KIB = 1 << 10


@pytest.fixture
def objects(tmp_path: Path) -> Iterator[Objects]:
    objects = Objects(str(tmp_path / "objects"))
    yield objects
    objects.close()


def put(objects: Objects, content: bytes, admitted: bool = True) -> str:
    key = hashlib.sha256(content).hexdigest()
    with objects.create(len(content) if admitted else 0) as file:
        file.write(content)
        objects.publish(file, key)
    return key


def there_bytes(tmp_path: Path) -> int:
    """What the objects that are there take, looked at one by one."""
    prefixes = [path for path in (tmp_path / "objects").iterdir() if len(path.name) == 2]
    return sum(taken_bytes(file.stat(), str(file)) for prefix in prefixes for file in prefix.iterdir())


def used_bytes(objects: Objects) -> int:
    return sum_of(objects.descriptor).used_bytes


def freed_bytes(objects: Objects) -> int:
    """What of the unlinked files is free when all of it is: somebody who syncs holds a file until the disk has it, and a new
    mount namespace a mount until it has left its own."""
    freed = 0
    deadline = time.monotonic() + 60
    while True:
        freed += objects.ledger.forget_freed()
        if not unlinked_bytes(objects.descriptor):
            return freed
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_file_that_is_just_given_its_place_on_the_disk_is_not_taken_for_a_sparse_one(tmp_path: Path) -> None:
    for name, size in (("whole", 0), ("sparse", 1 << 20)):
        with open(tmp_path / name, "wb") as file:
            file.write(bytes(10_000))
            file.truncate(max(size, 10_000))
    whole, sparse = (os.stat(tmp_path / name) for name in ("whole", "sparse"))
    without = os.stat_result(
        (*whole[:10], *[0.0] * 3, *[0] * 3, 4096, 0)
    )  # as ext4 gives it, one stat(2) in a hundred thousand
    assert (without.st_size, without.st_blocks) == (10_000, 0)
    assert taken_bytes(whole) == taken_bytes(without, str(tmp_path / "whole")) == 12_288
    directory = os.open(tmp_path, os.O_RDONLY)
    assert taken_bytes(without, "whole", directory) == 12_288
    assert taken_bytes(sparse, "sparse", directory) == taken_bytes(sparse) == 12_288
    os.close(directory)


def test_what_is_published_and_unlinked_is_counted(objects: Objects, tmp_path: Path) -> None:
    first, _ = put(objects, b"a" * 5000), put(objects, b"b" * 100_000)
    put(objects, b"a" * 5000)  # there already
    assert used_bytes(objects) == there_bytes(tmp_path) == 8192 + 102_400
    freed = objects.ledger.unlink(first)
    assert objects.ledger.unlink(first) == 0
    assert freed + freed_bytes(objects) == 8192
    assert used_bytes(objects) == there_bytes(tmp_path) == 102_400


def test_ledgers_add_up_and_are_used_again(objects: Objects, tmp_path: Path) -> None:
    put(objects, b"a" * 5000)
    for content in (b"b" * 5000, b"c" * 5000):
        other = Objects(str(tmp_path / "objects"))
        put(other, content)
        assert used_bytes(objects) == there_bytes(tmp_path)
        assert sum_of(objects.descriptor).since_ns is not None
        other.close()
    assert len(os.listdir(tmp_path / "objects/ledgers")) == 2
    objects.close()
    reader = os.open(tmp_path / "objects", os.O_RDONLY)
    assert sum_of(reader).used_bytes == 3 * 8192 and sum_of(reader).since_ns is None
    os.close(reader)
    objects.__init__(str(tmp_path / "objects"))  # type: ignore[misc]  # for the fixture to close


def test_a_file_that_somebody_holds_is_counted_until_it_is_freed(objects: Objects, tmp_path: Path) -> None:
    key = put(objects, b"a" * 100_000)
    with open(tmp_path / "objects" / Objects.path(key), "rb") as held:
        assert objects.ledger.unlink(key) == 0
        assert used_bytes(objects) == unlinked_bytes(objects.descriptor) == 102_400
        assert objects.ledger.forget_freed() == 0
        assert held.read(1) == b"a"
    assert freed_bytes(objects) == 102_400
    assert used_bytes(objects) == unlinked_bytes(objects.descriptor) == 0


def test_a_file_that_an_overlay_has_opened_once_is_counted_until_it_is_unmounted(objects: Objects, tmp_path: Path) -> None:
    """Overlayfs stays bound to what it found at first open; a mount that is not held is somebody's of whom nobody knows."""
    key = put(objects, b"a" * 100_000)
    lower, merged = tmp_path / "lower", tmp_path / "merged"
    for directory in (lower, merged):
        directory.mkdir()
    with open(lower / "file", "wb") as file:
        file.truncate(100_000)
    os.setxattr(lower / "file", "trusted.overlay.metacopy", b"")
    os.setxattr(lower / "file", "trusted.overlay.redirect", f"/{Objects.path(key)}".encode())
    mount_overlay(str(merged), [str(lower)], [str(tmp_path / "objects")])
    try:
        assert (merged / "file").read_bytes() == b"a" * 100_000
        assert objects.ledger.unlink(key) == 0
        assert (merged / "file").read_bytes() == b"a" * 100_000  # opened again
        assert objects.ledger.forget_freed() == 0 and used_bytes(objects) == 102_400
    finally:
        unmount(str(merged))
    assert freed_bytes(objects) == 102_400 and used_bytes(objects) == 0


def test_no_room_beyond_the_cap(objects: Objects, tmp_path: Path) -> None:
    set_limits(objects.descriptor, Limits(1024 * KIB, 0))
    objects.close()
    objects.__init__(str(tmp_path / "objects"))  # type: ignore[misc]  # limits are read with the first use
    for number in range(4):
        put(objects, bytes([number]) * (240 * KIB))
    with pytest.raises(NoRoom):
        put(objects, b"x" * (240 * KIB))
    assert wanted_bytes(objects.descriptor) == 240 * KIB
    put(objects, b"y" * (40 * KIB))
    assert used_bytes(objects) == there_bytes(tmp_path) == 1000 * KIB
    assert sum_of(objects.descriptor).promised_bytes <= 1024 * KIB


def test_no_room_on_a_disk_that_is_nearly_full(objects: Objects, tmp_path: Path) -> None:
    set_limits(objects.descriptor, Limits(1 << 40, 1 << 60))
    objects.close()
    objects.__init__(str(tmp_path / "objects"))  # type: ignore[misc]
    with pytest.raises(NoRoom):
        put(objects, b"x")
    assert there_bytes(tmp_path) == 0


def test_many_who_publish_at_once_stay_below_the_cap(tmp_path: Path) -> None:
    with_limits = Objects(str(tmp_path / "objects"))
    set_limits(with_limits.descriptor, Limits(1024 * KIB, 0))
    seen: list[int] = []

    def publish(number: int) -> None:
        mine = Objects(str(tmp_path / "objects"))
        for round_ in range(40):
            try:
                put(mine, b"%d %d" % (number, round_) * 1000)
            except NoRoom:
                pass
            seen.append(sum_of(mine.descriptor).used_bytes)
        mine.close()

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert used_bytes(with_limits) == there_bytes(tmp_path)
    assert 512 * KIB < there_bytes(tmp_path) <= max(seen) <= 1024 * KIB
    with_limits.close()


def test_killed_at_any_instruction_the_next_holder_knows_what_was_done(tmp_path: Path) -> None:
    """One process after another publishes and unlinks, some of it held open here, and is killed at some instant."""
    chance = random.Random(3)
    reading, writing = os.pipe()
    held: list[int] = []

    def work() -> None:
        objects = Objects(str(tmp_path / "objects"))
        mine = random.Random(os.getpid())
        here = [prefix + name for prefix in os.listdir(tmp_path / "objects") if len(prefix) == 2
                for name in os.listdir(tmp_path / "objects" / prefix)]  # fmt: skip
        os.write(writing, b".")
        while True:
            objects.ledger.forget_freed()
            if len(here) > 20:
                objects.ledger.unlink(here.pop(mine.randrange(len(here))))
            else:
                here.append(put(objects, mine.randbytes(mine.randrange(1, 30_000))))

    for _ in range(40):
        pid = fork(work)
        os.read(reading, 1)
        time.sleep(chance.uniform(0, 0.02))
        for path in (tmp_path / "objects").glob("??/*"):
            if chance.random() < 0.05:
                try:
                    held.append(os.open(path, os.O_RDONLY))
                except FileNotFoundError:
                    pass
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        objects = Objects(str(tmp_path / "objects"))
        _ = objects.ledger  # which finishes what the dead one was at
        assert used_bytes(objects) == there_bytes(tmp_path) + unlinked_bytes(objects.descriptor)
        objects.close()
        while len(held) > 5:
            os.close(held.pop(0))
    for descriptor in held:
        os.close(descriptor)
    os.close(reading)
    os.close(writing)
    objects = Objects(str(tmp_path / "objects"))
    freed_bytes(objects)
    assert used_bytes(objects) == there_bytes(tmp_path)
    assert len(os.listdir(tmp_path / "objects/ledgers")) == 1
    objects.close()


def test_what_was_never_counted_is_counted(objects: Objects, tmp_path: Path) -> None:
    key = put(objects, b"a" * 5000)
    put(objects, b"b" * 5000)
    os.unlink(tmp_path / "objects" / Objects.path(key))  # by somebody who keeps no ledger
    objects.count()
    assert used_bytes(objects) == there_bytes(tmp_path) == 8192
