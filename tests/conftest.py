"""For every test: property tests have no deadline, for these machines are shared and a slow moment is no failure."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")


@pytest.fixture(autouse=True)
def _same_umask() -> Iterator[None]:
    """A process that makes a private run directory keeps its files private from there on; the next test starts as this one did."""
    mask = os.umask(0o022)
    os.umask(mask)
    yield
    os.umask(mask)
