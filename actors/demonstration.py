"""`run.py demo`, which is what `make run` does: the whole node, shown on a real image from a real registry.

It makes an image of busybox, starts Debian's docker-registry on a free loopback port, pushes the image, starts a daemon with
directories of its own, runs tasks through `run.py` as anybody would, and ends all of it.  Images and workspaces stay in its
directory, so that the next demonstration is a warm one.

Nothing stays mounted or running, however it ends.  Daemon and registry end with this process (PR_SET_PDEATHSIG; the daemon gets
a SIGTERM, on which it drains), and the keeper inherits the lock that the next demonstration waits for.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final, NoReturn

from actors.lazytree.mounts import mounts_below
from actors.settings import Settings

EXIT_INTERRUPTED: Final = 130
# Before what should end when this process does, however that comes about.
ENDS_WITH_US: Final = ("setpriv", "--pdeathsig")
PROGRAM: Final = Path(__file__).resolve().parent.parent / "run.py"
DAEMON_END_S: Final = 60.0
REGISTRY_END_S: Final = 60.0
APPLETS: Final = ("cat", "date", "echo", "head", "id", "ls", "mkdir", "sh", "sleep", "true", "uname", "wc")
TASK: Final = """\
echo "uid $(id -u) in $(pwd), on $(head -n 1 /etc/os-release)"
echo "the image has $(wc -c < /usr/share/numbers) bytes of numbers, which begin with $(head -n 1 /usr/share/numbers)"
echo "this goes to stderr" >&2
for step in 1 2 3; do echo "step $step"; sleep 0.3; done
date >> visits
echo "this workspace has seen $(wc -l < visits) visits"
exit 7
"""


class DemonstrationError(Exception):
    """A step did not do what it should; the text says which, and where to look."""


def demo(arguments: argparse.Namespace, settings: Settings) -> int:
    home = Path(arguments.dir).resolve()
    home.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a script's background job has it ignored
        signal.signal(number, _interrupted)
    with (home / "lock").open("w") as lock:
        _lock(lock)
        demonstration = Demonstration(home, lock.fileno())
        try:
            with demonstration.registry() as registry, demonstration.daemon():
                demonstration.show(demonstration.push(registry))
            code = 0
        except KeyboardInterrupt:
            _say("interrupted")
            code = EXIT_INTERRUPTED
        except (DemonstrationError, OSError, subprocess.SubprocessError) as error:
            print(f"run.py: the demonstration ends early: {error}", file=sys.stderr)
            code = 1
        return demonstration.show_what_is_left() or code


def _interrupted(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _lock(lock: IO[str]) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("an earlier demonstration is still running, or ending: waiting for it", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


class Demonstration:
    """A demonstration in `home`; `lock`: the descriptor that keeps others away."""

    def __init__(self, home: Path, lock: int) -> None:
        self._home = home
        self._lock = lock
        self._log = home / "daemon.log"
        own = {"AERIE_STATE_DIR": str(home / "state"), "AERIE_RUN_DIR": str(home / "run")}
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("AERIE_")} | own

    @contextlib.contextmanager
    def registry(self) -> Iterator[str]:
        """A registry → its address."""
        _say("a registry on loopback (docker-registry)")
        configuration = self._home / "registry.yml"
        configuration.write_text(
            "version: 0.1\n"
            "log: {level: info, accesslog: {disabled: true}}\n"
            f"storage: {{filesystem: {{rootdirectory: {self._home}/registry}}}}\n"
            'http: {addr: "127.0.0.1:0"}\n'
        )
        argv = [*ENDS_WITH_US, "KILL", "docker-registry", "serve", str(configuration)]
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
            assert process.stderr
            try:
                for line in process.stderr:
                    if "listening on " in line:
                        break
                else:
                    raise DemonstrationError("docker-registry does not start: `make setup` installs it")
                # It would stop in the middle of a word if nobody read on.
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield line.partition("listening on ")[2].split('"')[0].split(",")[0].strip()
            finally:
                _end(process, REGISTRY_END_S)

    def push(self, registry: str) -> str:
        """Make the image, unless an earlier demonstration did, and push it → its reference."""
        layout = self._home / "image"
        if not (layout / "complete").exists():
            _say("an image of busybox (umoci)")
            shutil.rmtree(layout, ignore_errors=True)
            rootfs = layout / "rootfs"
            _make_rootfs(rootfs)
            _run("umoci", "init", "--layout", str(layout / "oci"))
            _run("umoci", "new", "--image", f"{layout}/oci:demo")
            _run("umoci", "insert", "--image", f"{layout}/oci:demo", str(rootfs), "/")
            _run("umoci", "config", "--image", f"{layout}/oci:demo", "--config.env", "PATH=/bin")
            (layout / "complete").touch()
        reference = f"{registry}/aerie/demo:1"
        _say(f"pushed as {reference} (skopeo)")
        _run("skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{layout}/oci:demo", f"docker://{reference}")
        return reference

    @contextlib.contextmanager
    def daemon(self) -> Iterator[None]:
        """A daemon that takes tasks, and adopts or clears whatever a killed one left in the same directories."""
        _say(f"the daemon, with everything in {self._home}; its log: {self._log}")
        argv = [*ENDS_WITH_US, "TERM", sys.executable, str(PROGRAM), "daemon"]
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                argv,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[self._lock],
            )
        try:
            self._call("wait", "--timeout", "2m")
            yield
        finally:
            _say("SIGTERM to the daemon")
            _end(process, DAEMON_END_S)

    def show(self, image: str) -> None:
        """Run tasks, and show what comes of them."""
        cold_s = self._time("submit", "--wait", image, "--", "true")
        shown = ["submit", "--json", "--workspace", "demo", image, "--", "sh", "-c", TASK]
        task = json.loads(self._call(*shown, show=True))["task"]
        self._call("logs", "-f", task, show=True)
        result: dict[str, Any] = json.loads(self._call("result", "--json", "--wait", "60s", task))
        self._call("result", task, show=True)
        if (result["state"], result["exit_code"], result["sync"]) != ("stopped", 7, "synced"):
            raise DemonstrationError(f"the task did not end as it should: {result}; the daemon's log: {self._log}")
        workspace = self._home / "state/workspaces/demo"
        print(f"$ cat {workspace / 'visits'}\n{(workspace / 'visits').read_text()}")
        self._call("ps", show=True)
        self._call("tree", show=True)
        self._call("image", "ls", show=True)
        warm_s = self._time("submit", "--wait", image, "--", "true")
        _say(
            f"the same small task, from command line to exit code: {cold_s * 1e3:.0f} ms the first time, {warm_s * 1e3:.0f} ms warm"
        )

    def show_what_is_left(self) -> int:
        """Say what is still mounted or running → the exit code: 1 when something is."""
        mounts = [mount.target for mount in mounts_below(str(self._home))]
        processes = [name for name in os.listdir("/proc") if name.isdigit() and self._is_ours(name)]
        _say(f"left behind: {len(mounts)} mounts, {len(processes)} processes")
        for line in (*mounts, *processes):
            print(line)
        return 1 if mounts or processes else 0

    def _is_ours(self, pid: str) -> bool:
        try:
            environment = Path("/proc", pid, "environ").read_bytes()
        except OSError:  # it has ended
            return False
        return f"AERIE_STATE_DIR={self._home / 'state'}".encode() in environment.split(b"\0")

    def _call(self, *arguments: str, show: bool = False) -> str:
        """`run.py` with these arguments → its stdout; with `show`, command and output are shown, as they come."""
        if show:
            print(f"$ run.py {shlex.join(arguments)}", flush=True)
        argv = [*ENDS_WITH_US, "KILL", sys.executable, str(PROGRAM), *arguments]
        live = show and arguments[0] == "logs"
        done = subprocess.run(argv, env=self._environment, stdout=None if live else subprocess.PIPE, text=True, check=False)
        if show:
            print(done.stdout or "", flush=True)
        if done.returncode:
            raise DemonstrationError(f"run.py {arguments[0]} exited {done.returncode}; the daemon's log: {self._log}")
        return done.stdout or ""

    def _time(self, *arguments: str) -> float:
        began = time.monotonic()
        self._call(*arguments)
        return time.monotonic() - began


def _make_rootfs(rootfs: Path) -> None:
    for directory in ("bin", "dev", "etc", "proc", "sys", "tmp", "usr/share", "workspace"):
        (rootfs / directory).mkdir(parents=True)
    shutil.copy("/bin/busybox", rootfs / "bin/busybox")  # of busybox-static
    for applet in APPLETS:
        (rootfs / "bin" / applet).symlink_to("busybox")
    (rootfs / "etc/os-release").write_text("Aerie's demonstration image\n")
    (rootfs / "usr/share/numbers").write_text("".join(f"{number}\n" for number in range(1, 1_000_001)))


def _run(*argv: str) -> None:
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise DemonstrationError(f"{shlex.join(argv)}: {done.stdout.strip()}")


def _end(process: subprocess.Popen[Any], timeout_s: float) -> None:
    """SIGTERM, and wait; interrupted again, one waits all the same: what is left unfinished would stay."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    process.terminate()
    process.wait(timeout_s)


def _say(text: str) -> None:
    print(f"--- {text}", flush=True)
