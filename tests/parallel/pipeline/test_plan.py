"""Schedules as lists of actions: those of today, what makes one valid, and how many micro-batches wait at a time."""

from __future__ import annotations

import pytest

from efflaunch.errors import PlanError
from efflaunch.parallel.pipeline.plan import barrier_free, check_schedule, describe, max_in_flight, parse, single_stage


def test_one_stage_does_one_micro_batch_after_the_other() -> None:
    assert describe(single_stage(3, reduce_each=False)) == "F0 B0 F1 B1 F2 B2 R2"
    assert describe(single_stage(2, reduce_each=True)) == "F0 B0 R0 F1 B1 R1"
    assert max_in_flight(single_stage(4, reduce_each=True)) == 1


def test_without_barriers_a_rank_does_its_own_and_reduces_with_all_others() -> None:
    assert describe(barrier_free([1, 3])) == "G F1 B1 F3 B3 E"
    assert describe(barrier_free([])) == "G E"
    assert max_in_flight(barrier_free([])) == 0


@pytest.mark.parametrize("made", [single_stage(3, reduce_each=True), single_stage(3, reduce_each=False), barrier_free([0, 1, 2])])
def test_what_is_made_is_valid_and_printed_reversibly(made) -> None:
    check_schedule(made, range(3))
    assert parse(describe(made)) == made


@pytest.mark.parametrize(("text", "in_flight"), [("F0 F1 B0 B1 R1", 2), ("F0 F1 F2 B2 R2 B1 B0 R0", 3), ("G F1 F0 B0 B1 E", 2)])
def test_other_orders_are_valid(text: str, in_flight: int) -> None:
    made = parse(text)
    check_schedule(made, {action.micro_batch for action in made} - {None})
    assert max_in_flight(made) == in_flight


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("F0 B0 F1 B1", "never reduced"),
        ("F0 R0 B0", "R0 without B0 right before it"),
        ("F0 F1 B0 B1 R0", "R0 without B0"),
        ("B0 R0", "B0 without F0"),
        ("F0 B0 R0 B0 R0", "B0 without F0"),
        ("F0 F0 B0 R0", "F0 twice"),
        ("F0 F1 B1 R1", "no B0"),
        ("F0 B0 R0", "not every micro-batch"),
        ("F0 B0 F1 B1 R1 F2 B2 R2", "F2 twice, or of no micro-batch"),
        ("G F0 B0 F1 B1 R1", "weights that stay whole"),
        ("F0 E B0 F1 B1 R1", "E with micro-batches in flight"),
        ("F0 G B0 F1 B1 E", "G twice, or with micro-batches in flight"),
        ("R0", "R0 without B0"),
    ],
)
def test_what_is_wrong_is_said(text: str, found: str) -> None:
    with pytest.raises(PlanError) as error:
        check_schedule(parse(text), range(2))
    assert found in str(error.value) and text in str(error.value)


@pytest.mark.parametrize("word", ["X0", "F", "B-1", "G0", "E1", "0", "F1x"])
def test_a_word_that_is_no_action_is_refused(word: str) -> None:
    with pytest.raises(PlanError, match="schedule"):
        parse(f"F0 {word} B0")
