"""Orders of a pipeline: what is accepted runs to the end under any execution, what is refused is named."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from efflaunch.errors import PlanError
from efflaunch.parallel.pipeline.generators import gpipe, one_f_one_b
from efflaunch.parallel.pipeline.pipeline_plan import (
    ActionKind,
    PipelineAction,
    PipelineSchedule,
    Unit,
    UnitKind,
    check,
    check_actions,
    max_in_flight,
    with_transfers,
)
from efflaunch.parallel.pipeline.pipeline_text import parse
from efflaunch.tests.parallel.pipeline.random_problems import runs_to_the_end

F, B, W = UnitKind.FORWARD, UnitKind.BACKWARD, UnitKind.WEIGHT


def accepted(schedule: PipelineSchedule, **options: bool) -> bool:
    try:
        check(schedule, **options)
    except PlanError as error:
        assert "for ever" in str(error)
        return False
    return True


def random_schedule(rng: random.Random) -> PipelineSchedule:
    """Every unit once on its rank, in an order that is nearly one that works, or any."""
    ranks, batches, slices = rng.randint(1, 3), rng.randint(1, 3), rng.choice((1, 1, 2))
    stages = ranks * rng.randint(1, 2)
    owners = tuple(range(ranks)) + tuple(rng.randrange(ranks) for _ in range(stages - ranks))
    split = rng.random() < 0.4
    orders: list[list[Unit]] = [[] for _ in range(ranks)]
    for kind in (F, B, W) if split else (F, B):
        for m in range(batches):
            for j in range(slices) if kind is F else reversed(range(slices)):
                for stage in range(stages) if kind is F else reversed(range(stages)):
                    orders[owners[stage]].append(Unit(kind, stage, m, j))
    for order in orders:
        for _ in range(rng.choice((0, 1, 1, 2, 3, 20))):
            at = rng.randrange(len(order))
            order.insert(max(0, at + rng.randint(-4, 4)), order.pop(at))
    sizes = {"num_stages": stages, "num_ranks": ranks, "stage_ranks": owners, "num_micro_batches": batches, "slices": slices}
    return PipelineSchedule(**sizes, orders=tuple(map(tuple, orders)))


def test_what_is_accepted_is_what_runs_to_the_end() -> None:
    rng = random.Random(0)
    outcomes = []
    for _ in range(1500):
        schedule = random_schedule(rng)
        ends = runs_to_the_end(schedule, rng)
        assert accepted(schedule) == ends, schedule
        # Sends that wait for their receive hang more orders, and never fewer.
        assert not accepted(schedule, rendezvous=True) or ends
        outcomes.append(ends)
    assert 300 < sum(outcomes) < 1200


def test_messages_are_received_in_the_order_they_are_sent() -> None:
    rng = random.Random(1)
    for _ in range(200):
        schedule = random_schedule(rng)
        for depth in (0, 1, 3):
            rows = with_transfers(schedule, depth)
            for sender in range(schedule.num_ranks):
                for receiver in range(schedule.num_ranks):
                    for kind in (F, B):
                        sent = [a.unit for a in rows[sender] if a.kind is ActionKind.SEND and (a.peer, a.unit.kind) == (receiver, kind)]
                        taken = [a.unit for a in rows[receiver] if a.kind is ActionKind.RECEIVE and (a.peer, a.unit.kind) == (sender, kind)]
                        assert sent == taken and (sender != receiver or not sent)
            for rank, row in enumerate(rows):
                assert tuple(a.unit for a in row if a.kind is ActionKind.COMPUTE) == schedule.orders[rank]


def test_sends_follow_their_unit_and_receives_come_so_many_units_early() -> None:
    schedule = one_f_one_b(2, 3)
    assert [" ".join(map(str, row)) for row in with_transfers(schedule, 0)] == [
        "0F0 0F0>1 0F1 0F1>1 1B0<1 0B0 0F2 0F2>1 1B1<1 0B1 1B2<1 0B2",
        "0F0<0 1F0 1B0 1B0>0 0F1<0 1F1 1B1 1B1>0 0F2<0 1F2 1B2 1B2>0",
    ]
    assert " ".join(map(str, with_transfers(schedule, 1)[0])) == "0F0 0F0>1 1B0<1 0F1 0F1>1 0B0 1B1<1 0F2 0F2>1 1B2<1 0B1 0B2"
    with pytest.raises(PlanError, match="-1 units ahead"):
        with_transfers(schedule, -1)


def test_stages_of_the_same_rank_send_nothing() -> None:
    schedule = parse("ranks 1 stages 0,0 micro-batches 1 slices 1\n0F0 1F0 1B0 0B0")
    check(schedule, rendezvous=True)
    assert [str(action) for action in with_transfers(schedule)[0]] == ["0F0", "1F0", "1B0", "0B0"]
    assert schedule.stages_of(0) == (0, 1)


def test_sends_without_a_buffer_hang_1f1b_where_receives_are_not_posted_ahead() -> None:
    schedule = one_f_one_b(3, 4)
    check(schedule, depth=0)
    check(schedule, depth=1, rendezvous=True)
    with pytest.raises(PlanError, match="rank 1 waits in 1F1>2 for ever: rank 2 posts no receive of it"):
        check(schedule, depth=0, rendezvous=True)
    check(gpipe(3, 4), depth=0, rendezvous=True)


@pytest.mark.parametrize(
    ("orders", "found"),
    [
        ("0F0 0B0\n1B0 1F0", "rank 1 waits in 1B0 for ever: 1F0 of its own comes later"),
        ("0B0 0F0\n1F0 1B0", "rank 0 waits in 0B0 for ever: 0F0 of its own comes later"),
        ("0F0 0B0\n1F0", "no 1B0 on rank 1"),
        ("0F0 0F0 0B0\n1F0 1B0", "0F0 twice"),
        ("0F0 1F0 0B0\n1B0", "1F0 on rank 0, stage 1 is rank 1's"),
        ("0F0 0B0 0F1\n1F0 1B0", "0F1 on rank 0"),
        ("0F0 0B0 2F0\n1F0 1B0", "2F0 on rank 0"),
        ("0F0 0B0 0F0.1\n1F0 1B0", "0F0.1 on rank 0"),
        ("0F0 0B0\n1F0 1W0 1B0", "rank 1 waits in 1W0 for ever: 1B0 of its own comes later"),
        ("0F0 0B0", "no 1F0 on rank 1"),
        ("0F0 0B0\n1F0 1B0\n2F0", "3 orders of 2 ranks"),
    ],
)
def test_what_is_wrong_is_named(orders: str, found: str) -> None:
    with pytest.raises(PlanError) as error:
        check(parse(f"ranks 2 stages 0,1 micro-batches 1 slices 1\n{orders}"))
    assert found in str(error.value)


def test_two_ranks_that_wait_for_each_other_are_both_named() -> None:
    schedule = parse("ranks 2 stages 0,1 micro-batches 2 slices 1\n0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1")
    with pytest.raises(PlanError) as error:
        check(schedule)
    assert "rank 0 waits in 0B0 for ever: for the gradient of 1B0 from rank 1;" in str(error.value)
    assert "rank 1 waits in 1F1 for ever: for the activation of 0F1 from rank 0;" in str(error.value)


@pytest.mark.parametrize(
    "sizes",
    [{"num_ranks": 3}, {"num_micro_batches": 0}, {"slices": 0}, {"stage_ranks": (0, 0)}, {"num_stages": 3}, {"stage_ranks": (0, 2)}],
)
def test_sizes_that_do_not_match_are_refused(sizes: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="pipeline schedule"):
        check(replace(one_f_one_b(2, 2), **sizes))


def actions_of(text: str) -> tuple[PipelineAction, ...]:
    """Actions of one rank from the words they are printed as."""
    kinds = {kind.value: kind for kind in ActionKind if kind.value}
    made = []
    for word in text.split():
        sign = next((sign for sign in kinds if sign in word), "")
        unit, _, peer = word.partition(sign) if sign else (word, "", "")
        (order,) = parse(f"ranks 1 stages 0 micro-batches 1 slices 1\n{unit}").orders
        made.append(PipelineAction(kinds.get(sign, ActionKind.COMPUTE), order[0], int(peer) if peer else None))
    return tuple(made)


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ("0F0>1 0F0", "0F0<0 1F0", "0F0>1 of rank 0 before 0F0 is computed"),
        ("0F0 0F0>1 0F1 0F1>1", "0F1<0 0F0<0 1F0 1F1", "0F1 sent by rank 0 into the receive of 0F0 on rank 1"),
        ("0F0", "0F0<0 1F0", "rank 1 waits in 1F0 for ever: for the activation of 0F0 from rank 0"),
        ("0F0 0F0>1", "1F0", "from rank 0, whose receive is not posted"),
        ("0F0 0F0>1", "0F0<0 0F0<0 1F0", "0F0<0 of rank 1 twice"),
        ("0F0 0F0>1", "", "rank 0 sends 0F0, and rank 1 receives"),
        ("0F0 0F0>", "0F0<0 1F0", "0F0> of rank 0 without a peer"),
    ],
)
def test_messages_that_do_not_match_are_named(first: str, second: str, found: str) -> None:
    with pytest.raises(PlanError) as error:
        check_actions(one_f_one_b(2, 2), (actions_of(first), actions_of(second)))
    assert found in str(error.value)


def test_units_wait_until_their_last_backward_pass() -> None:
    split = parse("ranks 1 stages 0 micro-batches 2 slices 1\n0F0 0B0 0F1 0B1 0W0 0W1")
    assert max_in_flight(split, 0) == 2 and split.split == {Unit(B, 0, 0), Unit(B, 0, 1)}
    assert max_in_flight(parse("ranks 1 stages 0 micro-batches 2 slices 1\n0F0 0B0 0F1 0B1"), 0) == 1
    assert Unit(F, 0, 1).with_kind(W) == Unit(W, 0, 1)
