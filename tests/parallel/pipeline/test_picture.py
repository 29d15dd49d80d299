"""The picture of a pipeline, as text and as a file, against the simulated times it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from efflaunch.errors import ConfigError
from efflaunch.parallel.pipeline.generators import one_f_one_b, zero_bubble
from efflaunch.parallel.pipeline.picture import SCHEDULES, draw, main, make_figure, text_picture
from efflaunch.parallel.pipeline.simulate import costs, simulate

TIMELINE = simulate(zero_bubble(2, 3), costs((2, 3, 1)))


def test_a_column_is_what_ran_most_of_its_time() -> None:
    # 10 seconds in 10 columns.
    assert text_picture(TIMELINE, 10).splitlines() == [
        "10 s a step, 10.0% idle",
        "rank 0 |01.aw2bwcw| 10.0% idle, holds 2",
        "rank 1 |.0a1bw2cww| 10.0% idle, holds 2",
    ]


def test_the_same_schedule_gives_the_same_file(tmp_path: Path) -> None:
    files = [tmp_path / "new" / "one.svg", tmp_path / "two.svg"]
    for file in files:
        draw([("zero bubble", TIMELINE)], file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "zero bubble, 10.0% idle" in files[0].read_text() and "10.0% idle, holds 2" in files[0].read_text()
    with pytest.raises(ConfigError, match=r"ends in \.svg"):
        draw([("zero bubble", TIMELINE)], tmp_path / "one.gif")


def test_boxes_are_the_units() -> None:
    timelines = [("zero bubble", TIMELINE), ("1f1b", simulate(one_f_one_b(2, 3), costs((2, 3, 1))))]
    for axes, (_, timeline) in zip(make_figure(timelines).axes, timelines, strict=True):
        idle, *boxes = axes.patches
        assert idle.get_width() == timeline.step_s and axes.get_xlim() == (0, 12)
        for box, one in zip(boxes, timeline.units, strict=True):
            assert (box.get_x(), box.get_width(), int(box.get_y())) == (one.start_s, one.end_s - one.start_s, one.rank)


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule=all", "ranks=2", "micro_batches=3", "--out", str(tmp_path / "all.svg")]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}: " in printed for name in SCHEDULES) and "all.svg" in printed
    assert (tmp_path / "all.svg").read_text().count("rank 1</text>") == len(SCHEDULES)
    assert main(["schedule=sliced_1f1b", "ranks=2", "micro_batches=1", "slices=2", "--order"]) == 0
    printed = capsys.readouterr().out
    assert "0F0 0F0.1 0B0.1 0B0" in printed and "idle, holds 1" in printed


@pytest.mark.parametrize("word", ["schedule=best", "ranks=0", "ranks=x", "speed=3", "micro_batches=2000"])
def test_wrong_words_are_named(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([word])
    assert word in capsys.readouterr().err
