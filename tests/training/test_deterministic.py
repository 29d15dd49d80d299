"""Everything of a step has an order that torch accepts, and the same bits come of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils import deterministic as torch_deterministic

from efflaunch.memory.executor.experts import Routing
from efflaunch.memory.executor.grouped import count_each
from efflaunch.parallel.sequence.attention import AttentionSpec, attention_backward, attention_forward
from efflaunch.parallel.sequence.blocks import attention_blocks
from efflaunch.parallel.sequence.kernels import block_kernel
from efflaunch.parallel.sequence.layout import Slice
from efflaunch.training.deterministic import compute_in_order


@pytest.fixture
def as_before() -> Iterator[None]:
    """What this changes in the process is put back."""
    filled = torch_deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
    torch_deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def test_nothing_changes_unless_it_is_asked_for(as_before: None) -> None:
    compute_in_order(deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()
    compute_in_order(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch_deterministic.fill_uninitialized_memory, "blocks are not written twice"  # type: ignore[attr-defined]


def pieces_of_a_step() -> list[Tensor]:
    """Gradients of an embedding, attention, rows of experts and counts."""
    torch.manual_seed(0)
    table = torch.randn(16, 8, dtype=torch.float64, requires_grad=True)
    rows = torch.nn.functional.embedding(torch.randint(16, (40,)), table)
    rows.square().sum().backward()
    spec, whole = AttentionSpec(2, 1, 4, 0.5), (Slice(0, 0, 40),)
    blocks, kernel = attention_blocks(whole, whole), block_kernel(torch.device("cpu"))
    q, k, v = torch.randn(40, 2, 4), torch.randn(40, 1, 4), torch.randn(40, 1, 4)
    o, lse = attention_forward(q, k, v, blocks, spec, kernel)
    routing = Routing.of(torch.randint(4, (40, 2)).int(), 4)
    summed = routing.sum_rows(routing.at_experts(q.flatten(1)), torch.rand(40, 2))
    assert table.grad is not None
    return [table.grad, *attention_backward(o, q, k, v, o, lse, blocks, spec, kernel), summed, count_each(torch.arange(40) % 3, 3)]


def test_torch_raises_nowhere_and_changes_nothing_on_a_cpu(as_before: None) -> None:
    before = pieces_of_a_step()
    compute_in_order(deterministic=True)
    for one, other in zip(before, pieces_of_a_step(), strict=True):
        assert torch.equal(one, other)
