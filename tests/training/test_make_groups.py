"""Groups of ranks are those that plans can use, and are warm before anybody asks for memory."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from efflaunch.estimate.timing.sequence import group_degrees
from efflaunch.parallel.config import ParallelConfig, Scheme, SequenceMode
from efflaunch.parallel.layout import Layout
from efflaunch.training import make_groups

LAYOUT = Layout(
    num_nodes=2, ranks_per_node=8, replicate=1, shard=16, sp_degree=8, ulysses=4, tokens_per_rank=1024, num_micro_batches=1,
    sequences_per_group=1,
)  # fmt: skip
STATIC = ParallelConfig(name="p", tokens_per_rank=1024)


@pytest.mark.parametrize(
    ("changes", "num_heads", "expected"),
    [
        ({}, 32, {8, 4}),
        ({"sequence": SequenceMode.ADAPTIVE}, 32, {2, 4, 8, 16}),
        ({"sequence": SequenceMode.ADAPTIVE, "scheme": Scheme.ULYSSES}, 12, {2, 4, 8}),
        ({"sequence": SequenceMode.ADAPTIVE, "scheme": Scheme.RING}, 12, {2, 4, 8, 16}),
    ],
)
def test_groups_are_those_of_plans(changes, num_heads, expected):
    assert group_degrees(replace(STATIC, **changes), LAYOUT, num_heads=num_heads) == expected


def test_a_run_on_single_ranks_has_no_groups_of_sequences():
    assert group_degrees(STATIC, replace(LAYOUT, sp_degree=1, ulysses=1), num_heads=32) == frozenset()


@pytest.mark.parametrize(("every", "degrees"), [(False, frozenset({8, 4})), (True, None)])
def test_groups_are_made_then_warmed(every, degrees):
    config, device, calls = mock.MagicMock(parallel=STATIC), torch.device("cpu"), []
    with (
        mock.patch.object(make_groups, "build_topology", lambda **settings: calls.append(settings) or "topology"),
        mock.patch.object(make_groups, "warm_up", lambda *args: calls.append(args)),
        mock.patch.object(make_groups, "model_spec", lambda model: mock.MagicMock(num_heads=32)),
    ):
        assert make_groups.make_groups(config, LAYOUT, device, every_degree=every) == "topology"
    assert calls[0]["degrees"] == degrees and calls[0]["stages"] == 1 and calls[0]["timeout_s"] == STATIC.collective_timeout_s
    assert calls[1] == ("topology", device)
