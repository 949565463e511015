"""Descriptors by name: whose they are, and how they are cut into messages."""

from __future__ import annotations

import os

import pytest

from supervisor.held import DATA_BYTES_MAX, PACKET_BYTES_MAX, Held
from supervisor.keeping import FROM_KEEPER, TO_KEEPER, Keep, Kept


def files(count: int) -> list[int]:
    return [os.memfd_create(str(number)) for number in range(count)]


def is_open(descriptor: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{descriptor}")


def test_what_is_put_is_held_until_it_is_dropped() -> None:
    held, (one, two) = Held(), files(2)
    held.put(["one", "two"], [one, two], {"one": b"data"})
    assert (held.names(), held.get("one"), held.data("one"), held.data("two")) == (["one", "two"], one, b"data", b"")
    assert "one" in held
    assert held.drop(["two", "three", "one"]) == ["two", "one"]
    assert (held.names(), held.get("one"), held.data("one")) == ([], None, b"")
    assert not is_open(one) and not is_open(two)


def test_what_is_replaced_is_closed_and_its_data_forgotten() -> None:
    held, (one, two) = Held(), files(2)
    held.put(["a"], [one], {"a": b"data"})
    held.put(["a"], [one], {})  # the same one: it stays open
    assert is_open(one) and held.data("a") == b"data"
    held.put(["a"], [two], {})
    assert not is_open(one)
    assert (held.get("a"), held.data("a")) == (two, b"")
    held.drop(["a"])


@pytest.mark.parametrize(
    ("names", "data", "text"),
    [
        (["a"], {}, "1 names came with 2 descriptors"),
        (["a", "b"], {"b": b"x" * (DATA_BYTES_MAX + 1)}, "b: 16385 bytes of data; at most 16384 are allowed"),
    ],
)
def test_what_cannot_be_held_stays_its_owner_s(names: list[str], data: dict[str, bytes], text: str) -> None:
    held, descriptors = Held(), files(2)
    with pytest.raises(ValueError, match=text):
        held.put(names, descriptors, data)
    assert held.names() == []
    for descriptor in descriptors:
        os.close(descriptor)  # which they still are: open


@pytest.mark.parametrize("size_bytes", [0, 1, 1000, DATA_BYTES_MAX])
def test_every_packet_is_small_enough_to_be_a_message(size_bytes: int) -> None:
    held, names = Held(), [f"a name as long as those of tasks may well be {number:03}" for number in range(100)]
    held.put(names, files(100), dict.fromkeys(names, b"x" * size_bytes) if size_bytes else {})
    sent: list[str] = []
    for packet, data, descriptors in held.packets(held.names()):
        FROM_KEEPER.encode(Kept(packet, data))
        TO_KEEPER.encode(Keep(packet, data))  # raise when they are over the bound
        assert [held.get(name) for name in packet] == descriptors
        assert len(packet) <= 32
        assert all(data.get(name, b"") == held.data(name) for name in packet)
        assert sum(map(len, data.values())) <= PACKET_BYTES_MAX + DATA_BYTES_MAX
        sent += packet
    assert sent == names
    held.drop(names)
