"""Makes sure that all ranks take chunks of experts' rows in one order, before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

from ..errors import PlanError
from ..estimate.timing.expert_order import expert_order
from ..model.build import use_expert_order

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel

    from ..estimate.plan_inputs import PlanInputs
    from ..parallel.experts.layer_order import LayerOrder
    from ..parallel.topology import Topology


def take_planned_order(model: PreTrainedModel, inputs: PlanInputs, topology: Topology) -> None:
    """Have the layers of a model that was built take chunks in the plan's order. Collective where experts are spread over ranks."""
    if topology.shares_experts:
        use_expert_order(model, agreed_order(expert_order(inputs).order, topology.world))


def agreed_order(order: LayerOrder, world: ProcessGroup) -> LayerOrder:
    """The order, once every rank of `world` has the same. Collective; PlanError on all of them where one has another."""
    digests: list[str] = [""] * dist.get_world_size(world)
    dist.all_gather_object(digests, order.digest, group=world)
    if len(set(digests)) == 1:
        return order
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    raise PlanError(
        "order of experts",
        found=f"another one than rank 0's on rank{'s' * (len(others) > 1)} {', '.join(map(str, others))}",
        expected="the same on every rank, or their exchanges would not meet",
        hint="the same versions of efflaunch, numpy and numba on every node, or parallel.experts.degree=1",
    )
