"""Writes one page of a run: HTML with its pictures inside, which needs no network and no script. Every text from files is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ...units import format_bytes, format_seconds, format_tokens
from ...utils.text import plain
from ..rundir.progress import bound_text, early_stop_line, number_text, stragglers_line, summary_lines
from .facts import RunFacts, settings
from .figures import pictures

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; background: #fff; margin: 0 auto; max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; } h2 { font-size: 1.1rem; margin: 2rem 0 0.5rem; }
svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; } th { text-align: left; font-weight: 600; }
th, td { padding: 0.15rem 0.8rem 0.15rem 0; vertical-align: top; border-bottom: 1px solid #f3f4f6; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
code { font-size: 0.85rem; overflow-wrap: anywhere; } summary { cursor: pointer; font-weight: 600; }
"""


def page(facts: RunFacts) -> str:
    """The whole page. ConfigError where matplotlib is missing."""
    sections = [_section(title, svg) for title, svg in pictures(facts)]
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>',
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>',
        f"<title>{_text(facts.name)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        f"<h1>{_text(facts.name)}</h1>",
        f"<p>{_text(facts.config.experiment)}, revision {facts.revision}, {_text(facts.state)}</p>",
        _table(("", ""), summary_lines(facts.progress)),
        *sections,
        _evaluations(facts),
        _happenings(facts),
        _configuration(facts),
        "</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{_text(title)}</h2>\n{body}\n</section>"


def _text(value: object) -> str:
    return escape(plain(str(value)))


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; numbers to the right. Nothing where there are no rows."""
    lines = [f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows]
    if not lines:
        return ""
    titles = f"<tr>{''.join(f'<th>{_text(name)}</th>' for name in head)}</tr>" if any(head) else ""
    return f'<div class="scroll"><table>{titles}{"".join(lines)}</table></div>'


def _cell(value: object) -> str:
    return f'<td class="number">{value:,}</td>' if isinstance(value, int) else f"<td>{_text(value)}</td>"


def _evaluations(facts: RunFacts) -> str:
    """A row for each evaluation of each corpus."""
    rows = []
    for event in facts.evaluations:
        by_length = event.get("lengths") or ()
        lengths = ", ".join(f"{format_tokens(int(row['length']))} {number_text(row.get('loss'), '.4f')}" for row in by_length)
        gain = (event.get("context") or {}).get("gain")
        worth = number_text(gain, "+.4f") if event.get("context") else ""
        rows.append((event["corpus"], int(event["step"]), number_text(event.get("loss"), ".4f"), lengths, worth, int(event["targets"])))
    table = _table(("corpus", "step", "loss", "at lengths", "worth of more context", "targets"), rows)
    return _section("Evaluations", table) if table else ""


def _happenings(facts: RunFacts) -> str:
    """Starts, checkpoints, failures, stragglers: a row each."""
    rows: list[tuple[object, ...]] = []
    for event in facts.events:
        kind, step = event["event"], event["step"] if isinstance(event.get("step"), int) else 0
        if kind == "start":
            resumed = event.get("resumed_from")
            where = "from the beginning" if resumed is None else f"after step {resumed}"
            rows.append((step, "start", f"{event['world_size']} ranks, {where}"))
            if event.get("certificate"):
                rows.append((step, "certificate", bound_text(event["certificate"])))
        elif kind == "certificate":
            measured = max(event["measured_bytes"])
            word = "holds" if event.get("ok") else "BROKEN"
            rows.append((step, "memory", f"{word}: {format_bytes(measured)} measured, {format_bytes(event['predicted_bytes'])} predicted"))
        elif kind == "checkpoint":
            took = "" if event.get("save_s") is None else f" in {format_seconds(event['save_s'])}"
            rows.append((step, "checkpoint", f"{event.get('path') or ''}{took}"))
        elif kind == "checkpoint_failed":
            rows.append((step, "checkpoint failed", event["error"]))
        elif kind == "best":
            pinned = "pinned" if event.get("pinned") else "not pinned"
            rows.append((step, "best", f"{event['metric']} {number_text(event.get('value'), '.4f')}, {pinned}"))
        elif kind == "stragglers":
            rows.append((step, "stragglers", stragglers_line(event)))
        elif kind == "early_stop":
            rows.append((step, "end", early_stop_line(event)))
        elif kind == "stop":
            rows.append((step, "stop", event.get("reason") or ""))
    for attempt in facts.attempts:
        if attempt.failure is not None:
            rows.append((attempt.last_step, f"attempt {attempt.number} failed", f"{attempt.failure.message}; {attempt.decision}"))
    table = _table(("step", "what", ""), rows)
    return _section("What happened", table) if table else ""


def _configuration(facts: RunFacts) -> str:
    """What changed between revisions, and every key."""
    parts = []
    for revision, lines in facts.changes:
        items = "".join(f"<li><code>{_text(line)}</code></li>" for line in lines) or "<li>nothing</li>"
        parts.append(f"<p>revision {revision} changed</p><ul>{items}</ul>")
    every = _table(("key", "value"), settings(facts.config).items())
    parts.append(f"<details><summary>every key</summary>{every}</details>")
    return _section("Configuration", "\n".join(parts))
