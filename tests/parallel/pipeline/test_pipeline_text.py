"""Schedules as text and JSON come back as they were."""

from __future__ import annotations

import json

import pytest

from efflaunch.errors import PlanError
from efflaunch.parallel.pipeline.generators import gpipe, one_f_one_b
from efflaunch.parallel.pipeline.pipeline_text import describe, from_json, parse, to_json


def test_a_schedule_is_a_line_for_each_rank() -> None:
    assert describe(one_f_one_b(2, 2)) == "ranks 2 stages 0,1 micro-batches 2 slices 1\n0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1"


@pytest.mark.parametrize("made", [gpipe(3, 2), one_f_one_b(4, 5)])
def test_text_and_json_come_back(made) -> None:
    assert parse(describe(made)) == made
    assert from_json(json.loads(json.dumps(to_json(made)))) == made


def test_slices_and_split_backward_come_back() -> None:
    text = "ranks 1 stages 0 micro-batches 1 slices 2\n0F0 0F0.1 0B0.1 0W0.1 0B0 0W0"
    assert describe(parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ranks 2",
        "ranks 2 stages 0,1 micro-batches 2,3 slices 1",
        "ranks x stages 0 micro-batches 1 slices 1",
        "ranks 1 stages 0, micro-batches 1 slices 1",
        "stages 0 ranks 1 micro-batches 1 slices 1",
    ],
)
def test_a_wrong_first_line_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="expected a first line"):
        parse(text)


@pytest.mark.parametrize("word", ["F0", "0F", "0X1", "0F1.", "-1F0", "0F1.x", "0FB1"])
def test_a_word_that_is_no_unit_is_refused(word: str) -> None:
    with pytest.raises(PlanError, match="expected a stage, F, B or W"):
        parse(f"ranks 1 stages 0 micro-batches 1 slices 1\n0F0 {word}")


@pytest.mark.parametrize(
    "values", [{}, {"stage_ranks": 3}, {**to_json(gpipe(1, 1)), "slices": "1 2"}, {**to_json(gpipe(1, 1)), "orders": 3}]
)
def test_json_that_is_no_schedule_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="pipeline schedule"):
        from_json(values)
