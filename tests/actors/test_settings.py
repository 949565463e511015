from __future__ import annotations

import re
import socket
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.settings import (
    CONFIGURATION,
    KEYS,
    RUN_DIR_BYTES_MAX,
    VARIABLES,
    Settings,
    SettingsError,
    accepted,
    key_of,
    load_settings,
    parse,
    unit_of,
)


def faults(document: dict[str, Any], environment: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        parse(document, environment or {})
    return caught.value.faults


def test_nothing_given_gives_the_defaults() -> None:
    settings = parse({}, {})
    assert (settings.state.dir, settings.run.dir) == ("/var/lib/aerie", "/run/aerie")
    assert (settings.sandbox.memory_bytes, settings.sandbox.cpu_cores, settings.sandbox.pids) == (512 << 20, 1, 1024)
    assert (settings.daemon.drain_timeout_s, settings.image.resolve_interval_s) == (15, 60)


def test_units_are_in_the_fields_and_not_in_the_keys() -> None:
    assert [key_of(field) for field in ("memory_bytes", "cpu_cores", "stop_grace_s", "logs_bytes_max", "pids", "entries_max")] == [
        "memory", "cpu", "stop_grace", "logs_max", "pids", "entries_max",
    ]  # fmt: skip
    assert [unit_of(field) for field in ("memory_bytes", "cpu_cores", "stop_grace_s", "logs_bytes_max", "pids")] == [
        "bytes", "cores", "s", "bytes", None,
    ]  # fmt: skip


def test_the_file_and_the_environment_which_wins() -> None:
    document = {"sandbox": {"memory": "1Gi", "cpu": 2, "pids": 7}, "output": {"console": True}}
    settings = parse(document, {"AERIE_SANDBOX_MEMORY": "2Gi", "AERIE_OUTPUT_CONSOLE": "false", "HOME": "/root"})
    assert (settings.sandbox.memory_bytes, settings.sandbox.cpu_cores, settings.sandbox.pids) == (2 << 30, 2, 7)
    assert settings.output.console is False


@pytest.mark.parametrize(
    ("name", "value", "section", "field", "expected"),
    [
        ("AERIE_STATE_DIR", "/x", "state", "dir", "/x"),
        ("AERIE_RUN_DIR", "/x", "run", "dir", "/x"),
        ("AERIE_IMAGE_ARCHIVE_DIR", "/x", "image", "archive_dir", "/x"),
        ("AERIE_IMAGE_PREFETCH", "trace", "image", "prefetch", "trace"),
        ("AERIE_IMAGE_RESOLVE_INTERVAL", "2m", "image", "resolve_interval_s", 120),
        ("AERIE_DAEMON_DRAIN_TIMEOUT", "1.5", "daemon", "drain_timeout_s", 1.5),
        ("AERIE_SANDBOX_CPU", "250m", "sandbox", "cpu_cores", 0.25),
        ("AERIE_GATEWAY_LOGS_MAX", "0", "gateway", "logs_bytes_max", 0),
        ("AERIE_OUTPUT_FILE_DIR", "", "output", "file_dir", ""),
        (
            "AERIE_IMAGE_MIRRORS",
            "docker.io=m.example/hub  a.example:5000=http://b:1",
            "image",
            "mirrors",
            "docker.io=m.example/hub  a.example:5000=http://b:1",
        ),
        ("AERIE_IMAGE_MIRRORS", "", "image", "mirrors", ""),
    ],
)
def test_a_variable_overrides_one_key(name: str, value: str, section: str, field: str, expected: object) -> None:
    assert getattr(getattr(parse({}, {name: value}), section), field) == expected


@pytest.mark.parametrize(
    ("document", "environment", "expected"),
    [
        ({}, {}, ("/var/lib/clip/cache", "/var/lib/clip/work", "/var/lib/clip/mnt")),
        ({}, {"AERIE_STATE_DIR": "/s"}, ("/s/images/cache", "/s/images/archives", "/run/aerie/images")),
        ({}, {"AERIE_RUN_DIR": "/r"}, ("/var/lib/aerie/images/cache", "/var/lib/aerie/images/archives", "/r/images")),
        ({"state": {"dir": "/s"}}, {"AERIE_RUN_DIR": "/r"}, ("/s/images/cache", "/s/images/archives", "/r/images")),
        ({"image": {"archive_dir": "/a"}}, {}, ("/var/lib/clip/cache", "/a", "/var/lib/clip/mnt")),
        ({}, {"AERIE_STATE_DIR": "/s", "AERIE_IMAGE_CACHE_DIR": "/c"}, ("/c", "/s/images/archives", "/run/aerie/images")),
    ],
)
def test_image_directories_are_the_seeds_only_when_nothing_is_given(
    document: dict[str, Any], environment: dict[str, str], expected: tuple[str, str, str]
) -> None:
    image = parse(document, environment).image
    assert (image.cache_dir, image.archive_dir, image.mount_dir) == expected


def test_the_directories_given_as_variables_give_the_same_directories() -> None:
    for environment in ({}, {"AERIE_STATE_DIR": "/s"}, {"AERIE_IMAGE_CACHE_DIR": "/c"}):
        settings = parse({}, environment)
        assert len(settings.directories()) == 5
        assert parse({}, settings.directories()) == settings


def test_every_fault_is_listed_at_once_and_says_what_is_accepted() -> None:
    document = {
        "nowhere": {"x": 1},
        "state": "/srv",
        "image": {"colour": "red", "prefetch": "some", "unpacked_max": "1Ki", "cache_dir": "relative", "mirrors": "m.example"},
        "sandbox": {"memory": "12QB", "pids": 0, "cpu": "-1"},
    }
    found = faults(document, {"AERIE_GATEWAY_PARALLEL": "many", "AERIE_GATEWAY_PARALEL": "4"})
    for fault, words in zip(
        found,
        [
            ("[nowhere]", "state, run, daemon"),
            ("state = /srv", "write [state]"),
            ("image.colour", "prefetch"),
            ("image.prefetch = some", "off, trace, full"),
            ("image.unpacked_max = 1Ki", "from 1Mi to 16Ti"),
            ("image.cache_dir = relative", "absolute"),
            ("image.mirrors = m.example", "REGISTRY=MIRROR"),
            ("sandbox.memory = 12QB", "512Mi"),
            ("sandbox.pids = 0", "from 1 to"),
            ("sandbox.cpu = -1", "500m"),
            ("AERIE_GATEWAY_PARALLEL = many", "from 1 to 10000"),
            ("AERIE_GATEWAY_PARALEL", "no such setting"),
        ],
        strict=True,
    ):
        assert all(word in fault for word in words), (fault, words)


@pytest.mark.parametrize(
    "name", ["AERIE_", "AERIE_STATE", "AERIE_state_dir", "AERIE_SANDBOX_UID", "AERIE_CONFIG_DIR", "AERIE_SANDBOX_MEMORY_BYTES"]
)
def test_a_variable_that_is_no_setting_is_a_fault(name: str) -> None:
    (fault,) = faults({}, {name: "1"})
    assert fault.startswith(f"{name}: there is no such setting")


def test_who_a_task_is_cannot_be_set() -> None:
    assert (parse({}, {}).sandbox.uid, parse({}, {}).sandbox.gid) == (1000, 1000)
    assert "sandbox.uid: there is no such key" in faults({"sandbox": {"uid": 1001}})[0]


@given(
    st.sampled_from(sorted(VARIABLES)),
    st.text(st.characters(blacklist_characters="\0")) | st.from_regex(r"[0-9]{1,50}(\.[0-9]+)?[A-Za-z]{0,2}", fullmatch=True),
)
def test_whatever_a_variable_holds_is_a_setting_or_one_fault_of_few_words(name: str, value: str) -> None:
    try:
        assert isinstance(parse({}, {name: value}), Settings)
    except SettingsError as error:
        (fault,) = error.faults
        assert fault.startswith(f"{name} = ")
        assert len(fault) < 500


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("gateway", "parallel", True),
        ("gateway", "parallel", 2.5),
        ("gateway", "parallel", 0),
        ("gateway", "parallel", 10**30),
        ("gateway", "parallel", [1]),
        ("daemon", "drain_timeout", float("nan")),
        ("daemon", "drain_timeout", float("inf")),
        ("daemon", "drain_timeout", "25h"),
        ("sandbox", "memory", True),
        ("sandbox", "memory", "1"),
        ("sandbox", "runtime", "podman"),
        ("state", "dir", 5),
        ("state", "dir", ""),
        ("state", "dir", "/a\0b"),
        ("output", "console", "yes"),
        ("output", "file_dir", "here"),
    ],
)
def test_a_bad_value_is_one_fault_with_its_cure(section: str, key: str, value: object) -> None:
    (fault,) = faults({section: {key: value}})
    assert fault.startswith(f"the file: {section}.{key} = ")
    assert accepted(section, KEYS[section][key]) in fault


def test_directories_that_cannot_work_are_faults() -> None:
    assert "the same" in faults({}, {"AERIE_STATE_DIR": "/x", "AERIE_RUN_DIR": "/x/"})[0]
    assert str(RUN_DIR_BYTES_MAX) in faults({}, {"AERIE_RUN_DIR": "/" + "x" * RUN_DIR_BYTES_MAX})[0]
    assert parse({}, {"AERIE_RUN_DIR": "/" + "x" * (RUN_DIR_BYTES_MAX - 1)})


def test_the_longest_socket_of_a_run_directory_has_an_address(tmp_path: Path) -> None:
    home = tmp_path / ("x" * max(0, RUN_DIR_BYTES_MAX - len(str(tmp_path)) - 1))
    home.mkdir()
    if len(str(home)) > RUN_DIR_BYTES_MAX:
        pytest.skip("the temporary directory is too deep for this")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{home}/forkserver.sock")


# --- the file ---


def test_the_file_that_aerie_config_names_is_read(tmp_path: Path) -> None:
    file = tmp_path / "other.toml"
    file.write_text('[sandbox]\nmemory = "1Gi"\n')
    assert load_settings({"AERIE_CONFIG": str(file)}).sandbox.memory_bytes == 1 << 30


def test_a_file_that_cannot_be_read_is_a_fault_and_names_it(tmp_path: Path) -> None:
    for content, word in ((None, "No such file"), (b"[sandbox", "not TOML"), (b"\xff\xfe", "not TOML")):
        file = tmp_path / "bad.toml"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(SettingsError, match=re.escape(str(file))) as caught:
            load_settings({"AERIE_CONFIG": str(file)})
        assert word in str(caught.value)


def test_directories_are_loaded_without_symbolic_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    settings = load_settings({"AERIE_STATE_DIR": f"{tmp_path}/link/state", "AERIE_RUN_DIR": f"{tmp_path}/link/../run"})
    assert settings.state.dir == f"{tmp_path}/real/state"
    assert settings.run.dir == f"{tmp_path}/run"
    assert settings.image.cache_dir == f"{tmp_path}/real/state/images/cache"


def test_directories_are_judged_by_where_their_links_lead(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    (tmp_path / "link").symlink_to(deep)
    for state, run, word in (
        (f"{tmp_path}/state", f"{tmp_path}/link", str(RUN_DIR_BYTES_MAX)),
        (str(tmp_path), f"{tmp_path}/link/..", "the same"),
    ):
        with pytest.raises(SettingsError, match=word):
            load_settings({"AERIE_STATE_DIR": state, "AERIE_RUN_DIR": run})


def test_the_documented_file_holds_every_key_at_its_default_with_its_bounds() -> None:
    text = CONFIGURATION.read_text()
    assert tomllib.loads(text) == {section: {} for section in KEYS}, "as it is shipped, nothing is set"
    shipped = re.sub(r"^#(\w+ = )", r"\1", text, flags=re.MULTILINE)
    document = tomllib.loads(shipped)
    assert {section: set(table) for section, table in document.items()} == {
        section: set(keys) for section, keys in KEYS.items()
    }
    assert parse(document, {}) == parse({}, {})
    section, seen = "", 0
    for line in shipped.splitlines():
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            section = heading[1]
        elif setting := re.fullmatch(r"(\w+) = .*?  # (.*)", line):
            assert setting[2] == accepted(section, KEYS[section][setting[1]]), setting[1]
            seen += 1
    assert seen == sum(map(len, KEYS.values()))
