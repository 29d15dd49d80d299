"""docs/pipelines.md as it stands: its commands run, and the pictures and orders it shows are the ones they print."""

from __future__ import annotations

import json
import re
from pathlib import Path

from efflaunch.parallel.pipeline.generators import one_f_one_b
from efflaunch.parallel.pipeline.pipeline_plan import with_transfers
from efflaunch.tests.pages import DOCS, run_page


def test_pipelines_page(tmp_path: Path) -> None:
    printed = run_page("pipelines.md", tmp_path)
    actions, hang, pictures = re.findall(r"^```text\n(.*?)^```$", (DOCS / "pipelines.md").read_text(), re.DOTALL | re.MULTILINE)
    assert pictures in printed
    assert actions.splitlines() == [" ".join(map(str, row)) for row in with_transfers(one_f_one_b(2, 3))]
    # The same words are in tests/parallel/pipeline/test_pipeline_plan.py.
    assert "rank 1 waits in 1F1 for ever: for the activation of 0F1 from rank 0" in hang
    assert "ranks 2 stages 0,1 micro-batches 3 slices 1\n0F0 0F1 0B0 0F2 0B1 0B2" in printed
    work = tmp_path / "work"
    assert (work / "zbv.svg").read_text().startswith("<?xml")
    assert json.loads((work / "pipeline.json").read_text())["simulated"]["long_context"]
