"""The static solver: valid plans for any lengths, balanced, deterministic; clear refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efflaunch.errors import ConfigError, PlanError
from efflaunch.parallel.config import Scheme
from efflaunch.parallel.sequence.degrees import choose_degree, choose_ulysses
from efflaunch.parallel.sequence.plan import Group, MicroBatch, StepPlan, check_plan
from efflaunch.parallel.sequence.solve import solve_static
from efflaunch.parallel.topology import aligned_blocks


def solve(lengths, world=8, degree=2, tokens_per_rank=100):
    return solve_static(lengths, world_size=world, degree=degree, ulysses=degree, tokens_per_rank=tokens_per_rank, linear_cost_tokens=50.0)


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=60),
    world=st.integers(2, 12),
    degree=st.sampled_from([1, 2]),
)
def test_plans_are_valid_within_capacity_and_deterministic(lengths, world, degree):
    plan = solve(lengths, world, degree, tokens_per_rank=200)
    check_plan(plan)
    assert plan == solve(lengths, world, degree, tokens_per_rank=200)
    for batch in plan.micro_batches:
        for group in batch.groups:
            assert sum(lengths[i] for i in group.sequences) <= degree * 200


def test_like_work_shares_a_micro_batch():
    plan = solve([200, 10, 190, 10], world=4, degree=2)
    assert [sorted(s for group in batch.groups for s in group.sequences) for batch in plan.micro_batches] == [[0, 2], [1, 3]]


def test_the_longest_sequence_must_fit():
    with pytest.raises(PlanError, match=r"201 tokens") as caught:
        solve([5, 201])
    assert caught.value.hint.startswith("parallel.tokens_per_rank=101")
    with pytest.raises(PlanError, match="a sequence of no tokens"):
        solve([5, 0])


@pytest.mark.parametrize(("longest", "degree"), [(100, 1), (101, 2), (399, 4), (800, 8)])
def test_smallest_degree_that_holds_the_longest(longest, degree):
    assert choose_degree(max_seq_len=longest, tokens_per_rank=100, world_size=8, requested=None) == degree


@pytest.mark.parametrize(
    ("longest", "requested", "message"),
    [
        (801, None, r"parallel\.tokens_per_rank=101"),
        (300, 2, r"parallel\.tokens_per_rank=150"),
        (100, 3, "power of two up to 8"),
        (100, 16, "up to 8"),
    ],
)
def test_degrees_that_cannot_work_are_refused(longest, requested, message):
    with pytest.raises(ConfigError, match=message):
        choose_degree(max_seq_len=longest, tokens_per_rank=100, world_size=8, requested=requested)


@pytest.mark.parametrize(
    ("scheme", "degree", "heads", "node", "requested", "ulysses"),
    [
        (Scheme.AUTO, 8, 32, 8, None, 8),
        (Scheme.AUTO, 16, 32, 8, None, 8),
        (Scheme.AUTO, 8, 12, 8, None, 4),
        (Scheme.RING, 8, 32, 8, None, 1),
        (Scheme.ULYSSES, 4, 8, 8, None, 4),
        (Scheme.HYBRID, 8, 8, 8, 2, 2),
        (Scheme.ULYSSES, 1, 7, 8, None, 1),
    ],
)
def test_scheme_gives_the_inner_degree(scheme, degree, heads, node, requested, ulysses):
    assert choose_ulysses(degree=degree, num_heads=heads, ranks_per_node=node, scheme=scheme, requested=requested) == ulysses


def test_degree_that_does_not_divide_the_heads_is_refused():
    with pytest.raises(ConfigError, match=r"8 Ulysses ranks in groups of 8 for 12 attention heads.*1, 2, 4"):
        choose_ulysses(degree=8, num_heads=12, ranks_per_node=8, scheme=Scheme.ULYSSES, requested=None)


@pytest.mark.parametrize(("world", "count"), [(1, 0), (2, 1), (3, 1), (8, 7), (12, 6 + 3 + 1)])
def test_aligned_blocks(world, count):
    blocks = aligned_blocks(world)
    assert len(blocks) == count
    assert all(block.first % block.degree == 0 and block.ranks[-1] < world for block in blocks)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([[Group(0, 1, 1, (0,))]], "not held exactly once"),
        ([[Group(0, 2, 1, (0,)), Group(1, 1, 1, (1,))]], "two groups"),
        ([[Group(1, 2, 1, (0, 1))]], "aligned"),
        ([[Group(0, 3, 1, (0, 1))]], "power of two"),
        ([[Group(0, 4, 3, (0, 1))]], "divisor"),
        ([[Group(0, 1, 1, (0, 1)), Group(1, 1, 1, ())]], "without sequences"),
        ([[Group(0, 1, 1, (0, 1, 2))]], "an index below 2"),
    ],
)
def test_invalid_plans_are_named(batches, message):
    with pytest.raises(PlanError, match=message):
        check_plan(StepPlan(4, (5, 5), tuple(MicroBatch(tuple(groups)) for groups in batches)))
