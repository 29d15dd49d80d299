"""Pictures of a pipeline schedule: ranks x time, as text and as .svg, .png or .pdf (which needs matplotlib).

`python -m efflaunch.parallel.pipeline.picture schedule=zbv ranks=4 micro_batches=8` prints a schedule and draws it with `--out FILE`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...errors import ConfigError, UserError
from ..figures import check_format, figure_kind, save
from .generators import gpipe, one_f_one_b, sliced_1f1b, zero_bubble
from .pipeline_plan import PipelineSchedule, UnitKind, check
from .pipeline_text import describe
from .simulate import PipelineTimeline, TimedUnit, costs, simulate
from .virtual_stages import dual_pipe_v, interleaved, zbv

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {UnitKind.FORWARD: "#9a6fc9", UnitKind.BACKWARD: "#1aa08a", UnitKind.WEIGHT: "#fbbf77"}
LEGEND = {UnitKind.FORWARD: "forward", UnitKind.BACKWARD: "backward", UnitKind.WEIGHT: "gradients of weights"}
_INK, _PAPER, _IDLE = "#22272e", "#ffffff", "#dfe3e8"
SCHEDULES: dict[str, Callable[[dict[str, int]], PipelineSchedule]] = {
    "gpipe": lambda sizes: gpipe(sizes["ranks"], sizes["micro_batches"]),
    "1f1b": lambda sizes: one_f_one_b(sizes["ranks"], sizes["micro_batches"]),
    "interleaved": lambda sizes: interleaved(sizes["ranks"], sizes["micro_batches"], sizes["virtual_stages"]),
    "zero_bubble": lambda sizes: zero_bubble(sizes["ranks"], sizes["micro_batches"]),
    "zbv": lambda sizes: zbv(sizes["ranks"], sizes["micro_batches"]),
    "dual_pipe_v": lambda sizes: dual_pipe_v(sizes["ranks"], sizes["micro_batches"]),
    "sliced_1f1b": lambda sizes: sliced_1f1b(sizes["ranks"], sizes["micro_batches"], sizes["slices"]),
}
SIZES = {"ranks": 4, "micro_batches": 8, "virtual_stages": 2, "slices": 4}
"""What is drawn where no word says otherwise."""


def text_picture(timeline: PipelineTimeline, width: int = 100) -> str:
    """A line for each rank; a column shows the micro-batch's last digit of what ran most of its time: F as 0-9, B as a-j, W as `w`."""
    lines = [f"{timeline.step_s:g} s a step, {timeline.bubble_share:.1%} idle"]
    rows: list[list[TimedUnit]] = [[] for _ in timeline.schedule.orders]
    for unit in timeline.units:
        rows[unit.rank].append(unit)
    for rank, units in enumerate(rows):
        lines.append(f"rank {rank} |{_row(units, timeline.step_s, width)}| {_words_of(timeline, rank)}")
    return "\n".join(lines)


def _words_of(timeline: PipelineTimeline, rank: int) -> str:
    """How long a rank is idle, and how many of its micro-batches wait for their backward pass: a stage's unit counts as its share."""
    whole = len(timeline.schedule.stages_of(rank)) * timeline.schedule.slices
    return f"{timeline.bubble_shares[rank]:.1%} idle, holds {timeline.peak_units[rank] / whole:g}"


def _row(units: Sequence[TimedUnit], step_s: float, width: int) -> str:
    column_s = step_s / width
    most = [(column_s / 2, ".")] * width
    for one in units:
        letter = {UnitKind.FORWARD: "0123456789", UnitKind.BACKWARD: "abcdefghij", UnitKind.WEIGHT: "w" * 10}[one.unit.kind]
        for column in range(int(one.start_s / column_s), min(width, int(one.end_s / column_s) + 1)):
            inside = min(one.end_s, (column + 1) * column_s) - max(one.start_s, column * column_s)
            # Sums of floating-point numbers end a little early or late.
            if inside >= most[column][0] * (1 - 1e-9):
                most[column] = (inside, letter[one.unit.micro_batch % 10])
    return "".join(letter for _, letter in most)


def draw(timelines: Sequence[tuple[str, PipelineTimeline]], path: Path) -> None:
    """Write the picture of titled timelines to `path`, on one scale. ConfigError for another ending, or where matplotlib is missing."""
    check_format(path)
    save(make_figure(timelines), path)


def make_figure(timelines: Sequence[tuple[str, PipelineTimeline]]) -> Figure:
    """The figure behind `draw`: a panel for each timeline; idle time is shaded, peaks stand at the right."""
    from matplotlib.patches import Patch

    heights = [0.55 + 0.3 * timeline.schedule.num_ranks for _, timeline in timelines]
    height, scale = sum(heights) + 0.7, max(timeline.step_s for _, timeline in timelines)
    figure = figure_kind()(figsize=(12.0, height), facecolor=_PAPER)
    top = height
    for (title, timeline), panel in zip(timelines, heights, strict=True):
        box = (0.06, (top - panel + 0.1) / height, 0.8, (panel - 0.45) / height)
        _draw(figure.add_axes(box), title, timeline, scale)
        top -= panel
    kinds = {one.unit.kind for _, timeline in timelines for one in timeline.units}
    patches = [Patch(facecolor=COLOURS[kind], label=word) for kind, word in LEGEND.items() if kind in kinds]
    patches.append(Patch(facecolor=_IDLE, hatch="///", edgecolor="#b6bdc6", label="idle"))
    figure.legend(handles=patches, loc="center left", bbox_to_anchor=(0.05, 0.25 / height), ncols=4, fontsize=8, frameon=False)
    return figure


def _draw(axes: Axes, title: str, timeline: PipelineTimeline, scale_s: float) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    ranks = timeline.schedule.num_ranks
    axes.set_xlim(0, scale_s)
    axes.set_ylim(ranks, 0)
    axes.add_patch(Rectangle((0, 0), timeline.step_s, ranks, facecolor=_IDLE, hatch="///", edgecolor="#b6bdc6", linewidth=0))
    small = scale_s / 90
    for one in timeline.units:
        box = Rectangle((one.start_s, one.rank + 0.06), one.end_s - one.start_s, 0.88, edgecolor=_PAPER, linewidth=0.5)
        # Later virtual stages and later slices are paler.
        shade = timeline.schedule.stages_of(one.rank).index(one.unit.stage) + one.unit.slice / timeline.schedule.slices
        colour, paper = (np.array(to_rgb(name)) for name in (COLOURS[one.unit.kind], _PAPER))
        box.set_facecolor(tuple(paper + max(0.4, 1 - 0.35 * shade) * (colour - paper)))
        axes.add_patch(box)
        if one.end_s - one.start_s >= small:
            middle = (one.start_s + one.end_s) / 2
            axes.text(middle, one.rank + 0.52, str(one.unit.micro_batch), fontsize=6, color=_INK, ha="center", va="center")
    for rank in range(ranks):
        axes.text(scale_s * 1.01, rank + 0.5, _words_of(timeline, rank), fontsize=7, color=_INK, va="center")
    axes.set_yticks([rank + 0.5 for rank in range(ranks)], [f"rank {rank}" for rank in range(ranks)])
    axes.set_title(f"{title}, {timeline.bubble_share:.1%} idle", fontsize=9, color=_INK, loc="left", pad=3)
    axes.tick_params(labelsize=8, labelcolor=_INK, length=0, axis="y")
    axes.set_xticks([])
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def main(arguments: list[str] | None = None) -> int:
    """Print and draw a schedule of equal units: forward, gradients of inputs and of weights take a second each, over stages and slices."""
    parser = argparse.ArgumentParser(prog="python -m efflaunch.parallel.pipeline.picture", description=main.__doc__)
    keys = f"schedule ({', '.join(SCHEDULES)}, all), {', '.join(SIZES)}"
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help=f"keys: {keys}")
    parser.add_argument("--order", action="store_true", help="print every rank's order of units too")
    parser.add_argument("--out", type=Path, metavar="FILE", help="draw it, as .svg, .png or .pdf")
    options = parser.parse_args(arguments)
    try:
        names, sizes = _words(options.words)
        timelines = [(name, _timeline(SCHEDULES[name](sizes))) for name in names]
        for name, timeline in timelines:
            print(f"{name}: {text_picture(timeline)}" + (f"\n{describe(timeline.schedule)}" if options.order else ""))
        if options.out is not None:
            draw(timelines, options.out)
            print(f"picture: {options.out}")
    except UserError as error:
        parser.error(str(error))
    return 0


def _timeline(schedule: PipelineSchedule) -> PipelineTimeline:
    """In a cost model in which a rank takes 3 s for a micro-batch, whatever its stages and slices."""
    check(schedule)
    one = schedule.num_ranks / (schedule.num_stages * schedule.slices)
    shape = schedule.num_stages, schedule.num_micro_batches, schedule.slices
    return simulate(schedule, costs(shape, forward_s=one, backward_s=one, weight_s=one))


def _words(words: Sequence[str]) -> tuple[list[str], dict[str, int]]:
    names, sizes = ["1f1b"], dict(SIZES)
    for word in words:
        key, _, value = word.partition("=")
        if key == "schedule" and value in (*SCHEDULES, "all"):
            names = list(SCHEDULES) if value == "all" else [value]
        elif key in sizes and value.isdecimal() and 1 <= int(value) <= 1024:
            sizes[key] = int(value)
        else:
            expected = f"schedule={'|'.join((*SCHEDULES, 'all'))}, or a size from 1 to 1024: {', '.join(SIZES)}"
            raise ConfigError("pipeline picture", found=word, expected=expected, hint="schedule=zbv ranks=4 micro_batches=8")
    return names, sizes


if __name__ == "__main__":
    raise SystemExit(main())
