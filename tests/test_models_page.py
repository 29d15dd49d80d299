"""docs/models.md as it stands: its commands run, and what it shows is what they print."""

from __future__ import annotations

import json
import re
from pathlib import Path

from efflaunch.tests.pages import DOCS, run_page


def test_models_page(tmp_path: Path) -> None:
    printed = run_page("models.md", tmp_path)
    shown = re.findall(r"^```text\n(.*?)^```$", (DOCS / "models.md").read_text(), re.DOTALL | re.MULTILINE)
    (heading,) = [text for text in shown if "stand for all" in text]
    assert printed.startswith(heading) and "\nproven: loss and every gradient are plain Hugging Face's" in printed
    facts = json.loads((tmp_path / "work" / "agreement.json").read_text())
    assert facts["exact"] is True and set(facts["loss_difference"]) == {"keep", "recompute", "streamed"}
