"""A file sink has each line once and in its stream's order, whoever is killed while it is written (`model`, invariant 2)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.test_kills import strike, wait_for_lines
from tests.node.daemon import running

LINES = 3000


@pytest.mark.parametrize("name", [None, "output mover", "root supervisor"])
def test_a_file_has_each_line_once(tmp_path: Path, image: str, name: str | None) -> None:
    with running(tmp_path, image, AERIE_OUTPUT_FILE_DIR=str(tmp_path / "logs")) as daemon:
        script = f"i=0; while [ $i -lt {LINES} ]; do i=$((i+1)); echo out $i; echo err $i >&2; done; printf end"
        task = daemon.submit(script)
        wait_for_lines(daemon, task, 200)
        if name:
            strike(daemon, name)
        assert daemon.result(task).exit_code == 0
    # A daemon that has stopped has given its sinks all they were to have.
    lines = (tmp_path / "logs" / f"{task}.log").read_text().splitlines()
    assert [line for line in lines if line.startswith("out")] == [f"out {number}" for number in range(1, LINES + 1)]
    assert [line for line in lines if line.startswith("err")] == [f"err {number}" for number in range(1, LINES + 1)]
    assert "end" in lines and len(lines) == 2 * LINES + 1
