"""What planning processes of the tests are asked for: a cost model of four ranks, and requests for its plans."""

from __future__ import annotations

from efflaunch.parallel.sequence.cost import CostModel, DegreeCost
from efflaunch.parallel.sequence.service import PlanRequest


def cost_of_four(tokens_per_rank: int) -> CostModel:
    """Exchanges cost something on groups of several ranks."""
    degrees = tuple(DegreeCost(degree=d, ulysses=1, attention_s=1e-6 / d, linear_s=1e-4 / d, exchange_s=1e-5 * (d > 1)) for d in (1, 2, 4))
    return CostModel(world_size=4, tokens_per_rank=tokens_per_rank, degrees=degrees, beta_s=1e-3)


def request_for(cost: CostModel, solver: str = "adaptive") -> PlanRequest:
    """Compared with static groups of all ranks."""
    return PlanRequest(cost=cost, static_degree=4, static_ulysses=1, linear_cost_tokens=10.0, solver=solver)
