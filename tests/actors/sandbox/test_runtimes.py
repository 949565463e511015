"""Finding runtimes, and what their messages mean."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from actors.sandbox import runtimes
from actors.sandbox.runtimes import Runtime, RuntimeMissing, create_error, exec_error


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("crun version 1.8.1\ncommit: f8a0\nspec: 1.0.0\n", "1.8.1"),
        ("runc version 1.1.5+ds1\ncommit: 1.1.5+ds1-1+deb12u1\n", "1.1.5+ds1"),
        ("runsc version release-20250820.0\nspec: 1.1.0-rc.1\n", "release-20250820.0"),
        ("runsc version 0.0~20221219.0\n", "0.0~20221219.0"),
    ],
)
def test_versions(text: str, version: str) -> None:
    assert runtimes.parse_version(text) == version


@pytest.mark.parametrize("text", ["", "usage: crun", "version 1"])
def test_no_version(text: str) -> None:
    with pytest.raises(ValueError, match="no version"):
        runtimes.parse_version(text)


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("crun", "1.8.1", ("--cgroup-manager=cgroupfs",)),
        ("runc", "1.1.5", ()),
        ("gvisor", "0.0~20221219.0", ("--platform=ptrace", "--network=none")),
        ("gvisor", "release-20230501.0", ("--platform=systrap", "--network=none")),
        ("gvisor", "release-20260101.0", ("--platform=systrap", "--network=none")),
        ("gvisor", "unknown", ("--platform=ptrace", "--network=none")),
    ],
)
def test_flags(name: str, version: str, expected: tuple[str, ...]) -> None:
    assert runtimes.flags(name, version) == expected


@pytest.mark.parametrize("name", ["crun", "runc", "gvisor"])
def test_a_runtime_that_is_missing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeMissing, match="apt-get install"):
        runtimes.find(name, tmp_path / "state")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("script", ["#!/bin/sh\necho no\n", "#!/bin/sh\nexit 1\n", "#!/no/such/interpreter\n"])
def test_a_runtime_that_tells_no_version(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crun").write_text(script)
    (tmp_path / "crun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeMissing, match="does not tell its version"):
        runtimes.find("crun", tmp_path / "state")


@pytest.mark.parametrize("name", ["crun", "runc"])
def test_a_runtime_that_is_there(name: str, tmp_path: Path) -> None:
    found = runtimes.find(name, tmp_path / "deep" / "state")
    assert (found.name, os.path.basename(found.path)) == (name, name)
    assert (tmp_path / "deep" / "state").is_dir()
    assert found.global_flags[:2] == ["--root", str(tmp_path / "deep" / "state")]
    done = subprocess.run([found.program, "--version"], pass_fds=found.descriptors, capture_output=True, text=True, check=True)
    assert found.version in done.stdout
    for descriptor in found.descriptors:
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)


def test_a_sealed_program_cannot_be_written(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho sealed\n")
    program.chmod(0o755)
    descriptor = runtimes.seal(str(program))
    assert descriptor is not None
    assert os.fstatvfs(descriptor).f_flag & os.ST_RDONLY
    with pytest.raises(OSError, match="Read-only"):
        os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY)
    assert (
        subprocess.run([f"/proc/self/fd/{descriptor}"], pass_fds=[descriptor], capture_output=True, check=True).stdout
        == b"sealed\n"
    )
    assert str(program) not in Path("/proc/self/mountinfo").read_text()
    os.close(descriptor)
    program.write_text("")  # the file itself can be written as ever


def test_what_cannot_be_sealed(tmp_path: Path) -> None:
    assert runtimes.seal(str(tmp_path / "none")) is None
    plain = Runtime("crun", "/usr/bin/crun", "1", tmp_path)
    assert (plain.program, plain.descriptors) == ("/usr/bin/crun", ())


def runc(message: str) -> str:
    quoted = message.replace('"', '\\"')
    return f'time="2026-11-24T09:12:28Z" level=error msg="runc create failed: unable to start container process: {quoted}"\n'


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("executable file `/x/cmd` not found in $PATH: No such file or directory\n", "not_found"),
        ("open executable: Not a directory\n", "not_found"),
        ("open executable: Permission denied\n", "not_executable"),
        ("open executable: Operation not permitted\n", "not_executable"),
        (runc('exec: "/x/cmd": stat /x/cmd: no such file or directory'), "not_found"),
        (runc('exec: "cmd": executable file not found in $PATH'), "not_found"),
        (runc('exec: "/x/cmd": permission denied'), "not_executable"),
        (runc('exec: "/x": is a directory'), "not_executable"),
        (runc("exec /x/cmd: permission denied"), "not_executable"),
        (runc('exec: "/x/cmd/y": stat /x/cmd/y: not a directory'), "not_found"),
        (
            "starting container: starting sandbox: creating process: failed to load /x/cmd: no such file or directory",
            "not_found",
        ),
        ("starting sandbox: creating process: failed to load /x/cmd: exec format error", "not_executable"),
        ('starting sandbox: error finding executable "cmd" in PATH [/bin]: no such file or directory', "not_found"),
        # what is not about the command, whatever the words
        ("mount `/ws` to `workspace`: No such file or directory\n", "other"),
        ('error mounting "/ws" to rootfs at "/workspace": stat /ws: no such file or directory', "other"),
        (runc('error during container init: error mounting "x" to rootfs: permission denied'), "other"),
        ("cgroups in hybrid mode not supported, drop all controllers from cgroupv2\n", "other"),
        ("container `x` already exists\n", "other"),
        ("", "other"),
    ],
)
def test_meanings(said: str, kind: str) -> None:
    error = create_error(said, "/x/cmd")
    assert error.kind == kind
    assert kind == "other" or "/x/cmd" in str(error)


def test_texts_for_people() -> None:
    said = 'time="2026-11-24T09:12:28Z" level=warning msg="first"\n' + runc('cannot set "x"')
    assert str(create_error(said, "c")).endswith(
        'could not be created: runc create failed: unable to start container process: cannot set "x"'
    )
    assert "does not say why" in str(create_error(" \n", "c"))


@pytest.mark.parametrize(
    ("stderr", "kind"),
    [
        ("exec container process `/bin/cmd`: Exec format error\n", "not_executable"),
        ("exec container process `/bin/cmd`: Permission denied\n", "not_executable"),
        ("exec container process (missing dynamic library?) `/bin/cmd`: No such file or directory\n", "not_found"),
        ("exec /bin/cmd: exec format error\n", "not_executable"),
        ("exec /bin/cmd: no such file or directory\n", "not_found"),
        ("", None),
        ("exec /bin/cmd: no such file or directory\nand more\n", None),
        ("first\nexec /bin/cmd: no such file or directory\n", None),
        ("exec /bin/other: no such file or directory\n", None),
        ("exec /bin/cmd: hello\n", None),
        ("exec /bin/cmd: no such file or directory", None),
    ],
)
def test_errors_told_in_the_tasks_place(stderr: str, kind: str | None) -> None:
    error = exec_error(stderr, "cmd")
    assert (error and error.kind) == kind
