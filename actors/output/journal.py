"""conmon's journal (its log driver `k8s-file`), parsed: bytes in, records out, no I/O.

A record is a line: a time (RFC 3339), a blank, `stdout` or `stderr`, a blank, `P` or `F`, a blank, and what the task printed.
`F` ends a line of the task's, `P` does not: conmon reads at most 8192 bytes at a time, and the task's bytes hold no newline but
at the end.  (ctr_logging.c of conmon 2.1, write_k8s_log.)
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

HEADER: Final = rb"[^ \n]+ (stdout|stderr) "
# conmon stamps all lines of one read alike, so a run of F records with one header is one match: Python sees `yes` as chunks.
RECORDS: Final = re.compile(rb"(?m)^(%b)(?:F ([^\n]*\n(?:\1F [^\n]*\n)*+)|P ([^\n]*)\n)" % HEADER)
TORN: Final = re.compile(rb"%b[PF] ([^\n]*)" % HEADER)


class Chunk(NamedTuple):
    """Bytes that a task printed to `stream` ("stdout", "stderr"); or, with stream "gap", what is known of missing ones."""

    stream: str
    data: bytes


class Journal:
    """Parses a journal that is fed in pieces, from `position`: the offset of the first byte that is not in a record given out."""

    def __init__(self, position: int = 0) -> None:
        self.position = position
        self._rest = b""

    def feed(self, data: bytes) -> list[Chunk]:
        """What the records hold that are whole with `data`, which follows what was fed before; neighbours of one stream are one chunk.

        A line that is no record (nobody but conmon writes here, but a disk may be full in the middle of one) is left out.
        """
        data = self._rest + data
        end = data.rfind(b"\n") + 1
        self._rest = data[end:]
        self.position += end
        runs: list[tuple[bytes, list[bytes]]] = []
        for match in RECORDS.finditer(data, 0, end):
            header, stream, full, partial = match.groups()
            # Exact: each newline in `full` ends a record of the task's own newline, and this header follows all but the last.
            text = partial if full is None else full.replace(b"\n" + header + b"F ", b"\n")
            if not runs or runs[-1][0] != stream:
                runs.append((stream, []))
            runs[-1][1].append(text)
        return [Chunk(stream.decode(), b"".join(texts)) for stream, texts in runs]

    def torn(self) -> Chunk | None:
        """What a record holds whose writer was killed before its end; None when there is none.  Only once nobody writes any more."""
        match = TORN.fullmatch(self._rest)
        if match is None:
            return None
        return Chunk(match[1].decode(), match[2])
