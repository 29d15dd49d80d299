"""Pictures of a schedule: three resources x time, as text and as .svg, .png or .pdf (which needs matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..figures import check_format, figure_kind, save
from .cost import Operator, Resource
from .simulate import Bar, PhaseTimeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LETTERS = {
    Operator.ATTENTION: "a",
    Operator.GATE: "o",
    Operator.INVERSE_ORDER: "o",
    Operator.EXPERTS: "x",
    Operator.EXPERT_WEIGHTS: "w",
    Operator.ATTENTION_WEIGHTS: "w",
    Operator.ATTENTION_GATHER: "h",
    Operator.ATTENTION_SCATTER: "h",
    Operator.EXPERT_GATHER: "g",
    Operator.EXPERT_SCATTER: "s",
    Operator.DISPATCH: "d",
    Operator.COMBINE: "c",
    Operator.REDUCE: "r",
}
LEGEND = {
    "a": "attention",
    "o": "router and order",
    "x": "experts",
    "w": "deferred weight gradients",
    "h": "gather and scatter of attention",
    "g": "gather of experts",
    "s": "scatter of experts",
    "d": "dispatch",
    "c": "combine",
    "r": "reduction of gradients",
}
NAMES = {Resource.COMPUTE: "compute", Resource.INTRA: "intra-node", Resource.INTER: "inter-node"}
COLOURS = {
    "a": "#7748a8",
    "o": "#c9a5e0",
    "x": "#e0607e",
    "w": "#f3b3bf",
    "h": "#1f8aa8",
    "g": "#1aa08a",
    "s": "#8fd3c5",
    "d": "#f48c6a",
    "c": "#fbbf77",
    "r": "#6b7280",
}
_INK, _PAPER, _IDLE = "#22272e", "#ffffff", "#eceff2"


def text_picture(phases: Sequence[PhaseTimeline], width: int = 100) -> str:
    """Lines of `width` columns a phase; a column has the letter of what ran most of its time, small for the first half-batch."""
    used: set[str] = set()
    lines = []
    for phase in phases:
        lines.append(f"{phase.plan.phase.value}, {1e3 * phase.seconds:.1f} ms")
        for resource, name in NAMES.items():
            row = _row([bar for bar in phase.bars if bar.task.resource is resource], phase.seconds, width)
            used |= set(row.lower())
            lines.append(f"{name:10} |{row}| {phase.busy_share(resource):4.0%} busy")
    words = ", ".join(f"{letter} {meaning}" for letter, meaning in LEGEND.items() if letter in used)
    return "\n".join([*lines, words])


def _row(bars: Sequence[Bar], seconds: float, width: int) -> str:
    column_s = seconds / width
    most = [(column_s / 2, ".")] * width
    for bar in bars:
        letter = LETTERS[bar.task.operator]
        letter = letter.upper() if bar.task.part % 2 and not bar.task.elements else letter
        for column in range(int(bar.start_s / column_s), min(width, int(bar.stop_s / column_s) + 1)):
            inside = min(bar.stop_s, (column + 1) * column_s) - max(bar.start_s, column * column_s)
            if inside >= most[column][0]:
                most[column] = (inside, letter)
    return "".join(letter for _, letter in most)


def draw(phases: Sequence[PhaseTimeline], title: str, path: Path) -> None:
    """Write the picture to `path`. ConfigError for another ending, or where matplotlib is missing."""
    check_format(path)
    save(make_figure(phases, title), path)


def make_figure(phases: Sequence[PhaseTimeline], title: str) -> Figure:
    """The figure behind `draw`: a panel for each phase, all on one scale of time."""
    from matplotlib.patches import Patch

    figure = figure_kind()(figsize=(12.0, 1.0 + 1.7 * len(phases)), facecolor=_PAPER)
    height, scale = figure.get_figheight(), max(phase.seconds for phase in phases)
    for index, phase in enumerate(phases):
        _draw_phase(figure.add_axes((0.135, 1 - (0.6 + 1.7 * index + 1.15) / height, 0.85, 1.1 / height)), phase, scale)
    figure.text(0.135, 1 - 0.25 / height, title, fontsize=12, fontweight="bold", color=_INK, va="center")
    used = {LETTERS[bar.task.operator] for phase in phases for bar in phase.bars}
    patches = [Patch(facecolor=COLOURS[letter], label=meaning) for letter, meaning in LEGEND.items() if letter in used]
    figure.legend(handles=patches, loc="center left", bbox_to_anchor=(0.13, 0.25 / height), ncols=5, fontsize=8, frameon=False)
    return figure


def _draw_phase(axes: Axes, phase: PhaseTimeline, scale_s: float) -> None:
    """Bars of a phase; those of the second half-batch are hatched."""
    from matplotlib.patches import Rectangle

    axes.set_xlim(0, 1e3 * scale_s * 1.01)
    axes.set_ylim(len(NAMES), 0)
    axes.add_patch(Rectangle((0, 0), 1e3 * phase.seconds, len(NAMES), facecolor=_IDLE, linewidth=0))
    for bar in phase.bars:
        box = Rectangle((1e3 * bar.start_s, bar.task.resource + 0.06), 1e3 * (bar.stop_s - bar.start_s), 0.88)
        second = bar.task.part % 2 and not bar.task.elements
        box.set(facecolor=COLOURS[LETTERS[bar.task.operator]], edgecolor=_PAPER, linewidth=0.5, hatch="///" if second else None)
        axes.add_patch(box)
    shares = {resource: f"{name} ({phase.busy_share(resource):.0%})" for resource, name in NAMES.items()}
    axes.set_yticks([resource + 0.5 for resource in shares], list(shares.values()))
    axes.set_title(f"{phase.plan.phase.value}, {1e3 * phase.seconds:.1f} ms", fontsize=9, color=_INK, loc="left", pad=3)
    axes.tick_params(labelsize=8, labelcolor=_INK, length=0, axis="y")
    axes.tick_params(labelsize=8, labelcolor=_INK, color="#9ca3af", length=3, axis="x")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
