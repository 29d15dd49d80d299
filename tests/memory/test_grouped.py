"""Products by expert against a plain loop and its autograd: experts with no rows and with all, both layouts, every precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efflaunch.memory.executor import grouped
from efflaunch.memory.executor.experts import WeightSums
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


def test_without_rows_gradients_are_zero_and_the_kernel_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*given: object, **named: object) -> Tensor:
        raise AssertionError("the kernel was asked for no rows")

    monkeypatch.setattr(grouped, "_has_kernel", lambda x: True)
    monkeypatch.setattr(torch, "_grouped_mm", refuses)
    projection, groups = GroupedProjection(torch.ones(2, OUTPUTS, INPUTS)), Groups(torch.tensor([0, 0]))
    made = projection.weight_gradient(torch.empty(0, INPUTS), torch.empty(0, OUTPUTS), groups)
    assert torch.equal(made, torch.zeros(2, OUTPUTS, INPUTS))


def summed(x: Tensor, dy: Tensor, counts: list[list[int]], *, cut: bool, experts: list[slice]) -> list[Tensor]:
    """Gradients of two experts' weights and biases, bfloat16, from chunks with so many rows of each."""
    weight, bias = (torch.zeros(2, *shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((OUTPUTS, INPUTS), (OUTPUTS,)))
    sums, start = WeightSums(GroupedProjection(weight, bias), cut=cut), 0
    for each, part in zip(counts, experts, strict=True):
        rows = slice(start, start + sum(each))
        sums.add(x[rows], dy[rows], Groups(torch.tensor(each)), part)
        start = rows.stop
    found = [part for part in sums.take() if part is not None]
    assert len(found) == 2 and all(part.dtype == torch.bfloat16 for part in found)
    return found


def test_pieces_of_an_expert_in_bfloat16_are_rounded_once() -> None:
    """Sixteen pieces, each exact in bfloat16, and their sum is not: what comes out is the sum in float64, rounded once."""
    # Multiples of 1/4 up to 1, and a first piece that is larger.
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randint(-4, 5, (64, size), generator=generator).div(4).bfloat16() for size in (INPUTS, OUTPUTS))
    x[:4] *= 64
    weight, bias = summed(x, dy, [[4, 0]] * 16, cut=True, experts=[slice(0, 1)] * 16)
    assert torch.equal(weight[0], (dy.double().t() @ x.double()).bfloat16()) and torch.equal(bias[0], dy.double().sum(0).bfloat16())
    assert not weight[1].any() and not bias[1].any()


def test_chunks_of_whole_experts_come_to_what_one_call_comes_to() -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(5, size, generator=generator).bfloat16() for size in (INPUTS, OUTPUTS))
    at_once = summed(x, dy, [[3, 2]], cut=False, experts=[slice(0, 2)])
    one_by_one = summed(x, dy, [[3, 0], [0, 2]], cut=False, experts=[slice(0, 1), slice(1, 2)])
    assert all(torch.equal(*pair) for pair in zip(at_once, one_by_one, strict=True))
