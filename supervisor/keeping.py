"""What is said to the keeper, on a SOCK_SEQPACKET Unix socket.

The root supervisor says `Hello` and gets `Welcome` and every descriptor held (`Kept`, in packets of several, then `KeptAll`);
from then on it says `Keep` and `Drop` and gets no answer: a descriptor is safe as soon as it was sent, for the kernel keeps
what lies in a socket's queue when its sender dies.  Another keeper says `Yield`.

A *standing order* is a process that is to be replaced, by whoever is there to do it, as soon as it has ended: `Stand` says so,
to the keeper when the root supervisor has started one, to the root supervisor when the keeper has (or when it says `Hello`).

Of every process that it has started in place of another one, the keeper says `Replaced`, again after each `Hello`, until the root
supervisor has `Noted` it.
"""

from __future__ import annotations

from pathlib import Path

from supervisor.frames import Codec, Message


def lock_beside(keeper_socket: Path) -> Path:
    """The lock that a keeper holds and beats, by where it listens."""
    return keeper_socket.with_name("keeper.lock")


class Hello(Message, frozen=True):
    """From a root supervisor → `Welcome`, `Kept`…, `KeptAll`.  `notes`: it understands `Replaced`, as an older version does not."""

    notes: bool = False


class Welcome(Message, frozen=True):
    """`stand_in`: this keeper was started by the tree, not by somebody.  `draining`: it was told to end."""

    pid: int
    stand_in: bool
    draining: bool


class Keep(Message, frozen=True):
    """Keep the descriptors that came along under these names; a name known already is replaced.  `data` is kept beside them."""

    names: list[str]
    data: dict[str, bytes] = {}


class Drop(Message, frozen=True):
    names: list[str]


class Kept(Message, frozen=True):
    """Descriptors held, as they came with this message, and what was kept beside them."""

    names: list[str]
    data: dict[str, bytes] = {}


class StandingOrder(Message, frozen=True):
    """How to start a process in place of one that has ended, unless with success: then it is done.

    `process`, `entry`, `arguments`, `lock`: as the fork server takes them.  `along`: names of held descriptors that it is given.  A
    process that has not beaten its lock (`boot.beat`) for `silence_s` hangs.
    """

    process: str
    entry: str
    arguments: bytes
    along: list[str]
    lock: str
    silence_s: float


class Stand(Message, frozen=True):
    """The process whose pidfd and channel came along is the one under this order, by the name of `name`."""

    name: str
    order: StandingOrder


class Dismiss(Message, frozen=True):
    """These orders stand no longer, and their processes are ended."""

    names: list[str]


class KeptAll(Message, frozen=True):
    """No more descriptors follow."""


class Replaced(Message, frozen=True):
    """A process has been started in place of another one, the `number`th by this keeper, at `at_s` (seconds since 1970).

    `before`: the pid of the one before.  `code`: how that ended, as `subprocess` has it; None when nobody can know.  `hung`: it was
    ended because it hung.
    """

    number: int
    process: str
    pid: int
    before: int
    code: int | None
    hung: bool
    at_s: float


class Noted(Message, frozen=True):
    """What was `Replaced` with this number is written down."""

    number: int


class Yielded(Message, frozen=True):
    """To the root supervisor: this keeper ends, for another one takes its place and will listen in a moment."""


class AskState(Message, frozen=True):
    """How the keeper's own children fare → `State`."""


class State(Message, frozen=True):
    """`names` of what is held.  `standing`: how often the keeper has replaced the process under each order."""

    pid: int
    stand_in: bool
    root_restarts: int
    fork_server_pid: int
    fork_server_restarts: int
    names: list[str]
    standing: dict[str, int] = {}


class Yield(Message, frozen=True):
    """From a keeper that wants this one's place: `Kept`…, `KeptAll` and the end of this process, or `Refused`.

    `take_over`: also when this keeper was started by somebody.
    """

    take_over: bool


class Refused(Message, frozen=True):
    pid: int


TO_KEEPER = Codec(Hello, Keep, Drop, Stand, Dismiss, Noted, AskState, Yield, size_bytes_max=160 << 10)
FROM_KEEPER = Codec(Welcome, Kept, Stand, KeptAll, Replaced, State, Refused, Yielded, size_bytes_max=160 << 10)
