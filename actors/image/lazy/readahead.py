"""What an image's server fetches before it is asked: more of an object that somebody reads on in, or of which he reads here and there.

A span that is far away costs a round trip, in which nothing else comes for whoever waits for it.  Of an object of up to SMALL_SPANS, a
program or a library most likely, nearly all is wanted sooner or later, when a second piece of it is; of a larger one what follows, when
what came before was wanted.  The window doubles with each time that it was right.

And where two small files of a directory are wanted, others are: they lie side by side in a layer.  No I/O.
"""

from __future__ import annotations

from collections import OrderedDict

SMALL_SPANS = 16
WINDOW_MAX = 8  # spans
OBJECTS_MAX = 1024  # of which is remembered how they are read
GROUP_SPANS = 8  # of a layer: 4 MiB of what is in it
GROUPS_MAX = 1024


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
        if len(spans) <= SMALL_SPANS and upto >= 0:
            self._remember(object, spans.stop, 0, spans)
            return spans  # programs are not read from their begin to their end
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


class Neighbours:
    """Groups of spans of which two objects have been missed; and those beside them, once one of their own is."""

    def __init__(self) -> None:
        self._missed: OrderedDict[tuple[int, int], int] = OrderedDict()  # layer, group → the object; -1: all of it is wanted

    def missed(self, layer: int, object: int, span: int) -> list[range]:
        """That span is being fetched for a small object → the spans to fetch behind it, the more urgent first."""
        group = span // GROUP_SPANS
        before = self._missed.get((layer, group), object)
        if before == -1:
            return []
        beside = any(self._missed.get((layer, group + step)) == -1 for step in (-2, -1, 1, 2))
        if before == object and not beside:
            self._note(layer, group, object)
            return []
        wanted = [group, group + 1, group - 1] if beside else [group]
        wanted = [number for number in wanted if number >= 0 and self._missed.get((layer, number)) != -1]
        for number in wanted:
            self._note(layer, number, -1)
        return [range(number * GROUP_SPANS, (number + 1) * GROUP_SPANS) for number in wanted]

    def _note(self, layer: int, group: int, object: int) -> None:
        self._missed[layer, group] = object
        self._missed.move_to_end((layer, group))
        if len(self._missed) > GROUPS_MAX:
            self._missed.popitem(last=False)
