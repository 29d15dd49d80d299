"""Reads the float32 weights of a DeepSpeed checkpoint: ZeRO's shards (stages 1 to 3), or a universal one. DeepSpeed itself is not needed.

Note: what lies where (`save_checkpoint` in deepspeed/runtime/engine.py, deepspeed/checkpoint/ds_to_universal.py). DIR/latest names the
newest folder. A folder of ZeRO's has the model's names and shapes in *_model_states.pt and a file of flat weights and states per rank in
*_optim_states.pt; a universal one has zero/NAME/fp32.pt per parameter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checkpoint.restricted import Fields, Ignored, load
from ..errors import CheckpointError
from ..utils.names import is_file_name
from .zero_layout import LayoutError, Run, Shape, runs_of_groups, runs_of_partitions

STAND_INS: Mapping[str, type] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Ignored,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Ignored,
    "deepspeed.utils.tensor_fragment.fragment_address": Fields,
}
"""Classes of DeepSpeed's that its files have objects of, and what is made in their place."""
_RANK = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_(optim|model)_states\.pt")
_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
OnBytes = Callable[[int], None]


class Weights(Protocol):
    """The weights of a checkpoint."""

    @property
    def about(self) -> str:
        """What it is, in words."""
        ...

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shapes by name; of a universal checkpoint as its files have them, which may be flat."""
        ...

    @property
    def shared(self) -> Mapping[str, str]:
        """Second names of parameters, with the first."""
        ...

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """State of modules that no gradient reaches."""
        ...

    def read(self, name: str) -> Tensor:
        """One parameter, float32, in the shape of `shapes`."""
        ...


def folder_of(checkpoint: Path) -> Path:
    """The folder of one checkpoint: `checkpoint` itself, or the one that its `latest` names. CheckpointError where there is none."""
    if not checkpoint.is_dir():
        raise _none(checkpoint, "no such directory")
    for name in ("latest", "latest_universal"):
        if (checkpoint / name).is_file():
            tag = (checkpoint / name).read_text(encoding="utf-8", errors="replace").strip()
            if not is_file_name(tag) or not (checkpoint / tag).is_dir():
                raise _none(checkpoint / name, f"the name {tag[:80]!r}, of no directory beside it")
            return checkpoint / tag
    return checkpoint


def num_bytes(folder: Path) -> int:
    """Bytes of the files that `open_weights` reads, for progress."""
    return sum(path.stat().st_size for path in _files(folder))


def _files(folder: Path) -> list[Path]:
    """Every parameter's file of a universal checkpoint; otherwise rank 0's model states, then optimizer states rank by rank."""
    if (folder / "zero").is_dir():
        return sorted((folder / "zero").glob("*/fp32.pt"))
    names = sorted(path.name for path in folder.iterdir())
    _refuse_parallel(folder, names)
    files = {(int(match[1]), match[3]): folder / match[0] for match in map(_RANK.fullmatch, names) if match is not None}
    shards = {rank: path for (rank, kind), path in files.items() if kind == "optim"}
    if not shards:
        raise _none(folder, f"no *_optim_states.pt among {len(names)} files")
    return [files.get((0, "model"), folder / "mp_rank_00_model_states.pt"), *(shards[rank] for rank in _all(folder, shards))]


def open_weights(folder: Path, on_bytes: OnBytes | None = None) -> Weights:
    """The weights in a folder. CheckpointError where it is none of DeepSpeed's, has parts missing, or other than one may expect."""
    if (folder / "zero").is_dir():
        return _Universal(folder, on_bytes)
    model, *shards = _files(folder)
    return _Zero(folder, load(model, STAND_INS, on_bytes), [load(shard, STAND_INS, on_bytes) for shard in shards])


def _refuse_parallel(folder: Path, names: Iterable[str]) -> None:
    """CheckpointError for a model that tensor or pipeline parallelism has cut."""
    cut = [name for name in names if name.startswith("layer_") or any((m := p.fullmatch(name)) and _mp(m) for p in (_RANK, _MODEL))]
    if cut:
        raise CheckpointError(
            str(folder),
            found=f"{cut[0]}, of a model that is cut over ranks by tensors or stages",
            expected="a checkpoint of data-parallel ranks alone",
            hint=f"a universal checkpoint of it (python -m deepspeed.checkpoint.ds_to_universal), then efflaunch import {folder}_universal",
        )


def _mp(match: re.Match[str]) -> int:
    """The rank of tensor parallelism in a file's name."""
    return int(match[2] if match.re is _RANK else match[1])


def _all(folder: Path, shards: Mapping[int, Path]) -> range:
    """The ranks; CheckpointError where one is missing."""
    missing = sorted(set(range(max(shards) + 1)) - set(shards))
    if missing:
        raise _incomplete(folder, f"files of ranks {sorted(shards)}, and none of {missing}")
    return range(max(shards) + 1)


@dataclass(frozen=True, slots=True)
class _Shards:
    """Flat float32 weights by rank and buffer."""

    stage: int
    buffers: tuple[tuple[Tensor, ...], ...]
    paddings: list[list[int]] | None


class _Zero:
    """A folder of ZeRO's shards."""

    def __init__(self, folder: Path, model: Mapping[str, Any], optimizers: list[dict[str, Any]]) -> None:
        try:
            groups = [{str(name): tuple(map(int, shape)) for name, shape in group.items()} for group in model["param_shapes"]]
            buffer_names = set(model["buffer_names"])
            self.buffers = {name: value for name, value in model["module"].items() if name in buffer_names}
            if unlike := [name for name, value in self.buffers.items() if not isinstance(value, Tensor)]:
                raise TypeError(f"the buffer {unlike[0]} is no tensor")
            self.shared = dict(model.get("shared_params") or {})
            known = {name for group in groups for name in group}
            if strange := sorted(set(self.shared.values()) - known):
                raise ValueError(f"a second name of {strange[0]}, which is no parameter")
            frozen, version = model.get("frozen_param_shapes"), model.get("ds_version")
            shards = _shards(folder, [each["optimizer_state_dict"] for each in optimizers])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            found = f"{type(error).__name__}: {error}"
            raise CheckpointError(str(folder), found=found, expected="the parts of a ZeRO checkpoint", hint="another checkpoint") from error
        if frozen:
            raise CheckpointError(
                str(folder),
                found=f"{len(frozen)} frozen weights, {next(iter(frozen))} first",
                expected="a model that was trained whole",
                hint="PEFT's own files of its adapter, with adapter.init=DIR",
            )
        self.shapes = {name: shape for group in groups for name, shape in group.items()}
        self._buffers = shards.buffers
        self._runs = _runs(folder, groups, shards)
        self.about = f"ZeRO stage {shards.stage} of {len(optimizers)} ranks, DeepSpeed {version or 'of no version'}"

    def read(self, name: str) -> Tensor:
        """One parameter, put together from its runs."""
        whole = torch.empty(self.shapes[name])
        flat = whole.view(-1)
        for run in self._runs[name]:
            flat[run.begin : run.begin + run.count] = self._buffers[run.rank][run.buffer].view(-1)[run.first : run.first + run.count]
        return whole


def _shards(folder: Path, states: list[dict[str, Any]]) -> _Shards:
    """The flat weights of every rank. CheckpointError where files of several checkpoints, or not all of one, are there."""
    first = states[0]
    # DeepSpeed's optimizer of stage 1 in bfloat16 does not say which stage it is.
    stages, counts = {int(each.get("zero_stage", 1)) for each in states}, {_ranks(each["partition_count"]) for each in states}
    if len(stages) > 1 or counts != {len(states)}:
        found = f"{len(states)} files of ranks, of stage {sorted(stages)} on {sorted(counts)} ranks by what they say"
        raise _incomplete(folder, found)
    stage = stages.pop()
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    buffers = tuple(tuple(each[key]) for each in states)
    if any(not isinstance(buffer, Tensor) or buffer.dtype != torch.float32 for own in buffers for buffer in own):
        raise TypeError(f"{key} is not of float32 tensors")
    paddings = first.get("param_alignment_paddings") if stage < 3 else None
    return _Shards(stage, buffers, paddings)


def _ranks(count: Any) -> int:
    """Ranks that one part is of; groups may have numbers of their own."""
    return int(max(count)) if isinstance(count, (list, tuple)) else int(count)


def _runs(folder: Path, groups: list[dict[str, Shape]], shards: _Shards) -> dict[str, tuple[Run, ...]]:
    lengths = [[buffer.numel() for buffer in own] for own in shards.buffers]
    try:
        if shards.stage == 3:
            return runs_of_partitions({name: shape for group in groups for name, shape in group.items()}, lengths)
        return runs_of_groups(groups, lengths, shards.paddings)
    except LayoutError as error:
        raise _incomplete(folder, str(error)) from error


class _Universal:
    """A folder of one directory per parameter."""

    shared: Mapping[str, str] = {}
    buffers: Mapping[str, Tensor] = {}

    def __init__(self, folder: Path, on_bytes: OnBytes | None) -> None:
        self._folder, self.about = folder / "zero", "universal checkpoint"
        self._weights: dict[str, Tensor] = {}
        for path in sorted(self._folder.glob("*/fp32.pt")):
            value = load(path, STAND_INS, on_bytes).get("param")
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise CheckpointError(str(path), found="no tensor `param`", expected="one parameter", hint="another checkpoint")
            self._weights[path.parent.name] = value
        if not self._weights:
            raise _none(self._folder, "no NAME/fp32.pt")
        self.shapes = {name: tuple(value.shape) for name, value in self._weights.items()}

    def read(self, name: str) -> Tensor:
        """One parameter."""
        return self._weights[name].float()


def _none(place: Path, found: str) -> CheckpointError:
    return CheckpointError(
        str(place),
        found=found,
        expected="a directory that DeepSpeed's save_checkpoint or ds_to_universal wrote",
        hint="efflaunch import CHECKPOINT_DIR --out MODEL_DIR, where CHECKPOINT_DIR has a file `latest`, or is a folder as global_step100",
    )


def _incomplete(folder: Path, found: str) -> CheckpointError:
    return CheckpointError(
        str(folder), found=found, expected="the files of all ranks of one checkpoint", hint="copy the folder whole, from every node"
    )
