"""`run.py` as a user runs it: a process, with what it prints and its exit code."""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.gateway.messages import (
    Accepted,
    Done,
    Ended,
    Failed,
    ImageMounted,
    Images,
    ImageState,
    IsReady,
    Listed,
    LogDirectory,
    Progress,
    StillRunning,
    Stop,
    TreeNode,
    TreeShown,
    Wait,
)
from supervisor.events import Event, EventLog
from tests.actors.gateway.scripted import Connection, ScriptedDaemon, result
from tests.actors.gateway.test_following import record

PROGRAM = Path(__file__).resolve().parents[3] / "run.py"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`run.py` with a state and a run directory of its own."""

    def call(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AERIE_")}
        environment |= {"AERIE_STATE_DIR": f"{tmp_path}/state", "AERIE_RUN_DIR": f"{tmp_path}/run"}
        environment |= options.pop("environment", {})
        argv = [sys.executable, str(PROGRAM), *arguments]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False, **options)
        assert "Traceback" not in done.stderr
        return done

    return call


def once(*answers: object) -> Callable[[Connection], None]:
    """A script that answers one request."""

    def script(connection: Connection) -> None:
        connection.request()
        connection.answer(*answers)  # type: ignore[arg-type]

    return script


# --- usage ---


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["image"], "COMMAND"),
        (["daemon", "--fork"], "--fork"),
        (["submit"], "IMAGE"),
        (["submit", "busybox"], "command"),
        (["submit", "busybox", "--"], "command"),
        (["submit", "busybox", "true"], "true"),
        (["submit", "--memory", "12QB", "busybox", "--", "true"], "512Mi"),
        (["submit", "--cpu", "lots", "busybox", "--", "true"], "500m"),
        (["submit", "--cpu", "0", "busybox", "--", "true"], "from 10m"),
        (["submit", "--timeout", "soon", "busybox", "--", "true"], "30s"),
        (["submit", "--runtime", "podman", "busybox", "--", "true"], "gvisor"),
        (["submit", "--id", "../x", "busybox", "--", "true"], "id"),
        (["submit", "--workspace", "a/b", "busybox", "--", "true"], "path component"),
        (["submit", "--env", "AERIE_TEST_IS_NOT_SET", "busybox", "--", "true"], "not set"),
        (["submit", "--mem", "1Gi", "busybox", "--", "true"], "--mem"),
        (["batch", "--parallel", "0", "-"], "parallel"),
        (["batch", "no/such/file"], "no/such/file"),
        (["batch", "/"], "directory"),
        (["submit", "--id", "", "busybox", "--", "true"], "id"),
        (["result"], "TASK"),
        (["result", os.fsdecode(b"\xff")], "UTF-8"),
        (["stop", os.fsdecode(b"\xff")], "UTF-8"),
        (["logs", os.fsdecode(b"\xff")], "UTF-8"),
        (["image", "mount", os.fsdecode(b"\xff")], "UTF-8"),
        (["image", "unmount", os.fsdecode(b"\xff")], "UTF-8"),
        (["result", "--wait", "x", "t"], "30s"),
        (["wait", "--timeout", "-1s"], "timeout"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_is_right(run: Run, arguments: list[str], word: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert word in done.stderr
    assert done.stderr.startswith("run.py")


def test_a_byte_that_is_not_utf_8_is_wrong_usage(run: Run) -> None:
    done = run("submit", "busybox", "--", "echo", os.fsdecode(b"\xff"))
    assert (done.returncode, "UTF-8" in done.stderr) == (2, True)


def test_a_request_over_the_bound_is_wrong_usage(run: Run, tmp_path: Path) -> None:
    def script(connection: Connection) -> None:
        with pytest.raises(EOFError):
            connection.request()

    daemon = ScriptedDaemon(tmp_path / "run", script)
    done = run("submit", "busybox", "--", "echo", *(["x" * 100_000] * 12))
    daemon.join()
    assert (done.returncode, "too long" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["wait", "--timeout", "0.1s"], ["submit", "busybox", "--", "true"], ["submit", "--wait", "busybox", "--", "true"], ["batch", "-"],
        ["ps"], ["result", "t"], ["stop", "t"], ["logs", "t"], ["logs", "-f", "t"], ["tree"],
        ["image", "ls"], ["image", "mount", "busybox"], ["image", "unmount", "l"],
    ],
)  # fmt: skip
def test_without_a_daemon_every_command_exits_69_and_says_how_to_start_one(run: Run, arguments: list[str]) -> None:
    done = run(*arguments, input="")
    assert (done.returncode, done.stdout) == (69, "")
    assert "run.py daemon" in done.stderr


def test_settings_that_cannot_be_used_are_listed_all_at_once(run: Run) -> None:
    for command in ("ps", "daemon"):
        done = run(command, environment={"AERIE_SANDBOX_CPU": "x", "AERIE_NO_SUCH": "1", "AERIE_GATEWAY_QUEUE": "-1"})
        assert done.returncode == 78
        assert all(name in done.stderr for name in ("AERIE_SANDBOX_CPU", "AERIE_NO_SUCH", "AERIE_GATEWAY_QUEUE"))


def test_help_names_every_command(run: Run) -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in ("daemon", "wait", "submit", "batch", "ps", "result", "stop", "logs", "tree", "events", "doctor", "image"):
        assert command in done.stdout


def test_a_command_starts_in_a_moment(run: Run) -> None:
    def took_s(call: Callable[[], object]) -> float:
        """The processor time of the processes that `call` runs."""
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        call()
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime

    def load_daemon() -> None:
        subprocess.run([sys.executable, "-c", "import actors.node"], cwd=PROGRAM.parent, timeout=60, check=True)

    # 75 ms, and 300 ms, on the machine it was measured on.
    assert any(took_s(lambda: run("result", "t")) < took_s(load_daemon) / 2 for _ in range(3))


def test_a_client_loads_nothing_of_the_daemon() -> None:
    script = (
        "import sys\n"
        "from actors.gateway import batch, client, commands, following, reading, submitting\n"
        "print(sorted({'pykka', 'loguru', 'pyfuse3', 'trio', 'multiprocess', 'sqlite3', 'urllib3'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=PROGRAM.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- answers ---


def test_wait(run: Run, tmp_path: Path) -> None:
    daemon = ScriptedDaemon(tmp_path / "run", once(IsReady(1, 42)))
    done = run("wait", "--json")
    daemon.join()
    assert (done.returncode, json.loads(done.stdout)) == (0, {"pid": 42})


def test_a_daemon_that_is_stopping_is_not_the_one_that_is_waited_for(run: Run, tmp_path: Path) -> None:
    stopping, ready = once(Failed(1, "draining", "the daemon is stopping")), once(IsReady(1, 43))
    daemon = ScriptedDaemon(tmp_path / "run", stopping, ready)
    done = run("wait", "--json")
    daemon.join()
    assert (done.returncode, json.loads(done.stdout)) == (0, {"pid": 43})


def test_a_daemon_that_goes_on_stopping_is_waited_for_no_longer_than_asked(run: Run, tmp_path: Path) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        with pytest.raises((EOFError, ConnectionError)):  # its time may be over before it has heard that
            connection.answer(Failed(1, "draining", "the daemon is stopping"))
            connection.request()

    daemon = ScriptedDaemon(tmp_path / "run", script)
    done = run("wait", "--timeout", "200ms")
    daemon.join()
    assert (done.returncode, "within 0.2 s" in done.stderr) == (69, True)


def test_submit_prints_the_id(run: Run, tmp_path: Path) -> None:
    def script(connection: Connection) -> None:
        request = connection.request()
        assert request.spec.command == ["sh", "-c", "echo --json", "--", "-x"]
        assert request.spec.env == {"A": "b"}
        assert (request.wait, request.spec.timeout_s, request.spec.memory_bytes) == (False, 1.5, 1 << 30)
        connection.answer(Accepted(request.request, request.task))

    arguments = [
        "--env",
        "A=b",
        "--timeout",
        "1500ms",
        "--memory",
        "1Gi",
        "--id",
        "mine",
        "busybox",
        "--",
        "sh",
        "-c",
        "echo --json",
        "--",
        "-x",
    ]
    daemon = ScriptedDaemon(tmp_path / "run", script, script)
    assert run("submit", *arguments).stdout == "mine\n"
    assert json.loads(run("submit", "--json", *arguments).stdout) == {"task": "mine"}
    daemon.join()


def test_submit_wait_is_as_if_the_task_ran_here(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "journal").write_bytes(record("stdout", b"out\n") + record("stderr", b"err\n") + record("stdout", b"partial"))

    def script(connection: Connection) -> None:
        submit = connection.request()
        connection.answer(Accepted(submit.request, submit.task))
        logs = connection.request()
        # The end may be known before the client has asked where the output is.
        connection.answer(
            Ended(submit.request, result(submit.task, exit_code=5)), LogDirectory(logs.request, str(output), True)
        )

    daemon = ScriptedDaemon(tmp_path / "run", script)
    done = run("submit", "--wait", "busybox", "--", "sh")
    daemon.join()
    assert (done.returncode, done.stdout, done.stderr) == (5, "out\npartial", "err\n")


def test_a_task_that_never_ran_says_why_on_stderr(run: Run, tmp_path: Path) -> None:
    def script(connection: Connection) -> None:
        submit = connection.request()
        connection.answer(Accepted(submit.request, submit.task))
        logs = connection.request()
        ended = result(submit.task, "failed", error="/no/such: not in the image", failure="not_found")
        connection.answer(LogDirectory(logs.request, str(tmp_path / "missing"), False), Ended(submit.request, ended))

    daemon = ScriptedDaemon(tmp_path / "run", script)
    done = run("submit", "--wait", "busybox", "--", "/no/such")
    daemon.join()
    assert (done.returncode, done.stdout, done.stderr) == (127, "", "run.py: /no/such: not in the image\n")


@pytest.mark.parametrize(
    ("kind", "options", "code"),
    [
        ("conflict", [], 5),
        ("busy", [], 75),
        ("busy", ["--wait"], 125),
        ("draining", ["--wait"], 125),
        ("invalid", ["--wait"], 2),
        ("invalid", [], 2),
    ],
)
def test_a_task_that_is_not_taken(run: Run, tmp_path: Path, kind: Any, options: list[str], code: int) -> None:
    daemon = ScriptedDaemon(tmp_path / "run", once(Failed(1, kind, "first\nsecond")))
    done = run("submit", *options, "busybox", "--", "true")
    daemon.join()
    assert (done.returncode, done.stderr) == (code, "run.py: first\nrun.py: second\n")


def test_result(run: Run, tmp_path: Path) -> None:
    def script(connection: Connection) -> None:
        request = connection.request()
        assert request == Wait(1, "t", 1.5)
        connection.answer(Ended(1, result("t", exit_code=3)))

    daemon = ScriptedDaemon(
        tmp_path / "run", script, once(Ended(1, result("t"))), once(StillRunning(1, result("t", "running")))
    )
    done = run("result", "--json", "--wait", "1.5s", "t")
    assert (done.returncode, json.loads(done.stdout)["exit_code"]) == (0, 3)
    assert "exit_code:   0\n" in run("result", "t").stdout
    done = run("result", "--json", "t")
    assert (done.returncode, json.loads(done.stdout)["state"]) == (3, "running")
    daemon.join()


def test_an_unknown_task_exits_4(run: Run, tmp_path: Path) -> None:
    unknown = once(Failed(1, "unknown_task", "no task 'x'"))
    daemon = ScriptedDaemon(tmp_path / "run", unknown, unknown, unknown)
    for command in ("result", "logs", "stop"):
        assert run(command, "x").returncode == 4
    daemon.join()


def test_stop(run: Run, tmp_path: Path) -> None:
    def script(connection: Connection) -> None:
        assert connection.request() == Stop(1, "t", True)
        connection.answer(Ended(1, result("t", reason="cancelled", exit_code=None, signal=9)))

    daemon = ScriptedDaemon(tmp_path / "run", script)
    done = run("stop", "--force", "t")
    daemon.join()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_logs_of_an_ended_task_and_of_one_that_runs(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "journal").write_bytes(record("stdout", b"out\n") + record("stderr", b"err\n"))
    place = LogDirectory(1, str(output), True)

    def follows(connection: Connection) -> None:
        connection.request()
        connection.answer(LogDirectory(1, str(output), False))
        assert connection.request() == Wait(2, "t", None)
        connection.answer(Ended(2, result("t")))

    daemon = ScriptedDaemon(tmp_path / "run", once(place), once(LogDirectory(1, str(output), False)), follows, once(place))
    for arguments in (["t"], ["t"], ["-f", "t"]):
        done = run("logs", *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "err\n")
    rows = [json.loads(row) for row in run("logs", "--json", "t").stdout.splitlines()]
    daemon.join()
    assert rows == [{"stream": "stdout", "text": "out\n"}, {"stream": "stderr", "text": "err\n"}]


def test_a_reader_that_goes_away_is_no_error_of_ours(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "journal").write_bytes(record("stdout", b"x" * 8000 + b"\n") * 1000)
    daemon = ScriptedDaemon(tmp_path / "run", once(LogDirectory(1, str(output), True)))
    environment = {**os.environ, "AERIE_STATE_DIR": f"{tmp_path}/state", "AERIE_RUN_DIR": f"{tmp_path}/run"}
    with subprocess.Popen(
        [sys.executable, str(PROGRAM), "logs", "t"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(10)
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (141, b"")
    daemon.join()


def test_ps(run: Run, tmp_path: Path) -> None:
    rows = [Listed(1, result("a", exit_code=3)), Listed(1, result("b", "running")), Done(1)]
    daemon = ScriptedDaemon(tmp_path / "run", once(*rows), once(*rows))
    lines = run("ps").stdout.splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["TASK", "STATE", "REASON", "EXIT"],
        ["a", "stopped", "exited", "3"],
        ["b", "running", "-", "-"],
    ]
    assert [row["task"] for row in json.loads(run("ps", "--json").stdout)] == ["a", "b"]
    daemon.join()


def test_a_list_that_is_begun_again_after_a_restart_has_each_task_once(run: Run, tmp_path: Path) -> None:
    again = [Listed(1, result("a", "stopped")), Listed(1, result("b")), Done(1)]
    daemon = ScriptedDaemon(tmp_path / "run", once(Listed(1, result("a", "running"))), once(*again))
    rows = json.loads(run("ps", "--json").stdout)
    daemon.join()
    assert [(row["task"], row["state"]) for row in rows] == [("a", "stopped"), ("b", "stopped")]


def test_tree(run: Run, tmp_path: Path) -> None:
    actor = TreeNode("images", "actor", 2, "running", 0, [TreeNode("image builder", "process", 5, "running", 0, [])])
    root = TreeNode("root supervisor", "process", 2, "running", 1, [actor, TreeNode("gateway", "actor", 2, "running", 0, [])])
    keeper = TreeNode("keeper", "process", 1, "running", 0, [root])
    daemon = ScriptedDaemon(tmp_path / "run", once(TreeShown(1, keeper)), once(TreeShown(1, keeper)))
    assert run("tree").stdout == (
        "keeper  (process 1, running)\n"
        "└─ root supervisor  (process 2, running, 1 restarts)\n"
        "   ├─ images  (actor, running)\n"
        "   │  └─ image builder  (process 5, running)\n"
        "   └─ gateway  (actor, running)\n"
    )
    shown = json.loads(run("tree", "--json").stdout)
    daemon.join()
    assert set(shown) == {"name", "kind", "pid", "state", "restarts", "children"}
    assert shown["children"][0]["restarts"] == 1


def test_events(run: Run, tmp_path: Path) -> None:
    """Without a daemon: that is when one wants to know."""
    assert json.loads(run("events", "--json").stdout) == []
    (tmp_path / "state").mkdir(exist_ok=True)
    log = EventLog(tmp_path / "state" / "events")
    for number in range(60):
        log.append(Event(1.5, "root", "images", number, "ended", "crash", "OSError: no\n disk", 0.25))
    log.close()
    heads, *rows = run("events").stdout.splitlines()
    assert heads.split() == ["TIME", "SUPERVISOR", "CHILD", "WHAT", "CAUSE", "AGAIN", "TEXT"]
    assert len(rows) == 50
    assert rows[0].split(maxsplit=7) == [
        *["1970-01-01T00:00:01.500Z", "root", "images", "ended", "crash", "in", "0.25s", "OSError: no disk"],
    ]
    shown = json.loads(run("events", "-n", "2", "--json").stdout)
    assert [event["generation"] for event in shown] == [58, 59]
    assert set(shown[0]) == {"at_s", "supervisor", "child", "generation", "what", "cause", "text", "pause_s"}


def test_images(run: Run, tmp_path: Path) -> None:
    rows = Images(1, [ImageState("docker.io/library/busybox:latest", "sha256:" + "0" * 64, None, ["t1"], 3 << 20)])
    mounted = ImageMounted(1, "lease-1", "/run/x", "sha256:0")
    daemon = ScriptedDaemon(
        tmp_path / "run",
        once(rows),
        once(rows),
        once(mounted),
        once(mounted),
        once(Done(1)),
        once(Failed(1, "unknown_lease", "no")),
    )
    assert "3Mi" in run("image", "ls").stdout
    assert json.loads(run("image", "ls", "--json").stdout)[0]["leases"] == ["t1"]
    assert json.loads(run("image", "mount", "--json", "busybox").stdout) == {
        "lease": "lease-1",
        "path": "/run/x",
        "digest": "sha256:0",
    }
    assert run("image", "mount", "busybox").stdout.splitlines()[0] == "/run/x"
    assert run("image", "unmount", "lease-1").returncode == 0
    assert run("image", "unmount", "lease-1").returncode == 4
    daemon.join()


def test_batch(run: Run, tmp_path: Path) -> None:
    def script(connection: Connection) -> None:
        request = connection.request()
        connection.answer(Ended(request.request, result(request.task, exit_code=7)))

    daemon = ScriptedDaemon(tmp_path / "run", script, lambda connection: None)
    done = run("batch", "-", input='{"image": "busybox", "command": ["sh"], "id": "b1"}\nnonsense\n')
    rows = {row["line"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0
    assert (rows[1]["task"], rows[1]["exit_code"]) == ("b1", 7)
    assert (rows[2]["task"], rows[2]["state"]) == (None, "failed")
    (tmp_path / "tasks").write_text("")
    assert run("batch", str(tmp_path / "tasks")).stdout == ""
    daemon.join()


# --- streams that are not what one expects ---


def shell(tmp_path: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a shell's command line, in which $RUN is the program."""
    variables = {
        "AERIE_STATE_DIR": f"{tmp_path}/state",
        "AERIE_RUN_DIR": f"{tmp_path}/run",
        "RUN": f"{sys.executable} {PROGRAM}",
    }
    # Buffered or not, the end is the same; by default Python's output is.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | variables
    done = subprocess.run(["/bin/sh", "-c", command], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    return done


def journal(tmp_path: Path, content: bytes) -> LogDirectory:
    output = tmp_path / "output"
    output.mkdir()
    (output / "journal").write_bytes(content)
    return LogDirectory(1, str(output), True)


def test_a_full_disk_is_said_so(tmp_path: Path) -> None:
    rows = [Listed(1, result("a")), Done(1)]
    daemon = ScriptedDaemon(tmp_path / "run", once(*rows), once(*rows), once(journal(tmp_path, record("stdout", b"x\n"))))
    for command in ("ps", "ps --json", "logs t", "--help"):
        done = shell(tmp_path, f"$RUN {command} >/dev/full")
        assert (done.returncode, "No space left" in done.stderr) == (74, True)
    daemon.join()


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_closed_is_dev_null_and_never_the_daemon(tmp_path: Path, closed: str) -> None:
    place = journal(tmp_path, record("stdout", b"x\n") + record("stderr", b"y\n"))

    def script(connection: Connection) -> None:
        connection.request()
        connection.answer(place)
        with pytest.raises(EOFError):
            connection.request()

    daemon = ScriptedDaemon(tmp_path / "run", script)
    assert shell(tmp_path, f"$RUN logs t {closed}").returncode == 0
    daemon.join()


def test_a_batch_without_input_is_over(tmp_path: Path) -> None:
    daemon = ScriptedDaemon(tmp_path / "run", lambda connection: None)
    assert shell(tmp_path, "$RUN batch - <&-").returncode == 0
    assert shell(tmp_path, f"$RUN batch - 0>{tmp_path}/output").returncode == 2
    daemon.join()


def test_output_that_does_not_block_is_waited_for(tmp_path: Path) -> None:
    daemon = ScriptedDaemon(tmp_path / "run", once(journal(tmp_path, record("stdout", b"x" * 8000 + b"\n") * 100)))
    environment = {**os.environ, "AERIE_STATE_DIR": f"{tmp_path}/state", "AERIE_RUN_DIR": f"{tmp_path}/run"}
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with subprocess.Popen([sys.executable, str(PROGRAM), "logs", "t"], env=environment, stdout=writing) as process:
        os.close(writing)
        with os.fdopen(reading, "rb") as file:
            assert file.read() == (b"x" * 8000 + b"\n") * 100
        assert process.wait(60) == 0
    daemon.join()


def test_progress_on_a_terminal_gives_way_to_what_the_task_prints(tmp_path: Path) -> None:
    place = journal(tmp_path, b"")

    def script(connection: Connection) -> None:
        submit = connection.request()
        connection.answer(Accepted(submit.request, submit.task), Progress(submit.request, "1 of 2 MiB, " + "x" * 200))
        logs = connection.request()
        connection.answer(LogDirectory(logs.request, place.path, False))
        assert terminal.wait_for(b"1 of 2 MiB")
        (tmp_path / "output" / "journal").write_bytes(record("stdout", b"partial"))
        assert terminal.wait_for(b"partial")
        connection.answer(Ended(submit.request, result(submit.task)))

    terminal = Terminal()
    daemon = ScriptedDaemon(tmp_path / "run", script)
    environment = {**os.environ, "AERIE_STATE_DIR": f"{tmp_path}/state", "AERIE_RUN_DIR": f"{tmp_path}/run"}
    argv = [sys.executable, str(PROGRAM), "submit", "--wait", "busybox", "--", "true"]
    with subprocess.Popen(argv, env=environment, stdout=terminal.end, stderr=terminal.end) as process:
        terminal.close_end()
        assert process.wait(60) == 0
    daemon.join()
    shown = "\r\x1b[K" + ("1 of 2 MiB, " + "x" * 200)[:79]  # no more than a line, for a longer one could not be erased
    assert terminal.read_all() == f"{shown}\r\x1b[Kpartial".encode()  # and what the task printed stays


class Terminal:
    """A terminal that remembers what was shown on it."""

    def __init__(self) -> None:
        self._screen, self.end = pty.openpty()
        self._shown = bytearray()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            try:
                data = os.read(self._screen, 4096)
            except OSError:  # EIO: the last process with the terminal has ended
                os.close(self._screen)
                return
            with self._changed:
                self._shown += data
                self._changed.notify_all()

    def wait_for(self, text: bytes) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: text in self._shown, 60)

    def close_end(self) -> None:
        os.close(self.end)

    def read_all(self) -> bytes:
        self._thread.join(60)
        return bytes(self._shown)


def test_an_interrupted_client_leaves_the_task_running_and_says_how_to_go_on(tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "journal").write_bytes(record("stdout", b"begun\n"))

    def script(connection: Connection) -> None:
        submit = connection.request()
        connection.answer(Accepted(submit.request, submit.task))
        logs = connection.request()
        connection.answer(LogDirectory(logs.request, str(output), False))
        with pytest.raises(EOFError):
            connection.request()  # no Stop

    daemon = ScriptedDaemon(tmp_path / "run", script)
    environment = {**os.environ, "AERIE_STATE_DIR": f"{tmp_path}/state", "AERIE_RUN_DIR": f"{tmp_path}/run"}
    argv = [sys.executable, str(PROGRAM), "submit", "--wait", "--id", "t1", "busybox", "--", "sleep", "60"]
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    daemon.join()
    assert process.returncode == 130
    assert "run.py logs -f t1" in stderr
    assert "Traceback" not in stderr
