"""What a bundle says, without a container; what containers make of it is in test_conmon."""

from __future__ import annotations

import base64
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.image.messages import ImageConfig
from actors.sandbox import bundle
from actors.sandbox.bundle import BundleError, Filter, Limits, Task

SECTION = {"defaultAction": "SCMP_ACT_ERRNO"}


def image(env: list[str] | None = None, entrypoint: list[str] | None = None, command: list[str] | None = None) -> ImageConfig:
    return ImageConfig(env=env or [], entrypoint=entrypoint or [], command=command or [])


def task(directory: Path = Path("/bundle"), limits: Limits | None = None) -> Task:
    return Task(
        hostname="host", image=image(), command=("/bin/true", "x"), env={"SECRET": "s"}, limits=limits or Limits(), bundle=directory,
        root=Path("/root"), workspace=Path("/ws"), cgroup="/aerie/task",
    )  # fmt: skip


def configuration(limits: Limits | None = None, **changes: int) -> dict[str, Any]:
    return bundle.configuration(replace(task(limits=limits), **changes), Filter(SECTION))


# --- the command line ---


@pytest.mark.parametrize(
    ("entrypoint", "command_of_image", "command", "expected"),
    [
        ([], [], ["a", "b"], ["a", "b"]),
        ([], ["c", "d"], ["a"], ["a"]),
        ([], ["c", "d"], [], ["c", "d"]),
        (["e", "f"], [], ["a"], ["e", "f", "a"]),
        (["e"], ["c"], ["a"], ["e", "a"]),
        (["e"], ["c"], [], ["e", "c"]),
        (["e"], [], [], ["e"]),
    ],
)
def test_entrypoint_and_command(
    entrypoint: list[str], command_of_image: list[str], command: list[str], expected: list[str]
) -> None:
    assert bundle.arguments(image(entrypoint=entrypoint, command=command_of_image), command) == expected


@pytest.mark.parametrize("command", [[], [""]])
def test_nothing_to_run(command: list[str]) -> None:
    with pytest.raises(BundleError, match="no command"):
        bundle.arguments(image(), command)


@pytest.mark.parametrize(
    ("argument", "why"),
    [("a\0b", "NUL"), ("\udc80", "UTF-8"), ("x" * (128 << 10), "fewer than 131072"), ("é" * (64 << 10), "fewer than 131072")],
)
def test_arguments_that_nothing_can_take(argument: str, why: str) -> None:
    with pytest.raises(BundleError, match=why):
        bundle.arguments(image(), ["/bin/true", argument])
    with pytest.raises(BundleError, match=why):
        bundle.environment(image(), {"NAME": argument})


def test_a_refused_variable_is_not_shown() -> None:
    with pytest.raises(BundleError, match="TOKEN") as caught:
        bundle.environment(image(), {"TOKEN": "secret\0"})
    assert "secret" not in str(caught.value)


# --- the environment ---


def test_whose_variable_wins() -> None:
    from_image = image(env=["PATH=/image", "HOME=/image", "A=image", "B=image", "EMPTY=", "BARE"])
    assert bundle.environment(from_image, {"A": "task", "C": "x=y"}) == [
        "PATH=/image", "HOME=/workspace", "A=task", "B=image", "EMPTY=", "BARE=", "C=x=y",
    ]  # fmt: skip


def test_an_image_without_a_path_and_a_task_with_a_home() -> None:
    assert bundle.environment(image(), {"HOME": "/tmp"}) == [f"PATH={bundle.DEFAULT_PATH}", "HOME=/tmp"]


@pytest.mark.parametrize("name", ["", "A=B", "A\0"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(BundleError):
        bundle.environment(image(), {name: "x"})


@given(
    st.dictionaries(
        st.text(st.characters(exclude_characters="=\0", exclude_categories=["Cs"]), min_size=1),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    )
)
def test_a_tasks_variables_are_there_exactly(env: dict[str, str]) -> None:
    merged = dict(entry.split("=", 1) for entry in bundle.environment(image(env=["A=image"]), env))
    assert {name: merged[name] for name in env} == env


# --- the configuration ---


def test_who_runs_it_and_with_what() -> None:
    process = configuration()["process"]
    assert (process["user"]["uid"], process["user"]["gid"], process["cwd"], process["terminal"]) == (
        1000,
        1000,
        "/workspace",
        False,
    )
    assert "additionalGids" not in process["user"]
    assert process["noNewPrivileges"] is True
    assert process["capabilities"] == {kind: [] for kind in ("bounding", "effective", "inheritable", "permitted", "ambient")}
    assert process["rlimits"] == [{"type": "RLIMIT_CORE", "hard": 0, "soft": 0}]


@pytest.mark.parametrize(("files_max", "soft"), [(1 << 20, 1024), (1024, 1024), (500, 500)])
def test_descriptors_are_as_many_as_this_host_lets_it_have(files_max: int, soft: int) -> None:
    limits = {limit["type"]: limit for limit in configuration(files_max=files_max)["process"]["rlimits"]}
    assert (limits["RLIMIT_NOFILE"]["hard"], limits["RLIMIT_NOFILE"]["soft"]) == (files_max, soft)


@pytest.mark.parametrize(("own", "given"), [(0, 0), (200, 200), (-900, 0)])
def test_a_daemon_that_the_oom_killer_spares_does_not_hand_that_on(own: int, given: int) -> None:
    assert configuration(oom_score_adj=own)["process"]["oomScoreAdj"] == given


def test_isolation() -> None:
    linux = configuration()["linux"]
    assert {entry["type"] for entry in linux["namespaces"]} == {"pid", "mount", "ipc", "uts", "network", "cgroup"}
    assert all("path" not in entry for entry in linux["namespaces"])
    assert linux["cgroupsPath"] == "/aerie/task"
    assert linux["resources"]["devices"] == [{"allow": False, "access": "rwm"}]
    assert "devices" not in linux
    assert {"/proc/kcore", "/proc/keys", "/sys/firmware"} <= set(linux["maskedPaths"])
    assert {"/proc/sys", "/proc/sysrq-trigger"} <= set(linux["readonlyPaths"])


def test_mounts() -> None:
    mounts = {mount["destination"]: mount for mount in configuration(Limits(memory_bytes=64 << 20))["mounts"]}
    assert set(mounts) == {
        "/proc",
        "/dev",
        "/dev/pts",
        "/dev/shm",
        "/sys",
        "/tmp",
        "/workspace",
        "/etc/hosts",
        "/etc/resolv.conf",
    }
    assert mounts["/workspace"] == {
        "destination": "/workspace",
        "type": "bind",
        "source": "/ws",
        "options": ["bind", "rw", "nosuid", "nodev"],
    }
    assert f"size={32 << 20}" in mounts["/tmp"]["options"]
    assert f"size={16 << 20}" in mounts["/dev/shm"]["options"]
    assert "ro" in mounts["/sys"]["options"]
    for name in ("/etc/hosts", "/etc/resolv.conf"):
        assert {"bind", "ro", "nosuid", "nodev"} <= set(mounts[name]["options"])
    assert all("nosuid" in mount["options"] for mount in mounts.values())


@pytest.mark.parametrize(
    ("cpu_cores", "quota", "shares"),
    [(1, 100_000, 1024), (0.5, 50_000, 512), (2.25, 225_000, 2304), (0.001, 1_000, 2), (0.0333, 3_330, 34)],
)
def test_cpu(cpu_cores: float, quota: int, shares: int) -> None:
    assert configuration(Limits(cpu_cores=cpu_cores))["linux"]["resources"]["cpu"] == {
        "quota": quota,
        "period": 100_000,
        "shares": shares,
    }


def test_memory_without_swap_and_pids() -> None:
    resources = configuration(Limits(memory_bytes=1 << 30, pids=7))["linux"]["resources"]
    assert (resources["memory"], resources["pids"]) == ({"limit": 1 << 30, "swap": 1 << 30}, {"limit": 7})


def test_defaults_are_the_interfaces() -> None:
    assert Limits() == Limits(memory_bytes=512 << 20, cpu_cores=1.0, pids=1024)


def test_the_filter_is_there_in_both_forms() -> None:
    both = bundle.configuration(task(), Filter(SECTION, b"program"))
    assert both["linux"]["seccomp"] == SECTION
    assert base64.b64decode(both["annotations"]["run.oci.seccomp_bpf_data"]) == b"program"
    assert "annotations" not in configuration()


# --- the files ---


def test_a_written_bundle(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        bundle.write(task(tmp_path), Filter(SECTION))
    finally:
        os.umask(before)
    modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in tmp_path.iterdir()}
    assert modes == {"config.json": 0o600, "hosts": 0o644, "resolv.conf": 0o644}
    assert json.loads((tmp_path / "config.json").read_text()) == bundle.configuration(task(tmp_path), Filter(SECTION))
    assert (tmp_path / "hosts").read_text().startswith("127.0.0.1\tlocalhost host\n")
    assert bundle.command_in(tmp_path) == "/bin/true"


def test_a_bundle_that_was_there_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("x" * 100_000)
    (tmp_path / "config.json").chmod(0o644)
    bundle.write(task(tmp_path), Filter(SECTION))
    assert stat.S_IMODE((tmp_path / "config.json").stat().st_mode) == 0o600
    assert bundle.command_in(tmp_path) == "/bin/true"


def test_a_link_in_the_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        bundle.write(task(tmp_path), Filter(SECTION))
