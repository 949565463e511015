"""A daemon that says what a test tells it to, on a real socket: for what a real one never does."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.gateway.messages import FRAME_BYTES_MAX, REQUESTS, SOCKET_NAME, Answer, TaskResult, TaskSpec
from supervisor.frames import Codec, FrameBuffer

CODEC = Codec(*REQUESTS, size_bytes_max=FRAME_BYTES_MAX)
PATIENCE_S = 60.0  # for a client, which may be a process that is just being started
SPEC = TaskSpec("busybox", ["true"], {}, None, 1.0, 512 << 20, None, "crun")


def result(task: str, state: Any = "stopped", **fields: Any) -> TaskResult:
    """A task that ended with exit code 0, but for what `fields` say."""
    started = None if state in ("pending", "failed") else "2026-01-01T00:00:00.000000Z"
    known: dict[str, Any] = {
        "reason": "exited" if state == "stopped" else None,
        "exit_code": 0 if state == "stopped" else None,
        "signal": None,
        "error": None,
        "sync": "none",
        "created_at": "2026-01-01T00:00:00.000000Z",
        "started_at": started,
        "finished_at": "2026-01-01T00:00:01.000000Z" if state in ("stopped", "failed") else None,
        "duration_s": 1.0 if state == "stopped" else None,
    }
    return TaskResult(task=task, state=state, **(known | fields))


class Connection:
    """The daemon's end of one connection."""

    def __init__(self, accepted: socket.socket) -> None:
        self.socket = accepted
        self.socket.settimeout(PATIENCE_S)
        self._incoming = FrameBuffer(CODEC)

    def request(self) -> Any:
        """The next request.  Raises EOFError when the client has gone."""
        while True:
            for message in self._incoming:
                return message
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError
            self._incoming.feed(data)

    def answer(self, *answers: Answer) -> None:
        for answer in answers:
            self.socket.sendall(CODEC.frame(answer))


class ScriptedDaemon:
    """Listens in `run_dir` and plays one script to each connection, in turn; what a script raises is raised by `join`."""

    def __init__(self, run_dir: Path, *scripts: Callable[[Connection], None]) -> None:
        run_dir.mkdir(exist_ok=True)
        self._path = run_dir / SOCKET_NAME
        hidden = run_dir / ".aerie.sock"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(hidden))
        self._listener.listen(8)
        hidden.rename(self._path)
        self._scripts = scripts
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._play, daemon=True)
        self._thread.start()

    def _play(self) -> None:
        try:
            for script in self._scripts:
                accepted, _ = self._listener.accept()
                with accepted:
                    script(Connection(accepted))
        except BaseException as error:  # noqa: BLE001 (it is raised again in the test's thread)
            self._error = error
        finally:
            self._path.unlink(missing_ok=True)
            self._listener.close()

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive(), "the script is not at its end"
        if self._error:
            raise self._error
