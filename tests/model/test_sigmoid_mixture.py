"""Sigmoid routers: choices by score + bias within groups, weights by scores alone, and no gradient for the bias."""

from __future__ import annotations

import pytest
import torch

from efflaunch.model.families.sigmoid_mixture import SigmoidMixtureHalf
from efflaunch.tests.model.mixtures import half_of, hf_model, refuses


def half(**changes: object) -> SigmoidMixtureHalf:
    made = half_of("dots1", torch.float64, **changes)[0]
    assert isinstance(made, SigmoidMixtureHalf)
    return made


def test_a_bias_changes_choices_and_no_weight() -> None:
    router = half(n_group=1, topk_group=1, num_experts_per_tok=2, norm_topk_prob=False)
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0]], dtype=torch.float64)
    router.correction_bias.zero_()
    assert sorted(router.choose(logits)[0].tolist()) == [0, 1]
    router.correction_bias[7] = 5.0
    assert sorted(router.choose(logits)[0].tolist()) == [0, 7]
    chosen = torch.tensor([[0, 7]])
    torch.testing.assert_close(router.weigh(logits, chosen), 2.5 * logits[:, [0, 7]].sigmoid(), rtol=1e-15, atol=0)


def test_only_the_best_groups_are_chosen_from() -> None:
    """Four groups of two: the single best expert is in a group whose sum is small, and is passed over."""
    router = half(topk_group=1, num_experts_per_tok=2)
    router.correction_bias.copy_(torch.tensor([0.9, -0.9, 0.3, 0.3, 0.0, 0.0, 0.1, 0.1]))
    assert sorted(router.choose(torch.zeros(1, 8, dtype=torch.float64))[0].tolist()) == [2, 3]


def test_weights_have_autograds_gradient_and_add_up_to_the_factor() -> None:
    router = half()
    logits = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    chosen = router.choose(logits.detach())
    assert torch.autograd.gradcheck(lambda each: router.weigh(each, chosen), (logits,))
    assert torch.allclose(router.weigh(logits, chosen).sum(1), torch.full((3,), 2.5, dtype=torch.float64))
    assert not router.correction_bias.requires_grad


def test_logits_are_float32_where_rows_are_bfloat16() -> None:
    router = half_of("dots1", torch.bfloat16)[0]
    h, logits = router.route(torch.randn(4, 32, dtype=torch.bfloat16))
    assert h.dtype == torch.bfloat16 and logits.dtype == torch.float32


@pytest.mark.parametrize("name", ["mlp.gate", "mlp.experts"])
def test_another_class_is_refused(name: str) -> None:
    layer = hf_model("dots1").model.layers[-1]
    module = layer.get_submodule(name)
    module.__class__ = type(f"Other{type(module).__name__}", (type(module),), {})
    assert "not transformers' Dots1" in str(refuses(layer, "dots1"))
