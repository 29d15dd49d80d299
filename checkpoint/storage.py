"""Tensors to and from one directory in torch.distributed.checkpoint's format, and what went wrong in words."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

FAILURES = (OSError, RuntimeError, ValueError, KeyError, EOFError, CheckpointException)
"""What reading and writing raise; CheckpointException is not an Exception. Anything else is a mistake of ours."""


class _Writer(FileSystemWriter):
    """Fsyncs each file; a full disk keeps its name, which torch.save's archive writer otherwise hides."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause = error.__context__
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(self.path)) from error
            raise


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes this rank's share of `tensors`; collective. An error of any rank is raised on all, as CheckpointException."""
    with _QuietAlone():
        metadata = save(dict(tensors), storage_writer=_Writer(path, sync_files=True), no_dist=not dist.is_initialized())
    missing = sorted({name for name in _file_names(metadata) if not (path / name).is_file()})
    if missing:
        # Every rank looks: a folder on a node's own disk shows here, not at the next restore.
        raise OSError(f"{missing[0]} was written by another rank and is not seen by this one")


def read_tensors(tensors: dict[str, Tensor], path: Path, *, alone: bool = False) -> None:
    """Fills `tensors` in place from their keys, cast to their dtype; collective unless `alone`."""
    with _QuietAlone():
        load(dict(tensors), storage_reader=FileSystemReader(path), no_dist=alone or not dist.is_initialized())


def read_index(path: Path) -> dict[str, TensorStorageMetadata]:
    """Key to shape and dtype of every tensor in the directory; reads no tensor. ValueError where the index is damaged."""
    try:
        metadata = FileSystemReader(path).read_metadata()
    except (pickle.UnpicklingError, AttributeError, ImportError, IndexError, TypeError) as error:
        # What pickle raises on bytes that are not its own.
        raise ValueError(f".metadata: {error}") from error
    return {key: entry for key, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)}


def _file_names(metadata: Metadata) -> set[str]:
    storage: dict[Any, Any] = metadata.storage_data or {}
    return {os.fspath(info.relative_path) for info in storage.values()}


class _QuietAlone(warnings.catch_warnings):
    """Without a process group torch warns that it saves from one process: that is what a world of one means."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        return entered


def describe(error: BaseException) -> str:
    """The first failing rank's own words, on one line."""
    if isinstance(error, CheckpointException):
        rank, (first, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"{describe(first)} (rank {rank})"
    if isinstance(error, OSError):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())
