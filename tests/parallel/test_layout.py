"""Layouts of whole configurations, and every message of check_parallel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from efflaunch.errors import ConfigError
from efflaunch.parallel.config import ExpertsConfig, ParallelConfig, Scheme, check_parallel
from efflaunch.parallel.layout import solve_layout
from efflaunch.parallel.sequence.solve import solve_static


def parallel(**changes: Any) -> ParallelConfig:
    return ParallelConfig(**{"name": "p", "tokens_per_rank": 100, **changes})


def machines(nodes: int, ranks: int) -> Any:
    return SimpleNamespace(num_nodes=nodes, ranks_per_node=ranks)


BAD: list[tuple[dict[str, Any], tuple[int, int], int, str, str]] = [
    ({"replicate": 0}, (1, 4), 8, "parallel.replicate: found 0; expected 1 or more", "parallel.replicate=1"),
    ({"tokens_per_rank": 0}, (1, 4), 8, "parallel.tokens_per_rank: found 0; expected 1 or more", "parallel.tokens_per_rank=1"),
    (
        {"shard": 2},
        (1, 4),
        8,
        "parallel.shard: found replicate 1 x shard 2 = 2 ranks; expected 4 ranks: 1 x 4 of cluster",
        "parallel.shard=4",
    ),
    (
        {"replicate": 3, "shard": 2},
        (1, 4),
        8,
        "parallel.shard: found replicate 3 x shard 2 = 6 ranks",
        "parallel.replicate=1 parallel.shard=null",
    ),
    (
        {"replicate": 3},
        (1, 4),
        8,
        "parallel.replicate: found 3 copies over 4 ranks; expected a divisor of 4: 1, 2, 4",
        "parallel.replicate=2",
    ),
    ({"sp_degree": 3}, (1, 4), 8, "parallel.sp_degree: found 3; expected a power of two up to 4 (4 ranks)", "parallel.sp_degree=2"),
    ({"sp_degree": 8}, (1, 4), 8, "parallel.sp_degree: found 8; expected a power of two up to 4 (4 ranks)", "parallel.sp_degree=4"),
    ({"sp_degree": 8}, (1, 6), 8, "parallel.sp_degree: found 8; expected a power of two up to 4 (6 ranks)", "parallel.sp_degree=4"),
    (
        {"scheme": Scheme.HYBRID},
        (1, 4),
        8,
        "parallel.ulysses_degree: found nothing with parallel.scheme=hybrid",
        "parallel.ulysses_degree=2",
    ),
    (
        {"ulysses_degree": 2},
        (1, 4),
        8,
        "parallel.ulysses_degree: found 2 with parallel.scheme=auto; expected null",
        "parallel.scheme=hybrid",
    ),
    (
        {"scheme": Scheme.ULYSSES, "sp_degree": 8},
        (1, 8),
        28,
        "parallel.sp_degree: found 8 Ulysses ranks for 28 attention heads in groups of 8; expected one of 1, 2, 4.",
        "parallel.sp_degree=4, or parallel.scheme=auto",
    ),
    (
        {"scheme": Scheme.HYBRID, "sp_degree": 4, "ulysses_degree": 8},
        (1, 8),
        32,
        "parallel.ulysses_degree: found 8 Ulysses ranks for 32 attention heads in groups of 4; expected one of 1, 2, 4.",
        "parallel.ulysses_degree=4, or parallel.scheme=auto",
    ),
    (
        {"scheme": Scheme.HYBRID, "ulysses_degree": 16},
        (2, 8),
        8,
        "parallel.ulysses_degree: found 16 Ulysses ranks for 8 attention heads; expected one of 1, 2, 4, 8.",
        "parallel.ulysses_degree=8, or parallel.scheme=auto",
    ),
]


@pytest.mark.parametrize(("changes", "world", "heads", "message", "hint"), BAD, ids=lambda value: str(value)[:40])
def test_mistakes_are_named(changes: dict[str, Any], world: tuple[int, int], heads: int, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_parallel(parallel(**changes), machines(*world), SimpleNamespace(num_heads=heads))
    assert str(caught.value).startswith(message) and caught.value.hint.startswith(hint)


def mixture(**changes: int) -> Any:
    """A model of 12 experts, hidden size 48, each expert 40 wide."""
    sizes = {"hidden_size": 48, "num_experts": 12, "inner_size": 40, **changes}
    experts = SimpleNamespace(num_experts=sizes["num_experts"], inner_size=sizes["inner_size"])
    return SimpleNamespace(num_heads=8, hidden_size=sizes["hidden_size"], experts=experts)


DENSE = SimpleNamespace(num_heads=8, hidden_size=48, experts=None)
BAD_EXPERTS: dict[str, tuple[Any, int, dict[str, int], str, str]] = {
    "a dense model": (DENSE, 2, {}, "found 2 for a model without experts; expected 1: there is nothing to spread", "1"),
    "no divisor of the experts": (mixture(), 8, {}, "found 8 for 12 experts on 8 ranks; expected a divisor of both: 1, 2, 4.", "4"),
    "no divisor of the ranks": (mixture(), 3, {}, "found 3 for 12 experts on 8 ranks; expected a divisor of both: 1, 2, 4.", "2"),
    "more than there are": (mixture(), 64, {}, "found 64 for 12 experts on 8 ranks; expected a divisor of both: 1, 2, 4.", "4"),
    "more than a copy's ranks": (
        mixture(), 4, {"replicate": 4},
        "found 4 for 12 experts on 2 ranks of each of the 4 copies of the weights; expected a divisor of both: 1, 2.", "2",
    ),
    "a hidden size that does not divide": (
        mixture(hidden_size=50), 2, {}, "found 2 for hidden size 50 over 4 ranks with the same experts; expected a divisor of 50", "4",
    ),
    "experts too narrow": (
        mixture(inner_size=41), 2, {}, "found 2 for gate and up 82 over 4 ranks with the same experts; expected a divisor of 82", "4",
    ),
    "prime everywhere": (
        mixture(hidden_size=49, num_experts=2), 2, {},
        "found 2 for hidden size 49 over 4 ranks with the same experts; expected a divisor of 49", "1",
    ),
    "none": (mixture(), 0, {}, "found 0; expected 1 or more", "1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_EXPERTS)
def test_experts_that_do_not_divide_over_ranks(name: str) -> None:
    spec, ep, changes, message, nearest = BAD_EXPERTS[name]
    with pytest.raises(ConfigError) as caught:
        check_parallel(parallel(experts=ExpertsConfig(ep=ep), **changes), machines(2, 4), spec)
    assert str(caught.value).startswith(f"parallel.experts.ep: {message}")
    assert caught.value.hint.startswith(f"parallel.experts.ep={nearest}")
    # What is to be typed is accepted.
    check_parallel(parallel(experts=ExpertsConfig(ep=int(nearest)), **changes), machines(2, 4), spec)


@pytest.mark.parametrize(("ep", "changes"), [(1, {}), (2, {}), (4, {}), (2, {"replicate": 2}), (2, {"replicate": 4})])
def test_experts_that_divide_over_ranks(ep: int, changes: dict[str, int]) -> None:
    check_parallel(parallel(experts=ExpertsConfig(ep=ep), **changes), machines(2, 4), mixture())


GOOD = [
    ({}, (1, 8), 1, (1, 8)),
    ({"replicate": 2, "shard": 4, "sp_degree": 8}, (2, 4), 8, (2, 4)),
    ({"replicate": 4}, (1, 8), 1, (4, 2)),
    ({"scheme": Scheme.HYBRID, "sp_degree": 8, "ulysses_degree": 2}, (1, 8), 8, (1, 8)),
]


def test_chunks_of_rows_that_do_not_travel_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        check_parallel(parallel(experts=ExpertsConfig(degree=2)), machines(2, 4), mixture())
    assert caught.value.where == "parallel.experts.degree" and "parallel.experts.degree=null" in caught.value.hint
    check_parallel(parallel(experts=ExpertsConfig(ep=2, degree=2)), machines(2, 4), mixture())


@pytest.mark.parametrize(("changes", "world", "degree", "weights"), GOOD)
def test_axes(changes: dict[str, Any], world: tuple[int, int], degree: int, weights: tuple[int, int]) -> None:
    layout = solve_layout(parallel(**changes), machines(*world), SimpleNamespace(num_heads=8), max_seq_len=90, global_batch_tokens=900)
    assert (layout.sp_degree, (layout.replicate, layout.shard)) == (degree, weights)
    assert layout.ulysses * layout.ring == layout.sp_degree and layout.num_groups * layout.sp_degree == layout.world_size


@pytest.mark.parametrize("length", [10, 50, 90, 100, 150, 370, 800])
@pytest.mark.parametrize("sequences", [1, 3, 8, 20])
def test_micro_batches_are_those_the_solver_makes(length: int, sequences: int) -> None:
    layout = solve_layout(
        parallel(), machines(1, 8), SimpleNamespace(num_heads=8), max_seq_len=length, global_batch_tokens=sequences * length
    )
    made = solve_static(
        (length,) * sequences,
        world_size=8,
        degree=layout.sp_degree,
        ulysses=layout.ulysses,
        tokens_per_rank=100,
        linear_cost_tokens=1.0,
    )
    assert layout.num_micro_batches == len(made.micro_batches)
    assert layout.sequences_per_group == max(len(group.sequences) for batch in made.micro_batches for group in batch.groups)


def test_a_group_is_as_small_as_the_longest_sequence_allows() -> None:
    layouts = [
        solve_layout(parallel(), machines(1, 8), SimpleNamespace(num_heads=8), max_seq_len=n, global_batch_tokens=n).sp_degree
        for n in (1, 100, 101, 200, 201, 800)
    ]
    assert layouts == [1, 1, 2, 2, 4, 8]
    with pytest.raises(ConfigError, match=r"parallel.tokens_per_rank: found 100 x 8 ranks = 800 tokens"):
        solve_layout(parallel(), machines(1, 8), SimpleNamespace(num_heads=8), max_seq_len=801, global_batch_tokens=801)
