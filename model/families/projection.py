"""The matrix products of a layer: each goes through a `Projection`, the one place that knows what a product is made of.

Note: why modules are read and not called. Backward computes gradients of products whose values it does not make again, and of some
heads' rows only, so a product is a function of weight, bias and the factors of an adapter (model/adapters/lora.py). Whatever else a
module does (another library's adapter, a quantised weight, a hook) would be missing from the gradient, and nothing would say so.
Such modules are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...errors import ConfigError
from ...memory.executor.weight_products import LayerProducts
from ..adapters.dora import DoraProduct
from ..adapters.lora import Factors, LoraFactors, LoraProduct
from ..adapters.names import FACTORS
from ..adapters.quantized import PackedMatrix, QuantizedLinear, packed_product

NO_MODULES: Mapping[str, str] = MappingProxyType({})
Rows = tuple[slice, ...] | None
"""Runs of rows of a weight (M, I), which are columns of its product; None: all of them. No list: it would wait for the device."""


@dataclass(frozen=True, slots=True)
class Projection:
    """One product x W^T + b, or x (W + s B A)^T + b: W (M, I), packed or not, b (M,) or None, as they are in this pass."""

    weight: Tensor | PackedMatrix
    bias: Tensor | None
    factors: Factors | None = None
    """A (rank, I), B (M, rank) and their scaling s, where the matrix has an adapter."""
    products: LayerProducts | None = None
    """Where operands of the weight's gradient wait; None: backward makes it."""

    @property
    def num_rows(self) -> int:
        """Rows of W, packed or not."""
        return (self.weight.packed if isinstance(self.weight, PackedMatrix) else self.weight).shape[0]

    def __call__(self, x: Tensor, *, graph: bool = False, rows: Rows = None) -> Tensor:
        """Apply it: (T, I) -> (T, M), by the weight's `rows`. `graph`: values may be anything, only gradients are wanted."""
        weight, bias, factors = self.weight, self.bias, self.factors
        if self.products is not None and factors is None and isinstance(weight, Tensor) and weight.requires_grad:
            return self.products.product(x, weight, bias if bias is None or rows is None else _runs(bias, rows), rows, values=not graph)
        if rows is not None:
            packed = isinstance(weight, PackedMatrix)
            weight = weight._replace(packed=_runs(weight.packed, rows)) if packed else _runs(weight, rows)
            bias = None if bias is None else _runs(bias, rows)
            factors = None if factors is None else _of_rows(factors, rows)
        if isinstance(weight, PackedMatrix):
            return packed_product(x, weight, bias, factors, values=not graph)
        if factors is not None:
            a, b, scaling, magnitude = factors
            if magnitude is not None:
                return DoraProduct.apply(x, weight, bias, a, b, magnitude, scaling, not graph)  # type: ignore[no-any-return]
            return LoraProduct.apply(x, weight, bias, a, b, scaling, not graph)  # type: ignore[no-any-return]
        return LinearGraph.apply(x, weight, bias) if graph else F.linear(x, weight, bias)  # type: ignore[no-any-return]


def _runs(t: Tensor, rows: tuple[slice, ...]) -> Tensor:
    """The rows of (M, ...): a view where they are one run."""
    return t[rows[0]] if len(rows) == 1 else torch.cat([t[run] for run in rows])


def _of_rows(factors: Factors, rows: tuple[slice, ...]) -> Factors:
    """The factors of these rows of their matrix."""
    magnitude = None if factors.magnitude is None else _runs(factors.magnitude, rows)
    return factors._replace(b=_runs(factors.b, rows), magnitude=magnitude)


def projection_of(layer: nn.Module, name: str, *, adapted: bool = True, products: LayerProducts | None = None) -> Projection:
    """The projection at `name` in `layer`. Read anew for every product: FSDP2 and compiled steps put other tensors in place.

    `adapted` False: without its adapter, if it has one. `products`: as the field. ConfigError unless the module there is torch's own
    Linear, or one of ours.
    """
    module = layer.get_submodule(name)
    beside = module._modules.get(FACTORS) if adapted else None
    factors = beside.factors() if isinstance(beside, LoraFactors) else None
    if isinstance(module, QuantizedLinear):
        return Projection(module.matrix(), module.bias, factors)  # type: ignore[arg-type]
    # A subclass may compute anything in its forward, so the class itself is asked for.
    if type(module) is not nn.Linear:
        raise _refusal(name, f"a {type(module).__qualname__}", "gradients of anything it adds would be lost")
    return Projection(module.weight, module.bias, factors, products)


def check_modules(
    layer: nn.Module,
    projections: tuple[str, ...],
    norms: tuple[str, ...],
    *,
    own: Mapping[str, str] = NO_MODULES,
    parameters: tuple[str, ...] = (),
) -> None:
    """Raise ConfigError unless every parameter of a layer is one of a projection that can be read or of a norm, which is called.

    `own`: modules of the family's own classes that are read as projections are, each with the name of its class. `parameters`: those
    that are read by themselves.
    """
    modules, named = (*projections, *norms, *own), dict(layer.named_parameters())
    for name in modules:
        _check_present(layer, name)
    for name in parameters:
        if name not in named:
            raise _refusal(name, "no such parameter", "the layer would be computed without it")
    for name in projections:
        projection_of(layer, name)
        _check_plain(layer.get_submodule(name), name)
        for below, child in layer.get_submodule(name).named_children():
            if not isinstance(child, LoraFactors):
                raise _refusal(f"{name}.{below}", f"a {type(child).__qualname__}", "gradients of anything it adds would be lost")
    for name, expected in own.items():
        _check_own(layer.get_submodule(name), name, expected)
    for name in named:
        if name not in parameters and not any(name.startswith(f"{owner}.") for owner in modules):
            raise _refusal(name, "a parameter that no step of a layer reads", "its gradient would be lost")


def _check_own(module: nn.Module, name: str, expected: str) -> None:
    """Refuse a module of another class than Hugging Face's `expected`, which may compute anything, and one with hooks."""
    if type(module).__qualname__ != expected or not type(module).__module__.startswith("transformers.models."):
        raise _refusal(name, f"a {type(module).__qualname__}, not transformers' {expected}", "gradients of anything it adds would be lost")
    _check_plain(module, name)


def _check_plain(module: nn.Module, name: str) -> None:
    """Refuse a module with hooks before training. An engine's hooks come later, and it gathers whole layers."""
    if module._forward_pre_hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise _refusal(name, f"a {type(module).__qualname__} with hooks", "they would not run")
    if "forward" in vars(module):
        raise _refusal(name, f"a {type(module).__qualname__} with a forward of its own", "it would not run")


def _check_present(layer: nn.Module, name: str) -> None:
    try:
        layer.get_submodule(name)
    except AttributeError as error:
        raise _refusal(name, "no such module", "the layer would be computed without it") from error


def _refusal(name: str, actual: str, otherwise: str) -> ConfigError:
    return ConfigError(
        "model",
        found=f"{actual} at {name} of a decoder layer",
        expected=f"the family's own modules, projections of class torch.nn.Linear without hooks: {otherwise}",
        hint="a model without adapters, quantised or parametrised weights: merge them into plain weights first, or adapter.init=DIRECTORY",
    )


class LinearGraph(torch.autograd.Function):
    """The backward of x W^T + b for x (T, I), W (M, I), b (M,) or None; forward returns no values, and takes no memory.

    Where the product's gradient needs not the product (it goes into a sum, a rotation, or was stored), a third of a
    recomputation's matrix products need not be made.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_zeros(()).expand(x.shape[0], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return dy @ weight if needs_x else None, dy.T @ x if needs_weight else None, dy.sum(0) if needs_bias else None
