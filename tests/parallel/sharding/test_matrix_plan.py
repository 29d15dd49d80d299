"""Who orthogonalises what: every matrix once, work spread by size, and no more of a rank at one time than the largest takes."""

from __future__ import annotations

from collections import Counter

import pytest

from efflaunch.parallel.sharding.matrix_plan import Shape, is_matrix, orthogonalise_flops, slowest_flops, spread_matrices

LLAMA_8B: list[Shape] = [
    shape
    for _ in range(32)
    for shape in ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
]


@pytest.mark.parametrize("num_ranks", [1, 3, 8, 64, 256])
def test_every_matrix_has_one_rank_and_rounds_hold_no_more_than_the_largest(num_ranks: int) -> None:
    rounds = spread_matrices(LLAMA_8B, num_ranks)
    assert Counter(number for each in rounds for numbers in each for number in numbers) == Counter(range(len(LLAMA_8B)))
    for each in rounds:
        assert len(each) == num_ranks
        assert max(sum(LLAMA_8B[n][0] * LLAMA_8B[n][1] for n in numbers) for numbers in each) <= 4096 * 14336


@pytest.mark.parametrize(("num_ranks", "over"), [(1, 1.0), (8, 1.0), (16, 1.0), (64, 1.4)])
def test_ranks_have_as_much_to_do(num_ranks: int, over: float) -> None:
    """Against what no plan is below: an even share, or whole matrices of the largest kind where these do not divide."""
    rounds, steps = spread_matrices(LLAMA_8B, num_ranks), 5
    even = sum(orthogonalise_flops(shape, steps) for shape in LLAMA_8B) / num_ranks
    assert even <= slowest_flops(LLAMA_8B, rounds, steps) * 1.000001
    assert slowest_flops(LLAMA_8B, rounds, steps) <= even * over * 1.000001


def test_small_matrices_fill_a_round_beside_a_large_one() -> None:
    assert spread_matrices([(8, 8), (64, 64), (8, 8)], 2) == (((1,), (0, 2)),)
    assert spread_matrices([], 2) == ()


def test_flops_are_those_of_the_products() -> None:
    """One step: X X^T of 2 x 3 has 24, its square 16, the product with X 24."""
    assert orthogonalise_flops((2, 3), 1) == orthogonalise_flops((3, 2), 1) == 24 + 16 + 24
    assert orthogonalise_flops((2, 3), 5) == 320


def test_without_ranks_there_is_no_plan() -> None:
    with pytest.raises(ValueError, match="1 matrices over 0 ranks"):
        spread_matrices([(2, 2)], 0)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), True),
        ("layers.0.mlp.experts.gate_up_proj", (4, 8, 8), True),
        ("model.layers.0.mlp.gate.weight", (4, 8), True),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 8), False),
        ("model.layers.0.mlp.experts.down_proj_bias", (4, 8), False),
        ("model.layers.0.input_layernorm.weight", (8,), False),
        ("model.embed_tokens.weight", (32, 8), False),
        ("lm_head.weight", (32, 8), False),
    ],
    ids=lambda value: str(value),
)
def test_matrices_are_those_of_the_decoder_layers(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_matrix(name, shape) is expected
