"""A task's bytes as lines (the seed's TaskOutput): whole ones are passed on as they are, a partial one is kept until it is whole."""

from __future__ import annotations

from typing import Final

LINE_BYTES_MAX: Final = 1 << 20  # a longer line goes on in pieces, so that a task without newlines costs bounded memory


class LineSplitter:
    """One stream.  `rest` is the partial line kept so far: all the state there is."""

    def __init__(self, rest: bytes = b"") -> None:
        self.rest = rest

    def feed(self, data: bytes) -> list[bytes]:
        """The lines, newline included, that are whole with `data`; a piece of LINE_BYTES_MAX has none."""
        if self.rest:
            data = self.rest + data
        lines = data.splitlines(keepends=True) if b"\r" not in data else _split(data)
        self.rest = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        while len(self.rest) > LINE_BYTES_MAX:
            lines.append(self.rest[:LINE_BYTES_MAX])
            self.rest = self.rest[LINE_BYTES_MAX:]
        return lines

    def flush(self) -> list[bytes]:
        """The partial line, if there is one: nothing more will come."""
        rest, self.rest = self.rest, b""
        return [rest] if rest else []


def _split(data: bytes) -> list[bytes]:
    """At newlines only; bytes.splitlines takes a carriage return for one as well."""
    lines = [line + b"\n" for line in data.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]
