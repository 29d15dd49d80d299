"""One layer in one micro-batch: its steps, its attention, its rows and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import ActivationPlace, AttentionTiling
from ..heads import Heads
from ..policy import MemoryPolicy
from ..ranges import Range, group_ranges, place_of
from .saved import Saved
from .token_local import GradientSums, LayerSteps, Rope, after_backward, before_backward

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
    def exchange_in(self, q: Tensor, k: Tensor, v: Tensor, spec: Any) -> QKV: ...
    def exchange_out(self, o: Tensor, spec: Any) -> Tensor: ...
    def exchange_out_backward(self, do: Tensor, spec: Any) -> Tensor: ...
    def exchange_in_backward(self, gradients: QKV, spec: Any, dtype: torch.dtype) -> QKV: ...
    def core_forward(self, qkv: QKV, spec: Any) -> tuple[Tensor, Tensor]: ...
    def core_backward(self, do: Tensor, qkv: QKV, o: Tensor, lse: Tensor, spec: Any) -> QKV: ...
    def exchange_keys(self, k: Tensor, v: Tensor, spec: Any) -> tuple[Tensor, Tensor]: ...
    def exchange_keys_backward(self, dk: Tensor, dv: Tensor, spec: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]: ...
    def gather_rows(self, t: Tensor, rows: Rows, spec: Any) -> Tensor: ...
    def scatter_rows(self, t: Tensor, rows: Rows, spec: Any) -> Tensor: ...
    def rows_forward(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, spec: Any) -> tuple[Tensor, Tensor]: ...
    def rows_backward(
        self, do: Tensor, qkv: QKV, o: Tensor, lse: Tensor, rows: Rows, spec: Any, totals: tuple[Tensor, Tensor], key_block: int
    ) -> Tensor: ...
    def busy(self) -> AbstractContextManager[None]:
        """The group's own work happens inside."""
        ...


@dataclass(frozen=True)
class LayerRun:
    """All that the passes of one layer need; `pieces` are the ranges of rows in ascending order, for every Ulysses rank."""

    adapter: LayerSteps
    policy: MemoryPolicy
    attention: AttentionRuntime
    rope: Rope
    saved: Saved
    pieces: tuple[Rows, ...]
    num_tokens: int
    streamed: bool
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
        return slice(*self.pieces[index][self.attention.ulysses_index if self.streamed else 0])

    def rope_rows(self, index: int) -> Rope:
        rows = self.rows(index)
        return self.rope[0][rows], self.rope[1][rows]

    def place(self, kind: str, index: int) -> ActivationPlace:
        rows = self.rows(index)
        return place_of(self.policy.splits[kind], (rows.start, rows.stop), self.num_tokens)

    def save(self, kind: str, index: int, tensors: Sequence[Tensor], group: int = 0, *, share: bool = False) -> None:
        """Leave one class of one piece where the policy has it. `share`: the tensors are rows of one that holds all tokens."""
        split = self.policy.splits[kind]
        self.saved.put((kind, index, group), tensors, self.place(kind, index), share=share and split.keep == 1.0)

    def has(self, kind: str, index: int, group: int = 0) -> bool:
        return (kind, index, group) in self.saved

    def get(self, kind: str, index: int, group: int = 0) -> tuple[Tensor, ...]:
        return self.saved.get((kind, index, group))

    @property
    def attention_stored(self) -> bool:
        return self.policy.attention_output.complete

    def release(self) -> None:
        """What was read of one piece is done with. With one piece alone it is used to the end of the layer."""
        if len(self.pieces) > 1:
            self.saved.release()

    def input_rows(self, index: int) -> Tensor:
        """The layer input's rows of a piece, from what was saved."""
        return self.get("layer_input", index)[0]

    def projected(self, index: int, inputs: Inputs, heads: Heads, group: int = 0) -> tuple[Tensor, ...]:
        """Queries, keys and values of one piece, of those `heads` asks for: stored ones as they are, the others made."""
        q = self.get("query", index, group) if heads.queries != () and self.has("query", index, group) else None
        kv = self.get("key_value", index, group) if heads.keys != () and self.has("key_value", index, group) else None
        missing = Heads(heads.queries if q is None else (), heads.keys if kv is None else ())
        if missing == Heads((), ()):
            return (*(q or ()), *(kv or ()))
        made = self.adapter.before_attention(inputs(index), self.rope_rows(index), missing)
        return (*(q or ()), *made, *(kv or ()))

    def save_input(self, x: Tensor) -> None:
        """Leave the layer input (T, M) where the policy has it."""
        for index in self.indices:
            self.save("layer_input", index, [x[self.rows(index)]], share=True)

    def after(self, index: int, inputs: Inputs, o: Tensor | None, *, save: bool) -> Tensor:
        """The second half of one piece. What was stored of it is used where there is such; `o` may be None where the sum is."""
        if self.has("residual", index):
            total = self.get("residual", index)[0]
        else:
            assert o is not None
            total = self.adapter.residual(inputs(index), o)
        gate, up = self.get("mlp", index) if self.has("mlp", index) else self.adapter.mlp_in(total)
        if save:
            self.save("residual", index, [total])
            self.save("mlp", index, [gate, up])
        return self.adapter.mlp_out(total, gate, up)

    def after_backward(self, index: int, x: Tensor, o: Tensor, dy: Tensor, sums: GradientSums) -> tuple[Tensor, Tensor]:
        """dx and do of one piece's second half."""
        residual = self.get("residual", index)[0] if self.has("residual", index) else None
        mlp = self.get("mlp", index) if self.has("mlp", index) else None
        return after_backward(self.adapter, (x, o), dy, sums, residual=residual, mlp=mlp)

    def before_backward(self, index: int, x: Tensor, heads: Heads, upstream: Sequence[Tensor], sums: GradientSums) -> Tensor:
        """dx of one piece's projections."""
        return before_backward(self.adapter, x, self.rope_rows(index), heads, upstream, sums)


def layer_run(
    adapter: LayerSteps, policy: MemoryPolicy, attention: AttentionRuntime, rope: Rope, saved: Saved, num_tokens: int
) -> LayerRun:
    """The run of a layer on `num_tokens` rows of this rank. Chunks of queries are for groups without a ring."""
    streamed = policy.attention is AttentionTiling.CHUNKS and attention.ring == 1
    tokens = attention.member_tokens if streamed else (num_tokens,)
    return LayerRun(adapter, policy, attention, rope, saved, group_ranges(tokens, policy), num_tokens, streamed)


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
