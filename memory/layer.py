"""The layer executor: one decoder layer as one autograd Function that keeps or recomputes what its policy says.

Note: executor and FSDP2. The Function takes the layer's parameters as inputs and returns each gradient exactly once,
so FSDP2's hooks see an ordinary layer: parameters are gathered before forward and again before backward, and reduced
once afterwards. The parameter objects are the same in both passes (FSDP2 refills their storage), so a graph kept
inside the Function stays valid.

Note: two halves. A layer is before_attention and after_attention (token-local) around the attention core. Backward runs
the second half, then attention, then the first half, and frees each half before the next starts. With `chunk_tokens` a
half runs over chunks of rows, forward and backward, and only one chunk of it exists at a time; attention sees all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .policy import MemoryPolicy

QKV = tuple[Tensor, Tensor, Tensor]


class LayerHalves(Protocol):
    """What a family's adapter provides (training/families)."""

    spec: Any
    rope_key: str | None

    def before_attention(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> QKV: ...
    def after_attention(self, x: Tensor, o: Tensor) -> Tensor: ...
    def after_attention_graph(self, x: Tensor, o: Tensor) -> Tensor: ...


class AttentionRuntime(Protocol):
    """The attention of one micro-batch (parallel/sequence/runtime.py)."""

    def exchange_in(self, q: Tensor, k: Tensor, v: Tensor, spec: Any) -> QKV: ...
    def exchange_out(self, o: Tensor, spec: Any) -> Tensor: ...
    def exchange_out_backward(self, do: Tensor, spec: Any) -> Tensor: ...
    def exchange_in_backward(self, gradients: QKV, spec: Any, dtype: object) -> QKV: ...
    def core_forward(self, qkv: QKV, spec: Any) -> tuple[Tensor, Tensor]: ...
    def core_backward(self, do: Tensor, qkv: QKV, o: Tensor, lse: Tensor, spec: Any) -> QKV: ...
    def busy(self) -> AbstractContextManager[None]:
        """The group's own work happens inside."""
        ...


class LayerExecutor:
    """Stands in for one decoder layer's `forward`: (x, rope tables, attention) -> layer output (T, M)."""

    def __init__(self, layer: nn.Module, adapter: LayerHalves, policy: MemoryPolicy) -> None:
        self._layer, self.adapter, self.policy = layer, adapter, policy

    def __call__(self, x: Tensor, tables: Mapping[str | None, tuple[Tensor, Tensor]], attention: AttentionRuntime) -> Tensor:
        rope = tables[self.adapter.rope_key]
        if not torch.is_grad_enabled():
            return self.run(x, rope, attention)
        parameters = [p for p in self._layer.parameters() if p.requires_grad]
        return _Layer.apply(x, self, rope, attention, *parameters)  # type: ignore[no-any-return]

    def run(self, x: Tensor, rope: tuple[Tensor, Tensor], attention: AttentionRuntime) -> Tensor:
        """Forward alone, nothing kept."""
        return self.run_keeping(x, rope, attention)[0]

    def run_keeping(self, x: Tensor, rope: tuple[Tensor, Tensor], attention: AttentionRuntime) -> tuple[Tensor, Tensor, Tensor]:
        """Layer output, and (o, lse) between the exchanges. Builds no graph."""
        spec, chunk = self.adapter.spec, self.policy.chunk_tokens
        q, k, v = run_rows(self.before, (x, *rope), chunk)
        qkv = attention.exchange_in(q, k, v, spec)
        o, lse = attention.core_forward(qkv, spec)
        del q, k, v, qkv
        (y,) = run_rows(self.after, (x, attention.exchange_out(o, spec)), chunk)
        return y, o, lse

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> QKV:
        return self.adapter.before_attention(x, (cos, sin))

    def after(self, x: Tensor, o: Tensor) -> tuple[Tensor]:
        return (self.adapter.after_attention(x, o),)

    def after_graph(self, x: Tensor, o: Tensor) -> tuple[Tensor]:
        return (self.adapter.after_attention_graph(x, o),)


class _Halves:
    """The graphs of both halves of one layer, and what attention's backward needs."""

    __slots__ = ("gathered", "lse", "o", "o_leaf", "projected", "x_after", "x_before", "y")

    def __init__(
        self,
        executor: LayerExecutor,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        attention: AttentionRuntime,
        *,
        again: bool,
        kept: Sequence[Tensor] = (),
    ) -> None:
        """Run the layer with a graph for each half.

        `again`: in backward, where the values of y are not needed; `kept` is then (o, lse) where attention need not run.
        """
        adapter, spec = executor.adapter, executor.adapter.spec
        with torch.enable_grad():
            self.x_before = x.detach().requires_grad_()
            self.projected = adapter.before_attention(self.x_before, rope)
        with torch.no_grad():
            q, k, v = (t.detach() for t in self.projected)
            self.gathered = attention.exchange_in(q, k, v, spec)
            self.o, self.lse = kept if kept else attention.core_forward(self.gathered, spec)
            o = attention.exchange_out(self.o, spec)
        with torch.enable_grad():
            self.x_after, self.o_leaf = x.detach().requires_grad_(), o.detach().requires_grad_()
            half = adapter.after_attention_graph if again else adapter.after_attention
            self.y: Tensor | None = half(self.x_after, self.o_leaf)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, executor: LayerExecutor, rope: tuple[Tensor, Tensor], attention: AttentionRuntime, *parameters: Tensor
    ) -> Tensor:
        with attention.busy():
            return _Layer._forward(ctx, x, executor, rope, attention, parameters)

    @staticmethod
    def _forward(
        ctx: Any,
        x: Tensor,
        executor: LayerExecutor,
        rope: tuple[Tensor, Tensor],
        attention: AttentionRuntime,
        parameters: tuple[Tensor, ...],
    ) -> Tensor:
        ctx.executor, ctx.rope, ctx.attention, ctx.parameters, ctx.halves = executor, rope, attention, parameters, None
        if executor.policy.graph:
            ctx.halves = _Halves(executor, x, rope, attention, again=False)
            assert ctx.halves.y is not None
            return ctx.halves.y.detach()  # type: ignore[no-any-return]
        y, o, lse = executor.run_keeping(x, rope, attention)
        ctx.save_for_backward(x, *((o, lse) if executor.policy.attention_output.keep else ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.attention.busy():
            return _Layer._backward(ctx, dy)

    @staticmethod
    def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        halves, executor, attention = ctx.halves, ctx.executor, ctx.attention
        ctx.halves = None
        if halves is None:
            x, *kept = ctx.saved_tensors
            chunk = executor.policy.chunk_tokens
            if chunk is not None and x.shape[0] > chunk:
                dx, gradients = _backward_by_chunks(x, kept, dy, executor, ctx.rope, attention, ctx.parameters)
                return dx, None, None, None, *gradients
            halves = _Halves(executor, x, ctx.rope, attention, again=True, kept=kept)
        dx, gradients = _backward(halves, dy, executor.adapter.spec, attention, ctx.parameters)
        return dx, None, None, None, *gradients


def _backward(
    halves: _Halves, dy: Tensor, spec: Any, attention: AttentionRuntime, parameters: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """dx and each parameter's gradient, from graphs of the whole halves."""
    assert halves.y is not None
    dx_after, do, *late = torch.autograd.grad(halves.y, [halves.x_after, halves.o_leaf, *parameters], dy, allow_unused=True)
    halves.y = None
    do = attention.exchange_out_backward(do, spec)
    wide = attention.core_backward(do, halves.gathered, halves.o, halves.lse, spec)
    dqkv = attention.exchange_in_backward(wide, spec, halves.projected[0].dtype)
    del do, wide
    dx, *early = torch.autograd.grad(halves.projected, [halves.x_before, *parameters], dqkv, allow_unused=True)
    return dx.add_(dx_after), [_sum(a, b) for a, b in zip(late, early, strict=True)]


def _backward_by_chunks(
    x: Tensor,
    kept: Sequence[Tensor],
    dy: Tensor,
    executor: LayerExecutor,
    rope: tuple[Tensor, Tensor],
    attention: AttentionRuntime,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor | None]]:
    """The same with the graph of one chunk at a time; the first half's projections are computed twice for it."""
    spec, chunk = executor.adapter.spec, executor.policy.chunk_tokens
    assert chunk is not None
    with torch.no_grad():
        q, k, v = run_rows(executor.before, (x, *rope), chunk)
        gathered = attention.exchange_in(q, k, v, spec)
        del q, k, v
        o, lse = kept if kept else attention.core_forward(gathered, spec)
        local_o = attention.exchange_out(o, spec)
    (dx_after, do), late = backward_rows(executor.after_graph, (x, local_o), (dy,), parameters, chunk, differentiable=2)
    del local_o
    wide = attention.core_backward(attention.exchange_out_backward(do, spec), gathered, o, lse, spec)
    dqkv = attention.exchange_in_backward(wide, spec, x.dtype)
    del do, wide, gathered, o
    (dx,), early = backward_rows(executor.before, (x, *rope), dqkv, parameters, chunk, differentiable=1)
    return dx.add_(dx_after), [_sum(a, b) for a, b in zip(late, early, strict=True)]


def run_rows(half: Callable[..., tuple[Tensor, ...]], rows: Sequence[Tensor], chunk: int | None) -> tuple[Tensor, ...]:
    """`half` of all rows, computed `chunk` rows at a time; every input and output has one row per token."""
    num_rows = rows[0].shape[0]
    if chunk is None or num_rows <= chunk:
        return half(*rows)
    outputs: tuple[Tensor, ...] = ()
    for start in range(0, num_rows, chunk):
        parts = half(*(t[start : start + chunk] for t in rows))
        outputs = outputs or tuple(part.new_empty((num_rows, *part.shape[1:])) for part in parts)
        for output, part in zip(outputs, parts, strict=True):
            output[start : start + chunk] = part
    return outputs


def backward_rows(
    half: Callable[..., tuple[Tensor, ...]],
    rows: Sequence[Tensor],
    upstream: Sequence[Tensor],
    parameters: Sequence[Tensor],
    chunk: int,
    *,
    differentiable: int,
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """Gradients of the first `differentiable` inputs, and of each parameter, recomputing `half` chunk by chunk.

    Parameter gradients are summed over chunks in float32 (float64 for float64) and returned in the parameter's dtype.
    """
    d_rows = tuple(torch.empty_like(t) for t in rows[:differentiable])
    totals: list[Tensor | None] = [None] * len(parameters)
    for start in range(0, rows[0].shape[0], chunk):
        part = slice(start, start + chunk)
        with torch.enable_grad():
            leaves = [t[part].detach().requires_grad_(index < differentiable) for index, t in enumerate(rows)]
            outputs = half(*leaves)
        inputs = [*leaves[:differentiable], *parameters]
        gradients = torch.autograd.grad(outputs, inputs, [t[part] for t in upstream], allow_unused=True)
        for whole, gradient in zip(d_rows, gradients, strict=False):
            whole[part] = gradient
        for index, gradient in enumerate(gradients[differentiable:]):
            if gradient is not None:
                totals[index] = _add_wide(totals[index], gradient)
    return d_rows, [None if t is None else t.to(p.dtype) for t, p in zip(totals, parameters, strict=True)]


def _add_wide(total: Tensor | None, part: Tensor) -> Tensor:
    wide = part.to(torch.promote_types(part.dtype, torch.float32))
    return wide if total is None else total.add_(wide)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
