from __future__ import annotations
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any
class Restart(Enum):
    PERMANENT = "permanent"
    TRANSIENT = "transient"
    TEMPORARY = "temporary"
@dataclass(frozen=True)
class ChildSpec:
    id: str
    start: Callable[[], Any]
    restart: Restart = Restart.PERMANENT
    kind: str = "actor"
