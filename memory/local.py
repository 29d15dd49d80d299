"""The token-local parts of a layer, forward and backward, for one range of rows.

Backward makes nothing again that was stored, and no matrix product whose value no gradient needs: projections, the sum
after attention, and gate and up are differentiated without being computed (adapter methods with `graph`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .heads import Heads

Rope = tuple[Tensor, Tensor]


class LayerSteps(Protocol):
    """What a family's adapter provides (training/families/adapter.py); all of it is token-local."""

    spec: Any
    rope_key: str | None

    def before_attention(self, x: Tensor, rope: Rope, heads: Heads = ..., *, graph: bool = ...) -> tuple[Tensor, ...]: ...
    def after_attention(self, x: Tensor, o: Tensor) -> Tensor: ...
    def residual(self, x: Tensor, o: Tensor, graph: bool = ...) -> Tensor: ...
    def mlp_in(self, x: Tensor, graph: bool = ...) -> tuple[Tensor, Tensor]: ...
    def mlp_out(self, x: Tensor, gate: Tensor, up: Tensor, graph: bool = ...) -> Tensor: ...


class GradientSums:
    """Gradients of a layer's parameters over all pieces: summed in float32 (float64 for float64), given back once."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self._totals: list[Tensor | None] = [None] * len(parameters)

    def grad(self, outputs: Tensor | Sequence[Tensor], inputs: Sequence[Tensor], upstream: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of `inputs`; those of the parameters are added to the sums."""
        found = torch.autograd.grad(outputs, [*inputs, *self.parameters], upstream, allow_unused=True)
        for index, part in enumerate(found[len(inputs) :]):
            if part is not None:
                self._totals[index] = _add_wide(self._totals[index], part)
        return found[: len(inputs)]

    def result(self) -> list[Tensor | None]:
        """In each parameter's dtype; None where nothing reached it."""
        return [None if total is None else total.to(p.dtype) for total, p in zip(self._totals, self.parameters, strict=True)]


def _add_wide(total: Tensor | None, part: Tensor) -> Tensor:
    # One part alone needs no more digits than it has.
    return part if total is None else total.to(torch.promote_types(part.dtype, torch.float32)).add_(part)


def after_backward(
    adapter: LayerSteps,
    rows: tuple[Tensor, Tensor],
    dy: Tensor,
    sums: GradientSums,
    *,
    residual: Tensor | None,
    mlp: tuple[Tensor, ...] | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the layer input x and of the attention output o through the second half; `rows` is (x, o).

    `residual` and `mlp` (gate, up) are what was stored of these rows. The result may share memory with dy.
    """
    x, o = rows
    with torch.no_grad():
        total = adapter.residual(x, o) if residual is None else residual
        gate, up = adapter.mlp_in(total) if mlp is None else mlp
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (total, gate, up)]
        del gate, up, mlp
        y = adapter.mlp_out(leaves[0], leaves[1], leaves[2], graph=True)
    d_total, *d_inner = sums.grad(y, leaves, dy)
    del y, leaves
    with torch.enable_grad():
        leaf = total.detach().requires_grad_()
        inner = adapter.mlp_in(leaf, graph=True)
    (through_mlp,) = sums.grad(inner, [leaf], d_inner)
    del inner, leaf, d_inner, total
    d_total = through_mlp.add_(d_total)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(), o.detach().requires_grad_()]
        total = adapter.residual(leaves[0], leaves[1], graph=True)
    dx, do = sums.grad(total, leaves, d_total)
    return dx, do


def before_backward(adapter: LayerSteps, x: Tensor, rope: Rope, heads: Heads, upstream: Sequence[Tensor], sums: GradientSums) -> Tensor:
    """Gradient of the layer input x through norm, projections and rotation of `heads`."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        projected = adapter.before_attention(leaf, rope, heads, graph=True)
    return sums.grad(projected, [leaf], upstream)[0]
