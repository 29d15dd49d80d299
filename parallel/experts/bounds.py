"""Lower bounds of a phase: no schedule of these costs is faster. Pure.

Two of them. The first holds for every schedule: what each resource has to do, with the contention it cannot avoid, and the longest way
through all layers of the smallest part a batch can be cut into. The second is tighter and holds where the batch stays whole: then a
layer begins when the one before it is over, and its experts' chunks are equal.

Note on contention. While both links work, each does 1 / (1 + e) of its work; A and E seconds of work therefore take at least
o + (A - o / (1 + e)) + (E - o / (1 + e')), with o the most they can overlap. An active link costs compute at least the share d of its
time, whatever it overlaps with, so compute takes C + d (A + E) or more, d being the least of e / (1 + e) a link.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .cost import Contention, LayerCost, Operator, OperatorCost, Resource, WeightGradients
from .plan import CHAIN, CHUNKED, Phase

MAX_DEGREE = 64
"""Chunks of the second bound; more would only add their alphas."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds of forward and backward together."""

    any_s: float
    """Of every schedule: LB."""
    whole_s: float
    """Of those that leave the batch whole and cut experts into equal chunks: LBc."""


def bounds(cost: LayerCost, contention: Contention, layers: int) -> Bounds:
    """Both bounds of `layers` equal layers."""
    phases = [_Phase(phase, cost, contention, layers) for phase in Phase]
    return Bounds(sum(max(one.resources_s(), one.path_s()) for one in phases), sum(max(one.resources_s(), one.whole_s()) for one in phases))


@dataclass(frozen=True, slots=True)
class _Phase:
    phase: Phase
    cost: LayerCost
    contention: Contention
    layers: int

    @property
    def rows(self) -> tuple[OperatorCost, ...]:
        """Operators with as little as can be before what follows them: weight gradients deferred."""
        return self.cost.forward if self.phase is Phase.FORWARD else self.cost.backward[WeightGradients.ALL]

    def resources_s(self) -> float:
        """What the busiest resource takes."""
        work = [self.layers * sum(row.seconds(1.0) for row in self.rows if row.resource is resource) for resource in Resource]
        gradient = self.cost.gradient if self.phase is Phase.BACKWARD else None
        if gradient is not None:
            work[gradient.resource] += gradient.seconds(self.layers * gradient.elements)
        compute, intra, inter = work
        extra = self.contention.extra[Resource.COMPUTE]
        both = sum(extra) / (1 + sum(extra)) / 2
        least = min(both, *(extra[link] / (1 + extra[link]) for link in (Resource.INTRA, Resource.INTER)))
        return max(compute + least * (intra + inter), links_s(intra, inter, self.contention))

    def path_s(self) -> float:
        """The way of the smallest part through all layers, its chunks as small as can be."""
        share = 1.0 / self.cost.max_parts
        return self._layers_s(share, self._mixture_s(share, 0.0))

    def whole_s(self) -> float:
        """Layer after layer, experts in the best number of equal chunks."""
        return self._layers_s(1.0, min(self._mixture_s(1.0, 1.0 / degree) for degree in range(1, MAX_DEGREE + 1)))

    def _layers_s(self, share: float, mixture_s: float) -> float:
        deferred = (Operator.EXPERT_WEIGHTS, Operator.ATTENTION_WEIGHTS)
        dense = {row.operator for row in self.rows} - CHUNKED - set(deferred)
        whole = self.layers * (mixture_s + sum(_slowest(self.rows, operator, share) for operator in dense))
        if self.phase is Phase.FORWARD or self.cost.gradient is None:
            return whole
        # Beside the last scatter the last layer's gradient is reduced, which may take longer.
        scatter, gradient = _slowest(self.rows, Operator.ATTENTION_SCATTER, share), self.cost.gradient
        return whole - scatter + max(scatter, gradient.seconds(gradient.elements))

    def _mixture_s(self, share: float, chunk: float) -> float:
        """Dispatch to combine of a share of the rows, in chunks of the part `chunk` of it; 0: of which alphas alone are paid, once.

        Each resource does all its chunks, after the first chunk has come to it and before the last has left.
        """
        times = 1 if chunk == 0 else round(1 / chunk)
        least, work = 0.0, [0.0, 0.0, 0.0]
        for resource in Resource:
            here = [index for index, operator in enumerate(CHAIN) if _has(self.rows, operator, resource)]
            rows = [row for row in self.rows if row.resource is resource and row.operator in CHAIN]
            work[resource] = sum(times * row.alpha_s + share * row.work_s for row in rows)
            if here:
                around = [*CHAIN[: here[0]], *CHAIN[here[-1] + 1 :]]
                least = max(least, work[resource] + sum(_slowest(self.rows, operator, share * chunk) for operator in around))
        return max(least, links_s(work[Resource.INTRA], work[Resource.INTER], self.contention))


def links_s(intra_s: float, inter_s: float, contention: Contention) -> float:
    """Least seconds for so much work on both kinds of links."""
    slower = 1 + contention.extra[Resource.INTRA][Resource.INTER], 1 + contention.extra[Resource.INTER][Resource.INTRA]
    if 1 / slower[0] + 1 / slower[1] <= 1:
        return intra_s + inter_s  # side by side is slower than one after the other
    together = min(slower[0] * intra_s, slower[1] * inter_s)
    return together + intra_s - together / slower[0] + inter_s - together / slower[1]


def _has(rows: Iterable[OperatorCost], operator: Operator, resource: Resource) -> bool:
    return any(row.operator is operator and row.resource is resource for row in rows)


def _slowest(rows: Iterable[OperatorCost], operator: Operator, share: float) -> float:
    """Seconds of an operator whose parts on both links run side by side."""
    return max((row.seconds(share) for row in rows if row.operator is operator), default=0.0)
