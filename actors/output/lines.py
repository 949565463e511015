"""A task's bytes as lines (the seed's TaskOutput): whole ones are passed on as they are, a partial one is kept until it is whole."""

from __future__ import annotations

from io import BytesIO
from typing import Final

# A longer line goes on in pieces, so that a task without newlines costs bounded memory, and a position fits into a message.
LINE_BYTES_MAX: Final = 16 << 10


class LineSplitter:
    """One stream.  `rest` is the partial line kept so far: all the state there is."""

    def __init__(self, rest: bytes = b"") -> None:
        self.rest = rest

    def feed(self, data: bytes) -> list[bytes]:
        """The lines, newline included, that are whole with `data`; a piece of LINE_BYTES_MAX has none.

        What they are depends on the bytes alone, not on where they were cut to be fed.
        """
        lines = BytesIO(
            self.rest + data
        ).readlines()  # at newlines only; bytes.splitlines takes a carriage return for one as well
        if max(map(len, lines), default=0) > LINE_BYTES_MAX:
            lines = [line[start : start + LINE_BYTES_MAX] for line in lines for start in range(0, len(line), LINE_BYTES_MAX)]
        self.rest = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        return lines

    def flush(self) -> list[bytes]:
        """The partial line, if there is one: nothing more will come."""
        rest, self.rest = self.rest, b""
        return [rest] if rest else []
