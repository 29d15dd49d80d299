"""A disk without room, for files that are written atomically."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from efflaunch.utils import atomic_files


@contextmanager
def no_room(*names: str) -> Iterator[None]:
    """Inside, there is no room for files of these names; without any, for none at all."""

    def open_on_full_disk(path: Path, *given: Any) -> Any:
        return open("/dev/full" if not names or path.name.removesuffix(".part") in names else path, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic_files, "open", open_on_full_disk, raising=False)
        yield
