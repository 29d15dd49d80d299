"""Settings of reports: what is shown and where metrics go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from ...utils.ranges import STEPS, Range


class WandbMode(Enum):
    """Where W&B keeps its files; `online` is the only mode that opens a connection."""

    OFF = "off"
    OFFLINE = "offline"
    ONLINE = "online"


class Display(Enum):
    """How progress is shown; `auto` is a live table on a terminal and plain lines otherwise."""

    AUTO = "auto"
    LIVE = "live"
    PLAIN = "plain"
    QUIET = "quiet"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """metrics.jsonl is always written; these are what else is shown or written, on rank 0."""

    name: str
    every_steps: int = 1
    display: Display = Display.AUTO
    tensorboard: bool = False
    wandb: WandbMode = WandbMode.OFF
    wandb_project: str = "efflaunch"

    RANGES: ClassVar[Mapping[str, Range]] = {
        "every_steps": Range(1, STEPS),
    }
