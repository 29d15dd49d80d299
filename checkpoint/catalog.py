"""Remembers a folder of checkpoints between two saves, so that a save costs the same however many are kept.

A scan reads the record and the manifests of every checkpoint. One at the start is enough: from then on this process is
the only one that adds or removes any. What others may do meanwhile is looked at where it matters: whether one that is to go
has been pinned or is gone already, and whether the two newest, which the rest is removed for, are still whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from . import files
from .files import CheckpointInfo

_LOOKED_AT = 2


class Catalog:
    """The checkpoints of the folder that holds the `step-N` directories; one process, one thread."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.num_inspected = 0
        """Checkpoints whose files were read, in all."""
        self._infos: dict[int, CheckpointInfo] | None = None

    def prune(
        self,
        step: int,
        keep_last: int,
        keep_every: int | None = None,
        *,
        in_use: Collection[Path] = (),
        discard: Callable[[Path], None] = files.remove_tree,
    ) -> list[int]:
        """Lets go of what retention does not keep (see files.retained), damaged ones too, but none `in_use`; returns their steps.

        `step`: whose checkpoint has just been committed. `discard` removes what has been renamed already.
        """
        infos = self._look(step)
        kept = files.retained(infos, keep_last, keep_every)
        removed = []
        for info in infos if kept else ():
            if info.path in kept or info.path in in_use or (info.path / files.PINNED_FILE).exists():
                continue
            if info.path.exists():
                discard(files.throw_away(info.path))
                removed.append(info.step)
            self._forget(info.step)
        return removed

    def _look(self, step: int) -> list[CheckpointInfo]:
        """Every checkpoint, oldest first, after the one of `step` has come."""
        if self._infos is None:
            infos = files.scan(self.directory)
            self.num_inspected += len(infos)
            self._infos = {info.step: info for info in infos}
            return infos
        newest = sorted({*self._infos, step})[-_LOOKED_AT:]
        for number in {*newest, step}:
            self._inspect(self._infos, number)
        if not all(self._infos[number].is_whole for number in newest if number in self._infos):
            # Somebody or something is at work here: nothing is taken for granted.
            self._infos = None
            return self._look(step)
        self._infos |= {number: _unpinned(info) for number, info in self._infos.items() if info.is_pinned}
        return [self._infos[number] for number in sorted(self._infos)]

    def _inspect(self, infos: dict[int, CheckpointInfo], step: int) -> None:
        path = files.step_path(self.directory, step)
        infos.pop(step, None)
        if path.is_dir():
            self.num_inspected += 1
            infos[step] = files.inspect(path, step)

    def _forget(self, step: int) -> None:
        if self._infos is not None:
            self._infos.pop(step, None)


def _unpinned(info: CheckpointInfo) -> CheckpointInfo:
    """`info` with its pin as it is now: somebody may have taken it away."""
    return replace(info, is_pinned=(info.path / files.PINNED_FILE).exists())
