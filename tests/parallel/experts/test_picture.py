"""The picture of a schedule, as text and as a file, against the simulated times it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from efflaunch.errors import ConfigError
from efflaunch.parallel.experts.cost import CALIBRATED, ExpertLayer, Operator, Resource
from efflaunch.parallel.experts.picture import COLOURS, LEGEND, LETTERS, draw, make_figure, text_picture
from efflaunch.parallel.experts.simulate import PhaseTimeline, simulate_schedule
from efflaunch.parallel.experts.solve import solve
from efflaunch.parallel.experts.testbeds import TESTBEDS

COST = TESTBEDS["B"].cost(ExpertLayer(batch=2, tokens=512, hidden=1024, ffn=4096, heads=8, capacity=1.2))


@pytest.fixture(scope="module")
def phases() -> tuple[PhaseTimeline, PhaseTimeline]:
    return simulate_schedule(solve(COST, CALIBRATED, layers=2), COST, CALIBRATED)


def test_every_operator_has_a_letter_with_a_meaning_and_a_colour() -> None:
    assert set(LETTERS) == set(Operator) and set(LETTERS.values()) == set(LEGEND) == set(COLOURS)


def test_a_column_is_what_ran_most_of_its_time(phases: tuple[PhaseTimeline, PhaseTimeline]) -> None:
    width = 60
    lines = text_picture(phases, width).splitlines()
    for index, phase in enumerate(phases):
        column_s = phase.seconds / width
        for resource in Resource:
            row = lines[4 * index + 1 + resource].split("|")[1]
            assert len(row) == width
            busy = sum(letter != "." for letter in row) / width
            assert busy == pytest.approx(phase.busy_share(resource), abs=0.12)
            for bar in (bar for bar in phase.bars if bar.task.resource is resource):
                inside = range(int(bar.start_s / column_s) + 1, int(bar.stop_s / column_s))
                assert {row[column].lower() for column in inside} <= {LETTERS[bar.task.operator]}
    assert {"D", "d", "X", "x"} <= set("".join(lines)) and "x experts" in lines[-1]


def test_the_same_schedule_gives_the_same_file(phases: tuple[PhaseTimeline, PhaseTimeline], tmp_path: Path) -> None:
    files = [tmp_path / "new" / "one.svg", tmp_path / "two.svg"]
    for file in files:
        draw(phases, "halves", file)
    assert files[0].read_bytes() == files[1].read_bytes() and "combine" in files[0].read_text()
    with pytest.raises(ConfigError, match=r"ends in \.svg"):
        draw(phases, "halves", tmp_path / "one.gif")


def test_boxes_are_the_bars(phases: tuple[PhaseTimeline, PhaseTimeline]) -> None:
    for axes, phase in zip(make_figure(phases, "x").axes, phases, strict=True):
        boxes = axes.patches[1:]
        assert len(boxes) == len(phase.bars)
        for box, bar in zip(boxes, phase.bars, strict=True):
            assert box.get_x() == pytest.approx(1e3 * bar.start_s) and box.get_width() == pytest.approx(1e3 * (bar.stop_s - bar.start_s))
            assert int(box.get_y()) == bar.task.resource
