"""Whether a process lives, or only exists: its event loop beats its lock file (`lockfile`), and who looks after it reads that.

Pure: signs of life and moments in, signals to send out.  Who looks, and has the pidfd, sends them.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Final

from supervisor.lockfile import Sign

BEAT_S: Final = 0.5  # between two beats
LOOK_S: Final = 0.25  # between two looks
SILENCE_S: Final = 3.5  # a process that beats every BEAT_S, and has not for so long, hangs
BEGIN_S: Final = 60.0  # one that has not beaten once may still be beginning: that takes long on a busy machine
LOOK_AGAIN_S: Final = 0.2  # perhaps it was the one who looks that did not run
LATE_S: Final = 2.0  # a look that comes so long after the one before says nothing
DUMP_S: Final = 0.2  # between SIGABRT, at which a process says where it hangs, and SIGKILL
# One that waits for a disk is not hung: killed, it would end no sooner, and the next one would wait for the same.  But not for ever.
DISK_S: Final = 60.0


class Pulse:
    """The pulse of the process `pid`.

    Without a beat for `silence_s` it hangs, and so it does when it has not beaten at all for `begin_s`; for `silence_s`, when
    somebody has stopped it.  Who waits for a disk does not, for DISK_S more.
    """

    def __init__(self, pid: int, now_s: float, silence_s: float = SILENCE_S, begin_s: float = BEGIN_S) -> None:
        self._pid = pid
        self._silence_s = silence_s
        self._begin_s = begin_s
        self._beats = 0
        self._beat_s = self._look_s = self._heard_s = now_s
        self._suspected_s: float | None = None
        self._aborted_s: float | None = None

    @property
    def begun(self) -> bool:
        """Whether it has beaten."""
        return self._beats > 0

    def look(
        self, sign: Sign, now_s: float, stopped: bool = False, waits_for_disk: Callable[[], bool] = lambda: False
    ) -> signal.Signals | None:
        """What to send it at `now_s`, on the monotonic clock, when `sign` is what its lock says; to be asked every LOOK_S or so.

        `stopped`: whether it is (`pidfd.is_stopped`); of one that has begun its silence tells that as well.  `waits_for_disk`: whether
        it does, asked only of one that is silent.
        SIGABRT: faulthandler writes to the daemon's log where every thread is.  Then SIGKILL.
        """
        late, self._look_s = now_s - self._look_s > LATE_S, now_s
        beats = sign.beats if sign.pid == self._pid else 0  # else it is an earlier holder's, and the process only begins
        if self._aborted_s is not None:
            return signal.SIGKILL if now_s - self._aborted_s >= DUMP_S else None
        if beats != self._beats or late:
            # Late: the machine slept, or the one who looks was stopped, and nobody else is to blame.
            self._beats, self._beat_s, self._suspected_s = beats, now_s, None
            self._heard_s = now_s
        elif now_s - self._beat_s < (self._silence_s if beats or stopped else self._begin_s):
            self._suspected_s = None
        elif self._suspected_s is None:
            self._suspected_s = now_s
        elif now_s - self._suspected_s < LOOK_AGAIN_S:
            pass
        elif now_s - self._heard_s < self._silence_s + DISK_S and waits_for_disk():
            self._beat_s, self._suspected_s = now_s, None
        else:
            self._aborted_s = now_s
            return signal.SIGABRT
        return None
