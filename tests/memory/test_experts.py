"""Routing of rows, and the experts' formulas against autograd of the sum they stand for: biases, frozen weights, the same bits twice."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from efflaunch.memory.executor.experts import Experts, Routing
from efflaunch.memory.executor.experts_graph import in_graph
from efflaunch.memory.executor.grouped import GroupedProjection

CHOSEN = torch.tensor([[2, 0], [0, 3], [2, 3], [0, 2], [3, 0]], dtype=torch.int32)
"""Experts 0, 2 and 3 of four; nobody goes to 1."""
TOKENS, PER_TOKEN, NUM_EXPERTS, WIDTH, INNER = 5, 2, 4, 6, 3


def test_rows_lie_expert_after_expert_and_tokens_in_their_own_order() -> None:
    routing = Routing.of(CHOSEN, NUM_EXPERTS)
    assert routing.groups.counts.tolist() == [4, 0, 3, 3]
    assert routing.tokens.tolist() == [0, 1, 3, 4, 0, 2, 3, 1, 2, 4]
    assert sorted(routing.places.flatten().tolist()) == list(range(TOKENS * PER_TOKEN))
    of_row = routing.groups.experts(TOKENS * PER_TOKEN)
    for token, experts in enumerate(CHOSEN.tolist()):
        for column, expert in enumerate(experts):
            place = routing.places[token, column]
            assert routing.tokens[place] == token and of_row[place] == expert


def test_rows_and_tokens_are_each_others_inverse() -> None:
    routing, values = Routing.of(CHOSEN, NUM_EXPERTS), torch.arange(10.0).view(TOKENS, PER_TOKEN)
    rows = routing.by_row(values)
    assert torch.equal(routing.by_token(rows), values)
    assert rows[routing.places[3, 1]] == values[3, 1]
    assert torch.equal(routing.by_row(routing.by_token(torch.arange(10.0))), torch.arange(10.0))


def test_a_tokens_rows_are_summed_in_float32_and_rounded_once() -> None:
    routing, h = Routing.of(CHOSEN, NUM_EXPERTS), torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    assert torch.equal(routing.sum_rows(routing.at_experts(h)), PER_TOKEN * h)
    weights = torch.rand(TOKENS, PER_TOKEN, dtype=torch.float64)
    torch.testing.assert_close(routing.sum_rows(routing.at_experts(h), weights), h * weights.sum(1, keepdim=True), rtol=1e-14, atol=0)
    # 256 and 1 come to 256 in bfloat16, and so does adding another 1; the sum in float32 is 258.
    choices = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert Routing.of(choices, 3).sum_rows(rows).tolist() == [[258.0]]


def test_no_tokens_are_no_rows() -> None:
    routing = Routing.of(CHOSEN[:0], NUM_EXPERTS)
    assert routing.groups.counts.tolist() == [0] * NUM_EXPERTS and routing.places.shape == (0, PER_TOKEN)
    assert routing.sum_rows(torch.ones(0, WIDTH)).shape == (0, WIDTH)


def activate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def of_expert(expert: int, h: Tensor, experts: Experts) -> Tensor:
    """What one expert makes of one token (M,)."""

    def product(projection: GroupedProjection, x: Tensor) -> Tensor:
        weight = projection.weight[expert].T if projection.transposed else projection.weight[expert]
        return weight @ x + (0 if projection.bias is None else projection.bias[expert])

    return product(experts.down, activate(product(experts.gate_up, h)[None])[0])


def naive(h: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """The sum over each token's experts as it is written down: nothing sorted, nothing grouped."""
    return torch.stack(
        [
            sum((weights[token, k] * of_expert(int(CHOSEN[token, k]), h[token], experts) for k in range(PER_TOKEN)), torch.zeros(()))
            for token in range(TOKENS)
        ]
    )


def build(biases: bool, transposed: bool, frozen: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Experts]:
    """Tokens, weights of the chosen and experts; those parameters frozen whose index is in `frozen`."""
    random = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def projection(inputs: int, outputs: int) -> GroupedProjection:
        shape = (NUM_EXPERTS, inputs, outputs) if transposed else (NUM_EXPERTS, outputs, inputs)
        return GroupedProjection(random(shape), random(NUM_EXPERTS, outputs) if biases else None, transposed)

    experts = Experts(projection(WIDTH, 2 * INNER), projection(INNER, WIDTH), activate)
    for index, weight in enumerate(experts.weights):
        weight.requires_grad_(index not in frozen)
    return random(TOKENS, WIDTH).requires_grad_(), random(TOKENS, PER_TOKEN).requires_grad_(), experts


KINDS = {
    "plain": build(False, False),
    "biases, transposed": build(True, True),
    "down frozen": build(False, False, (1,)),
    "biases trained alone": build(True, False, (0, 2)),
    "biases frozen": build(True, False, (1, 3)),
}


@pytest.mark.parametrize(("h", "weights", "experts"), KINDS.values(), ids=KINDS)
def test_gradients_are_autograds_of_the_sum(h: Tensor, weights: Tensor, experts: Experts) -> None:
    routing, dy = Routing.of(CHOSEN, NUM_EXPERTS), torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    expected = naive(h, weights, experts)
    trained = [each for each in experts.weights if each.requires_grad]
    truth = torch.autograd.grad(expected, [h, weights, *trained], dy)

    with torch.no_grad():
        gate_up = experts.gate_and_up(routing.at_experts(h), routing)
        output = experts.output(gate_up, weights, routing)
        d_h, d_weights, of_parameters = experts.gradients(routing.hold(h), gate_up, weights, dy, routing)
    assert [part is not None for part in of_parameters] == [each.requires_grad for each in experts.weights]
    torch.testing.assert_close(output, expected.detach(), rtol=1e-12, atol=1e-12)
    for actual, wanted in zip((d_h, d_weights, *(part for part in of_parameters if part is not None)), truth, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)

    through_graph = in_graph(experts, h, weights, routing)
    assert torch.equal(through_graph, output)
    for actual, wanted in zip(torch.autograd.grad(through_graph, [h, weights, *trained], dy), truth, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_what_is_given_in_stays_as_it_is_and_the_bits_are_the_same_twice() -> None:
    h, weights, experts = build(True, False)
    routing, dy = Routing.of(CHOSEN, NUM_EXPERTS), torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        gate_up = experts.gate_and_up(routing.at_experts(h), routing)
        given = (routing.hold(h), gate_up, weights, dy)
        before = [each.clone() for each in given]
        first, second = (experts.gradients(*given, routing) for _ in range(2))
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True) if a is not None and b is not None)
