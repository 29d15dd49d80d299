"""Bytes of a mixture while it runs, by hand for one small layer, and that they grow with every size."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest

from efflaunch.bench.predicted import QWEN2_MOE
from efflaunch.estimate.footprint.live_mixture import mixture_backward, mixture_forward, mixture_graph_backward
from efflaunch.estimate.footprint.moment import Moment
from efflaunch.estimate.plan_inputs import PlanInputs
from efflaunch.memory.activation_classes import ExpertSizes
from efflaunch.memory.config import ActivationPlace, MemoryConfig
from efflaunch.tests.memory.settings import SMALL, cluster, make_ledger, policy

EXPERTS = ExpertSizes(num_experts=8, per_token=2, inner_size=192, shared_size=384, has_shared_gate=True)
ONE = 2 * 8 * 192 * 256
"""Gradients of one of the three matrices of all experts."""
BY_16 = replace(policy(), chunk_tokens=16)
KEEP_BY_CLASS = replace(policy("keep", "keep"), layer_input=ActivationPlace.HOST)


@lru_cache
def inputs(memory: MemoryConfig | None = None) -> PlanInputs:
    """Hidden 256, in bfloat16. A row: H 512, R 1024, A 768, G 3072, S 768, logits 16."""
    return make_ledger({**SMALL, **QWEN2_MOE}, length=64, tokens_per_rank=64, machines=cluster(ranks_per_node=1), memory=memory).inputs


BASE = 512 + 16 + 16 * 2
"""Normed row, logits, and places of two experts."""
WEIGHED = 4 * (8 + 3 * 2) + 8 * 2
MADE = 3072


def test_forward_by_hand() -> None:
    # The most there is at one time: the experts' rows, the sum and a part of it in float32, and the output.
    assert mixture_forward(inputs(), EXPERTS) == BASE + MADE + 4 * 2 + (1024 + 2 * 1024 + 512)
    assert mixture_forward(inputs(KEEP_BY_CLASS), EXPERTS) == BASE + 4 * 2 + (1024 + 2 * 1024 + 512)


@pytest.mark.parametrize(("memory", "made"), [(None, MADE), (KEEP_BY_CLASS, 0), (BY_16, MADE)], ids=["made", "stored", "by 16"])
def test_backward_by_hand(memory: MemoryConfig | None, made: int) -> None:
    stay = 20 + BASE + WEIGHED + made
    assert mixture_backward(inputs(memory), EXPERTS, 10, 20) == [
        Moment(10, stay + 1024, 0),
        Moment(10, stay + 1024 + 4 * 768, 0),
        Moment(10, stay + 1024 + 3 * 768, ONE),
        Moment(10, stay + 6 * 768, ONE),
        Moment(10, stay + 2 * 768 + 1024, 3 * ONE),
        Moment(10, stay + 2 * 768 + 1024 + 1024 + 512, 3 * ONE),
        # The norm and the router; of pieces the sums of gradients are counted elsewhere.
        Moment(10, 20 + BASE + 2 * 512 + WEIGHED + 6 * 4 * 256, 0 if memory is BY_16 else 3 * ONE),
    ]


def test_with_autograds_graph_nothing_is_made_again() -> None:
    moments = mixture_graph_backward(inputs(), EXPERTS, 10)
    assert [(moment.whole, moment.piece, moment.fixed) for moment in moments] == [
        (10 + 1024, 0, 0),
        (10 + 1024 + 4 * 768, 0, 0),
        (10 + 1024 + 3 * 768, 0, ONE),
        (10 + 6 * 768, 0, ONE),
        (10 + 2 * 768 + 1024, 0, 3 * ONE),
        (10 + 2 * 768 + 1024 + 1024 + 512, 0, 3 * ONE),
    ]


@pytest.mark.parametrize("name", ["num_experts", "per_token", "inner_size", "shared_size"])
def test_larger_mixtures_take_no_less(name: str) -> None:
    sizes = [replace(EXPERTS, **{name: value}) for value in (1, 2, 8, 64, 500)]
    forward = [mixture_forward(inputs(), each) for each in sizes]
    backward = [[moment.piece + moment.fixed for moment in mixture_backward(inputs(), each, 0, 0)] for each in sizes]
    assert forward == sorted(set(forward))
    assert all(list(moment) == sorted(moment) for moment in zip(*backward, strict=True)) and max(backward[-1]) > max(backward[0])
