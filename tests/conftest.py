"""For every test: property tests have no deadline, for these machines are shared and a slow moment is no failure."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")

# Under nohup it is ignored, and so it would be in every process that a test starts and hangs up on.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish() -> None:
    """Thousands of collected tests, and all they import, stay: the collector need not go through them again and again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_umask() -> Iterator[None]:
    """A process that makes a private run directory keeps its files private from there on; the next test starts as this one did."""
    mask = os.umask(0o022)
    os.umask(mask)
    yield
    os.umask(mask)
