"""Gradients of weights apart from those of inputs: a backward pass leaves the operands of every product's dW, which is made later.

A pipeline that makes gradients of inputs first, and those of weights where it would wait otherwise (zero bubble, arXiv 2401.10241),
has two backward passes of a micro-batch. The first one computes everything but the products dy^T x of the layers' matrices; x (T, I)
and dy (T, M) of each wait here for the second. Gradients of vectors, of experts and of what is behind the last layer are small, or
come with what the first pass makes in any case: they are not put off.

Note: whose memory it is. Executors write gradients over others and give host buffers back, so an operand that is a step's own argument
is copied. What else were overwritten would be found: operands carry torch's version of their memory, and the second pass compares it.

Note: mirrored in estimate/footprint/weight_operands.py (bytes that wait).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Rows = tuple[slice, ...] | None
"""Runs of rows of a weight that a product is made with; None: all of them."""


@dataclass(slots=True)
class _Operands:
    """One product: dW of `rows` of a weight is dy^T x."""

    weight: Tensor
    rows: Rows
    x: Tensor
    dy: Tensor
    versions: tuple[int, int]

    @classmethod
    def of(cls, weight: Tensor, rows: Rows, x: Tensor, dy: Tensor) -> _Operands:
        return cls(weight, rows, x, dy, (x._version, dy._version))

    def replace(self, owned: Callable[[Tensor], Tensor]) -> None:
        """Put others in place of the operands, equal to them."""
        self.x, self.dy = owned(self.x), owned(self.dy)
        self.versions = (self.x._version, self.dy._version)

    def gradient(self) -> Tensor:
        """dW of the rows. RuntimeError where an operand is no longer what it was."""
        if (self.x._version, self.dy._version) != self.versions:
            raise RuntimeError("an operand of a weight's gradient was overwritten before it was used: a fault of the executor")
        return self.dy.T @ self.x


class LayerProducts:
    """Operands of one layer's weight gradients in one micro-batch."""

    def __init__(self) -> None:
        self._operands: dict[int, list[_Operands]] = {}
        self._new: list[_Operands] = []

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, *, values: bool) -> Tensor:
        """x (T, I) times `rows` of `weight` (M, I), plus `bias`, (T, M): what is missing of the weight's gradient waits here.

        Without `values` the result may hold anything.
        """
        return _Product.apply(x, weight, bias, rows, self, values)  # type: ignore[no-any-return]

    def add(self, weight: Tensor, rows: Rows, x: Tensor, dy: Tensor) -> None:
        """Keep the operands of one product until `gradients`."""
        operands = _Operands.of(weight, rows, x, dy)
        self._operands.setdefault(id(weight), []).append(operands)
        self._new.append(operands)

    def own(self, arguments: Iterable[Tensor]) -> None:
        """What came since the last call, and is memory of one of `arguments`, gets memory of its own."""
        borrowed = {_memory(argument) for argument in arguments}
        copies: dict[tuple[Any, ...], Tensor] = {}

        def owned(t: Tensor) -> Tensor:
            if _memory(t) not in borrowed:
                return t
            key = (_memory(t), t.storage_offset(), t.shape, t.stride())
            if key not in copies:
                copies[key] = t.clone(memory_format=torch.contiguous_format)
            return copies[key]

        for operands in self._new:
            operands.replace(owned)
        self._new.clear()

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(weight, its gradient in its own dtype), summed in float32 at least; operands are gone as they are used."""
        self._new.clear()
        while self._operands:
            _, operands = self._operands.popitem()
            weight = operands[0].weight
            yield weight, _summed(weight, operands).to(weight.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that waits: operands that several products share count once."""
        each = [t for operands in self._operands.values() for one in operands for t in (one.x, one.dy)]
        return sum({_memory(t): t.untyped_storage().nbytes() for t in each}.values())


class WeightProducts:
    """Operands of the weight gradients of one micro-batch's layers."""

    def __init__(self) -> None:
        self._layers: dict[int, LayerProducts] = {}

    def of(self, layer: int) -> LayerProducts:
        """Those of one layer."""
        return self._layers.setdefault(layer, LayerProducts())

    def add_gradients(self, layer: int) -> None:
        """Add the layer's gradients to its weights' `grad`, as autograd does."""
        for weight, gradient in self.of(layer).gradients():
            if weight.grad is None:
                weight.grad = gradient
            else:
                weight.grad.add_(gradient)

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that waits."""
        return sum(layer.num_bytes for layer in self._layers.values())


def _memory(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _summed(weight: Tensor, operands: list[_Operands]) -> Tensor:
    """The sum over all pieces of rows (T) and, where products are of some heads, all rows of the weight (M)."""
    if len(operands) == 1 and operands[0].rows is None:
        return operands.pop().gradient()
    wide = torch.promote_types(operands[0].x.dtype, torch.float32)
    total = torch.zeros(weight.shape, dtype=wide, device=operands[0].x.device)
    while operands:
        one = operands.pop()
        part = one.gradient()
        runs = one.rows or (slice(0, weight.shape[0]),)
        for run, own in zip(runs, part.split([run.stop - run.start for run in runs]), strict=True):
            total[run] += own
    return total


class _Product(torch.autograd.Function):
    """x W^T + b whose backward makes the gradients of x and b, and leaves the operands of W's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, products: LayerProducts, values: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows, ctx.products = rows, products
        used = _used(weight, rows)
        return F.linear(x, used, bias) if values else x.new_zeros(()).expand(x.shape[0], used.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if needs_weight:
            ctx.products.add(weight, ctx.rows, x, dy)
        return dy @ _used(weight, ctx.rows) if needs_x else None, None, dy.sum(0) if needs_bias else None, None, None, None


def _used(weight: Tensor, rows: Rows) -> Tensor:
    if rows is None:
        return weight
    return weight[rows[0]] if len(rows) == 1 else torch.cat([weight[run] for run in rows])
