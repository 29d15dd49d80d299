"""docs/models.md as it stands: its commands run, and what it shows is what they print."""

from __future__ import annotations

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from efflaunch.model.config import ModelConfig
from efflaunch.model.proof.tiny_config import tiny_config
from efflaunch.tests.model.public_configs import SUPPORTED, write_config
from efflaunch.tests.pages import DOCS, run_page


def test_models_page(tmp_path: Path) -> None:
    printed = run_page("models.md", tmp_path)
    shown = re.findall(r"^```text\n(.*?)^```$", (DOCS / "models.md").read_text(), re.DOTALL | re.MULTILINE)
    (heading,) = [text for text in shown if "stand for all" in text]
    # The last digits of the loss are the machine's.
    assert printed.startswith(heading.rpartition(" ")[0]) and "\nproven: loss and every gradient are plain Hugging Face's" in printed
    facts = json.loads((tmp_path / "work" / "agreement.json").read_text())
    assert facts["exact"] is True and set(facts["loss_difference"]) == {"keep", "recompute", "streamed"}


def table(folder: Path) -> list[str]:
    """Rows of the models that tests/model/test_compare.py compares, with the layers that are compared there."""
    rows = []
    for name, config in SUPPORTED.items():
        tiny = tiny_config(ModelConfig(name="m", path=str(write_config(folder / name, config))))
        rows.append(f"| {name} | {tiny.spec.family.value} | {', '.join(map(str, tiny.layers))} of {tiny.spec.num_layers} |")
    return rows


def test_the_table_of_public_models_is_what_is_proven(tmp_path: Path) -> None:
    """`python -m efflaunch.tests.test_models_page` prints it."""
    assert re.findall(r"^\| .+? \| \w+ \| [\d, ]+ of \d+ \|$", (DOCS / "models.md").read_text(), re.MULTILINE) == table(tmp_path)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        print("\n".join(table(Path(folder))))
