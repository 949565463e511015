"""What crosses a mailbox, a process or a socket: small frozen messages, as msgpack, with a bound and a schema.

A message is a frozen :class:`Message`; the same type is used inside an actor, between processes and on a socket.  A
:class:`Codec` knows the message types that one end accepts; anything else (garbage, an unknown type, a field of the wrong
type, a frame over the bound) is a :class:`FrameError` with a text for its sender, never a crash.

On a stream socket a frame is a 4-byte big-endian length and that many bytes of msgpack; :class:`FrameBuffer` cuts a stream into
frames and does no I/O.  On a SOCK_SEQPACKET socket (`channel`) the kernel keeps the boundaries and a frame is the packet.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Union

import msgspec

LENGTH = struct.Struct(">I")


class Message(msgspec.Struct, frozen=True, tag=True):
    """A message: fields are data only (numbers, text, bytes, lists, dicts, other messages); its class name is its tag."""


class FrameError(Exception):
    """The peer sent what this end does not accept; the text says what, and is fit to be sent back."""


class Codec:
    """Encodes messages, and decodes exactly the types given.

    `size_bytes_max` bounds one encoded message in both directions.
    """

    def __init__(self, *types: type[Message], size_bytes_max: int = 64 << 10) -> None:
        self.size_bytes_max = size_bytes_max
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Union[types])  # noqa: UP007 (built at run time)

    def encode(self, message: Message) -> bytes:
        """The message as msgpack.  Raises FrameError when it is over the bound."""
        body = self._encoder.encode(message)
        if len(body) > self.size_bytes_max:
            raise FrameError(f"{type(message).__name__} has {len(body)} bytes; at most {self.size_bytes_max} are allowed")
        return body

    def decode(self, body: bytes | bytearray | memoryview) -> Any:
        """The message in `body`.  Raises FrameError for anything but one of the codec's types."""
        if len(body) > self.size_bytes_max:
            raise FrameError(f"a message of {len(body)} bytes; at most {self.size_bytes_max} are allowed")
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise FrameError(f"not a message that is understood here: {error}") from None

    def frame(self, message: Message) -> bytes:
        """The message as a frame of a stream socket."""
        body = self.encode(message)
        return LENGTH.pack(len(body)) + body


class FrameBuffer:
    """Cuts a byte stream into messages: `feed` what arrived, then iterate over what is complete."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def __iter__(self) -> Iterator[Any]:
        """Complete messages, oldest first.

        Raises FrameError for a frame over the bound as soon as its length is there, so that nobody can make this end
        hold a gigabyte; the stream is of no use afterwards and should be closed.
        """
        while len(self._buffer) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._buffer)
            if length > self._codec.size_bytes_max:
                raise FrameError(f"a frame of {length} bytes; at most {self._codec.size_bytes_max} are allowed")
            end = LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[LENGTH.size : end])
            del self._buffer[:end]
            yield self._codec.decode(body)

    def __len__(self) -> int:
        """Bytes of an incomplete frame held back."""
        return len(self._buffer)
