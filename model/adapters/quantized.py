"""A frozen matrix that stays packed in NF4, and the product through it: wide for one product at a time (QLoRA, 2305.14314, sec. 3).

Note: what is kept and gathered. The parameter is the packed bytes (rows, `RowLayout.num_bytes`), one row for each of the matrix, so an
engine shards and gathers it by rows as it does any other, and what it moves is a quarter of bfloat16's. The wide matrix lives inside one
product, forward or backward: autograd keeps the bytes, not the matrix, under every memory policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...parallel.sharding.parts import memory_of, slices, write_shard
from .dora import TurnedNeeds, turned, turned_backward
from .lora import Factors, product
from .names import PACKED, is_packed, plain_name
from .nf4 import byte_levels, pack, unpack
from .nf4_layout import RowLayout


class PackedMatrix(NamedTuple):
    """A packed matrix (M, columns) as it is in this pass; `dtype`: that of its wide form."""

    packed: Tensor
    columns: int
    levels: Tensor
    dtype: torch.dtype

    def wide(self) -> Tensor:
        """The matrix itself, made anew."""
        return unpack(self.packed, self.columns, self.dtype, self.levels)


class QuantizedLinear(nn.Module):
    """Holds a frozen matrix (rows, columns) packed, and its bias; has no forward, projections read it."""

    levels: Tensor

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        """In place of `linear`, unset; `dtype`: the precision of computation."""
        super().__init__()
        rows, columns = linear.weight.shape
        self.columns, self.dtype = columns, dtype
        size = RowLayout(columns).num_bytes
        packed = torch.empty(rows, size, dtype=torch.uint8, device=linear.weight.device)
        self.register_parameter(PACKED, nn.Parameter(packed, requires_grad=False))
        self.register_parameter("bias", linear.bias)
        self.register_buffer("levels", byte_levels(linear.weight.device), persistent=False)

    def matrix(self) -> PackedMatrix:
        """The matrix, read anew: an engine puts other tensors in place."""
        return PackedMatrix(self._parameters[PACKED], self.columns, self.levels, self.dtype)  # type: ignore[arg-type]

    def shadow(self) -> nn.Linear:
        """A whole, unset torch Linear of the same shape in the precision of computation, for who initialises it."""
        packed: Any = self._parameters[PACKED]
        return nn.Linear(self.columns, packed.shape[0], self._parameters["bias"] is not None, device=packed.device, dtype=self.dtype)

    @torch.no_grad()
    def fill_from(self, linear: nn.Linear, into: Mapping[str, Tensor]) -> None:
        """Write this rank's part of a whole `linear` into the tensors of `into`: `packed`, and `bias` if there is one."""
        rows = slices(into[PACKED])[0]
        write_packed(into[PACKED], linear.weight[rows])
        if "bias" in into:
            write_shard(into["bias"], linear.bias.data)


def insert_quantized(layer: nn.Module, names: tuple[str, ...], dtype: torch.dtype) -> None:
    """Put a `QuantizedLinear` in place of each projection of a layer that `names` has; what is beside the matrix stays beside it."""
    there: dict[str, Any] = dict(layer.named_modules())
    for name in (name for name in names if name in there):
        owner, _, last = name.rpartition(".")
        linear = there[name]
        quantized = QuantizedLinear(linear, dtype)
        for child, module in linear.named_children():
            quantized.add_module(child, module)
        setattr(layer.get_submodule(owner), last, quantized)


@torch.no_grad()
def fill_levels(model: nn.Module) -> None:
    """Set what codes stand for in every packed matrix of a model whose tensors are new."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.levels.copy_(byte_levels())


def plain_shapes(named: Mapping[str, Tensor], model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor by name, those of packed matrices as in a model that is not quantised: name and shape of the weight."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in named.items():
        if is_packed(name):
            owner: Any = model.get_submodule(name.rpartition(".")[0])
            shapes[plain_name(name)] = (tensor.shape[0], owner.columns)
        else:
            shapes[name] = tuple(tensor.shape)
    return shapes


class PackedProduct(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T as `LoraProduct`, W (M, I) packed and unpacked anew in each pass; A and B may be None.

    With a magnitude (M,) what `DoraProduct` makes of it.

    Saves x, the bytes and the factors alone. `values` False: only gradients are wanted; forward takes no memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        levels: Tensor,
        form: tuple[int, torch.dtype, float],
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        magnitude: Tensor | None,
        values: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, packed, levels, a, b, magnitude)
        ctx.form = columns, dtype, scaling = form
        if not values:
            return x.new_zeros(()).expand(x.shape[0], packed.shape[0])
        wide = unpack(packed, columns, dtype, levels)
        if a is None or b is None:
            return F.linear(x, wide, bias)
        return (product if magnitude is None else turned)(x, wide, bias, Factors(a, b, scaling, magnitude))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, packed, levels, a, b, magnitude = ctx.saved_tensors
        needs_x, _, _, _, needs_bias, needs_a, needs_b, needs_magnitude, _ = ctx.needs_input_grad
        columns, dtype, scaling = ctx.form
        d_bias = dy.sum(0) if needs_bias else None
        if magnitude is not None:
            wide, needs = unpack(packed, columns, dtype, levels), TurnedNeeds(needs_x, False, needs_a, needs_b, needs_magnitude)
            got = turned_backward(x, wide, Factors(a, b, scaling, magnitude), dy, needs)
            return got.x, None, None, None, d_bias, got.a, got.b, got.magnitude, None
        inner = None if b is None else dy @ b
        d_x = dy @ unpack(packed, columns, dtype, levels) if needs_x else None
        if d_x is not None and inner is not None:
            d_x.addmm_(inner, a, alpha=scaling)
        d_a = (inner.T @ x).mul_(scaling) if needs_a and inner is not None else None
        d_b = (dy.T @ (x @ a.T)).mul_(scaling) if needs_b else None
        return d_x, None, None, None, d_bias, d_a, d_b, None, None


def packed_product(x: Tensor, matrix: PackedMatrix, bias: Tensor | None, factors: Factors | None, *, values: bool) -> Tensor:
    """The product of x (T, I) with a packed matrix and its adapter, if it has one: (T, M)."""
    a, b, scaling, magnitude = factors if factors is not None else (None, None, 0.0, None)
    form = (matrix.columns, matrix.dtype, scaling)
    return PackedProduct.apply(x, matrix.packed, matrix.levels, form, bias, a, b, magnitude, values)  # type: ignore[no-any-return]


@torch.no_grad()
def write_packed(target: Tensor, own: Tensor) -> None:
    """Pack this rank's own rows of a matrix into its part of `target`, which may be none of them."""
    if own.shape[0]:
        memory_of(target).copy_(pack(own))
