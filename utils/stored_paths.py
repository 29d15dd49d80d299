"""Resolves the relative paths of a stored run: runs of earlier versions hold some."""

from __future__ import annotations

import os
from pathlib import Path


def base_of(run_dir: Path, root: str, run_id: str | None) -> Path | None:
    """The directory that the command of the run was typed in; None where that is not known.

    A relative run.root is the end of the run directory's own path, and what is before it is the answer.
    """
    if run_id is None or os.path.isabs(root):
        return None
    tail = Path(os.path.normpath(Path(root) / run_id)).parts
    whole = run_dir.resolve()
    return Path(*whole.parts[: -len(tail)]) if whole.parts[-len(tail) :] == tail else None
