"""The token-local parts of a layer, forward and backward, for one range of rows.

Backward makes nothing again that was stored, and no matrix product whose value no gradient needs: projections, the sum
after attention, and gate and up are differentiated without being computed (adapter methods with `graph`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..heads import ALL_HEADS, Heads

Rope = tuple[Tensor, Tensor]


class LayerSteps(Protocol):
    """What a family's adapter provides (model/families/adapter.py); all of it is token-local."""

    spec: Any
    rope_key: str | None

    def before_attention(self, x: Tensor, rope: Rope, heads: Heads = ..., *, graph: bool = ...) -> tuple[Tensor, ...]: ...
    def after_attention(self, x: Tensor, o: Tensor) -> Tensor: ...
    def residual(self, x: Tensor, o: Tensor, graph: bool = ...) -> Tensor: ...
    def mlp_in(self, x: Tensor, graph: bool = ...) -> tuple[Tensor, Tensor]: ...
    def mlp_out(self, x: Tensor, gate: Tensor, up: Tensor, graph: bool = ...) -> Tensor: ...
    def pull_back(
        self, step: Step, inputs: Sequence[Tensor], constants: Sequence[Tensor], upstream: Sequence[Tensor], sums: GradientSums
    ) -> tuple[Tensor, ...]:
        """Gradients of `inputs` through one step, given those of its results; the weights' go to `sums`.

        The step takes inputs, then constants. Nothing is computed but what some gradient needs. The result may be, or share memory
        with, what is in `upstream`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """One token-local step of a layer."""

    name: str
    """The method of LayerSteps."""
    heads: Heads = ALL_HEADS

    def run(self, steps: LayerSteps, tensors: Sequence[Tensor], *, graph: bool = False) -> tuple[Tensor, ...]:
        """Its results. before_attention takes x, cos and sin."""
        if self.name == "before_attention":
            x, cos, sin = tensors
            return steps.before_attention(x, (cos, sin), self.heads, graph=graph)
        more = {} if self.name == "after_attention" else {"graph": graph}
        found = getattr(steps, self.name)(*tensors, **more)
        return found if isinstance(found, tuple) else (found,)

    def __str__(self) -> str:
        which = "" if self.heads == ALL_HEADS else f" of {self.heads}"
        return f"{self.name}{which}"


def pull_back(
    steps: LayerSteps, step: Step, inputs: Sequence[Tensor], constants: Sequence[Tensor], upstream: Sequence[Tensor], sums: GradientSums
) -> tuple[Tensor, ...]:
    """`LayerSteps.pull_back` by autograd."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in inputs]
        results = step.run(steps, [*leaves, *constants], graph=True)
    return sums.grad(results, leaves, upstream)


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
                self.add(index, part)
        return found[: len(inputs)]

    def add(self, index: int, part: Tensor) -> None:
        """Part of the gradient of one of `parameters`; it may be added to in place."""
        self._totals[index] = _add_wide(self._totals[index], part)

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
    d_total, *d_inner = adapter.pull_back(Step("mlp_out"), (total, gate, up), (), (dy,), sums)
    del gate, up, mlp
    (through_mlp,) = adapter.pull_back(Step("mlp_in"), (total,), (), d_inner, sums)
    del d_inner, total
    d_total = through_mlp.add_(d_total)
    dx, do = adapter.pull_back(Step("residual"), (x, o), (), (d_total,), sums)
    return dx, do


def before_backward(adapter: LayerSteps, x: Tensor, rope: Rope, heads: Heads, upstream: Sequence[Tensor], sums: GradientSums) -> Tensor:
    """Gradient of the layer input x through norm, projections and rotation of `heads`."""
    return adapter.pull_back(Step("before_attention", heads), (x,), rope, upstream, sums)[0]
