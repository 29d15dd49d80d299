"""Draws a run's pictures as SVG texts that stand in a page as they are: no fonts, no links, no identifiers twice. Needs matplotlib."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ...training.evaluation.config import is_better_higher
from ...units import format_tokens
from ..rundir.metrics_reader import Event
from .facts import RunFacts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#4b5563")
_INCHES = (7.2, 2.9)
Draw = Callable[["Axes", RunFacts], bool]
"""Draws on axes; False where the run has nothing to show."""


def pictures(facts: RunFacts) -> Iterator[tuple[str, str]]:
    """(title, SVG) of every picture the run has something for. ConfigError where matplotlib is missing."""
    for number, (title, draw) in enumerate(PICTURES):
        svg = _svg(draw, facts, f"p{number}-")
        if svg is not None:
            yield title, svg


def _svg(draw: Draw, facts: RunFacts, prefix: str) -> str | None:
    figure = _figure()
    axes = figure.add_subplot()
    axes.grid(visible=True, color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if not draw(axes, facts):
        return None
    return _inline(figure, prefix)


def _figure() -> Figure:
    try:
        from matplotlib.figure import Figure as FigureKind
    except ImportError as error:
        hint = "pip install 'efflaunch[plot]'"
        raise ConfigError("efflaunch report", found="no package matplotlib", expected="it, to draw with", hint=hint) from error
    return FigureKind(figsize=_INCHES, layout="constrained")


def _inline(figure: Figure, prefix: str) -> str:
    """The figure as an <svg> element whose identifiers begin with `prefix`."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "efflaunch", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'href="#', f'href="#{prefix}', text)
    return re.sub(r"url\(#", f"url(#{prefix}", text)


def draw_loss(axes: Axes, facts: RunFacts) -> bool:
    """The loss of every step, and of every evaluation."""
    steps, losses = facts.series("loss")
    if steps:
        axes.plot(steps, losses, color=COLOURS[7], linewidth=1.2, label="training")
    for colour, (corpus, events) in zip(_colours(), _by_corpus(facts).items(), strict=False):
        points = [(int(event["step"]), event["loss"]) for event in events if event.get("loss") is not None]
        axes.plot([step for step, _ in points], [loss for _, loss in points], "o-", color=colour, markersize=4, label=corpus)
    best = facts.progress.best
    if best is not None and best.get("value") is not None and not is_better_higher(str(best["metric"])):
        axes.plot([best["step"]], [best["value"]], "*", color="#facc15", markeredgecolor="#1f2937", markersize=12, label="best, pinned")
    _label(axes, "step", "loss per target token")
    return bool(steps or facts.evaluations)


def draw_positions(axes: Axes, facts: RunFacts) -> bool:
    """Loss by tokens of context, of each corpus's last evaluation; its first one dashed."""
    drawn = False
    for colour, (corpus, events) in zip(_colours(), _by_corpus(facts).items(), strict=False):
        for event, style in ((events[-1], "o-"), (events[0], "--")):
            rows = [row for row in event.get("positions") or () if row.get("loss") is not None]
            if rows and (style == "o-" or len(events) > 1):
                label = f"{corpus}, step {event['step']}"
                context, losses = [row["up_to"] for row in rows], [row["loss"] for row in rows]
                axes.plot(context, losses, style, color=colour, markersize=4, label=label)
                drawn = True
    _by_powers_of_two(axes)
    _label(axes, "tokens of context, up to", "loss per target token")
    return drawn


def draw_lengths(axes: Axes, facts: RunFacts) -> bool:
    """The same targets at each of eval.lengths, of each corpus's last evaluation."""
    drawn = False
    for colour, (corpus, events) in zip(_colours(), _by_corpus(facts).items(), strict=False):
        if events[-1].get("needles"):
            continue  # their texts differ from length to length
        rows = [row for row in events[-1].get("lengths") or () if row.get("loss") is not None]
        if rows:
            axes.plot([row["length"] for row in rows], [row["loss"] for row in rows], "o-", color=colour, label=corpus)
            drawn = True
    _by_powers_of_two(axes)
    _label(axes, "tokens of context", "loss of the same targets")
    return drawn


def draw_needles(axes: Axes, facts: RunFacts) -> bool:
    """A heat map of the last evaluation on needles: the share of exact answers, tasks and lengths across, depths down."""
    events = [event for event in facts.evaluations if event.get("needles")]
    if not events:
        return False
    rows = events[-1]["needles"]
    columns = sorted({(row["task"], row["length"]) for row in rows})
    depths = sorted({row["depth"] for row in rows})
    shares = {(row["task"], row["length"], row["depth"]): row["exact"] for row in rows}
    grid = [[shares.get((*column, depth), math.nan) for column in columns] for depth in depths]
    axes.grid(visible=False)
    axes.pcolormesh(grid, cmap="RdYlGn", vmin=0, vmax=1, edgecolors="white", linewidth=1)
    for y, line in enumerate(grid):
        for x, share in enumerate(line):
            if math.isfinite(share):
                colour = "white" if abs(share - 0.5) > 0.4 else "black"
                axes.text(x + 0.5, y + 0.5, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks([x + 0.5 for x in range(len(columns))], [f"{task}\n{format_tokens(length)}" for task, length in columns], fontsize=7)
    axes.set_yticks([y + 0.5 for y in range(len(depths))], [f"{100 * depth:g} %" for depth in depths])
    axes.invert_yaxis()
    _label(axes, f"% of exact answers, step {events[-1]['step']}", "tokens before the needle")
    return True


def draw_speed(axes: Axes, facts: RunFacts) -> bool:
    """Tokens per second, over all ranks."""
    steps, values = facts.series("tokens_per_s")
    axes.plot(steps, values, color=COLOURS[0], linewidth=1.2)
    _from_zero(axes)
    _label(axes, "step", "tokens per second, all ranks")
    return bool(steps)


def draw_utilisation(axes: Axes, facts: RunFacts) -> bool:
    """MFU and HFU; on CPUs, which have no known peak, the model's own FLOPs."""
    shares = {"mfu": "MFU", "hfu": "HFU"}
    drawn = False
    for colour, (key, label) in zip(_colours(), shares.items(), strict=False):
        steps, values = facts.series(key)
        if steps:
            axes.plot(steps, [100 * value for value in values], color=colour, linewidth=1.2, label=label)
            drawn = True
    if drawn:
        _from_zero(axes)
        _label(axes, "step", "% of the device's peak")
        return True
    steps, values = facts.series("model_flops_per_s")
    axes.plot(steps, [value / 1e9 for value in values], color=COLOURS[0], linewidth=1.2)
    _from_zero(axes)
    _label(axes, "step", "the model's GFLOP/s a rank (no peak known)")
    return bool(steps)


def draw_plans(axes: Axes, facts: RunFacts) -> bool:
    """Share of each step's tokens in groups of each number of ranks."""
    steps = [event for event in facts.steps if event.get("groups")]
    shares = [_shares(event) for event in steps]
    degrees = sorted({degree for share in shares for degree in share})
    bottom = [0.0] * len(steps)
    for colour, degree in zip(_colours(), degrees, strict=False):
        heights = [100 * share.get(degree, 0.0) for share in shares]
        label = f"{degree} rank{'s' * (degree > 1)}"
        axes.bar([int(event["step"]) for event in steps], heights, bottom=bottom, width=1.0, color=colour, label=label)
        bottom = [low + high for low, high in zip(bottom, heights, strict=True)]
    _label(axes, "step", "% of tokens in groups of")
    return bool(steps)


def draw_memory(axes: Axes, facts: RunFacts) -> bool:
    """The most each rank took, against what the certificate allows."""
    peaks = facts.progress.peak_bytes
    ranks = sorted(peaks)
    axes.bar([str(rank) for rank in ranks], [peaks[rank] / 2**30 for rank in ranks], color=COLOURS[0], label="measured")
    checks = facts.of("certificate")
    if checks:
        most, label = checks[-1]["predicted_bytes"] / 2**30, f"certificate ({checks[-1]['compared']})"
        axes.axhline(most, color=COLOURS[4], linewidth=1.5, label=label)
    _label(axes, "rank", "GiB")
    return bool(ranks)


def draw_course(axes: Axes, facts: RunFacts) -> bool:
    """Starts, steps, evaluations and checkpoints over time."""
    rows = {
        "starts": facts.of("start"), "stops": facts.of("stop", "early_stop", "end"), "saved": facts.of("checkpoint"),
        "not saved": facts.of("checkpoint_failed"), "evaluated": list(facts.evaluations), "steps": list(facts.steps),
    }  # fmt: skip
    timed = {name: [event["time"] for event in events if isinstance(event.get("time"), (int, float))] for name, events in rows.items()}
    timed = {name: times for name, times in timed.items() if times}
    if not timed:
        return False
    first = min(min(times) for times in timed.values())
    for number, times in enumerate(timed.values()):
        axes.plot([(at - first) / 60 for at in times], [number] * len(times), "|", color=COLOURS[number % len(COLOURS)], markersize=14)
    for attempt in facts.attempts:
        if attempt.failure is not None and attempt.ended is not None:
            axes.axvline((attempt.ended - first) / 60, color=COLOURS[4], linestyle=":", linewidth=1.2)
    axes.set_yticks(range(len(timed)), list(timed))
    axes.set_ylim(-0.6, len(timed) - 0.4)
    _label(axes, "minutes since the first start", "")
    return True


PICTURES: tuple[tuple[str, Draw], ...] = (
    ("Loss", draw_loss),
    ("Loss by position", draw_positions),
    ("The same targets with more context", draw_lengths),
    ("Needles by length and depth", draw_needles),
    ("Speed", draw_speed),
    ("Use of the devices", draw_utilisation),
    ("Plans: groups over steps", draw_plans),
    ("Memory, predicted and measured", draw_memory),
    ("Time line", draw_course),
)
"""Every picture of a page, in its order."""


def _shares(event: Event) -> dict[int, float]:
    """Share of the step's tokens by number of ranks of their group."""
    tokens: dict[int, float] = {}
    for group in event["groups"]:
        # Somebody's edit may have left anything here.
        if isinstance(group, dict) and isinstance(group.get("degree"), int) and isinstance(group.get("tokens"), int):
            tokens[group["degree"]] = tokens.get(group["degree"], 0.0) + group["tokens"]
    total = sum(tokens.values()) or 1.0
    return {degree: count / total for degree, count in tokens.items()}


def _by_corpus(facts: RunFacts) -> dict[str, list[Event]]:
    """Evaluations of each corpus, in the order of steps."""
    corpora: dict[str, list[Event]] = {}
    for event in facts.evaluations:
        corpora.setdefault(event["corpus"], []).append(event)
    return {name: sorted(events, key=lambda event: int(event["step"])) for name, events in corpora.items()}


def _colours() -> Iterator[str]:
    while True:
        yield from COLOURS


def _from_zero(axes: Axes) -> None:
    """Begin the vertical axis at zero."""
    top = float(axes.dataLim.ymax)
    axes.set_ylim(0, 1.1 * top if math.isfinite(top) and top > 0 else 1.0)


def _by_powers_of_two(axes: Axes) -> None:
    """Number the horizontal axis as `4K`, in powers of two."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: format_tokens(round(value)))


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    handles: list[Any] = axes.get_legend_handles_labels()[0]
    if len(handles) > 1:
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
