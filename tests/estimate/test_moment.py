"""Widths of one row by hand, whole and of a group of heads, and what is made again."""

from __future__ import annotations

from dataclasses import astuple, replace

import pytest

from efflaunch.estimate.footprint.moment import Widths, is_kept, is_made, norm_backward
from efflaunch.estimate.plan_inputs import PlanInputs
from efflaunch.memory.activation_classes import ATTENTION_OUTPUT, GATE_UP, LAYER_INPUT
from efflaunch.memory.config import MemoryConfig
from efflaunch.parallel.config import Scheme
from efflaunch.tests.memory.settings import SMALL, cluster, make_ledger, policy
from efflaunch.training.config import Dtype


def inputs(ranks: int = 1, dtype: Dtype = Dtype.BFLOAT16, memory: MemoryConfig | None = None) -> PlanInputs:
    """Hidden 256 in 8 heads of 32, 2 of keys; feed-forward 640."""
    machines, spread = cluster(ranks_per_node=ranks), {"scheme": Scheme.ULYSSES, "sp_degree": ranks} if ranks > 1 else {}
    return make_ledger(SMALL, length=64 * ranks, tokens_per_rank=64, machines=machines, dtype=dtype, memory=memory, **spread).inputs


@pytest.mark.parametrize(
    ("given", "groups", "expected"),
    [
        # H 2 x 256, R and Q the same, K and X 2 x 2 x 32 of each of 2 heads, F 2 x 640, E 4 x 8, norm 8 x 256.
        (inputs(), 1, (512, 512, 512, 256, 256, 1280, 32, 2048, 2.0)),
        # Half the heads: 4 of queries, which one of keys is for.
        (inputs(), 2, (512, 512, 256, 128, 128, 1280, 16, 2048, 2.0)),
        # 4 ranks exchange 2 heads of keys: each has a copy of one.
        (inputs(4), 1, (512, 512, 512, 256, 512, 1280, 32, 2048, 2.0)),
        (inputs(dtype=Dtype.FLOAT64), 1, (2048, 2048, 2048, 1024, 1024, 5120, 64, 5120, 1.0)),
    ],
    ids=["whole", "two groups of heads", "Ulysses 4", "float64"],
)
def test_widths_of_a_row(given: PlanInputs, groups: int, expected: tuple[float, ...]) -> None:
    assert astuple(Widths.of(given, groups)) == expected


def test_what_is_neither_kept_nor_on_the_host_is_made_again() -> None:
    half = replace(policy("host", "host"), host_fraction=0.5)
    for memory, kept, made in (
        (policy(), [True, False, False], [False, True, True]),
        (policy("keep", "keep"), [True, True, True], [False, False, False]),
        (half, [True, False, False], [False, False, True]),
    ):
        given = inputs(memory=memory)
        kinds = (LAYER_INPUT, ATTENTION_OUTPUT, GATE_UP)
        assert [is_kept(given, kind) for kind in kinds] == kept
        assert [is_made(given, kind) for kind in kinds] == made


def test_a_norms_backward_works_in_float32_at_least() -> None:
    assert norm_backward(inputs(), 256) == 6 * 4 * 256 and norm_backward(inputs(dtype=Dtype.FLOAT64), 256) == 6 * 8 * 256
