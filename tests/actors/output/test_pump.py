"""The pump in a mover of its own: every byte of a pipe, once, however often it is killed."""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from actors.output import wire
from actors.output.follower import Follower
from actors.output.pump import SPLICE_BYTES, Pump
from tests.actors.output.conmon import Conmon
from tests.actors.output.movers import RunningMover, file_sink, forked
from tests.actors.output.records import record, streams


@pytest.mark.parametrize("seed", range(3))
def test_a_pump_that_is_killed_loses_and_doubles_no_byte(mover: RunningMover, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    content = {"stdout": chance.randbytes(6_000_000), "stderr": chance.randbytes(2_000_000)}
    pipes, ends, writers = {}, [], []
    for stream, data in content.items():
        pipes[stream], writer = os.pipe()
        ends.append(writer)
        writers.append(
            forked(
                lambda data=data, writer=writer: [os.write(writer, data[at : at + 1009]) for at in range(0, len(data), 1009)]
            )
        )
    kills = 0
    while True:
        mover.pump("task", tmp_path, pipes)
        if mover.hear(wire.Pumped, within_s=chance.uniform(0.0, 0.02) if kills < 40 else 60):
            break
        mover.replace()
        kills += 1
        while ends:  # not before: it is not to have done all while this process had no turn
            os.close(ends.pop())
    assert kills > 0
    for stream, data in content.items():
        assert (tmp_path / f"{stream}.spill").read_bytes() == data
        os.close(pipes[stream])
    (gap,) = (tmp_path / "gaps").read_text().splitlines()
    assert json.loads(gap)["bytes_max"] == 8192
    for pid in writers:
        os.waitpid(pid, 0)


def test_conmon_is_killed_and_the_pump_takes_over(conmon: Conmon, mover: RunningMover, tmp_path: Path) -> None:
    # It prints until it is told to end: how far it is when conmon is killed, and the pump begins, nobody can know.
    conmon.create(
        "i=0; while [ ! -e /enough ]; do i=$((i + 1)); echo out $i; echo err $i >&2; [ $((i % 20)) = 0 ] && sleep 0.01; done\n"
        'printf "end of $i"'
    )
    pipes = dict(zip(("stdout", "stderr"), conmon.hold_pipes(), strict=True))
    directory, log = conmon.journal.parent, tmp_path / "task.log"
    mover.follow("task", directory, [file_sink(log)])
    conmon.start()
    assert mover.hear(wire.Moved)
    conmon.kill()
    mover.pump("task", directory, pipes)
    spill = directory / "stdout.spill"
    while not (spill.exists() and spill.stat().st_size > 0):
        assert mover.hear(wire.Moved), "the pump has moved something, and it is followed"
    conmon.enough()
    assert mover.hear(wire.Pumped)
    mover.finish("task")
    assert mover.hear(wire.Drained)
    for reader in pipes.values():
        os.close(reader)
    written = log.read_bytes()
    lines = int(written.rpartition(b"end of ")[2])
    for word in (b"out", b"err"):
        printed = b"".join(b"%s %d\n" % (word, number) for number in range(1, lines + 1))
        found = b"".join(line for line in written.splitlines(keepends=True) if line.startswith(word))
        # What is missing, if anything, is one piece that conmon had in its hands; and what is left of the lines at its two ends,
        # which is one line now, and may not begin with the word.
        missing = len(printed) - len(found)
        assert 0 <= missing <= 8192 + 2 * len(b"out %d\n" % lines)
        same = next((at for at in range(len(found)) if printed[at] != found[at]), len(found))
        assert printed[same + missing :] == found[same:]
    assert written.endswith(b"end of %d" % lines)


def test_what_is_pumped_is_followed_at_once(mover: RunningMover, tmp_path: Path) -> None:
    """splice(2) tells inotify of what it wrote, as write(2) does."""
    (tmp_path / "journal").write_bytes(record("stdout", "F", b"journal") + record("stdout", "F", b"torn")[:-1])
    reader, writer = os.pipe()
    with closing(Follower(tmp_path)) as follower:
        assert follower.read() == [("stdout", b"journal\n")]
        mover.pump("task", tmp_path, {"stdout": reader})
        os.close(reader)
        seen = b""
        for number in range(20):
            os.write(writer, b"%d " % number)
            expected = b"torn" + b"".join(b"%d " % one for one in range(number + 1))
            while seen != expected:
                assert follower.wait(60)
                while more := follower.read():
                    seen += streams(more)["stdout"]
                assert expected.startswith(seen)
    os.close(writer)
    assert mover.hear(wire.Pumped)


def test_a_pump_with_no_pipes_has_pumped_them_all(mover: RunningMover, tmp_path: Path) -> None:
    mover.pump("task", tmp_path, {})
    assert mover.hear(wire.Pumped) == wire.Pumped("task")


def test_a_turn_is_bounded_however_fast_the_task_writes(tmp_path: Path) -> None:
    size_bytes, turns = 32 << 20, 0
    reader, writer = os.pipe()
    with (
        subprocess.Popen(["head", "-c", str(size_bytes), "/dev/zero"], stdout=writer),
        closing(Pump(tmp_path, "stdout", reader)) as pump,
    ):
        os.close(writer)
        spill, before, more = tmp_path / "stdout.spill", 0, True
        while more:
            assert select.select([reader], [], [], 60)[0]
            more = pump.move()
            assert spill.stat().st_size - before <= SPLICE_BYTES
            before, turns = spill.stat().st_size, turns + 1
    assert before == size_bytes and turns > size_bytes // SPLICE_BYTES
