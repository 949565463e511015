"""Amounts as people write them: `512Mi`, `500m`, `30s`, to and from bytes, cores and seconds.

The notation of bytes and cores is that of Kubernetes' resource quantities, so far as it makes sense here: a decimal number
and a suffix (a `512m` of memory, which there means half a byte, is refused).  Durations are Go's, with days, as in `1h30m`.
A number alone is bytes, cores, seconds.  Everything is exact until the one rounding at the end, which goes up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import ROUND_CEILING, Decimal
from typing import Final

NUMBER: Final = r"\d+(?:\.\d+)?"
AMOUNT: Final = re.compile(rf"({NUMBER})([A-Za-z]*)", re.ASCII)
DURATION: Final = re.compile(rf"(?:{NUMBER}[a-z]+)+", re.ASCII)
# Without a bound, `"9" * 1_000_000` would keep a processor busy for minutes before it is found out of bounds.
TEXT_MAX: Final = 40

BYTES: Final = {
    "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40,
}  # fmt: skip
CORES: Final = {"": Decimal(1), "m": Decimal("0.001")}
SECONDS: Final = {"ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600), "d": Decimal(86400)}


class QuantityError(ValueError):
    """Not an amount of that kind; the text says what is accepted."""


def parse_bytes(text: str) -> int:
    """`512Mi`, `1.5Gi`, `2G`, `4096` → bytes, rounded up.  Raises QuantityError."""
    matched = AMOUNT.fullmatch(text) if len(text) <= TEXT_MAX else None
    if matched is None or matched[2] not in BYTES:
        raise QuantityError(
            f"{_quoted(text)} is not a size: write it like 512Mi, 1.5Gi, 2G or 4096 (bytes); suffixes: {_suffixes(BYTES)}"
        )
    return int((Decimal(matched[1]) * BYTES[matched[2]]).to_integral_value(ROUND_CEILING))


def parse_cores(text: str) -> float:
    """`500m`, `1.5`, `2` → processor cores.  Raises QuantityError."""
    matched = AMOUNT.fullmatch(text) if len(text) <= TEXT_MAX else None
    if matched is None or matched[2] not in CORES:
        raise QuantityError(f"{_quoted(text)} is not a number of cores: write it like 500m (half a core), 1.5 or 2")
    return float(Decimal(matched[1]) * CORES[matched[2]])


def parse_seconds(text: str) -> float:
    """`250ms`, `30s`, `1h30m`, `2d`, `30` → seconds.  Raises QuantityError."""
    if len(text) <= TEXT_MAX:
        if re.fullmatch(NUMBER, text, re.ASCII):
            return float(text)
        parts = AMOUNT.findall(text) if DURATION.fullmatch(text) else []
        if parts and all(unit in SECONDS for _, unit in parts):
            return float(sum(Decimal(number) * SECONDS[unit] for number, unit in parts))
    raise QuantityError(
        f"{_quoted(text)} is not a duration: write it like 250ms, 30s, 5m, 1h30m or 30 (seconds); units: {_suffixes(SECONDS)}"
    )


def format_bytes(size_bytes: int) -> str:
    """The shortest way to write it that `parse_bytes` reads back exactly: 536870912 → `512Mi`."""
    for suffix in ("Ti", "Gi", "Mi", "Ki"):
        if size_bytes and size_bytes % BYTES[suffix] == 0:
            return f"{size_bytes // BYTES[suffix]}{suffix}"
    return str(size_bytes)


def format_cores(cores: float) -> str:
    """0.5 → `500m`, 2.0 → `2`."""
    return f"{cores:.0f}" if cores == int(cores) else f"{round(cores * 1000)}m"


def format_seconds(seconds: float) -> str:
    """7200.0 → `2h`, 90.0 → `90s`, 0.25 → `250ms`: in the greatest unit that needs no fraction."""
    for unit in ("d", "h", "m", "s"):
        count = Decimal(seconds) / SECONDS[unit]
        if count and count == int(count):
            return f"{count:f}{unit}"
    return f"{round(seconds * 1000)}ms" if seconds else "0s"


PARSERS: Final[Mapping[str, Callable[[str], int | float]]] = {"bytes": parse_bytes, "cores": parse_cores, "s": parse_seconds}
FORMATTERS: Final[Mapping[str, Callable[..., str]]] = {"bytes": format_bytes, "cores": format_cores, "s": format_seconds}


def _quoted(text: str) -> str:
    return repr(text if len(text) <= TEXT_MAX else text[:TEXT_MAX] + "…")


def _suffixes(table: Mapping[str, object]) -> str:
    return ", ".join(suffix for suffix in table if suffix)
