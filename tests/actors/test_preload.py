"""What isolated processes need is loaded by the fork server, once for all of them, and by none of them when somebody waits for it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from actors.daemon import PRELOAD

ROOT = Path(__file__).parents[2]
PROGRAM = """
import importlib, sys
for module in sys.argv[2:]:
    importlib.import_module(module)
before = set(sys.modules)
importlib.import_module(sys.argv[1])
print(*(set(sys.modules) - before))
"""


def entries() -> list[str]:
    """The modules of the entries that actors start."""
    found: set[str] = set()
    for path in (ROOT / "actors").rglob("*.py"):
        if path.parent.name != "gateway":  # its are commands
            found.update(re.findall(r'"(actors[\w.]+):', path.read_text()))
    return sorted(found)


def test_the_entries_are_found() -> None:
    assert {"actors.mount.serve", "actors.image.serve", "actors.output.process"} <= set(entries())


@pytest.mark.parametrize("module", entries())
def test_an_entry_loads_nothing(module: str) -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", PROGRAM, module, *PRELOAD], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.split() == []
