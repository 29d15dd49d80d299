"""A small model with every kind of parameter, plain or sharded as the trunk shards: per layer, then the rest."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Layer(nn.Module):
    """Odd sizes: shards of unequal and of no rows. A buffer that is saved and one that is not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.gate = nn.Parameter(torch.full((2,), 0.5))
        self.down = nn.Linear(3 * width, width, bias=False)
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("table", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x)))) * self.gate.sum()


class Small(nn.Module):
    def __init__(self, width: int = 7, *, num_layers: int = 2, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def plain_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small().to(dtype)


def shard(model: Small, replicate: int = 1) -> Small:
    """FSDP2 over all ranks, or HSDP: replicate x shard."""
    ranks = dist.get_world_size()
    shape, names = ((ranks,), ("shard",)) if replicate == 1 else ((replicate, ranks // replicate), ("replicate", "shard"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def backward(model: Small, step: int = 0, scale: float = 1.0) -> None:
    """The same gradient on every rank and on a plain model: FSDP2 averages over equal batches."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 11, (5, 6), generator=generator)
    targets = torch.randint(0, 11, (5 * 6,), generator=generator)
    (scale * nn.functional.cross_entropy(model(ids).flatten(0, 1), targets)).backward()


def full(value: Tensor) -> Tensor:
    """The whole tensor behind a sharded one; collective."""
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.detach().clone()
