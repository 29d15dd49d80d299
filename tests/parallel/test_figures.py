"""What pictures share: endings that are written, folders that are made."""

from __future__ import annotations

from pathlib import Path

import pytest

from efflaunch.errors import ConfigError
from efflaunch.parallel.figures import check_format, figure_kind, save


@pytest.mark.parametrize("name", ["a.svg", "b.PNG", "c.pdf"])
def test_endings_that_can_be_drawn(name: str) -> None:
    check_format(Path(name))


def test_another_ending_says_what_to_type() -> None:
    with pytest.raises(ConfigError, match=r"--out plan\.svg"):
        check_format(Path("plan.gif"))


def test_a_figure_is_written_into_a_new_folder(tmp_path: Path) -> None:
    files = [tmp_path / "new" / "one.svg", tmp_path / "two.svg"]
    for file in files:
        figure = figure_kind()(figsize=(1, 1))
        figure.text(0.1, 0.5, "text stays text")
        save(figure, file)
    assert files[0].read_bytes() == files[1].read_bytes() and "text stays text" in files[0].read_text()
