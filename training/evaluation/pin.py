"""Pins the best checkpoint of a run, and lets go of the one that was best before. What a person pinned stays pinned. Plain files."""

from __future__ import annotations

from pathlib import Path

from ...checkpoint.files import PINNED_FILE, scan, step_path
from ...utils.atomic_files import write_atomic

MARK = "train.keep_best"
"""Beginning of the text of our own pins; `efflaunch checkpoints --pin` writes none."""


def pin_best(directory: Path, step: int, reason: str) -> bool:
    """Pin the checkpoint of `step` in `directory`, and unpin our earlier ones; False where there is none, and nothing is changed.

    OSError as it comes.
    """
    path = step_path(directory, step)
    if not path.is_dir():
        return False
    own = path / PINNED_FILE
    if not own.exists():
        write_atomic(own, f"{MARK} {reason}\n")
    for info in scan(directory):
        if info.is_pinned and info.step != step and is_ours(info.path):
            (info.path / PINNED_FILE).unlink(missing_ok=True)
    return True


def is_ours(path: Path) -> bool:
    """Whether the checkpoint at `path` is pinned by train.keep_best."""
    pin = path / PINNED_FILE
    return pin.is_file() and pin.read_text(encoding="utf-8", errors="replace").startswith(MARK)
