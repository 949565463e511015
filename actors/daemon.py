"""The daemon's processes, as `run.py` starts them: the keeper, and below it the root supervisor and the fork server.

The keeper loads no more than it must: settings are read and checked by a child of it, which prints what the keeper needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent.parent / "run.py"
EXIT_SETTINGS = 78  # EX_CONFIG: the settings, or a missing part of the host, as the check has said on stderr
DRAIN_MARGIN_S = 30.0  # over `daemon.drain_timeout`: stopping, syncing back and unmounting come after it

# What the entries of isolated processes are in; the fork server loads them, and what they need, once for all.
PRELOAD = (
    "actors.mount.serve",
    "actors.mount.process",
    "actors.image.serve",
    "actors.image.archives.process",
    "actors.image.prefetch.process",
    "actors.image.prefetch.starting",
    "actors.output.process",
    "actors.cache.process",
)
# boto3: 0.1 to 0.2 s and 7 MB of each builder, for 8 MB once that all share.
PRELOAD_FOR_A_BUCKET = ("actors.image.archives.fleet",)


def main(take_over: bool = False) -> int:
    """Be the daemon's keeper in the foreground → the exit code."""
    checked = subprocess.run([sys.executable, PROGRAM, "process", "check"], stdout=subprocess.PIPE, check=False)
    if checked.returncode:
        return checked.returncode
    known = json.loads(checked.stdout)
    # Every process below has them: whoever looks at one sees to which daemon it belongs, and all agree on where things lie.
    os.environ |= known["directories"]
    return keep(known["drain_timeout_s"], take_over)


def keep(drain_timeout_s: float, take_over: bool = False, stand_in: bool = False) -> int:
    """Be the keeper of the daemon whose directories are in the environment → the exit code."""
    from supervisor.keeper import Plan, run_keeper

    plan = Plan(
        directory=Path(os.environ["AERIE_RUN_DIR"]),
        root_argv=process_argv("root"),
        fork_server_argv=process_argv("fork-server"),
        drain_timeout_s=drain_timeout_s + DRAIN_MARGIN_S,
    )
    return run_keeper(plan, take_over, stand_in)


def process_argv(name: str, *arguments: str) -> list[str]:
    """How a process of the daemon is started: by the same program, under a name that ps shows."""
    return [sys.executable, str(PROGRAM), "process", name, *arguments]


def process(name: str, arguments: list[str]) -> int:
    """Be one of the daemon's own processes: `check`, `root`, `fork-server` or `stand-in`."""
    match name:
        case "stand-in":
            return keep(float(arguments[0]), stand_in=True)  # what was checked when the daemon was started is not checked again
        case "fork-server":
            from actors.lazytree.server import warm_up
            from actors.settings import SettingsError, load_settings
            from supervisor.forkserver import main as serve_forks

            run = Path(os.environ["AERIE_RUN_DIR"])
            preload: tuple[str, ...] = PRELOAD
            try:
                if load_settings().s3.bucket:
                    preload = (*PRELOAD, *PRELOAD_FOR_A_BUCKET)
            except SettingsError:
                pass  # they were right when the daemon was started; a builder loads what it needs itself
            serve_forks(run / "forkserver.sock", run / "forkserver.lock", preload, warm_up)
        case "root":
            from actors.node import main as supervise

            return supervise(process_argv)
        case "check":
            return check()
    raise ValueError(name)


def check() -> int:
    """Read the settings and look at the host; all faults go to stderr, each with its cure, and what a keeper needs to stdout."""
    from actors.doctor import missing_parts
    from actors.settings import SettingsError, load_settings

    try:
        settings = load_settings()
    except SettingsError as error:
        print(error, file=sys.stderr)
        return EXIT_SETTINGS
    if missing := missing_parts(settings):
        print("\n".join(missing), file=sys.stderr)
        return EXIT_SETTINGS
    print(json.dumps({"directories": settings.directories(), "drain_timeout_s": settings.daemon.drain_timeout_s}))
    return 0
