"""`run.py submit`: one task, from the command line to its end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from actors.gateway.client import Client, RequestFailed
from actors.gateway.messages import Accepted, LogDirectory, Logs, Submit, TaskResult, TaskSpec
from actors.gateway.request import amount, faults
from actors.image.registry.login import Login, parse_login
from actors.quantities import QuantityError
from actors.settings import SandboxSection, Settings
from supervisor.frames import FrameError

EXIT_TIMEOUT, EXIT_FAILED, EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND = (
    124,
    125,
    126,
    127,
)  # as timeout(1), docker and the shell have them
EXIT_SIGNAL = 128  # and the signal's number
ERASE_LINE = "\r\x1b[K"
COLUMNS = 80  # of a terminal that does not say


class UsageError(Exception):
    """The user asked for what cannot be; the text lists every fault."""


def specification(given: dict[str, Any], defaults: SandboxSection) -> TaskSpec:
    """A task as it is sent, from options or a line of a batch: limits are texts or numbers, what is None gets its default.

    Raises UsageError, with every limit that cannot be read.
    """
    wrong, limits = [], {}
    units = {"memory": "bytes", "cpu": "cores", "timeout": "s"}
    for name, unit in units.items():
        if given[name] is not None:
            try:
                limits[name] = amount(unit, given[name])
            except QuantityError as error:
                wrong.append(f"{name}: {error}")
    if wrong:
        raise UsageError("\n".join(wrong))
    return TaskSpec(
        image=given["image"],
        command=given["command"],
        env=given["env"],
        workspace=given["workspace"],
        cpu_cores=float(limits.get("cpu", defaults.cpu_cores)),
        memory_bytes=int(limits.get("memory", defaults.memory_bytes)),
        timeout_s=limits.get("timeout"),
        runtime=given["runtime"] or defaults.runtime,
        login=given.get("login"),
    )


def new_task_id() -> str:
    return f"t{os.urandom(6).hex()}"


def checked(task: str, spec: TaskSpec) -> None:
    """Raises UsageError when the daemon would refuse it."""
    if wrong := faults(task, spec):
        raise UsageError("\n".join(wrong))


def exit_code(result: TaskResult) -> int:
    """The exit code of `submit --wait`."""
    if result.state == "failed" or result.reason == "lost":
        return {"not_found": EXIT_NOT_FOUND, "not_executable": EXIT_NOT_EXECUTABLE}.get(result.failure or "", EXIT_FAILED)
    if result.reason == "timeout":
        return EXIT_TIMEOUT
    if result.signal is not None:
        return EXIT_SIGNAL + result.signal
    return EXIT_FAILED if result.exit_code is None else result.exit_code


def environment(pairs: list[str]) -> dict[str, str]:
    """`--env K=V` and `--env K`, whose value is this process's.  Raises UsageError."""
    found, wrong = {}, []
    for pair in pairs:
        name, assigned, value = pair.partition("=")
        if assigned:
            found[name] = value
        elif name in os.environ:
            found[name] = os.environ[name]
        else:
            wrong.append(f"env {name}: it is not set here: give it a value with --env {name}=VALUE, or export it")
    if wrong:
        raise UsageError("\n".join(wrong))
    return found


def login_in(path: str) -> Login:
    """The login in a file.  Raises UsageError."""
    try:
        return parse_login(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"--login {path}: {getattr(error, 'strerror', None) or error}") from None


def progress_line() -> Callable[[str], None]:
    """A function that shows a text in place of the last one, on a terminal; the stderr of a script is the task's alone.

    An empty text ends it, and erases nothing but what was shown by it: the line may be the task's.
    """
    if not os.isatty(2):
        return lambda text: None
    shown = False

    def show(text: str) -> None:
        nonlocal shown
        if text or shown:
            columns = os.get_terminal_size(2).columns or COLUMNS  # a line that wraps could not be erased
            print(f"{ERASE_LINE}{text[: columns - 1]}", end="", file=sys.stderr, flush=True)
        shown = bool(text)

    return show


def submit(arguments: argparse.Namespace, settings: Settings) -> int:
    login = None if arguments.login is None else login_in(arguments.login)
    given = vars(arguments) | {"env": environment(arguments.env), "login": login}
    spec = specification(given, settings.sandbox)
    task = new_task_id() if arguments.id is None else arguments.id
    checked(task, spec)
    client = Client(settings.run.dir)
    request = Submit(client.number(), task, spec, arguments.wait)
    try:
        return _submit(client, request, arguments.json)
    except FrameError as error:
        raise UsageError(f"command and environment are too long: {error}") from None
    except RequestFailed as failed:
        if not arguments.wait or failed.kind == "invalid":
            raise
        failed.exit_code = EXIT_FAILED  # so that it cannot be taken for the task's own
        raise


def _submit(client: Client, request: Submit, as_json: bool) -> int:
    # The answer after `Accepted` may be the end, so what was accepted is shown as soon as it is there.
    for answer in client.answers(request):
        if isinstance(answer, Accepted):
            if as_json:
                print(msgspec.json.encode({"task": answer.task}).decode(), flush=True)
            elif not request.wait:
                print(answer.task)
            break
    return _follow(client, request) if request.wait else 0


def _follow(client: Client, request: Submit) -> int:
    from actors.gateway.following import follow, show_bytes
    from actors.output.journal import Chunk

    show_progress = progress_line()

    def show(chunks: Iterable[Chunk]) -> None:
        show_progress("")
        show_bytes(chunks)

    try:
        place = client.ask(Logs(client.number(), request.task), progress=show_progress)
        assert isinstance(place, LogDirectory)
        result = follow(client, request.request, Path(place.path), show, show_progress)
    except KeyboardInterrupt:
        show_progress("")
        print(f"{request.task} runs on: `run.py logs -f {request.task}`, `run.py stop {request.task}`", file=sys.stderr)
        raise
    show_progress("")
    if result.error:
        print(f"run.py: {result.error}", file=sys.stderr)
    return exit_code(result)
