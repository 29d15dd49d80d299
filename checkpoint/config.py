"""What survives a stop."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class OnSaveError(Enum):
    """What a failed save does to training; the previous checkpoint is intact either way."""

    CONTINUE = "continue"
    STOP = "stop"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When full training state is written, and how much of it is kept."""

    name: str
    every_steps: int | None = 100
    """None: only at the end and when told to stop."""
    keep_last: int = 2
    """Whole checkpoints kept; disk space for one more is needed while the next is written."""
    on_error: OnSaveError = OnSaveError.CONTINUE
