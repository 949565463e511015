"""A real conmon over a real crun, with busybox for a root file system."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from supervisor.pidfd import copy_descriptor


class Conmon:
    """One container; conmon's journal is at `journal`."""

    def __init__(self, directory: Path) -> None:
        self.journal = directory / "output" / "journal"
        self.pid = self.container = 0
        self._directory = directory
        self._name = f"aerie-test-output-{os.getpid()}-{directory.name}"
        for name in ("output", "exits", "sockets", "bundle/root/bin", "bundle/root/proc", "bundle/root/dev", "bundle/root/sys"):
            (directory / name).mkdir(parents=True)
        shutil.copy("/bin/busybox", directory / "bundle/root/bin/busybox")
        for name in ("sh", "head", "sleep", "seq", "cat"):
            (directory / "bundle/root/bin" / name).symlink_to("busybox")

    def create(self, script: str) -> None:
        bundle = self._directory / "bundle"
        subprocess.run(["crun", "spec"], cwd=bundle, check=True)
        spec = json.loads((bundle / "config.json").read_text())
        spec["process"].update(terminal=False, args=["/bin/sh", "-c", script])
        spec["process"].pop("rlimits", None)
        spec["root"] = {"path": "root", "readonly": True}
        (bundle / "config.json").write_text(json.dumps(spec))
        reader, writer = os.pipe()
        options = {
            "--api-version": "1", "-c": self._name, "-u": self._name, "-n": self._name, "-r": shutil.which("crun") or "", "-b": bundle,
            "-p": self._directory / "pid", "--exit-dir": self._directory / "exits", "--persist-dir": self._directory,
            "-l": f"k8s-file:{self.journal}", "--socket-dir-path": self._directory / "sockets",
            "--conmon-pidfile": self._directory / "conmon.pid",
        }  # fmt: skip
        command_line = ["conmon", *(str(word) for option in options.items() for word in option)]
        subprocess.run(command_line, pass_fds=[writer], env={**os.environ, "_OCI_SYNCPIPE": str(writer)}, check=True)
        os.close(writer)
        with open(reader) as answer:
            self.container = json.loads(answer.readline())["data"]
        self.pid = int((self._directory / "conmon.pid").read_text())

    def start(self) -> None:
        subprocess.run(["crun", "start", self._name], check=True)

    def run(self, script: str) -> None:
        """From creation to conmon's end, by when its journal is whole."""
        self.create(script)
        watch = os.pidfd_open(self.pid)
        self.start()
        assert select.select([watch], [], [], 60)[0], "conmon has not ended"
        os.close(watch)

    def hold_pipes(self) -> list[int]:
        """Copies of conmon's read ends of the container's stdout and stderr."""
        watch = os.pidfd_open(self.pid)
        held = []
        for stream in (1, 2):
            pipe = os.readlink(f"/proc/{self.container}/fd/{stream}")
            held.append(copy_descriptor(watch, self._number_of(pipe)))
        os.close(watch)
        return held

    def _number_of(self, pipe: str) -> int:
        """Under which number conmon has `pipe`.  What it opens and closes meanwhile may have gone when it is looked at."""
        for number in os.listdir(f"/proc/{self.pid}/fd"):
            with suppress(FileNotFoundError):
                if os.readlink(f"/proc/{self.pid}/fd/{number}") == pipe:
                    return int(number)
        raise AssertionError(f"conmon does not hold {pipe}")

    def kill(self) -> None:
        """SIGKILL conmon, and wait until it is dead."""
        watch = os.pidfd_open(self.pid)
        os.kill(self.pid, signal.SIGKILL)
        assert select.select([watch], [], [], 60)[0]
        os.close(watch)

    def enough(self) -> None:
        """Make /enough in the container."""
        (self._directory / "bundle/root/enough").touch()

    def delete(self) -> None:
        subprocess.run(["crun", "delete", "-f", self._name], capture_output=True, check=False)
