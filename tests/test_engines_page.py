"""docs/engines.md as it stands: a run under ZeRO goes on under FSDP2 and under another stage, and is exported; its table is the code's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from efflaunch.parallel.sharding.engine import DEEPSPEED
from efflaunch.tests.pages import DOCS, run_page


@pytest.mark.slow
def test_engines_page(tmp_path: Path) -> None:
    printed = run_page("engines.md", tmp_path)
    run = tmp_path / "work" / "runs" / "zero"
    assert "ZeRO stage 2" in printed and (tmp_path / "work" / "OUT" / "config.json").exists()
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    starts, steps = ([event for event in events if event["event"] == kind] for kind in ("start", "step"))
    assert [start["resumed_from"] for start in starts] == [None, 2, 3] and [step["step"] for step in steps] == [1, 2, 3, 4]
    engine = {"name": "deepspeed", "backend": "deepspeed", "stage": 1, "config": None, "zero": {}}
    assert yaml.safe_load((run / "run.yaml").read_text())["engine"] == engine
    newest = max((run / "checkpoints").glob("step-*"))
    assert json.loads((newest / "state.json").read_text())["metadata"]["config"]["engine"] == engine


def test_every_combination_that_is_refused_is_on_the_page() -> None:
    table = (DOCS / "engines.md").read_text().partition("## What is refused")[2]
    shown = {"adapter.method": "adapter=lora"}
    assert all(shown.get(pair.key, pair.key) in table for pair in DEEPSPEED.refused)
    package = DEEPSPEED.package
    assert package is not None and package.install in (DOCS / "engines.md").read_text()
