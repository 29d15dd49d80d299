"""Losses of routers: gradients are autograd's of the formulas over the whole step, however it is split; sums are what values need."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efflaunch.memory.executor.router_losses import RouterLosses, with_losses

TOKENS, EXPERTS, BALANCE, Z = 12, 4, 0.3, 0.2
COUNTS = torch.tensor([[7, 9, 0, 8], [0, 0, 0, 24]])
"""Rows by layer and expert: two of each token."""


def logits_of(layer: int) -> Tensor:
    return 3 * torch.randn(TOKENS, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(layer))


def losses(balance: float = BALANCE, z: float = Z) -> RouterLosses:
    """At the start of a step whose routing was counted."""
    made = RouterLosses(balance, z)
    made.begin(TOKENS)
    made.use(COUNTS, (0, 1))
    return made


def by_formula(layer: int, logits: Tensor, balance: float, z: float) -> Tensor:
    shares = COUNTS[layer] / COUNTS[layer].sum()
    return balance * EXPERTS * (shares * logits.softmax(-1).mean(0)).sum() + z * logits.logsumexp(-1).square().mean()


@pytest.mark.parametrize(("balance", "z"), [(BALANCE, 0.0), (0.0, Z), (BALANCE, Z)], ids=["balance", "z", "both"])
@pytest.mark.parametrize("layer", [0, 1])
def test_gradients_are_those_of_the_formulas_however_a_step_is_split(layer: int, balance: float, z: float) -> None:
    logits = logits_of(layer).requires_grad_()
    (expected,) = torch.autograd.grad(by_formula(layer, logits, balance, z), logits)
    pieces = [losses(balance, z).gradient(layer, piece) for piece in logits.split([5, 1, 0, 6])]
    torch.testing.assert_close(torch.cat(pieces), expected, rtol=1e-12, atol=1e-14)


def test_even_use_is_worth_the_weight_and_has_no_gradient_where_all_are_as_likely() -> None:
    even = RouterLosses(BALANCE, 0.0)
    even.begin(TOKENS)
    even.use(torch.full((1, EXPERTS), 6), (0,))
    assert even.gradient(0, torch.zeros(TOKENS, EXPERTS, dtype=torch.float64)).abs().max() < 1e-15


def test_in_a_graph_the_gradient_is_added_and_values_stay() -> None:
    logits = logits_of(0).requires_grad_()
    out = with_losses(logits, losses(), 0)
    assert torch.equal(out, logits)
    upstream = torch.randn(TOKENS, EXPERTS, dtype=torch.float64)
    (actual,) = torch.autograd.grad(out, logits, upstream)
    assert torch.equal(actual, upstream + losses().gradient(0, logits))
    assert with_losses(logits, RouterLosses(), 0) is logits and not RouterLosses().active


def test_sums_of_all_pieces_make_the_values() -> None:
    counted = losses()
    for layer in (1, 0):
        for piece in logits_of(layer).split([5, 0, 7]):
            counted.add(layer, piece)
    sums = counted.take()
    assert sums is not None and counted.take() is None
    for layer in (0, 1):
        shares = COUNTS[layer] / COUNTS[layer].sum()
        value = (BALANCE * EXPERTS * (shares * sums[layer, :EXPERTS]).sum() + Z * sums[layer, EXPERTS]) / TOKENS
        torch.testing.assert_close(value, by_formula(layer, logits_of(layer), BALANCE, Z), rtol=1e-12, atol=0)
    idle = RouterLosses()
    idle.add(0, logits_of(0))
    assert idle.take() is None


def test_a_backward_before_the_step_was_counted_is_an_error() -> None:
    early = RouterLosses(BALANCE, 0.0)
    early.begin(TOKENS)
    assert early.lacks_shares
    with pytest.raises(AssertionError, match="counts its routing"):
        early.gradient(0, logits_of(0))
    early.use(COUNTS, (0, 1))
    assert not early.lacks_shares
    early.begin(TOKENS)
    assert early.lacks_shares, "shares are of one step"
