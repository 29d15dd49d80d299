"""LoRA's factors as modules beside the matrices they adapt, and the product through both (Hu et al., 2106.09685, sec. 4.1).

Note: what is computed. y = x W^T + b + scaling (x A^T) B^T, in this order: x A^T has `rank` numbers a row, so W is never added to and
no matrix of its size is made. x A^T is no class of activations: it is made again in backward, for columns / (rows + columns) of
what the adapter's forward costs, so that no policy keeps it and none has to decide where it waits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .config import AdapterConfig
from .names import FACTORS, MAGNITUDE, is_trained, target_names


class Factors(NamedTuple):
    """Both factors as they are in this pass: a (rank, I), b (M, rank), and what their product is scaled by."""

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None
    """A length for each row of the matrix (M,), where it is trained apart from the direction (dora.py)."""


class LoraFactors(nn.Module):
    """Holds the factors A (rank, I) and B (M, rank) of one matrix, with adapter.dora its magnitude (M,); has no forward, is read."""

    def __init__(self, rows: int, columns: int, config: AdapterConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.scaling = config.scaling
        self.A = nn.Parameter(torch.empty(config.rank, columns, dtype=dtype))
        self.B = nn.Parameter(torch.empty(rows, config.rank, dtype=dtype))
        self.register_parameter(MAGNITUDE, nn.Parameter(torch.empty(rows, dtype=dtype)) if config.dora else None)

    def factors(self) -> Factors:
        """The factors, read anew: an engine puts other tensors in place."""
        return Factors(self.A, self.B, self.scaling, self._parameters[MAGNITUDE])

    @torch.no_grad()
    def initialise(self) -> None:
        """Fill A with uniform numbers of variance 1 / (3 I), as a Linear is by default, and B with zeros: the model starts as it was.

        A magnitude is ones until the matrix beside it is there (`dora.initialise_magnitudes`).
        """
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)
        magnitude = self._parameters[MAGNITUDE]
        if magnitude is not None:
            nn.init.ones_(magnitude)


def insert_adapters(model: nn.Module, config: AdapterConfig, compute_dtype: torch.dtype) -> None:
    """Give the matrices that `config` names their factors, in the model's own precision, and freeze all else but modules_to_save.

    Frozen weights get the precision of computation. The model may be on the meta device.
    """
    layers: Any = model.model.layers  # type: ignore[union-attr]
    dtype = next(model.parameters()).dtype
    for layer in layers:
        there = dict(layer.named_modules())
        for linear in (there[name] for name in target_names(config) if name in there):
            rows, columns = linear.weight.shape
            with torch.device(linear.weight.device):
                linear.add_module(FACTORS, LoraFactors(rows, columns, config, dtype))
    for name, parameter in model.named_parameters():
        if not is_trained(name, config):
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(compute_dtype)


class LoraProduct(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T for x (T, I), W (M, I), b (M,) or None, A (r, I), B (M, r). Saves x and the weights alone.

    `values` False: only gradients are wanted; forward returns no values and takes no memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, values: bool) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scaling = scaling
        if not values:
            return x.new_zeros(()).expand(x.shape[0], weight.shape[0])
        return product(x, weight, bias, Factors(a, b, scaling))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_a, needs_b, *_ = ctx.needs_input_grad
        inner = dy @ b
        d_x = (dy @ weight).addmm_(inner, a, alpha=ctx.scaling) if needs_x else None
        d_a = (inner.T @ x).mul_(ctx.scaling) if needs_a else None
        d_b = (dy.T @ (x @ a.T)).mul_(ctx.scaling) if needs_b else None
        return d_x, dy.T @ x if needs_weight else None, dy.sum(0) if needs_bias else None, d_a, d_b, None, None


def product(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> Tensor:
    """The values of `LoraProduct`: (T, I) -> (T, M), nothing saved."""
    return F.linear(x, weight, bias).addmm_(x @ factors.a.T, factors.b.T, alpha=factors.scaling)
