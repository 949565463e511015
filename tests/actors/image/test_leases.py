"""Leases, which outlive the processes that know of them."""

from __future__ import annotations

from pathlib import Path

from actors.image.leases import Leases, task_of

ONE, OTHER = "sha256:" + "1" * 64, "sha256:" + "2" * 64


def test_leases_are_found_again(tmp_path: Path) -> None:
    leases = Leases(tmp_path / "leases")
    leases.take("task/one.2_x-y", ONE)
    leases.take("mount-1", ONE)
    leases.take("task/gone", OTHER)
    leases.take("mount-1", OTHER)
    leases.take("mount-1", OTHER)
    leases.give_back("task/gone")
    leases.give_back("task/never")
    assert Leases(tmp_path / "leases").all() == {"task/one.2_x-y": ONE, "mount-1": OTHER}


def test_a_lease_may_have_any_name(tmp_path: Path) -> None:
    names = ["task/..", "..", "a b", "%2F", "é", "task/a/b"]
    leases = Leases(tmp_path)
    for name in names:
        leases.take(name, ONE)
    assert leases.all() == dict.fromkeys(names, ONE)
    for name in names:
        leases.give_back(name)
    assert leases.all() == {} and list(tmp_path.iterdir()) == []


def test_whose_it_is() -> None:
    assert (task_of("task/one"), task_of("mount-one")) == ("one", None)
