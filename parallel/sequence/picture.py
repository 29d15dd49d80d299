"""A picture of one step: ranks x time, groups coloured by degree, and which lengths got which degree. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...units import format_precise
from ..figures import check_format, figure_kind, save
from .timeline import Bar, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH_IN = 12.0
_INK, _PAPER, _IDLE, _OVERHEAD = "#22272e", "#ffffff", "#eceff2", "#c9d0d8"
_MEASURED, _BOUND, _DASHES = "#0b0f14", "#0f766e", (0, (5, 3))
_COLOURS = ("#fde68a", "#fbbf77", "#f48c6a", "#e0607e", "#b04a9a", "#7748a8", "#4a4fb0", "#2f6db5", "#1f8aa8", "#1aa08a", "#3f8f4f")
"""Colours of degree 1, 2, 4, ...: light to dark, warm to cold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """Words and marks around the drawing."""

    title: str
    subtitle: str = ""
    lower_bound_s: float | None = None
    bound: str = ""


def draw(line: Timeline, caption: Caption, path: Path) -> None:
    """Write the picture to `path`, .svg, .png or .pdf. ConfigError for another ending, or where matplotlib is missing."""
    check_format(path)
    save(make_figure(line, caption), path)


def make_figure(line: Timeline, caption: Caption) -> Figure:
    """The figure behind `draw`: the step on top, the lengths below."""
    step_in = min(5.4, max(1.8, 0.3 * line.world_size))
    height = step_in + 3.75
    figure = figure_kind()(figsize=(_WIDTH_IN, height), facecolor=_PAPER)
    left, width = 0.055, 0.925
    _draw_step(figure.add_axes((left, 2.1 / height, width, step_in / height)), line, caption)
    _draw_lengths(figure.add_axes((left, 0.55 / height, width, 0.95 / height)), line)
    figure.text(left, 1 - 0.34 / height, caption.title, fontsize=14, fontweight="bold", color=_INK, va="center")
    figure.text(left, 1 - 0.64 / height, caption.subtitle, fontsize=9.5, color="#4b5563", va="center")
    _legend(figure, line, caption, 1 - 0.97 / height, 0.24 / height)
    return figure


def colour(degree: int) -> str:
    """The colour of a group of `degree` ranks."""
    return _COLOURS[min(degree.bit_length() - 1, len(_COLOURS) - 1)]


def _draw_step(axes: Axes, line: Timeline, caption: Caption) -> None:
    from matplotlib.patches import Rectangle

    axes.set_xlim(0, max(line.step_s * 1.015, 1e-9))
    axes.set_ylim(line.world_size, 0)
    axes.add_patch(Rectangle((0, 0), line.step_s, line.world_size, facecolor=_IDLE, linewidth=0))
    end = max((shelf.stop_s for shelf in line.shelves), default=0.0)
    axes.add_patch(Rectangle((end, 0), line.step_s - end, line.world_size, facecolor=_OVERHEAD, linewidth=0))
    if not line.barrier_free:
        for shelf in line.shelves:
            axes.add_patch(Rectangle((shelf.start_s, 0), shelf.overhead_s, line.world_size, facecolor=_OVERHEAD, linewidth=0))
    for start, stop in [(0.0, line.shelves[0].start_s)] + [(shelf.groups_stop_s, shelf.stop_s) for shelf in line.shelves]:
        gather = Rectangle((start, 0), stop - start, line.world_size)
        gather.set(facecolor=_IDLE, edgecolor=_OVERHEAD, hatch="///", linewidth=0)
        axes.add_patch(gather)
    _draw_bars(axes, line)
    _draw_marks(axes, line, caption)
    _outline_longest(axes, line.longest)
    axes.set_xlabel("modelled seconds", fontsize=9, color=_INK)
    axes.set_ylabel("rank", fontsize=9, color=_INK)
    axes.set_yticks(_rank_ticks(line.world_size))
    _plain(axes)


def _draw_bars(axes: Axes, line: Timeline) -> None:
    from matplotlib.collections import LineCollection, PatchCollection
    from matplotlib.patches import Rectangle

    points = _points(axes)
    boxes = [Rectangle((bar.start_s, bar.group.first_rank), bar.seconds, bar.group.degree) for bar in line.bars]
    # A border as wide as the bar is high would hide it.
    borders = [min(1.0, 0.12 * bar.group.degree * points[1]) for bar in line.bars]
    fills = [colour(bar.group.degree) for bar in line.bars]
    axes.add_collection(PatchCollection(boxes, facecolors=fills, edgecolors=_PAPER, linewidths=borders, zorder=2))
    cuts = [cut for bar in line.bars for cut in _cuts(bar, points)]
    axes.add_collection(LineCollection(cuts, colors=_PAPER, linewidths=0.6, alpha=0.8, zorder=2.5))
    ends = [
        [(bar.start_s + bar.measured_s, bar.group.first_rank + inset) for inset in (0.06 * bar.group.degree, 0.94 * bar.group.degree)]
        for bar in line.bars
        if bar.measured_s is not None
    ]
    axes.add_collection(LineCollection(ends, colors=_MEASURED, linewidths=1.8, zorder=6))
    for bar in line.bars:
        _label_bar(axes, bar, points)


def _cuts(bar: Bar, points: tuple[float, float]) -> Iterator[list[tuple[float, float]]]:
    """Lines between the sequences of a bar; closer than two points they would hide its colour."""
    at = bar.start_s
    for seconds in bar.sequence_s[:-1]:
        at += seconds
        if seconds * points[0] >= 2 and bar.group.degree * points[1] >= 4:
            yield [(at, bar.group.first_rank), (at, bar.group.first_rank + bar.group.degree)]


def _label_bar(axes: Axes, bar: Bar, points: tuple[float, float]) -> None:
    """Lengths of the longest, as far as they have room; where none has, how many sequences there are."""
    height = bar.group.degree * points[1] * 0.72
    size = min(9.0, height * 0.72)
    if size < 4.5:
        return
    middle, ink = bar.group.first_rank + bar.group.degree / 2, _ink_on(colour(bar.group.degree))
    at, written = bar.start_s, False
    for length, seconds in zip(bar.lengths, bar.sequence_s, strict=True):
        text = short(length)
        if not _fits(text, size, seconds * points[0]):
            break
        axes.text(at + seconds / 2, middle, text, fontsize=size, color=ink, ha="center", va="center_baseline", zorder=5)
        written = True
        at += seconds
    whole = f"{len(bar.lengths)} seq, {short(bar.tokens)}"
    for text in (whole, f"{len(bar.lengths)} seq"):
        if not written and _fits(text, size, bar.seconds * points[0]):
            axes.text(bar.start_s + bar.seconds / 2, middle, text, fontsize=size, color=ink, ha="center", va="center_baseline", zorder=5)
            return


def _draw_marks(axes: Axes, line: Timeline, caption: Caption) -> None:
    for index, shelf in enumerate(line.shelves):
        if not line.barrier_free and len(line.shelves) <= 24:
            axes.text(
                (shelf.start_s + shelf.stop_s) / 2, -0.012 * line.world_size, f"{index + 1}", fontsize=8, color="#6b7280", ha="center"
            )
    if caption.lower_bound_s is not None:
        axes.axvline(caption.lower_bound_s, color=_PAPER, linewidth=3.5, alpha=0.7, zorder=3.5)
        axes.axvline(caption.lower_bound_s, color=_BOUND, linewidth=1.6, linestyle=_DASHES, zorder=3.6)


def _outline_longest(axes: Axes, bar: Bar) -> None:
    """A frame around the longest sequence: it is what decides most of a plan."""
    from matplotlib.patches import Rectangle

    box = Rectangle((bar.start_s, bar.group.first_rank), bar.sequence_s[0], bar.group.degree)
    box.set(facecolor="none", edgecolor=_INK, linewidth=1.8, zorder=5.5)
    axes.add_patch(box)


def _draw_lengths(axes: Axes, line: Timeline) -> None:
    """Tokens in sequences of each power of two of length, stacked by degree."""
    import numpy as np

    lengths = np.array([length for bar in line.bars for length in bar.lengths], dtype=np.int64)
    degrees = np.array([bar.group.degree for bar in line.bars for _ in bar.lengths], dtype=np.int64)
    # A bin ends with its power of two: sequences cut at max_seq_len are as long as that.
    bins = np.maximum(np.ceil(np.log2(lengths)).astype(int) - 1, 0)
    floor = np.zeros(int(bins.max()) + 1)
    for degree in sorted(set(degrees.tolist())):
        tokens = np.bincount(bins, weights=lengths * (degrees == degree), minlength=len(floor))
        axes.bar(np.arange(len(floor)) + 0.5, tokens, width=0.94, bottom=floor, color=colour(degree), linewidth=0)
        floor += tokens
    counts = np.bincount(bins)
    for index in np.flatnonzero(counts).tolist():
        axes.text(index + 0.5, floor[index] + 0.03 * floor.max(), f"{counts[index]}", ha="center", fontsize=7.5, color="#6b7280")
    first = int(bins.min())
    axes.set_xlim(first, len(floor))
    axes.set_ylim(0, floor.max() * 1.22)
    ticks = list(range(first, len(floor) + 1))
    axes.set_xticks(ticks, [short(1 << tick) for tick in ticks])
    axes.set_yticks([])
    axes.set_xlabel("tokens of a sequence", fontsize=9, color=_INK)
    axes.set_ylabel("tokens held", fontsize=9, color=_INK)
    _plain(axes)


def _legend(figure: Figure, line: Timeline, caption: Caption, top: float, row: float) -> None:
    """Degrees in a first row, everything else in a second."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    degrees = sorted({bar.group.degree for bar in line.bars})
    marks: list[Any] = [
        Patch(facecolor="none", edgecolor=_INK, linewidth=1.8, label="longest sequence"),
        Patch(facecolor=_IDLE, label="waiting for slower groups"),
    ]
    if line.overhead_share > 0:
        marks += [Patch(facecolor=_OVERHEAD, label="cost of a micro-batch, of a step")]
    if line.gather_share > 0:
        marks += [Patch(facecolor=_IDLE, edgecolor=_OVERHEAD, hatch="////", linewidth=0, label="weights still on their way")]
    if any(bar.measured_s is not None for bar in line.bars):
        marks += [Line2D([], [], color=_MEASURED, linewidth=1.8, label="measured end")]
    if caption.lower_bound_s is not None:
        label = f"no plan ends before {format_precise(caption.lower_bound_s)} ({caption.bound} bound)"
        marks += [Line2D([], [], color=_BOUND, linewidth=1.6, linestyle=_DASHES, label=label)]
    groups: list[Any] = [
        Patch(facecolor=colour(degree), label=_degree_name(line.bars, degree, brief=len(degrees) > 7 and degree > degrees[0]))
        for degree in degrees
    ]
    style: dict[str, Any] = {"handlelength": 1.5, "columnspacing": 1.4, "handletextpad": 0.5, "borderaxespad": 0.0, "borderpad": 0.0}
    for handles, at in ((groups, top), (marks, top - row)):
        place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (0.055, at), "ncols": len(handles)}
        figure.legend(handles=handles, fontsize=8.5, labelcolor=_INK, frameon=False, **place, **style)


def _degree_name(bars: Iterable[Bar], degree: int, *, brief: bool) -> str:
    """`4 ranks: 12 groups`; brief, after one that was not: `4: 12`."""
    number = sum(bar.group.degree == degree for bar in bars)
    if brief:
        return f"{degree}: {number:,}"
    return f"{degree} rank{'s' * (degree > 1)}: {number} group{'s' * (number > 1)}"


def short(tokens: int) -> str:
    """`384`, `1.5K`, `262K`, `1M`: at most three digits, in units of 1,024."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= size:
            value = tokens / size
            return f"{value:.0f}{unit}" if value >= 9.95 or abs(value - round(value)) < 0.05 else f"{value:.1f}{unit}"
    return str(tokens)


def _rank_ticks(world_size: int) -> Sequence[int]:
    every = 1
    while world_size / every > 16:
        every *= 2
    return range(0, world_size + 1, every)


def _points(axes: Axes) -> tuple[float, float]:
    """Points (1/72 inch, on paper) of one second and of one rank."""
    per_pixel = 72 / axes.figure.dpi
    width, height = axes.bbox.width * per_pixel, axes.bbox.height * per_pixel
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    return width / abs(right - left), height / abs(high - low)


def _fits(text: str, size: float, width: float) -> bool:
    return len(text) * size * 0.6 + 2 <= width


def _ink_on(fill: str) -> str:
    red, green, blue = (int(fill[i : i + 2], 16) for i in (1, 3, 5))
    return _INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else _PAPER


def _plain(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#9ca3af")
    axes.tick_params(labelsize=8, color="#9ca3af", labelcolor=_INK, length=3)
