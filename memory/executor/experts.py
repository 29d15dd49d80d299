"""Experts of one layer on rows that were routed: their output, and every gradient, by formulas.

Note: why by formulas. Backward makes no down product: a token's weight for an expert is differentiated through the expert's
activation, <dy, W a> = <W^T dy, a>, and W^T dy is needed in any case. Sums over the experts of a token go over its own places in the
sorted rows, so they come to the same bits every time, which adding by index does not on a GPU.

Legend: T tokens, K experts of a token, R = T K rows (without those dropped) in the order of their experts, M model width, I width of gate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...parallel.experts.layer_order import LayerOrder
from .grouped import GroupedProjection, Groups, count_each

Arrival = Callable[[], Tensor]
"""Waits for rows that are on their way, and returns them."""


class RowExchange(Protocol):
    """The way of one piece's rows, or a chunk of them, to the ranks of their experts and back (parallel/expert_exchange.py). Collective."""

    @property
    def order(self) -> LayerOrder:
        """In which its chunks are taken."""
        ...

    @property
    def counts(self) -> Tensor:
        """Rows of each expert that is here."""
        ...

    @property
    def experts(self) -> slice:
        """Which of the experts that are here these rows can be of."""
        ...

    @property
    def mine(self) -> Tensor:
        """Which of the piece's rows on this rank these are (R,)."""
        ...

    @property
    def here(self) -> slice:
        """Where the rows that come here are among those of the whole piece that do."""
        ...

    def chunks(self, degree: int) -> Sequence[RowExchange]:
        """The same rows in `degree` chunks. Not collective."""
        ...

    def dispatch(self, rows: Tensor) -> Tensor:
        """Rows (R, ...) -> those whose experts are here (Q, ...), in the order of experts."""
        ...

    def combine(self, rows: Tensor) -> Tensor:
        """The way back: (Q, ...) -> (R, ...)."""
        ...

    def begin_dispatch(self, rows: Tensor) -> Arrival:
        """`dispatch` that runs beside what follows."""
        ...

    def begin_combine(self, rows: Tensor) -> Arrival:
        """`combine` that runs beside what follows."""
        ...


class ExpertRanks(Protocol):
    """Ranks that share the experts of a layer."""

    def ordered(self, order: LayerOrder) -> ExpertRanks:
        """The same, whose exchanges are taken in this order."""
        ...

    def exchange(self, counts: Tensor) -> RowExchange:
        """Agree on the rows of one piece, from those here of each expert (E,). Collective."""
        ...


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts every token goes to, and where its rows are among those of all tokens in the order of experts."""

    chosen: Tensor
    """Experts of each token (T, K) int32; ~expert, which is below 0, where the token's row is dropped."""
    tokens: Tensor
    """Token of each row (R,)."""
    places: Tensor
    """Row of each token and expert (T, K); any where that is dropped."""
    kept: Tensor | None
    """False where a token's row is dropped (T, K); None: no row is."""
    groups: Groups
    """Rows of each expert that is here: of all experts, or of those of this rank."""
    exchange: RowExchange | None = None
    """None: all experts are here."""

    @classmethod
    def of(cls, chosen: Tensor, num_experts: int, ranks: ExpertRanks | None = None, *, drops: bool = False) -> Routing:
        """Sort by expert, tokens of one expert in their own order. `chosen` (T, K). Collective over `ranks`, where there are such.

        `drops`: some of `chosen` may be below 0.
        """
        flat = chosen.flatten().long()
        if drops:  # behind all others
            flat = torch.where(flat < 0, num_experts, flat)
        order = torch.argsort(flat, stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        counts = count_each(flat, num_experts + drops)[:num_experts]
        kept = None
        if drops:
            kept, order = chosen >= 0, order[: int(counts.sum())]
            places.clamp_(max=max(len(order) - 1, 0))
        exchange = None if ranks is None else ranks.exchange(counts)
        groups = Groups(counts if exchange is None else exchange.counts)
        return cls(chosen, order // chosen.shape[1], places.view(chosen.shape), kept, groups, exchange)

    @property
    def order(self) -> LayerOrder | None:
        """How chunks of its rows are taken (expert_chunks.py); None: every exchange is waited for."""
        return None if self.exchange is None or self.exchange.order.is_plain else self.exchange.order

    @property
    def wanted(self) -> Tensor:
        """Experts of each token (T, K), whether there was room or not: a weight is a share of all of them."""
        return self.chosen if self.kept is None else torch.where(self.kept, self.chosen, ~self.chosen)

    def at_experts(self, values: Tensor) -> Tensor:
        """Values of tokens (T, M) -> those of the rows whose experts are here (R, M)."""
        return self.rows(self.hold(values))

    def hold(self, values: Tensor) -> Tensor:
        """What is kept of tokens' values (T, M) to have their `rows` later: the tokens', or what came from other ranks, sent once."""
        return values if self.exchange is None else self.to_experts(values[self.tokens])

    def rows(self, held: Tensor) -> Tensor:
        """The rows whose experts are here (R, M), of what `hold` gave. Rows of this rank are gathered again sooner than kept."""
        return held[self.tokens] if self.exchange is None else held

    def to_experts(self, rows: Tensor) -> Tensor:
        """Rows of this rank's tokens -> those whose experts are here."""
        return rows if self.exchange is None else self.exchange.dispatch(rows)

    def from_experts(self, rows: Tensor) -> Tensor:
        """The way back of `to_experts`."""
        return rows if self.exchange is None else self.exchange.combine(rows)

    def sum_rows(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sum each token's rows (R, M), times its weights (T, K), in float32 at least -> (T, M) in the rows' dtype."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = rows.new_zeros((self.chosen.shape[0], rows.shape[1]), dtype=wide)
        for column in range(self.chosen.shape[1] * bool(len(rows))):
            part = rows[self.places[:, column]]
            if self.kept is not None:
                part = part.masked_fill(~self.kept[:, column : column + 1], 0)
            total += part if weights is None else part * weights[:, column : column + 1]
            del part  # before the next is made
        return total.to(rows.dtype)

    def by_row(self, values: Tensor) -> Tensor:
        """Values of tokens and experts (T, K) -> those of rows (R,)."""
        out = values.new_empty(len(self.tokens))
        kept = slice(None) if self.kept is None else self.kept.flatten()
        out[self.places.flatten()[kept]] = values.flatten()[kept]
        return out

    def by_token(self, values: Tensor) -> Tensor:
        """Values of rows (R,) -> those of tokens and experts (T, K); 0 where a row is dropped."""
        if not len(values):
            return values.new_zeros(self.places.shape)
        by_token = values[self.places.flatten()].view(self.places.shape)
        return by_token if self.kept is None else by_token.masked_fill(~self.kept, 0)


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a layer, with their weights as they are in this pass."""

    gate_up: GroupedProjection
    """(T, M) -> gate and up in one (R, 2 I), in the family's own order."""
    down: GroupedProjection
    activate: Callable[[Tensor], Tensor]
    """Gate and up (R, 2 I) -> (R, I), differentiable."""

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """All parameters, in the order of `gradients`."""
        both = (self.gate_up.weight, self.gate_up.bias, self.down.weight, self.down.bias)
        return tuple(each for each in both if each is not None)

    def gate_and_up(self, x: Tensor, routing: Routing) -> Tensor:
        """Gate and up (R, 2 I) of rows x (R, M)."""
        return self.gate_up(x, routing.groups)

    def output(self, gate_up: Tensor, weights: Tensor, routing: Routing) -> Tensor:
        """The sum over each token's experts (T, M), each times its weight (T, K)."""
        with torch.no_grad():
            rows = self.down(self.activate(gate_up), routing.groups)
            return routing.sum_rows(routing.from_experts(rows), weights)

    @torch.no_grad()
    def gradients(
        self, held: Tensor, gate_up: Tensor, weights: Tensor, dy: Tensor, routing: Routing
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Gradients of the tokens (T, M) that `routing` holds as `held`, of the weights (T, K), and of `self.weights` that are trained.

        dy (T, M) is the output's.
        """
        groups, down = routing.groups, WeightSums(self.down)
        scale = routing.to_experts(routing.by_row(weights).unsqueeze(1))
        d_weights, d_gate_up = self.through(gate_up, [routing.at_experts(dy)], scale, groups, down.add)
        own = WeightSums(self.gate_up)
        own.add(routing.rows(held), d_gate_up, groups)
        d_rows = routing.from_experts(self.gate_up.input_gradient(d_gate_up, groups))
        return routing.sum_rows(d_rows), routing.by_token(routing.from_experts(d_weights)), [*own.take(), *down.take()]

    def through(self, gate_up: Tensor, given: list[Tensor], scale: Tensor, groups: Groups, take_down: TakeWeights) -> tuple[Tensor, Tensor]:
        """Gradients of each row's weight (R,) and of gate and up (R, 2 I), through the last product and the activation.

        `given` has the gradient of each row's result (R, M) before its weight `scale` (R, 1), which is taken out of it and written over.
        `take_down` is given what the last product's weight gradients are made of.
        """
        upstream = given.pop()
        with torch.enable_grad():
            leaf = gate_up.detach().requires_grad_()
            product = self.activate(leaf)
        activation = product.detach()
        back = self.down.input_gradient(upstream, groups)
        d_weights = _dot(back, activation)
        if self.down.bias is not None:
            d_weights += _dot(upstream, self.down.bias.detach()[groups.experts(len(upstream))])
        # In place: these rows are K times as many as the tokens.
        take_down(activation, upstream.mul_(scale), groups)
        del upstream, activation
        (d_gate_up,) = torch.autograd.grad(product, leaf, back.mul_(scale))
        return d_weights, d_gate_up


TakeWeights = Callable[[Tensor, Tensor, Groups], None]
"""Takes inputs (R, I) and gradients of outputs (R, O) of a product of grouped rows."""


class WeightSums:
    """Gradients of one projection's weight and bias, from calls of `add` that together have every expert.

    `cut`: more than one call may have rows of the same expert; then they are summed in float32 at least, and rounded once.
    """

    def __init__(self, projection: GroupedProjection, *, cut: bool = False) -> None:
        self._projection, self._cut = projection, cut
        self._totals: list[Tensor | None] = [None] if projection.bias is None else [None, None]

    def add(self, x: Tensor, dy: Tensor, groups: Groups, experts: slice = slice(None)) -> None:
        """Add what inputs x (R, I) and the outputs' gradient dy (R, O) come to, rows of these experts alone."""
        projection, here = self._projection, Groups(groups.counts[experts])
        if projection.weight.requires_grad:
            self._add(0, projection.weight, experts, lambda out: projection.weight_gradient(x, dy, here, out))
        if projection.bias is not None and projection.bias.requires_grad:
            self._add(1, projection.bias, experts, lambda out: projection.bias_gradient(dy, here, out))

    def _add(self, index: int, parameter: Tensor, experts: slice, make: Callable[[Tensor | None], Tensor]) -> None:
        total = self._totals[index]
        if total is None and not self._cut and len(parameter[experts]) == len(parameter):
            self._totals[index] = make(None)
            return
        if total is None:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            total = self._totals[index] = torch.zeros_like(parameter, dtype=wide if self._cut else None)
        if self._cut:
            total[experts] += make(None)
        else:
            make(total[experts])

    def take(self) -> list[Tensor | None]:
        """Those of weight and bias, once: None for one that is not trained; nothing for a bias that is not there."""
        dtype = self._projection.weight.dtype
        # One after the other, so that no sum stays beside what it is rounded to for longer than needed.
        for index, total in enumerate(self._totals):
            self._totals[index] = None if total is None else total.to(dtype)
        return self._totals


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Each row's product with the other's (R,), summed in float32 at least."""
    return (left * right).sum(-1, dtype=torch.promote_types(left.dtype, torch.float32))
