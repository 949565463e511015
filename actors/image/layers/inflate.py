"""gzip, decompressed in order with a checkpoint every so often, and again from any of them on.

A checkpoint stands between two deflate blocks (RFC 1951), or in front of a gzip member (RFC 1952).  What a decompressor needs to go
on there is where it stands, to the bit, and the last 32 KiB it has put out, which the next block may refer to.  Most compressors
end a block after some ten thousand symbols, but some (zlib-ng at its fastest) make one of a whole layer: in a block that is too long
a checkpoint stands between two symbols, and then the block's header, with its codes, is needed as well.

Of a window only those bytes are kept that what follows refers to (the idea is that of gztool and rapidgzip): compressed, they are a
fifth.  Which ones is found by inflating on with marks in their place, of which what comes out is made.

zlib-ng does it, through its own interface (zlib-ng.h), which is zlib's with `zng_` in front: the standard library's zlib, and isal's,
do not show block boundaries.  Measured on a layer of Debian's libraries, one core, MB/s of output: zlib 333, zlib-ng 590, with
windows kept 548; isal, which can do no checkpoints, 766.  The symbols are those of the extension module of the package `zlib-ng`,
loaded once more by its path.  GIL-free; a decompressor is one thread's at a time.
"""

from __future__ import annotations

import collections
import ctypes
import itertools
from array import array
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

from zlib_ng import zlib_ng

from actors.image.errors import ContentCorrupt

BLOCK_BYTES = 1 << 20  # of output at once, at most
# Measured with the first run of `python3 -c "import json, ssl, http.client"` on a layer of 407 MB, over 100 Mbit/s and 20 ms: spans of
# 1 MiB moved 16.4 MB in 4.4 s, of 512 KiB 12.8 in 3.1, of 256 KiB 10.8 in 3.0; each halving doubles the checkpoints.
SPAN_BYTES = 512 << 10  # of output between two checkpoints, at least; twice as much, and a symbol, at most
WINDOW_BYTES = 32 << 10
_SYMBOL_BYTES = 8  # as it is compressed: 48 bits at most, from within a byte
_AHEAD_BYTES = 48 << 10  # of compressed data: amply what is as long as a window
_HEADER_BYTES = 400  # of a block: 17 bits, 19 lengths of 3, 316 of 7 at most

_RAW, _GZIP = -15, 31  # zlib's window bits: a bare deflate stream, a gzip member
_TRAILER_BYTES = 8  # of a gzip member
_NO_FLUSH, _BLOCK, _TREES = 0, 5, 6  # how far to go: as far as may be, to a block's end, to the end of its header
_OK, _STREAM_END, _BUFFER_ERROR = 0, 1, -5
_AT_HEADER_END, _AT_BLOCK_END, _IN_LAST_BLOCK, _UNUSED_BITS = 256, 128, 64, 63  # in data_type

_library = ctypes.CDLL(zlib_ng.__file__)


class Checkpoint(NamedTuple):
    """A place to start from: `bits` into the compressed layer, `offset` bytes into the decompressed one.

    `window` is what was put out last, zero where nobody refers to it; none where a gzip member begins.  `header` is the beginning
    of the block in whose middle it is, from bit `header_bit` of its first byte on; none between blocks.
    """

    bits: int
    offset: int
    window: bytes
    header: bytes = b""
    header_bit: int = 0


class _State(ctypes.Structure):
    """zng_stream, as in zlib-ng.h."""

    _fields_: ClassVar = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint32),
        ("total_in", ctypes.c_size_t),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint32),
        ("total_out", ctypes.c_size_t),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_uint32),
        ("reserved", ctypes.c_ulong),
    )


_stream = ctypes.POINTER(_State)
for _name, _arguments in (
    ("inflateInit2", (_stream, ctypes.c_int32)),
    ("inflateReset2", (_stream, ctypes.c_int32)),
    ("inflate", (_stream, ctypes.c_int32)),
    ("inflatePrime", (_stream, ctypes.c_int32, ctypes.c_int32)),
    ("inflateSetDictionary", (_stream, ctypes.c_char_p, ctypes.c_uint32)),
    ("inflateGetDictionary", (_stream, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint32))),
    ("inflateEnd", (_stream,)),
):
    _function = getattr(_library, f"zng_{_name}")
    _function.argtypes, _function.restype = _arguments, ctypes.c_int32
_library.zng_inflateMark.argtypes, _library.zng_inflateMark.restype = (_stream,), ctypes.c_long


# A mark for each byte of a window: two bytes, the second one's first bit set.  Inflated with the first bytes for a window, and with
# the second ones, what is copied from it comes out as marks, and what is not as the same byte twice, which seldom looks like one.
_LOW_MARKS = bytes(range(256)) * (WINDOW_BYTES // 256)
_HIGH_MARKS = b"".join(bytes([high]) * 256 for high in range(128, 256))


def _kept(low: bytes, high: bytes) -> bytearray:
    """255 for each byte of the window whose mark came out, and 0 for the others."""
    both = bytearray(2 * len(low))
    both[::2], both[1::2] = low, high
    kept = bytearray(2 * WINDOW_BYTES)  # by mark; those of the first half are none
    # No loop in Python: it would take as long as all the rest of the index pass.
    found = set(array("H", bytes(both)))
    collections.deque(map(kept.__setitem__, found, itertools.repeat(255)), maxlen=0)
    return kept[WINDOW_BYTES:]


def _marked(checkpoint: Checkpoint, marks: bytes, ahead: bytes) -> bytes:
    """What comes out from a checkpoint on with marks for its window, as far as it may refer to it; nothing if `ahead` is too short."""
    inflater = _Inflater(iter([ahead]), _RAW, WINDOW_BYTES)
    ended = False
    try:
        inflater.resume(checkpoint._replace(window=marks[-len(checkpoint.window) :]))
        while inflater.room and not ended and inflater.feed():
            ended = inflater.run(_NO_FLUSH, inflater.room)
        return inflater.take() if ended or not inflater.room else b""
    finally:
        inflater.close()


class _Inflater:
    """A zlib-ng decompressor with its buffers: `feed` it, `run` it, `take` what came out; `close` it."""

    def __init__(self, pieces: Iterator[bytes], window_bits: int, block_bytes: int) -> None:
        self.consumed = 0  # bytes of the pieces
        self.produced = 0  # bytes put out
        self._pieces = pieces
        self._piece = self._before = b""  # what next_in points into, and the last bytes before it
        self._idle_runs = 0
        self._header = bytearray()  # the first bytes of the block that is being read
        self._header_bit = 0
        self._ahead = bytearray()  # the first bytes from the last checkpoint on
        self._fed = 0
        self._is_full = False  # the last run has used all of its room: there may be more to come of the same input
        self._state = _State()
        self._by_reference = ctypes.byref(self._state)
        self._output = ctypes.create_string_buffer(block_bytes)
        self._block_bytes = block_bytes
        if _library.zng_inflateInit2(self._by_reference, window_bits) != _OK:
            raise MemoryError("no memory for a decompressor")
        self._clear()

    def _clear(self) -> None:
        self._state.next_out = ctypes.addressof(self._output)
        self.waiting = 0  # bytes of output to be taken

    def close(self) -> None:
        _library.zng_inflateEnd(self._by_reference)

    @property
    def room(self) -> int:
        """Bytes of output that still fit."""
        return self._block_bytes - self.waiting

    def feed(self) -> bool:
        """See to it that there is something to do.  False when all input is used up."""
        return self._is_full or self._get_input()

    def _get_input(self) -> bool:
        while not self._state.avail_in:
            piece = next(self._pieces, b"")
            if not piece:
                return False
            self._give(piece)
        return True

    def _give(self, piece: bytes) -> None:
        self._before = (self._before + self._piece[-_SYMBOL_BYTES:])[-_SYMBOL_BYTES:]
        self._piece = piece  # kept alive while it is pointed into
        if len(self._header) < _HEADER_BYTES:
            self._header += piece[: _HEADER_BYTES - len(self._header)]
        if len(self._ahead) < _AHEAD_BYTES:
            self._ahead += piece[: _AHEAD_BYTES - len(self._ahead)]
        self._state.next_in = ctypes.cast(ctypes.c_char_p(piece), ctypes.c_void_p).value
        self._state.avail_in = len(piece)
        self._fed += len(piece)

    def run(self, flush: int, room: int) -> bool:
        """Decompress until input or room is used up, or to a block's end; True at the end of the stream.  Raises ContentCorrupt."""
        state = self._state
        state.avail_out = room
        code = _library.zng_inflate(self._by_reference, flush)
        # "No progress" may be a step within bits that it held already: the end of a block, or of a header.  Twice is too often.
        self._idle_runs = self._idle_runs + 1 if code == _BUFFER_ERROR and state.avail_in else 0
        if code not in (_OK, _STREAM_END, _BUFFER_ERROR) or self._idle_runs > 1:
            raise ContentCorrupt(f"a layer is not whole gzip: {(state.msg or b'it is damaged').decode()}")
        self.waiting += room - state.avail_out
        self.produced += room - state.avail_out
        self._is_full = not state.avail_out
        self.consumed = self._fed - state.avail_in
        if self.is_between_blocks:
            self._begin_block()
        return bool(code == _STREAM_END)

    def _begin_block(self) -> None:
        self._header_bit = self.position_bits & 7
        self._header = self._from(self.position_bits, _HEADER_BYTES)

    def _from(self, bits: int, size: int) -> bytearray:
        """The first of the compressed bytes that are here from the one with that bit on, which was just read."""
        here = bits // 8 - (self._fed - len(self._piece))
        if here >= 0:
            return bytearray(self._piece[here : here + size])
        return bytearray(self._before[here:] + self._piece[: size + here])

    def take(self) -> bytes:
        """All output that waits."""
        output = ctypes.string_at(self._output, self.waiting)
        self._clear()
        return output

    @property
    def is_between_blocks(self) -> bool:
        """Whether the next bit begins a block, another one than the stream's first."""
        return bool(self._state.data_type & _AT_BLOCK_END) and not self._state.data_type & _IN_LAST_BLOCK

    @property
    def is_between_symbols(self) -> bool:
        """Whether what was put out ends with a symbol of a block's, after a run that had little room."""
        mark: int = _library.zng_inflateMark(self._by_reference)
        return self._is_full and mark >= 0 and not mark & 0xFFFF

    def checkpoint(self) -> Checkpoint:
        """The one that stands here, between blocks or symbols."""
        if self.is_between_blocks:
            here = Checkpoint(self.position_bits, self.produced, self.window())
        else:
            ahead_bits = _library.zng_inflateMark(self._by_reference) >> 16  # of the next symbol, which it has read
            header = bytes(self._header)
            here = Checkpoint(self.position_bits - ahead_bits, self.produced, self.window(), header, self._header_bit)
        self._ahead = self._from(here.bits, _AHEAD_BYTES)
        return here

    def sparse(self, last: Checkpoint) -> Checkpoint:
        """The last checkpoint without the bytes of its window to which what was read since does not refer."""
        if not last.window:
            return last
        ahead = bytes(self._ahead)
        marked = [_marked(last, marks, ahead) for marks in (_LOW_MARKS, _HIGH_MARKS)]
        if not all(marked):
            return last  # too little was read since
        kept = _kept(*marked)[-len(last.window) :]
        window = int.from_bytes(last.window, "little") & int.from_bytes(kept, "little")
        return last._replace(window=window.to_bytes(len(last.window), "little"))

    @property
    def position_bits(self) -> int:
        unused_bits: int = self._state.data_type & _UNUSED_BITS
        return 8 * self.consumed - unused_bits

    def window(self) -> bytes:
        """What was put out last."""
        window = ctypes.create_string_buffer(WINDOW_BYTES)
        length = ctypes.c_uint32(WINDOW_BYTES)
        _library.zng_inflateGetDictionary(self._by_reference, window, ctypes.byref(length))
        return window.raw[: length.value]

    def skip(self, count: int) -> bool:
        """Pass over `count` bytes of input.  False when there are not so many."""
        while count:
            if not self._get_input():
                return False
            step = min(count, self._state.avail_in)
            self._state.next_in += step
            self._state.avail_in -= step
            count -= step
        self.consumed = self._fed - self._state.avail_in
        return True

    def next_member(self) -> bool:
        """Be at the beginning of the next gzip member; zero padding is none, as for gzip(1).  False when there is no more."""
        while self._get_input():
            here = len(self._piece) - self._state.avail_in
            there = len(self._piece) - len(self._piece[here:].lstrip(b"\0"))
            self.skip(there - here)
            if there < len(self._piece):
                self._is_full = False
                _library.zng_inflateReset2(self._by_reference, _GZIP)
                return True
        return False

    def resume(self, checkpoint: Checkpoint) -> None:
        """Stand at a checkpoint within a member, in whose byte the pieces begin.  Raises ContentCorrupt."""
        _library.zng_inflateSetDictionary(self._by_reference, checkpoint.window, len(checkpoint.window))
        if checkpoint.header:
            pieces, self._pieces = self._pieces, iter([checkpoint.header])
            self._begin_at(checkpoint.header_bit)
            self._get_input()
            self.run(_TREES, self.room)
            if not self._state.data_type & _AT_HEADER_END:
                raise ContentCorrupt("a checkpoint's block has no header")
            _library.zng_inflatePrime(self._by_reference, -1, 0)  # forget what follows it
            self._state.avail_in, self._pieces = 0, pieces
        self._begin_at(checkpoint.bits & 7)

    def _begin_at(self, bit: int) -> None:
        """Begin with that bit of the next byte."""
        if bit and self._get_input():
            _library.zng_inflatePrime(self._by_reference, 8 - bit, self._piece[0] >> bit)
            self.skip(1)


def inflate(pieces: Iterator[bytes], checkpoint: Callable[[Checkpoint], None], span_bytes: int = SPAN_BYTES) -> Iterator[bytes]:
    """The decompressed bytes of a gzip file, all members of it; `checkpoint` is called with each, in order.

    Raises ContentCorrupt.
    """
    inflater = _Inflater(pieces, _GZIP, BLOCK_BYTES)
    latest = Checkpoint(0, 0, b"")  # handed on when it is known what of its window is needed
    try:
        while True:
            if not inflater.feed():
                raise ContentCorrupt("a layer's gzip ends in the middle")
            done = inflater.produced - latest.offset
            if done < span_bytes:
                ended = inflater.run(_BLOCK, min(inflater.room, span_bytes - done))
            elif done < 2 * span_bytes:
                ended = inflater.run(_BLOCK, min(inflater.room, 2 * span_bytes - done))
            else:
                ended = inflater.run(_BLOCK, 1)
            done = inflater.produced - latest.offset
            if ended:
                if inflater.waiting:
                    yield inflater.take()
                is_last = not inflater.next_member()
                if is_last or done >= span_bytes:
                    checkpoint(inflater.sparse(latest))
                if is_last:
                    return
                if done >= span_bytes:
                    latest = Checkpoint(8 * inflater.consumed, inflater.produced, b"")
            elif (done >= span_bytes and inflater.is_between_blocks) or (done > 2 * span_bytes and inflater.is_between_symbols):
                checkpoint(inflater.sparse(latest))
                latest = inflater.checkpoint()
            if not inflater.room:
                yield inflater.take()
    finally:
        inflater.close()


def inflate_from(checkpoint: Checkpoint, pieces: Iterator[bytes], block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
    """The decompressed bytes from a checkpoint on, in blocks of at most `block_bytes`, to the end of the pieces, or the last member.

    The pieces begin with the byte in which the checkpoint's first bit is.  Raises ContentCorrupt for what is no deflate stream;
    that it is the right one is for the taker to check.
    """
    in_member = bool(checkpoint.window)
    inflater = _Inflater(pieces, _RAW if in_member else _GZIP, block_bytes)
    try:
        if in_member:
            inflater.resume(checkpoint)
        while inflater.feed():
            ended = inflater.run(_NO_FLUSH, inflater.room)
            if not inflater.room or (ended and inflater.waiting):
                yield inflater.take()
            if ended:
                if in_member and not inflater.skip(_TRAILER_BYTES):
                    break
                in_member = False
                if not inflater.next_member():
                    break
        if inflater.waiting:
            yield inflater.take()
    finally:
        inflater.close()
