"""One layer in one micro-batch: its steps, its attention, its rows and what it leaves.

Note: mirrored in read_order.py (what `after`, `after_backward` and `projected` read, in this order), estimate/footprint/live_layer.py
(after_row, after_backward) and estimate/timing/{offload,flops}.py. A change here is a change there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..activation_classes import KEY_VALUE, LAYER_INPUT, QUERY, RESIDUAL, ActivationClass
from ..config import ActivationPlace, AttentionTiling
from ..heads import Heads
from ..policy import MemoryPolicy
from ..ranges import Range, group_ranges, place_of
from .saved import Saved
from .token_local import FeedForward, GradientSums, LayerSteps, Rope, Step, before_backward

QKV = tuple[Tensor, Tensor, Tensor]
Rows = tuple[Range, ...]
"""Rows of each Ulysses rank that works on the same sequences."""
Inputs = Callable[[int], Tensor]
"""The layer input's rows of one piece."""


class AttentionRuntime(Protocol):
    """The attention of one micro-batch (parallel/sequence/runtime.py)."""

    @property
    def ring(self) -> int: ...
    @property
    def member_tokens(self) -> tuple[int, ...]: ...
    @property
    def ulysses_index(self) -> int: ...
    @property
    def rank_tokens(self) -> tuple[int, ...] | None:
        """Tokens of every rank of the stage where layers exchange rows beyond the group; None: they do not."""
        ...

    @property
    def stage_rank(self) -> int: ...
    def exchange_in(self, q: Tensor, k: Tensor, v: Tensor, spec: Any) -> QKV: ...
    def exchange_out(self, o: Tensor, spec: Any) -> Tensor: ...
    def exchange_out_backward(self, do: Tensor, spec: Any) -> Tensor: ...
    def exchange_in_backward(self, gradients: QKV, spec: Any, dtype: torch.dtype) -> QKV: ...
    def core_forward(self, qkv: QKV, spec: Any, sinks: Tensor | None) -> tuple[Tensor, Tensor]: ...
    def core_backward(self, do: Tensor, qkv: QKV, o: Tensor, lse: Tensor, spec: Any) -> QKV: ...
    def exchange_keys(self, k: Tensor, v: Tensor, spec: Any) -> tuple[Tensor, Tensor]: ...
    def exchange_keys_backward(self, dk: Tensor, dv: Tensor, spec: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]: ...
    def gather_rows(self, t: Tensor, rows: Rows, spec: Any) -> Tensor: ...
    def scatter_rows(self, t: Tensor, rows: Rows, spec: Any) -> Tensor: ...
    def rows_forward(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, spec: Any, sinks: Tensor | None) -> tuple[Tensor, Tensor]: ...
    def rows_backward(
        self, do: Tensor, qkv: QKV, o: Tensor, lse: Tensor, rows: Rows, spec: Any, totals: tuple[Tensor, Tensor], key_block: int
    ) -> Tensor: ...
    def sinks_backward(self, do: Tensor, o: Tensor, lse: Tensor, sinks: Tensor) -> Tensor: ...
    def busy(self) -> AbstractContextManager[None]:
        """The group's own work happens inside."""
        ...


@dataclass(frozen=True)
class LayerRun:
    """All that the passes of one layer need; `pieces` are the ranges of rows in ascending order, for every Ulysses rank."""

    adapter: LayerSteps
    feed_forward: FeedForward
    policy: MemoryPolicy
    attention: AttentionRuntime
    rope: Rope
    saved: Saved
    pieces: tuple[Rows, ...]
    num_tokens: int
    chunked: bool
    """Attention by chunks of queries."""

    @property
    def spec(self) -> Any:
        return self.adapter.spec

    @property
    def indices(self) -> range:
        return range(len(self.pieces))

    @property
    def alone(self) -> bool:
        """No other rank has tokens of the same sequences, so keys are final as soon as all later queries were."""
        return len(self.attention.member_tokens) == 1

    def rows(self, index: int) -> slice:
        """This rank's rows of a piece."""
        return slice(*self.pieces[index][self.attention.ulysses_index if self.chunked else 0])

    def rope_rows(self, index: int) -> Rope:
        rows = self.rows(index)
        return self.rope[0][rows], self.rope[1][rows]

    def place(self, kind: ActivationClass, index: int) -> ActivationPlace:
        rows = self.rows(index)
        return place_of(self.policy.split(kind), (rows.start, rows.stop), self.num_tokens)

    def save(self, kind: ActivationClass, index: int, tensors: Sequence[Tensor], group: int = 0, *, share: bool = False) -> None:
        """Leave one class of one piece where the policy has it. `share`: the tensors are rows of one that holds all tokens."""
        share = share and self.policy.split(kind).keep == 1.0
        self.saved.put((kind.name, index, group), tensors, self.place(kind, index), share=share)

    def has(self, kind: ActivationClass, index: int, group: int = 0) -> bool:
        return (kind.name, index, group) in self.saved

    def get(self, kind: ActivationClass, index: int, group: int = 0) -> tuple[Tensor, ...]:
        return self.saved.get((kind.name, index, group))

    @property
    def attention_stored(self) -> bool:
        return self.policy.attention_output.complete

    def release(self) -> None:
        """What was read of one piece is done with. With one piece alone it is used to the end of the layer."""
        if len(self.pieces) > 1:
            self.saved.release()

    def input_rows(self, index: int) -> Tensor:
        """The layer input's rows of a piece, from what was saved."""
        return self.get(LAYER_INPUT, index)[0]

    def projected(self, index: int, inputs: Inputs, heads: Heads, group: int = 0) -> tuple[Tensor, ...]:
        """Queries, keys and values of one piece, of those `heads` asks for: stored ones as they are, the others made."""
        q = self.get(QUERY, index, group) if heads.queries != () and self.has(QUERY, index, group) else None
        kv = self.get(KEY_VALUE, index, group) if heads.keys != () and self.has(KEY_VALUE, index, group) else None
        missing = Heads(heads.queries if q is None else (), heads.keys if kv is None else ())
        if missing == Heads((), ()):
            return (*(q or ()), *(kv or ()))
        made = self.adapter.before_attention(inputs(index), self.rope_rows(index), missing)
        return (*(q or ()), *made, *(kv or ()))

    def save_input(self, x: Tensor) -> None:
        """Leave the layer input (T, M) where the policy has it."""
        for index in self.indices:
            self.save(LAYER_INPUT, index, [x[self.rows(index)]], share=True)

    def after(self, index: int, inputs: Inputs, o: Tensor | None, *, save: bool) -> Tensor:
        """The second half of one piece. What was stored of it is used where there is such; `o` may be None where the sum is."""
        if self.has(RESIDUAL, index):
            total = self.get(RESIDUAL, index)[0]
        else:
            assert o is not None
            total = self.adapter.residual(inputs(index), o)
        if save:
            self.save(RESIDUAL, index, [total])
        return self.feed_forward.forward(total, PieceOfRun(self, index, save))

    def after_backward(self, index: int, x: Tensor, o: Tensor, dy: Tensor, sums: GradientSums) -> tuple[Tensor, Tensor]:
        """dx and do of one piece's second half, which may share memory with dy."""
        with torch.no_grad():
            total = self.get(RESIDUAL, index)[0] if self.has(RESIDUAL, index) else self.adapter.residual(x, o)
        d_total = self.feed_forward.backward(total, dy, PieceOfRun(self, index, False), sums)
        del total
        dx, do = self.adapter.pull_back(Step("residual"), (x, o), (), (d_total,), sums)
        return dx, do

    def before_backward(self, index: int, x: Tensor, heads: Heads, upstream: Sequence[Tensor], sums: GradientSums) -> Tensor:
        """dx of one piece's projections."""
        return before_backward(self.adapter, x, self.rope_rows(index), heads, upstream, sums)


@dataclass(frozen=True, slots=True)
class PieceOfRun:
    """One piece of a run, as its feed-forward sees it."""

    run: LayerRun
    index: int
    save: bool
    """Whether this is the forward pass: what the feed-forward puts is left for the others."""

    def get(self, kind: ActivationClass) -> tuple[Tensor, ...] | None:
        """Implements `SavedPiece.get`."""
        return self.run.get(kind, self.index) if self.run.has(kind, self.index) else None

    def put(self, kind: ActivationClass, tensors: Sequence[Tensor]) -> None:
        """Implements `SavedPiece.put`."""
        if self.save:
            self.run.save(kind, self.index, tensors)


def layer_run(
    adapter: LayerSteps,
    feed_forward: FeedForward,
    policy: MemoryPolicy,
    attention: AttentionRuntime,
    rope: Rope,
    saved: Saved,
    num_tokens: int,
) -> LayerRun:
    """The run of a layer on `num_tokens` rows of this rank. Chunks of queries are for groups without a ring."""
    chunked = policy.attention is AttentionTiling.CHUNKS and attention.ring == 1
    tokens = attention.member_tokens if chunked else (num_tokens,)
    return LayerRun(adapter, feed_forward, policy, attention, rope, saved, _pieces(tokens, policy, attention), num_tokens, chunked)


def _pieces(tokens: tuple[int, ...], policy: MemoryPolicy, attention: AttentionRuntime) -> tuple[Rows, ...]:
    """The pieces of ranks with these rows; as many on every rank of the stage where all of them exchange once a piece."""
    if attention.rank_tokens is None:
        return group_ranges(tokens, policy)
    first = attention.stage_rank - (attention.ulysses_index if len(tokens) > 1 else 0)
    return tuple(piece[first : first + len(tokens)] for piece in group_ranges(attention.rank_tokens, policy))


class Gathered:
    """Rows of all tokens put together from pieces; one piece alone is taken as it is."""

    def __init__(self, run: LayerRun) -> None:
        self._run = run
        self.whole: list[Tensor] = []

    def put(self, index: int, parts: Sequence[Tensor]) -> None:
        """Rows of one piece, of each tensor."""
        if len(self._run.pieces) == 1:
            self.whole = list(parts)
            return
        if not self.whole:
            self.whole = [part.new_empty((self._run.num_tokens, *part.shape[1:])) for part in parts]
        for whole, part in zip(self.whole, parts, strict=True):
            whole[self._run.rows(index)] = part
