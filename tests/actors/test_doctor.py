from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.doctor import file_system_of, missing_parts
from actors.settings import Settings, parse

PROGRAM = Path(__file__).resolve().parents[2] / "run.py"
DOCTOR_TIMEOUT_S = 300.0  # to unmount an overlay, the kernel writes out all that its disk has to write

MOUNTINFO = r"""
1 0 8:1 / / rw - ext4 /dev/root rw
2 1 0:20 / /run rw - tmpfs tmpfs rw
3 1 0:21 / /var/lib/docker\040data rw - xfs /dev/sdb rw
4 2 0:22 / /run/over rw - overlay overlay rw
5 4 0:23 / /run/over rw - btrfs /dev/sdc rw
""".strip()


OVERLAY_SCRIPT = """
cd "$1" && mkdir lower upper work merged
mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged
AERIE_STATE_DIR="$1/merged/state" AERIE_RUN_DIR="$1/run" exec "$2" "$3" doctor
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return parse({}, {"AERIE_STATE_DIR": f"{tmp_path}/state", "AERIE_RUN_DIR": f"{tmp_path}/run"})


@pytest.fixture
def bare(tmp_path: Path) -> str:
    """A PATH that has nothing of the daemon's; but what knows which modules the kernel has, for nobody may have loaded them yet."""
    directory = tmp_path / "bare"
    directory.mkdir()
    if modprobe := shutil.which("modprobe"):
        (directory / "modprobe").symlink_to(modprobe)
    return str(directory)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/var/lib/aerie", "ext4"),
        ("/runner", "ext4"),
        ("/run", "tmpfs"),
        ("/run/aerie", "tmpfs"),
        ("/var/lib/docker data/x", "xfs"),
        ("/run/over/x", "btrfs"),  # mounted over the overlay
    ],
)
def test_the_file_system_a_path_lies_on(path: str, kind: str) -> None:
    assert file_system_of(path, MOUNTINFO) == kind


def test_nothing_is_missing_on_a_host_that_runs_these_tests(settings: Settings) -> None:
    assert missing_parts(settings) == []


def test_every_missing_part_is_named_with_its_cure(settings: Settings, monkeypatch: pytest.MonkeyPatch, bare: str) -> None:
    monkeypatch.setenv("PATH", bare)
    missing = missing_parts(settings)
    assert [part.split(":")[0] for part in missing] == ["conmon", "runtime crun"]
    assert all("apt-get install" in part for part in missing)


def test_only_the_runtime_of_tasks_that_name_none_is_required(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bare: str
) -> None:
    monkeypatch.setenv("PATH", bare)
    given = {"AERIE_STATE_DIR": f"{tmp_path}/state", "AERIE_SANDBOX_RUNTIME": "gvisor"}
    assert [part.split(":")[0] for part in missing_parts(parse({}, given))] == ["conmon", "runtime gvisor"]


@pytest.mark.parametrize("version", ["conmon version 1.9.0", "conmon version 2.1.5", "nonsense", ""])
def test_a_conmon_that_is_too_old_or_silent_is_missing(
    version: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "conmon"
    fake.write_text(f"#!/bin/sh\necho '{version}'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (part,) = missing_parts(settings)
    assert part.startswith("conmon: ")


def test_a_runtime_that_fails_is_missing(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "crun"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (part,) = missing_parts(settings)
    assert part.startswith("runtime crun: does not tell its version")


def test_a_state_directory_on_a_tmpfs_is_a_fault(tmp_path: Path) -> None:
    # /dev/shm is a tmpfs on every Linux host.
    given = {"AERIE_STATE_DIR": "/dev/shm/aerie-test", "AERIE_RUN_DIR": f"{tmp_path}/run"}
    (part,) = missing_parts(parse({}, given))
    assert "tmpfs" in part
    assert "AERIE_STATE_DIR" in part


# --- the command ---


def run_doctor(tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {"AERIE_STATE_DIR": f"{tmp_path}/state", "AERIE_RUN_DIR": f"{tmp_path}/run"}
    argv = [sys.executable, str(PROGRAM), "doctor", *options]
    return subprocess.run(
        argv, env={**os.environ, **own, **environment}, capture_output=True, text=True, timeout=DOCTOR_TIMEOUT_S, check=False
    )


def test_a_host_that_runs_these_tests_is_well_and_nothing_is_left(tmp_path: Path) -> None:
    done = run_doctor(tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert {line.split()[0] for line in done.stdout.splitlines()} <= {"ok", "absent"}
    assert list(tmp_path.iterdir()) == []
    assert "aerie-doctor-" not in Path("/proc/self/mountinfo").read_text()


def test_json_has_what_was_found_needed_and_the_cure(tmp_path: Path) -> None:
    findings: list[dict[str, Any]] = json.loads(run_doctor(tmp_path, "--json").stdout)
    assert all(set(finding) == {"part", "found", "needed", "ok", "cure", "required"} for finding in findings)
    # Everything was tried, not only looked at.
    assert {"layers", "fuse", "network namespace", "exit status"} <= {finding["part"] for finding in findings}


def test_a_missing_part_exits_1_and_the_rest_is_tried_all_the_same(tmp_path: Path, bare: str) -> None:
    done = run_doctor(tmp_path, PATH=bare)
    assert done.returncode == 1
    missing = [line for line in done.stdout.splitlines() if line.startswith("MISSING")]
    assert ["conmon" in line or "crun" in line for line in missing] == [True, True]
    assert "ok      layers: work" in done.stdout


def test_a_state_directory_on_an_overlay_is_found_by_trying(tmp_path: Path) -> None:
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", OVERLAY_SCRIPT, "sh", str(tmp_path), sys.executable, str(PROGRAM)],
        capture_output=True,
        text=True,
        timeout=DOCTOR_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert any(line.startswith("MISSING state directory") and "on overlay" in line for line in done.stdout.splitlines())
    assert any(line.startswith("MISSING layers") for line in done.stdout.splitlines())


def test_without_the_right_to_mount_it_says_so(tmp_path: Path) -> None:
    argv = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", sys.executable, str(PROGRAM), "doctor"]
    own = {"AERIE_STATE_DIR": f"{tmp_path}/state", "AERIE_RUN_DIR": f"{tmp_path}/run"}
    done = subprocess.run(
        argv, env={**os.environ, **own}, capture_output=True, text=True, timeout=DOCTOR_TIMEOUT_S, check=False
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "MISSING mount namespace" in done.stdout
