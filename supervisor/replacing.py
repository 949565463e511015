"""The keeper's watch over standing orders: a process that has ended, or hangs, is replaced at once, whoever else lives.

Whoever reads from a mount waits for this, so it is the keeper that does it first: it has one thread, which does nothing else.  The
root supervisor is told, and does it itself only when there is no keeper or the keeper does not (`descriptors`).

Nothing here blocks: the fork server, which may hang as well, is asked through the keeper's selector, and is given ANSWER_S.
"""

from __future__ import annotations

import math
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from inotify_simple import INotify, flags

from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.forkprotocol import ANSWERS, Fork, Forked, ForkFailed
from supervisor.frames import FrameError
from supervisor.held import Held
from supervisor.keeping import Stand
from supervisor.lockfile import sign_of
from supervisor.orders import Orders, Standing
from supervisor.parts import how
from supervisor.pidfd import pid_of, same_process, signal_process, wait_status, waits_for_disk
from supervisor.pulse import LOOK_S, Pulse
from supervisor.replacements import Gone, Replacements

PAUSES_S = (0.0, 0.0, 0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # before the n-th process in a row that has not beaten once
ANSWER_S = 2.0  # a fork server that has not answered by then hangs


class _Asked:
    """The fork server has been asked for a process; `end` is our end of that process's channel."""

    def __init__(self, server: Channel, end: socket.socket, deadline_s: float) -> None:
        self.server = server
        self.end = end
        self.deadline_s = deadline_s

    def close(self) -> None:
        self.server.close()
        self.end.close()


class _Post:
    """One order: the process under it now, and what is known of it."""

    def __init__(self, name: str, standing: Standing, now_s: float) -> None:
        self.name = name
        self.replaced = 0
        self.failures = 0
        self.fill(standing, now_s)

    def fill(self, standing: Standing, now_s: float) -> None:
        self.standing = standing
        self.pid = pid_of(standing.pidfd) or 0
        self.due_s: float | None = None  # when to ask for the next one, once it has ended
        self.asked: _Asked | None = None
        self.unserved = False  # there was no fork server to ask
        self.hung = False  # and was ended for that
        self.gone: Gone | None = None  # how it has ended
        silence_s = standing.order.silence_s
        self.pulse = Pulse(self.pid, now_s, silence_s, begin_s=silence_s)  # who reads waits for its first beat as for any other

    def look(self, now_s: float) -> None:
        """Has its event loop turned?  If not for too long, it is told to say where it is, and then killed."""
        at_disk = partial(waits_for_disk, self.standing.pidfd)
        number = self.pulse.look(sign_of(Path(self.standing.order.lock)), now_s, waits_for_disk=at_disk)
        if number is not None:
            self.hung = True
            signal_process(self.standing.pidfd, number)


class Replacing:
    """The standing orders that a keeper knows.

    `held`: where the descriptors are that go along.  `tell`: tells the root supervisor, if there is one; `hear`: does what that has said
    already.  `replacements`: is told of each.  `fork_server_hangs`: called when it does.  `say`: writes to the daemon's log.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        held: Held,
        fork_server: Path,
        tell: Callable[[Stand, list[int]], None],
        replacements: Replacements,
        fork_server_hangs: Callable[[], None],
        hear: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self._selector = selector
        self._held = held
        self._path = fork_server
        self._tell = tell
        self._replacements = replacements
        self._fork_server_hangs = fork_server_hangs
        self._hear = hear
        self._say = say
        self._orders = Orders(ours_first=False)
        self._posts: dict[str, _Post] = {}
        self._look_s = 0.0
        self._appearing = INotify()  # close-on-exec
        self._appearing.add_watch(str(fork_server.parent), flags.MOVED_TO)
        selector.register(self._appearing, selectors.EVENT_READ, self._appeared)

    # --- what stands ---

    def stand(self, stand: Stand, descriptors: list[int]) -> None:
        """There is such a process.  Raises FrameError, when it did not come with its two descriptors."""
        if len(descriptors) != 2:
            for descriptor in descriptors:
                os.close(descriptor)
            raise FrameError(f"{stand.name}: {len(descriptors)} descriptors came with a standing order")
        self._put(stand.name, Standing(stand.order, *descriptors))

    def dismiss(self, names: list[str]) -> None:
        for name in names:
            post = self._posts.pop(name, None)
            if post is not None:
                self._unwatch(post)
                self._orders.dismiss(name)

    def hand_over(self) -> Iterator[tuple[Stand, list[int]]]:
        """Everything that stands, for another process to hold as well."""
        for name, post in sorted(self._posts.items()):
            yield Stand(name, post.standing.order), [post.standing.pidfd, post.standing.channel]

    def replaced(self) -> dict[str, int]:
        return {name: post.replaced for name, post in sorted(self._posts.items())}

    # --- the keeper's loop ---

    def due_s(self) -> float | None:
        """When to call `work` next, on the monotonic clock; None: not before something is heard."""
        moments = [post.asked.deadline_s if post.asked else post.due_s for post in self._posts.values()]
        found = [moment for moment in moments if moment is not None and moment < math.inf]
        if any(post.due_s is None for post in self._posts.values()):
            found.append(self._look_s)
        return min(found, default=None)

    def work(self) -> None:
        """Do what is due: ask for processes, give up on a fork server, look for those that hang."""
        now_s = time.monotonic()
        look = now_s >= self._look_s
        if look:
            self._look_s = now_s + LOOK_S
        for post in list(self._posts.values()):
            if post.asked is not None:
                if now_s >= post.asked.deadline_s:
                    self._say(f"the fork server has not answered for {ANSWER_S:g} s; it is killed")
                    self._fork_server_hangs()
                    self._give_up(post, now_s)
            elif post.due_s is not None:
                if now_s >= post.due_s:
                    # First what the root supervisor has said: this process may have stood still, and the other one have done it
                    # meanwhile.  Its process would be ended by ours.
                    self._hear()
                    if self._posts.get(post.name) is post and post.due_s is not None:
                        self._ask(post, now_s)
            elif look:
                post.look(now_s)

    # --- a process ends ---

    def _put(self, name: str, newcomer: Standing) -> None:
        post = self._posts.get(name)
        if post is not None:
            if same_process(post.standing.pidfd, newcomer.pidfd):
                newcomer.close()
                return
            self._unwatch(post)  # before its descriptors are closed
        taken = self._orders.put(name, newcomer)
        standing = self._orders.get(name)
        assert standing is not None
        if post is None:
            post = self._posts[name] = _Post(name, standing, time.monotonic())
        elif taken:
            post.fill(standing, time.monotonic())
        self._selector.register(standing.pidfd, selectors.EVENT_READ, lambda: self._ended(post))

    def _unwatch(self, post: _Post) -> None:
        if post.due_s is None:
            self._selector.unregister(post.standing.pidfd)
        if post.asked is not None:
            self._forget_asked(post)

    def _ended(self, post: _Post) -> None:
        self._selector.unregister(post.standing.pidfd)
        pid, status = post.pid, wait_status(post.standing.pidfd)
        code = None if status is None else os.waitstatus_to_exitcode(status)
        post.gone = Gone(pid, code, post.hung)
        if code == 0:
            # It is done; should that be wrong, the root supervisor knows.
            post.due_s = math.inf
            return
        sign = sign_of(Path(post.standing.order.lock))
        if sign.pid == post.pid and sign.beats:
            post.failures = 0
        now_s = time.monotonic()
        post.due_s = now_s + PAUSES_S[min(post.failures, len(PAUSES_S) - 1)]
        post.failures += 1
        self.work()  # at once: whoever reads waits, and other events of this round may take a while
        self._say(f"{post.standing.order.process} (pid {pid}) has ended, {how(code)}; another one takes its place")

    # --- and another one takes its place ---

    def _appeared(self) -> None:
        """A fork server listens now."""
        self._appearing.read(timeout=0)
        now_s = time.monotonic()
        for post in self._posts.values():
            if post.unserved:
                post.due_s = now_s

    def _ask(self, post: _Post, now_s: float) -> None:
        order = post.standing.order
        post.unserved = False
        along = [self._held.get(name) for name in order.along]
        if None in along:
            post.due_s = now_s + PAUSES_S[-1]  # what it needs is not held any more: the order will be dismissed in a moment
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.setblocking(False)
        asked = _Asked(Channel(connection, ANSWERS), ours, now_s + ANSWER_S)
        with theirs:
            try:
                connection.connect(str(self._path))
                request = Fork(order.process, order.entry, order.arguments, order.lock)
                asked.server.send(request, [theirs.fileno(), *(number for number in along if number is not None)], 0)
            except (OSError, ChannelClosed, ChannelTimeout):
                # None listens just now, or too many wait: the next one is heard of (`_appeared`).
                asked.close()
                post.unserved = True
                post.due_s = now_s + ANSWER_S
                return
        post.asked = asked
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._answered(post, asked))

    def _answered(self, post: _Post, asked: _Asked) -> None:
        now_s = time.monotonic()
        try:
            answer, came = asked.server.receive(0)
        except ChannelTimeout:
            return
        except (ChannelClosed, FrameError):
            # It died, perhaps with the child made already: that one is in nobody's care, and the next one ends it (`take_place`).
            self._give_up(post, now_s)
            return
        match answer:
            case Forked() if len(came) == 1:
                self._selector.unregister(asked.server.socket)
                asked.server.close()
                post.asked = None
                post.replaced += 1
                gone = post.gone
                standing = Standing(post.standing.order, came[0], asked.end.detach())
                self._put(post.name, standing)
                self._tell(Stand(post.name, standing.order), [standing.pidfd, standing.channel])
                assert gone is not None
                self._replacements.add(standing.order.process, answer.pid, gone)
            case _:
                for descriptor in came:
                    os.close(descriptor)
                why = answer.error if isinstance(answer, ForkFailed) else "no pidfd came"
                self._say(f"{post.standing.order.process} cannot be started, it is tried again: {why}")
                self._forget_asked(post)
                post.due_s = now_s + PAUSES_S[min(post.failures, len(PAUSES_S) - 1)]
                post.failures += 1

    def _give_up(self, post: _Post, now_s: float) -> None:
        self._forget_asked(post)
        post.due_s = now_s

    def _forget_asked(self, post: _Post) -> None:
        assert post.asked is not None
        self._selector.unregister(post.asked.server.socket)
        post.asked.close()
        post.asked = None
