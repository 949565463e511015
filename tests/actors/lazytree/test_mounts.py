from __future__ import annotations

import os
import select
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.lazytree import erofs, mounts


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for mount in mounts.mounts_below(str(tmp_path)):
        mounts.unmount(mount.target, lazily=True)
    assert mounts.mounts_below(str(tmp_path)) == []


def directory(path: Path) -> str:
    path.mkdir(parents=True)
    return str(path)


def write_meta(path: Path, root: erofs.Node) -> str:
    with open(path, "wb") as file:
        erofs.write(root, file)
    return str(path)


EMPTY = erofs.Node(stat.S_IFDIR | 0o755, children={})


@pytest.mark.parametrize("name", ["plain", "with space", "a,b", "a:b", "a::b", "a\\b", "a\\:b", "a\\134", 'quo"te', "é"])
def test_any_path_can_be_a_layer(home: Path, name: str) -> None:
    layers = [directory(home / f"{name}-{kind}") for kind in ("lower", "low", "data", "upper", "work", "target")]
    lower, low, data, upper, work, target = layers
    Path(lower, "a").write_text("lower")
    Path(low, "b").write_text("low")
    Path(data, "hidden").write_text("data")
    mounts.mount_overlay(target, [lower, low], [data], upper, work)
    assert sorted(os.listdir(target)) == ["a", "b"]
    Path(target, "a").write_text("changed")
    assert Path(upper, "a").read_text() == "changed" and Path(lower, "a").read_text() == "lower"
    [mount] = mounts.mounts_below(target)
    assert (mount.target, mount.kind, mount.source, mount.minor) == (
        target,
        "overlay",
        "aerie",
        os.minor(os.stat(target).st_dev),
    )
    mounts.unmount(target)


def test_hundreds_of_layers_need_no_page(home: Path) -> None:
    lower = [directory(home / f"{number:0100}") for number in range(100)]
    target = directory(home / "target")
    Path(lower[99], "deep").touch()
    mounts.mount_overlay(target, lower)
    assert os.listdir(target) == ["deep"]


def options_of(target: str) -> tuple[set[str], set[str]]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[4] == target:
            return set(fields[5].split(",")), set(fields[-1].split(","))
    raise AssertionError(target)


def test_options_are_the_design_s(home: Path) -> None:
    lower, upper, work, target = (directory(home / name) for name in ("lower", "upper", "work", "target"))
    mounts.mount_overlay(target, [lower], (), upper, work, volatile=True)
    _, options = options_of(target)
    assert {"rw", "redirect_dir=on", "metacopy=on"} <= options
    assert {"volatile", "fsync=volatile"} & options  # the kernel's word for it changed
    assert not {"userxattr", "index=on", "xino=on", "xino=auto"} & options
    mounts.unmount(target)
    mounts.mount_overlay(target, [lower, upper])
    flags, options = options_of(target)
    assert "ro" in flags and "ro" in options and "volatile" not in options
    with pytest.raises(OSError):
        Path(target, "x").touch()


def test_half_an_upper_is_refused(home: Path) -> None:
    for arguments in ({"upper": "/u"}, {"work": "/w"}, {"volatile": True}):
        with pytest.raises(ValueError):
            mounts.mount_overlay(str(home), ["/"], **arguments)  # type: ignore[arg-type]


def test_errors_name_the_culprit_and_say_what_the_kernel_said(home: Path) -> None:
    lower, target = directory(home / "lower"), directory(home / "target")
    with pytest.raises(FileNotFoundError, match="lowerdir\\+=.*missing"):
        mounts.mount_overlay(target, [lower, str(home / "missing")])
    with pytest.raises(FileNotFoundError):
        mounts.mount_overlay(str(home / "missing"), [lower, target])
    with pytest.raises(OSError, match="mount overlay aerie: Invalid argument"):
        mounts.mount_overlay(target, [lower])  # one layer alone is no overlay
    with pytest.raises(OSError, match="longer than 255"):
        mounts.mount_overlay(target, ["/" + "x" * 300])
    with pytest.raises(OSError, match="e overlay: .*garbage is not a directory"):
        Path(home, "garbage").touch()
        mounts.mount_overlay(target, [lower, str(home / "garbage")])
    Path(home, "garbage").write_bytes(bytes(8192))
    with pytest.raises(OSError, match="mount erofs .*garbage: Invalid argument"):
        mounts.mount_erofs(str(home / "garbage"), target)
    assert mounts.mounts_below(str(home)) == []


def test_erofs_is_mounted_from_the_file_without_a_loop_device(home: Path) -> None:
    image, target = write_meta(home / "meta.erofs", EMPTY), directory(home / "meta")
    mounts.mount_erofs(image, target)
    [mount] = mounts.mounts_below(target)
    assert (mount.kind, mount.source) == ("erofs", image)


def test_upper_has_what_the_root_of_meta_has(home: Path) -> None:
    root = erofs.Node(stat.S_IFDIR | 0o2751, 12, 34, 10**18 + 5, xattrs={b"user.a": b"b"}, children={})
    meta, target = directory(home / "meta"), directory(home / "target")
    mounts.mount_erofs(write_meta(home / "meta.erofs", root), meta)
    upper, work = str(home / "up" / "upper"), str(home / "up" / "work")
    mounts.make_upper(upper, work, meta)
    mounts.mount_overlay(target, [meta], (), upper, work)
    seen = os.stat(target)
    assert (seen.st_mode, seen.st_uid, seen.st_gid, seen.st_mtime_ns) == (root.mode, 12, 34, 10**18 + 5)
    assert os.getxattr(target, "user.a") == b"b"


def test_unmount_of_what_is_not_mounted_is_no_error(home: Path) -> None:
    mounts.unmount(str(home))
    mounts.unmount(str(home / "missing"), lazily=True)


def test_a_busy_mount_is_an_error_or_goes_lazily(home: Path) -> None:
    target = directory(home / "target")
    mounts.bind(directory(home / "source"), target)
    with open(os.path.join(target, "file"), "w"):
        with pytest.raises(OSError) as raised:
            mounts.unmount(target)
        assert raised.value.filename == target
        mounts.unmount(target, lazily=True)
    assert mounts.mounts_below(str(home)) == []


def test_mounts_come_in_the_order_in_which_they_can_go(home: Path) -> None:
    source, outer = directory(home / "source"), directory(home / "a b\tc\\d")
    directory(home / "source" / "inner")
    mounts.bind(source, outer)
    mounts.bind(source, f"{outer}/inner")
    mounts.bind(source, f"{outer}/inner")
    mounts.bind(directory(home / "a b\tc\\d2"), str(home / "a b\tc\\d2"))
    found = [mount.target for mount in mounts.mounts_below(outer)]
    assert found == [f"{outer}/inner", f"{outer}/inner", outer]
    for target in found:
        mounts.unmount(target)
    assert mounts.mounts_below(outer) == []


def test_the_order_is_by_depth_then_by_age() -> None:
    lines = [
        b"90 1 0:40 / /run/t/meta ro - erofs /x ro\n",
        b"91 1 0:51 / /run/t rw shared:1 master:2 - overlay aerie rw,lowerdir+=/a\n",
        b"92 1 0:52 / /run/t2 rw - tmpfs none rw\n",
        b"93 1 0:53 / /run/t/meta rw - fuse a\\040b rw\n",
        b"94 1 8:1 /sub /run/t/a\\134\\012 rw - ext4 /dev/sda rw\n",
    ]
    assert mounts.select_below(lines, "/run/t") == [
        mounts.Mount("/run/t/a\\\n", "ext4", "/dev/sda", 1),
        mounts.Mount("/run/t/meta", "fuse", "a b", 53),
        mounts.Mount("/run/t/meta", "erofs", "/x", 40),
        mounts.Mount("/run/t", "overlay", "aerie", 51),
    ]
    assert len(mounts.select_below(lines, "/")) == 5


def test_a_fuse_connection_is_tuned_and_aborted(home: Path) -> None:
    target = directory(home / "lazy")
    descriptor = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        fuse = mounts.mount_fuse(target, descriptor)
        assert int.from_bytes(fuse.init_request[4:8], "little") == 26  # FUSE_INIT
        mounts.tune_fuse(fuse.minor, 700, 600, 512)
        connection = Path(f"/sys/fs/fuse/connections/{fuse.minor}")
        assert (connection / "max_background").read_text() == "700\n"
        assert (connection / "congestion_threshold").read_text() == "600\n"
        assert Path(f"/sys/class/bdi/0:{fuse.minor}/read_ahead_kb").read_text() == "512\n"
        mounts.abort_fuse(target, fuse.minor)
        with pytest.raises(OSError):
            os.listdir(target)  # and not for ever waiting for a server
        mounts.unmount(target)
        mounts.abort_fuse(target, fuse.minor)
    finally:
        os.close(descriptor)


def test_a_fuse_connection_that_is_gone_takes_no_other_with_it(home: Path) -> None:
    """The next mount has its number."""
    target, other = directory(home / "lazy"), directory(home / "other")
    descriptors = [os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC) for _ in range(2)]
    gone = mounts.mount_fuse(target, descriptors[0])
    mounts.unmount(target)
    mounts.mount_fuse(other, descriptors[1])
    try:
        mounts.abort_fuse(target, gone.minor)
        connection = select.poll()
        connection.register(descriptors[1], 0)
        assert not connection.poll(0), "it is in no error"
    finally:
        mounts.unmount(other)
        for descriptor in descriptors:
            os.close(descriptor)
