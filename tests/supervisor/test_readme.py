"""What `supervisor/README.md` shows is so, and the package needs nothing but what it says there."""

from __future__ import annotations

import ast
import configparser
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "supervisor" / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
EXAMPLES = [(code, output) for (kind, code), (_, output) in pairwise(BLOCKS) if kind == "python"]


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A directory in which the package is, and none of its neighbours."""
    shutil.copytree(ROOT / "supervisor", tmp_path / "supervisor", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize(("code", "output"), EXAMPLES, ids=["actors", "rule book"])
def test_an_example_prints_what_it_says(alone: Path, code: str, output: str) -> None:
    (alone / "example.py").write_text(code)
    done = subprocess.run([sys.executable, "example.py"], cwd=alone, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == output


def test_every_module_loads_by_itself(alone: Path) -> None:
    modules = sorted(path.stem for path in (alone / "supervisor").glob("*.py") if path.stem != "__init__")
    script = "import importlib, sys; [importlib.import_module('supervisor.' + name) for name in sys.argv[1:]]"
    subprocess.run([sys.executable, "-c", script, *modules], cwd=alone, timeout=60, check=True)


def test_it_depends_on_what_it_says() -> None:
    (project,) = (tomllib.loads(code) for kind, code in BLOCKS if kind == "toml")
    ours = configparser.ConfigParser()
    ours.read(ROOT / "setup.cfg")
    said = set(project["project"]["dependencies"])
    assert said <= set(ours["options"]["install_requires"].split("\n"))
    imported = set()
    for path in (ROOT / "supervisor").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import(names):
                    imported |= {alias.name.partition(".")[0] for alias in names}
                case ast.ImportFrom(module=str(module)):
                    imported.add(module.partition(".")[0])
    assert {line.split()[0].replace("-", "_") for line in said} == imported - sys.stdlib_module_names - {"supervisor"}
