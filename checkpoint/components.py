"""Holds an engine's parts, which run without it, and names what goes wrong with them."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .commit import CommitOutcome, Committer
from .mirror import Mirror, MirrorReport
from .replica.replicas import Replicas
from .saver import Saver

SEEN_S = 10.0
"""Network file systems show a new directory to other nodes some seconds late."""


class Parts:
    """The parts that run for an engine, without a reference to it."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.saver: Saver | None = None
        self.committer: Committer | None = None
        self.mirror: Mirror | None = None
        self.replicas: Replicas | None = None

    def abandon(self) -> None:
        """Let threads and the flusher end when they have done what they were given; nobody waits for them."""
        for part in (self.committer, self.saver, self.mirror, self.replicas):
            if part is not None:
                part.abandon()

    def last_message_s(self) -> float:
        flusher = self.saver.flusher if self.saver is not None else None
        return flusher.last_message_s if flusher is not None else 0.0

    def end_flusher(self) -> None:
        if self.saver is not None and self.saver.flusher is not None:
            self.saver.flusher.kill()


def stopped(outcome: CommitOutcome | None, directory: Path) -> CheckpointError:
    assert outcome is not None, "a failure on one rank is a failure on all"
    return CheckpointError(
        f"checkpoint of step {outcome.attempt.step}",
        found=str(outcome.error),
        expected=f"to be written below {directory}; earlier checkpoints are intact",
        hint="make room there and resume, or train on without with checkpoint.on_error=continue",
    )


def not_mirrored(report: MirrorReport, address: str) -> CheckpointError:
    """The error that stops training where `checkpoint.mirror_on_error=stop`."""
    return CheckpointError(
        f"checkpoint of step {report.step} at {address}",
        found=str(report.error),
        expected="it there too, as checkpoint.mirror_on_error=stop asks; it is whole in the run directory",
        hint="mend the place and resume, or train on without with checkpoint.mirror_on_error=continue",
    )


def device_of(tensors: dict[str, Tensor]) -> torch.device:
    """The device that copies come from: the first that is not the host."""
    return next((value.device for value in tensors.values() if value.device.type != "cpu"), torch.device("cpu"))


def wait_until_seen(directory: Path) -> None:
    deadline = time.monotonic() + SEEN_S
    while not directory.is_dir():
        if time.monotonic() > deadline:
            raise FileNotFoundError(f"no directory {directory} on every node")
        time.sleep(0.1)
