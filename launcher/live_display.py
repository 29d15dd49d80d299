"""Shows progress while ranks run: a live table on a terminal, plain lines elsewhere. Follows metrics.jsonl."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from ..training.reporting.config import Display as Mode
from ..units import format_bytes, format_seconds
from ..utils.text import plain
from .rundir.metrics_reader import Event
from .rundir.progress import (
    RunProgress,
    best_line,
    certificate_line,
    drift_line,
    early_stop_line,
    evaluation_line,
    evaluation_progress_line,
    evaluation_text,
    mirror_line,
    number_text,
    plans_text,
    score_line,
    source_texts,
    speed_text,
    start_line,
    step_line,
    stragglers_line,
    stragglers_text,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

_MAX_RANK_ROWS = 16
NEWS: Mapping[str, Callable[[Event], str]] = MappingProxyType(
    {
        "score": score_line,
        "eval": evaluation_line,
        "eval_progress": evaluation_progress_line,
        "best": best_line,
        "early_stop": early_stop_line,
    }
)
"""Events that every display tells of, and how."""


class Display(Protocol):
    """Shown while the ranks run."""

    def show(self, events: list[Event]) -> None:
        """Take in new metrics events."""

    def note(self, text: str) -> None:
        """Something that happened besides steps."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def make_display(mode: Mode, title: str, every_steps: int) -> Display:
    """The display for this terminal and `logging.display`."""
    if mode is Mode.QUIET:
        return PlainDisplay(every_steps=None)
    if mode is Mode.LIVE or (mode is Mode.AUTO and sys.stdout.isatty()):
        return LiveDisplay(title)
    return PlainDisplay(every_steps=every_steps)


class NoDisplay:
    """Shows nothing: in place of one that failed."""

    def show(self, events: list[Event]) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class PlainDisplay:
    """Prints one line per shown step; `every_steps` None: notes only."""

    def __init__(self, every_steps: int | None) -> None:
        self.every_steps = every_steps
        self.progress = RunProgress()

    def show(self, events: list[Event]) -> None:
        for event in events:
            self.progress.apply([event])
            line = self._line(event)
            if line and self.every_steps is not None:
                self.note(line)

    def _line(self, event: Event) -> str | None:
        if event["event"] == "start":
            return start_line(event)
        if event["event"] == "step" and self._is_shown(event["step"]):
            return step_line(self.progress)
        if event["event"] in NEWS:
            return NEWS[event["event"]](event)
        if event["event"] == "certificate":
            return certificate_line(event)
        if event["event"] == "checkpoint":
            took, waited = (event.get(name) for name in ("save_s", "stall_s"))
            parts = [f"saved {event.get('path', '')}"] + ([] if took is None else [f"in {format_seconds(took)}"])
            return " ".join(parts) + ("" if waited is None else f", training waited {format_seconds(waited)}")
        return _bad_news(event)

    def _is_shown(self, step: int) -> bool:
        assert self.every_steps is not None or step
        return step % (self.every_steps or 1) == 0 or step in (1, self.progress.steps)

    def note(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


class LiveDisplay:
    """A table redrawn in place; notes scroll above it."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live as RichLive
        from rich.markup import escape

        self.title = escape(title)
        self.progress = RunProgress()
        # Named, for rich puts itself in front of sys.stdout while it draws.
        self.console = console or RichConsole(file=getattr(sys.stdout, "rich_proxied_file", sys.stdout))
        self.live: Live = RichLive(self.render(), console=self.console, refresh_per_second=4, transient=False)
        self._restore = quiet_control_keys()
        self.live.start()

    def show(self, events: list[Event]) -> None:
        for event in events:
            if event["event"] == "start":
                self.note(start_line(event))
            elif event["event"] in NEWS:
                self.note(NEWS[event["event"]](event))
            elif news := _bad_news(event):
                self.note(news)
        self.progress.apply(events)
        self.live.update(self.render())

    def note(self, text: str) -> None:
        self.console.print(plain(text), markup=False, highlight=False)

    def close(self) -> None:
        self.live.update(self.render())
        self.live.stop()
        self._restore()

    def render(self) -> RenderableType:
        """The whole picture."""
        from rich.console import Group
        from rich.panel import Panel

        if self.progress.last is None:
            return Panel("starting the ranks ...", title=self.title, title_align="left")
        return Panel(Group(self._bar(), self._numbers(), self._ranks()), title=self.title, title_align="left")

    def _bar(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        left = self.progress.time_left_s
        row = Table.grid(expand=True, padding=(0, 1))
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        to_go = "" if left is None else f"{format_seconds(left)} to go"
        bar = ProgressBar(total=max(self.progress.steps, 1), completed=self.progress.step)
        row.add_row(f"step {self.progress.step}/{self.progress.steps}", bar, to_go)
        return row

    def _numbers(self) -> RenderableType:
        from rich.table import Table

        event = self.progress.last or {}
        saved = self.progress.checkpoint
        table = Table.grid(padding=(0, 2))
        first, last = (number_text(self.progress.losses[step], ".4f") for step in (min(self.progress.losses), event["step"]))
        speed = number_text(self.progress.tokens_per_s, ",.0f")
        table.add_row("loss", f"{last}  (first {first})")
        table.add_row(
            "speed",
            f"{speed} tokens/s, {format_seconds(event['step_s'])} a step, {self.progress.total_tokens:,} so far",
        )
        used = speed_text(event)
        if used:
            table.add_row("devices", used)
        for index, text in enumerate(source_texts(event)):
            table.add_row("" if index else "sources", _shortened(text))
        for index, name in enumerate(sorted(self.progress.evaluations)):
            evaluation = self.progress.evaluations[name]
            table.add_row("" if index else "evaluation", _shortened(f"{evaluation_text(evaluation)}, after step {evaluation['step']}"))
        norm = event.get("grad_norm")
        table.add_row("optimizer", f"lr {number_text(event.get('lr'), '.2e')}" + ("" if norm is None else f", gradient norm {norm:.3f}"))
        if event.get("expert_load") is not None:
            idle = f", {event['idle_experts']} idle" if event.get("idle_experts") else ""
            mean = number_text(event.get("expert_load_mean"), ".1f")
            busiest = f"the busiest gets {event['expert_load']:.1f} times the mean (layer {event.get('expert_load_layer')})"
            dropped = "" if event.get("dropped_share") is None else f", {event['dropped_share']:.1%} of all rows dropped"
            table.add_row("experts", f"{busiest}, {mean} over layers{idle}{dropped}")
        table.add_row("checkpoint", "none yet" if saved is None else f"step {saved['step']}")
        table.add_row("plan", f"{event['sequences']} sequences, {event['micro_batches']} micro-batches: {_shortened(event['plan'])}")
        plans = plans_text(self.progress)
        if plans:
            table.add_row("planner", plans)
        if self.progress.stragglers:
            table.add_row("stragglers", stragglers_text(self.progress.stragglers))
        if self.progress.memory:
            table.add_row("memory", _shortened("; ".join(self.progress.memory)))
        return table

    def _ranks(self) -> RenderableType:
        from rich.table import Table

        table = Table(box=None, padding=(0, 2))
        for name in ("rank", "tokens", "peak memory"):
            table.add_column(name, justify="right")
        ranks = (self.progress.last or {}).get("ranks", [])
        for rank in ranks[:_MAX_RANK_ROWS]:
            table.add_row(str(rank["rank"]), f"{rank['tokens']:,}", format_bytes(rank["peak_bytes"]))
        if len(ranks) > _MAX_RANK_ROWS:
            table.add_row("...", f"{len(ranks) - _MAX_RANK_ROWS} more", "")
        return table


def quiet_control_keys() -> Callable[[], None]:
    """Have the terminal not print `^C`, which would push the table out of place; returns what undoes that."""
    import termios

    try:
        before = termios.tcgetattr(sys.stdin)
        if os.tcgetpgrp(sys.stdin.fileno()) != os.getpgrp():
            # In the background: the terminal is another program's.
            return lambda: None
        # TCSANOW: draining would wait for a terminal that is stopped.
        termios.tcsetattr(sys.stdin, termios.TCSANOW, [*before[:3], before[3] & ~termios.ECHOCTL, *before[4:]])
    except (termios.error, ValueError, OSError):
        return lambda: None

    def restore() -> None:
        # A terminal that is gone has nothing to restore.
        with suppress(termios.error, OSError):
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)

    return restore


def _bad_news(event: Event) -> str | None:
    """Return the event as a warning that is shown on any display; None where it is none."""
    if event["event"] == "checkpoint_failed":
        return f"checkpoint of step {event['step']} failed: {event['error']}"
    if event["event"] == "mirror_failed":
        return mirror_line(event)
    if event["event"] == "certificate":
        return None if event.get("ok") else certificate_line(event)
    if event["event"] == "planner_failed":
        return f"{event['error']}: greedy plans from step {event.get('step', 'unknown')} on"
    if event["event"] == "stragglers":
        return stragglers_line(event)
    return drift_line(event) if event["event"] == "drift" else None


def _shortened(text: str, width: int = 160) -> str:
    return text if len(text) <= width else f"{text[: width - 4]} ..."
