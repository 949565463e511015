"""How long, and how often, one piece of work with a registry may fail; and which answer is too slow to go on waiting for.  No I/O.

What may pass is tried again: no connection, a broken or stalled one, 429 and 5xx.  Each attempt without progress waits longer
for an answer than the one before: usually another connection is faster than the one that hangs, and where it is not, the
registry gets its time in the end.
"""

from __future__ import annotations

import email.utils
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Mapping

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUTS_S = (5.0, 10.0, 20.0, 30.0)  # for the head of an answer and between two pieces of it, by attempt
ATTEMPTS = len(ANSWER_TIMEOUTS_S)  # without one byte of progress in between
BACKOFF_S = 0.2  # before the second repetition, twice that before the next; the first one is immediate
RETRY_AFTER_MAX_S = 30.0  # a registry that wants us to wait longer is not to be had now

# A body that comes slower than both is a straggler.  A window is time spent waiting for bytes, so a slow reader is none.
SLOW_WINDOW_S = 2.0
SLOW_SHARE = 0.25  # of the median of what the same host sent lately
SLOW_FLOOR_BYTES_PER_S = 16 << 10  # when nothing is known of the host yet
STRAGGLERS_MAX = 3  # given up for one piece of work; then this is how fast it is today
_KNOWN = 32  # bodies that the median is of
_chance = random.Random()  # its own: nodes that were forked, or a program that sets the seed, must not all wait alike
_SAMPLE_BYTES_MIN = 64 << 10  # a smaller body is one round trip, and says nothing about bandwidth


class Patience:
    """For one piece of work.  `timeout_s` is for all of it, waits included; None: as long as the attempts take."""

    def __init__(self, timeout_s: float | None = None, attempts: int = ATTEMPTS) -> None:
        self.failures = 0  # since the last progress
        self.stragglers = 0
        self._attempts = attempts
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        return float("inf") if self._deadline is None else self._deadline - time.monotonic()

    @property
    def answer_timeout_s(self) -> float:
        """For the next attempt; never zero, which urllib3 refuses."""
        return max(0.001, min(ANSWER_TIMEOUTS_S[min(self.failures, len(ANSWER_TIMEOUTS_S) - 1)], self.left_s))

    @property
    def connect_timeout_s(self) -> float:
        return max(0.001, min(CONNECT_TIMEOUT_S, self.left_s))

    def progressed(self) -> None:
        self.failures = 0

    def again(self, wait_s: float | None = None) -> bool:
        """Whether to try again after one more failure, having waited for `wait_s`, or for what the failures so far call for."""
        self.failures += 1
        if self.failures >= self._attempts:
            return False
        if wait_s is None:
            wait_s = 0.0 if self.failures == 1 else BACKOFF_S * 2 ** (self.failures - 2) * _chance.uniform(0.5, 1.5)
        if wait_s > min(RETRY_AFTER_MAX_S, self.left_s):
            return False
        time.sleep(wait_s)
        return True


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """What an answer's Retry-After says, seconds or a date (RFC 9110, 10.2.3), by the server's own clock where it tells it."""
    text = headers.get("Retry-After", "").strip()
    if not text:
        return None
    if text.isdigit():
        return float(text)
    try:
        then = email.utils.parsedate_to_datetime(text).timestamp()
    except ValueError:
        return None
    try:
        now = email.utils.parsedate_to_datetime(headers.get("Date", "")).timestamp()
    except ValueError:
        now = time.time()
    return max(0.0, then - now)


class Rates:
    """How fast each host has sent lately, in bytes a second.  Thread-safe: one for all connections of a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_host: dict[str, deque[float]] = {}

    def add(self, host: str, size_bytes: int, time_s: float) -> None:
        """A body of so many bytes came in so much time of waiting."""
        if size_bytes < _SAMPLE_BYTES_MIN:
            return
        with self._lock:
            self._by_host.setdefault(host, deque(maxlen=_KNOWN)).append(size_bytes / max(time_s, 0.001))

    def slow(self, host: str) -> float:
        """A body that comes slower than this, in bytes a second, is a straggler."""
        with self._lock:
            known = self._by_host.get(host, ())
            return SLOW_SHARE * statistics.median(known) if len(known) >= 3 else SLOW_FLOOR_BYTES_PER_S


RATES = Rates()


class Meter:
    """Watches one body come in from `host`."""

    def __init__(self, host: str, patience: Patience, rates: Rates = RATES) -> None:
        self._host = host
        self._patience = patience
        self._rates = rates
        self._bytes = self._window_bytes = 0
        self._time_s = self._window_s = 0.0

    def took(self, size_bytes: int, time_s: float) -> bool:
        """So many bytes came after so much waiting → False when this body is a straggler and should be left for another."""
        self._bytes += size_bytes
        self._time_s += time_s
        self._window_bytes += size_bytes
        self._window_s += time_s
        window_s = SLOW_WINDOW_S * 2**self._patience.stragglers
        if self._window_s < window_s:
            return True
        rate = self._window_bytes / self._window_s
        self._window_bytes, self._window_s = 0, 0.0
        if rate >= self._rates.slow(self._host) or self._patience.stragglers >= STRAGGLERS_MAX:
            return True
        self._patience.stragglers += 1
        return False

    def ended(self) -> None:
        """The body is complete, or as much of it as was wanted."""
        self._rates.add(self._host, self._bytes, self._time_s)
