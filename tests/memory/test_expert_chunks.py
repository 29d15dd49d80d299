"""Passes in chunks on real gloo ranks, against experts that are all here: a hot expert, ranks without tokens, experts nobody chose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from efflaunch.memory.executor.expert_chunks import BackwardInChunks, ForwardInChunks
from efflaunch.memory.executor.experts import Experts, Routing
from efflaunch.memory.executor.experts_graph import in_graph
from efflaunch.memory.executor.grouped import GroupedProjection
from efflaunch.parallel.expert_exchange import ExpertRanks
from efflaunch.parallel.experts.layer_order import LayerOrder, in_order
from efflaunch.parallel.topology import whole_world
from efflaunch.tests.memory.test_experts import activate
from efflaunch.tests.ranks import RankPool

EXPERTS, WIDTH, INNER = 8, 6, 3
ROUTINGS: dict[str, list[list[list[int]]]] = {
    "uneven": [[[0, 5], [7, 2], [2, 5], [1, 0]], [[3, 2]], [[6, 7], [5, 4]], [[2, 5], [5, 2], [0, 7]]],
    "everybody to one expert": [[[5, 0]] * 5, [[5, 1]] * 2, [[5, 0]] * 3, [[5, 7]]],
    "two ranks without tokens": [[], [[2, 3], [3, 0], [6, 2]], [], [[1, 2]] * 4],
    "nobody has tokens": [[], [], [], []],
}
"""Experts of the tokens of each rank."""
ORDERS = [(2, 1, False), (1, 4, True), (4, 2, True), (3, 2, False), (1, 1, True)]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def made(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def experts_of(part: slice, *, bias: bool) -> Experts:
    """Experts `part` of all."""
    up = GroupedProjection(*(t[part].clone().requires_grad_() for t in (made(1, EXPERTS, 2 * INNER, WIDTH), made(2, EXPERTS, 2 * INNER))))
    down = GroupedProjection(*(t[part].clone().requires_grad_() for t in (made(3, EXPERTS, WIDTH, INNER), made(4, EXPERTS, WIDTH))))
    if not bias:
        up, down = GroupedProjection(up.weight), GroupedProjection(down.weight)
    return Experts(up, down, activate)


def tokens_of(rank: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, weights, and the gradient of the output."""
    return made(10 + rank, count, WIDTH), made(20 + rank, count, 2), made(30 + rank, count, WIDTH)


def in_chunks(choices: list[list[list[int]]], orders: list[tuple[int, int, bool]], bias: bool) -> list[list[torch.Tensor]]:
    """On a rank: output, gradients of tokens and weights, and of this rank's experts, for each order; every way to have them agrees."""
    rank, size = dist.get_rank(), dist.get_world_size()
    h, weights, dy = tokens_of(rank, len(choices[rank]))
    chosen = torch.tensor(choices[rank], dtype=torch.int32).view(-1, 2)
    each, results = EXPERTS // size, []
    for forward, backward, defers in orders:
        order = LayerOrder(in_order(forward), in_order(backward, defers_weights=defers))
        experts = experts_of(slice(rank * each, (rank + 1) * each), bias=bias)
        routing = Routing.of(chosen, EXPERTS, ExpertRanks(whole_world(), size, order))
        first = ForwardInChunks(experts, h, routing, hold=True)
        first.run()
        y = first.output(weights)
        again = ForwardInChunks(experts, h, routing, first.gate_up)
        again.run()
        assert torch.equal(again.output(weights), y)
        found: list[list[Any]] = []
        for given in ({"h": h, "held": None, "gate_up": None}, {"h": None, "held": first.held, "gate_up": first.gate_up}):
            passed = BackwardInChunks(experts, weights, dy, routing, **given)
            passed.run()
            d_h, d_weights, parameters = passed.result()
            found.append([y, d_h, d_weights, *parameters])
        leaves = [h.clone().requires_grad_(), weights.clone().requires_grad_()]
        through = in_graph(experts, *leaves, routing)
        found.append([through.detach(), *torch.autograd.grad(through, [*leaves, *experts.weights], dy)])
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-13, atol=1e-13)
        results.append(found[0])
    return results


def all_here(choices: list[list[list[int]]], bias: bool) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
    """What each rank's tokens come to where all experts are here, and the sum over ranks of the experts' gradients."""
    experts, ranks, sums = experts_of(slice(None), bias=bias), [], None
    for rank, chosen in enumerate(choices):
        h, weights, dy = tokens_of(rank, len(chosen))
        routing = Routing.of(torch.tensor(chosen, dtype=torch.int32).view(-1, 2), EXPERTS)
        with torch.no_grad():
            gate_up = experts.gate_and_up(routing.at_experts(h), routing)
        d_h, d_weights, parts = experts.gradients(routing.hold(h), gate_up, weights, dy, routing)
        ranks.append([experts.output(gate_up, weights, routing), d_h, d_weights])
        own = [part for part in parts if part is not None]
        sums = own if sums is None else [a + b for a, b in zip(sums, own, strict=True)]
    assert sums is not None
    return ranks, sums


@pytest.mark.parametrize("bias", [False, True], ids=["no biases", "biases"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_chunks_come_to_what_experts_that_are_here_come_to(pool: RankPool, routing: str, bias: bool) -> None:
    choices = ROUTINGS[routing]
    expected, sums = all_here(choices, bias)
    for ranks in (2, 4):
        if ranks == 2:
            mine, total = all_here(choices[:2], bias)
        else:
            mine, total = expected, sums
        each = EXPERTS // ranks
        for rank, results in enumerate(pool.run(in_chunks, choices[:ranks], ORDERS, bias, ranks=ranks)):
            own = [part[rank * each : (rank + 1) * each] for part in total]
            for found in results:
                torch.testing.assert_close(found, [*mine[rank], *own], rtol=1e-12, atol=1e-12)
