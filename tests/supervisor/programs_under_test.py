"""The programs that the tests of the fork server and of the keeper start: `python programs_under_test.py WHAT DIRECTORY …`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ENTRIES = "tests.supervisor.processes_under_test"


def main(what: str, directory: Path, *arguments: str) -> int:
    match what:
        case "fork-server":
            from supervisor.forkserver import main as serve_forks

            serve_forks(directory / "forkserver.sock", directory / "forkserver.lock", [ENTRIES])
    raise ValueError(what)


def argv(what: str, directory: Path, *arguments: str) -> list[str]:
    return [sys.executable, os.path.abspath(__file__), what, str(directory), *arguments]


if __name__ == "__main__":
    what, directory, *arguments = sys.argv[1:]
    sys.exit(main(what, Path(directory), *arguments))
