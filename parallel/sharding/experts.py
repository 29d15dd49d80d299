"""Spreads the experts of each layer over ranks: whole experts on each, FSDP2 over the ranks that have the same ones.

A weight (E, ...) of all experts lies in E / P of them on each of P ranks next to each other, and each of those parts on dim 1 over the
ranks beyond. FSDP2 gathers and reduces both kinds of weights of a layer in one pass, each on its own mesh (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ...errors import ConfigError


def spread_experts(experts: Sequence[nn.Module], mesh: DeviceMesh) -> Callable[[nn.Parameter], Any]:
    """Put this rank's experts in place of all; returns how `shard_model` is to place them. Weights are on the meta device still.

    `mesh` (replicate, expert_shard, expert). ConfigError where torch cannot do it.
    """
    meshes = _mesh_info(mesh)
    among = mesh["expert"]
    for module in experts:
        for name, parameter in list(module.named_parameters(recurse=False)):
            here = torch.empty((parameter.shape[0] // among.size(), *parameter.shape[1:]), dtype=parameter.dtype, device=parameter.device)
            part = DTensor.from_local(here, among, [Shard(0)], run_check=False)
            module.register_parameter(name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    return lambda parameter: meshes if isinstance(parameter, DTensor) else None


def _mesh_info(mesh: DeviceMesh) -> Any:
    """What FSDP2 calls the ranks that have the same experts, and the dim it cuts."""
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
    except ImportError as error:
        raise ConfigError(
            "parallel.experts.ep",
            found=f"torch {torch.__version__}, whose FSDP2 has one mesh for all weights of a layer",
            expected="torch 2.13",
            hint="parallel.experts.ep=1, or a newer torch",
        ) from error
    if mesh.size(0) == 1:
        return ShardPlacementResult(Shard(1), FSDPMeshInfo(mesh["expert_shard"], shard_mesh_dim=0))
    return ShardPlacementResult(Shard(1), HSDPMeshInfo(mesh["replicate", "expert_shard"], shard_mesh_dim=1, replicate_mesh_dim=0))
