from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.gateway.submitting import UsageError, environment, exit_code, login_in, specification
from actors.image.registry.login import Login
from actors.settings import SandboxSection
from tests.actors.gateway.scripted import result

GIVEN: dict[str, Any] = {
    "image": "busybox", "command": ["true"], "env": {}, "workspace": None, "cpu": None, "memory": None, "timeout": None, "runtime": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("state", "fields", "code"),
    [
        ("stopped", {"exit_code": 0}, 0),
        ("stopped", {"exit_code": 139}, 139),
        ("stopped", {"exit_code": None, "signal": 11, "reason": "signalled"}, 139),
        ("stopped", {"exit_code": None, "signal": 9, "reason": "oom"}, 137),
        ("stopped", {"exit_code": 1, "reason": "oom"}, 1),
        ("stopped", {"exit_code": None, "signal": 15, "reason": "cancelled"}, 143),
        ("stopped", {"exit_code": 0, "reason": "cancelled"}, 0),
        ("stopped", {"exit_code": None, "signal": 9, "reason": "timeout"}, 124),
        ("stopped", {"exit_code": 0, "reason": "timeout"}, 124),
        ("failed", {"failure": "other"}, 125),
        ("failed", {"failure": None}, 125),
        ("failed", {"failure": "not_executable"}, 126),
        ("failed", {"failure": "not_found"}, 127),
        ("failed", {"reason": "lost"}, 125),
    ],
)
def test_the_exit_code_says_how_the_task_ended(state: str, fields: dict[str, Any], code: int) -> None:
    assert exit_code(result("t", state, **fields)) == code


def test_a_variable_is_given_or_taken_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s3cret=x")
    assert environment(["A=b=c", "E=", "SECRET"]) == {"A": "b=c", "E": "", "SECRET": "s3cret=x"}
    assert environment(["A=1", "A=2"]) == {"A": "2"}


def test_every_variable_that_is_not_set_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOPE", raising=False)
    with pytest.raises(UsageError) as caught:
        environment(["NOPE", "A=1", "NEITHER"])
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["env NOPE", "env NEITHER"]


def test_what_is_not_given_has_the_nodes_default() -> None:
    spec = specification(GIVEN, SandboxSection(memory_bytes=1 << 30, cpu_cores=2, runtime="runc"))
    assert (spec.memory_bytes, spec.cpu_cores, spec.timeout_s, spec.runtime) == (1 << 30, 2.0, None, "runc")


def test_every_limit_that_cannot_be_read_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        specification(GIVEN | {"memory": "12QB", "cpu": "1Gi", "timeout": "soon"}, SandboxSection())
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["memory", "cpu", "timeout"]


@pytest.mark.parametrize(
    ("document", "login"),
    [
        ('{"username": "me", "password": "s"}', Login("me", "s")),
        ('{"auth": "bWU6cw=="}', Login("me", "s")),
        ('{"identitytoken": "t"}', Login(identity_token="t")),
        ('{"registrytoken": "t"}', Login(registry_token="t")),
        ("{}", None),
        ("[]", None),
        ('{"auth": "?"}', None),
        ("secret", None),
        ('{"username": 1, "password": "secret"}', None),
    ],
)
def test_a_login_is_read_from_a_file(document: str, login: Login | None, tmp_path: Path) -> None:
    path = tmp_path / "login"
    path.write_text(document)
    if login is not None:
        assert login_in(str(path)) == login
        assert specification(GIVEN | {"login": login}, SandboxSection()).login == login
        return
    with pytest.raises(UsageError, match="it must be a JSON object") as caught:
        login_in(str(path))
    assert "secret" not in str(caught.value)


def test_a_login_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--login .*nosuch: No such file"):
        login_in(str(tmp_path / "nosuch"))
