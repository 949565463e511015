from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.gateway import messages
from actors.gateway.messages import (
    ANSWERS,
    EXIT_CODES,
    FRAME_BYTES_MAX,
    REQUESTS,
    Accepted,
    Done,
    Ended,
    Failed,
    FailureKind,
    Listed,
    Logs,
    Progress,
    Submit,
    TaskResult,
    TaskSpec,
    TreeNode,
    is_last,
)
from supervisor.frames import Codec, FrameBuffer, FrameError, Message
from tests.actors.gateway.scripted import SPEC, result

TO_DAEMON = Codec(*REQUESTS, size_bytes_max=FRAME_BYTES_MAX)
TO_CLIENT = Codec(*ANSWERS, size_bytes_max=FRAME_BYTES_MAX)

# msgspec gives each field a value of its type; JSON text cannot hold a lone surrogate, and neither can msgpack.
text = st.text(st.characters(codec="utf-8"), max_size=20)
specs = st.builds(
    TaskSpec,
    image=text,
    command=st.lists(text, max_size=4),
    env=st.dictionaries(text, text, max_size=4),
    workspace=st.none() | text,
    cpu_cores=st.floats(0.01, 100),
    memory_bytes=st.integers(0, 1 << 62),
    timeout_s=st.none() | st.floats(0, 1e6),
    runtime=st.sampled_from(["crun", "runc", "gvisor"]),
)


@given(st.builds(Submit, request=st.integers(1, 1 << 62), task=text, spec=specs, wait=st.booleans()))
def test_a_request_survives_the_socket(request: Submit) -> None:
    buffer = FrameBuffer(TO_DAEMON)
    buffer.feed(TO_DAEMON.frame(request))
    assert list(buffer) == [request]


def test_a_tree_is_as_deep_as_it_is() -> None:
    node = TreeNode("leaf", "process", 1, "running", 0, [])
    for depth in range(10):
        node = TreeNode(f"level {depth}", "supervisor", None, "running", depth, [node])
    shown = messages.TreeShown(1, node)
    assert TO_CLIENT.decode(TO_CLIENT.encode(shown)) == shown


@pytest.mark.parametrize("kind", REQUESTS + ANSWERS)
def test_every_message_carries_its_request(kind: type[Message]) -> None:
    assert kind.__struct_fields__[0] == "request"


def test_the_two_ends_accept_no_message_of_their_own_kind() -> None:
    assert not set(REQUESTS) & set(ANSWERS)
    with pytest.raises(FrameError):
        TO_DAEMON.decode(TO_CLIENT.encode(Done(1)))


@pytest.mark.parametrize(
    "change",
    [{"memory_bytes": "512Mi"}, {"command": "true"}, {"runtime": "podman"}, {"surprise": 1}, {"env": {"A": 1}}],
)
def test_a_field_of_another_type_is_no_request(change: dict[str, object]) -> None:
    spec = {**msgspec.to_builtins(SPEC), **change}
    body = msgspec.msgpack.encode({"type": "Submit", "request": 1, "task": "t", "spec": spec, "wait": False})
    with pytest.raises(FrameError):
        TO_DAEMON.decode(body)


def test_the_json_of_a_result_begins_with_the_contracts_fields_in_their_order() -> None:
    assert list(msgspec.json.decode(msgspec.json.encode(result("t"))))[:11] == [
        "task", "state", "reason", "exit_code", "signal", "error", "sync", "created_at", "started_at", "finished_at", "duration_s",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("state", "ended"), [("pending", False), ("creating", False), ("running", False), ("stopped", True), ("failed", True)]
)
def test_a_result_knows_whether_it_is_final(state: str, ended: bool) -> None:
    shown: TaskResult = result("t", state)
    assert shown.ended is ended


def test_every_kind_of_failure_has_an_exit_code_of_its_own_meaning() -> None:
    assert set(EXIT_CODES) == set(FailureKind.__args__)  # type: ignore[attr-defined]
    assert (EXIT_CODES["invalid"], EXIT_CODES["unknown_task"]) == (2, 4)
    assert 0 not in EXIT_CODES.values()


def test_which_answer_is_the_last() -> None:
    waits, leaves = Submit(1, "t", SPEC, True), Submit(1, "t", SPEC, False)
    assert [is_last(Accepted(1, "t"), request) for request in (waits, leaves)] == [False, True]
    assert not is_last(Progress(1, "x"), waits)
    assert not is_last(Listed(1, result("t")), None)
    assert all(is_last(answer, Logs(1, "t")) for answer in (Done(1), Ended(1, result("t")), Failed(1, "busy", "x")))
