"""One container, from its creation to its deletion, by way of conmon and an OCI runtime.

Everything here blocks and is for worker threads; each call has a time-out.  Nothing here remembers anything: a daemon that was
started again calls the same functions with the same places.

    create      conmon forks; the one that stays makes the container's pipes, runs the runtime's `create` and answers through the
                sync pipe: the container's first process is there then, and waits
    pipe_ends   copies of the read ends that conmon holds, so that the pipes outlive it (to be taken before `start`)
    start       lets that process execute the task's command
    delete      gives back what the runtime has (control group, state directory); `force` kills first

Options, sync pipe and files are conmon(8)'s (2.1), the verbs the OCI command line interface's, the gate crun's (status.c).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from actors.sandbox import bundle, gate
from actors.sandbox.cgroup import expect_moves
from actors.sandbox.runtimes import ContainerError, CreateError, Runtime, create_error
from supervisor.pidfd import copy_descriptor, has_ended, is_same, is_stopped, open_pidfd, signal_process, wait_ended

ANSWER_BYTES_MAX: Final = 1 << 16
LAST_OUTPUT_S: Final = 30.0  # for conmon to write the last output, make it durable, write down the exit code, and end
CLEARING_TIMEOUT_S: Final = 10.0  # for what is left of a create that failed
STATE_TIMEOUT_S: Final = 10.0
STOP_LOOK_S: Final = 0.1  # between two looks whether somebody has stopped a conmon that is waited for
KILLED_MAX: Final = 5  # times that the runtime may be killed at one piece of work


@dataclass(frozen=True)
class Container:
    """A container's name and places.

    `monitor`: a directory for conmon's own files.  `journal`: the file of its output.
    """

    id: str
    runtime: Runtime
    bundle: Path
    monitor: Path
    journal: Path

    @property
    def pid_file(self) -> Path:
        return self.monitor / "pid"

    @property
    def conmon_pid_file(self) -> Path:
        return self.monitor / "conmon.pid"

    @property
    def exit_file(self) -> Path:
        return self.monitor / "exits" / self.id

    @property
    def conmon_log(self) -> Path:
        return self.monitor / "conmon.log"

    @property
    def runtime_state(self) -> Path:
        """What the runtime keeps of it, and removes when it is deleted."""
        return self.runtime.state / (f"{self.id}_sandbox:{self.id}.state" if self.runtime.name == "gvisor" else self.id)


@dataclass(frozen=True)
class Created:
    container_pid: int
    conmon_pid: int


@dataclass(frozen=True)
class State:
    """What the runtime knows: `status` is creating, created, running, paused or stopped."""

    status: str
    pid: int | None


def create(container: Container, command: str, attempt: int, environment: Mapping[str, str], timeout_s: float) -> Created:
    """Start conmon and create the container from its bundle; its first process waits for `start`.

    `command`: what it will execute, for texts.  `attempt`: the descriptor of the attempt's locked file, which conmon keeps open
    and the task never sees.  `environment`: all that conmon gets, PATH and AERIE_STATE_DIR at least; nothing of it reaches the
    task.

    Raises CreateError.  conmon has ended then; a process that the runtime had begun may be left in the control group, for the
    caller to kill there.
    """
    if container.runtime_state.exists():
        # Left to the runtime this would fail as well; but what is cleared away after a failure would be the other one.
        raise CreateError("other", f"there is a container {container.id} already: delete it first")
    deadline = time.monotonic() + timeout_s
    for name in ("exits", "sockets"):
        (container.monitor / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    for earlier in (container.pid_file, container.conmon_pid_file, container.exit_file):
        earlier.unlink(missing_ok=True)  # must not be taken for this attempt's
    threading.Thread(target=expect_moves, name="expect moves", daemon=True).start()
    reader, writer = os.pipe()
    try:
        try:
            first = _start_conmon(container, [writer, attempt, *container.runtime.descriptors], writer, environment)
        finally:
            os.close(writer)
        try:
            pid, said = _answer(reader, deadline)
            first.wait(_left_s(deadline))
            if pid > 0:
                return Created(pid, int(container.conmon_pid_file.read_text()))
            error = create_error(said or container.conmon_log.read_text(errors="replace"), command)
        except (TimeoutError, subprocess.TimeoutExpired):
            error = CreateError("other", f"the container was not created within {timeout_s:g} s")
    finally:
        os.close(reader)
    first.kill()
    first.wait()
    _clear(container, error)
    raise error


def find(container: Container) -> Created | None:
    """The container and its conmon, when both live: what `create` has answered, or would have, had its caller lived."""
    with contextlib.ExitStack() as opened:
        conmon = _conmon_of(container)
        if conmon is None:
            return None
        opened.callback(os.close, conmon)
        try:
            found = Created(int(container.pid_file.read_text()), int(container.conmon_pid_file.read_text()))
            first = open_pidfd(found.container_pid)
            opened.callback(os.close, first)
            # The pid may be another's by now; whose child the first process is, no other is.
            parent = int(Path(f"/proc/{found.container_pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ValueError, ProcessLookupError):  # crun makes the file first, and then writes into it
            return None
        return found if parent == found.conmon_pid and not has_ended(first) else None


def is_created(container: Container) -> bool:
    """Whether the runtime has written down the container's first process, dead or alive."""
    try:
        return container.pid_file.stat().st_size > 0
    except FileNotFoundError:
        return False


def waits(container: Container) -> bool:
    """Whether container and conmon live, and its first process still waits for `start`.  Raises ContainerError."""
    if find(container) is None:
        return False
    if container.runtime.name == "gvisor":
        found = state(container, STATE_TIMEOUT_S)
        return found is not None and found.status == "created"
    return gate.waits(container.pid_file)


def exit_code(container: Container) -> int | None:
    """The exit code as conmon wrote it down when the container ended (see `wait_written`); None when it has not.

    It is 128 + n after signal n, and the same after `exit 128+n`: for when nobody holds the pidfd that could tell.
    """
    try:
        return int(container.exit_file.read_text())
    except (FileNotFoundError, ValueError):
        return None


def wait_written(container: Container, timeout_s: float) -> None:
    """Wait until the conmon of a container that has ended has ended as well, or the time is over.

    It reaps first, then reads what is left in the pipes, and writes the exit code down at last.  One that somebody has stopped is
    told to go on.
    """
    pidfd = _conmon_of(container)
    if pidfd is None:
        return
    try:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and not wait_ended(pidfd, STOP_LOOK_S):
            if is_stopped(pidfd):
                signal_process(pidfd, signal.SIGCONT)
    finally:
        os.close(pidfd)


def start(container: Container, timeout_s: float, hold: gate.Hold) -> None:
    """Let a created container execute its command; one that was started already is left as it is.

    `hold`: as for `gate.open_gate`; what was held may be given up afterwards.
    Raises CreateError.  Only runsc finds out here that the command is not there or cannot be executed.  crun and runc have told
    of a missing one in `create`, and of one that execve(2) refuses they tell in the task's place (`runtimes.exec_error`).
    """
    if gate.open_gate(container.runtime.name, container.runtime_state / gate.NAME, container.pid_file, timeout_s, hold):
        return
    done = _run(container, ["start", container.id], timeout_s)
    for _ in range(KILLED_MAX):
        if done.returncode >= 0:
            break
        # Killed: before or after it has let the first process go?  That the state tells; an ended container has been started.
        found = state(container, timeout_s)
        if found is None or found.status != "created":
            return
        done = _run(container, ["start", container.id], timeout_s)
    if done.returncode:
        raise create_error(done.stderr, bundle.command_in(container.bundle))


def delete(container: Container, timeout_s: float, force: bool = False) -> None:
    """Give back what the runtime has of an ended container; it need not exist.  `force`: kill it first if it runs.

    Raises ContainerError.
    """
    if not container.runtime_state.exists() or (container.runtime.name == "crun" and _forget(container)):
        return
    done = _run_again(container, ["delete", *(["--force"] if force else []), container.id], timeout_s)
    if done.returncode:
        why = done.stderr.strip() or ("it was killed" if done.returncode < 0 else f"exit code {done.returncode}")
        raise ContainerError(f"{container.runtime.name} could not delete the container {container.id}: {why}")


def end(container: Container, timeout_s: float) -> None:
    """SIGKILL to its conmon, also to one that is only being started, and to a runtime that creates it.  Raises TimeoutError.

    The runtime dies with its conmon; but not one that was forked a moment before, and had not asked for that yet (PR_SET_PDEATHSIG).
    """
    deadline = time.monotonic() + timeout_s
    while pidfds := _creators_of(container):
        try:
            for pidfd in pidfds:
                signal_process(pidfd, signal.SIGKILL)
            for pidfd in pidfds:
                if not wait_ended(pidfd, _left_s(deadline)):
                    raise TimeoutError(f"conmon or runtime of the container {container.id} does not end, killed as it is")
        finally:
            for pidfd in pidfds:
                os.close(pidfd)


def gate_is_gone(container: Container) -> bool:
    """Whether nobody waits to be started any more, in a container that was created; False when only the runtime knows."""
    return gate.is_gone(container.runtime.name, container.runtime_state / gate.NAME)


def state(container: Container, timeout_s: float) -> State | None:
    """What the runtime knows of the container; None when nothing.  Raises ContainerError when it does not answer."""
    done = _run_again(container, ["state", container.id], timeout_s)
    if done.returncode < 0:
        raise ContainerError(
            f"{container.runtime.name} does not tell the state of {container.id}: {done.stderr or 'it was killed'}"
        )
    if done.returncode:
        return None
    answer = json.loads(done.stdout)
    return State(answer["status"], answer["pid"] if answer["pid"] > 0 else None)


def pipe_ends(created: Created) -> dict[str, int]:
    """Copies of the ends from which conmon reads the container's output: `stdout`, `stderr` → a descriptor, close-on-exec.

    They may be read only when conmon is dead.  To be called before `start`: a running task may have closed its ends.
    Raises ContainerError.
    """
    conmon, copies = -1, {}
    try:
        conmon = open_pidfd(created.conmon_pid)
        # conmon reads nothing else that the container writes; of what it writes, stdout comes first (for runsc these are not
        # descriptors 1 and 2 of the first process, which is its kernel).
        writes = [os.readlink(f"/proc/{created.container_pid}/fd/{number}") for number in (1, 2)]
        reads = {pipe: number for number, pipe in _pipes(created.conmon_pid, os.O_RDONLY, writes)}
        if not reads.keys() >= set(writes):
            writes = [pipe for _, pipe in _pipes(created.container_pid, os.O_WRONLY)]
            reads = {pipe: number for number, pipe in _pipes(created.conmon_pid, os.O_RDONLY, writes)}
        numbers = dict.fromkeys(reads[pipe] for pipe in writes if pipe in reads)
        for stream, number in zip(("stdout", "stderr"), numbers, strict=True):
            copies[stream] = copy_descriptor(conmon, number)
    except (OSError, ValueError) as error:
        for copy in copies.values():
            os.close(copy)
        raise ContainerError(f"the container's pipes cannot be held: {error}") from error
    finally:
        if conmon >= 0:
            os.close(conmon)
    return copies


def _start_conmon(
    container: Container, descriptors: Sequence[int], sync: int, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """The conmon that forks and ends; the one that stays is not our child."""
    options = [
        *("--api-version", "1", "--cid", container.id, "--cuuid", container.id, "--name", container.id),
        *("--runtime", container.runtime.program),
        *(part for flag in container.runtime.global_flags for part in ("--runtime-arg", flag)),
        *("--bundle", str(container.bundle), "--persist-dir", str(container.monitor)),
        *("--container-pidfile", str(container.pid_file), "--conmon-pidfile", str(container.conmon_pid_file)),
        *("--exit-dir", str(container.monitor / "exits"), "--socket-dir-path", str(container.monitor / "sockets")),
        *("--log-path", f"k8s-file:{container.journal}"),
    ]
    try:
        with open(container.conmon_log, "wb") as log:
            return subprocess.Popen(
                ["conmon", *options],
                cwd=container.monitor,  # where it writes a file `oom`
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=descriptors,
                env={**environment, "_OCI_SYNCPIPE": str(sync)},
            )
    except OSError as error:
        raise CreateError("other", f"conmon cannot be started ({error}): apt-get install conmon") from None


def _conmon_of(container: Container) -> int | None:
    """A pidfd of the container's conmon, or None when it has ended."""
    try:
        pid = int(container.conmon_pid_file.read_text())
        pidfd = open_pidfd(pid)
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The pid may have become another's before it was opened: then the name in its arguments is another too.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        if container.id.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            return pidfd
    os.close(pidfd)
    return None


def _creators_of(container: Container) -> list[int]:
    """Pidfds of the container's conmon, and of whoever creates it: one of which no pid has been written down, or whose conmon is dead."""
    if not container.monitor.exists():
        return []
    pidfd = _conmon_of(container)
    if pidfd is not None:
        return [pidfd]
    if exit_code(container) is not None:
        return []  # its conmon has come to its end; as good as always, and to look through all processes would take long
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and _creates(container, entry):
            with contextlib.suppress(ProcessLookupError):
                pidfd = open_pidfd(int(entry))
                if _creates(container, entry):  # and not another process, that has its pid since
                    found.append(pidfd)
                else:
                    os.close(pidfd)
    return found


def _creates(container: Container, pid: str) -> bool:
    """Whether it is a conmon or a runtime that was told to write down the pid of the container's first process."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return container.id.encode() in arguments and os.fsencode(container.pid_file) in arguments


def _answer(reader: int, deadline: float) -> tuple[int, str]:
    """What conmon says through the sync pipe: the container's pid, or -1 and why.  Raises TimeoutError."""
    received = b""
    waiting = select.poll()
    waiting.register(reader, select.POLLIN)
    while not received.endswith(b"\n") and len(received) < ANSWER_BYTES_MAX:
        if not waiting.poll(_left_s(deadline) * 1000):
            raise TimeoutError
        chunk = os.read(reader, ANSWER_BYTES_MAX)
        if not chunk:
            break
        received += chunk
    try:
        answer = json.loads(received.decode(errors="replace"))
        return int(answer["data"]), str(answer.get("message", ""))
    except (ValueError, KeyError):
        return -1, received.decode(errors="replace")


def _clear(container: Container, error: CreateError) -> None:
    """Leave nothing of a create that failed, or note on `error` what could not be cleared away."""
    try:
        end(container, CLEARING_TIMEOUT_S)  # also one that has not been written down yet
    except TimeoutError as hanging:
        error.add_note(str(hanging))
    try:
        delete(container, CLEARING_TIMEOUT_S, force=True)
    except ContainerError as left:
        error.add_note(str(left))


def _forget(container: Container) -> bool:
    """Delete an ended container of crun's as `crun delete` does it, without executing it (5 ms); False when it may not have ended.

    There are no hooks, and its control group is the caller's to remove: what is left is crun's own directory of it.
    """
    try:
        status = json.loads((container.runtime_state / "status").read_bytes())
        if is_same(int(status["pid"]), int(status["process-start-time"])):
            return False
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False  # it was being created
    shutil.rmtree(container.runtime_state)
    return True


def _run(container: Container, arguments: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    runtime = container.runtime
    try:
        return subprocess.run(
            [runtime.program, *runtime.global_flags, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            pass_fds=runtime.descriptors,
            check=False,
        )
    except subprocess.TimeoutExpired:  # it was killed then
        return subprocess.CompletedProcess(arguments, -signal.SIGKILL, "", f"it had not ended within {timeout_s:g} s")
    except OSError as error:
        raise ContainerError(f"{runtime.name} {arguments[0]} of the container {container.id} failed: {error}") from None


def _run_again(container: Container, arguments: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """The same for what may be done twice: when somebody has killed it, it is done again."""
    deadline = time.monotonic() + timeout_s
    done = _run(container, arguments, timeout_s)
    for _ in range(KILLED_MAX):
        if done.returncode >= 0 or not (left_s := _left_s(deadline)):
            break
        done = _run(container, arguments, left_s)
    return done


def _pipes(pid: int, access: int, among: Sequence[str] | None = None) -> list[tuple[int, str]]:
    """The pipes, of those named or of all, that a process has open for `access` (O_RDONLY, O_WRONLY): descriptor and name, in the
    descriptors' order.
    """
    found = []
    for number in sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd")):
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            name = os.readlink(f"/proc/{pid}/fd/{number}")
            if name.startswith("pipe:") and (among is None or name in among):
                with open(f"/proc/{pid}/fdinfo/{number}") as file:
                    flags = next(int(line.split()[1], 8) for line in file if line.startswith("flags:"))
                if flags & os.O_ACCMODE == access:
                    found.append((number, name))
    return found


def _left_s(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
