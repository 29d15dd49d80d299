"""One step's plan as tables for a person. Imported when something is shown, so that rich is loaded only then."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from ...parallel.sequence.explain import Choice, Explanation, Verdict
from ...parallel.sequence.timeline import Bar, Timeline
from ...units import format_precise

MOST_ROWS = 24
"""Groups of a micro-batch beyond which those of one degree share a row."""
MOST_LENGTHS = 6


def make_console() -> Console:
    """A console that does not cut lines where nobody sees them."""
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=140)


def show_explanation(explanation: Explanation, heading: str, notes: Iterable[str] = ()) -> None:
    """Heading, who holds what, the longest sequence's choices, and why in words."""
    console = make_console()
    console.print(f"[bold]{heading}[/bold]")
    console.print(groups_table(explanation.line))
    console.print(choices_table(explanation.choices, explanation.plan.lengths[explanation.longest]))
    console.print()
    for text in explanation.words:
        console.print(text)
    for note in notes:
        console.print(f"note: {note}")


def groups_table(line: Timeline) -> Table:
    """Build the table of groups: one row a group, or a degree of a micro-batch where there are many."""
    measured = any(bar.measured_s is not None for bar in line.bars)
    table = Table(title="who holds which sequences", title_justify="left", title_style="bold")
    for name, right in (("ranks", False), ("degree", True), ("sequences", True), ("tokens", True), ("full", True), ("modelled", True)):
        table.add_column(name, justify="right" if right else "left")
    if measured:
        table.add_column("measured", justify="right")
    table.add_column("lengths, longest first")
    for index, shelf in enumerate(line.shelves):
        bars = list(line.of(index))
        table.add_section()
        table.add_row(f"[bold]micro-batch {index + 1}[/bold], {format_precise(shelf.stop_s - shelf.start_s)}")
        for together in _rows(bars):
            table.add_row(*_cells(together, line, measured))
    return table


def _rows(bars: Sequence[Bar]) -> list[list[Bar]]:
    if len(bars) <= MOST_ROWS:
        return [[bar] for bar in bars]
    degrees = sorted({bar.group.degree for bar in bars}, reverse=True)
    return [[bar for bar in bars if bar.group.degree == degree] for degree in degrees]


def _cells(bars: Sequence[Bar], line: Timeline, measured: bool) -> list[str]:
    first, tokens = bars[0], sum(bar.tokens for bar in bars)
    degree, inner = first.group.degree, first.group
    stop = max(bar.group.first_rank for bar in bars) + degree - 1
    ranks = f"{first.group.first_rank}" if stop == first.group.first_rank else f"{first.group.first_rank}-{stop}"
    shape = f"{degree}" if inner.ring == 1 else f"{inner.ulysses}x{inner.ring}"
    cells = [
        ranks if len(bars) == 1 else f"{ranks}: {len(bars)} groups",
        shape,
        f"{sum(len(bar.lengths) for bar in bars)}",
        f"{tokens:,}",
        f"{tokens / (len(bars) * degree * line.tokens_per_rank):.0%}",
        _span([bar.seconds for bar in bars]),
    ]
    if measured:
        cells.append(_span([bar.measured_s for bar in bars if bar.measured_s is not None]))
    lengths = sorted((length for bar in bars for length in bar.lengths), reverse=True)
    shown = " ".join(f"{length:,}" for length in lengths[:MOST_LENGTHS])
    return [*cells, shown + (f" ... {lengths[-1]:,}" if len(lengths) > MOST_LENGTHS else "")]


def _span(seconds: Sequence[float]) -> str:
    if not seconds:
        return "-"
    low, high = format_precise(min(seconds)), format_precise(max(seconds))
    return low if low == high else f"{low} - {high}"


def choices_table(choices: Iterable[Choice], tokens: int) -> Table:
    """Build the table of degrees for the longest sequence, with seconds of each."""
    table = Table(title=f"degrees for the longest sequence, {tokens:,} tokens", title_justify="left", title_style="bold")
    for name, right in (("degree", True), ("", False), ("seconds", True), ("rank-seconds", True), ("", False)):
        table.add_column(name, justify="right" if right else "left")
    for choice in choices:
        verdict = f"[bold]{choice.verdict.value}[/bold]" if choice.verdict is Verdict.CHOSEN else choice.verdict.value
        seconds = "" if choice.sequence_s is None else format_precise(choice.sequence_s)
        rank_s = "" if choice.rank_s is None else f"{choice.rank_s:,.4g}"
        table.add_row(str(choice.degree), verdict, seconds, rank_s, choice.reason)
    return table
