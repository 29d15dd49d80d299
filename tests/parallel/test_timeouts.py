"""All groups of a rank have one timeout, which is never less than five steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from efflaunch.parallel.timeouts import STEPS, CollectiveTimeout
from efflaunch.parallel.topology import build_topology, groups_of
from efflaunch.tests.limits import ENDS_S
from efflaunch.tests.ranks import RankPool


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


def _timeouts(replicate: int, stages: int, experts: int) -> Any:
    """On a rank: how many groups it is in, and their timeouts in seconds, as made and after expectations."""
    topology = build_topology(replicate=replicate, device="cpu", stages=stages, experts=experts, timeout_s=ENDS_S)

    def now() -> list[float]:
        backends = [group._get_backend(torch.device("cpu")) for group in groups_of(topology)]
        return sorted({backend.options._timeout.total_seconds() for backend in backends})

    timeout, seen = CollectiveTimeout(topology, ENDS_S), [now()]
    for step_s in (0.0, ENDS_S / STEPS, ENDS_S, 10.0):
        timeout.expect(step_s)
        seen.append(now())
    dist.barrier(group=topology.world)
    return len({group.group_name for group in groups_of(topology)}), seen


@pytest.mark.parametrize(("shape", "least"), [((1, 1, 1), 3), ((2, 1, 1), 5), ((1, 2, 1), 7), ((1, 1, 2), 6)])
def test_every_group_has_the_timeout(pool, shape, least):
    for groups, seen in pool.run(_timeouts, *shape, ranks=4):
        assert groups >= least
        assert seen == [[ENDS_S]] * 3 + [[STEPS * ENDS_S]] * 2
