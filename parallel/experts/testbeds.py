"""The two clusters of FSMoE's paper (arXiv 2501.10714) and its sweep of layers, in one system of units. Pure.

The paper prints alpha and beta of every operator in Fig. 5 and milliseconds of whole layers in Table 2. Fig. 5 mixes units: links of
testbed B fit Table 2 as seconds a byte, those of testbed A as seconds a float32 element, the all-gather of A is ten times too large and
products about three times too small. The figures here are alphas of Fig. 5, with betas that fit Table 2, as seconds a byte.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from .cost import AlphaBeta, Collective, ExpertLayer, Groups, LayerCost, ProcessGroup, Rates, Resource, layer_cost

DROPLESS = 1.6
"""Rows of the busiest expert over the mean, assumed where the paper's sweep has no capacity factor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Testbed:
    """A cluster and the layout FSMoE gives it: one expert a node, its shards and attention's heads over the node's ranks."""

    nodes: int
    ranks_per_node: int
    rates: Rates
    tokens: tuple[int, int, int]
    """Lengths of the sweep."""

    __test__ = False  # its name looks like a test's

    @property
    def groups(self) -> Groups:
        """Experts and dense gradients between nodes, shards and attention inside them."""
        inside, between = ProcessGroup(self.ranks_per_node, self.ranks_per_node), ProcessGroup(self.nodes, 1)
        return Groups(experts=between, shards=inside, attention=inside, gradients=between)

    def cost(self, layer: ExpertLayer) -> LayerCost:
        """Price a layer on this testbed."""
        return layer_cost(layer, self.groups, self.rates)

    def sweep(self) -> Iterator[ExpertLayer]:
        """The paper's 1,458 layers; top 2, float32."""
        axes = ((1, 2, 4), (8, 16, 32), self.tokens, (1024, 2048, 4096), (2, 3, 4), (1.2, 2.4, DROPLESS), (2, 3))
        for batch, heads, tokens, hidden, ratio, capacity, products in itertools.product(*axes):
            yield ExpertLayer(
                batch=batch, heads=heads, tokens=tokens, hidden=hidden, ffn=hidden * ratio, capacity=capacity, products=products
            )


def _links(
    all_to_all: tuple[float, float], all_gather: tuple[float, float], reduce_scatter: tuple[float, float], all_reduce: tuple[float, float]
) -> dict[tuple[Collective, Resource], AlphaBeta]:
    """From milliseconds, and milliseconds a float32 element."""
    kinds = (
        (Collective.ALL_TO_ALL, Resource.INTER, all_to_all),
        (Collective.ALL_GATHER, Resource.INTRA, all_gather),
        (Collective.REDUCE_SCATTER, Resource.INTRA, reduce_scatter),
        (Collective.ALL_REDUCE, Resource.INTER, all_reduce),
    )
    return {(kind, links): AlphaBeta(alpha * 1e-3, beta * 1e-3 / 4) for kind, links, (alpha, beta) in kinds}


SOURCE = "FSMoE, arXiv 2501.10714: alphas of Fig. 5, betas fitted to Table 2"
A = Testbed(
    nodes=6,
    ranks_per_node=8,
    tokens=(512, 1024, 2048),
    rates=Rates(
        name="testbed A: 6 x 8 A6000, NVLink, 200 Gb/s InfiniBand",
        collectives=_links((0.287, 1.84e-6), (0.337, 2.32e-7), (0.395, 2.34e-7), (0.511, 4.95e-6)),
        product=AlphaBeta(0.40e-3, 6.4e-14),
        attention=AlphaBeta(0.43e-3, 1.21e-13),
        score_s=3.3e-11,
        gate_s=0.4e-3,
        inverse_order_s=0.25e-3,
        source=SOURCE,
    ),
)
B = Testbed(
    nodes=8,
    ranks_per_node=4,
    tokens=(256, 512, 1024),
    rates=Rates(
        name="testbed B: 8 x 4 RTX 2080 Ti, PCIe 3, 100 Gb/s InfiniBand",
        collectives=_links((0.175, 1.30e-6), (0.032, 6.72e-7), (0.0391, 6.8e-7), (0.0837, 3.0e-6)),
        product=AlphaBeta(0.0924e-3, 1.33e-13),
        attention=AlphaBeta(1.9e-3, 1.26e-13),
        score_s=3.3e-11,
        gate_s=0.4e-3,
        inverse_order_s=0.25e-3,
        source=SOURCE,
    ),
)
TESTBEDS = {"A": A, "B": B}
