"""The command line of `run.py`: which commands there are, what they take, and what an error of a user's looks like.

Each command is loaded when it is called, for each is a process of its own and should start in a moment.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Final, NoReturn

from actors.quantities import QuantityError, parse_bytes, parse_cores, parse_seconds

EXIT_USAGE: Final = 2
EXIT_SYSTEM: Final = 74  # EX_IOERR
EXIT_SETTINGS: Final = 78  # EX_CONFIG
EXIT_INTERRUPTED: Final = 130
EXIT_PIPE: Final = 141  # as if killed by SIGPIPE


def main(arguments: Sequence[str]) -> int:
    """Carry out a command line → the exit code."""
    options, command = _split(arguments)
    try:
        try:
            return _run(_parser().parse_args(options), command)
        finally:
            print(end="", flush=True)  # what fails should fail here
    except BrokenPipeError:
        _drop_output()  # whoever read it has gone, as `head` does
        return EXIT_PIPE
    except OSError as error:
        # What the system refuses a client is no fault of its code: a disk is full, a limit is reached.
        _drop_output()
        return _fail(EXIT_SYSTEM, error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _run(given: argparse.Namespace, command: list[str]) -> int:
    from actors.gateway.client import ClientError
    from actors.gateway.submitting import UsageError
    from actors.settings import SettingsError, load_settings

    given.command = command
    try:
        settings = load_settings()
        module, _, function = given.function.partition(":")
        carry_out: Callable[..., int] = getattr(import_module(module), function)
        return carry_out(given, settings)
    except SettingsError as error:
        return _fail(EXIT_SETTINGS, error)
    except UsageError as error:
        return _fail(EXIT_USAGE, error)
    except ClientError as error:
        return _fail(error.exit_code, error)


def _drop_output() -> None:
    """The interpreter must not try again at its end to write what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _fail(code: int, error: Exception) -> int:
    for line in str(error).splitlines():
        print(f"run.py: {line}", file=sys.stderr)
    return code


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options, and the task's own command line, which comes after the first `--` of `submit`."""
    if arguments[:1] != ["submit"] or "--" not in arguments:
        return list(arguments), []
    place = arguments.index("--")
    return list(arguments[:place]), list(arguments[place + 1 :])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(EXIT_USAGE)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="run.py", allow_abbrev=False, description="Aerie: a node daemon that runs tasks in sandboxes, and its client."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, function: str, summary: str, json: bool = True, to: Any = commands) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = to.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.set_defaults(function=function, json=False)
        if json:
            command.add_argument("--json", action="store_true", help="print JSON")
        return command

    reading = "actors.gateway.reading"
    daemon = add("daemon", "actors.daemon:main", "be the daemon, in the foreground", json=False)
    daemon.add_argument("--take-over", action="store_true", help="replace a running daemon without stopping a task")

    wait = add("wait", f"{reading}:wait", "wait until the daemon takes tasks")
    wait.add_argument("--timeout", type=_amount(parse_seconds), default=30.0, metavar="30s")

    submit = add("submit", "actors.gateway.submitting:submit", "run a task: submit [options] IMAGE -- COMMAND ARG…")
    submit.usage = "run.py submit [options] IMAGE -- COMMAND ARG…"
    submit.add_argument("--wait", action="store_true", help="stay, show what the task prints, and exit with its code")
    submit.add_argument(
        "--env", action="append", default=[], metavar="K=V|K", help="a variable; K alone takes the value it has here"
    )
    submit.add_argument("--workspace", metavar="NAME", help="what /workspace is kept as; without it, nothing is kept")
    submit.add_argument("--cpu", type=_checked(parse_cores), metavar="500m", help="cores")
    submit.add_argument("--memory", type=_checked(parse_bytes), metavar="512Mi", help="bytes")
    submit.add_argument("--timeout", type=_checked(parse_seconds), metavar="30s", help="the task ends after this")
    submit.add_argument("--login", metavar="FILE", help='for the image\'s registry: {"username": "…", "password": "…"} as JSON')
    submit.add_argument("--runtime", choices=("crun", "runc", "gvisor"))
    submit.add_argument(
        "--id", metavar="ID", help="the task's name; the same content submitted again under it is the same task"
    )
    submit.add_argument("image", metavar="IMAGE")

    batch = add("batch", "actors.gateway.batch:batch", "run a task for each JSON line", json=False)
    batch.add_argument("--parallel", type=_at_least_one, default=8, metavar="N", help="tasks at once (8)")
    batch.add_argument("file", metavar="FILE|-")

    add("ps", f"{reading}:ps", "list the tasks that are known")
    result = add("result", f"{reading}:result", "show what became of a task; exit 3 when it has not ended")
    result.add_argument("--wait", type=_amount(parse_seconds), default=0.0, metavar="60s", help="wait so long for its end")
    stop = add("stop", f"{reading}:stop", "end a task")
    stop.add_argument("--force", action="store_true", help="kill it at once")
    logs = add("logs", f"{reading}:logs", "print what a task printed")
    logs.add_argument("-f", "--follow", action="store_true", help="go on to its end")
    for command in (result, stop, logs):
        command.add_argument("task", type=_text, metavar="TASK")
    add("tree", f"{reading}:tree", "show the daemon's supervisors, actors and processes")
    events = add("events", f"{reading}:events", "show what has lately happened to the daemon's actors")
    events.add_argument("-n", "--last", type=_at_least_one, default=50, metavar="N", help="so many of them (50)")
    add("doctor", "actors.doctor:doctor", "try every part of this host that the daemon needs")
    demo = add("demo", "actors.demonstration:demo", "show the whole node at work, as `make run` does", json=False)
    demo.add_argument(
        "--dir", default="/var/tmp/aerie-demo", metavar="DIRECTORY", help="where everything of it lies (/var/tmp/aerie-demo)"
    )

    images = commands.add_parser("image", help="list images; mount and unmount their roots").add_subparsers(
        metavar="COMMAND", required=True
    )
    add("ls", f"{reading}:image_ls", "list the images of this node", to=images)
    add("usage", f"{reading}:image_usage", "show what images and workspaces take of the disk, and may take", to=images)
    add("check", f"{reading}:image_check", "look for damaged content of images, and repair it", to=images)
    prune = add("prune", f"{reading}:image_prune", "evict content, the longest unused first", to=images)
    prune.add_argument(
        "--size", type=_amount(parse_bytes), default=1 << 60, metavar="10Gi", help="so much of it (all that may go)"
    )
    mount = add("mount", f"{reading}:image_mount", "mount an image's root, read-only", to=images)
    mount.add_argument("image", type=_text, metavar="IMAGE")
    unmount = add("unmount", f"{reading}:image_unmount", "give a lease back", json=False, to=images)
    unmount.add_argument("lease", type=_text, metavar="LEASE")
    return parser


def _amount(parse: Callable[[str], float]) -> Callable[[str], float]:
    """An argparse type that says what is accepted."""

    def convert(text: str) -> float:
        try:
            return parse(text)
        except QuantityError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _checked(parse: Callable[[str], float]) -> Callable[[str], str]:
    """As `_amount`, for a text that is passed on as it stands."""
    convert = _amount(parse)

    def check(text: str) -> str:
        convert(text)
        return text

    return check


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text[:100]!a} is not UTF-8, and so is no name here") from None
    return text


def _at_least_one(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text[:9]) < 1 or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number from 1 on")
    return int(text)
