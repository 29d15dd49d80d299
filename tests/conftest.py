"""For every test: helper modules beside the tests import by their bare name."""

from __future__ import annotations

import sys
from pathlib import Path

for directory in (Path(__file__).parent, Path(__file__).parent / "launcher"):
    sys.path.insert(0, str(directory))
