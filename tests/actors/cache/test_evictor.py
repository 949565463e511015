"""The evictor over real objects: what goes, what is held, and that a kill at any instruction harms nobody."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.cache.evictor import evict
from actors.lazytree import trees
from actors.lazytree.ledger import sum_of, taken_bytes, unlinked_bytes
from actors.lazytree.objects import Objects
from actors.lazytree.trees import Trees, TreeSource
from supervisor.lockfile import LockFile
from tests.actors.lazytree.harness import fork
from tests.actors.lazytree.test_bounds import wait_for
from tests.actors.lazytree.test_ledger import freed_bytes

SOURCE = TreeSource("registry.example/image:1", ["sha256:1"])
FOREVER = 1 << 60


@pytest.fixture
def objects(tmp_path: Path) -> Iterator[Objects]:
    objects = Objects(str(tmp_path / "objects"))
    yield objects
    objects.close()


class Node:
    """A daemon that lives for as long as this process does."""

    def __init__(self, home: Path, objects: Objects) -> None:
        (home / "run").mkdir(parents=True)
        self.lock = LockFile(home / "run/keeper.lock")
        assert self.lock.acquire()
        self.trees = Trees(objects.descriptor, str(home / "run"))
        self.trees.announce(str(home / "run"), str(home / "run/images"))


@pytest.fixture
def node(tmp_path: Path, objects: Objects) -> Node:
    return Node(tmp_path / "node", objects)


def put(objects: Objects, *contents: bytes) -> list[bytes]:
    """Objects of a tree → their keys."""
    keys = []
    for content in contents:
        keys.append(hashlib.sha256(content).digest())
        with objects.create(len(content)) as file:
            file.write(content)
            objects.publish(file, keys[-1].hex())
    return sorted(keys)


def there_bytes(directory: Path) -> int:
    """What the objects that are there take, looked at one by one."""
    return sum(taken_bytes(path.stat(), str(path)) for path in directory.glob("??/*"))


def write_back(objects: Objects, keys: list[bytes]) -> None:
    """Have the disk have them: until then somebody else who syncs may hold one when it is unlinked, and it is not free at once."""
    for key in keys:
        file = os.open(Objects.path(key.hex()), os.O_RDONLY, dir_fd=objects.descriptor)
        os.fdatasync(file)
        os.close(file)


def record(objects: Objects, name: str, keys: list[bytes], used_s: float, source: TreeSource = SOURCE) -> None:
    trees.record(objects.descriptor, name, source, b"".join(keys), used_s)


def here(objects: Objects, keys: list[bytes]) -> list[bool]:
    return [objects.has(key.hex()) for key in keys]


def test_the_tree_that_was_used_the_longest_ago_goes_first(objects: Objects) -> None:
    shared, old, new = put(objects, b"s" * 9000), put(objects, b"o" * 9000), put(objects, b"n" * 9000)
    record(objects, "new", new + shared, 200)
    record(objects, "old", old + shared, 100)
    for name in ("new", "old"):
        trees.note_whole(objects.descriptor, name)
    write_back(objects, old)
    asked: list[TreeSource] = []
    report = evict(objects, 1, lambda source: not asked.append(source), lambda: None)  # type: ignore[func-returns-value]
    assert (report.objects, report.freed_bytes, report.short, asked) == (1, 12288, False, [SOURCE])
    assert here(objects, old + shared + new) == [False, True, True]
    assert [trees.is_whole(objects.descriptor, name) for name in ("old", "new")] == [False, True]
    assert sum_of(objects.descriptor).used_bytes == 2 * 12288
    assert evict(objects, FOREVER, lambda _: True, lambda: None).short
    assert here(objects, shared + new) == [False, False] and not trees.is_whole(objects.descriptor, "new")


def test_what_is_mounted_or_cannot_be_had_again_stays(objects: Objects, node: Node) -> None:
    held, lost, other = put(objects, b"h" * 9000), put(objects, b"l" * 9000), put(objects, b"o" * 9000)
    gone = TreeSource("gone.example/image:1", ["sha256:2"])
    record(objects, "lost", lost, 2, gone)
    record(objects, "other", other, 3)
    node.trees.hold("mount", "held", SOURCE, b"".join(held))
    report = evict(objects, FOREVER, lambda source: source != gone, lambda: None)
    assert report.short and here(objects, held + lost + other) == [True, True, False]
    node.trees.release("mount", "held")
    assert evict(objects, FOREVER, lambda source: source != gone, lambda: None).objects == 1
    assert here(objects, held + lost) == [False, True]


def test_a_hold_is_on_what_the_tree_was_then(objects: Objects, node: Node) -> None:
    """A workspace's store changes, and is listed again, while a task is on its first listing."""
    first, second = put(objects, b"1" * 9000), put(objects, b"2" * 9000)
    store = TreeSource(store="/store")
    inode = node.trees.hold("task-1", "store", store, b"".join(first))
    assert node.trees.hold_again("task-2", "store", inode)
    assert node.trees.hold("task-3", "store", store, b"".join(second)) != inode
    assert not node.trees.hold_again("task-4", "store", inode)
    for name in ("task-2", "task-3", "task-4"):
        node.trees.release(name)
    evict(objects, FOREVER, lambda _: True, lambda: None)
    assert here(objects, first + second) == [True, False]


def test_holds_of_a_daemon_that_is_no_more_count_for_nothing(objects: Objects, node: Node) -> None:
    keys = put(objects, b"x" * 9000)
    node.trees.hold("mount", "tree", SOURCE, b"".join(keys))
    evict(objects, FOREVER, lambda _: True, lambda: None)
    assert here(objects, keys) == [True] and node.trees.holds() == ["mount"]
    node.lock.close()
    evict(objects, FOREVER, lambda _: True, lambda: None)
    assert here(objects, keys) == [False] and node.trees.holds() == []


def test_what_somebody_is_just_building_stays(objects: Objects, tmp_path: Path) -> None:
    old = put(objects, b"old")
    objects.close()
    time.sleep(1.1)  # file systems' clocks are coarse, and the evictor leaves a second for that
    builder = Objects(str(tmp_path / "objects"))
    new = put(builder, b"new")
    objects.__init__(str(tmp_path / "objects"))  # type: ignore[misc]
    evict(objects, FOREVER, lambda _: True, lambda: None)
    assert here(objects, old + new) == [False, True]
    builder.close()


def test_what_comes_into_use_while_registries_are_asked_stays(objects: Objects, node: Node) -> None:
    held, used, other = put(objects, b"h" * 9000), put(objects, b"u" * 9000), put(objects, b"o" * 9000)
    for number, (name, keys) in enumerate((("held", held), ("used", used), ("other", other))):
        record(objects, name, keys, number + 1)

    def has(source: TreeSource) -> bool:
        node.trees.hold("mount", "held", SOURCE, b"".join(held))
        os.utime("trees/used", dir_fd=objects.descriptor)
        return True

    assert evict(objects, FOREVER, has, lambda: None).objects == 1
    assert here(objects, held + used + other) == [True, True, False]


def test_nobody_counts_on_anything_while_it_goes(objects: Objects) -> None:
    with trees.evicting(objects.descriptor, 1) as mine:
        assert mine and not trees.settled(objects.descriptor, 0.05)
        with trees.evicting(objects.descriptor, 0.05) as other:
            assert not other
    assert trees.settled(objects.descriptor)


def test_killed_at_any_instruction(tmp_path: Path) -> None:
    """Evictors are killed one after another, beside a daemon that holds, publishes and looks: held objects stay, and the sums are right."""
    chance = random.Random(5)
    objects = Objects(str(tmp_path / "objects"))
    node = Node(tmp_path / "node", objects)
    contents = [b"%d " % number * 1500 for number in range(60)]

    def work() -> None:
        mine = Objects(str(tmp_path / "objects"))
        while True:
            evict(mine, 100_000, lambda _: True, lambda: None)

    everything = [hashlib.sha256(each).digest() for each in contents]
    put(objects, *contents)
    kept_whole = evicted = 0
    for round_ in range(25):
        name = f"tree{round_ % 7}"
        evicted += here(objects, everything).count(False)
        keys = put(objects, *chance.sample(contents, 20))
        pid = fork(work)
        node.trees.hold("mount", name, SOURCE, b"".join(keys))
        assert trees.settled(objects.descriptor, 60)
        seen = here(objects, keys)
        if round_ and not evicted:  # a slow one is not killed before it has done anything
            wait_for(lambda: not all(here(objects, everything)))
        if all(seen):
            trees.note_whole(objects.descriptor, name)
        until_s = time.monotonic() + chance.uniform(0, 0.05)
        while time.monotonic() < until_s:
            put(objects, chance.choice(contents))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert [now for now, then in zip(here(objects, keys), seen, strict=True) if then and not now] == []
        node.trees.release("mount", name)
        # What is said to be whole is.
        for tree in trees.trees(objects.descriptor):
            if trees.is_whole(objects.descriptor, tree.name):
                kept_whole += 1
                assert all(here(objects, [tree.keys[at : at + 32] for at in range(0, len(tree.keys), 32)]))
        other = Objects(str(tmp_path / "objects"))
        _ = other.ledger
        assert sum_of(objects.descriptor).used_bytes == there_bytes(tmp_path / "objects") + unlinked_bytes(objects.descriptor)
        other.close()
    assert evicted and kept_whole
    objects.close()
    node.lock.close()


OPERATIONS = ("pwrite", "unlink", "rename", "link", "utime", "mkdir", "write")  # besides opening a file that may be made


def killed_before(number: int, do: Callable[[], object]) -> bool:
    """Do it in a process that is killed before its operation of that number on files, whatever it is → False when it had fewer."""

    def run() -> None:
        left = number

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                if function is not opened or arguments[1] & os.O_CREAT:
                    if not left:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left -= 1
                return function(*arguments, **options)

            return call

        opened = os.open
        for name in (*OPERATIONS, "open"):
            setattr(os, name, counted(getattr(os, name)))
        do()

    return os.waitstatus_to_exitcode(os.waitpid(fork(run), 0)[1]) == -signal.SIGKILL


def test_killed_before_each_of_its_operations(tmp_path: Path) -> None:
    """One tree whose file somebody holds open, one that is mounted, one of no tree: each time from the same state."""

    def evict_all() -> None:
        mine = Objects(str(home / "objects"))
        evict(mine, FOREVER, lambda _: True, lambda: None)
        mine.close()

    number = 0
    alive = True
    while alive:
        home = tmp_path / str(number)
        objects = Objects(str(home / "objects"))
        node = Node(home / "node", objects)
        held, loose, orphan = put(objects, b"h" * 9000), put(objects, b"1" * 9000, b"2" * 5000), put(objects, b"o" * 100)
        record(objects, "loose", loose, 100)
        trees.note_whole(objects.descriptor, "loose")
        node.trees.hold("mount", "held", SOURCE, b"".join(held))
        objects.close()
        busy = os.open(home / "objects" / Objects.path(loose[0].hex()), os.O_RDONLY)
        alive = killed_before(number, evict_all)

        again = Objects(str(home / "objects"))
        _ = again.ledger
        assert sum_of(again.descriptor).used_bytes == there_bytes(home / "objects") + unlinked_bytes(again.descriptor), number
        assert here(again, held) == [True]
        assert all(here(again, loose)) or not trees.is_whole(again.descriptor, "loose"), number
        evict_all()
        assert here(again, held + loose + orphan) == [True, False, False, again.has(orphan[0].hex())]
        os.close(busy)
        node.lock.close()
        freed_bytes(again)
        assert unlinked_bytes(again.descriptor) == 0
        assert sum_of(again.descriptor).used_bytes == there_bytes(home / "objects"), number
        again.close()
        number += 1
    assert number > 20


def test_what_was_published_by_one_who_was_killed_before_it_was_counted_is_not_taken_off(tmp_path: Path) -> None:
    """Nor is its ledger the one that the evictor takes."""
    home, content = str(tmp_path / "objects"), os.urandom(50000)
    key = hashlib.sha256(content).hexdigest()
    other, publisher, evictor = (Objects(home) for _ in range(3))
    assert sum_of(other.ledger._directory).used_bytes == 0  # it has the first ledger
    with publisher.create(len(content)) as file:
        file.write(content)
        file.flush()
        publisher.ledger.begin_publishing(key, file.fileno())
        os.link(f"/proc/self/fd/{file.fileno()}", Objects.path(key), dst_dir_fd=publisher.descriptor, follow_symlinks=True)
    os.close(publisher.ledger._file)  # as it is when it has been killed
    other.close()
    trees.record(evictor.descriptor, "tree", SOURCE, bytes.fromhex(key))
    assert evict(evictor, FOREVER, lambda source: True, lambda: None).objects == 1
    assert sum_of(evictor.descriptor).used_bytes - unlinked_bytes(evictor.descriptor) == 0
    evictor.close()
    os.close(publisher.descriptor)


def test_what_is_published_and_not_counted_yet_stays(tmp_path: Path) -> None:
    """Its publisher may be killed before it counts it, when it would have been taken off already."""
    home, content = str(tmp_path / "objects"), os.urandom(50000)
    key = hashlib.sha256(content).hexdigest()
    evictor, publisher = Objects(home), Objects(home)
    assert sum_of(evictor.ledger._directory).used_bytes == 0  # it has a ledger of its own
    with publisher.create(len(content)) as file:
        file.write(content)
        file.flush()
        publisher.ledger.begin_publishing(key, file.fileno())
        os.link(f"/proc/self/fd/{file.fileno()}", Objects.path(key), dst_dir_fd=publisher.descriptor, follow_symlinks=True)
    trees.record(evictor.descriptor, "tree", SOURCE, bytes.fromhex(key))
    assert evict(evictor, FOREVER, lambda source: True, lambda: None).objects == 0
    os.close(publisher.ledger._file)
    assert evict(evictor, FOREVER, lambda source: True, lambda: None).objects == 1
    assert sum_of(evictor.descriptor).used_bytes - unlinked_bytes(evictor.descriptor) == 0
    evictor.close()
    os.close(publisher.descriptor)
