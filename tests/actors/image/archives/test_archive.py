from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import struct
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from actors.image.archives.archive import Archive, ImageInfo, LayerInfo, archive_path, write_archive
from actors.image.errors import ArchiveInvalid
from actors.image.layers.checkpoints import Checkpoints
from actors.image.layers.content import LayerContent
from actors.lazytree.erofs import Node
from actors.lazytree.mounts import mount_erofs, unmount
from actors.lazytree.table import Row

DIGEST = "sha256:" + "ab" * 32
KEY = "cd" * 32
INFO = ImageInfo(
    reference=f"docker.io/library/x@{DIGEST}",
    digest=DIGEST,
    layers=[LayerInfo("sha256:" + "ef" * 32, "application/vnd.oci.image.layer.v1.tar+gzip", 100, "sha256:" + "01" * 32)],
    env=["PATH=/bin", "A=ü"],
    entrypoint=["/bin/sh"],
    command=["-c", "true"],
    working_dir="/srv",
    user="1:2",
    objects=1,
    unpacked_bytes=5,
)


ROW = Row(KEY, 5, msgspec.msgpack.encode(LayerContent(0, 512)))


def tree() -> Node:
    file = Node(stat.S_IFREG | 0o4755, uid=1, gid=2, mtime_ns=-1_500_000_000, size=5, key=KEY)
    return Node(stat.S_IFDIR | 0o755, children={b"f": file, b"g": file, b"s": Node(stat.S_IFLNK | 0o777, target=b"f")})


def written(directory: Path) -> Path:
    with closing(Checkpoints(str(directory))) as checkpoints:
        checkpoints.end_layer(100, 2560)
        return Path(write_archive(str(directory), tree(), [ROW], checkpoints, INFO))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert path == Path(archive_path(str(tmp_path), DIGEST))
    archive = Archive.open(str(path))
    assert (archive.path, archive.info) == (str(path), INFO)
    table = archive.objects()
    assert [table.row(index) for index in range(len(table))] == [ROW]
    table.close()


def test_the_kernel_mounts_the_archive_itself(tmp_path: Path) -> None:
    path = written(tmp_path)
    meta = tmp_path / "meta"
    meta.mkdir()
    mount_erofs(str(path), str(meta))
    try:
        status = (meta / "f").stat()
        assert (status.st_mode, status.st_uid, status.st_gid, status.st_size) == (stat.S_IFREG | 0o4755, 1, 2, 5)
        assert (status.st_nlink, status.st_mtime_ns) == (2, -1_500_000_000)
        assert os.getxattr(meta / "f", "trusted.overlay.redirect") == f"/{KEY[:2]}/{KEY[2:]}".encode()
        assert os.readlink(meta / "s") == "f"
    finally:
        unmount(str(meta))


def test_the_same_image_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert written(tmp_path).read_bytes() == written(tmp_path / "other").read_bytes()


def test_an_archive_that_is_not_there_is_not_an_invalid_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Archive.open(archive_path(str(tmp_path), DIGEST))


def test_any_damage_is_noticed(tmp_path: Path) -> None:
    good = written(tmp_path).read_bytes()
    bad = tmp_path / "bad"
    for at in range(0, len(good), 97):
        bad.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(ArchiveInvalid):
            Archive.open(str(bad))
    for size in [0, 1, 40, len(good) // 2, len(good) - 1]:
        bad.write_bytes(good[:size])
        with pytest.raises(ArchiveInvalid):
            Archive.open(str(bad))
    bad.write_bytes(good + b"\0")
    with pytest.raises(ArchiveInvalid):
        Archive.open(str(bad))


def test_an_archive_of_an_earlier_version_is_called_one(tmp_path: Path) -> None:
    good = written(tmp_path).read_bytes()
    of_version_1 = tmp_path / "1"
    body = good[:4096] + struct.pack("<8sI4xQQQQQ", b"AERIEIMG", 1, 4096, 4096, 0, 4096, 0)
    of_version_1.write_bytes(body + hashlib.sha256(body).digest())
    with pytest.raises(ArchiveInvalid, match="of version 1; this daemon reads version 4"):
        Archive.open(str(of_version_1))


def test_an_archive_is_replaced_while_it_is_mounted(tmp_path: Path) -> None:
    path = written(tmp_path)
    before = path.stat().st_ino
    with path.open("rb") as old:
        written(tmp_path)
        assert path.stat().st_ino != before
        assert old.read() == path.read_bytes()


def test_a_tree_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    root = Node(stat.S_IFDIR | 0o755, children={b"n" * 256: Node(stat.S_IFREG)})
    with closing(Checkpoints(str(tmp_path))) as checkpoints, pytest.raises(ValueError, match="not a name"):
        write_archive(str(tmp_path), root, [], checkpoints, INFO)
    assert list(tmp_path.iterdir()) == []


def test_only_the_temporaries_of_the_dead_are_removed(tmp_path: Path) -> None:
    of = archive_path("", DIGEST).removesuffix(".aerie")
    dead, alive = tmp_path / f".{of}.{'0' * 16}.tmp", tmp_path / f".{of}.{'1' * 16}.tmp"
    not_ours = tmp_path / ".other.tmp"
    for path in (dead, alive, not_ours):
        path.write_bytes(b"half an archive")
    with alive.open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        path = written(tmp_path)
    assert set(tmp_path.iterdir()) == {alive, not_ours, path}
