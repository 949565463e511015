"""Standing orders, with a real keeper, fork server and root supervisor: who is killed or hangs, and what the keeper does alone."""

from __future__ import annotations

import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest

from supervisor.events import read_events
from supervisor.keeping import Hello, Kept, KeptAll, Stand, StandingOrder, Welcome
from supervisor.lockfile import sign_of
from supervisor.pidfd import pid_of
from supervisor.pulse import DUMP_S, LOOK_AGAIN_S
from supervisor.replacing import ANSWER_S
from tests.supervisor.daemons_under_test import TIMEOUT_S, Daemon
from tests.supervisor.descendants import ends, kill
from tests.supervisor.programs_under_test import ENTRIES, Appoint, Discharge, Holds, Put


def appoint(daemon: Daemon, entry: str = "post", silence_s: float = 30.0, name: str = "a") -> int:
    """Leave an order → the pid of the process under it."""
    daemon.ask(Put({"along": ""}))
    held = daemon.ask(Appoint(name, f"{ENTRIES}:{entry}", ["along"], silence_s))
    daemon.state(lambda state: name in state.standing)
    if entry == "post":
        replaced(daemon, 0, name)
    return int(held.standing[name] or 0)


def replaced(daemon: Daemon, times: int = 1, name: str = "a") -> int:
    """Wait until the keeper has replaced it so often, and the last one beats → its pid."""
    daemon.state(lambda state: state.standing.get(name, 0) >= times)
    lock = daemon.directory / f"{name}.lock"
    deadline = time.monotonic() + TIMEOUT_S
    while not (sign := sign_of(lock)).beats or ends(sign.pid, 0):
        assert time.monotonic() < deadline, daemon.log()
    return sign.pid


def told(daemon: Daemon, pid: int, name: str = "a") -> Holds:
    """What the root supervisor holds, as soon as it knows that this is the process."""
    deadline = time.monotonic() + TIMEOUT_S
    while (held := daemon.ask()).standing.get(name) != pid:
        assert time.monotonic() < deadline, held
    return held


def recorded(daemon: Daemon, count: int) -> list[tuple[str, str, str]]:
    """What the event log says, as soon as it is so much → child, cause, text of each."""
    deadline = time.monotonic() + TIMEOUT_S
    while len(events := list(read_events(daemon.directory / "events"))) < count:
        assert time.monotonic() < deadline, events
        time.sleep(0.01)
    assert all((event.supervisor, event.what) == ("keeper", "started") for event in events)
    return [(event.child, event.cause, event.text) for event in events]


def test_what_was_replaced_is_in_the_event_log_once_whoever_was_away(daemon: Daemon) -> None:
    daemon.patient()
    daemon.start()
    pids = [appoint(daemon)]
    for times in (1, 2, 3):
        if times == 2:
            root = daemon.ask().pid
            os.kill(root, signal.SIGSTOP)
        kill(pids[-1])
        pids.append(replaced(daemon, times))
    kill(root)  # it was told, and has not written it down
    successor = daemon.ask().pid
    replacements = [("a", *pair) for pair in pairwise(pids)]
    replacements.append(("root supervisor", root, successor))
    killed = [(name, "killed", f"pid {new} in place of {old}: killed by signal 9") for name, old, new in replacements]
    assert recorded(daemon, 4) == killed
    kill(successor)
    assert recorded(daemon, 5)[:4] == killed, "what is noted is not said again"


def test_a_process_is_replaced_and_the_root_supervisor_told(daemon: Daemon) -> None:
    daemon.start()
    pid = appoint(daemon)
    for times in (1, 2, 3):
        kill(pid)
        successor = replaced(daemon, times)
        assert successor != pid
        held = told(daemon, successor)
        pid = successor
    written = held.texts["along"].split()
    assert len(written) == 4 and written[-1] == str(pid)  # each had what goes along
    assert daemon.log().count("has ended, killed by signal 9; another one takes its place") == 3


def test_a_process_is_replaced_while_the_root_supervisor_hangs(daemon: Daemon) -> None:
    daemon.patient()
    daemon.start()
    pid = appoint(daemon)
    root = daemon.ask().pid
    os.kill(root, signal.SIGSTOP)
    for times in (1, 2):
        kill(pid)
        pid = replaced(daemon, times)
    os.kill(root, signal.SIGCONT)
    assert told(daemon, pid).pid == root


def test_a_process_is_replaced_while_there_is_no_root_supervisor(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start("keeper-of-a-program")
    pid = appoint(daemon)
    (tmp_path / "program").rename(tmp_path / "hidden")  # it cannot be started again
    kill(daemon.ask().pid)
    kill(pid)
    successor = replaced(daemon)
    (tmp_path / "hidden").rename(tmp_path / "program")
    assert told(daemon, successor).texts["along"].split() == [str(pid), str(successor)]


def test_a_process_that_hangs_is_dumped_and_replaced_without_a_root_supervisor(daemon: Daemon) -> None:
    daemon.patient()
    daemon.start()
    pid = appoint(daemon, silence_s=2.0)  # as long as nothing but its being stopped keeps it from beating
    root = daemon.ask().pid
    os.kill(root, signal.SIGSTOP)
    lock, began = daemon.directory / "a.lock", time.monotonic()
    before = sign_of(lock)
    while sign_of(lock) == before:  # its last beat is one after `began`
        began = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    assert replaced(daemon) != pid
    took_s = time.monotonic() - began
    # A stopped process cannot say where it is; one that only hangs can, and this shows that the keeper waits for that.
    assert took_s >= 2.0 + LOOK_AGAIN_S + DUMP_S
    os.kill(root, signal.SIGCONT)
    [(child, cause, text)] = recorded(daemon, 1)
    assert (child, cause) == ("a", "hung") and text.endswith(f"in place of {pid}: hung, killed by signal 9")


def test_a_process_that_never_beats_says_where_it_hangs(daemon: Daemon) -> None:
    daemon.start()
    appoint(daemon, "outlive", silence_s=0.2)
    deadline = time.monotonic() + TIMEOUT_S
    # The first may be killed before it has said all.
    while not all(words in daemon.log() for words in ("Fatal Python error: Aborted", "in outlive", "killed by signal 6")):
        assert time.monotonic() < deadline, daemon.log()
        time.sleep(0.02)


def test_a_fork_server_that_dies_at_that_moment_costs_only_its_own_start(daemon: Daemon) -> None:
    daemon.start()
    pid = appoint(daemon)
    server = daemon.state().fork_server_pid
    kill(server)
    kill(pid)
    assert replaced(daemon) != pid
    assert daemon.state().fork_server_pid != server


def test_a_fork_server_that_hangs_is_killed_and_hangs_not_the_keeper(daemon: Daemon) -> None:
    daemon.patient()
    daemon.start()
    killed = f"the fork server has not answered for {ANSWER_S:g} s; it is killed"
    pid, answers, tries = appoint(daemon), 0, 0
    while not answers:
        assert tries < 3  # once it may be this test that did not run for so long
        tries += 1
        server = daemon.state().fork_server_pid
        os.kill(server, signal.SIGSTOP)
        kill(pid)
        asked = False
        while (log := log_after_answer(daemon)).count(killed) < tries:
            answers += asked  # it answers others meanwhile
            asked = f"(pid {pid}) has ended" in log
        pid = replaced(daemon, tries)
        assert daemon.state().fork_server_pid not in (0, server)


def log_after_answer(daemon: Daemon) -> str:
    daemon.state()
    return daemon.log()


def test_a_process_that_ends_with_success_is_done(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    appoint(daemon, "done")
    second = appoint(daemon, name="b")
    client = daemon.connect("keeper.sock")
    client.send(Hello())
    channels = {}
    while not isinstance((said := client.receive(60))[0], KeptAll):
        match said:
            case Stand(name, _), [pidfd, channel]:
                os.close(pidfd)
                channels[name] = channel
            case _, descriptors:
                for descriptor in descriptors:
                    os.close(descriptor)
    os.write(channels["a"], b"end")
    for channel in channels.values():
        os.close(channel)
    client.close()
    kill(second)
    replaced(daemon, name="b")
    assert daemon.state().standing == {"a": 0, "b": 1}


def test_one_that_fails_at_once_is_tried_again_with_growing_pauses(daemon: Daemon) -> None:
    daemon.start()
    began = time.monotonic()
    appoint(daemon, "fail")
    daemon.state(lambda state: state.standing["a"] >= 5)
    assert time.monotonic() - began >= 0.3  # 0.1 and 0.2
    assert len(daemon.ask().texts["along"].split()) >= 5


def test_a_dismissed_one_is_ended_and_not_replaced(daemon: Daemon) -> None:
    daemon.start()
    pid = appoint(daemon)
    assert daemon.ask(Discharge("a")).standing == {}
    assert ends(pid, 60)
    assert daemon.state(lambda state: not state.standing).standing == {}


@pytest.mark.parametrize("how", ["stand-in", "take-over"])
def test_another_keeper_goes_on_with_it(daemon: Daemon, how: str) -> None:
    first = daemon.start()
    pid = appoint(daemon)
    if how == "stand-in":
        kill(first.pid)
    else:
        daemon.start("take-over")
        assert first.wait(60) == 0
    assert daemon.state(lambda state: state.pid != first.pid and "a" in state.standing).standing == {"a": 0}
    kill(pid)
    successor = replaced(daemon)
    told(daemon, successor)


def test_one_that_nobody_knows_of_any_more_is_ended_by_the_next(daemon: Daemon) -> None:
    """A process whose starter died before it could say so, and which hangs: it has the lock, and whatever else is to be had once."""
    daemon.start()
    pid = appoint(daemon)
    os.kill(pid, signal.SIGSTOP)
    successor = int(daemon.ask(Appoint("a", f"{ENTRIES}:post", ["along"])).standing["a"] or 0)
    if successor == pid:
        # The root supervisor has taken the first for one that lives, and ended the second: its order stands.
        kill(pid)
        assert replaced(daemon) not in (pid, 0)
    else:
        assert ends(pid, TIMEOUT_S), "the second was quicker, and ended the first"


def test_of_two_that_live_the_root_supervisor_s_is_the_one(daemon: Daemon) -> None:
    """The keeper has replaced a process, and so has the root supervisor, which has not heard of that."""
    daemon.patient()
    daemon.start()
    pid = appoint(daemon)
    root = daemon.ask().pid
    os.kill(root, signal.SIGSTOP)
    kill(pid)
    by_keeper = replaced(daemon)
    # As if it came from the root supervisor.
    client = daemon.connect("keeper.sock")
    other = os.fork()
    if other == 0:
        signal.pause()
        os._exit(0)
    reader, writer = os.pipe()
    pidfd = os.pidfd_open(other)
    order = StandingOrder("a", f"{ENTRIES}:post", b"", ["along"], str(daemon.directory / "a.lock"), 30.0)
    client.send(Stand("a", order), [pidfd, writer])
    assert ends(by_keeper, 60)
    client.send(Hello())
    assert isinstance(client.receive(60)[0], Welcome)
    while not isinstance((said := client.receive(60))[0], Stand):
        assert isinstance(said[0], Kept)
        for descriptor in said[1]:
            os.close(descriptor)
    assert pid_of(said[1][0]) == other
    for descriptor in (*said[1], reader, writer, pidfd):
        os.close(descriptor)
    client.close()
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    os.kill(root, signal.SIGCONT)


def test_a_standing_order_without_its_descriptors_costs_its_sender_the_connection(daemon: Daemon) -> None:
    from supervisor.channel import ChannelClosed

    daemon.start()
    client = daemon.connect("keeper.sock")
    client.send(Stand("a", StandingOrder("a", "b:c", b"", [], "/nowhere", 1.0)), [0])
    with pytest.raises(ChannelClosed):
        client.receive(60)
    client.close()
    assert daemon.state().standing == {}
    assert "a: 1 descriptors came with a standing order" in daemon.log()


def test_a_keeper_that_stood_still_hears_first_that_it_was_done_without_it(daemon: Daemon) -> None:
    daemon.patient()
    keeper = daemon.start()
    pid = appoint(daemon)
    keeper.send_signal(signal.SIGSTOP)
    kill(pid)
    for number in range(20):  # there is much to hear
        daemon.ask(Put({f"file {number}": ""}))
    by_root = daemon.ask(Appoint("a", f"{ENTRIES}:post", ["along"])).standing["a"]
    keeper.send_signal(signal.SIGCONT)
    assert daemon.state(lambda state: len(state.names) == 21).standing == {"a": 0}
    assert replaced(daemon, 0) == by_root
    assert told(daemon, int(by_root or 0)).texts["along"].split() == [
        str(pid),
        str(by_root),
    ]  # no other one was started, which would have ended this
