"""Gradients of weights apart: those that autograd makes at once, under every policy, from operands that nobody else writes to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from efflaunch.memory.executor.weight_products import LayerProducts
from efflaunch.memory.policy import KEEP_ALL, MemoryPolicy
from efflaunch.model.build import install
from efflaunch.model.chunked_loss import cross_entropy
from efflaunch.model.families.projection import Projection
from efflaunch.model.stage import stage_of
from efflaunch.tests.memory.test_saved import POLICIES, TOTAL, micro_batch
from efflaunch.tests.parity.ranks_side import StrictStore
from efflaunch.tests.parity.reference import BASE, reference_model


def small() -> tuple[Tensor, nn.Parameter, nn.Parameter, Tensor]:
    torch.manual_seed(0)
    x, weight, bias, dy = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 3), (4, 3), (4,), (5, 4)))
    return x.requires_grad_(), nn.Parameter(weight), nn.Parameter(bias), dy


@pytest.mark.parametrize("rows", [None, (slice(1, 3),), (slice(0, 1), slice(2, 4))], ids=str)
def test_the_operands_make_the_gradient_that_was_left_out(rows: tuple[slice, ...] | None) -> None:
    x, weight, bias, dy = small()
    dy = dy if rows is None else torch.cat([dy[:, run] for run in rows], 1)
    expected = torch.autograd.grad(Projection(weight, bias)(x, rows=rows), [x, weight, bias], dy)
    for values in (True, False):
        products = LayerProducts()
        y = Projection(weight, bias, products=products)(x, rows=rows, graph=not values)
        dx, nothing, db = torch.autograd.grad(y, [x, weight, bias], dy, allow_unused=True)
        assert nothing is None and torch.equal(dx, expected[0]) and torch.equal(db, expected[2])
        ((of, gradient),) = products.gradients()
        assert of is weight and torch.equal(gradient, expected[1]) and not list(products.gradients())


def test_a_frozen_weight_leaves_nothing() -> None:
    x, weight, bias, dy = small()
    products = LayerProducts()
    Projection(weight.requires_grad_(False), bias, products=products)(x).backward(dy)
    assert products.num_bytes == 0 and not list(products.gradients())


def test_what_a_step_was_given_is_copied_once_and_may_be_overwritten() -> None:
    x, weight, bias, dy = small()
    products, other = LayerProducts(), nn.Parameter(weight.detach().clone())
    for each in (weight, other):
        torch.autograd.grad(Projection(each, bias, products=products)(x), [x], dy)
    expected = dy.T @ x.detach()
    products.own((x, dy))
    assert products.num_bytes == x.numel() * 8 + dy.numel() * 8, "both products share one copy of each operand"
    with torch.no_grad():
        x.zero_()
        dy.zero_()
    assert all(torch.equal(gradient, expected) for _, gradient in products.gradients())


def test_an_operand_that_was_overwritten_is_found() -> None:
    x, weight, bias, dy = small()
    products = LayerProducts()
    torch.autograd.grad(Projection(weight, bias, products=products)(x), [x], dy)
    dy[1:].mul_(2)
    with pytest.raises(RuntimeError, match="overwritten"):
        list(products.gradients())


@pytest.mark.parametrize("name", [*POLICIES, "keep"])
def test_two_passes_make_the_gradients_of_one(name: str) -> None:
    """And between them only what is no matrix of a layer has one; operands take the bytes that the ledger counts for them."""
    policy: MemoryPolicy = KEEP_ALL if name == "keep" else POLICIES[name]
    gradients = []
    for apart in (False, True):
        model, store = reference_model("qwen2", torch.float32), StrictStore()
        install(model, policy, loss_chunk_tokens=16, store=store)
        tokens, attention = micro_batch()
        stage = stage_of(model)
        done = stage.forward(tokens, attention, lambda head: cross_entropy(head, 0.25), weights_apart=apart)
        stage.backward(done)
        if done.products is not None:
            left = {key for key, parameter in model.named_parameters() if parameter.grad is None}
            assert left == {key for key, _ in model.named_parameters() if "_proj.weight" in key}
            groups = 1 if policy.graph else policy.head_groups
            assert done.products.num_bytes == 4 * TOTAL * BASE["num_hidden_layers"] * operands_a_token(groups)
            stage.weight_gradients(done.products)
            assert done.products.num_bytes == 0
        assert not store.parcels
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=1e-5, atol=1e-7)
    assert done.products is not None


def operands_a_token(groups: int) -> int:
    """Numbers of one layer: what goes into each projection, once for all that read it, and the gradients that come back."""
    hidden, inner, heads = BASE["hidden_size"], BASE["intermediate_size"], BASE["num_attention_heads"]
    keys = hidden * BASE["num_key_value_heads"] // heads
    return groups * hidden + hidden + 2 * keys + 2 * hidden + 2 * hidden + 3 * inner
