"""Makes a Hugging Face model directory of a DeepSpeed checkpoint: its float32 weights, under the names of the model's config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..training.config import Dtype
from .build import build_config, build_on_meta
from .config import ModelConfig
from .export import MAX_SHARD_BYTES, appearing, check_new, out_dtype, write_config, write_shards
from .export_files import Origins, write_files
from .hf_fields import model_fields
from .import_zero import Weights, folder_of, num_bytes, open_weights
from .weights import persistent_buffers
from .zero_layout import Shape

_SHOWN = 3
_PREFIX = "module."
"""What wrappers of a model put before its names."""


@dataclass(frozen=True, slots=True)
class ImportReport:
    """A report of what was written."""

    path: Path
    checkpoint: Path
    about: str
    """What the checkpoint is, in words."""
    model: Path
    """Whose config.json and tokenizer it has."""
    num_parameters: int
    num_bytes: int
    num_files: int
    """Number of files of weights."""
    tokenizer: str | None
    notes: tuple[str, ...] = ()


def import_model(
    checkpoint: Path,
    out_dir: Path,
    model: Path | None = None,
    *,
    dtype: Dtype = Dtype.FLOAT32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> ImportReport:
    """Write the weights of `checkpoint` to `out_dir`, for `from_pretrained` and model.path. CheckpointError says what is wrong with it.

    `model`: the directory of its config.json and tokenizer; None: beside the checkpoint, where Hugging Face's trainer has them.
    `on_progress(bytes done, bytes of all)`: reading and checking is one half, writing the other.
    """
    check_new(out_dir)
    folder = folder_of(checkpoint)
    source = _model_of(checkpoint, folder) if model is None else model
    fields = model_fields(ModelConfig(name=source.name, path=str(source)))
    total, done = num_bytes(folder), 0

    def count(length: int) -> None:
        nonlocal done
        done += length
        if on_progress is not None:
            on_progress(done, 2 * total)

    expected = _expected(fields.given)
    weights = _Renamed(open_weights(folder, count), expected, folder)
    shapes = {name: (shape, out_dtype(name, weights.dtype(name), dtype, fields.facts)) for name, shape in expected.items()}
    with appearing(out_dir) as temporary:
        written = write_shards(
            shapes,
            lambda names: {name: weights.read(name).to(shapes[name][1]) for name in names},
            temporary,
            max_shard_bytes,
            fields.facts,
            None if on_progress is None else lambda part, whole: on_progress(total + total * part // whole, 2 * total),
        )
        unsaid = write_config({"hf_config": fields.given}, temporary, dtype, folder)
        beside = write_files(Origins((str(source),), str(source), (), fields.given), temporary)
    notes = (*beside.notes, *([] if unsaid is None else [unsaid]))
    return ImportReport(out_dir, folder, weights.about, source, *written, beside.tokenizer, notes)


def _model_of(checkpoint: Path, folder: Path) -> Path:
    """The directory with a config.json next to a checkpoint. ConfigError where there is none."""
    for place in (folder, checkpoint, folder.parent, checkpoint.parent):
        if (place / "config.json").is_file():
            return place
    raise ConfigError(
        str(checkpoint),
        found="no config.json in it or beside it: DeepSpeed saves none",
        expected="the model's config.json, for names, shapes and ties",
        hint="--model MODEL_DIR, the directory that training began from",
    )


def _expected(given: Mapping[str, object]) -> dict[str, Shape]:
    """What the files of a model hold, by its config: parameters, tied ones once, and persistent buffers."""
    model = build_on_meta(build_config(dict(given)), torch.float32)
    return {name: tuple(value.shape) for name, value in (*model.named_parameters(), *persistent_buffers(model).items())}


class _Renamed:
    """The weights of a checkpoint under the names of the model's own parameters. CheckpointError where they are another model's."""

    def __init__(self, weights: Weights, expected: Mapping[str, Shape], folder: Path) -> None:
        self.about, self._weights, self._expected = weights.about, weights, expected
        there = {**weights.shapes, **{name: tuple(value.shape) for name, value in weights.buffers.items()}}
        own = {name.removeprefix(_PREFIX) if all(each.startswith(_PREFIX) for each in there) else name: name for name in there}
        own |= {second: first for second, first in weights.shared.items() if second not in own}
        self._own = {name: own[name] for name in expected if name in own}
        problems = [f"no {name}" for name in expected if name not in own]
        unknown = [name for name in own if name not in expected and name not in weights.shared and name not in weights.buffers]
        problems += [f"{name}, which the model has not" for name in unknown]
        problems += [
            f"{name} of shape {list(there[theirs])}, not {list(expected[name])}"
            for name, theirs in self._own.items()
            if not _fits(there[theirs], expected[name])
        ]
        if problems:
            more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise CheckpointError(
                str(folder),
                found=", ".join(problems[:_SHOWN]) + more,
                expected="the weights of the model that config.json describes",
                hint="--model MODEL_DIR, the directory that training began from",
            )

    def dtype(self, name: str) -> torch.dtype:
        """The precision that it has in the checkpoint: parameters float32."""
        buffer = self._weights.buffers.get(self._own[name])
        return torch.float32 if buffer is None else buffer.dtype

    def read(self, name: str) -> Tensor:
        """A tensor by the model's name for it, in the model's shape."""
        theirs = self._own[name]
        value = self._weights.buffers[theirs] if theirs in self._weights.buffers else self._weights.read(theirs)
        return value.reshape(self._expected[name]).contiguous()


def _fits(there: Shape, wanted: Shape) -> bool:
    """Whether a tensor is of this shape, or is flat with as many numbers."""
    return there == wanted or (len(there) == 1 and there[0] == torch.Size(wanted).numel())
