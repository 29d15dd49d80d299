"""Every group of a rank is used once, in an order that no rank waits in for one that waits for it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from efflaunch.parallel.topology import aligned_blocks, build_topology, groups_of
from efflaunch.parallel.warm_up import warm_up
from efflaunch.tests.collectives import check_ledgers, recorded
from efflaunch.tests.ranks import RankPool


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


def warmed(replicate: int, stages: int, experts: int, degrees: tuple[int, ...] | None) -> Any:
    """On a rank: its groups, what warm_up says, its calls, its log."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("efflaunch.parallel.warm_up")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        topology = build_topology(replicate=replicate, device="cpu", stages=stages, experts=experts, degrees=degrees)
        done, ledger, members = recorded(warm_up, topology, torch.device("cpu"))
    finally:
        log.removeHandler(handler)
    own = {group.group_name for group in groups_of(topology)}
    return own, sorted(block.degree for block in topology.groups), done, ledger, members, lines


SHAPES = [(1, 1, 1, None), (2, 1, 1, (2,)), (1, 2, 1, None), (1, 1, 2, (4,)), (1, 1, 1, ())]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_group_is_used_by_all_its_ranks(pool, shape):
    answers = pool.run(warmed, *shape, ranks=4)
    ledgers, members = [answer[3] for answer in answers], {}
    for own, degrees, done, ledger, mine, lines in answers:
        members |= mine
        assert {call.group for call in ledger} == own and done.num_groups == len(own) and done.device_bytes == 0
        assert degrees == [degree for degree in (2, 4) if degree <= 4 // shape[1] and (shape[3] is None or degree in shape[3])]
        hops = sum(call.operation == "send" for call in ledger)
        assert hops == len(degrees) and sum("alltoall" in call.operation for call in ledger) == len(degrees)
        assert [f"{len(own)} groups of ranks ready" in line for line in lines] == [True] * len(lines)
    assert [len(answer[5]) for answer in answers] == [1, 0, 0, 0], "rank 0 alone says so"
    check_ledgers(ledgers, members)


def test_blocks_of_the_degrees_that_are_asked_for():
    assert len(aligned_blocks(1024)) == 1023
    of_run = aligned_blocks(1024, {8, 32})
    assert {block.degree for block in of_run} == {8, 32} and len(of_run) == 128 + 32
    assert aligned_blocks(6, {4}) == tuple(block for block in aligned_blocks(6) if block.degree == 4)
