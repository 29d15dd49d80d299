"""DoRA's product: each row of a matrix has a magnitude, beside the direction that factors change (Liu et al., 2402.09353, sec. 4).

Note: what is computed. With V = W + s B A and c = m / |V|, one number for each row: y = (x V^T) c + b. Norms of rows are no part of the
gradient (sec. 4.3), as in peft. Neither V nor a matrix of its size is made: |V|^2 = |W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B> row by
row. They are made anew for every product, forward and backward: weights are gathered for a layer's pass only, and no rank holds them
between passes. The magnitude's gradient needs x V^T, which backward makes again: one product more than LoRA.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .lora import Factors, product


def row_norms(weight: Tensor, factors: Factors | None = None) -> Tensor:
    """The norm of each row of W (M, I), or of W + s B A: (M,), in float32 at least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
    if factors is not None:
        a, b, scaling = factors.a.to(wide), factors.b.to(wide), factors.scaling
        squares.add_(((weight @ factors.a.T).to(wide) * b).sum(1), alpha=2 * scaling)
        squares.add_(((b @ (a @ a.T)) * b).sum(1), alpha=scaling * scaling)
    # What rounding leaves of a row that is nothing may be less than that.
    return squares.clamp_min_(0).sqrt_()


class _Lengths(NamedTuple):
    """Of each row (M,): its norm, and the c of the note; float32 at least."""

    norms: Tensor
    of_rows: Tensor


def _lengths(magnitude: Tensor, norms: Tensor) -> _Lengths:
    """Norms are rounded as a magnitude that is gathered in bfloat16 was: at the start both are one number, and c is 1."""
    rounded = norms.to(magnitude.dtype).to(norms.dtype)
    return _Lengths(rounded, magnitude / rounded)


def turned(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> Tensor:
    """The values (x V^T) c + b of factors with a magnitude: (T, I) -> (T, M), nothing saved."""
    assert factors.magnitude is not None
    out = product(x, weight, None, factors).mul_(_lengths(factors.magnitude, row_norms(weight, factors)).of_rows)
    return out if bias is None else out.add_(bias)


class TurnedNeeds(NamedTuple):
    """Which gradients through `turned` are asked for."""

    x: bool
    weight: bool
    a: bool
    b: bool
    magnitude: bool


class TurnedGradients(NamedTuple):
    """Gradients through `turned`; None where none was asked for."""

    x: Tensor | None
    weight: Tensor | None
    a: Tensor | None
    b: Tensor | None
    magnitude: Tensor | None


def turned_backward(x: Tensor, weight: Tensor, factors: Factors, dy: Tensor, needs: TurnedNeeds) -> TurnedGradients:
    """Gradients through `turned` for that of its values dy (T, M)."""
    a, b, scaling, magnitude = factors
    assert magnitude is not None
    lengths, d_magnitude = _lengths(magnitude, row_norms(weight, factors)), None
    if needs.magnitude:
        sums = product(x, weight, None, factors).mul_(dy).sum(0, dtype=lengths.norms.dtype)
        d_magnitude = (sums / lengths.norms).to(magnitude.dtype)
    # Rounded once, as the product's values are; no wide copy of dy is kept.
    scaled = torch.mul(dy, lengths.of_rows, out=torch.empty_like(dy))
    inner = scaled @ b
    return TurnedGradients(
        x=(scaled @ weight).addmm_(inner, a, alpha=scaling) if needs.x else None,
        weight=scaled.T @ x if needs.weight else None,
        a=(inner.T @ x).mul_(scaling) if needs.a else None,
        b=(scaled.T @ (x @ a.T)).mul_(scaling) if needs.b else None,
        magnitude=d_magnitude,
    )


class DoraProduct(torch.autograd.Function):
    """(x V^T) c + b for x (T, I), W (M, I), b (M,) or None, A (r, I), B (M, r), magnitude (M,). Saves x and the weights alone.

    `values` False: only gradients are wanted; forward returns no values and takes no memory.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, magnitude: Tensor, scaling: float, values: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b, magnitude)
        ctx.scaling = scaling
        if not values:
            return x.new_zeros(()).expand(x.shape[0], weight.shape[0])
        return turned(x, weight, bias, Factors(a, b, scaling, magnitude))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, magnitude = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_magnitude, *_ = ctx.needs_input_grad
        needs = TurnedNeeds(needs_x, needs_weight, needs_a, needs_b, needs_magnitude)
        got = turned_backward(x, weight, Factors(a, b, ctx.scaling, magnitude), dy, needs)
        return got.x, got.weight, dy.sum(0) if needs_bias else None, got.a, got.b, got.magnitude, None, None
