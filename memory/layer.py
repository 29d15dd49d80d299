"""The layer executor: one decoder layer as one autograd Function that keeps or recomputes what its policy says.

Note: executor and FSDP2. The Function takes the layer's parameters as inputs and returns each gradient exactly once,
so FSDP2's hooks see an ordinary layer: parameters are gathered before forward and again before backward, and reduced
once afterwards. The parameter objects are the same in both passes (FSDP2 refills their storage), so a graph kept
inside the Function stays valid.

Note: two halves. A layer is before_attention and after_attention (token-local) around the attention core. Backward runs
the second half, then attention, then the first half, and frees each half before the next starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .config import Keep, MemoryConfig

QKV = tuple[Tensor, Tensor, Tensor]


class LayerHalves(Protocol):
    """What a family's adapter provides (training/families)."""

    spec: Any
    rope_key: str | None

    def before_attention(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> QKV: ...
    def after_attention(self, x: Tensor, o: Tensor) -> Tensor: ...


class AttentionRuntime(Protocol):
    """The attention of one micro-batch (parallel/sequence/runtime.py)."""

    def exchange_in(self, q: Tensor, k: Tensor, v: Tensor, spec: Any) -> QKV: ...
    def exchange_out(self, o: Tensor, spec: Any) -> Tensor: ...
    def exchange_out_backward(self, do: Tensor, spec: Any) -> Tensor: ...
    def exchange_in_backward(self, gradients: QKV, spec: Any, dtype: object) -> QKV: ...
    def core_forward(self, qkv: QKV, spec: Any) -> tuple[Tensor, Tensor]: ...
    def core_backward(self, do: Tensor, qkv: QKV, o: Tensor, lse: Tensor, spec: Any) -> QKV: ...


class LayerExecutor:
    """Stands in for one decoder layer's `forward`: (x, rope tables, attention) -> layer output (T, M)."""

    def __init__(self, layer: nn.Module, adapter: LayerHalves, policy: MemoryConfig) -> None:
        self._layer, self.adapter, self.policy = layer, adapter, policy

    def __call__(self, x: Tensor, tables: Mapping[str | None, tuple[Tensor, Tensor]], attention: AttentionRuntime) -> Tensor:
        rope = tables[self.adapter.rope_key]
        if not torch.is_grad_enabled():
            return self.run(x, rope, attention)
        parameters = [p for p in self._layer.parameters() if p.requires_grad]
        return _Layer.apply(x, self, rope, attention, *parameters)  # type: ignore[no-any-return]

    def run(self, x: Tensor, rope: tuple[Tensor, Tensor], attention: AttentionRuntime) -> Tensor:
        """Forward alone, nothing kept."""
        spec = self.adapter.spec
        qkv = attention.exchange_in(*self.adapter.before_attention(x, rope), spec)
        o, _ = attention.core_forward(qkv, spec)
        del qkv
        return self.adapter.after_attention(x, attention.exchange_out(o, spec))


class _Halves:
    """The graphs of both halves of one layer, and what attention's backward needs."""

    __slots__ = ("gathered", "lse", "o", "o_leaf", "projected", "x_after", "x_before", "y")

    def __init__(self, executor: LayerExecutor, x: Tensor, rope: tuple[Tensor, Tensor], attention: AttentionRuntime, kept: tuple[Tensor, Tensor] | None):
        """Run the layer with a graph for each half; `kept` is (o, lse) between the exchanges where attention need not run again."""
        adapter, spec = executor.adapter, executor.adapter.spec
        with torch.enable_grad():
            self.x_before = x.detach().requires_grad_()
            self.projected = adapter.before_attention(self.x_before, rope)
        with torch.no_grad():
            self.gathered = attention.exchange_in(*(t.detach() for t in self.projected), spec)
            self.o, self.lse = attention.core_forward(self.gathered, spec) if kept is None else kept
            o = attention.exchange_out(self.o, spec)
        with torch.enable_grad():
            self.x_after, self.o_leaf = x.detach().requires_grad_(), o.detach().requires_grad_()
            self.y: Tensor | None = adapter.after_attention(self.x_after, self.o_leaf)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, executor: LayerExecutor, rope: tuple[Tensor, Tensor], attention: AttentionRuntime, *parameters: Tensor) -> Tensor:
        ctx.executor, ctx.rope, ctx.attention, ctx.parameters, ctx.halves = executor, rope, attention, parameters, None
        policy, spec = executor.policy, executor.adapter.spec
        if policy.activations is Keep.KEEP:
            ctx.halves = _Halves(executor, x, rope, attention, None)
            assert ctx.halves.y is not None
            return ctx.halves.y.detach()  # type: ignore[no-any-return]
        qkv = attention.exchange_in(*executor.adapter.before_attention(x, rope), spec)
        o, lse = attention.core_forward(qkv, spec)
        del qkv
        ctx.save_for_backward(x, *((o, lse) if policy.attention_output is Keep.KEEP else ()))
        return executor.adapter.after_attention(x, attention.exchange_out(o, spec))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        halves = ctx.halves
        ctx.halves = None
        if halves is None:
            x, *kept = ctx.saved_tensors
            halves = _Halves(ctx.executor, x, ctx.rope, ctx.attention, tuple(kept) if kept else None)
        dx, gradients = _backward(halves, dy, ctx.executor.adapter.spec, ctx.attention, ctx.parameters)
        return dx, None, None, None, *gradients


def _backward(
    halves: _Halves, dy: Tensor, spec: Any, attention: AttentionRuntime, parameters: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """dx and each parameter's gradient."""
    assert halves.y is not None
    dx_after, do, *late = torch.autograd.grad(halves.y, [halves.x_after, halves.o_leaf, *parameters], dy, allow_unused=True)
    halves.y = None
    do = attention.exchange_out_backward(do, spec)
    wide = attention.core_backward(do, halves.gathered, halves.o, halves.lse, spec)
    dqkv = attention.exchange_in_backward(wide, spec, halves.projected[0].dtype)
    del do, wide
    dx, *early = torch.autograd.grad(halves.projected, [halves.x_before, *parameters], dqkv, allow_unused=True)
    return dx.add_(dx_after), [_sum(a, b) for a, b in zip(late, early, strict=True)]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
