"""One thing that was looked at, and the works that need it. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """How a thing was found."""

    OK = "ok"
    NOTE = "note"
    """Not there, or of an unusual kind: something optional does without it."""
    WARNING = "warning"
    """Works, and will be slow or surprise somebody."""
    BROKEN = "broken"
    """There, or asked for, and does not work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the examination."""

    topic: str
    """The heading it is shown under: `software`, `machine`, ..."""
    name: str
    """Unique among all findings."""
    state: State
    found: str
    hint: str = ""
    """What to install, set or ask for; empty where nothing has to be done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Something a user wants from this machine, and whether it can be done."""

    name: str
    """As one would say it, with its override: `train on GPUs (cluster.device=cuda)`."""
    missing: tuple[str, ...]
    """Reasons that it cannot; empty where it can."""

    @property
    def can_be_done(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing
