"""META as the kernel sees it: what was written is what lstat, readdir, readlink and getxattr say."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from actors.lazytree import erofs, mounts
from actors.lazytree.erofs import REFERENCE_BYTES, Node

DIRECTORY, FILE, LINK = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777
KEY = hashlib.sha256(b"content").hexdigest()
FSCK = shutil.which("fsck.erofs")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("erofs")
    (home / "meta").mkdir()
    yield home
    assert mounts.mounts_below(str(home)) == []


class Mounted:
    """The image of a tree, checked by fsck.erofs and mounted."""

    def __init__(self, home: Path, root: Node) -> None:
        self.image, self.path = home / "meta.erofs", home / "meta"
        with open(self.image, "wb") as file:
            size_bytes = erofs.write(root, file)
        assert size_bytes == self.image.stat().st_size
        if FSCK is not None:
            os.truncate(
                self.image, size_bytes + 4096
            )  # fsck.erofs 1.5 wants to read on behind the last inode, which may end the image
            checked = subprocess.run([FSCK, str(self.image)], capture_output=True, text=True, check=False)
            assert checked.returncode == 0, checked.stdout + checked.stderr
            os.truncate(self.image, size_bytes)

    def __enter__(self) -> Path:
        mounts.mount_erofs(str(self.image), str(self.path))
        return self.path

    def __exit__(self, *_: object) -> None:
        mounts.unmount(str(self.path))


def seen_xattrs(path: Path) -> dict[bytes, bytes]:
    names = os.listxattr(path, follow_symlinks=False)
    return {os.fsencode(name): os.getxattr(path, name, follow_symlinks=False) for name in names}


def check(path: Path, node: Node, inodes: dict[Node, int]) -> None:
    """Compare one node, and all below it, with what the kernel shows."""
    seen = os.lstat(path)
    assert (seen.st_mode, seen.st_uid, seen.st_gid, seen.st_mtime_ns) == (node.mode, node.uid, node.gid, node.mtime_ns)
    assert inodes.setdefault(node, seen.st_ino) == seen.st_ino
    expected = {
        (b"trusted.overlay.overlay." + name[16:] if name.startswith(b"trusted.overlay.") else name): value
        for name, value in node.xattrs.items()
    }
    kind = stat.S_IFMT(node.mode)
    if kind == stat.S_IFREG:
        assert seen.st_size == node.size
        if node.data is not None:
            assert path.read_bytes() == node.data
        elif node.size:
            assert node.key is not None
            expected[b"trusted.overlay.metacopy"] = b""
            expected[b"trusted.overlay.redirect"] = f"/{node.key[:2]}/{node.key[2:]}".encode()
    assert seen_xattrs(path) == expected
    if kind == stat.S_IFLNK:
        assert os.fsencode(os.readlink(path)) == node.target
        assert seen.st_size == len(node.target or b"")
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        assert seen.st_rdev == node.rdev
    elif node.children is not None:
        assert seen.st_nlink == 2 + sum(child.children is not None for child in node.children.values())
        assert sorted(map(os.fsencode, os.listdir(path))) == sorted(node.children)
        for name, child in node.children.items():
            check(path / os.fsdecode(name), child, inodes)


# --- random trees

names = some.binary(min_size=1, max_size=40).filter(lambda name: not {0, 47} & set(name) and name not in (b".", b".."))
times = some.integers(-(1 << 62), 1 << 62) | some.sampled_from((0, 1, -1, 10**18))
owners = some.sampled_from((0, 1000, 65535, 65536, (1 << 32) - 2))
permissions = some.integers(0, 0o7777)
attributes = some.dictionaries(
    some.sampled_from(
        (
            b"user.a",
            b"user.mime_type",
            b"trusted.x",
            b"security.other",
            b"trusted.overlay.opaque",
            b"trusted.overlay.overlay.redirect",
        )
    ),
    some.binary(max_size=300),
    max_size=4,
)


# Made once: a strategy is looked into whenever it is made, and the filter's source is parsed each time.
targets = some.binary(min_size=1, max_size=80).filter(lambda target: 0 not in target)


@some.composite
def leaves(draw: some.DrawFn) -> Node:
    kind = draw(some.sampled_from((stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)))
    node = Node(kind | draw(permissions), draw(owners), draw(owners), draw(times))
    if kind == stat.S_IFREG:
        node.size = draw(some.sampled_from((0, 1, 4096, 4097, (1 << 32) - 1, 1 << 32, 1 << 45, (1 << 45) + 1)))
        node.key = KEY
        if draw(some.booleans()):
            node.data, node.key = draw(some.binary(min_size=1, max_size=REFERENCE_BYTES)), None
            node.size = len(node.data)
    elif kind == stat.S_IFLNK:
        node.mode = kind | 0o777
        node.target = draw(targets) * draw(some.sampled_from((1, 1, 30, 51)))
        node.target = node.target[:4095]
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        node.rdev = os.makedev(draw(some.integers(1, 4095)), draw(some.integers(0, (1 << 20) - 1)))
    if kind in (stat.S_IFREG, stat.S_IFLNK):
        node.xattrs = {name: value for name, value in draw(attributes).items() if kind == stat.S_IFREG or name[:5] != b"user."}
    return node


@some.composite
def directories(draw: some.DrawFn, depth: int = 2) -> Node:
    node = Node(stat.S_IFDIR | draw(permissions), draw(owners), draw(owners), draw(times), xattrs=draw(attributes), children={})
    assert node.children is not None
    children = leaves() if depth == 0 else leaves() | directories(depth - 1)
    # More of them, or deeper, and a tree takes minutes to draw.
    node.children.update(draw(some.dictionaries(names, children, max_size=5)))
    files = [child for child in node.children.values() if child.children is None]
    if files and draw(some.booleans()):
        node.children.setdefault(b"hard link", draw(some.sampled_from(files)))
    return node


@settings(max_examples=100, deadline=None)
@given(root=directories())
def test_random_trees_are_what_the_kernel_shows(home: Path, root: Node) -> None:
    with Mounted(home, root) as path:
        check(path, root, {})


# --- the corners


def test_twenty_thousand_names_in_one_directory(home: Path) -> None:
    node = Node(FILE, size=7, key=KEY)
    root = Node(DIRECTORY, children={b"big": Node(DIRECTORY, children={})})
    assert root.children is not None
    big = root.children[b"big"]
    assert big.children is not None
    for number in range(20_000):
        big.children[b"%x" % (number * 2654435761)] = node if number % 1000 == 0 else Node(FILE)
    with Mounted(home, root) as path:
        assert sorted(map(os.fsencode, os.listdir(path / "big"))) == sorted(big.children)
        for name in list(big.children)[::97]:
            assert os.lstat(path / "big" / os.fsdecode(name)).st_nlink == (20 if big.children[name] is node else 1)


@pytest.mark.parametrize("length", [1, 1990, 2016, 2017, 2048, 2049, 4000, 4064, 4095])
@pytest.mark.parametrize("attributes", [0, 1, 3000])
def test_long_link_targets(home: Path, length: int, attributes: int) -> None:
    root = Node(DIRECTORY, mtime_ns=5, children={})
    assert root.children is not None
    for number in range(5):  # at several places within a block
        link = Node(LINK, mtime_ns=5 + number, target=(b"%d/" % number + b"x" * length)[:length])
        if attributes:
            link.xattrs = {b"trusted.t": b"y" * attributes}
        root.children[b"%d" % number] = link
    with Mounted(home, root) as path:
        check(path, root, {})


def test_an_inode_may_end_the_image(home: Path) -> None:
    root = Node(DIRECTORY, mtime_ns=-1, children={b"%04d" % number: Node(FILE, mtime_ns=number) for number in range(36)})
    file = io.BytesIO()
    assert erofs.write(root, file) == 4096 and file.getvalue()[-64:].strip(b"\0")  # an inode with its own time has 64 bytes
    with Mounted(home, root) as path:
        check(path, root, {})


def test_names_around_the_dots_are_found(home: Path) -> None:
    names = (b"!", b"-", b"...", b".a", b".-", b"\xff" * 255, b"\x01", b"..\x01", b"a b\n")
    root = Node(DIRECTORY, children={name: Node(FILE) for name in names})
    with Mounted(home, root) as path:
        check(path, root, {})
        with pytest.raises(FileNotFoundError):
            os.lstat(path / "missing")


def test_the_same_tree_gives_the_same_bytes(home: Path) -> None:
    def image(order: int) -> bytes:
        children = [
            (b"%d" % number, Node(FILE, mtime_ns=number, xattrs={b"user.a": b"1", b"user.b": b"2"})) for number in range(9)
        ]
        file = io.BytesIO()
        erofs.write(Node(DIRECTORY, children=dict(children[::order])), file)
        return file.getvalue()

    assert image(1) == image(-1)


def test_a_whiteout_is_left_out_and_escaped_attributes_come_back_through_an_overlay(home: Path) -> None:
    root = Node(
        DIRECTORY,
        children={
            b"whiteout": Node(stat.S_IFCHR | 0o600),
            b"file": Node(FILE, xattrs={b"trusted.overlay.redirect": b"/etc/passwd", b"user.x": b"y"}),
        },
    )
    with Mounted(home, root) as path:
        assert os.listdir(path) == ["file"]
        merged = home / "merged"
        (home / "objects").mkdir()
        merged.mkdir()
        mounts.mount_overlay(str(merged), [str(path)], [str(home / "objects")])
        try:
            assert seen_xattrs(merged / "file") == {b"trusted.overlay.redirect": b"/etc/passwd", b"user.x": b"y"}
        finally:
            mounts.unmount(str(merged))


@pytest.mark.alone
def test_fast_enough(home: Path) -> None:
    root = Node(DIRECTORY, children={})
    assert root.children is not None
    for outer in range(500):
        children = {b"file-%d" % inner: Node(FILE, 1000, 1000, outer * 10**9 + inner, 100, key=KEY) for inner in range(255)}
        root.children[b"%d" % outer] = Node(DIRECTORY, children=children)

    def took_s() -> float:
        begun = time.process_time()
        with open(home / "big.erofs", "wb") as file:
            erofs.write(root, file)
        return time.process_time() - begun

    assert any(took_s() < 4 for _ in range(3))  # 1.3 s here; the goal for 128,000 is 2 s


BAD = {
    "a file as root": Node(FILE),
    "no type": Node(DIRECTORY, children={b"a": Node(0o644)}),
    "a file with children": Node(DIRECTORY, children={b"a": Node(FILE, children={})}),
    "a directory without": Node(DIRECTORY, children={b"a": Node(DIRECTORY)}),
    "a slash": Node(DIRECTORY, children={b"a/b": Node(FILE)}),
    "a dot": Node(DIRECTORY, children={b"..": Node(FILE)}),
    "no name": Node(DIRECTORY, children={b"": Node(FILE)}),
    "a NUL": Node(DIRECTORY, children={b"a\0": Node(FILE)}),
    "a long name": Node(DIRECTORY, children={b"a" * 256: Node(FILE)}),
    "no object": Node(DIRECTORY, children={b"a": Node(FILE, size=1)}),
    "a bad key": Node(DIRECTORY, children={b"a": Node(FILE, size=1, key="../../" + KEY[6:])}),
    "a negative size": Node(DIRECTORY, children={b"a": Node(FILE, size=-1)}),
    "an owner that is nobody": Node(DIRECTORY, children={b"a": Node(FILE, uid=(1 << 32) - 1)}),
    "a negative owner": Node(DIRECTORY, children={b"a": Node(FILE, gid=-1)}),
    "a time out of range": Node(DIRECTORY, children={b"a": Node(FILE, mtime_ns=1 << 100)}),
    "an empty target": Node(DIRECTORY, children={b"a": Node(LINK, target=b"")}),
    "a long target": Node(DIRECTORY, children={b"a": Node(LINK, target=b"x" * 4096)}),
    "a big device": Node(DIRECTORY, children={b"a": Node(stat.S_IFCHR, rdev=os.makedev(1 << 12, 1))}),
    "an unknown attribute": Node(DIRECTORY, children={b"a": Node(FILE, xattrs={b"system.other": b""})}),
    "a long attribute": Node(DIRECTORY, children={b"a": Node(FILE, xattrs={b"user.a": bytes(1 << 16)})}),
    "an attribute without name": Node(DIRECTORY, children={b"a": Node(FILE, xattrs={b"user.": b""})}),
    "content of another size": Node(DIRECTORY, children={b"a": Node(FILE, size=2, data=b"1")}),
    "content in two places": Node(DIRECTORY, children={b"a": Node(FILE, size=1, data=b"1", key=KEY)}),
    "content of a directory": Node(DIRECTORY, children={b"a": Node(DIRECTORY, children={}, size=1, data=b"1")}),
    "no content where some is": Node(DIRECTORY, children={b"a": Node(FILE, data=b"")}),
    "too much content": Node(DIRECTORY, children={b"a": Node(FILE, size=REFERENCE_BYTES + 1, data=bytes(REFERENCE_BYTES + 1))}),
    "too many attributes": Node(
        DIRECTORY, children={b"a": Node(FILE, xattrs={b"user.%d" % n: bytes(60000) for n in range(5)})}
    ),
}


def test_a_reference_costs_what_is_said_it_does() -> None:
    """Content of REFERENCE_BYTES makes META as large as an object's name does, but for what is left free lest a tail crosses a block."""

    def meta_bytes(**content: Any) -> int:
        files = {b"%d" % number: Node(FILE, size=REFERENCE_BYTES, **content) for number in range(10_000)}
        return erofs.write(Node(DIRECTORY, children=files), io.BytesIO())

    assert meta_bytes(data=bytes(REFERENCE_BYTES)) <= 1.03 * meta_bytes(key=KEY)


def test_content_behind_many_attributes(home: Path) -> None:
    """A tail and its inode share a block; where both together are too long for half of one, content has a block of its own."""
    sizes = range(0, 4200, 77)
    files = {b"%d" % size: Node(FILE, size=5, data=b"12345", xattrs={b"user.a": bytes(size)}) for size in sizes}
    with Mounted(home, Node(DIRECTORY, children=files)) as root:
        for size in sizes:
            assert (root / str(size)).read_bytes() == b"12345"
            assert os.getxattr(root / str(size), "user.a") == bytes(size)


@pytest.mark.parametrize("why", BAD)
def test_what_cannot_be_expressed_is_refused(why: str) -> None:
    with pytest.raises(ValueError):
        erofs.write(BAD[why], io.BytesIO())


def test_a_directory_under_two_names_is_refused() -> None:
    twice = Node(DIRECTORY, children={})
    with pytest.raises(ValueError):
        erofs.write(Node(DIRECTORY, children={b"a": twice, b"b": twice}), io.BytesIO())
