"""The token-local parts of a layer, forward and backward, for one range of rows.

Backward recomputes nothing that was stored, and no matrix product whose value no gradient needs: projections, the sum
after attention, and gate and up are differentiated without being computed (adapter methods with `graph`).

Note: mirrored in estimate/footprint/live_layer.py (before_row, before_backward_row) and estimate/timing/flops.py (which products
are recomputed). A change here is a change there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...parallel.experts.layer_order import LayerOrder
from ..activation_classes import ActivationClass
from ..heads import ALL_HEADS, Heads
from .weight_products import LayerProducts

Rope = tuple[Tensor, Tensor]


class LayerSteps(Protocol):
    """What a family's adapter provides (model/families/adapter.py); all of it is token-local."""

    spec: Any
    rope_key: str | None
    traceable: bool
    """Whether one graph of tensors holds the whole second half; its steps have one each in any case."""
    products: LayerProducts | None
    """Where operands of the matrices' gradients wait for a pass of their own; None: backward makes them. Set for each pass anew."""
    adapted: bool
    """Whether products go through the adapters that matrices have beside them; may change between passes, never within one."""

    def trained(self) -> list[Tensor]:
        """The trained weights of the layer that this rank computes with, as autograd sees them; asked for at the start of each pass."""
        ...

    @property
    def sinks(self) -> Tensor | None:
        """The parameter (H,) with a logit of each query head that joins attention's softmax, as it is now; None without."""
        ...

    def before_attention(self, x: Tensor, rope: Rope, heads: Heads = ..., *, graph: bool = ...) -> tuple[Tensor, ...]: ...
    def after_attention(self, x: Tensor, o: Tensor) -> Tensor: ...
    def residual(self, x: Tensor, o: Tensor, graph: bool = ...) -> Tensor: ...
    def use_expert_order(self, order: LayerOrder) -> None:
        """Take chunks of rows to experts in this order, where they travel."""
        ...

    def feed_forward(self, steps: LayerSteps) -> FeedForward:
        """What follows the sum after attention; its token-local steps are run by `steps`: these, or a compiled stand-in."""
        ...

    def run_step(self, step: Step, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The results of one step; builds autograd's graph where gradients are enabled."""
        ...

    def pull_back(
        self, step: Step, inputs: Sequence[Tensor], constants: Sequence[Tensor], upstream: Sequence[Tensor], sums: GradientSums
    ) -> tuple[Tensor, ...]:
        """Gradients of `inputs` through one step, given those of its results; the weights' go to `sums`.

        The step takes inputs, then constants. Nothing is computed but what some gradient needs. The result may be, or share memory
        with, what is in `upstream`.
        """
        ...


class SavedPiece(Protocol):
    """What a layer leaves of one piece of rows, as a feed-forward sees it."""

    def get(self, kind: ActivationClass) -> tuple[Tensor, ...] | None:
        """The tensors of a class as they were put; None where the policy has them recomputed."""
        ...

    def put(self, kind: ActivationClass, tensors: Sequence[Tensor]) -> None:
        """Leave the tensors of a class for backward, where the policy has it; in a pass that leaves nothing, nothing is done."""
        ...


class FeedForward(Protocol):
    """The part of a layer between the sum after attention and the layer's output, for one piece of rows at a time.

    Note: three passes. `forward` runs for the output, again for the output where a segment's inner inputs are recomputed, and
    `backward` recomputes what it needs. All must compute the same function: whatever was decided (which expert takes a token) is
    a class with `decision` set, put in the first pass and got in the others. Decided again it may come out otherwise: ties and
    roundings differ with the shape of a product, and gradients would be those of another function.
    """

    @property
    def classes(self) -> tuple[ActivationClass, ...]:
        """What `forward` puts and `backward` gets, in this order: how read_order.py knows what to fetch."""
        ...

    def forward(self, rows: Tensor, saved: SavedPiece) -> Tensor:
        """The sum after attention (T, M) -> the layer's output (T, M). What was put before is used as it is."""
        ...

    def backward(self, rows: Tensor, dy: Tensor, saved: SavedPiece, sums: GradientSums) -> Tensor:
        """Gradient of `rows` (T, M), given that of the output; the weights' go to `sums`. It may share memory with dy."""
        ...


class NothingSaved:
    """A `SavedPiece` of a pass without a policy: autograd's own graph keeps everything."""

    def get(self, kind: ActivationClass) -> tuple[Tensor, ...] | None:
        """None of anything."""
        return None

    def put(self, kind: ActivationClass, tensors: Sequence[Tensor]) -> None:
        """Leave it to the graph."""


@dataclass(frozen=True, slots=True)
class Step:
    """One token-local step of a layer."""

    name: str
    """The method of the adapter."""
    heads: Heads = ALL_HEADS

    def run(self, steps: LayerSteps, tensors: Sequence[Tensor], *, graph: bool = False) -> tuple[Tensor, ...]:
        """Its results. before_attention takes x, cos and sin."""
        if self.name == "before_attention":
            x, cos, sin = tensors
            return steps.before_attention(x, (cos, sin), self.heads, graph=graph)
        more = {} if self.name == "after_attention" else {"graph": graph}
        results = getattr(steps, self.name)(*tensors, **more)
        return results if isinstance(results, tuple) else (results,)

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
        gradients = torch.autograd.grad(outputs, [*inputs, *self.parameters], upstream, allow_unused=True)
        for index, part in enumerate(gradients[len(inputs) :]):
            if part is not None:
                self.add(index, part)
        return gradients[: len(inputs)]

    def index_of(self, parameter: Tensor) -> int | None:
        """Index of one of `parameters`, by its memory: it may be another view of that. None for one that is not trained."""
        place = parameter.untyped_storage()._cdata, parameter.storage_offset()
        places = ((own.untyped_storage()._cdata, own.storage_offset()) for own in self.parameters)
        return next((index for index, own in enumerate(places) if own == place), None)

    def add(self, index: int, part: Tensor) -> None:
        """Part of the gradient of one of `parameters`; it may be added to in place."""
        self._totals[index] = _add_wide(self._totals[index], part)

    def add_of(self, parameter: Tensor, part: Tensor) -> None:
        """Part of the gradient of one of the parameters, as `add`. ValueError where it is none of them."""
        self.add([id(p) for p in self.parameters].index(id(parameter)), part)

    def result(self) -> list[Tensor | None]:
        """The sums in each parameter's dtype; None where nothing reached it."""
        return [None if total is None else total.to(p.dtype) for total, p in zip(self._totals, self.parameters, strict=True)]


def _add_wide(total: Tensor | None, part: Tensor) -> Tensor:
    # One part alone needs no more digits than it has.
    return part if total is None else total.to(torch.promote_types(part.dtype, torch.float32)).add_(part)


def before_backward(adapter: LayerSteps, x: Tensor, rope: Rope, heads: Heads, upstream: Sequence[Tensor], sums: GradientSums) -> Tensor:
    """Gradient of the layer input x through norm, projections and rotation of `heads`."""
    return adapter.pull_back(Step("before_attention", heads), (x,), rope, upstream, sums)[0]
