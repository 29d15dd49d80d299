"""Phases of a step, and terms: what takes memory and how many bytes in each phase. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Phase(Enum):
    """A moment of the step at which some term is at its largest."""

    FORWARD = "forward"
    """The last layer's."""
    LOSS = "loss"
    SEGMENT = "segment recompute"
    """Layers of a segment are recomputed for their inputs; only with segments of several layers."""
    BACKWARD_MLP = "backward mlp"
    """A layer from its output back to attention's."""
    BACKWARD_ATTENTION = "backward attention"
    BACKWARD_PROJECTIONS = "backward projections"
    """Backward from queries, keys and values to the layer's input."""
    LAYER_REDUCE = "layer reduction"
    """A layer's gradients are done and go over the ranks."""
    REDUCE = "reduce"
    """The end of backward: embedding and head."""
    OPTIMIZER = "optimizer"
    EVALUATION = "evaluation"
    """A layer's forward between two steps, where nothing waits for a backward: evaluation, and scoring."""
    EVALUATION_LOSS = "evaluation loss"

    # Members are alone of their kind. Enum's own hash is Python code, which a search for a policy would run millions of times.
    __hash__ = object.__hash__


@dataclass(frozen=True, slots=True)
class Term:
    """Something that takes memory: bytes in each phase it exists in."""

    name: str
    note: str
    by_phase: dict[Phase, int]

    @property
    def num_bytes(self) -> int:
        """The most it ever takes."""
        return max(self.by_phase.values(), default=0)


BACKWARD = (Phase.SEGMENT, Phase.BACKWARD_MLP, Phase.BACKWARD_ATTENTION, Phase.BACKWARD_PROJECTIONS, Phase.LAYER_REDUCE)


KEEPING = (Phase.FORWARD, Phase.LOSS, *BACKWARD)
"""Phases in which activations wait for their backward."""


FORWARD_ALONE = (Phase.EVALUATION, Phase.EVALUATION_LOSS)
"""Phases between two steps, without gradients."""


ALL = tuple(Phase)


COMPUTE = (*KEEPING, Phase.REDUCE, *FORWARD_ALONE)


def term(name: str, note: str, num_bytes: float, phases: tuple[Phase, ...] = ALL) -> Term:
    """A term with the same number of bytes in each of `phases`."""
    return Term(name, note, {phase: int(num_bytes) for phase in phases})
