"""Messages and descriptors between two ends, and what each end sees when the other misbehaves or dies."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.frames import Codec, FrameError, Message


class Note(Message, frozen=True):
    text: str


CODEC = Codec(Note, size_bytes_max=1000)


@pytest.fixture
def ends():
    here, socket_there = Channel.pair(CODEC)
    there = Channel(socket_there, CODEC)
    yield here, there
    here.close()
    there.close()


def test_messages_arrive_in_order(ends) -> None:
    here, there = ends
    for number in range(10):
        here.send(Note(str(number)))
    assert [there.receive()[0].text for _ in range(10)] == [str(number) for number in range(10)]


def test_descriptors_arrive_with_their_message_and_close_on_exec(ends) -> None:
    here, there = ends
    reader, writer = os.pipe()
    here.send(Note("a pipe"), [writer])
    os.close(writer)
    message, (copy,) = there.receive()
    assert message == Note("a pipe")
    assert not os.get_inheritable(copy)
    os.write(copy, b"through")
    os.close(copy)
    assert os.read(reader, 100) == b"through"
    os.close(reader)


def test_a_receive_ends_with_its_time(ends) -> None:
    here, _ = ends
    with pytest.raises(ChannelTimeout):
        here.receive(0)
    with pytest.raises(ChannelTimeout):
        here.receive(0.01)


def test_a_send_to_who_does_not_read_ends_with_its_time(ends) -> None:
    here, _ = ends
    with pytest.raises(ChannelTimeout):
        for _ in range(100_000):
            here.send(Note("x" * 900), timeout_s=0)


def test_two_threads_with_time_outs_of_their_own_do_not_disturb_each_other(ends) -> None:
    here, there = ends
    got: list[str] = []
    reading = threading.Thread(target=lambda: got.append(here.receive(None)[0].text))
    reading.start()
    for _ in range(100):
        here.send(Note("out"), timeout_s=0)
        there.receive()
    there.send(Note("in"))
    reading.join(60)
    assert got == ["in"]


def test_the_other_ends_death_is_seen_by_both_operations(ends) -> None:
    here, there = ends
    there.close()
    with pytest.raises(ChannelClosed):
        here.send(Note("anybody?"))
    with pytest.raises(ChannelClosed):
        here.receive()


def test_what_is_no_message_is_an_error_and_its_descriptors_are_closed(ends) -> None:
    here, there = ends
    reader, writer = os.pipe()
    socket.send_fds(here.socket, [b"\xc1 garbage"], [writer])
    os.close(writer)
    with pytest.raises(FrameError):
        there.receive()
    assert os.read(reader, 1) == b""  # nobody holds the other end any more
    os.close(reader)


def test_a_packet_over_the_bound_is_an_error_and_the_next_is_read(ends) -> None:
    here, there = ends
    here.socket.send(b"x" * 5000)
    here.send(Note("next"))
    with pytest.raises(FrameError):
        there.receive()
    assert there.receive()[0] == Note("next")
