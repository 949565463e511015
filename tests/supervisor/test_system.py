"""Names and requests: who waits, who is refused, and that nobody is answered twice."""

from __future__ import annotations

import itertools
import queue
import threading
from typing import Any

import pytest

from supervisor.answers import Answer, Refused
from supervisor.system import Reference, Request, System


class Box:
    """A mailbox that keeps what was put into it."""

    def __init__(self) -> None:
        self.messages: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __call__(self, message: Any) -> None:
        self.messages.put(message)

    def get(self) -> Any:
        return self.messages.get(timeout=60)

    def empty(self) -> bool:
        return self.messages.empty()


def test_a_name_that_nobody_has_is_refused(system: System) -> None:
    asker = Box()
    number = system.request("nobody", "hello", asker)
    assert asker.get() == Refused(number, "there is no nobody")
    assert not system.tell("nobody", "hello")


def test_a_request_waits_until_its_target_has_begun(system: System) -> None:
    asker, target = Box(), Box()
    system.expect("a")
    number = system.request("a", "hello", asker)
    assert asker.empty()
    system.register("a", target)
    request = target.get()
    system.answer(request, True, "good day")
    assert (request.message, asker.get()) == ("hello", Answer(number, "good day"))


def test_an_unanswered_request_goes_to_the_next_incarnation(system: System) -> None:
    asker, first, second = Box(), Box(), Box()
    system.register("a", first)
    number = system.request("a", "hello", asker)
    request = first.get()
    system.unregister("a", first)
    assert not system.tell("a", "lost")  # between two incarnations
    system.register("a", second)
    assert second.get() is request
    system.answer(request, True, "from the second")
    system.answer(request, True, "from the first, later")
    assert asker.get() == Answer(number, "from the second")
    assert asker.empty()


def test_an_answered_request_is_not_sent_again(system: System) -> None:
    first, second = Box(), Box()
    system.register("a", first)
    system.request("a", "hello", Box())
    system.answer(first.get(), True, None)
    system.unregister("a", first)
    system.register("a", second)
    assert second.empty()


def test_what_waited_comes_before_what_is_asked_later(system: System) -> None:
    """Also when the asker asks again at the very moment at which the target begins."""
    system.expect("a")
    for number in range(3):
        system.request("a", number, Box())
    came: list[int] = []
    asks: list[threading.Thread] = []

    def target(request: Request) -> None:
        came.append(request.message)
        if request.message == 0:  # the target is being given what waited
            asks.append(threading.Thread(target=system.request, args=("a", 3, Box())))
            asks[0].start()
            asks[0].join(0.1)  # it can only be done now if it overtakes

    system.register("a", target)
    asks[0].join(60)
    assert came == [0, 1, 2, 3]


def test_a_name_that_is_gone_for_good_refuses_what_waits_and_what_comes(system: System) -> None:
    asker, target = Box(), Box()
    system.register("a", target)
    before = system.request("a", "hello", asker)
    system.unregister("a", target)
    system.forget("a")
    after = system.request("a", "hello", asker)
    assert [asker.get(), asker.get()] == [Refused(before, "a has ended"), Refused(after, "there is no a")]


def test_who_is_left_behind_does_not_take_the_name_from_its_successor(system: System) -> None:
    first, second = Box(), Box()
    system.register("a", first)
    system.forget("a")  # its supervisor has given up waiting for its end
    assert not system.tell("a", "hello")
    system.register("a", second)
    system.unregister("a", first)  # now it has ended
    assert system.tell("a", "hello")
    assert second.get() == "hello"


# --- references ---


def test_a_reference_is_to_one_incarnation(system: System) -> None:
    first, second = Box(), Box()
    assert system.reference("a") is None
    system.register("a", first, 7)
    reference = system.reference("a")
    assert reference == Reference("a", 7)
    assert system.tell(reference, "to the first")
    system.unregister("a", first)
    assert not system.tell(reference, "lost")
    system.register("a", second, 8)
    assert not system.tell(reference, "lost")
    assert system.tell("a", "to whoever it is")
    assert (first.get(), second.get()) == ("to the first", "to whoever it is")
    assert first.empty()
    assert second.empty()


def test_what_one_incarnation_is_asked_no_other_answers(system: System) -> None:
    asker, first, second = Box(), Box(), Box()
    system.register("a", first, 7)
    asked = system.request(Reference("a", 7), "hello", asker)
    assert first.get().message == "hello"
    system.unregister("a", first)
    assert asker.get() == Refused(asked, "a of generation 7 has ended")  # at once, and not when there is a successor
    late = system.request(Reference("a", 7), "hello", asker)
    assert asker.get() == Refused(late, "a of generation 7 has ended")
    system.register("a", second, 8)
    assert second.empty()
    late = system.request(Reference("a", 7), "hello", asker)
    assert asker.get() == Refused(late, "a of generation 7 has ended")
    system.request(Reference("a", 8), "hello", asker)
    assert second.get().message == "hello"


def test_no_two_starts_have_the_same_number(system: System) -> None:
    assert len({next(system.generations) for _ in range(1000)}) == 1000


def test_an_answer_that_nobody_waits_for_is_left_alone(system: System) -> None:
    asker = Box()
    system.answer(Request(99, "a", "hello", asker), True, 1)
    assert asker.empty()


def test_ask_waits_for_the_answer(system: System) -> None:
    system.register("a", lambda request: system.answer(request, True, request.message + 1))
    assert system.ask("a", 1, timeout_s=5) == 2


@pytest.mark.parametrize(("error", "text"), [("no", "no"), (ValueError("no"), "no"), (AssertionError(), "AssertionError")])
def test_ask_raises_what_it_is_refused_with(system: System, error: str | Exception, text: str) -> None:
    system.register("a", lambda request: system.answer(request, False, error))
    with pytest.raises(RuntimeError, match=f"^{text}$"):
        system.ask("a", 1, timeout_s=5)


def test_ask_has_a_time_out_after_which_it_is_forgotten(system: System) -> None:
    target = Box()
    system.register("a", target)
    with pytest.raises(TimeoutError, match="a has not answered int within 0.01 s"):
        system.ask("a", 1, timeout_s=0.01)
    system.answer(target.get(), True, "too late")
    successor = Box()
    system.register("a", successor)
    assert successor.empty()


def test_many_askers_of_a_name_that_comes_and_goes_are_all_answered_once(system: System) -> None:
    """Eight threads ask; the target is replaced all the while and loses half of what it gets."""
    system.expect("a")
    answered: queue.SimpleQueue[Any] = queue.SimpleQueue()
    asked = [set() for _ in range(8)]
    done, turns = threading.Event(), itertools.count()

    def ask(numbers: set[int]) -> None:
        for _ in range(100):
            numbers.add(system.request("a", "hello", answered.put))

    def come_and_go() -> None:
        while not done.is_set():
            box = Box()
            system.register("a", box)
            for _ in range(50):
                try:
                    request = box.messages.get(timeout=0.001)
                except queue.Empty:
                    break
                if next(turns) % 2:
                    system.answer(request, True, None)
            system.unregister("a", box)

    threads = [threading.Thread(target=ask, args=(numbers,)) for numbers in asked]
    goer = threading.Thread(target=come_and_go)
    for thread in [goer, *threads]:
        thread.start()
    for thread in threads:
        thread.join(60)
    try:
        numbers = [answered.get(timeout=60).request for _ in range(800)]
    finally:
        done.set()
        goer.join(60)
    assert set(numbers) == set().union(*asked)
    assert answered.empty()
