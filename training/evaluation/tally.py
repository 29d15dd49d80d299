"""Adds up losses by how much context a target had: powers of two, and on either side of a border. Pure; numpy only, float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BUCKETS = 42
"""Contexts up to 2^41 tokens."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Sum of -log p and number of targets."""

    loss: float
    targets: int

    @property
    def mean(self) -> float | None:
        """The loss; None where nothing counted."""
        return self.loss / self.targets if self.targets else None


class Tally:
    """Sums over the targets of a pass; adding the tallies of all ranks as vectors gives that of the world."""

    def __init__(self, border: int | None = None) -> None:
        """`border`: targets with more context than that are also summed by themselves."""
        self.border = border
        self._loss, self._targets = np.zeros(BUCKETS + 1), np.zeros(BUCKETS + 1, dtype=np.int64)

    def add(self, log_probs: np.ndarray, positions: np.ndarray, counts: np.ndarray) -> None:
        """Add rows: log-probabilities (T,) float64, `positions` (T,) in their window, `counts` (T,) bool: which are targets.

        A target of position p has p + 1 tokens of context; bucket b takes those with 2^(b - 1) < context <= 2^b.
        """
        losses, context = -log_probs[counts], positions[counts] + 1
        buckets = np.searchsorted(1 << np.arange(BUCKETS, dtype=np.int64), context)
        self._loss[:BUCKETS] += np.bincount(buckets, losses, BUCKETS)
        self._targets[:BUCKETS] += np.bincount(buckets, minlength=BUCKETS)
        if self.border is not None:
            beyond = context > self.border
            self._loss[BUCKETS] += losses[beyond].sum()
            self._targets[BUCKETS] += int(np.count_nonzero(beyond))

    def vector(self) -> np.ndarray:
        """All sums, float64; counts are exact up to 2^53."""
        return np.concatenate([self._loss, self._targets.astype(np.float64)])

    def load(self, vector: np.ndarray) -> Tally:
        """Take over the sums of a vector; returns itself."""
        self._loss, self._targets = vector[: BUCKETS + 1].copy(), vector[BUCKETS + 1 :].astype(np.int64)
        return self

    @property
    def total(self) -> Sums:
        """Over all targets."""
        return Sums(float(self._loss[:BUCKETS].sum()), int(self._targets[:BUCKETS].sum()))

    @property
    def beyond(self) -> Sums:
        """Over those with more context than the border."""
        return Sums(float(self._loss[BUCKETS]), int(self._targets[BUCKETS]))

    def by_context(self) -> list[tuple[int, Sums]]:
        """(most tokens of context, sums) of each power of two that has targets."""
        there = np.flatnonzero(self._targets[:BUCKETS]).tolist()
        return [(1 << bucket, Sums(float(self._loss[bucket]), int(self._targets[bucket]))) for bucket in there]
