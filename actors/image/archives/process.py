"""The process "image builder": builds one image, and ends.

It holds nothing that must be given back: SIGKILL at any instruction leaves whole objects, files without a name, which
vanish, and at most a hidden temporary in the archive directory, which the next build removes.
"""

from __future__ import annotations

import gc
import signal
import socket
import time
import types

from actors.image.archives.builder import Build
from actors.image.errors import ImageError, OverBounds
from actors.image.wire import BuildFailed, BuildImage, Built, Resolved, Shared
from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.frames import Codec

PULSE_S = 0.25
ANSWER_TIMEOUT_S = 30.0  # for a reader who is behind; without the answer, the next builder finds all done


def serve(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Do the `BuildImage` in `arguments`; say `Progress` meanwhile, and `Resolved`, `Built` or `BuildFailed` at the end.

    If the order has a bucket, `Built` is followed by more `Progress`, and by `Shared`.

    Ends at once, without an answer, when nobody is at the other end any more.
    """
    channel = Channel(end, Codec(BuildImage))
    order: BuildImage = channel.codec.decode(arguments)
    build = Build(order)
    deadline = time.monotonic() + order.time_max_s
    # There is somebody to take what `pulse` raises.  It is unset before anything is called, which is when a signal comes in: the timer may
    # run out again while the build is being given up, and then where nothing is expected any more.
    is_bounded = True

    def pulse(number: int, frame: types.FrameType | None) -> None:
        # A timer's signal, because it comes in any phase: while the registry is silent, and inside a long walk of a
        # hostile layer.  What it raises comes out of whatever the build was doing; a destructor would swallow it, and
        # then it is raised again.
        if is_bounded and time.monotonic() > deadline:
            raise OverBounds(f"{order.reference}: not complete after {order.time_max_s:g} s, the bound on this node")
        try:
            channel.send(build.progress(), timeout_s=0)
        except ChannelTimeout:
            pass  # a reader who is behind misses some

    gc.disable()  # the tree only grows; looking for garbage in it again and again takes a sixth of the time and finds none
    signal.signal(signal.SIGALRM, pulse)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, PULSE_S, PULSE_S)
            answer: Resolved | Built | BuildFailed = build.run()
            is_bounded = False
        except ImageError as error:
            is_bounded = False
            answer = BuildFailed(error.kind, str(error))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        channel.send(answer, timeout_s=ANSWER_TIMEOUT_S)
        if order.bucket is None or not isinstance(answer, Built):
            return
        deadline = time.monotonic() + order.time_max_s
        try:
            is_bounded = True
            signal.setitimer(signal.ITIMER_REAL, PULSE_S, PULSE_S)
            shared = build.share(answer)
            is_bounded = False
        except OverBounds as error:
            is_bounded = False
            shared = Shared(False, str(error))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        channel.send(shared, timeout_s=ANSWER_TIMEOUT_S)
    except ChannelClosed:
        return
