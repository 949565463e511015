"""Traces: what is in one, what is recorded, and what is a trace at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from actors.image.archives.trace import (
    BLOCK_BYTES,
    BLOCKS_MAX,
    TRACES_MAX,
    WINDOW_S,
    Block,
    Trace,
    TraceInvalid,
    decode,
    encode,
    load,
    pack_blocks,
    save,
    trace_path,
    workload_of,
    workloads,
)
from actors.image.lazy.recording import Recorder
from actors.image.prefetch.tracing import Tracing
from actors.image.wire import TracePart

NUMBERS = some.integers(0, 2**32 - 1)
BLOCKS = some.lists(some.builds(Block, NUMBERS, NUMBERS), max_size=20)
DIGEST = "sha256:" + "a1" * 32


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(some.builds(Trace, BLOCKS, some.integers(0, 2**63), some.floats(0, 1e6)))
def test_a_trace_is_read_as_it_was_written(trace: Trace) -> None:
    assert decode(encode(trace)) == trace


@given(BLOCKS, some.data())
def test_a_trace_that_was_damaged_or_cut_is_none(blocks: list[Block], data: some.DataObject) -> None:
    encoded = bytearray(encode(Trace(blocks, 5, 0.5)))
    if data.draw(some.booleans()):
        encoded = encoded[: data.draw(some.integers(0, len(encoded) - 1))]
    else:
        encoded[data.draw(some.integers(0, len(encoded) - 1))] ^= data.draw(some.integers(1, 255))
    with pytest.raises(TraceInvalid):
        decode(bytes(encoded))


def test_a_trace_has_a_bound() -> None:
    blocks = [Block(0, number) for number in range(BLOCKS_MAX + 1)]
    assert len(decode(encode(Trace(blocks[:-1]))).blocks) == BLOCKS_MAX
    with pytest.raises(ValueError, match="16385 blocks"):
        encode(Trace(blocks))


def test_traces_lie_beside_the_archive_and_the_oldest_go(tmp_path: Path) -> None:
    names = [workload_of(["run", str(number)]) for number in range(TRACES_MAX + 1)]
    for at, name in enumerate(names):
        save(str(tmp_path), DIGEST, name, Trace([Block(at, 0)]))
        os.utime(trace_path(str(tmp_path), DIGEST, name), (at, at))
    assert workloads(str(tmp_path), DIGEST) == set(names[1:])
    assert workloads(str(tmp_path), DIGEST.replace("a1", "b2")) == set()
    assert load(str(tmp_path), DIGEST, names[0]) is None
    assert load(str(tmp_path), DIGEST, names[5]) == Trace([Block(5, 0)])
    Path(trace_path(str(tmp_path), DIGEST, names[5])).write_bytes(b"none")
    assert load(str(tmp_path), DIGEST, names[5]) is None


def test_a_workload_is_its_words() -> None:
    names = [workload_of(command) for command in ([], ["a b"], ["a", "b"], ["a", "b", ""], ["\udcff"])]
    assert len(set(names)) == len(names)
    assert names[2] == workload_of(("a", "b"))


K = BLOCK_BYTES


@pytest.mark.parametrize(
    ("asked", "recorded"),
    [
        ([(7, 0, 1)], [(7, 0)]),
        ([(7, 0, K)], [(7, 0)]),
        ([(7, 0, K + 1)], [(7, 0), (7, 1)]),
        ([(7, K - 1, 2)], [(7, 0), (7, 1)]),
        ([(7, 3 * K, 2 * K)], [(7, 3), (7, 4)]),
        ([(7, 3 * K, 1), (2, 0, 1), (7, 0, 1)], [(7, 3), (2, 0), (7, 0)]),  # the order of asking
        ([(7, 3 * K, 1), (7, 2 * K, 2 * K), (7, 3 * K, 1)], [(7, 3), (7, 2)]),  # each once
    ],
)
def test_what_is_read_is_recorded_in_blocks(asked: list[tuple[int, int, int]], recorded: list[tuple[int, int]]) -> None:
    recorder = Recorder(Clock())
    recorder.begin("one")
    for read in asked:
        recorder.read(*read)
    assert recorder.end("one") == recorded
    assert recorder.end("one") is None


def test_what_the_kernel_has_already_comes_along_when_it_is_opened() -> None:
    recorder = Recorder(Clock())
    recorder.read(7, 5 * K, 1)
    recorder.read(7, 2 * K, K)
    recorder.read(8, 0, 1)
    recorder.begin("one")
    recorder.opened(3)
    recorder.opened(7)
    recorder.read(7, 0, 1)
    assert recorder.end("one") == [(7, 2), (7, 5), (7, 0)]


def test_recordings_at_once_have_everything_from_their_own_beginning_on() -> None:
    recorder = Recorder(Clock())
    recorder.begin("one")
    recorder.read(1, 0, 1)
    recorder.begin("two")
    recorder.read(2, 0, 1)
    assert recorder.end("one") == [(1, 0), (2, 0)]
    recorder.read(3, 0, 1)
    assert recorder.end("two") == [(2, 0), (3, 0)]


def test_a_recording_ends_with_its_time_and_when_it_is_full() -> None:
    clock = Clock()
    recorder = Recorder(clock)
    recorder.begin("long")
    recorder.read(1, 0, 1)
    clock.now = WINDOW_S - 1
    recorder.begin("full")
    assert recorder.ended() == []
    recorder.read(2, 0, BLOCKS_MAX * K)
    assert recorder.ended() == ["long", "full"]
    clock.now = WINDOW_S
    recorder.read(3, 0, 1)
    recorder.begin("long")  # which it does not begin anew
    full = recorder.end("full")
    assert full is not None and full == [(2, number) for number in range(BLOCKS_MAX)]
    assert recorder.ended() == ["long"]


def test_the_first_task_of_a_workload_without_a_trace_is_recorded() -> None:
    tracing = Tracing({"known"})
    assert [tracing.wants(workload) for workload in ("", "known", "new")] == [False, False, True]
    tracing.begin("task/1", "new")
    assert not tracing.wants("new") and tracing.is_recorded("task/1")
    blocks = [Block(1, 2), Block(3, 4)]
    assert tracing.take(TracePart("task/2", pack_blocks(blocks), True)) is None  # of an earlier mount
    assert tracing.take(TracePart("task/1", pack_blocks(blocks[:1]), False)) is None
    recorded = tracing.take(TracePart("task/1", pack_blocks(blocks[1:]), True, 77, 0.5))
    assert recorded is not None and recorded.workload == "new" and recorded.trace == Trace(blocks, 77, 0.5)
    assert not tracing.wants("new") and not tracing.is_recorded("task/1")


@pytest.mark.parametrize("sent", [b"", b"abc", bytes(8 * BLOCKS_MAX + 8)], ids=["nothing", "half", "too much"])
def test_what_is_no_trace_is_recorded_again_with_the_next_task(sent: bytes) -> None:
    tracing = Tracing(set())
    tracing.begin("task/1", "new")
    assert tracing.take(TracePart("task/1", sent, True)) is None
    assert tracing.wants("new")
