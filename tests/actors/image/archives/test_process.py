"""The image builder as a process, from a real registry to a mounted tree."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.image.archives import process as builder_process
from actors.image.archives.archive import Archive
from actors.image.wire import BuildFailed, Built, Progress, Resolved
from actors.lazytree.objects import Objects
from tests.actors.image.builders import TIMEOUT_S, Builder, Node, mounted, walk
from tests.actors.image.images import (
    OCI,
    Member,
    Repository,
    RunningRegistry,
    digest,
    directory,
    hard_link,
    member,
    symlink,
    tar,
)

pytestmark = pytest.mark.usefixtures("unhurried")


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


BIG = random.Random(1).randbytes(3 << 20)
CAPABILITY = "\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0"


def test_the_tree_that_the_kernel_shows_is_the_one_that_the_layers_describe(
    repository: Repository, node: Node, tmp_path: Path
) -> None:
    lowest = tar(
        directory("./", mode=0o711, mtime=1),
        directory("bin", mtime=2),
        member("bin/su", b"program", mode=0o4755, mtime=3, pax_headers={"mtime": "3.25"}),
        member("bin/ping", b"program", mode=0o755, pax_headers={"SCHILY.xattr.security.capability": CAPABILITY}),
        hard_link("bin/sudo", "bin/su"),
        member("big", BIG, uid=70_000, gid=2**31, mtime=-7),
        member("empty"),
        symlink("sbin", "bin", mode=0o777),
        symlink("long", "x" * 4000, mode=0o777),
        directory("gone"),
        member("gone/a", b"gone"),
        directory("opaque", mode=0o700),
        member("opaque/a", b"gone"),
        member("old", b"old"),
        member("bytes-\udcff\udcfe", b"name"),
        member("n" * 255, b"name"),
    )
    upper = tar(
        member("null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
        member("pipe", kind=tarfile.FIFOTYPE, mode=0o600, uid=5),
        member(".wh.gone"),
        member("opaque/b", b"new"),
        member("opaque/.wh..wh..opq"),
        directory("old", mode=0o1777),
        member("old/new", b"new", pax_headers={"SCHILY.xattr.user.note": "yes"}),
        member("sbin/init", b"init", mode=0o755),
        hard_link("big2", "big"),
    )
    process = {"Env": ["PATH=/bin"], "Entrypoint": ["/bin/su"], "Cmd": ["-"], "WorkingDir": "/srv", "User": "5"}
    pushed = repository.push(lowest, upper, process=process)
    built = node.built(repository.reference())
    assert built.digest == pushed["digest"]
    info = Archive.open(built.archive).info
    assert (info.env, info.entrypoint, info.command, info.working_dir, info.user) == (
        ["PATH=/bin"],
        ["/bin/su"],
        ["-"],
        "/srv",
        "5",
    )
    assert [layer.diff_id for layer in info.layers] == [digest(lowest), digest(upper)]
    assert info.reference == f"{repository.reference().removesuffix(':latest')}@{built.digest}"
    s = 10**9
    with mounted(built, node, tmp_path) as root:
        assert walk(root) == {
            ".": ("drwx--x--x", 0, 0, 1 * s, None, {}),
            "bin": ("drwxr-xr-x", 0, 0, 2 * s, None, {}),
            "bin/su": ("-rwsr-xr-x", 0, 0, 3_250_000_000, sha(b"program"), {}),
            "bin/sudo": ("-rwsr-xr-x", 0, 0, 3_250_000_000, sha(b"program"), {}),
            "bin/ping": ("-rwxr-xr-x", 0, 0, 0, sha(b"program"), {"security.capability": CAPABILITY.encode()}),
            "bin/init": ("-rwxr-xr-x", 0, 0, 0, sha(b"init"), {}),
            "big": ("-rw-r--r--", 70_000, 2**31, -7 * s, sha(BIG), {}),
            "big2": ("-rw-r--r--", 70_000, 2**31, -7 * s, sha(BIG), {}),
            "empty": ("-rw-r--r--", 0, 0, 0, sha(b""), {}),
            "sbin": ("lrwxrwxrwx", 0, 0, 0, "bin", {}),
            "long": ("lrwxrwxrwx", 0, 0, 0, "x" * 4000, {}),
            "opaque": ("drwx------", 0, 0, 0, None, {}),
            "opaque/b": ("-rw-r--r--", 0, 0, 0, sha(b"new"), {}),
            "old": ("drwxrwxrwt", 0, 0, 0, None, {}),
            "old/new": ("-rw-r--r--", 0, 0, 0, sha(b"new"), {"user.note": b"yes"}),
            "bytes-\udcff\udcfe": ("-rw-r--r--", 0, 0, 0, sha(b"name"), {}),
            "n" * 255: ("-rw-r--r--", 0, 0, 0, sha(b"name"), {}),
            "null": ("crw-rw-rw-", 0, 0, 0, os.makedev(1, 3), {}),
            "pipe": ("prw-------", 5, 0, 0, None, {}),
        }
        assert (root / "bin/su").stat().st_nlink == 2
        assert os.path.samefile(root / "big", root / "big2")
    node.check_objects()
    objects = Objects(str(node.cache))
    assert objects.forget_unsynced() == 0  # all were made durable
    objects.close()
    # Two files of one content are one object; what a later layer has hidden is none.
    assert built.objects == len({BIG, b"program", b"init", b"new", b"name"})
    assert built.unpacked_bytes == len(BIG) + len(b"program") + len(b"init") + len(b"new") + len(b"name")


def test_an_image_made_by_other_tools_comes_out_as_they_unpack_it(repository: Repository, node: Node, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "bin").mkdir(parents=True)
    shutil.copy2("/bin/busybox", source / "bin/busybox")
    for number in range(200):
        (source / f"bin/link{number}").symlink_to("busybox")
        (source / f"file{number}").write_bytes(b"%d" % number * number)
    os.link(source / "file1", source / "bin/hard")
    os.chown(source / "file2", 1234, 5678)
    (source / "file3").chmod(0o2755)
    os.utime(source / "file4", ns=(0, 1_234_567_890_000_000_000))
    layout = f"{tmp_path / 'layout'}"
    for command in (
        ["umoci", "init", "--layout", layout],
        ["umoci", "new", "--image", f"{layout}:x"],
        ["umoci", "insert", "--image", f"{layout}:x", str(source), "/"],
        ["umoci", "insert", "--image", f"{layout}:x", "--whiteout", "/file5"],
        ["umoci", "unpack", "--image", f"{layout}:x", str(tmp_path / "bundle")],
        ["skopeo", "copy", "-q", "--dest-tls-verify=false", f"oci:{layout}:x", f"docker://{repository.reference()}"],
    ):
        subprocess.run(command, check=True, timeout=300, stdout=subprocess.DEVNULL)
    with mounted(node.built(repository.reference()), node, tmp_path) as root:
        ours, theirs = walk(root), walk(tmp_path / "bundle/rootfs")
        assert (root / "bin/hard").stat().st_nlink == 2
    # A directory that only a later layer touches has another time after unpacking in place.
    assert ours.pop(".")[:3] == theirs.pop(".")[:3]
    assert ours == theirs
    assert "file5" not in ours


# What is wrong with the image, or with where it comes from


def packed(*members: Member) -> bytes:
    return gzip.compress(tar(*members), mtime=0)


def test_an_unknown_image(repository: Repository, node: Node) -> None:
    failed = node.failed(repository.reference("nosuch"))
    assert failed.kind == "unknown"
    assert f"{repository.name}:nosuch" in failed.error


def test_what_is_no_reference(node: Node) -> None:
    failed = node.build("No Image")
    assert isinstance(failed, BuildFailed)
    assert failed.kind == "reference"


def test_an_unreachable_registry(node: Node) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        failed = node.failed(f"{address}/a")
    assert failed.kind == "unreachable"
    assert address in failed.error


def test_an_image_for_another_machine(repository: Repository, node: Node) -> None:
    repository.push(tar(member("a")), architecture="s390x")
    failed = node.failed(repository.reference())
    assert failed.kind == "platform"
    assert "s390x" in failed.error


@pytest.mark.parametrize("where", [10, 100, -6])
def test_a_blob_that_was_tampered_with_in_the_registry(where: int, repository: Repository, node: Node) -> None:
    blob = packed(member("a", b"content" * 1000), member("b", BIG[:100_000]))
    repository.push(tar(), blobs=[blob], diff_ids=[digest(gzip.decompress(blob))])
    damaged = bytearray(blob)
    damaged[where] ^= 0xFF
    repository.blob_file(digest(blob)).write_bytes(damaged)
    failed = node.failed(repository.reference())
    assert failed.kind == "corrupt"
    assert f"copy of {digest(blob)} is damaged: its digest is {digest(bytes(damaged))}" in failed.error


def test_a_blob_that_was_cut_off_in_the_registry(repository: Repository, node: Node) -> None:
    blob = packed(member("a", BIG))
    repository.push(tar(), blobs=[blob], diff_ids=[digest(gzip.decompress(blob))])
    os.truncate(repository.blob_file(digest(blob)), len(blob) // 2)
    failed = node.failed(repository.reference())
    assert failed.kind == "corrupt"
    assert digest(blob) in failed.error


@pytest.mark.parametrize(
    ("blob", "kind", "text"),
    [
        (packed(member("a", BIG))[:-1000], "corrupt", "gzip ends in the middle"),
        (packed(member("a", BIG))[:200_000] + bytes(5000), "corrupt", "gzip"),
        (gzip.compress(tar(member("a", BIG))[:100_000], mtime=0), "corrupt", "tar ends in the middle"),
        (gzip.compress(b"not a tar" * 1000, mtime=0), "corrupt", "a layer's tar"),
        (packed(member("a")) + b"garbage", "corrupt", "gzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(100), "corrupt", "zstd"),
        (packed(member("../a")), "unsafe", "climbs out"),
        (packed(symlink("s", "../../../../../../etc"), member("s/a")), "unsafe", "out of the image's root"),
        (packed(symlink("s", "/etc"), member("s/a")), "unsafe", "where nothing is"),
        (packed(member("a"), hard_link("b", "../../etc/passwd")), "unsafe", "climbs out"),
    ],
)  # fmt: skip
def test_layers_that_are_damaged_or_mean_harm(blob: bytes, kind: str, text: str, repository: Repository, node: Node) -> None:
    repository.push(tar(), blobs=[blob], diff_ids=["sha256:" + "0" * 64])
    failed = node.failed(repository.reference())
    assert (failed.kind, text in failed.error) == (kind, True), failed
    assert failed.error.startswith(f"{repository.reference()}, layer 1 of 1: ")


def test_a_layer_that_is_not_what_the_config_says(repository: Repository, node: Node) -> None:
    repository.push(tar(member("a")), diff_ids=["sha256:" + "0" * 64])
    failed = node.failed(repository.reference())
    assert failed.kind == "corrupt"
    assert "config says" in failed.error


def test_a_name_that_no_file_system_holds(repository: Repository, node: Node) -> None:
    repository.push(tar(member("n" * 256)))
    failed = node.failed(repository.reference())
    assert failed.kind == "corrupt"
    assert "n" * 256 in failed.error


def test_a_plain_layer_whatever_its_media_type_says(repository: Repository, node: Node) -> None:
    layer = tar(member("a", b"1"))
    for media_type in (f"{OCI}.layer.v1.tar", f"{OCI}.layer.v1.tar+gzip"):
        repository.push(layer, blobs=[layer], media_type=media_type)
        assert node.built(repository.reference()).objects == 1


def test_a_decompression_bomb_ends_at_its_bound(repository: Repository, node: Node) -> None:
    blob = gzip.compress(tar(member("bomb", bytes(100 << 20))), 1)
    assert len(blob) < 1 << 20
    repository.push(tar(), blobs=[blob], diff_ids=["sha256:" + "0" * 64])
    failed = node.failed(repository.reference(), unpacked_bytes_max=10 << 20)
    assert failed.kind == "bounds"
    assert str(10 << 20) in failed.error
    assert node.objects() == []


def test_an_image_with_too_many_entries(repository: Repository, node: Node) -> None:
    repository.push(tar(*(member(f"f{number}") for number in range(101))))
    failed = node.failed(repository.reference(), entries_max=100)
    assert failed.kind == "bounds"
    assert "100 entries" in failed.error


def test_holes_do_not_count(repository: Repository, node: Node, tmp_path: Path) -> None:
    sparse = {"GNU.sparse.size": str(1 << 40), "GNU.sparse.map": f"{(1 << 40) - 1},1"}
    repository.push(tar(member("f", b"1", pax_headers=sparse)))
    built = node.built(repository.reference(), unpacked_bytes_max=100_000)
    assert built.unpacked_bytes == 1
    with mounted(built, node, tmp_path) as root, (root / "f").open("rb") as file:
        assert os.fstat(file.fileno()).st_size == 1 << 40
        assert (file.read(4096), file.seek((1 << 40) - 2), file.read()) == (bytes(4096), (1 << 40) - 2, b"\0001")


@contextlib.contextmanager
def silent_registry() -> Iterator[str]:
    """It takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=8) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_build_that_takes_too_long_ends_also_while_it_waits(node: Node) -> None:
    with silent_registry() as address:
        begun = time.monotonic()
        failed = node.failed(f"{address}/a", time_max_s=0.4)
    assert failed.kind == "bounds"
    assert "0.4 s" in failed.error
    assert time.monotonic() - begun < 120  # the registry is asked for longer


def test_a_time_that_is_over_is_told_though_it_is_looked_at_again_meanwhile(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that stands still just when the build is given up: the timer has run out again before it is stopped."""

    def late(kind: str, error: str) -> BuildFailed:
        time.sleep(5 * builder_process.PULSE_S)
        return BuildFailed(kind, error)

    monkeypatch.setattr(builder_process, "PULSE_S", 0.02)
    monkeypatch.setattr(builder_process, "BuildFailed", late)
    with silent_registry() as address:
        assert node.failed(f"{address}/a", time_max_s=0.1).kind == "bounds"


@pytest.mark.parametrize("full", ["cache", "archives"])
def test_a_full_disk(full: str, repository: Repository, node: Node) -> None:
    files = [member(f"f{number}", BIG[number : number + 20_000]) for number in range(300)]
    repository.push(tar(*files, *(symlink(f"{'s' * 200}{number}", "x" * 1800) for number in range(1000))))
    where = getattr(node, full)
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1536k", "none", str(where)], check=True)
    try:
        failed = node.failed(repository.reference())
        assert failed.kind == "disk_full"
        assert "no space" in failed.error
    finally:
        subprocess.run(["umount", str(where)], check=True)
    assert node.built(repository.reference()).objects == 300


# What is here already


def test_the_known_digest_is_only_resolved(repository: Repository, node: Node) -> None:
    repository.push(tar(member("a", b"1")))
    built = node.built(repository.reference())
    assert node.build(repository.reference(), known_digest=built.digest) == Resolved(built.digest)
    moved = repository.push(tar(member("a", b"2")))
    again = node.built(repository.reference(), known_digest=built.digest)
    assert again.digest == moved["digest"] != built.digest


def test_what_is_here_whole_is_not_fetched_again_and_by_its_digest_not_even_asked_for(tmp_path: Path, node: Node) -> None:
    (tmp_path / "registry").mkdir()
    registry = RunningRegistry(tmp_path / "registry")
    try:
        repository = registry.repository("a")
        repository.push(tar(member("a", BIG)))
        built = node.built(repository.reference())
        assert built.layer_bytes > 0
        again = node.built(repository.reference())
        assert (again.digest, again.archive, again.objects, again.unpacked_bytes) == (built.digest, built.archive, 1, len(BIG))
        assert again.layer_bytes == 0
    finally:
        registry.stop()
    pinned = f"{repository.reference().removesuffix(':latest')}@{built.digest}"
    assert node.built(pinned).layer_bytes == 0
    assert node.build(pinned, known_digest=built.digest) == Resolved(built.digest)
    with socket.socket() as nobody:  # has its port now, which might else be given to another server
        nobody.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        nobody.bind(("127.0.0.1", int(registry.address.rpartition(":")[2])))
        failed = node.build(repository.reference())
    assert isinstance(failed, BuildFailed)
    assert failed.kind == "unreachable"


def test_an_archive_from_another_daemon_is_completed_with_content(repository: Repository, tmp_path: Path) -> None:
    repository.push(tar(member("a", BIG), member("b", b"1")))
    first = Node(tmp_path / "first", tmp_path / "shared")
    second = Node(tmp_path / "second", tmp_path / "shared")
    built = first.built(repository.reference())
    before = Path(built.archive).read_bytes()
    again = second.built(repository.reference())
    assert again == built
    assert Path(built.archive).read_bytes() == before
    with mounted(again, second, tmp_path) as root:
        assert (root / "a").read_bytes() == BIG
    second.objects()[0].unlink()
    assert second.built(repository.reference()).layer_bytes > 0
    assert len(second.objects()) == 2


def test_an_archive_from_another_daemon_suffices_who_mounts_lazily(repository: Repository, tmp_path: Path) -> None:
    repository.push(tar(member("a", BIG), member("b", b"1")))
    first = Node(tmp_path / "first", tmp_path / "shared")
    second = Node(tmp_path / "second", tmp_path / "shared")
    built = first.built(repository.reference(), lazy=True)
    assert built.complete
    again = second.built(repository.reference(), lazy=True)
    assert (again.archive, again.layer_bytes, again.complete) == (built.archive, 0, False)
    assert second.objects() == []
    # By its digest not even the registry is asked.
    pinned = f"{repository.reference().rpartition(':')[0]}@{built.digest}".replace(repository.registry.address, "127.0.0.1:1")
    assert second.built(pinned, lazy=True) == again
    assert first.built(repository.reference(), lazy=True).complete


def test_a_damaged_archive_is_replaced(repository: Repository, node: Node) -> None:
    repository.push(tar(member("a", b"1")))
    built = node.built(repository.reference())
    good = Path(built.archive).read_bytes()
    Path(built.archive).write_bytes(good[:-1])
    assert node.built(repository.reference()).layer_bytes > 0
    assert Path(built.archive).read_bytes() == good


def test_two_builders_of_one_image_do_not_disturb_each_other(repository: Repository, node: Node) -> None:
    repository.push(tar(*(member(f"f{number}", BIG[number:][:50_000]) for number in range(100))))
    builders = [Builder(node.order(repository.reference())) for _ in range(3)]
    answers = [builder.messages()[-1] for builder in builders]
    assert all(isinstance(answer, Built) for answer in answers)
    assert [path.name.startswith("sha256-") for path in node.archives.iterdir()] == [True]
    node.check_objects()


# The process


class Throttle:
    """A TCP proxy that lets through so many bytes a second, as long as it is not told to hold."""

    def __init__(self, to: str, bytes_per_s: float) -> None:
        self._to = to.rsplit(":", 1)
        self._pause_s = 16384 / bytes_per_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((self._to[0], int(self._to[1])))
                threading.Thread(target=self._copy, args=(client, server, 0.0), daemon=True).start()
                threading.Thread(target=self._copy, args=(server, client, self._pause_s), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, pause_s: float) -> None:
        with contextlib.suppress(OSError), source, target:
            while data := source.recv(16384):
                target.sendall(data)
                time.sleep(pause_s * len(data) / 16384)
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def slow(registry: RunningRegistry) -> Iterator[Throttle]:
    proxy = Throttle(registry.address, 3e6)
    yield proxy
    proxy.close()


def test_progress_is_told_a_few_times_a_second_and_only_grows(repository: Repository, slow: Throttle, node: Node) -> None:
    repository.push(tar(member("a", BIG)), tar(member("b", BIG[::-1])))
    total = len(gzip.compress(tar(member("a", BIG)), 1, mtime=0)) + len(gzip.compress(tar(member("b", BIG[::-1])), 1, mtime=0))
    begun = time.monotonic()
    *progress, built = Builder(node.order(f"{slow.address}/{repository.name}")).messages()
    assert isinstance(built, Built)
    assert built.layer_bytes == total
    reading = [told for told in progress if isinstance(told, Progress) and told.phase == "reading layers"]
    assert 3 < len(progress) <= (time.monotonic() - begun) * 4 + 1
    assert len(reading) > 2
    done = [told.bytes_done for told in reading]
    assert done == sorted(done)
    assert {(told.layers, told.bytes_total) for told in reading} == {(2, total)}
    assert {told.layer for told in reading} <= {1, 2}


def test_it_ends_when_nobody_listens_any_more_also_while_it_waits(node: Node) -> None:
    with silent_registry() as address:
        builder = Builder(node.order(f"{address}/a"))
        builder.channel.receive(TIMEOUT_S)
        begun = time.monotonic()
        assert builder.wait() == 0
        assert time.monotonic() - begun < 120  # the registry is asked for longer


def test_a_kill_at_any_instant_leaves_whole_objects_and_the_next_build_completes(repository: Repository, node: Node) -> None:
    files = [member(f"d{number % 7}/f{number}", BIG[number:][: number * 37]) for number in range(400)]
    repository.push(tar(*files, member("big", BIG)))
    begun = time.monotonic()
    reference = repository.reference()
    node.built(reference)
    whole_s = time.monotonic() - begun
    expected = {path.name for path in node.objects()}
    for share in range(1, 13):
        shutil.rmtree(node.cache)
        shutil.rmtree(node.archives)
        builder = Builder(node.order(reference))
        # Not a wait for something: a kill at an instant that nobody chose.
        time.sleep(whole_s * share / 12)
        os.kill(builder.pid, signal.SIGKILL)
        builder.wait()
        if node.cache.exists():
            node.check_objects()
        if node.archives.exists():
            for path in node.archives.iterdir():
                assert path.name.startswith(".") or Archive.open(str(path)).info.objects == len(expected)
                # What an archive counts on is there.
                assert path.name.startswith(".") or {path.name for path in node.objects()} == expected
        node.built(reference)
        assert {path.name for path in node.objects()} == expected
        assert len(list(node.archives.iterdir())) == 1
