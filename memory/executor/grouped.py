"""Products of rows with the weights of the expert each row goes to; rows lie expert after expert.

Note: two ways. On CPU a product per expert is the fastest, in float32 and float64 alike; on CUDA, in bfloat16, one kernel makes all of
them (`torch._grouped_mm`, **not yet run on a GPU**), and no count has to be known on the host for it. Nothing is padded to a capacity
and nothing is dropped: an expert with every row and an expert with none are both a slice.

Legend: E experts, R rows, I inputs, O outputs. Weights are (E, O, I), as those of a Linear, or (E, I, O) where `transposed`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNED_BYTES = 16
"""Strides that the grouped kernel takes are multiples of this."""


def count_each(values: Tensor, size: int) -> Tensor:
    """How often each number below `size` is in `values` (N,) int64: (size,) int64. On CUDA `bincount` waits to see the largest."""
    return values.new_zeros(size).index_add_(0, values, values.new_ones(()).expand(len(values)))


@dataclass(frozen=True, slots=True)
class Groups:
    """How many rows each expert has: `counts` (E,) int64 on the rows' device."""

    counts: Tensor

    def slices(self) -> Iterator[tuple[int, slice]]:
        """Each expert with rows, and those rows. Waits for the device."""
        start = 0
        for expert, count in enumerate(self.counts.tolist()):
            if count:
                yield expert, slice(start, start + count)
            start += count

    def experts(self, num_rows: int) -> Tensor:
        """The expert of each row (R,); `num_rows` is R, which the host would wait for otherwise."""
        return torch.repeat_interleave(torch.arange(len(self.counts), device=self.counts.device), self.counts, output_size=num_rows)

    @property
    def ends(self) -> Tensor:
        """One past each expert's last row (E,) int32."""
        return self.counts.cumsum(0).to(torch.int32)


@dataclass(frozen=True, slots=True)
class GroupedProjection:
    """One product per expert: weight (E, O, I), or (E, I, O) where `transposed`; bias (E, O) or None."""

    weight: Tensor
    bias: Tensor | None = None
    transposed: bool = False

    @property
    def matrices(self) -> Tensor:
        """The weights as (E, O, I)."""
        return self.weight.transpose(1, 2) if self.transposed else self.weight

    def __call__(self, x: Tensor, groups: Groups) -> Tensor:
        """Project rows x (R, I) -> (R, O)."""
        out = _times(x, self.matrices.transpose(1, 2), groups)
        return out if self.bias is None else out.add_(self.bias[groups.experts(len(out))])

    def input_gradient(self, dy: Tensor, groups: Groups) -> Tensor:
        """Gradient of the inputs (R, I), given that of the outputs (R, O)."""
        return _times(dy, self.matrices, groups)

    def weight_gradient(self, x: Tensor, dy: Tensor, groups: Groups, out: Tensor | None = None) -> Tensor:
        """Gradient of the weights of the experts of `groups` in their own layout, from inputs x (R, I) and the outputs' gradient dy (R, O).

        Written to `out` where that is given, which is zero: experts without rows are not written.
        """
        left, right = (x, dy) if self.transposed else (dy, x)
        # Not without rows: as in `_times`, the kernel is not asked for nothing.
        if len(x) and _has_kernel(left) and _has_kernel(right):
            made = torch._grouped_mm(left.t(), right, offs=groups.ends)
            return made if out is None else out.copy_(made)
        total = _zeros_of(self.weight, groups) if out is None else out
        for expert, rows in groups.slices() if len(x) else ():
            torch.mm(left[rows].t(), right[rows], out=total[expert])
        return total

    def bias_gradient(self, dy: Tensor, groups: Groups, out: Tensor | None = None) -> Tensor:
        """Gradient of the biases of the experts of `groups` (E, O); `out` as in `weight_gradient`."""
        assert self.bias is not None
        total = _zeros_of(self.bias, groups) if out is None else out
        for expert, rows in groups.slices() if len(dy) else ():
            total[expert] = dy[rows].sum(0)
        return total


def _zeros_of(parameter: Tensor, groups: Groups) -> Tensor:
    """Zeros as a parameter of so many experts."""
    return torch.zeros_like(parameter[: len(groups.counts)])


def _times(x: Tensor, matrices: Tensor, groups: Groups) -> Tensor:
    """Rows x (R, K) with each one's matrix of (E, K, N) -> (R, N)."""
    if _has_kernel(x) and x.shape[0] and _is_aligned(matrices):
        return torch._grouped_mm(x, matrices, offs=groups.ends)
    out = x.new_empty((x.shape[0], matrices.shape[2]))
    for expert, rows in groups.slices():
        torch.mm(x[rows], matrices[expert], out=out[rows])
    return out


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16 and _is_aligned(x)


def _is_aligned(x: Tensor) -> bool:
    return all(stride * x.element_size() % _ALIGNED_BYTES == 0 for stride in x.stride() if stride != 1)
