"""torch's AdamW over weights that are sharded, on the parts that each rank has."""

from __future__ import annotations

from typing import Any

import torch

from ...parallel.sharding.parts import memory_of
from .config import OptimConfig


class ShardedAdamW(torch.optim.AdamW):
    """torch's AdamW, whose arithmetic runs on each rank's own parts; states are sharded tensors, as the weights are.

    AdamW goes element by element, so the parts are the whole. Handed a list of sharded tensors, torch would first work out a layout
    for thousands of arguments at the first update (over a second) and look it up at every other.
    """

    @torch.no_grad()
    def _init_group(self, group: dict[str, Any], *lists: list[Any], **more: Any) -> Any:
        found = super()._init_group(group, *lists, **more)
        for tensors in lists:
            tensors[:] = [memory_of(tensor) for tensor in tensors]
        return found


def fused_adamw(groups: list[dict[str, Any]], config: OptimConfig, kind: type[torch.optim.AdamW] = ShardedAdamW) -> torch.optim.AdamW:
    """AdamW as configured, over groups of parameters."""
    return kind(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)
