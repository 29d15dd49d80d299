"""Progress of `efflaunch data prepare`: a bar on a terminal, a line now and then otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from ...training.data.prepare import PrepareProgress
from ...units import format_seconds

_LINE_EVERY_S = 10.0


@contextmanager
def show_progress(stream: TextIO) -> Iterator[Callable[[PrepareProgress], None]]:
    """A function to hand each Progress to."""
    if stream.isatty():
        with _bar(stream) as report:
            yield report
    else:
        yield _lines(stream)


def progress_text(progress: PrepareProgress) -> str:
    """`1,234 documents, 5.1M tokens/s, 45 %, 20 s to go`; rates of this attempt alone."""
    parts = [f"{progress.documents:,} documents", f"{progress.tokens:,} tokens"]
    if progress.total_bytes:
        parts.append(f"{100 * progress.done_bytes // progress.total_bytes} %")
    done_here = progress.done_bytes - progress.resumed_bytes
    if progress.elapsed_s > 0 and done_here > 0:
        new_tokens = progress.tokens - progress.resumed_tokens
        parts.append(f"{new_tokens / progress.elapsed_s:,.0f} tokens/s")
        left_s = (progress.total_bytes - progress.done_bytes) * progress.elapsed_s / done_here
        parts.append(f"{format_seconds(left_s)} to go")
    return ", ".join(parts)


def _lines(stream: TextIO) -> Callable[[PrepareProgress], None]:
    last = time.monotonic()

    def report(progress: PrepareProgress) -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_EVERY_S:
            last = time.monotonic()
            print(f"prepare: {progress_text(progress)}", file=stream, flush=True)

    return report


@contextmanager
def _bar(stream: TextIO) -> Iterator[Callable[[PrepareProgress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress

    console = Console(file=stream)
    with RichProgress(TextColumn("prepare"), BarColumn(), TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("starting", total=None)

        def report(progress: PrepareProgress) -> None:
            bar.update(task, total=progress.total_bytes, completed=progress.done_bytes, description=progress_text(progress))

        yield report
