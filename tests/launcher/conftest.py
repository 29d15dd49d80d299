"""For tests on a real scheduler."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that the nodes of a module's cluster share, but for `private` in it, which one of them has for itself."""
    directory = tmp_path_factory.mktemp("cluster")
    (directory / "private").mkdir()
    return directory
