"""docs/runs.md lists the events of metrics.jsonl: all that the code writes, and no others."""

from __future__ import annotations

import re
from pathlib import Path

from efflaunch.training.objectives.preference import STATS as PAIR_STATS
from efflaunch.training.objectives.rollout import STATS as TOKEN_STATS

ROOT = Path(__file__).resolve().parent.parent
WRITES = re.compile(r"(?:\.write|report|_report)\(\s*\"(\w+)\"")


def test_every_event_is_listed_and_every_listed_event_is_written() -> None:
    sources = [path for folder in ("training", "memory") for path in (ROOT / folder).rglob("*.py")]
    written = {name for path in sources for name in WRITES.findall(path.read_text(encoding="utf-8"))}
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]*`) \|", page.partition("## What metrics.jsonl says")[2].partition("## Look")[0], re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == written
    assert all(f"`{name}`" in page for name in (*PAIR_STATS, *TOKEN_STATS))
