"""Checks a model's files before anything starts: `check_weights` refuses or reports. Reads headers; imports no torch.

Ranks read by the same plan (`load_plan.plan_load`), so what passes here loads there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .config import ModelConfig
from .families.facts import LABELS, READ_BY_ALL
from .hf_fields import ModelFields, model_fields
from .load_plan import LoadPlan, Wanted, plan_load, stored_shapes
from .model_files import local_folder, model_folder
from .rope_fields import LEGACY_KEYS, ORIGINAL
from .spec import model_spec
from .weight_files import has_weights, hold_the_same, read_headers

_NAMED = 6
"""Tensors or fields that a note names at most."""


def check_weights(config: ModelConfig) -> list[str]:
    """Notes on the files at `model.path`; ConfigError where they do not make the model. Nothing for random weights."""
    if config.path is None:
        return []
    spec, fields, folder = model_spec(config), model_fields(config), model_folder(config.path)
    notes = [*unread_fields(fields), *_padding_note(fields.full)]
    if local_folder(config.path) is None and not has_weights(folder):
        return [*notes, f"model.path={config.path}: the weights are not on this machine yet; they are checked as they are read"]
    headers = read_headers(folder)
    wanted = Wanted.of(stored_shapes(spec), fields.facts, file_vocabulary(fields), headers)
    plan = plan_load(wanted, headers, folder)
    notes += [*_head_note(config, plan, folder), *_adapter_note(folder)]
    if plan.unused:
        names = ", ".join(plan.unused[:_NAMED]) + (f" and {len(plan.unused) - _NAMED} more" if len(plan.unused) > _NAMED else "")
        notes.append(f"model.path: {len(plan.unused)} tensors of the files are no part of this model and are not read: {names}")
    if spec.vocab_size > wanted.file_vocabulary:
        new = f"{wanted.file_vocabulary} to {spec.vocab_size - 1}"
        notes.append(f"model.vocab_size: token ids {new} are new; their rows start at the mean of the others, as transformers adds them")
    return notes


def file_vocabulary(fields: ModelFields) -> int:
    """Rows of embedding and head by the file's own config.json."""
    return int({**fields.facts.defaults, **fields.file}["vocab_size"])


def _head_note(config: ModelConfig, plan: LoadPlan, folder: Path) -> list[str]:
    if plan.shared_head is None or hold_the_same(folder, *plan.shared_head):
        return []
    if config.extra.get("tie_word_embeddings") is True:
        return ["model.extra.tie_word_embeddings=true: the head in the files is not read, the embedding takes its place"]
    raise ConfigError(
        f"model.path {folder}",
        found="a head (lm_head.weight) that differs from the embedding, beside tie_word_embeddings=true",
        expected="one of the two: transformers would train the head of the file, untied",
        hint="+model.extra.tie_word_embeddings=false for that, or +model.extra.tie_word_embeddings=true to train without it",
    )


def _adapter_note(folder: Path) -> list[str]:
    """A note on an adapter beside the weights, with which transformers and peft would compute something else."""
    names = sorted(path.name for path in folder.glob("adapter_*"))
    return [f"model.path: {', '.join(names)} beside the weights: the adapter is not read; merge it first to train with it"] if names else []


def unread_fields(fields: ModelFields) -> list[str]:
    """A note on fields of config.json that no layer reads, if there are any."""
    unread_rope = ORIGINAL if fields.facts.rope_per_layer_type else "rope_local_base_freq"
    rope = {name for name in LEGACY_KEYS if name != unread_rope}
    read = READ_BY_ALL | fields.facts.fields | LABELS | fields.facts.aliases.keys() | rope
    read |= {"sliding_window_pattern", "quantization_config"}
    # A field that no layer reads says nothing where it is as the class has it.
    usual = {name: fields.facts.defaults.get(name) for name in fields.facts.unread}
    said = {name: value for name, value in fields.file.items() if name not in usual or usual[name] != value}
    unread = sorted(name for name, value in said.items() if name not in read and value not in (None, 1) and not name.startswith("_"))
    unread += [f"rope_parameters.{name}" for name in sorted(set(fields.rope.unread))]
    more = f" and {len(unread) - _NAMED} more" if len(unread) > _NAMED else ""
    return [f"config.json: no {fields.facts.model_type} layer reads {', '.join(unread[:_NAMED])}{more}"] if unread else []


def _padding_note(fields: Mapping[str, Any]) -> list[str]:
    pad, ends = fields.get("pad_token_id"), fields.get("eos_token_id")
    if pad is None or pad not in (ends if isinstance(ends, list) else [ends]):
        return []
    return [
        f"config.json: pad_token_id={pad} is the end of text as well: transformers gives the embedding of a padding token no gradient, "
        "so that the row of the end is not trained; +model.extra.pad_token_id=null trains it"
    ]
