"""The layer executor: one decoder layer as one autograd Function that keeps, moves or recomputes what its policy says.

Note: executor and FSDP2. The Function takes the layer's parameters as inputs and returns each gradient exactly once,
so FSDP2's hooks see an ordinary layer: parameters are gathered before forward and again before backward, and reduced
once afterwards. The parameter objects are the same in both passes (FSDP2 refills their storage), so a graph kept
inside the Function stays valid.

Note: halves. A layer is before_attention and after_attention (token-local) around the attention core. The token-local
parts run by pieces of rows (token_local.py); attention runs over all rows (attention_whole.py) or one chunk of queries at a time
(attention_chunked.py). With `policy.graph` both halves keep autograd's graph instead (kept_graph.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...errors import ConfigError
from ...parallel.experts.layer_order import LayerOrder
from ..activation_classes import ATTENTION_OUTPUT, RESIDUAL
from ..policy import MemoryPolicy
from . import attention_chunked as chunked
from . import attention_whole as whole
from .compiled_steps import CompiledSteps, Graphs
from .kept_graph import Halves
from .layer_pass import Gathered, Inputs, LayerRun, layer_run
from .read_order import backward_reads, recompute_reads
from .saved import Saved
from .tape import LayerContext, Reads, Tape
from .token_local import GradientSums, LayerSteps


class LayerExecutor:
    """Stands in for one decoder layer's `forward`: (x, what the micro-batch's layers share) -> layer output (T, M)."""

    def __init__(self, layer: nn.Module, adapter: LayerSteps, policy: MemoryPolicy, index: int, graphs: Graphs | None = None) -> None:
        """`graphs`: of the model, where the policy has its token-local steps compiled."""
        self._raw, self.policy, self.index = adapter, policy, index
        self.adapter = adapter if graphs is None else CompiledSteps(adapter, layer, graphs)
        self.feed_forward = adapter.feed_forward(self.adapter)

    def __call__(self, x: Tensor, context: LayerContext) -> Tensor:
        _check_autocast(x)
        parameters = self._raw.trained()
        # Without a backward (frozen layers below all that is trained) nothing may be left: nobody would clear it away.
        if context.tape is None or not torch.is_grad_enabled() or not (parameters or x.requires_grad):
            context.position.at("forward", self.index)
            run = self.run(x.shape[0], context, Saved(None))
            with context.attention.busy(), torch.no_grad():
                return _forward(run, lambda index: x[run.rows(index)], save=False)
        return _Layer.apply(x, self, context, *parameters)  # type: ignore[no-any-return]

    def use_adapters(self, use: bool) -> None:
        """Whether the passes that start from now on go through the adapters that matrices have."""
        self._raw.adapted = use

    @contextmanager
    def weights_apart(self, context: LayerContext) -> Iterator[None]:
        """The matrices' gradients of the pass inside wait where `context` says; compiled steps make them with the others."""
        if context.products is not None and self.adapter is self._raw:
            self._raw.products = context.products.of(self.index)
        try:
            yield
        finally:
            self._raw.products = None

    def use_expert_order(self, order: LayerOrder) -> None:
        """How chunks of rows to experts are taken in the passes that start from now on; nothing in a layer whose experts are all here."""
        self._raw.use_expert_order(order)

    def run(self, num_tokens: int, context: LayerContext, saved: Saved) -> LayerRun:
        """This layer on one rank's rows of a micro-batch."""
        rope = context.tables[self.adapter.rope_key]
        return layer_run(self.adapter, self.feed_forward, self.policy, context.attention, rope, saved, num_tokens)


def _check_autocast(x: Tensor) -> None:
    """ConfigError under torch.autocast: it would hold in forward and not in backward, where everything is recomputed."""
    if torch.is_autocast_enabled(x.device.type):
        raise ConfigError(
            "train.dtype",
            found=f"torch.autocast around the model, to {torch.get_autocast_dtype(x.device.type)}",
            expected="one precision for a layer's forward and for what backward makes again",
            hint="train.dtype=bfloat16 without torch.autocast: weights are gathered in it",
        )


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, executor: LayerExecutor, context: LayerContext, *parameters: Tensor) -> Tensor:
        tape = context.tape
        assert tape is not None
        context.position.at("forward", executor.index)
        ctx.executor, ctx.context, ctx.parameters, ctx.halves, ctx.run = executor, context, parameters, None, None
        with context.attention.busy():
            if executor.policy.graph:
                with executor.weights_apart(context):
                    ctx.halves = Halves(executor.adapter, x, context.tables[executor.adapter.rope_key], context.attention)
                assert ctx.halves.y is not None
                return ctx.halves.y.detach()  # type: ignore[no-any-return]
            run = ctx.run = executor.run(x.shape[0], context, tape.saved[executor.index])
            if tape.keeps_input(executor.index):
                run.save_input(x)
            y = _forward(run, lambda index: x[run.rows(index)], save=True)
        _record(tape, executor, context, run)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.context.position.at("backward", ctx.executor.index)
        sums = GradientSums(ctx.parameters)
        if ctx.halves is None:
            ctx.context.tape.restore_input(ctx.executor.index)
        with ctx.context.attention.busy(), ctx.executor.weights_apart(ctx.context):
            if ctx.halves is not None:
                halves, ctx.halves = ctx.halves, None
                dx = halves.backward(dy, sums)
            else:
                dx = _backward(ctx.run, ctx.executor.index, ctx.context.tape, dy, sums)
        return dx, None, None, *sums.result()


def _record(tape: Tape, executor: LayerExecutor, context: LayerContext, run: LayerRun) -> None:
    """Record on the tape how this layer's output is recomputed, for a segment whose inner inputs are not kept."""

    def recompute() -> Tensor:
        # Ranks of all groups meet where weights are gathered: that is not this group's time.
        run.saved.read_in(recompute_reads(run), lambda: tape.prefetch_above(executor.index))
        with context.gathered(executor.index), context.attention.busy(), torch.no_grad():
            y = _forward(run, run.input_rows, save=False)
        # What came from the host for it would stay until this layer's own backward.
        run.saved.release()
        return y

    reads = Reads(backward=lambda: backward_reads(run), recompute=lambda: recompute_reads(run))
    tape.record(executor.index, recompute=recompute, save_input=run.save_input, reads=reads)


def _forward(run: LayerRun, inputs: Inputs, *, save: bool) -> Tensor:
    """The layer's output (T, M). Without `save` nothing is left, and what is stored already is not recomputed."""
    y = Gathered(run)
    for index, o in _attention_rows(run, inputs, save=save):
        y.put(index, [run.after(index, inputs, o, save=save)])
    return y.whole[0]


def _attention_rows(run: LayerRun, inputs: Inputs, *, save: bool) -> Iterator[tuple[int, Tensor | None]]:
    """(piece, attention's output of its rows), None where the sum after it is stored as well."""
    if all(run.has(ATTENTION_OUTPUT, index) for index in run.indices):
        return _stored_rows(run)
    return (chunked if run.chunked else whole).attention_rows(run, inputs, save=save)


def _stored_rows(run: LayerRun) -> Iterator[tuple[int, Tensor | None]]:
    for index in run.indices:
        yield index, None if run.has(RESIDUAL, index) else run.get(ATTENTION_OUTPUT, index)[0]
        run.release()


def _backward(run: LayerRun, layer: int, tape: Tape, dy: Tensor, sums: GradientSums) -> Tensor:
    run.saved.read_in(backward_reads(run), lambda: tape.prefetch_below(layer))
    # Chunks of dx take the place of dy's, so it must be nobody else's.
    dy = dy if dy.is_contiguous() and dy._base is None else dy.clone(memory_format=torch.contiguous_format)
    dx = (chunked if run.chunked else whole).backward(run, dy, sums)
    tape.clear(layer)
    return dx
