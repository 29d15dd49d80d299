"""One compiled graph: traced with a symbol for the number of tokens, checked to hold for any, compiled at its first call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import CodeGen, GraphModule

from ...errors import ConfigError

KEY = "memory.compile"
LEAST_ROWS = 2
"""Least rows of a piece that goes through a compiled graph: torch makes constants of 0 and 1."""
_LENGTHS = (2, 3, 1000, (1 << 20) + 1, 1 << 30)
"""Numbers of tokens that must take the same way through a step as the number it was traced with."""

Function = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]
"""A function of (weights, rows)."""


@dataclass(frozen=True, slots=True)
class Traced:
    """A function of tensors as a graph of torch's own operations."""

    module: GraphModule
    used: tuple[int, ...]
    """Which of the arguments (weights, then rows) it takes."""
    reached: tuple[int, ...]
    """Which of the trained weights it makes gradients of."""


def check_compiler(device: torch.device) -> None:
    """ConfigError where this machine cannot compile what torch.compile writes for the device."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        available, missing, hint = has_triton(), "no Triton that works with this GPU", "pip install triton"
    else:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        missing, hint = "no C++ compiler", "install g++, or name a compiler in the environment variable CXX"
        try:
            available = bool(get_cpp_compiler())
        except InvalidCxxCompiler:
            available = False
    if not available:
        raise ConfigError(
            KEY, found=f"true, and {missing}", expected="a compiler for what torch.compile writes", hint=f"{hint}; or {KEY}=false"
        )


def refusal(name: str, reason: object) -> ConfigError:
    """The error for what cannot be compiled."""
    return ConfigError(
        KEY, found=f"true, and {name} cannot be compiled: {reason}", expected="steps that torch.compile takes", hint=f"{KEY}=false"
    )


class Graph:
    """One compiled function of tensors."""

    def __init__(self, name: str, traced: Traced, backend: str) -> None:
        # torch._dynamo takes a second to import: only who compiles pays for it.
        from torch._dynamo import mark_dynamic
        from torch._dynamo.exc import TorchDynamoException
        from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

        self._name, self._used, self._mark = name, traced.used, mark_dynamic
        self.reached = traced.reached
        self._failures = TorchDynamoException, ConstraintViolationError
        self._function = torch.compile(traced.module, fullgraph=True, backend=backend)

    def __call__(self, weights: Sequence[Tensor], rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """`rows`: tensors of as many tokens each, LEAST_ROWS at least."""
        for tensor in rows:
            self._mark(tensor, 0)
        arguments = [*weights, *rows]
        try:
            return tuple(self._function(*(arguments[index] for index in self._used)))
        except self._failures as error:
            raise refusal(self._name, error) from error


def trace(name: str, function: Function, weights: Sequence[Tensor], rows: Sequence[Tensor], reached: Sequence[int]) -> Traced:
    """`function` for any number of tokens; ConfigError where it depends on the number. Computes nothing.

    `reached` is read when the trace is done.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    count, length = len(weights), _length_unlike(weights, rows)
    examples = [torch.empty((length, *t.shape[1:]), dtype=t.dtype, device=t.device) for t in rows]

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        return function(tensors[:count], tensors[count:])

    try:
        with torch.no_grad():
            module = make_fx(flat, tracing_mode="symbolic")(*weights, *examples)
    except Exception as error:  # nothing is computed here: whatever it is, the step is such that no graph can be made of it
        raise refusal(name, str(error).partition("\n")[0]) from error
    _check_length(name, module, count)
    places = [node for node in module.graph.nodes if node.op == "placeholder"]
    module.graph.eliminate_dead_code()
    used = tuple(index for index, node in enumerate(places) if node.users)
    for node in places:
        if not node.users:
            module.graph.erase_node(node)
    module.graph.set_codegen(CodeGen())
    module.recompile()
    return Traced(module, used, tuple(reached))


def _length_unlike(weights: Sequence[Tensor], rows: Sequence[Tensor]) -> int:
    """A number that no other dimension has: equal sizes would get one symbol."""
    taken = {size for tensor in weights for size in tensor.shape} | {size for tensor in rows for size in tensor.shape[1:]}
    return next(length for length in range(61, 62 + len(taken)) if length not in taken)


def _check_length(name: str, module: GraphModule, first: int) -> None:
    """The trace took no turn that another number of tokens would not have taken."""
    place = [node for node in module.graph.nodes if node.op == "placeholder"][first]
    length = place.meta["val"].shape[0]
    if isinstance(length, int):
        raise refusal(name, "it depends on the number of tokens")
    environment, symbol = length.node.shape_env, length.node.expr
    for guard in environment.guards:
        if symbol not in guard.expr.free_symbols:
            continue
        hints = {other: environment.backed_var_to_val[other] for other in guard.expr.free_symbols if other != symbol}
        if not all(guard.expr.subs({**hints, symbol: value}) for value in _LENGTHS):
            raise refusal(name, f"it depends on the number of tokens ({guard.expr})")
