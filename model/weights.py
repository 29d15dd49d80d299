"""Loads pretrained weights from safetensors, each rank reading only its own rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import ConfigError
from ..parallel.sharding.parts import indexed, memory_of, slices
from .adapters.names import is_factor, is_packed, plain_name
from .adapters.quantized import write_packed
from .config import ModelConfig
from .families.facts import FamilyFacts
from .hf_fields import model_fields
from .load_plan import EMBEDDING, HEAD, LoadPlan, Wanted, plan_load
from .model_check import file_vocabulary
from .model_files import local_folder
from .new_rows import new_rows
from .stored_names import StoredPart
from .weight_files import read_headers

Progress = Callable[[str], None]


@torch.no_grad()
def load_weights(
    model: nn.Module,
    config: ModelConfig,
    seed: int,
    on_progress: Progress | None = None,
    groups: Sequence[dist.ProcessGroup] = (),
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    packed_from: torch.dtype = torch.float32,
) -> None:
    """Fill every parameter and persistent buffer from `config.path`: a directory of safetensors, or a hub name. Collective.

    ConfigError where the files do not make the model (as `model_check.check_weights` finds it before a run), or hold numbers that are
    none. Rows of embedding and head that the files do not have are made by `seed`. `on_progress` is called for each tensor. `groups`:
    those along each axis of the mesh the model lies on, through which all ranks hear of the faults of any. `shapes`: of every parameter
    of the whole model, by name, where `model` is a stage of it or has packed matrices. `packed_from`: the precision that those are
    rounded to before they are packed, that of computation.
    """
    assert config.path is not None
    folder, fields = _whole_folder(config.path), model_fields(ModelConfig(name=config.name, path=config.path))
    # Adapters beside the model's matrices are in no file of the model.
    own = {name: each for name, each in model.named_parameters() if not is_factor(name)} | persistent_buffers(model)
    parameters, packed = {plain_name(name): each for name, each in own.items()}, {plain_name(name) for name in own if is_packed(name)}
    headers, everything = read_headers(folder), shapes or {name: tuple(each.shape) for name, each in parameters.items()}
    wanted = {name: shape for name, shape in everything.items() if not is_factor(name)}
    plan = plan_load(Wanted.of(wanted, fields.facts, file_vocabulary(fields), headers), headers, folder)
    bad: list[str] = []
    with ExitStack() as stack:
        files = {stored.file for stored in plan.sources.values()}
        opened = {file: stack.enter_context(safe_open(folder / file, framework="pt")) for file in sorted(files)}
        for name, parameter in parameters.items():
            if on_progress is not None:
                on_progress("reading weights")
            for part in plan.parts[name]:
                saved = opened[plan.sources[part.name].file].get_slice(plan.names[part.name])
                if name in packed:
                    parameter = _fill_packed(parameter, saved, packed_from)
                elif part.expert is None:
                    _fill(parameter, part.name, plan, saved, seed)
                else:
                    _fill_expert(parameter, part, part.expert, saved)
            bad += _faults(parameter, name, saved, fields.facts)
    _refuse_faults(bad, folder, groups)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What files hold beside parameters: state of modules that no gradient reaches."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def _fill(parameter: Tensor, name: str, plan: LoadPlan, saved: Any, seed: int) -> None:
    """Fill this rank's part of one parameter, new rows included."""
    for local, part in indexed(parameter):
        # safetensors slices must not be empty: a rank beyond the last row holds none.
        if local.numel():
            _fill_piece(local, part, parameter.shape[0] if part else 1, name, plan, saved, seed)


def _fill_piece(local: Tensor, part: tuple[slice, ...], num_rows: int, name: str, plan: LoadPlan, saved: Any, seed: int) -> None:
    """Fill one box of a parameter of `num_rows` rows."""
    rows = plan.sources[name].shape[0]
    if name not in (EMBEDDING, HEAD) or part[0].stop <= rows:
        local.copy_(saved[part])
        return
    there = max(0, rows - part[0].start)
    if there:
        local[:there].copy_(saved[(slice(part[0].start, rows), *part[1:])])
    made = new_rows(saved, rows, num_rows - rows, f"{seed}:{name}")
    local[there:].copy_(made[max(part[0].start - rows, 0) : part[0].stop - rows, part[1]])


def _fill_packed(parameter: Tensor, saved: Any, dtype: torch.dtype) -> Tensor:
    """Fill this rank's part of a packed matrix; returns the rows it was made of, in `dtype`."""
    rows = slices(parameter)[0]
    own: Tensor = saved[rows, :].to(dtype) if rows.start < rows.stop else torch.empty(0)
    if bool(torch.isfinite(own).all()):
        write_packed(parameter, own)
    return own


def _fill_expert(parameter: Tensor, part: StoredPart, expert: int, saved: Any) -> None:
    """Fill this rank's part of one expert's rows, if it has any of them."""
    for local, (experts, rows, columns) in indexed(parameter):
        first, stop = max(rows.start, part.first_row), min(rows.stop, part.first_row + part.shape[0])
        if experts.start <= expert < experts.stop and first < stop and columns.start < columns.stop:
            there = saved[(slice(first - part.first_row, stop - part.first_row), columns)]
            local[expert - experts.start, first - rows.start : stop - rows.start].copy_(there)


def _faults(parameter: Tensor, name: str, saved: Any, facts: FamilyFacts) -> list[str]:
    """Faults of the numbers of this rank's part, or of a whole norm."""
    local: Tensor = memory_of(parameter)
    if not bool(torch.isfinite(local).all()):
        return [f"NaN or infinite numbers in {name}"]
    if name.endswith("norm.weight") and not bool((saved[:].float() + facts.norm_offset).any()):
        return [f"zeros only in {name}"]
    return []


def _refuse_faults(mine: list[str], folder: Path, groups: Sequence[dist.ProcessGroup]) -> None:
    """Raise ConfigError on every rank where any of them read numbers that cannot be trained."""
    for group in groups:
        everyone: list[list[str] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group=group)
        mine = [fault for faults in everyone for fault in faults or ()]
    faults = list(dict.fromkeys(mine))
    if faults:
        more = f" and in {len(faults) - 5} more tensors" if len(faults) > 5 else ""
        raise ConfigError(
            f"model.path {folder}",
            found=f"{'; '.join(faults[:5])}{more}",
            expected="finite weights, and norms that are not zero: no document can be learnt with these",
            hint="the weights as they were published, or of an earlier checkpoint",
        )


EDGE_BYTES = 4096
"""Bytes of each tensor's data, read at both its ends for a fingerprint."""


def weights_fingerprint(path: str) -> str:
    """A digest that changes with the weights under `path` and their config.json, not with where or when they were written.

    Of each file: name, size, header, and both ends of the data of every tensor. ConfigError as for `load_weights`.
    """
    folder = _whole_folder(path)
    digest = hashlib.sha256()
    config = folder / "config.json"
    digest.update(config.read_bytes() if config.is_file() else b"")
    for name in sorted({stored.file for stored in read_headers(folder).values()}):
        digest.update(f"{name} {(folder / name).stat().st_size}".encode())
        with (folder / name).open("rb") as file:
            for part in _telling_parts(file):
                digest.update(part)
    return digest.hexdigest()


def _telling_parts(file: BinaryIO) -> Iterator[bytes]:
    """The header of an open safetensors file (its length in 8 bytes, then JSON), and both ends of each tensor."""
    length = file.read(8)
    header = file.read(int.from_bytes(length, "little"))
    yield header
    first = 8 + len(header)
    for name, entry in json.loads(header).items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        for place in (start, max(start, stop - EDGE_BYTES)):
            file.seek(first + place)
            yield file.read(min(EDGE_BYTES, stop - place))


def _whole_folder(path: str) -> Path:
    """The directory with all files: those of a hub name are fetched where they are not in the cache."""
    folder = local_folder(path)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        raise ConfigError(
            "model.path",
            found=f"{path} ({error})",
            expected="a directory of safetensors, or a hub name and a network",
            hint="model.path=DIRECTORY",
        ) from error
