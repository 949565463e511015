#!/usr/bin/env python3
"""Aerie's node daemon and its client: `run.py --help` lists the commands, README.md says what they are for."""

from __future__ import annotations

import os
import sys


def main(arguments: list[str]) -> int:
    """Hand the command line over → the exit code.

    The daemon's own processes come first, and load no parser: the keeper stays small for as long as it lives.
    """
    match arguments:
        case ["daemon", *options] if set(options) <= {"--take-over"}:
            from actors.daemon import main as daemon

            return daemon(take_over="--take-over" in options)
        case ["process", name, *rest]:
            from actors.daemon import process

            return process(name, rest)
    from actors.gateway.commands import main as command

    return command(arguments)


def hold_standard_streams() -> None:
    """Open /dev/null as each standard stream that is closed: else the next socket has its number, and what is printed goes there."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one


if __name__ == "__main__":
    hold_standard_streams()
    sys.exit(main(sys.argv[1:]))
