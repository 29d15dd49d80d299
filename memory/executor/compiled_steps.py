"""The token-local steps of layers as compiled graphs: traced once for all layers that are built alike, weights as arguments.

Note: what is compiled. A step's forward is one graph. Its backward, with what it recomputes for itself, is another: a step is
differentiated while it is traced (make_fx), so the compiler sees recomputation and gradients together, drops products whose values
nobody needs, and keeps nothing between two graphs. Both are plain functions of tensors: what FSDP2 does to modules, hooks and
storages in between is none of the compiler's business. Where autograd's own graph is kept (kept_graph.py) the forward's graph is
compiled together with its backward, as torch.compile does for any function.

Note: lengths. The number of tokens is a symbol in the trace and marked as dynamic in every call, so pieces of any length share a
graph. torch makes constants of 0 and 1 wherever they come up: pieces that short run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...parallel.experts.layer_order import LayerOrder
from ..heads import ALL_HEADS, Heads
from .compiled_graph import LEAST_ROWS, Graph, Traced, refusal, trace
from .token_local import FeedForward, GradientSums, LayerSteps, Rope, Step
from .weight_products import LayerProducts


class Graphs:
    """The compiled graphs of one model, by what they compute. Layers that are built alike find the same."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._graphs: dict[Hashable, Graph] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def find(self, name: str, key: Hashable, traced: Callable[[], Traced]) -> Graph:
        """The graph of `key`; compiled of what `traced` gives if there is none yet."""
        if key not in self._graphs:
            self._graphs[key] = Graph(name, traced(), self._backend)
        return self._graphs[key]


@dataclass(frozen=True, slots=True)
class _Weights:
    """A layer's parameters and buffers as they are now."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]

    @property
    def trained(self) -> tuple[int, ...]:
        return tuple(index for index, tensor in enumerate(self.tensors) if tensor.requires_grad)

    @property
    def plain(self) -> list[Tensor]:
        """Outside any graph."""
        return [tensor.detach() for tensor in self.tensors]


class CompiledSteps:
    """Stands in for one layer's adapter: the same steps, through compiled graphs that it shares with layers built alike.

    Layers are alike whose adapters are of one class and whose weights have the same names, shapes and dtypes: within a model they
    differ in their attention's window and rotary table only, which are no part of any step.
    """

    def __init__(self, adapter: LayerSteps, layer: nn.Module, graphs: Graphs) -> None:
        self._adapter, self._layer, self._graphs = adapter, layer, graphs
        self.spec, self.rope_key, self.traceable = adapter.spec, adapter.rope_key, adapter.traceable
        names = [name for named in (layer.named_parameters(), layer.named_buffers()) for name, _ in named]
        self._places = [(name, layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]

    @property
    def sinks(self) -> Tensor | None:
        """Implements `LayerSteps.sinks`: they are attention's, and no step reads them."""
        return self._adapter.sinks

    products: LayerProducts | None = None
    """Implements `LayerSteps.products`: a compiled backward makes all gradients at once."""

    @property
    def adapted(self) -> bool:
        """Implements `LayerSteps.adapted`."""
        return self._adapter.adapted

    @adapted.setter
    def adapted(self, use: bool) -> None:
        self._adapter.adapted = use

    def before_attention(self, x: Tensor, rope: Rope, heads: Heads = ALL_HEADS, *, graph: bool = False) -> tuple[Tensor, ...]:
        return self._forward(Step("before_attention", heads), (x, *rope))

    def after_attention(self, x: Tensor, o: Tensor) -> Tensor:
        if not self._adapter.traceable:
            return self._adapter.after_attention(x, o)
        return self._forward(Step("after_attention"), (x, o))[0]

    def residual(self, x: Tensor, o: Tensor, graph: bool = False) -> Tensor:
        return self._forward(Step("residual"), (x, o))[0]

    def use_expert_order(self, order: LayerOrder) -> None:
        """Implements `LayerSteps.use_expert_order`."""
        self._adapter.use_expert_order(order)

    def feed_forward(self, steps: LayerSteps) -> FeedForward:
        """Implements `LayerSteps.feed_forward`."""
        return self._adapter.feed_forward(steps)

    def trained(self) -> list[Tensor]:
        """Implements `LayerSteps.trained`."""
        return self._adapter.trained()

    def run_step(self, step: Step, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Implements `LayerSteps.run_step`."""
        return self._forward(step, tuple(tensors))

    def pull_back(
        self, step: Step, inputs: Sequence[Tensor], constants: Sequence[Tensor], upstream: Sequence[Tensor], sums: GradientSums
    ) -> tuple[Tensor, ...]:
        """Implements `LayerSteps.pull_back`."""
        if inputs[0].shape[0] < LEAST_ROWS:
            return self._adapter.pull_back(step, inputs, constants, upstream, sums)
        weights, rows = self._weights(), [_alone(tensor) for tensor in (*inputs, *constants, *upstream)]
        assert len(weights.trained) == len(sums.parameters), "gradients are those of the layer's own weights"

        def traced() -> Traced:
            function = _Backward(self._layer, self._adapter, step, weights, len(inputs), len(constants))
            return trace(str(step), function, weights.plain, rows, function.reached)

        graph = self._graphs.find(str(step), self._key(step, "backward", weights, rows), traced)
        with torch.no_grad():
            gradients = graph(weights.plain, rows)
        for index, part in zip(graph.reached, gradients[len(inputs) :], strict=True):
            sums.add(index, part)
        return gradients[: len(inputs)]

    def _forward(self, step: Step, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if rows[0].shape[0] < LEAST_ROWS:
            return step.run(self._adapter, rows)
        weights, plain = self._weights(), [_alone(row) for row in rows]

        def traced() -> Traced:
            return trace(str(step), _Forward(self._layer, self._adapter, step, weights), weights.plain, plain, [])

        # With gradients asked for, autograd's graph is the compiled one, and arguments are passed as they are.
        kept = torch.is_grad_enabled()
        graph = self._graphs.find(str(step), self._key(step, "kept" if kept else "forward", weights, rows), traced)
        return graph(weights.tensors, rows) if kept else graph(weights.plain, plain)

    def _weights(self) -> _Weights:
        tensors = tuple(getattr(owner, attribute) for _, owner, attribute in self._places)
        # Parts of tensors are of kinds of their own, whichever engine they are from.
        if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
            raise refusal("a layer", "its weights are sharded: they are to be whole while it runs")
        return _Weights(tuple(name for name, _, _ in self._places), tensors)

    def _key(self, step: Step, which: str, weights: _Weights, rows: Sequence[Tensor]) -> Hashable:
        """All that a trace depends on."""
        shapes = tuple((name, t.shape, t.dtype) for name, t in zip(weights.names, weights.tensors, strict=True))
        lines = tuple((t.shape[1:], t.dtype) for t in rows)
        return type(self._adapter), self._adapter.adapted, step, which, shapes, weights.trained, lines, rows[0].device


def _alone(t: Tensor) -> Tensor:
    """`t` outside any graph, contiguous, at the start of a storage: rows somewhere in others would be one more kind of argument."""
    t = t.detach().contiguous()
    if t.storage_offset() == 0:
        return t
    start = t.storage_offset() * t.element_size()
    return t.new_empty(0).set_(t.untyped_storage()[start : start + t.nbytes], 0, t.shape, t.stride())  # type: ignore[call-overload,no-any-return]


class _Holder(nn.Module):
    """A layer with other weights in place of its own, inside `forward` only."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        return function(*tensors)


class _Forward:
    """A step as a function of (weights, rows)."""

    graph = False

    def __init__(self, layer: nn.Module, adapter: LayerSteps, step: Step, weights: _Weights) -> None:
        self._holder, self._adapter, self._step, self._weights = _Holder(layer), adapter, step, weights

    def __call__(self, weights: Sequence[Tensor], rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        named = {f"layer.{name}": weight for name, weight in zip(self._weights.names, weights, strict=True)}
        outputs: tuple[Tensor, ...] = functional_call(self._holder, named, (self._run, *rows))
        return outputs

    def _run(self, *rows: Tensor) -> tuple[Tensor, ...]:
        return self._step.run(self._adapter, rows, graph=self.graph)


class _Backward(_Forward):
    """A step's gradients as a function of (weights, [inputs, constants, upstream]): of the inputs, then of the weights in `reached`."""

    graph = True

    def __init__(self, layer: nn.Module, adapter: LayerSteps, step: Step, weights: _Weights, num_inputs: int, num_constants: int) -> None:
        super().__init__(layer, adapter, step, weights)
        self._inputs, self._constants = num_inputs, num_constants
        self.reached: list[int] = []
        """Filled by the call: which of the trained weights have gradients from this step."""

    def __call__(self, weights: Sequence[Tensor], rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        count, behind, trained = self._inputs, self._inputs + self._constants, self._weights.trained
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in rows[:count]]
            own = [t.detach().requires_grad_(index in trained) for index, t in enumerate(weights)]
            outputs = super().__call__(own, [*leaves, *rows[count:behind]])
        gradients = torch.autograd.grad(outputs, [*leaves, *(own[index] for index in trained)], rows[behind:], allow_unused=True)
        self.reached[:] = [index for index, part in enumerate(gradients[count:]) if part is not None]
        return tuple(part for index, part in enumerate(gradients) if index < count or part is not None)  # type: ignore[misc]
