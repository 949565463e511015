"""The event log: whole records, in order, bounded, whoever is killed while it writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from supervisor.events import TEXT_CHARS_MAX, Event, EventLog, read_events, shortened


def event(number: int, text: str = "") -> Event:
    return Event(1.5, "top", f"child {number}", number, "ended", "crash", text, 0.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events"


def test_what_is_appended_is_read(path: Path) -> None:
    log = EventLog(path)
    written = [event(number, "naïve \n \x00 “quoted”") for number in range(3)]
    for each in written:
        log.append(each)
    assert list(read_events(path)) == written  # while it is open
    log.close()


def test_nothing_is_read_where_there_is_nothing(path: Path) -> None:
    assert list(read_events(path)) == []


def test_another_process_goes_on_where_one_has_ended(path: Path) -> None:
    for number in range(3):
        log = EventLog(path)
        log.append(event(number))
        log.close()
    assert [each.generation for each in read_events(path)] == [0, 1, 2]


def test_it_is_bounded_and_keeps_the_newest(path: Path) -> None:
    log = EventLog(path, size_bytes_max=10_000)
    for number in range(1000):
        log.append(event(number))
    log.close()
    assert sum(each.stat().st_size for each in path.parent.iterdir()) <= 10_000
    numbers = [each.generation for each in read_events(path)]
    assert numbers == list(range(1000 - len(numbers), 1000))
    assert len(numbers) > 30


@pytest.mark.parametrize("torn", [b'{"at_s":1.5,"supervisor":"to', b"\x00" * 100, b"garbage\n", b"\xff\n", b"{}\n"])
def test_what_a_power_cut_has_torn_is_left_out(path: Path, torn: bytes) -> None:
    log = EventLog(path)
    log.append(event(0))
    log.close()
    with open(path, "ab") as file:
        file.write(torn)
    log = EventLog(path)
    log.append(event(1))
    log.close()
    assert [each.generation for each in read_events(path)] == [0, 1]


def test_threads_write_whole_records(path: Path) -> None:
    log = EventLog(path, size_bytes_max=1 << 20)
    threads = [
        threading.Thread(target=lambda first=first: [log.append(event(number)) for number in range(first, first + 100)])
        for first in range(0, 800, 100)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert sorted(each.generation for each in read_events(path)) == list(range(800))


def test_who_is_killed_loses_nothing_that_was_written(path: Path) -> None:
    """A real SIGKILL, at any moment: all that the writer says it has written is there, and no half of anything."""
    script = (
        "import sys; from pathlib import Path; from supervisor.events import Event, EventLog\n"
        "log = EventLog(Path(sys.argv[1]), 1 << 24)\n"
        "for number in range(10**9):\n"
        "    log.append(Event(0.0, 'top', 'a', number, 'ended', 'crash', 'x' * 200))\n"
        "    print(number, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        said = [int(writer.stdout.readline()) for _ in range(500)]
        writer.send_signal(signal.SIGKILL)
        said += [int(line) for line in writer.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    numbers = [each.generation for each in read_events(path)]
    assert numbers[: len(said)] == said
    assert len(numbers) - len(said) <= 1


def test_a_full_disk_costs_records_and_no_more(path: Path) -> None:
    log = EventLog(Path("/dev/full"))
    log.append(event(0))
    log.close()


def test_a_text_is_shortened_to_what_can_be_written(path: Path) -> None:
    assert shortened("short") == "short"
    assert len(shortened("x" * 10**6)) <= TEXT_CHARS_MAX + 3
    assert shortened("\udce4") == "\\udce4"
    assert os.fsencode(shortened("x" * 5000 + "\udce4"))
