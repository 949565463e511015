"""Control groups: as texts for every kind of host, and for real on this one."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.sandbox import cgroup
from actors.sandbox.cgroup import Cgroup, Hierarchy, faults, hierarchies
from tests.actors.sandbox.conftest import TIMEOUT_S, Laboratory

V2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
TMPFS = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - tmpfs tmpfs rw,mode=755\n"
V1 = (
    "31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:5 - cgroup cgroup rw,cpu,cpuacct\n"
    "32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "33 30 0:29 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"
    "34 30 0:30 / /sys/fs/cgroup/systemd rw shared:8 - cgroup systemd rw,xattr,name=systemd\n"
)
UNIFIED = "35 30 0:31 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n"
ELSEWHERE = "36 24 0:27 / /mnt/memory rw - cgroup cgroup rw,memory\n"
ROOT = Path("/sys/fs/cgroup")


def test_a_v2_host() -> None:
    assert hierarchies(V2) == (Hierarchy(ROOT, True),)


def test_a_v1_host() -> None:
    found = hierarchies(TMPFS + V1 + ELSEWHERE)
    assert [hierarchy.root.name for hierarchy in found] == ["cpu,cpuacct", "memory", "pids", "systemd"]
    assert found[0].controllers == ("cpu", "cpuacct")
    assert not any(hierarchy.unified for hierarchy in found)


def test_a_hybrid_host() -> None:
    found = hierarchies(TMPFS + V1 + UNIFIED)
    assert [hierarchy.root for hierarchy in found if hierarchy.unified] == [ROOT / "unified"]
    assert len(found) == 5


def test_a_mount_over_another_counts_once() -> None:
    assert hierarchies(V2 + V2) == (Hierarchy(ROOT, True),)


@pytest.mark.parametrize(
    ("mountinfo", "self_cgroup", "unified", "plain", "words"),
    [
        (V2, "0::/\n", "cpuset cpu io memory hugetlb pids", [], []),
        (TMPFS + V1, "4:cpu,cpuacct:/\n3:memory:/\n", "", [], []),
        (TMPFS + V1 + UNIFIED, "9:name=systemd:/\n3:memory:/\n0::/\n", "", ["hugetlb"], []),
        (TMPFS + V1 + UNIFIED, "0::/\n", "hugetlb", [], ["mount -t cgroup -o hugetlb cgroup /sys/fs/cgroup/hugetlb"]),
        (TMPFS + V1 + UNIFIED, "0::/\n", "hugetlb misc", [], ["-o hugetlb", "-o misc"]),
        (TMPFS + V1 + UNIFIED, "10:hugetlb:/\n0::/\n", "", ["hugetlb"], ["rmdir /sys/fs/cgroup/hugetlb"]),
        (TMPFS + V1 + UNIFIED, "10:name=other:/\n0::/\n", "", ["other"], ["rmdir /sys/fs/cgroup/other"]),
        (TMPFS, "", "", [], ["mount -t cgroup2"]),
        ("", "", "", [], ["mount -t cgroup2"]),
        (V2, "0::/\n", "cpu pids", [], ["cgroup_disable=memory"]),
        (TMPFS + UNIFIED, "0::/\n", "", [], ["=memory", "=cpu", "=pids"]),
    ],
)
def test_faults_of_hosts(mountinfo: str, self_cgroup: str, unified: str, plain: list[str], words: list[str]) -> None:
    texts = faults(hierarchies(mountinfo), self_cgroup, unified, plain)
    assert len(texts) == len(words)
    for text, word in zip(texts, words, strict=True):
        assert word in text


def test_this_host_has_none() -> None:
    assert cgroup.host_faults() == []


# --- groups as directories of files, in a stand-in for the file system where this host has the other version ---


def stand_in(root: Path, unified: bool, files: dict[str, str]) -> Cgroup:
    (root / "task").mkdir(parents=True)
    for name, text in files.items():
        (root / "task" / name).write_text(text)
    return Cgroup("/task", [Hierarchy(root, unified, () if unified else ("memory",))])


def test_counters_of_v1(tmp_path: Path) -> None:
    group = stand_in(
        tmp_path,
        False,
        {"memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n", "memory.max_usage_in_bytes": "4096\n"},
    )
    assert (group.oom_kills(), group.peak_memory_bytes()) == (2, 4096)


def test_counters_of_v2(tmp_path: Path) -> None:
    group = stand_in(
        tmp_path,
        True,
        {"memory.events": "low 0\nhigh 0\nmax 9\noom 1\noom_kill 3\noom_group_kill 0\n", "memory.peak": "8192\n"},
    )
    assert (group.oom_kills(), group.peak_memory_bytes()) == (3, 8192)


def test_counters_that_are_not_there(tmp_path: Path) -> None:
    group = stand_in(tmp_path, True, {})
    assert (group.oom_kills(), group.peak_memory_bytes()) == (0, None)


def test_processes_below_count(tmp_path: Path) -> None:
    group = stand_in(tmp_path, True, {"cgroup.procs": "3\n5\n"})
    (tmp_path / "task" / "below").mkdir()
    (tmp_path / "task" / "below" / "cgroup.procs").write_text("7\n")
    assert group.processes() == {3, 5, 7}
    assert not group.is_empty()


# --- real groups ---


@pytest.fixture
def group() -> Iterator[Cgroup]:
    group = Cgroup(f"/aerie-test-cgroup-{os.getpid()}")
    for directory in group.directories:
        directory.mkdir()
        if (directory / "cpuset.mems").exists():  # v1: empty, and no process may enter
            for name in ("cpuset.cpus", "cpuset.mems"):
                (directory / name).write_text((directory.parent / name).read_text())
    try:
        yield group
    finally:
        group.kill(TIMEOUT_S)
        group.remove()
        assert not any(directory.exists() for directory in group.directories)


def inside(group: Cgroup, script: str, directories: list[Path]) -> subprocess.Popen[bytes]:
    """A shell that enters the group in these hierarchies, says so, and runs a script."""
    enter = "".join(f"echo $$ > {directory}/cgroup.procs; " for directory in directories)
    process = subprocess.Popen(["/bin/sh", "-c", f"{enter} echo entered; {script}"], stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"entered\n"
    return process


def test_a_group_that_is_not_there() -> None:
    group = Cgroup("/aerie-test-none")
    assert group.is_empty()
    assert (group.oom_kills(), group.peak_memory_bytes()) == (0, None)
    group.kill(TIMEOUT_S)
    group.remove()


def test_an_empty_group(group: Cgroup) -> None:
    assert group.is_empty()
    group.kill(TIMEOUT_S)


def test_processes_and_their_end(group: Cgroup) -> None:
    process = inside(group, "sleep 60 & sleep 60 & wait", group.directories)
    deadline = time.monotonic() + TIMEOUT_S
    while len(group.processes()) < 3:
        assert time.monotonic() < deadline
    assert process.pid in group.processes()
    with pytest.raises(OSError, match="busy"):
        group.remove()
    group.kill(TIMEOUT_S)
    process.communicate(timeout=TIMEOUT_S)
    assert group.is_empty()


def test_one_hierarchy_is_enough_not_to_be_empty(group: Cgroup) -> None:
    for directory in group.directories:
        process = inside(group, "exec sleep 60", [directory])
        assert group.processes() == {process.pid}
        group.kill(TIMEOUT_S)
        process.communicate(timeout=TIMEOUT_S)
        assert group.is_empty()


def test_processes_that_fork_all_the_time_do_not_escape(group: Cgroup) -> None:
    # The more there are the slower: this process may be kept from looking for a while.
    script = "i=0; while :; do sleep 60 & i=$((i+1)); [ $i -lt 300 ] || sleep 0.01; done"
    process = inside(group, script, group.directories)
    deadline = time.monotonic() + TIMEOUT_S
    while len(group.processes()) < 50:
        assert time.monotonic() < deadline
    group.kill(TIMEOUT_S)
    process.communicate(timeout=TIMEOUT_S)
    assert group.is_empty()


def test_without_v2_each_process_is_killed(group: Cgroup) -> None:
    process = inside(group, "sleep 60 & wait", group.directories)
    v1 = [hierarchy for hierarchy in cgroup.mounted() if not hierarchy.unified]
    Cgroup(group.path, v1 or [Hierarchy(cgroup.ROOT, False)]).kill(TIMEOUT_S)
    process.communicate(timeout=TIMEOUT_S)
    assert group.is_empty()


def test_a_kill_that_takes_too_long(group: Cgroup) -> None:
    process = inside(group, "exec sleep 60", group.directories)
    with pytest.raises(TimeoutError):
        group.kill(0)
    process.communicate(timeout=TIMEOUT_S)


def test_groups_below_are_removed_too(group: Cgroup) -> None:
    for directory in group.directories:
        (directory / "a" / "b").mkdir(parents=True)
    group.remove()
    assert not any(directory.exists() for directory in group.directories)


def test_expecting_moves_changes_nothing() -> None:
    before = Path("/proc/self/cgroup").read_text()
    cgroup.expect_moves()
    assert Path("/proc/self/cgroup").read_text() == before


def test_a_container_is_in_every_hierarchy(laboratory: Laboratory) -> None:
    for name in ("crun", "runc"):
        sandbox = laboratory.create(laboratory.runtime(name), "/bin/sleep", "60")
        assert sandbox.cgroup.processes() == {sandbox.created.container_pid}
        sandbox.start()
        sandbox.cgroup.kill(TIMEOUT_S)
        assert sandbox.cgroup.is_empty()
