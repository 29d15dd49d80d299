"""The update of routers' biases: by the sign of what is missing to even use, exactly."""

from __future__ import annotations

import torch

from efflaunch.memory.executor.router_bias import RouterBiases


def test_biases_move_by_the_rate_towards_even_use() -> None:
    held = {3: torch.zeros(4), 7: torch.full((4,), 0.5)}
    biases = RouterBiases({layer: lambda layer=layer: held[layer] for layer in held}, rate=0.01)
    counts = torch.tensor([[10, 2, 4, 4], [5, 5, 5, 5]])
    biases.update(counts, (3, 7))
    assert torch.equal(held[3], torch.tensor([-0.01, 0.01, 0.01, 0.01])) and torch.equal(held[7], torch.full((4,), 0.5))
    biases.update(counts, (3, 7))
    torch.testing.assert_close(held[3], torch.tensor([-0.02, 0.02, 0.02, 0.02]))
    assert biases.largest() == 0.5


def test_a_mean_that_is_no_whole_number_is_compared_exactly() -> None:
    """Of 2^40 + 1 rows an expert has one more than a half: float32 sees no difference."""
    held = torch.zeros(2)
    RouterBiases({0: lambda: held}, rate=1.0).update(torch.tensor([[2**39 + 1, 2**39]]), (0,))
    assert held.tolist() == [-1.0, 1.0]


def test_buffers_are_found_as_they_are_now() -> None:
    """Building a model puts other tensors in their place."""
    held = {0: torch.zeros(2)}
    biases = RouterBiases({0: lambda: held[0]}, rate=0.5)
    held[0] = torch.ones(2)
    biases.update(torch.tensor([[0, 4]]), (0,))
    assert held[0].tolist() == [1.5, 0.5]


def test_without_a_rate_or_a_bias_nothing_moves() -> None:
    held = torch.zeros(2)
    RouterBiases({0: lambda: held}).update(torch.tensor([[0, 4]]), (0,))
    assert not held.any() and RouterBiases({}).largest() is None
