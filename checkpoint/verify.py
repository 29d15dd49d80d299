"""Checks every byte of a checkpoint against its hashes. No torch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import files
from .manifest import FileRecord, file_damage

_THREADS = 2


def damage(path: Path) -> list[str]:
    """What is wrong with a committed directory, one line each; an empty list: every byte is what was written."""
    try:
        record = files.read_commit(path)
        manifests = [files.read_manifest(path, record, rank) for rank in range(int(record["world_size"]))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{type(error).__name__}: {error}"]

    def check(work: tuple[FileRecord, int]) -> str | None:
        try:
            return file_damage(path, *work)
        except OSError as error:
            return str(error)

    work = [(file, manifest.chunk_bytes) for manifest in manifests for file in manifest.files]
    with ThreadPoolExecutor(_THREADS) as threads:
        return [problem for problem in threads.map(check, work) if problem is not None]
