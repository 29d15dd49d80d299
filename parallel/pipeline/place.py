"""Where this rank is in a pipeline: its decoder layers, and its partners on the other pipeline ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..topology import PipelineRanks

SENDS_UNDER_WAY = 2
"""Messages of one kind on their way to a neighbour, beyond which a rank waits for the oldest."""


@dataclass(frozen=True, slots=True)
class StagePart:
    """A run of decoder layers next to each other: a virtual stage."""

    layers: range
    """Numbered as in the whole model."""
    first: bool
    """Whether the embedding comes before it."""
    last: bool
    """Whether norm, head and objective come behind it."""


@dataclass(frozen=True, slots=True)
class StagePlace:
    """One pipeline rank of several, and the virtual stages it has: of R ranks, rank r has stages r, r + R, and so on."""

    layers: tuple[range, ...]
    """Decoder layers of each virtual stage of this rank."""
    index: int
    """Number of the pipeline rank, from 0."""
    ranks: PipelineRanks
    """This rank's partners, itself among them."""

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks there are."""
        return len(self.ranks.ranks)

    @property
    def num_stages(self) -> int:
        """Virtual stages of all ranks."""
        return self.num_ranks * len(self.layers)

    def part_of(self, stage: int) -> int:
        """Which of this rank's virtual stages has that number among all."""
        return stage // self.num_ranks

    @property
    def has_embedding(self) -> bool:
        """Whether the first stage is here."""
        return self.index == 0

    @property
    def has_head(self) -> bool:
        """Whether the last stage is here, with norm, head and objective."""
        return self.index == self.num_ranks - 1

    @property
    def parts(self) -> tuple[StagePart, ...]:
        """The virtual stages of this rank."""
        last = len(self.layers) - 1
        return tuple(
            StagePart(layers, self.has_embedding and number == 0, self.has_head and number == last)
            for number, layers in enumerate(self.layers)
        )
