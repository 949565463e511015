"""Containers by conmon with crun and runc, and with runsc where there is one."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
from pathlib import Path

import pytest

from actors.sandbox import bundle, conmon
from actors.sandbox.conmon import Container, Created
from actors.sandbox.runtimes import ContainerError, CreateError, Runtime, exec_error
from supervisor.pidfd import has_ended, pid_of, wait_status
from tests.actors.sandbox.conftest import TIMEOUT_S, Laboratory, wait_for


def shell(script: str) -> tuple[str, str, str]:
    return "/bin/sh", "-c", script


# --- how it ends ---


@pytest.mark.parametrize("code", [0, 1, 7, 139, 255])
def test_exit_codes(laboratory: Laboratory, runtime: Runtime, code: int) -> None:
    assert laboratory.run(runtime, *shell(f"exit {code}"))[0] == code


def test_a_signal_is_not_an_exit_code_above_128(laboratory: Laboratory, runtime: Runtime) -> None:
    assert laboratory.run(runtime, "/bin/segfault")[0] == -signal.SIGSEGV


def test_a_killed_first_process(laboratory: Laboratory, runtime: Runtime) -> None:
    sandbox = laboratory.create(runtime, "/bin/sleep", "60")
    sandbox.start()
    os.kill(sandbox.created.container_pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(sandbox.finish()) == -signal.SIGKILL


def test_both_streams(laboratory: Laboratory, runtime: Runtime) -> None:
    _, sandbox = laboratory.run(runtime, *shell("echo out; echo err >&2; echo again; printf partial"))
    assert (sandbox.stdout, sandbox.stderr) == ("out\nagain\npartial", "err\n")


# --- what a task finds ---


def test_user_directory_and_environment(laboratory: Laboratory, runtime: Runtime) -> None:
    script = "id -u; id -g; id -G; pwd; hostname; echo $HOME $PATH $OF $BY; stat -c %u:%g /workspace; umask; readlink /proc/self/fd/0; cat"
    _, sandbox = laboratory.run(runtime, *shell(script), env={"BY": "task"})
    assert sandbox.stdout.splitlines() == [
        "1000", "1000", "1000", "/workspace", "task-host", "/workspace /bin image task", "1000:1000", "0022", "/dev/null",
    ]  # fmt: skip


def test_no_privileges(laboratory: Laboratory, runtime: Runtime) -> None:
    _, sandbox = laboratory.run(runtime, *shell("cat /proc/self/status"))
    status = dict(line.split(":\t", 1) for line in sandbox.stdout.splitlines())
    assert {name: status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == dict.fromkeys(
        ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), "0" * 16
    )
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


@pytest.mark.parametrize(
    "forbidden",
    [
        "echo x > /proc/sys/kernel/core_pattern",
        "echo x > /proc/sysrq-trigger",
        "echo x > /sys/kernel/uevent_helper",
        "echo x > /etc/hosts",
        "echo x > /bin/new",
        "mknod /tmp/disk b 8 0",
        "mknod /workspace/memory c 1 1",
        "unshare -U true",
        "unshare -m true",
        "mount -t tmpfs none /tmp",
        "umount /tmp",
        "chroot / true",
        "hostname other",
        "ip link add dummy0 type dummy",
        "dmesg",
        "head -c1 /proc/kcore",
    ],
)
def test_what_is_refused(laboratory: Laboratory, runtime: Runtime, forbidden: str) -> None:
    code, sandbox = laboratory.run(runtime, *shell(forbidden))
    assert code != 0
    assert sandbox.stderr != ""


def test_masked_files_are_empty(laboratory: Laboratory, runtime: Runtime) -> None:
    _, sandbox = laboratory.run(runtime, *shell("cat /proc/keys /proc/timer_list /proc/interrupts; ls -A /sys/firmware"))
    assert sandbox.stdout == ""


def test_only_loopback_and_it_is_up(laboratory: Laboratory, runtime: Runtime) -> None:
    _, sandbox = laboratory.run(
        runtime, *shell("ls /sys/class/net; cat /sys/class/net/lo/flags; ping -c1 -W1 localhost | tail -n2; nc -w1 10.0.0.1 80")
    )
    names = sandbox.stdout.splitlines()
    assert names[0] == "lo"
    assert int(names[1], 16) & 1  # IFF_UP
    assert "unreachable" in sandbox.stderr


def test_names(laboratory: Laboratory, runtime: Runtime) -> None:
    _, sandbox = laboratory.run(runtime, *shell("cat /etc/hosts /etc/resolv.conf"))
    assert sandbox.stdout == bundle.hosts("task-host") + bundle.RESOLV_CONF_TEXT


def test_places_to_write(laboratory: Laboratory, runtime: Runtime) -> None:
    limits = bundle.Limits(memory_bytes=64 << 20)
    script = (
        "for place in /tmp /dev/shm /workspace; do echo x > $place/x && stat -c %a:%A $place && chmod 755 $place/x; done;"
        "cp /bin/busybox /tmp/echo; /tmp/echo runs;"
        "dd if=/dev/zero of=/tmp/full bs=1M count=40 2>&1 | grep -o 'No space.*'"
    )
    _, sandbox = laboratory.run(runtime, *shell(script), limits=limits)
    lines = sandbox.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["1777", "1777"]
    assert lines[3:] == ["runs", "No space left on device"]
    assert (sandbox.workspace / "x").stat().st_uid == bundle.UID


def test_an_image_whose_tmp_is_not_for_everybody(laboratory: Laboratory, runtime: Runtime) -> None:
    (laboratory.root / "tmp").chmod(0o755)
    try:
        code, _ = laboratory.run(runtime, *shell("echo x > /tmp/x"))
    finally:
        (laboratory.root / "tmp").chmod(0o1777)
    assert code == 0


def test_devices(laboratory: Laboratory, runtime: Runtime) -> None:
    _, sandbox = laboratory.run(
        runtime, *shell("find /dev -type b; find /dev -type c | sort; echo x > /dev/null; head -c2 /dev/zero | wc -c")
    )
    assert sandbox.stdout.splitlines() == [
        "/dev/full", "/dev/null", "/dev/pts/ptmx", "/dev/random", "/dev/tty", "/dev/urandom", "/dev/zero", "2",
    ]  # fmt: skip


def test_the_host_is_not_seen(laboratory: Laboratory, runtime: Runtime) -> None:
    _, sandbox = laboratory.run(runtime, *shell("ls /proc | grep -c '^[0-9]'; cat /proc/self/cgroup; ls -l /proc/self/fd; env"))
    text = sandbox.stdout
    assert int(text.splitlines()[0]) <= 4
    assert laboratory.parent not in text and str(laboratory.home) not in text
    assert "AERIE" not in text and "attempt" not in text


# --- limits ---


def test_memory_limit(laboratory: Laboratory, runtime: Runtime) -> None:
    code, sandbox = laboratory.run(runtime, "/bin/tail", "/dev/zero", limits=bundle.Limits(memory_bytes=32 << 20))
    assert code == -signal.SIGKILL
    assert sandbox.cgroup.oom_kills() == 1
    peak_bytes = sandbox.cgroup.peak_memory_bytes()
    # The kernel goes over a limit by what it must not fail to get for itself (__GFP_NOFAIL).
    assert peak_bytes is not None and 24 << 20 < peak_bytes < 36 << 20


def test_a_child_that_is_out_of_memory_is_counted(laboratory: Laboratory, runtime: Runtime) -> None:
    code, sandbox = laboratory.run(runtime, *shell("tail /dev/zero; exit 0"), limits=bundle.Limits(memory_bytes=32 << 20))
    assert (code, sandbox.cgroup.oom_kills()) == (0, 1)


def test_pids_limit(laboratory: Laboratory, runtime: Runtime) -> None:
    script = "for i in 1 2 3 4 5 6 7 8 9; do sleep 60 & done"
    code, sandbox = laboratory.run(runtime, *shell(script), limits=bundle.Limits(pids=6))
    assert code != 0
    assert "fork" in sandbox.stderr


def test_cpu_limit_and_no_swap(laboratory: Laboratory, runtime: Runtime) -> None:
    sandbox = laboratory.create(runtime, "/bin/true", limits=bundle.Limits(memory_bytes=64 << 20, cpu_cores=0.25))
    seen = {
        name: (directory / name).read_text().strip()
        for directory in sandbox.cgroup.directories
        for name in ("cpu.cfs_quota_us", "cpu.max", "memory.memsw.limit_in_bytes", "memory.swap.max")
        if (directory / name).exists()
    }
    v1 = {"cpu.cfs_quota_us": "25000", "memory.memsw.limit_in_bytes": str(64 << 20)}
    assert seen in (v1, {"cpu.max": "25000 100000", "memory.swap.max": "0"})


# --- what cannot be run ---


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("/no/such/command", "not_found"),
        ("no-such-command", "not_found"),
        ("./no-such-file", "not_found"),
        ("/bin/true/below", "not_found"),
        ("/bin/not-executable", "not_executable"),
        ("/bin", "not_executable"),
    ],
)
def test_a_command_that_is_not_there(laboratory: Laboratory, runtime: Runtime, command: str, kind: str) -> None:
    with pytest.raises(CreateError, match=command) as caught:
        laboratory.create(runtime, command)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("command", "kind"),
    [("/bin/bad-format", "not_executable"), ("/bin/no-interpreter", "not_found"), ("root-only", "not_executable")],
)
def test_a_command_that_the_kernel_refuses(laboratory: Laboratory, runtime: Runtime, command: str, kind: str) -> None:
    try:
        code, sandbox = laboratory.run(runtime, command)
    except CreateError as error:  # runc looks at more than crun does
        found = error
    else:
        assert (code, sandbox.stdout) == (1, "")
        in_its_place = exec_error(sandbox.stderr, command)
        assert in_its_place is not None
        found = in_its_place
    assert found.kind == kind
    assert command in str(found)


def test_a_bundle_that_cannot_be(laboratory: Laboratory, runtime: Runtime) -> None:
    container, _, home = laboratory.prepare(runtime, ("/bin/true",), {}, bundle.Limits())
    shutil.rmtree(home / "workspace")
    with pytest.raises(CreateError, match="workspace") as caught, open(home / "attempt", "w") as attempt:
        conmon.create(container, "/bin/true", attempt.fileno(), laboratory.environment, TIMEOUT_S)
    assert caught.value.kind == "other"


def test_a_name_that_is_taken(laboratory: Laboratory, runtime: Runtime) -> None:
    sandbox = laboratory.create(runtime, "/bin/sleep", "60")
    monitor = sandbox.container.monitor.with_name("other")
    with pytest.raises(CreateError, match=f"{sandbox.container.id} already"), open(sandbox.attempt) as attempt:
        conmon.create(
            Container(sandbox.container.id, runtime, sandbox.container.bundle, monitor, monitor / "journal"),
            "/bin/sleep", attempt.fileno(), laboratory.environment, TIMEOUT_S,
        )  # fmt: skip
    assert not has_ended(sandbox.pidfd)


def test_no_conmon(laboratory: Laboratory, runtime: Runtime) -> None:
    container, _, home = laboratory.prepare(runtime, ("/bin/true",), {}, bundle.Limits())
    with pytest.raises(CreateError, match="apt-get install conmon"), open(home / "attempt", "w") as attempt:
        conmon.create(container, "/bin/true", attempt.fileno(), {"PATH": "/no/such/directory"}, TIMEOUT_S)


@pytest.fixture
def hanging(tmp_path: Path) -> Runtime:
    program, never = tmp_path / "hanging", tmp_path / "never"
    os.mkfifo(never)
    program.write_text(f'#!/bin/sh\ncase "$*" in *create*) read line < {never};; esac\n')
    program.chmod(0o755)
    return Runtime("runc", str(program), "1.1", tmp_path / "runtimes")


def test_a_runtime_that_hangs(laboratory: Laboratory, hanging: Runtime) -> None:
    """It dies with its conmon: that nobody is left is what the laboratory looks for."""
    container, _, home = laboratory.prepare(hanging, ("/bin/true",), {}, bundle.Limits())
    began = time.monotonic()
    with pytest.raises(CreateError, match="within 0.5 s"), open(home / "attempt", "w") as attempt:
        conmon.create(container, "/bin/true", attempt.fileno(), laboratory.environment, 0.5)
    assert time.monotonic() - began < 60
    assert conmon.find(container) is None


def test_a_create_whose_time_is_over_at_any_moment_leaves_nobody(laboratory: Laboratory, hanging: Runtime) -> None:
    """Also before conmon has written down who it is."""
    for number in range(15):
        container, _, home = laboratory.prepare(hanging, ("/bin/true",), {}, bundle.Limits())
        with pytest.raises(CreateError, match="within"), open(home / "attempt", "w") as attempt:
            conmon.create(container, "/bin/true", attempt.fileno(), laboratory.environment, number / 1000)


def test_a_runtime_that_outlives_its_conmon_is_ended_too(laboratory: Laboratory, hanging: Runtime) -> None:
    """As when conmon was killed before its child had asked to die with it."""
    container, _, _ = laboratory.prepare(hanging, ("/bin/true",), {}, bundle.Limits())
    container.conmon_pid_file.write_text(str(1 << 22))
    create = ["create", "--bundle", str(container.bundle), "--pid-file", str(container.pid_file), container.id]
    orphan = subprocess.Popen([hanging.program, *hanging.global_flags, *create])
    # In the midst of execve(2), when Popen has heard that it succeeds, a process has no arguments for a moment.
    deadline = time.monotonic() + TIMEOUT_S
    while not Path(f"/proc/{orphan.pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline
    conmon.end(container, TIMEOUT_S)
    assert orphan.wait(TIMEOUT_S) == -signal.SIGKILL


# --- its life ---


def test_states_from_creation_to_deletion(laboratory: Laboratory, runtime: Runtime) -> None:
    sandbox = laboratory.create(runtime, *shell("while [ ! -e go ]; do sleep 0.02; done"))
    container = sandbox.container
    state = conmon.state(container, TIMEOUT_S)
    assert state is not None and (state.status, state.pid) == ("created", sandbox.created.container_pid)
    assert not conmon.gate_is_gone(container)
    sandbox.start()
    state = conmon.state(container, TIMEOUT_S)
    assert state is not None and state.status == "running"
    assert conmon.gate_is_gone(container) == (runtime.name != "gvisor")
    (sandbox.workspace / "go").touch()
    sandbox.finish()
    state = conmon.state(container, TIMEOUT_S)
    assert state is not None and (state.status, state.pid) == ("stopped", None)
    conmon.delete(container, TIMEOUT_S)
    assert conmon.state(container, TIMEOUT_S) is None
    conmon.delete(container, TIMEOUT_S)


def test_a_running_container_is_deleted_with_force_only(laboratory: Laboratory, runtime: Runtime) -> None:
    sandbox = laboratory.create(runtime, "/bin/sleep", "60")
    sandbox.start()
    with pytest.raises(ContainerError, match=sandbox.container.id):
        conmon.delete(sandbox.container, TIMEOUT_S)
    assert not has_ended(sandbox.pidfd)
    conmon.delete(sandbox.container, TIMEOUT_S, force=True)
    wait_for(sandbox.pidfd)


def test_an_ended_container_of_cruns_is_deleted_without_crun(laboratory: Laboratory) -> None:
    sandbox = laboratory.create(laboratory.runtime("crun"), *shell("while [ ! -e go ]; do sleep 0.02; done"))
    container = sandbox.container
    useless = dataclasses.replace(container, runtime=dataclasses.replace(container.runtime, path="/bin/false", sealed=None))
    for step in (sandbox.start, (sandbox.workspace / "go").touch):
        with pytest.raises(ContainerError):
            conmon.delete(useless, TIMEOUT_S, force=True)
        assert conmon.state(container, TIMEOUT_S) is not None
        step()
    sandbox.finish()
    conmon.delete(useless, TIMEOUT_S)
    assert not container.runtime_state.exists()
    assert conmon.state(container, TIMEOUT_S) is None


def test_nothing_runs_before_start(laboratory: Laboratory, runtime: Runtime) -> None:
    sandbox = laboratory.create(runtime, *shell("echo ran > ran"))
    assert not (sandbox.workspace / "ran").exists()
    sandbox.start()
    sandbox.finish()
    assert (sandbox.workspace / "ran").exists()


@pytest.mark.parametrize("ended", [True, False])
def test_start_again_changes_nothing(laboratory: Laboratory, runtime: Runtime, ended: bool) -> None:
    sandbox = laboratory.create(runtime, *shell("echo ran >> ran; read line < go"))
    gate = sandbox.container.runtime_state / "exec.fifo"
    os.mkfifo(sandbox.workspace / "go", 0o666)
    assert stat.S_ISFIFO(gate.stat().st_mode)
    kept = gate.with_name("kept")
    os.link(gate, kept)
    sandbox.start()
    kept.rename(gate)  # as if the daemon had been killed before it removed the gate
    go = os.open(sandbox.workspace / "go", os.O_WRONLY)  # waits until the command reads
    if not ended:
        sandbox.start()
        assert not gate.exists()
    os.write(go, b"\n")
    os.close(go)
    assert os.waitstatus_to_exitcode(sandbox.finish()) == 0
    if ended:
        sandbox.start()
        assert not gate.exists()
    assert (sandbox.workspace / "ran").read_text() == "ran\n"


def test_who_opened_cruns_gate_and_was_killed_before_the_byte_costs_the_task_nothing(laboratory: Laboratory) -> None:
    """The first process spins then, and would fail if it met a gate that somebody has opened and not yet written to."""
    for count in range(10):
        sandbox = laboratory.create(laboratory.runtime("crun"), *shell("echo ran >> ran"))
        os.close(os.open(sandbox.container.runtime_state / "exec.fifo", os.O_WRONLY | os.O_NONBLOCK))
        sandbox.start()
        assert os.waitstatus_to_exitcode(sandbox.finish()) == 0, count
        assert (sandbox.workspace / "ran").read_text() == "ran\n"


@pytest.mark.parametrize("again", [True, False])
def test_a_start_that_is_killed_half_way_costs_the_task_nothing(laboratory: Laboratory, again: bool) -> None:
    """runc's first process must find a reader when it goes on: another holder of it, or whoever starts it again."""
    sandbox = laboratory.create(laboratory.runtime("runc"), *shell("echo ran >> ran"))
    ours, theirs = socket.socketpair()

    def hold(descriptor: int) -> None:
        socket.send_fds(theirs, [b"."], [descriptor])
        os._exit(9)

    starter = os.fork()
    if starter == 0:
        conmon.start(sandbox.container, TIMEOUT_S, hold)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(starter, 0)[1]) == 9
    _, [held], _, _ = socket.recv_fds(ours, 1, 1)
    if again:
        os.close(held)
        sandbox.start()
    else:
        os.kill(sandbox.created.container_pid, signal.SIGCONT)  # as if it had been killed a moment later
    assert os.waitstatus_to_exitcode(sandbox.finish()) == 0
    assert (sandbox.workspace / "ran").read_text() == "ran\n"
    if not again:
        os.close(held)
    for end in (ours, theirs):
        end.close()


def test_start_when_the_gate_is_not_as_expected(laboratory: Laboratory) -> None:
    sandbox = laboratory.create(laboratory.runtime("crun"), "/bin/true")
    gate = sandbox.container.runtime_state / "exec.fifo"
    gate.rename(gate.with_name("other"))
    with pytest.raises(CreateError, match="exec.fifo"):  # crun's own start, which cannot know better either
        sandbox.start()


def test_found_again(laboratory: Laboratory, runtime: Runtime) -> None:
    sandbox = laboratory.create(runtime, "/bin/sleep", "60")
    container = sandbox.container
    assert conmon.find(container) == sandbox.created
    other = Container("another", runtime, container.bundle, container.monitor, container.journal)
    assert conmon.find(other) is None
    container.conmon_pid_file.write_text(str(os.getpid()))
    assert conmon.find(container) is None
    container.conmon_pid_file.unlink()
    assert conmon.find(container) is None


# --- conmon's death ---


def opened_by(pid: int) -> list[str]:
    """What a process has open, but for what it closes just now."""
    found = []
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{entry}"))
    return found


def test_the_attempt_is_held_by_conmon_alone(laboratory: Laboratory, runtime: Runtime) -> None:
    sandbox = laboratory.create(runtime, *shell("ls -l /proc/self/fd; sleep 60"))
    sandbox.start()
    sandbox.lines_so_far(4)
    assert "attempt" not in sandbox.stdout
    with open(sandbox.attempt) as file:
        pids = (sandbox.created.conmon_pid, sandbox.created.container_pid)
        assert [pid for pid in pids if str(sandbox.attempt) in opened_by(pid)] == [sandbox.created.conmon_pid]
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody has locked it in this test


def test_conmon_is_killed_and_no_line_is_lost(laboratory: Laboratory, runtime: Runtime) -> None:
    script = (
        "i=0; while [ $i -lt 100 ]; do i=$((i+1)); echo out $i; echo err $i >&2; "
        "[ $i = 30 ] && while [ ! -e go ]; do sleep 0.01; done; done; exit 7"
    )
    sandbox = laboratory.create(runtime, *shell(script))
    sandbox.ends = conmon.pipe_ends(sandbox.created)
    sandbox.start()
    sandbox.lines_so_far(60)
    os.kill(sandbox.created.conmon_pid, signal.SIGKILL)
    wait_for(sandbox.conmon_pidfd)
    assert not has_ended(sandbox.pidfd)
    assert conmon.find(sandbox.container) is None
    (sandbox.workspace / "go").touch()
    wait_for(sandbox.pidfd)
    rest = {stream: os.read(end, 1 << 16).decode() for stream, end in sandbox.ends.items()}
    for stream, seen in (("stdout", sandbox.stdout), ("stderr", sandbox.stderr)):
        assert seen + rest[stream] == "".join(f"{stream[3:]} {number}\n" for number in range(1, 101))
    status = wait_status(sandbox.pidfd)
    assert status is not None and os.waitstatus_to_exitcode(status) == 7


def test_pipes_that_cannot_be_held(laboratory: Laboratory, runtime: Runtime) -> None:
    sandbox = laboratory.create(runtime, "/bin/sleep", "60")
    for thread in threading.enumerate():
        if thread.name == "expect moves":  # of this create or an earlier one, with a file open
            thread.join(TIMEOUT_S)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ContainerError, match="cannot be held"):
        conmon.pipe_ends(Created(os.getpid(), sandbox.created.conmon_pid))
    with pytest.raises(ContainerError, match="cannot be held"):
        conmon.pipe_ends(Created(sandbox.created.container_pid, 1 << 22))
    assert len(os.listdir("/proc/self/fd")) == before
    assert pid_of(sandbox.conmon_pidfd) == sandbox.created.conmon_pid


# --- gVisor ---


@pytest.fixture
def gvisor(laboratory: Laboratory) -> Runtime:
    if shutil.which("runsc") is None:
        pytest.skip("runsc is not installed")
    return laboratory.runtime("gvisor")


def test_gvisor(laboratory: Laboratory, gvisor: Runtime) -> None:
    sandbox = laboratory.create(gvisor, *shell("id -u; pwd; echo kept > file; echo err >&2; cat /proc/version; exit 7"))
    sandbox.ends = conmon.pipe_ends(sandbox.created)
    sandbox.start()
    assert os.waitstatus_to_exitcode(sandbox.finish()) == 7
    assert sandbox.stdout.splitlines()[:2] == ["1000", "/workspace"]
    assert sandbox.stderr == "err\n"
    assert os.uname().release not in sandbox.stdout
    assert (sandbox.workspace / "file").read_text() == "kept\n"
    assert sandbox.container.runtime_state.exists()
    conmon.delete(sandbox.container, TIMEOUT_S)
    assert not sandbox.container.runtime_state.exists()
    conmon.delete(sandbox.container, TIMEOUT_S)


def test_gvisor_tells_of_a_missing_command_when_it_starts(laboratory: Laboratory, gvisor: Runtime) -> None:
    sandbox = laboratory.create(gvisor, "/no/such/command")
    with pytest.raises(CreateError, match="/no/such/command") as caught:
        sandbox.start()
    assert caught.value.kind == "not_found"
