"""What an image's server fetches before it is asked: more of an object that somebody reads on in, or of which he reads here and there.

A span that is far away costs a round trip, in which nothing else comes for whoever waits for it.  Of an object of up to SMALL_SPANS, a
program or a library most likely, nearly all is wanted sooner or later; of a larger one what follows, when what came before was wanted.
The window doubles with each time that it was right, or the object was asked for again.  No I/O.
"""

from __future__ import annotations

from collections import OrderedDict

SMALL_SPANS = 16
WINDOW_MAX = 8  # spans
OBJECTS_MAX = 1024  # of which is remembered how they are read


class Readahead:
    """`object` is any name for one; its spans are numbered as in its layer."""

    def __init__(self) -> None:
        self._read: OrderedDict[int, tuple[int, int]] = (
            OrderedDict()
        )  # object → how far it is fetched (the next span), and the window

    def __contains__(self, object: int) -> bool:
        return object in self._read

    def missed(self, object: int, needed: range, spans: range) -> range:
        """The spans `needed` of an object, which has all of `spans`, are being fetched → those to fetch with them."""
        upto, window = self._read.pop(object, (-1, 0))
        follows = needed.start <= upto <= needed.stop or needed.start == spans.start
        if len(spans) <= SMALL_SPANS or follows:
            window = min(WINDOW_MAX, max(1, 2 * window))
        else:
            window = 0
        return self._remember(object, needed.stop, window, spans)

    def found(self, object: int, span: int, spans: range) -> range:
        """A read of that span was answered from what is here → the spans to fetch now, so that who reads on need not wait."""
        upto, window = self._read.get(object, (-1, 0))
        if not window or not upto - window <= span < upto or span < upto - (window + 1) // 2:
            return range(0)
        return self._remember(object, upto, min(WINDOW_MAX, 2 * window), spans)

    def _remember(self, object: int, begin: int, window: int, spans: range) -> range:
        ahead = range(begin, max(begin, min(begin + window, spans.stop)))
        self._read[object] = (ahead.stop, window)
        self._read.move_to_end(object)
        if len(self._read) > OBJECTS_MAX:
            self._read.popitem(last=False)
        return ahead
