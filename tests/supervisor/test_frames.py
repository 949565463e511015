"""Frames cut anywhere come out whole; whatever is not a message is refused with a text for its sender."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.frames import LENGTH, Codec, FrameBuffer, FrameError, Message


class Ping(Message, frozen=True):
    number: int
    text: str = ""


class Pong(Message, frozen=True):
    body: bytes


class Stranger(Message, frozen=True):
    number: int


CODEC = Codec(Ping, Pong, size_bytes_max=1000)
messages = st.one_of(
    st.builds(Ping, number=st.integers(-(2**63), 2**63 - 1), text=st.text(max_size=50)),
    st.builds(Pong, body=st.binary(max_size=200)),
)


@given(st.lists(messages, max_size=8), st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_a_stream_cut_anywhere_gives_the_same_messages(sent: list[Message], cuts: list[int]) -> None:
    stream = b"".join(CODEC.frame(message) for message in sent)
    buffer, got, at, turn = FrameBuffer(CODEC), [], 0, 0
    while at < len(stream):
        size = cuts[turn % len(cuts)]
        buffer.feed(stream[at : at + size])
        got += list(buffer)
        at, turn = at + size, turn + 1
    assert got == sent
    assert len(buffer) == 0


@given(st.binary(max_size=300))
def test_garbage_is_a_frame_error_or_a_message(body: bytes) -> None:
    try:
        assert isinstance(CODEC.decode(body), Ping | Pong)
    except FrameError as error:
        assert str(error)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"type": "Ping"}),  # a field is missing
        msgspec.msgpack.encode({"type": "Ping", "number": "1"}),  # a field has another type
        msgspec.msgpack.encode({"type": "Nobody", "number": 1}),
        msgspec.msgpack.encode(Stranger(1)),
        msgspec.msgpack.encode([1, 2, 3]),
        msgspec.msgpack.encode(Ping(1)) + b"more",
    ],
)
def test_what_is_not_a_message_is_refused(body: bytes) -> None:
    with pytest.raises(FrameError):
        CODEC.decode(body)


def test_a_frame_over_the_bound_is_refused_when_its_length_is_read() -> None:
    buffer = FrameBuffer(CODEC)
    buffer.feed(LENGTH.pack(1 << 30))
    with pytest.raises(FrameError, match="1073741824 bytes"):
        list(buffer)


def test_a_message_over_the_bound_is_not_sent() -> None:
    with pytest.raises(FrameError, match="at most 1000"):
        CODEC.encode(Pong(bytes(2000)))


def test_messages_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Ping(1).number = 2  # type: ignore[misc]
