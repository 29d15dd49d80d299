"""Makes the groups of ranks of a run and uses each once, before its memory is planned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..estimate.timing.sequence import group_degrees
from ..model.spec import model_spec
from ..parallel.layout import Layout
from ..parallel.topology import Topology, build_topology
from ..parallel.warm_up import warm_up

if TYPE_CHECKING:
    import torch

    from .run_settings import RunSettings


def make_groups(config: RunSettings, layout: Layout, device: torch.device, *, every_degree: bool = False) -> Topology:
    """Make the groups that plans of the layout can use, or those of every degree, warm. Collective over all ranks."""
    parallel = config.parallel
    degrees = None if every_degree else group_degrees(parallel, layout, num_heads=model_spec(config.model).num_heads)
    topology = build_topology(
        replicate=layout.replicate,
        device=device.type,
        stages=layout.stages,
        experts=parallel.experts.ep,
        timeout_s=parallel.collective_timeout_s,
        degrees=degrees,
    )
    warm_up(topology, device)
    return topology
