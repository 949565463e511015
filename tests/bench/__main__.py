"""The benchmark: one table of work, floor, ours, ratio, goal, met or not.

Floor and ours take turns in one run, so that what else the machine does hits both; each figure is a median of many.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator

from tests.bench import cold, indexing, lazy, restarts, stall, tasks, trees, workspaces
from tests.bench.site import Site
from tests.bench.table import Row, as_json, table

PARTS: dict[str, Callable[[Site], Iterator[Row]]] = {
    "tasks": tasks.rows,
    "trees": trees.rows,
    "indexing": indexing.rows,
    "lazy": lazy.rows,
    "cold": cold.rows,
    "workspaces": workspaces.rows,
    "stall": stall.rows,
    "restarts": restarts.rows,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure Aerie against the floor.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"what to measure; everything when none is named: {', '.join(PARTS)}"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))} (there are {', '.join(PARTS)})")
    rows = []
    with Site() as site:
        for name in arguments.parts or PARTS:
            print(name, file=sys.stderr, flush=True)
            rows += list(PARTS[name](site))
        # Figures without a floor are of a machine that has nothing else to do; this says whether it had.
        print(f"the load average is {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", file=sys.stderr)
        print(as_json(rows) if arguments.json else table(rows), flush=True)  # before all is removed, which may take a while
    return 0


if __name__ == "__main__":
    sys.exit(main())
