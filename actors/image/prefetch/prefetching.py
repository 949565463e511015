"""What is fetched ahead for one mounted image: its prefetchers, one that streams a pack and one that makes one.

A task's root is given out when it is known what its workload's pack brings, or that there is none: then its first reads wait for the
pack and not for the registry.  Nobody waits for that longer than ANSWER_S.  Who streams and dies is not replaced: what it has not
brought is fetched as it is read.  Who makes a pack and is killed is followed by another, after a pause.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from loguru import logger

from actors.image import wire
from actors.image.lazy.coming import end_announcement
from actors.image.prefetch.line import PREFETCHER, Line
from actors.services import Services
from supervisor.actor import Actor
from supervisor.frames import Codec, Message
from supervisor.isolation import Process
from supervisor.worker import Ended

SAYS = Codec(wire.PackMade, wire.Streaming, wire.PackComing, wire.PackAbsent, wire.PackThrough, wire.Completed)
ANSWER_S = 1.0
MAKE_AGAIN_S = (1.0, 10.0, 60.0)  # before a pack is made again whose maker was killed


@dataclass(frozen=True)
class Prepared:
    """It is known what is fetched ahead for tasks of this workload; `found`: something is."""

    workload: str
    found: bool


@dataclass(frozen=True, eq=False)
class _NoAnswer:
    """It should be known by now."""

    prefetching: Prefetching
    workload: str


@dataclass(frozen=True, eq=False)
class _MakeAgain:
    """The pause after a maker that was killed is over."""

    prefetching: Prefetching
    workload: str


class Prefetching:
    """`spool`: the name under which the image's is held.  `packs`: the workloads that have one beside the archive at `archive`.

    For the actor's own thread; when it is over, somebody must `let_go`.
    """

    def __init__(self, actor: Actor, services: Services, reference: str, archive: str, spool: str, packs: set[str]) -> None:
        self._actor = actor
        self._services = services
        self._reference = reference
        self._archive = archive
        self._spool = spool
        self._packs = packs
        s3 = services.settings.s3
        self._bucket = wire.Bucket(s3.bucket, s3.prefix, s3.endpoint, s3.region) if s3.bucket else None
        self._streams = Line(actor, services, f"stream of {reference} {archive}", self._stream, heartbeat=True)
        # Who makes one may have no processor for a long time, and nobody waits for it.
        self._makers = Line(actor, services, f"packing of {reference} {archive}", self._make)
        self._unmade: dict[str, int] = {}  # workload → how many of its makers have been killed
        self._asked: set[str] = set()
        self._answered: set[str] = set()
        self._announced_at = 0

    def prepare(self, workload: str) -> bool:
        """See to what is fetched ahead for tasks of this workload → whether it is known what; if not, `Prepared` follows."""
        if workload in self._answered or (workload not in self._packs and self._bucket is None):
            return True
        if workload not in self._asked:
            self._asked.add(workload)
            self._streams.add(workload)
            self._actor.after(ANSWER_S, _NoAnswer(self, workload))
        return False

    def make(self, workload: str) -> None:
        """Make the pack of a workload whose trace is beside the archive."""
        self._unmade.setdefault(workload, 0)
        self._makers.add(workload)

    def take(self, message: Any) -> Prepared | wire.Completed | None:
        """What a message that arrived at the actor means for it."""
        if isinstance(message, _NoAnswer):
            return self._answer(message.workload, False) if message.prefetching is self else None
        if isinstance(message, _MakeAgain):
            if message.prefetching is self and message.workload in self._unmade:
                self._makers.add(message.workload)
            return None
        match self._makers.take(message):
            case wire.PackMade(chunks, size_bytes, problem):
                self._unmade.pop(self._makers.workload, None)
                if problem:
                    logger.warning("{}: no pack was made of a trace: {}", self._reference, problem)
                else:
                    logger.info("{}: a pack of {} chunks, {} bytes, was made", self._reference, chunks, size_bytes)
                    self._packs.add(self._makers.workload)
            case Ended():
                self._maker_ended()
        match self._streams.take(message):
            case wire.PackComing(_, announced_at):
                self._announced_at = announced_at
                return self._answer(self._streams.workload, True)
            case wire.PackAbsent(problem):
                if problem:
                    logger.warning("{}: {}", self._reference, problem)
                return self._absent()
            case wire.PackThrough(_, _, problem) if problem:
                logger.warning("{}: a pack is of no use: {}", self._reference, problem)
                return self._absent()
            case wire.PackThrough():
                if self._bucket is not None and self._streams.workload in self._packs:
                    self.make(self._streams.workload)  # who made it did not live to share it, perhaps
            case wire.Completed() as completed:
                return completed
            case Ended():
                return self._stream_ended()
        return None

    def let_go(self) -> None:
        self._unmade.clear()
        self._streams.let_go()
        self._makers.let_go()

    def _answer(self, workload: str, found: bool) -> Prepared | None:
        if workload in self._answered:
            return None
        self._answered.add(workload)
        return Prepared(workload, found)

    def _maker_ended(self) -> None:
        workload = self._makers.workload
        self._makers.ended()
        if (killed := self._unmade.get(workload)) is None:
            return  # it has said how it went
        if killed < len(MAKE_AGAIN_S):
            self._unmade[workload] += 1
            self._actor.after(MAKE_AGAIN_S[killed], _MakeAgain(self, workload))
        else:
            del self._unmade[workload]
            logger.warning("{}: no pack was made of a trace: who makes it is killed again and again", self._reference)

    def _absent(self) -> Prepared | None:
        workload = self._streams.workload
        self._packs.discard(workload)
        return self._answer(workload, False)

    def _stream_ended(self) -> Prepared | None:
        workload = self._streams.workload
        spool = self._services.descriptors.get(self._spool)
        if self._announced_at and spool is not None:
            with contextlib.suppress(OSError):
                end_announcement(spool, self._announced_at)  # if it was killed, others need not find that out
        self._announced_at = 0
        self._streams.ended()
        return self._answer(workload, False)

    def _stream(self, workload: str) -> Process:
        return self._process("stream", wire.StreamPack(self._archive, self._objects, workload, self._bucket))

    def _make(self, workload: str) -> Process:
        return self._process("make", wire.MakePack(self._archive, self._objects, workload, self._bucket))

    @property
    def _objects(self) -> str:
        return self._services.settings.image.cache_dir

    def _process(self, entry: str, order: Message) -> Process:
        held = self._services.descriptors.get(self._spool)
        descriptors = [] if held is None else [held]
        return self._services.isolation.start(PREFETCHER, f"actors.image.prefetch.process:{entry}", order, SAYS, descriptors)
