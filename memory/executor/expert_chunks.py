"""Passes through the experts of a layer whose rows travel in chunks: exchanges run beside products, in the turns of an order.

Every rank of the exchange takes the same turns (parallel/experts/layer_order.py), with rows or without, so that its collectives are begun
in one order; a chunk's rows are waited for where its products need them, and results where tokens sum them.

Note: one layout. Rows of all chunks together lie as those of one exchange do: what is kept of them is whole, and backward may have
another degree than forward.

Legend: as in experts.py; Q rows whose experts are here, q those of one chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...parallel.experts.layer_order import Move, PassOrder
from .experts import Arrival, Experts, Routing, RowExchange, WeightSums
from .grouped import Groups


class _Chunks:
    """The chunks of one pass, and what is on its way of each."""

    def __init__(self, routing: Routing, order: PassOrder) -> None:
        assert routing.exchange is not None
        self.routing, self._order = routing, order
        self.parts = routing.exchange.chunks(order.degree)
        self.num_rows = routing.exchange.here.stop
        self.coming: dict[int, list[Arrival]] = {}
        self.leaving: dict[int, list[Tensor]] = {}
        self.back: dict[int, list[Arrival]] = {}

    def combine(self, chunk: int) -> None:
        """Send results of a chunk back."""
        self.back[chunk] = [self.parts[chunk].begin_combine(rows) for rows in self.leaving.pop(chunk)]

    def gathered(self, index: int) -> Tensor:
        """Put the chunks' results number `index` together, as rows of this rank (R, ...)."""
        whole: Tensor | None = None
        for chunk, part in enumerate(self.parts):
            rows = self.back[chunk][index]()
            if whole is None:
                whole = rows.new_empty((len(self.routing.tokens), *rows.shape[1:]))
            whole[part.mine] = rows
        assert whole is not None
        return whole


class ForwardInChunks:
    """The way of tokens h (T, M) through their experts; `output` sums what came back. Collective.

    `stored`: gate and up, where they are not to be made. `hold`: rows that come here are kept for backward.
    """

    def __init__(self, experts: Experts, h: Tensor, routing: Routing, stored: Tensor | None = None, *, hold: bool = False) -> None:
        assert routing.order is not None
        self._experts, self._h, self._chunks = experts, h, _Chunks(routing, routing.order.forward)
        self._made, self._hold, self._order = stored is None, hold, routing.order.forward
        self._gate_up, self._held = stored, h.new_empty((self._chunks.num_rows, h.shape[1])) if hold else None

    @torch.no_grad()
    def run(self) -> None:
        """Take all turns; results may be on their way still."""
        for turn in self._order.turns:
            part = self._chunks.parts[turn.chunk]
            if turn.move is Move.DISPATCH:
                self._chunks.coming[turn.chunk] = [part.begin_dispatch(self._h[self._chunks.routing.tokens[part.mine]])]
            elif turn.move is Move.EXPERTS:
                self._products(turn.chunk, part)
            else:
                self._chunks.combine(turn.chunk)

    @property
    def gate_up(self) -> Tensor:
        """Gate and up of all rows (Q, 2 I)."""
        assert self._gate_up is not None
        return self._gate_up

    @property
    def held(self) -> Tensor:
        """The rows that came here (Q, M)."""
        assert self._held is not None
        return self._held

    @torch.no_grad()
    def output(self, weights: Tensor) -> Tensor:
        """The sum over each token's experts (T, M), each times its weight (T, K)."""
        return self._chunks.routing.sum_rows(self._chunks.gathered(0), weights)

    def _products(self, chunk: int, part: RowExchange) -> None:
        (arrival,) = self._chunks.coming.pop(chunk)
        rows, groups = arrival(), Groups(part.counts)
        if self._held is not None:
            self._held[part.here] = rows
        gate_up = self._experts.gate_up(rows, groups) if self._made else self.gate_up[part.here]
        if self._made:
            if self._gate_up is None:
                self._gate_up = gate_up.new_empty((self._chunks.num_rows, gate_up.shape[1]))
            self._gate_up[part.here] = gate_up
        del rows
        self._chunks.leaving[chunk] = [self._experts.down(self._experts.activate(gate_up), groups)]


class BackwardInChunks:
    """The gradients of a pass: of tokens (T, M), of weights (T, K) and of the experts' parameters. Collective.

    `h` (T, M) are the tokens, or `held` (Q, M) what came here of them; `gate_up` is None where it is to be made. dy (T, M) is the output's.
    """

    def __init__(
        self,
        experts: Experts,
        weights: Tensor,
        dy: Tensor,
        routing: Routing,
        *,
        h: Tensor | None,
        held: Tensor | None,
        gate_up: Tensor | None,
    ) -> None:
        assert routing.order is not None and (h is None) is not (held is None)
        self._experts, self._dy, self._h, self._held, self._gate_up = experts, dy, h, held, gate_up
        self._order, self._chunks = routing.order.backward, _Chunks(routing, routing.order.backward)
        self._scale = routing.by_row(weights).unsqueeze(1)
        # Weights have gradients from backward's chunks alone, which may be whole experts where those of forward are not.
        cut = len(routing.groups.counts) % self._order.degree > 0
        self._own, self._down = WeightSums(experts.gate_up, cut=cut), WeightSums(experts.down, cut=cut)
        self._deferred: dict[int, list[tuple[WeightSums, Tensor, Tensor]]] = {}

    @torch.no_grad()
    def run(self) -> None:
        """Take all turns; gradients of rows may be on their way still."""
        for turn in self._order.turns:
            part = self._chunks.parts[turn.chunk]
            if turn.move is Move.DISPATCH:
                self._dispatch(turn.chunk, part)
            elif turn.move is Move.EXPERTS:
                self._gradients(turn.chunk, part)
            elif turn.move is Move.COMBINE:
                self._chunks.combine(turn.chunk)
            else:
                for sums, x, dy in self._deferred.pop(turn.chunk):
                    sums.add(x, dy, Groups(part.counts), part.experts)

    @torch.no_grad()
    def result(self) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Gradients of tokens (T, M), of weights (T, K), and of `Experts.weights` that are trained."""
        routing = self._chunks.routing
        d_weights = routing.by_token(self._chunks.gathered(1))
        return routing.sum_rows(self._chunks.gathered(0)), d_weights, [*self._own.take(), *self._down.take()]

    def _dispatch(self, chunk: int, part: RowExchange) -> None:
        mine, routing = part.mine, self._chunks.routing
        tokens = routing.tokens[mine]
        leaving = [] if self._h is None else [self._h[tokens]]
        self._chunks.coming[chunk] = [part.begin_dispatch(rows) for rows in (*leaving, self._dy[tokens], self._scale[mine])]

    def _gradients(self, chunk: int, part: RowExchange) -> None:
        *arrival, upstream, scale = (rows() for rows in self._chunks.coming.pop(chunk))
        x = arrival[0] if self._held is None else self._held[part.here]
        groups, defers = Groups(part.counts), self._order.defers_weights
        gate_up = self._experts.gate_up(x, groups) if self._gate_up is None else self._gate_up[part.here]
        later = self._deferred.setdefault(chunk, [])

        def take(sums: WeightSums, rows: Tensor, dy: Tensor) -> None:
            if defers:
                later.append((sums, rows, dy))
            else:
                sums.add(rows, dy, groups, part.experts)

        given = [upstream]
        del upstream
        d_weights, d_gate_up = self._experts.through(gate_up, given, scale, groups, lambda rows, dy, _: take(self._down, rows, dy))
        take(self._own, x, d_gate_up)
        self._chunks.leaving[chunk] = [self._experts.gate_up.input_gradient(d_gate_up, groups), d_weights]
