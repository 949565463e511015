"""Who is stopped and started again when one child has ended: pure, and OTP's."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum


class Strategy(Enum):
    """What the end of a child means for the others.

    `DYNAMIC` is OTP's simple_one_for_one for children that are not all alike: one that has ended for good is forgotten, and when
    the supervisor ends all are told at once, and not one after another.
    """

    ONE_FOR_ONE = "one_for_one"
    ONE_FOR_ALL = "one_for_all"
    REST_FOR_ONE = "rest_for_one"
    DYNAMIC = "dynamic"

    @property
    def grouped(self) -> bool:
        """Whether the end of a child is any of the others' business."""
        return self in (Strategy.ONE_FOR_ALL, Strategy.REST_FOR_ONE)


def affected(strategy: Strategy, order: Sequence[str], ended: str) -> Sequence[str]:
    """The children, in the order of their start, that are stopped (the last first) and started again, `ended` among them."""
    match strategy:
        case Strategy.ONE_FOR_ALL:
            return order
        case Strategy.REST_FOR_ONE:
            return order[order.index(ended) :]
        case _:
            return (ended,)
