from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.quantities import (
    QuantityError,
    format_bytes,
    format_cores,
    format_seconds,
    parse_bytes,
    parse_cores,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512Mi", 512 << 20),
        ("1.5Gi", 3 << 29),
        ("2G", 2 * 10**9),
        ("1k", 1000),
        ("1Ki", 1024),
        ("1Ti", 1 << 40),
        ("0.1Ki", 103),  # 102.4, rounded up
        ("1.0", 1),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "cores"), [("500m", 0.5), ("2", 2.0), ("1.5", 1.5), ("1m", 0.001), ("0", 0.0), ("0.25", 0.25)]
)
def test_cores(text: str, cores: float) -> None:
    assert parse_cores(text) == cores


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("5m", 300),
        ("1h", 3600),
        ("1h30m", 5400),
        ("250ms", 0.25),
        ("2d", 172800),
        ("30", 30),
        ("1.5", 1.5),
        ("0", 0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("parse", [parse_bytes, parse_cores, parse_seconds])
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "-1",
        "+1",
        "1e3",
        "inf",
        "nan",
        "0x10",
        "1 Mi",
        "Mi",
        "1.",
        ".5",
        "1_000",
        "12QB",
        "1mi",
        "1KI",
        "٣",
        "1\n",
        "9" * 1_000_000,
    ],
)
def test_anything_else_is_refused_in_few_words(parse: object, text: str) -> None:
    assert callable(parse)
    with pytest.raises(QuantityError, match="write it like") as caught:
        parse(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("parse", "text"), [(parse_bytes, "512m"), (parse_bytes, "512s"), (parse_cores, "1Gi"), (parse_seconds, "5M")]
)
def test_a_unit_of_another_kind_is_refused(parse: object, text: str) -> None:
    assert callable(parse)
    with pytest.raises(QuantityError):
        parse(text)


@given(st.integers(0, 1 << 60))
def test_a_size_shown_is_the_size_read(size_bytes: int) -> None:
    assert parse_bytes(format_bytes(size_bytes)) == size_bytes


@given(st.integers(0, 4_096_000))
def test_cores_shown_are_the_cores_read(milli: int) -> None:
    assert parse_cores(format_cores(milli / 1000)) == milli / 1000


@given(st.integers(0, 10**9))
def test_a_duration_shown_is_the_duration_read(milliseconds: int) -> None:
    assert parse_seconds(format_seconds(milliseconds / 1000)) == milliseconds / 1000


def test_amounts_are_shown_in_the_unit_people_would_choose() -> None:
    assert [format_bytes(size) for size in (0, 1000, 1 << 10, 3 << 29, 64 << 30)] == ["0", "1000", "1Ki", "1536Mi", "64Gi"]
    assert [format_cores(cores) for cores in (0.01, 0.5, 1, 64)] == ["10m", "500m", "1", "64"]
    assert [format_seconds(seconds) for seconds in (0, 0.1, 15, 90, 300, 86400)] == ["0s", "100ms", "15s", "90s", "5m", "1d"]
