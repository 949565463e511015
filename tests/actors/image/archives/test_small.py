"""Small files whose content travels inside META: as a task sees them, they are files like any other."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from actors.image.archives.archive import Archive
from actors.image.wire import Built
from actors.lazytree.erofs import REFERENCE_BYTES
from actors.lazytree.mounts import make_upper, mount_erofs, mount_overlay, unmount
from tests.actors.image.builders import Node, mounted, walk
from tests.actors.image.images import Member, Repository, directory, hard_link, member, tar
from tests.actors.image.layers.tables import estargz, images

SMALL = bytes(range(REFERENCE_BYTES))
MEMBERS: list[Member] = [
    directory("d"),
    member("d/one", b"1", mode=0o4755, uid=3, gid=70_000, mtime=-5),
    member("d/largest", SMALL),
    member("d/too large", SMALL + b"!"),
    member("d/empty"),
    member("d/attributes", b"content", pax_headers={"SCHILY.xattr.user.a": "1", "SCHILY.xattr.trusted.overlay.metacopy": "x"}),
    hard_link("linked", "d/one"),
    member("again", b"1"),
    member("replaced", b"lower"),
    member("gone", b"gone"),
]
UPPER: list[Member] = [
    member("replaced", b"upper"),
    member(".wh.gone", b"small, too"),
    hard_link("of a lower layer", "d/largest"),
]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "node")


@contextmanager
def task_root(built: Built, node: Node, at: Path) -> Iterator[Path]:
    """With a task's own upper layer, which stays when this is left."""
    meta, upper, work, root = (at / name for name in ("meta", "upper", "work", "root"))
    for path in (meta, root):
        path.mkdir(parents=True, exist_ok=True)
    mount_erofs(built.archive, str(meta))
    try:
        if not upper.exists():
            make_upper(str(upper), str(work), str(meta))
        mount_overlay(str(root), [str(meta)], [str(node.cache)], str(upper), str(work))
        try:
            yield root
        finally:
            unmount(str(root))
    finally:
        unmount(str(meta))


def sizes(built: Built) -> list[int]:
    """Of the objects."""
    with closing(Archive.open(built.archive).objects()) as table:
        return sorted(table.row(index).size_bytes for index in range(len(table)))


def test_the_tree_is_the_same_and_only_the_larger_files_are_objects(repository: Repository, node: Node, tmp_path: Path) -> None:
    repository.push(tar(*MEMBERS), tar(*UPPER))
    without = node.built(repository.reference())
    with mounted(without, node, tmp_path / "without") as root:
        expected = walk(root)
    other = Node(tmp_path / "other")
    built = other.built(repository.reference(), small_inside=True)
    with mounted(built, other, tmp_path / "with") as root:
        assert walk(root) == expected
        assert (root / "d/one").stat().st_nlink == 2 and (root / "d/one").samefile(root / "linked")
        assert (root / "d/largest").samefile(root / "of a lower layer")
    assert sizes(built) == [len(SMALL) + 1] == [path.stat().st_size for path in other.objects()]
    assert len(sizes(without)) == 5
    assert Archive.open(built.archive).info.identity != Archive.open(without.archive).info.identity
    assert SMALL in Path(built.archive).read_bytes()
    assert SMALL not in Path(without.archive).read_bytes()
    # Either is found again, and used, by who would have made the other.
    assert node.built(repository.reference(), small_inside=True).archive == without.archive
    assert len(sizes(node.built(repository.reference(), small_inside=True))) == 5
    assert sizes(other.built(repository.reference())) == [len(SMALL) + 1]


def test_a_task_changes_them_like_any_other(repository: Repository, node: Node, tmp_path: Path) -> None:
    repository.push(tar(*MEMBERS))
    built = node.built(repository.reference(), small_inside=True)
    with task_root(built, node, tmp_path / "task") as root:
        (root / "d/one").chmod(0o600)
        os.setxattr(root / "d/attributes", "user.b", b"2")
        with open(root / "again", "ab") as file:
            file.write(b"2")
        (root / "d/largest").rename(root / "moved")
        os.link(root / "moved", root / "moved too")
        (root / "replaced").unlink()
        os.truncate(root / "gone", 2)

        def check() -> None:
            status = (root / "d/one").stat()
            assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime) == (0o600, 3, 70_000, -5)
            assert (root / "d/one").read_bytes() == (root / "linked").read_bytes() == b"1"
            assert (root / "d/attributes").read_bytes() == b"content"
            assert os.getxattr(root / "d/attributes", "user.b") == b"2"
            assert os.getxattr(root / "d/attributes", "trusted.overlay.metacopy") == b"x"
            assert (root / "again").read_bytes() == b"12"
            assert (root / "moved").read_bytes() == (root / "moved too").read_bytes() == SMALL
            assert not (root / "d/largest").exists() and not (root / "replaced").exists()
            assert (root / "gone").read_bytes() == b"go"

        check()
    with task_root(built, node, tmp_path / "task") as root:
        check()


def test_of_a_layer_that_is_not_read_small_files_are_objects(repository: Repository, node: Node) -> None:
    layer, plain = estargz(member("a", b"1"), member("b", SMALL)), tar(member("c", b"22"), member("d", b"1"))
    repository.push(layer.tar, plain, **images([layer, type(layer)(plain, plain, {})]))
    built = node.built(repository.reference(), small_inside=True, lazy=True)
    assert sizes(built)[:2] == [1, 1] and len(SMALL) in sizes(built) and 2 not in sizes(built)  # the landmark is the other one
