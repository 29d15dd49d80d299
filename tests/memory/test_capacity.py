"""Capacity: the earliest tokens of a document are served, whatever the pieces and packs, exactly as counted one by one."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from efflaunch.memory.executor.capacity import Capacity
from efflaunch.memory.executor.experts import Routing
from efflaunch.tests.memory.test_experts import build

LENGTHS, PER_TOKEN, EXPERTS = (7, 1, 20, 2, 12), 2, 5
TOTAL = sum(LENGTHS)


def one_by_one(chosen: Tensor, factor: float) -> list[list[int]]:
    """The rule as it is written down."""
    kept, row = [], 0
    for length in LENGTHS:
        taken: Counter[int] = Counter()
        limit = math.ceil(factor * PER_TOKEN * length / EXPERTS)
        for token in chosen[row : row + length].tolist():
            kept.append([expert if taken[expert] < limit else ~expert for expert in token])
            taken.update(token)
        row += length
    return kept


def chosen_at_random(seed: int) -> Tensor:
    """Two different experts of each token; the first are more popular."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0]).expand(TOTAL, EXPERTS), PER_TOKEN, generator=generator).int()


def begun(factor: float) -> Capacity:
    capacity = Capacity(factor)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    capacity.begin(positions, torch.repeat_interleave(torch.tensor(LENGTHS), torch.tensor(LENGTHS)))
    return capacity


@pytest.mark.parametrize("factor", [0.25, 0.8, 1.0, 1.3, 2.5])
@pytest.mark.parametrize("piece", [1, 3, 8, TOTAL])
def test_what_is_kept_is_what_one_by_one_is(factor: float, piece: int) -> None:
    for seed in range(4):
        chosen, capacity = chosen_at_random(seed), begun(factor)
        kept = {layer: [capacity.keep(layer, part, EXPERTS) for part in chosen.split(piece)] for layer in (2, 0)}
        for parts in kept.values():
            assert torch.cat(parts).tolist() == one_by_one(chosen, factor)
            assert parts[0].dtype == torch.int32


def test_rows_of_no_tokens_are_none_and_a_new_micro_batch_starts_anew() -> None:
    capacity, chosen = begun(1.0), chosen_at_random(1)
    first = capacity.keep(0, chosen, EXPERTS)
    assert capacity.keep(0, chosen[:0], EXPERTS).shape == (0, PER_TOKEN)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    capacity.begin(positions, torch.repeat_interleave(torch.tensor(LENGTHS), torch.tensor(LENGTHS)))
    assert torch.equal(capacity.keep(0, chosen, EXPERTS), first)
    capacity.begin(positions[:0], positions[:0])
    assert capacity.keep(0, chosen[:0], EXPERTS).shape == (0, PER_TOKEN)


def test_what_a_token_becomes_does_not_follow_from_later_ones() -> None:
    chosen = chosen_at_random(2)
    changed = chosen.clone()
    changed[20:28] = torch.tensor([0, 1])
    assert torch.equal(begun(1.0).keep(0, chosen, EXPERTS)[:20], begun(1.0).keep(0, changed, EXPERTS)[:20])


def test_dropped_rows_are_nowhere_and_have_no_gradient() -> None:
    """Against the routing with all rows, whose dropped ones weigh nothing."""
    h, weights, experts = build(True, True)
    chosen = torch.tensor([[2, 0], [0, 3], [2, 3], [0, 2], [3, 0]], dtype=torch.int32)
    kept = torch.where(torch.tensor([[1, 1], [1, 1], [0, 1], [0, 0], [1, 0]]).bool(), chosen, ~chosen)
    whole, dropping = Routing.of(chosen, 4), Routing.of(kept, 4, drops=True)
    assert torch.equal(dropping.wanted, chosen) and dropping.groups.counts.tolist() == [2, 0, 1, 3] and len(dropping.tokens) == 6
    masked = torch.where(kept >= 0, weights.detach(), 0.0)
    dy = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        gate_up = experts.gate_and_up(whole.at_experts(h), whole), experts.gate_and_up(dropping.at_experts(h), dropping)
    expected = experts.output(gate_up[0], masked, whole)
    torch.testing.assert_close(experts.output(gate_up[1], weights, dropping), expected, rtol=1e-12, atol=1e-12)
    assert not experts.output(gate_up[1], weights, dropping)[3].any(), "nothing of a token whose rows are all dropped"
    theirs = experts.gradients(h.detach(), gate_up[0], masked, dy, whole)
    ours = experts.gradients(h.detach(), gate_up[1], weights.detach(), dy, dropping)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours[1], torch.where(kept >= 0, theirs[1], 0.0), rtol=1e-12, atol=1e-12)
    for own, other in zip(ours[2], theirs[2], strict=True):
        assert own is not None and other is not None
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


def test_tokens_whose_rows_are_all_dropped() -> None:
    """As in a late piece of a long document."""
    routing = Routing.of(torch.tensor([[~0, ~1], [~2, ~0]], dtype=torch.int32), 4, drops=True)
    assert len(routing.tokens) == 0 and not routing.sum_rows(torch.ones(0, 6), torch.ones(2, 2)).any()
    assert routing.by_token(torch.ones(0)).tolist() == [[0.0, 0.0], [0.0, 0.0]] and routing.by_row(torch.ones(2, 2)).shape == (0,)


def test_no_rows_at_all() -> None:
    routing = Routing.of(torch.zeros(0, 2, dtype=torch.int32), 4, drops=True)
    assert routing.sum_rows(torch.ones(0, 6)).shape == (0, 6) and routing.by_row(torch.ones(0, 2)).shape == (0,)
