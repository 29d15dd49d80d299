"""A small model sharded over two mesh axes at once: a tensor axis inside, FSDP2 around it."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


class Pair(nn.Module):
    """A product cut by rows and one cut by columns over a tensor axis, as tensor parallelism has them, and a vector that is not cut."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(12, 6, dtype=torch.float64, generator=generator))
        self.down = nn.Parameter(torch.randn(6, 12, dtype=torch.float64, generator=generator))
        self.bias = nn.Parameter(torch.randn(7, dtype=torch.float64, generator=generator))


AXES = {"up": Shard(0), "down": Shard(1), "bias": Replicate()}


def two_axes() -> Pair:
    """Over ranks 2 x 2: `AXES` on the tensor axis, then FSDP2 on the other. `up` has a strided shard."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    model = Pair()
    for name, parameter in list(model.named_parameters()):
        model.register_parameter(name, nn.Parameter(distribute_tensor(parameter.detach(), mesh["tensor"], [AXES[name]])))
    fully_shard(model, mesh=mesh["shard"])
    return model
