"""The output mover as a process: what it moves is exact, however often it is killed."""

from __future__ import annotations

import os
import random
import shutil
import time
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from inotify_simple import INotify, flags

from actors.output import course, wire
from actors.output.follower import Position
from actors.output.lines import LINE_BYTES_MAX
from actors.output.sinks import SinkPosition
from actors.sandbox.messages import Sink
from tests.actors.output.conftest import SmallDisk
from tests.actors.output.movers import RunningMover, file_sink, forked
from tests.actors.output.records import record


def line(number: int) -> tuple[str, bytes]:
    return "stdout" if number % 2 else "stderr", b"%08d %s" % (number, b"." * (number * 7919 % 61))


def write_journal(path: Path, lines: int, seed: int) -> None:
    """As a conmon does that is read in the middle of its writes: lines of both streams, some in pieces, cut anywhere."""
    chance = random.Random(seed)
    with open(path, "ab", buffering=0) as file:
        waiting = bytearray()
        for number in range(lines):
            stream, text = line(number)
            at = chance.randrange(len(text)) if number % 3 else 0
            waiting += (record(stream, "P", text[:at], number // 8) if at else b"") + record(
                stream, "F", text[at:], number // 8
            )
            if len(waiting) > 65536:
                edge = chance.randrange(len(waiting))
                file.write(waiting[:edge])
                del waiting[:edge]
        file.write(waiting + record("stdout", "P", b"no newline"))


@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_kills_loses_doubles_and_reorders_nothing(
    mover: RunningMover, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(course, "RECORD_S", 0.005 * seed)  # positions as often as kills, so that they meet
    chance, lines = random.Random(seed), 40_000
    directories = {f"task-{number}": tmp_path / f"task-{number}" for number in range(2)}
    sinks = {task: [file_sink(tmp_path / f"{task}.{number}.log") for number in range(2)] for task in directories}

    def order() -> None:
        for task, directory in directories.items():
            mover.follow(task, directory, sinks[task])

    for directory in directories.values():
        directory.mkdir()
    mover.replace()
    order()
    writers = [forked(lambda path=path: write_journal(path / "journal", lines, seed)) for path in directories.values()]
    kills = 0
    while writers or kills < 20:
        mover.hear(within_s=chance.uniform(0.0, 0.06))
        mover.replace(listen=chance.random() < 0.7)
        kills += 1
        order()
        writers = [pid for pid in writers if os.waitpid(pid, os.WNOHANG)[0] == 0]
    for task in directories:
        mover.finish(task)
    drained = {mover.hear(wire.Drained).task for _ in directories}
    assert drained == set(directories)
    assert mover.positions
    for task in directories:
        for sink in sinks[task]:
            written = Path(sink.path).read_bytes().splitlines(keepends=True)
            assert written.pop() == b"no newline"
            for odd in (0, 1):
                assert [some for some in written if int(some[:8]) % 2 == odd] == [
                    line(n)[1] + b"\n" for n in range(odd, lines, 2)
                ]


def test_a_last_line_without_newline_is_not_lost_when_it_comes_with_the_end(mover: RunningMover, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    journal.write_bytes(record("stdout", "F", b"line"))
    mover.follow("task", tmp_path, [file_sink(tmp_path / "task.log")])
    assert mover.hear(wire.Moved)
    mover.stop()
    with open(journal, "ab") as file:
        file.write(record("stdout", "P", b"end"))
    mover.finish("task")
    mover.resume()
    assert mover.hear(wire.Drained)
    assert (tmp_path / "task.log").read_bytes() == b"line\nend"
    (saved,) = mover.positions["task"].values()
    position = msgspec.msgpack.decode(saved, type=SinkPosition)
    assert position == SinkPosition(Position(journal=journal.stat().st_size), length_bytes=8), (
        "drained is on record, and durable"
    )


def test_a_task_that_prints_no_newline_harms_nobody(mover: RunningMover, tmp_path: Path) -> None:
    """The longest partial lines, in the positions of four sinks, fit into messages both ways."""
    text = random.Random(0).randbytes(8192).replace(b"\n", b"\r")
    (tmp_path / "journal").write_bytes(record("stdout", "P", text) * 100 + record("stderr", "P", text) * 2)
    sinks = [Sink("console"), *(file_sink(tmp_path / f"{number}.log") for number in range(3))]
    mover.follow("task", tmp_path, sinks)
    while len(mover.positions.get("task", {})) < 4 or min(map(len, mover.positions["task"].values())) < 2 * LINE_BYTES_MAX:
        assert mover.hear(wire.Moved)
    mover.replace()
    mover.follow("task", tmp_path, sinks)
    mover.finish("task")
    assert mover.hear(wire.Drained)
    for sink in sinks[1:]:
        assert Path(sink.path).read_bytes() == 102 * text


def test_a_task_is_not_drained_before_a_sink_that_cannot_be_opened_has_it_all(mover: RunningMover, tmp_path: Path) -> None:
    (tmp_path / "journal").write_bytes(record("stdout", "F", b"line"))
    (tmp_path / "logs").write_text("in the way")
    mover.follow("task", tmp_path, [Sink("console"), file_sink(tmp_path / "logs" / "task.log")])
    mover.finish("task")
    assert mover.hear(wire.SinkFailed).sink == f"file:{tmp_path}/logs/task.log"
    assert mover.hear(wire.SinkFailed, wire.Drained, within_s=0.7) is None, "neither done nor said twice"
    (tmp_path / "logs").unlink()
    assert mover.hear(wire.Drained)
    assert (tmp_path / "logs" / "task.log").read_bytes() == b"line\n"


def test_a_sink_that_failed_is_followed_again(mover: RunningMover, tmp_path: Path) -> None:
    """Also when it had nothing to move when it recovered."""
    log = tmp_path / "logs" / "task.log"
    log.parent.write_text("in the way")
    mover.follow("task", tmp_path, [file_sink(log)])
    assert mover.hear(wire.SinkFailed)
    (tmp_path / "journal").touch()  # growth that must not make it try at once
    with closing(INotify()) as signs:
        signs.add_watch(tmp_path, flags.CREATE)  # before the way is free: it may be tried again at once after that
        log.parent.unlink()
        assert any(event.name == "logs" for event in signs.read(timeout=60_000))
    (tmp_path / "journal").write_bytes(record("stdout", "F", b"line"))
    assert mover.hear(wire.Moved)
    assert log.read_bytes() == b"line\n"


def test_a_kind_of_sink_that_there_is_not(mover: RunningMover, tmp_path: Path) -> None:
    mover.follow("task", tmp_path, [Sink("pigeon")])
    assert "'pigeon'" in mover.hear(wire.SinkFailed).error
    mover.finish("task")
    assert mover.hear(wire.Drained)


def test_growth_that_inotify_had_no_room_for_is_found(mover: RunningMover, tmp_path: Path) -> None:
    tasks = ["quiet", "loud", "louder"]  # in this order: it has looked again, and found nothing more, before it is stopped
    for task in tasks:
        (tmp_path / task).mkdir()
        (tmp_path / task / "journal").write_bytes(record("stdout", "F", b"first"))
        mover.follow(task, tmp_path / task, [Sink("console")])
        assert mover.hear(wire.Moved).task == task
    mover.stop()
    room = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    with open(tmp_path / "loud" / "journal", "ab", 0) as loud, open(tmp_path / "louder" / "journal", "ab", 0) as louder:
        for _ in range(room // 2 + 1):  # in turn, for the kernel makes one event of two that are the same
            loud.write(b"x")
            louder.write(b"x")
    with open(tmp_path / "quiet" / "journal", "ab") as quiet:
        quiet.write(record("stdout", "F", b"second"))
    mover.resume()
    assert mover.hear(wire.Moved).task == "quiet"


def test_a_directory_that_is_removed(mover: RunningMover, tmp_path: Path) -> None:
    directory, log = tmp_path / "output", tmp_path / "task.log"
    directory.mkdir()
    (directory / "journal").write_bytes(record("stdout", "F", b"line"))
    mover.follow("task", directory, [file_sink(log)])
    assert mover.hear(wire.Moved)
    shutil.rmtree(directory)
    mover.finish("task")
    assert mover.hear(wire.Drained)
    mover.follow("task", directory, [file_sink(log)])
    mover.finish("task")
    assert mover.hear(wire.Drained), "of what is not there nothing is missing"
    assert log.read_bytes() == b"line\n"


def test_a_full_disk_costs_a_sink_and_a_spill_only_time(small_disk: SmallDisk, mover: RunningMover) -> None:
    full = small_disk.path / "output"
    full.mkdir()
    (full / "journal").write_bytes(b"".join(record("stdout", "F", b"%0100d" % number) for number in range(2000)))
    small_disk.fill()
    mover.follow("task", full, [file_sink(full / "task.log")])
    assert mover.hear(wire.SinkFailed).sink == f"file:{full}/task.log"
    reader, writer = os.pipe()
    os.write(writer, b"spilled " * 1000)
    os.close(writer)
    mover.pump("task", full, {"stdout": reader})
    os.close(reader)
    assert mover.hear(wire.SinkFailed).sink == "spill"

    def took_s() -> float:
        began_s = mover.processor_s()
        assert mover.hear(wire.SinkFailed, wire.Pumped, wire.Drained, within_s=0.7) is None
        return mover.processor_s() - began_s

    assert any(took_s() < 0.3 for _ in range(3)), "it waits, though pipe and journal are readable all the time"
    small_disk.free()
    assert mover.hear(wire.Pumped)
    mover.finish("task")
    assert mover.hear(wire.Drained)
    assert (full / "task.log").read_bytes() == b"".join(b"%0100d\n" % number for number in range(2000)) + b"spilled " * 1000


def test_each_outage_is_told_once(small_disk: SmallDisk, mover: RunningMover, tmp_path: Path) -> None:
    block = b"".join(record("stdout", "F", b"%0100d" % number) for number in range(400))
    mover.follow("task", tmp_path, [file_sink(small_disk.path / "task.log")])
    for outage in range(2):
        small_disk.fill()
        with open(tmp_path / "journal", "ab") as journal:
            journal.write(block)
        assert "No space left" in mover.hear(wire.SinkFailed).error
        small_disk.free()
        while (small_disk.path / "task.log").stat().st_size < (outage + 1) * 400 * 101:
            assert mover.hear(wire.Moved)
    assert len([message for message in mover.heard if isinstance(message, wire.SinkFailed)]) == 2


@pytest.mark.alone
def test_a_mover_with_nothing_to_move_rests(small_disk: SmallDisk, mover: RunningMover, tmp_path: Path) -> None:
    """However often it was woken before, and with a directory that was removed: the heartbeat is all that goes on."""
    (tmp_path / "removed").mkdir()
    mover.follow("other", tmp_path / "removed", [Sink("console")])
    mover.follow("task", tmp_path, [file_sink(small_disk.path / "task.log")])  # in memory: to wait for a disk is no rest
    (tmp_path / "journal").write_bytes(record("stdout", "F", b"line"))
    assert mover.hear(wire.Moved), "it watches both"
    (tmp_path / "removed").rmdir()
    status = Path(f"/proc/{mover.pid}/status")

    def switches() -> int:
        return int(status.read_text().partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    def rests() -> bool:
        with open(tmp_path / "journal", "ab", buffering=0) as file:
            for number in range(300):
                file.write(record("stdout", "F", b"%d" % number))
                mover.hear(within_s=0.002)
        began_at_s, began, began_s = time.monotonic(), switches(), mover.processor_s()
        while mover.hear(wire.Moved, within_s=1.5):  # the last one within half a second
            pass
        # Twelve in two seconds, and one heartbeat in each that this process was late.
        late_s = max(0.0, time.monotonic() - began_at_s - 2.0)
        return switches() - began <= 12 + 2 * late_s and mover.processor_s() - began_s <= 0.05

    assert any(rests() for _ in range(3))


def test_more_tasks_than_inotify_has_instances(small_disk: SmallDisk, mover: RunningMover, tmp_path: Path) -> None:
    names = [f"task-{number}" for number in range(200)]
    for name in names:
        (tmp_path / name).mkdir()
        mover.follow(name, tmp_path / name, [file_sink(small_disk.path / f"{name}.log")])  # in memory: 200 fsyncs take long
    for name in names:
        (tmp_path / name / "journal").write_bytes(record("stdout", "F", name.encode()))
        mover.finish(name)
    assert {mover.hear(wire.Drained).task for _ in names} == set(names)
    assert not [message for message in mover.heard if isinstance(message, wire.SinkFailed)]
    assert all((small_disk.path / f"{name}.log").read_text() == f"{name}\n" for name in names)


def test_a_successor_waits_for_the_lock_and_a_closed_channel_ends_it(mover: RunningMover, tmp_path: Path) -> None:
    assert mover.hear(wire.Progress)
    second = RunningMover(tmp_path / "mover.lock")
    assert second.hear(wire.Progress, within_s=0.5) is None
    assert mover.end() == 0
    assert second.hear(wire.Progress)
    assert second.end() == 0


@pytest.mark.alone
def test_moving_is_fast(mover: RunningMover, tmp_path: Path) -> None:
    lines = 200_000
    (tmp_path / "journal").write_bytes(
        b"".join(record("stdout", "F", b"%080d" % number, number // 50) for number in range(lines))
    )
    began_s = mover.processor_s()
    mover.follow("task", tmp_path, [file_sink(tmp_path / "task.log")])
    mover.finish("task")
    assert mover.hear(wire.Drained)
    assert (tmp_path / "task.log").stat().st_size == 81 * lines
    assert mover.processor_s() - began_s < 5  # 0.2 s on the machine it was written on


def test_two_tasks_do_not_write_to_one_file(mover: RunningMover, tmp_path: Path) -> None:
    """The second is told; were its lines written as well, each would overwrite the other's."""
    log = tmp_path / "shared.log"
    for task in ("first", "second"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "journal").write_bytes(record("stdout", "F", task.encode(), 1))
        mover.follow(task, tmp_path / task, [file_sink(log)])
    refused = mover.hear(wire.SinkFailed)
    assert refused.task == "second" and "output goes there already" in refused.error
    for task in ("first", "second"):
        mover.finish(task)
    assert {mover.hear(wire.Drained).task for _ in range(2)} == {"first", "second"}
    assert log.read_bytes() == b"first\n"
