"""Products by expert against a plain loop and its autograd: experts with no rows and with all, both layouts, every precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efflaunch.memory.executor.grouped import GroupedProjection, Groups

INPUTS, OUTPUTS = 5, 3
COUNTS = {"uneven": (3, 0, 4, 1), "the first has all": (8, 0, 0, 0), "the last has all": (0, 0, 0, 8), "no rows": (0, 0, 0, 0)}
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def by_loop(x: Tensor, weight: Tensor, bias: Tensor | None, counts: tuple[int, ...], transposed: bool) -> Tensor:
    """Every row with its expert's own matrix, one expert after the other."""
    rows = x.split(counts)
    matrices = weight if transposed else weight.transpose(1, 2)
    return torch.cat([part @ matrices[e] + (0 if bias is None else bias[e]) for e, part in enumerate(rows)])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["as Linear", "transposed"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_products_and_gradients_are_those_of_a_loop(counts: tuple[int, ...], transposed: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x, dy = random(sum(counts), INPUTS), random(sum(counts), OUTPUTS)
    weight, bias = random(len(counts), *((INPUTS, OUTPUTS) if transposed else (OUTPUTS, INPUTS))), random(len(counts), OUTPUTS)
    # The truth in float64, from the very numbers that were rounded.
    leaves = [each.double().clone().requires_grad_() for each in (x, weight, bias)]
    expected = by_loop(*leaves, counts, transposed)
    of_x, of_weight, of_bias = torch.autograd.grad(expected, leaves, dy.double())

    projection, groups = GroupedProjection(weight, bias, transposed), Groups(torch.tensor(counts))
    actual = (
        projection(x, groups), projection.input_gradient(dy, groups),
        projection.weight_gradient(x, dy, groups), projection.bias_gradient(dy, groups),
    )  # fmt: skip
    for value, wanted in zip(actual, (expected, of_x, of_weight, of_bias), strict=True):
        assert value.dtype == dtype and value.shape == wanted.shape
        scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
        torch.testing.assert_close(value.double(), wanted.detach(), rtol=0, atol=TOLERANCE[dtype] * scale)


def test_without_a_bias_nothing_is_added() -> None:
    x, weight = torch.randn(4, INPUTS, dtype=torch.float64), torch.randn(2, OUTPUTS, INPUTS, dtype=torch.float64)
    out = GroupedProjection(weight)(x, Groups(torch.tensor([1, 3])))
    torch.testing.assert_close(out, by_loop(x, weight, None, (1, 3), False), rtol=0, atol=1e-14)


def test_groups_are_runs_of_rows_of_experts_that_have_some() -> None:
    groups = Groups(torch.tensor([2, 0, 3, 0]))
    assert list(groups.slices()) == [(0, slice(0, 2)), (2, slice(2, 5))]
    assert groups.experts(5).tolist() == [0, 0, 2, 2, 2]
    assert groups.ends.tolist() == [2, 2, 5, 5] and groups.ends.dtype == torch.int32
    assert not list(Groups(torch.zeros(3, dtype=torch.int64)).slices())
