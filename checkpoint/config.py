"""Settings of checkpoints: what survives a stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from ..errors import ConfigError
from ..units import Bytes, Seconds
from ..utils.names import check_path
from ..utils.ranges import BYTES, LONG_S, STEPS, WAIT_S, Range


class OnSaveError(Enum):
    """What a failed save does to training; the previous checkpoint is intact either way."""

    CONTINUE = "continue"
    STOP = "stop"


class OnBusy(Enum):
    """What a save does that comes while the one before is not yet durable."""

    WAIT = "wait"
    """It is taken as memory gets free: wait_for_snapshot() may wait for storage. Every save is kept."""
    SKIP = "skip"
    """It is not made; the log says so."""
    SUPERSEDE = "supersede"
    """The older one is given up, unless it is being committed already."""


class Interval(Enum):
    """How the step of the next save is found."""

    FIXED = "fixed"
    AUTO = "auto"
    """Interval from the measured stall, flush time and step time, and mean_time_to_failure_s; every_steps is the first guess."""


class Replica(Enum):
    """Whether snapshots are kept in the memory of hosts too."""

    NONE = "none"
    PEER = "peer"
    """Memory of another rank's host, on another node where there is one; used first when ranks are restarted there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Settings of checkpoints: when full training state is written, how, where, and how much of it is kept."""

    name: str
    every_steps: int | None = 100
    """Updates between saves; null: only at the end and at a stop signal."""
    interval: Interval = Interval.FIXED
    mean_time_to_failure_s: Seconds = 86400.0
    """Time between failures of the whole job; `interval=auto` weighs the cost of a save against it."""
    keep_last: int = 2
    """Whole checkpoints kept; disk space for one more is needed while the next is written."""
    keep_every: int | None = None
    """Steps that are multiples of it are kept for good, as pinned ones are."""
    delete_bytes_per_s: Bytes | None = None
    """Fastest that older checkpoints are deleted, in the background. None: at once; slower is kinder to a shared file system."""
    on_error: OnSaveError = OnSaveError.CONTINUE
    on_busy: OnBusy = OnBusy.WAIT
    pool_bytes: Bytes | None = None
    """Host memory of a rank for snapshots. None: the rank's whole state, or half of what is free where that is less."""
    max_slowdown: float = 0.02
    """Copying behind the step is spread out, then done at once instead, where it makes steps slower by more than this share."""
    commit_timeout_s: Seconds = 600.0
    """Longest silence of storage or of another rank before an attempt is given up."""
    mirror: str | None = None
    """A second place for committed checkpoints, of this run alone: a directory, or an fsspec address as s3://bucket/run."""
    mirror_on_error: OnSaveError = OnSaveError.CONTINUE
    """What training does where a checkpoint does not arrive there; `stop`: all ranks stop at the next save, or at the end."""
    mirror_keep_last: int = 2
    replica: Replica = Replica.NONE
    """`peer`: each snapshot also goes into memory that outlives the ranks: a restart resumes from there, even where storage was
    not done. Takes host memory: twice the state with one node, four times it with several."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "every_steps": Range(1, STEPS),
        "mean_time_to_failure_s": Range(1, LONG_S),
        "keep_last": Range(1, 1_000_000),
        "keep_every": Range(1, STEPS, example=1000),
        "delete_bytes_per_s": Range(1, BYTES),
        "pool_bytes": Range(1, BYTES),
        "max_slowdown": Range(0.0, 10.0),
        "commit_timeout_s": Range(0, WAIT_S, above=True),
        "mirror_keep_last": Range(1, 1_000_000),
    }


def check_checkpoint(config: CheckpointConfig) -> None:
    """Raise ConfigError for a second place that is none: where it is empty, libraries take the current directory."""
    if config.mirror is None:
        return
    check_path("checkpoint.mirror", config.mirror)
    scheme, separator, rest = config.mirror.partition("://")
    place = (rest if separator else config.mirror).strip().strip("/")
    # What is in the memory of a rank is lost with it.
    if place in ("", ".", "..") or (separator and scheme in ("", "memory")):
        raise ConfigError(
            "checkpoint.mirror",
            found=repr(config.mirror),
            expected="a folder of its own for this run, or null",
            hint="checkpoint.mirror=/archive/my-run, or checkpoint.mirror=s3://bucket/my-run",
        )
