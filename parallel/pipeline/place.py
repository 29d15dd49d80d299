"""Where this rank is in a pipeline: its decoder layers, and its partners in the other stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..topology import PipelineRanks

SENDS_UNDER_WAY = 2
"""Messages of one kind on their way to a neighbour, beyond which a rank waits for the oldest."""


@dataclass(frozen=True, slots=True)
class StagePlace:
    """One stage of several, and one of its ranks."""

    layers: range
    """Decoder layers of the stage, numbered as in the whole model."""
    index: int
    """Number of the stage, from 0."""
    ranks: PipelineRanks
    """This rank's partners, itself among them."""

    @property
    def num_stages(self) -> int:
        """Stages there are."""
        return len(self.ranks.ranks)

    @property
    def is_first(self) -> bool:
        """Whether the embedding is here."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether norm, head and objective are here."""
        return self.index == self.num_stages - 1
