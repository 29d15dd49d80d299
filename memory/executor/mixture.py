"""The feed-forward of a layer that is a mixture of experts: routed once, experts after experts, and a shared expert beside them.

Note: the routing is decided in the first pass and kept (the class `ROUTING`). Logits are computed again in backward, for their
gradient, and may round otherwise; what follows from them by a comparison must not.

Note: mirrored in estimate/footprint/live_mixture.py (bytes while it runs) and in the table of ../activation_classes.py (`MIXTURE`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..activation_classes import EXPERT_GATE_UP, MIXTURE, ROUTING
from .capacity import Capacity
from .expert_chunks import BackwardInChunks, ForwardInChunks
from .experts import ExpertRanks, Experts, Routing
from .experts_graph import in_graph
from .grouped import count_each
from .router_losses import RouterLosses, with_losses
from .token_local import GradientSums, LayerSteps, SavedPiece, Step

ROUTE, SHARED_IN, SHARED_OUT = Step("route"), Step("shared_in"), Step("shared_out")
"""(T, M) -> normed rows (T, M) and router logits (T, E); normed rows -> shared gate and up (T, S) each; they -> (T, M), behind normed
rows where those scale the result."""


class RoutedLayer(Protocol):
    """What a mixture asks of a family's adapter beside its steps."""

    num_experts: int
    has_shared: bool
    """Whether `shared_in` and `shared_out` exist."""
    scales_shared: bool
    """Whether `shared_out` reads normed rows before gate and up."""
    expert_ranks: ExpertRanks | None
    """Ranks that share the experts; None: all of them are here."""
    expert_load: ExpertLoad
    router_losses: RouterLosses
    capacity: Capacity | None
    """Most rows of an expert; None: nothing is dropped."""
    index: int
    """Number of the layer."""

    def choose(self, logits: Tensor) -> Tensor:
        """Experts of each token (T, K), from the router's logits (T, E)."""
        ...

    def weigh(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """Weights of the chosen experts (T, K); a differentiable function of the logits."""
        ...

    def experts(self) -> Experts:
        """The experts with their weights as they are now."""
        ...


class ExpertLoad:
    """Counts the rows that this rank's tokens want sent to each expert of each layer, and those dropped, each decision once."""

    def __init__(self) -> None:
        self._counts: dict[int, Tensor] = {}

    def add(self, layer: int, chosen: Tensor, num_experts: int, kept: Tensor | None = None) -> None:
        """Count what tokens chose (T, K); `kept` is below 0 where a row is dropped."""
        counts = count_each(chosen.flatten().long(), num_experts + 1)
        if kept is not None:
            counts[num_experts] = (kept < 0).sum()
        self._counts[layer] = self._counts[layer] + counts if layer in self._counts else counts

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that are counted: the rows of `peek`."""
        return tuple(sorted(self._counts))

    def peek(self) -> Tensor | None:
        """Rows by layer and expert, and behind them those dropped (L, E + 1), since the last `take`; None where no layer has experts."""
        counts = [self._counts[layer] for layer in self.layers]
        return torch.stack(counts) if counts else None

    def clear(self) -> None:
        """Start anew."""
        self._counts.clear()


class MixtureFeedForward:
    """A `FeedForward` of routed experts, and of a shared one where the family has it."""

    classes = MIXTURE.classes

    def __init__(self, steps: LayerSteps, layer: RoutedLayer) -> None:
        """`steps` run as they are or compiled; `layer` decides, weighs and has the experts."""
        self._steps, self._layer = steps, layer

    def forward(self, rows: Tensor, saved: SavedPiece) -> Tensor:
        """Implements `FeedForward.forward`."""
        h, logits = self._steps.run_step(ROUTE, (rows,))
        if torch.is_grad_enabled():
            logits = with_losses(logits, self._layer.router_losses, self._layer.index)
        routing = self._routing(logits, saved)
        weights = self._layer.weigh(logits, routing.wanted)
        if torch.is_grad_enabled():
            return rows + in_graph(self._layer.experts(), h, weights, routing) + self._shared(h)
        experts = self._layer.experts()
        if routing.order is not None:
            return self._forward_in_chunks(rows, h, weights, routing, saved)
        gate_up, *shared = self._inner(h, experts, routing, saved)[1]
        saved.put(EXPERT_GATE_UP, (gate_up, *shared))
        y = rows + experts.output(gate_up, weights, routing)
        return y.add_(self._shared_out(h, shared)) if shared else y

    def _forward_in_chunks(self, rows: Tensor, h: Tensor, weights: Tensor, routing: Routing, saved: SavedPiece) -> Tensor:
        """`forward` without a graph where rows travel in chunks; the shared expert is computed while the last ones do."""
        stored = saved.get(EXPERT_GATE_UP)
        passed = ForwardInChunks(self._layer.experts(), h, routing, None if stored is None else stored[0])
        passed.run()
        shared = self._shared_inner(h) if stored is None else stored[1:]
        saved.put(EXPERT_GATE_UP, (passed.gate_up, *shared))
        beside = self._shared_out(h, shared) if shared else None
        y = rows + passed.output(weights)
        return y if beside is None else y.add_(beside)

    def backward(self, rows: Tensor, dy: Tensor, saved: SavedPiece, sums: GradientSums) -> Tensor:
        """Implements `FeedForward.backward`."""
        experts = self._layer.experts()
        with torch.no_grad():
            h, logits = self._steps.run_step(ROUTE, (rows,))
            routing = self._routing(logits, saved)
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            weights = self._layer.weigh(leaf, routing.wanted)
        shared, (d_h, d_weights, of_experts) = self._expert_gradients(h, weights.detach(), dy, routing, saved)
        for weight, part in zip(experts.weights, of_experts, strict=True):
            index = sums.index_of(weight)
            if index is not None and part is not None:
                sums.add(index, part)
        if shared:
            d_h += self._shared_backward(h, shared, dy, sums)
        (d_logits,) = torch.autograd.grad(weights, leaf, d_weights.to(weights.dtype))
        if self._layer.router_losses.active:
            d_logits = d_logits + self._layer.router_losses.gradient(self._layer.index, logits)
        (through,) = self._steps.pull_back(ROUTE, (rows,), (), (d_h, d_logits), sums)
        # The rows' own way past the experts.
        return through + dy

    def _expert_gradients(
        self, h: Tensor, weights: Tensor, dy: Tensor, routing: Routing, saved: SavedPiece
    ) -> tuple[Sequence[Tensor], tuple[Tensor, Tensor, list[Tensor | None]]]:
        """What the shared expert needs, and the gradients of the routed ones."""
        experts = self._layer.experts()
        if routing.order is None:
            with torch.no_grad():
                held, (gate_up, *shared) = self._inner(h, experts, routing, saved)
            return shared, experts.gradients(held, gate_up, weights, dy, routing)
        stored = saved.get(EXPERT_GATE_UP)
        passed = BackwardInChunks(experts, weights, dy, routing, h=h, held=None, gate_up=None if stored is None else stored[0])
        passed.run()
        with torch.no_grad():
            inner = self._shared_inner(h) if stored is None else stored[1:]
        return inner, passed.result()

    def _routing(self, logits: Tensor, saved: SavedPiece) -> Routing:
        stored = saved.get(ROUTING)
        chosen = self._layer.choose(logits.detach()).to(torch.int32) if stored is None else stored[0]
        if stored is None:
            chosen = self._decided(chosen)
            saved.put(ROUTING, (chosen,))
            self._layer.router_losses.add(self._layer.index, logits)
        return Routing.of(chosen, self._layer.num_experts, self._layer.expert_ranks, drops=self._layer.capacity is not None)

    def _decided(self, chosen: Tensor) -> Tensor:
        """What of the choices (T, K) there is room for: below 0 where there is none. Both are counted."""
        layer, capacity = self._layer, self._layer.capacity
        kept = None if capacity is None else capacity.keep(layer.index, chosen, layer.num_experts)
        layer.expert_load.add(layer.index, chosen, layer.num_experts, kept)
        return chosen if kept is None else kept

    def _inner(self, h: Tensor, experts: Experts, routing: Routing, saved: SavedPiece) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What the routing holds of the experts' rows; their gate and up, and those of the shared expert."""
        # Whether something is stored may differ between ranks, and all of them exchange.
        stored, held = saved.get(EXPERT_GATE_UP), routing.hold(h)
        if stored is not None:
            return held, stored
        shared = self._shared_inner(h)
        return held, (experts.gate_and_up(routing.rows(held), routing), *shared)

    def _shared_inner(self, h: Tensor) -> tuple[Tensor, ...]:
        return self._steps.run_step(SHARED_IN, (h,)) if self._layer.has_shared else ()

    def _shared(self, h: Tensor) -> Tensor | float:
        if not self._layer.has_shared:
            return 0.0
        return self._shared_out(h, self._steps.run_step(SHARED_IN, (h,)))

    def _shared_out(self, h: Tensor, inner: Sequence[Tensor]) -> Tensor:
        return self._steps.run_step(SHARED_OUT, (h, *inner) if self._layer.scales_shared else tuple(inner))[0]

    def _shared_backward(self, h: Tensor, inner: Sequence[Tensor], dy: Tensor, sums: GradientSums) -> Tensor:
        if not self._layer.scales_shared:
            return self._steps.pull_back(SHARED_IN, (h,), (), self._steps.pull_back(SHARED_OUT, inner, (), (dy,), sums), sums)[0]
        d_h, *d_inner = self._steps.pull_back(SHARED_OUT, (h, *inner), (), (dy,), sums)
        (through,) = self._steps.pull_back(SHARED_IN, (h,), (), d_inner, sums)
        return through + d_h
