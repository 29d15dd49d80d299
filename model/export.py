"""Exports a checkpoint as a Hugging Face directory: config.json, safetensors and export_files' rest. One process.

Every byte is checked against its hash. Memory: one output shard (`max_shard_bytes`) and a read buffer (reader.BATCH_BYTES, or the
largest single piece). The directory appears whole, by a
rename, or not at all.
"""

from __future__ import annotations

import json
import math
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import files
from ..errors import CheckpointError
from ..training.config import Dtype
from ..utils.atomic_files import sync
from ..utils.stored_paths import base_of
from .export_files import origins_of, write_files
from .families import facts_of, family_of
from .families.facts import FamilyFacts
from .portable_config import unsaid_to_old, with_old_fields
from .stored_names import StoredPart, stored_parts

if TYPE_CHECKING:
    import torch


MAX_SHARD_BYTES = 4 << 30


class Form(Enum):
    """What of a run with adapters is written; a run without has the whole model only."""

    ADAPTER = "adapter"
    """The adapter alone, as peft has it."""
    MERGED = "merged"
    """The whole model, adapters added to their matrices."""
    BASE = "base"
    """The frozen model alone."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """A report of what was written."""

    path: Path
    step: int
    num_parameters: int
    num_bytes: int
    """Bytes of weights."""
    num_files: int
    """Number of files of weights."""
    tokenizer: str | None
    """Where the copied tokenizer came from; None: the run has none that is on this machine."""
    chat_template: str | None = None
    """Owner of the template: `tokenizer` or `corpus`; None: there is none."""
    end_of_turn: str | None = None
    """The token that ends the assistant's turn, among what generation stops at."""
    notes: tuple[str, ...] = ()
    """What a person should know, a line each."""


def export(
    run_dir: Path,
    out_dir: Path,
    step: int | None = None,
    *,
    dtype: Dtype = Dtype.BFLOAT16,
    form: Form = Form.ADAPTER,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Writes the newest checkpoint of `run_dir` (or that of `step`) to `out_dir`, for `from_pretrained`.

    `form`: of a run with adapters. `on_progress(bytes done, bytes of all)` is called after each file. CheckpointError: no such
    checkpoint, damaged, `out_dir` in use, or not writable; a form that the run has not.
    """
    info = choose_checkpoint(Path(run_dir), step)
    if Path(out_dir).resolve().is_relative_to((Path(run_dir) / files.FOLDER).resolve()):
        # What is no checkpoint there is removed at the next start, or taken for a damaged one.
        raise _unusable(Path(out_dir), "a place among the run's checkpoints")
    metadata = _saved_metadata(info.path)
    facts = _facts_of_checkpoint(metadata)
    if metadata.get("adapter") is None and form is not Form.ADAPTER:
        raise CheckpointError(
            str(info.path), found="no adapters", expected=f"a run with adapter=lora for --{form.value}", hint="efflaunch export without it"
        )
    with appearing(Path(out_dir)) as temporary:
        (num_parameters, num_bytes, num_files), said = (
            (_write_weights(info.path, temporary, dtype, max_shard_bytes, facts, on_progress), ())
            if metadata.get("adapter") is None
            else _write_adapted(info.path, temporary, dtype, max_shard_bytes, metadata, Path(run_dir), form, on_progress)
        )
        is_whole = metadata.get("adapter") is None or form is not Form.ADAPTER
        unsaid = write_config(metadata, temporary, dtype, info.path) if is_whole else None
        written = write_files(origins_of(Path(run_dir), metadata), temporary)
    notes = (*written.notes, *([] if unsaid is None else [unsaid]), *said)
    weights = (num_parameters, num_bytes, num_files)
    return ExportReport(Path(out_dir), info.step, *weights, written.tokenizer, written.chat_template, written.end_of_turn, notes)


def _saved_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a checkpoint; CheckpointError where it is damaged."""
    try:
        metadata = files.read_state(path)["metadata"]
        if not isinstance(metadata, dict):
            raise TypeError(f"metadata is a {type(metadata).__name__}")
        return metadata
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        hint = f"efflaunch checkpoints {path.parent.parent} --verify finds a whole one; --step takes it"
        raise CheckpointError(str(path / files.STATE_FILE), found=str(error), expected="the file as it was written", hint=hint) from error


def choose_checkpoint(run_dir: Path, step: int | None) -> files.CheckpointInfo:
    """The run's newest whole checkpoint, or the one of `step`; CheckpointError says what there is instead."""
    infos = files.list_checkpoints(run_dir)
    there = ", ".join(f"{info.step}{'' if info.is_whole else ' (damaged)'}" for info in infos) or "none"
    chosen = [info for info in infos if info.is_whole and step in (None, info.step)]
    if chosen:
        return chosen[-1]
    damaged = next((info.problem for info in infos if info.step == step), None)
    wanted = "a whole checkpoint" if step is None else f"a whole checkpoint of step {step}"
    hint = "a run directory that has checkpoints" if not infos or step is None else "one of these steps, or none for the newest"
    raise CheckpointError(str(run_dir), found=damaged or f"checkpoints of steps: {there}", expected=wanted, hint=hint)


@contextmanager
def appearing(out_dir: Path) -> Iterator[Path]:
    """A folder to write in that becomes `out_dir` at the end; removed when anything fails."""
    check_new(out_dir)
    temporary = out_dir.with_name(out_dir.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        temporary.rename(out_dir)
        sync(out_dir.parent)
    except OSError as error:
        raise _unusable(out_dir, str(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new(out_dir: Path) -> None:
    """CheckpointError where a directory to write already holds something."""
    if out_dir.is_dir() and any(out_dir.iterdir()):
        raise _unusable(out_dir, "a directory with files in it")


def _unusable(out_dir: Path, actual: str) -> CheckpointError:
    return CheckpointError(
        str(out_dir), found=actual, expected="a new or empty directory with room for the weights", hint="another directory"
    )


def _facts_of_checkpoint(metadata: dict[str, Any]) -> FamilyFacts | None:
    """The facts of the family that a checkpoint's configuration names; None for one this program does not know."""
    family = family_of((metadata.get("hf_config") or {}).get("model_type"))
    return None if family is None else facts_of(family)


def _parts_of(name: str, shape: tuple[int, ...], facts: FamilyFacts | None) -> tuple[StoredPart, ...]:
    """The tensors that a parameter is written as."""
    by_expert = facts is not None and facts.experts is not None and facts.experts.stored is not None
    return (StoredPart(name, shape),) if facts is None else stored_parts({name: shape}, facts, by_expert=by_expert)[name]


def _write_weights(
    source: Path,
    out_dir: Path,
    dtype: Dtype,
    max_shard_bytes: int,
    facts: FamilyFacts | None,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[int, int, int]:
    """Write the weights of a checkpoint and return the number of parameters, bytes and files."""
    with _damage_named(source):
        saved = _Saved(source, dtype, facts)
        return write_shards(saved.shapes, saved.read, out_dir, max_shard_bytes, facts, on_progress)


class _Saved:
    """The weights in a checkpoint, in the precision they are written in."""

    def __init__(self, source: Path, dtype: Dtype, facts: FamilyFacts | None) -> None:
        from ..checkpoint.reader import Reader
        from ..checkpoint.state import MODEL

        self._reader, self._key = Reader(source), MODEL
        index = {key[len(MODEL) :]: entry for key, entry in self._reader.tensors.items() if key.startswith(MODEL)}
        self.shapes = {name: (tuple(entry.size), out_dtype(name, entry.dtype, dtype, facts)) for name, entry in index.items()}
        """Shape and type by name."""

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors, allocated in the output's precision: the reader casts batch by batch."""
        import torch

        tensors = {name: torch.empty(self.shapes[name][0], dtype=self.shapes[name][1]) for name in names}
        self._reader.read({self._key + name: tensor for name, tensor in tensors.items()})
        return tensors


@contextmanager
def _damage_named(source: Path) -> Iterator[None]:
    """CheckpointError for what is wrong with the files of a checkpoint that are read inside."""
    from ..checkpoint.storage import FAILURES, describe

    try:
        yield
    except FAILURES as error:
        if isinstance(error, OSError):
            raise
        raise CheckpointError(str(source), found=describe(error), expected="the files as they were written", hint="another step") from error


def _write_adapted(
    source: Path,
    out_dir: Path,
    dtype: Dtype,
    max_shard_bytes: int,
    metadata: dict[str, Any],
    run_dir: Path,
    form: Form,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[tuple[int, int, int], tuple[str, ...]]:
    """Write the adapter of a checkpoint, or the model it belongs to with or without it. Returns what `_write_weights` does, and notes."""
    import torch

    from .adapters.merge import SavedAdapter, frozen_weights, merge
    from .adapters.names import is_trained
    from .adapters.peft_files import write_adapter

    run = (metadata.get("config") or {}).get("run") or {}
    about = SavedAdapter.of(metadata, base_of(run_dir, run.get("root", ""), run.get("id")))
    assert about is not None, "a checkpoint of adapters"
    facts = _facts_of_checkpoint(metadata)
    with _damage_named(source):
        # Added up in what was trained, and rounded once.
        saved = _Saved(source, dtype if form is Form.ADAPTER else Dtype.FLOAT32, facts)
        trained = saved.read(saved.shapes)
    if form is Form.ADAPTER:
        trained = {name: tensor for name, tensor in trained.items() if is_trained(name, about.adapter)}
        write_adapter(trained, out_dir, about.adapter, base=about.model.path, digest=about.digest)
        return (sum(t.numel() for t in trained.values()), sum(t.nbytes for t in trained.values()), 1), ()
    weights = frozen_weights(about, Dtype(about.dtype))
    notes: tuple[str, ...] = ()
    if about.adapter.quantizes:
        notes = ("matrices that were packed in NF4 have the numbers they were trained beside",)
    if form is Form.MERGED:
        rounding = merge(weights, trained, about.adapter.scaling, getattr(torch, dtype.value))
        notes += () if rounding is None else (f"rounded to {dtype.value}: an error of {rounding}",)
    shapes = {name: (tuple(tensor.shape), out_dtype(name, tensor.dtype, dtype, facts)) for name, tensor in weights.items()}

    def read(names: Iterable[str]) -> dict[str, torch.Tensor]:
        return {name: weights.pop(name).to(shapes[name][1]) for name in names}

    return write_shards(shapes, read, out_dir, max_shard_bytes, facts, on_progress), notes


def write_shards(
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[Iterable[str]], dict[str, torch.Tensor]],
    out_dir: Path,
    max_shard_bytes: int,
    facts: FamilyFacts | None,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[int, int, int]:
    """Write tensors of these shapes and types, which `read` gives, file by file; returns the number of parameters, bytes and files."""
    sizes = {name: math.prod(shape) * kind.itemsize for name, (shape, kind) in shapes.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    done, total = 0, sum(sizes.values())
    for file_name, names in shards.items():
        _write_shard(read(names), out_dir / file_name, facts)
        done += sum(sizes[name] for name in names)
        if on_progress is not None:
            on_progress(done, total)
    if len(shards) > 1:
        weight_map = {
            part.name: file_name
            for file_name, names in shards.items()
            for name in names
            for part in _parts_of(name, shapes[name][0], facts)
        }
        _write_json(out_dir / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return sum(math.prod(shape) for shape, _ in shapes.values()), total, len(shards)


def plan_shards(sizes: dict[str, int], max_shard_bytes: int) -> dict[str, list[str]]:
    """Assign tensors to files, in order, each file within the limit unless one tensor alone exceeds it."""
    groups: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not groups or filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, start=1)}


def _write_shard(tensors: dict[str, torch.Tensor], path: Path, facts: FamilyFacts | None) -> None:
    from safetensors.torch import save_file

    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    parts = {
        part.name: tensor if part.expert is None else tensor[part.expert].narrow(0, part.first_row, part.shape[0])
        for name, tensor in tensors.items()
        for part in _parts_of(name, tuple(tensor.shape), facts)
    }
    save_file(parts, path, metadata={"format": "pt"})
    # safetensors writes beside it and renames, readable by the owner only.
    path.chmod(mode)


def out_dtype(name: str, saved: torch.dtype, dtype: Dtype, facts: FamilyFacts | None) -> torch.dtype:
    """Precision of a tensor in files. Biases that move in steps of a thousandth keep theirs, as transformers keeps them."""
    import torch

    bias = None if facts is None or facts.experts is None else facts.experts.correction_bias
    if not saved.is_floating_point or (bias is not None and name.endswith(f".{bias}")):
        return saved
    chosen: torch.dtype = getattr(torch, dtype.value)
    return chosen


def write_config(metadata: dict[str, Any], out_dir: Path, dtype: Dtype, source: Path) -> str | None:
    """Write config.json in the new form and the old; returns what the old form has no words for."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    fields = dict(metadata.get("hf_config") or {})
    if "model_type" not in fields:
        expected = "hf_config with a model_type, as the training loop saves it"
        raise CheckpointError(
            str(source / files.STATE_FILE), found="no model configuration", expected=expected, hint="a checkpoint of this program"
        )
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = dtype.value
    config.use_cache = True  # off in training; generation is quadratic without
    config.save_pretrained(out_dir)
    saved = json.loads((out_dir / "config.json").read_text(encoding="utf-8"))
    # What equals a class's default is left out of the file, and the defaults of versions differ.
    saved.setdefault("rope_parameters", config.to_dict().get("rope_parameters"))
    facts = _facts_of_checkpoint(metadata)
    # Versions differ in which of a field's names they write; all of them are read.
    saved |= {own: saved[name] for name, own in (facts.aliases if facts is not None else {}).items() if name in saved}
    _write_json(out_dir / "config.json", with_old_fields(saved))
    return unsaid_to_old(saved)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
