"""`efflaunch check-model`: whether a model is trained exactly as plain Hugging Face computes it, before anything trains."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import EXIT_DONE, ConfigError
from ...model.config import ModelConfig
from ...units import format_tokens
from .arguments import CommandParser, add_json, add_own_files, token_count

if TYPE_CHECKING:
    from ...model.proof.compare import Agreement
    from ...model.proof.tiny_config import TinyConfig

DESCRIPTION = (
    "Build a tiny random copy of a model, every kind of layer once, and compare loss and gradients of its training here with plain "
    "Hugging Face in float64. Needs no weights, no GPU and no network."
)
ROWS = 10
"""Parameters shown without --all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `efflaunch check-model`."""
    parser.add_argument("place", metavar="MODEL_DIR|NAME", help="a directory with a config.json, or what model=NAME takes, as llama3_8b")
    help_text = "say what to set where the model knows fewer positions: 128K"
    parser.add_argument("--max-seq-len", type=token_count, metavar="TOKENS", help=help_text)
    parser.add_argument("--all", action="store_true", help=f"show every parameter, not the {ROWS} worst alone")
    add_own_files(parser)
    add_json(parser, "the comparison as JSON, every parameter in it")


def main(words: list[str]) -> int:
    """Run `efflaunch check-model` and return its exit code."""
    parser = CommandParser("check-model", DESCRIPTION)
    add_arguments(parser)
    options = parser.parse_args(words)
    config = model_at(options.place, options.config_dir)
    return check_model(config, max_seq_len=options.max_seq_len, show_all=options.all, as_json=options.json)


def model_at(place: str, config_dir: str | None) -> ModelConfig:
    """The model of a directory, or of a configuration file of that name. ConfigError where it is neither: no hub is asked."""
    from ..config.compose import compose_group
    from ..config.conf_groups import check_config_dir, options
    from ..config.schema import load

    check_config_dir(config_dir)
    names = [name for name in options("model", config_dir) if name != "pretrained"]
    if place in names and not Path(place).is_dir():
        config = load(ModelConfig, compose_group("model", place, config_dir), "model")
        assert isinstance(config, ModelConfig)
    else:
        config = ModelConfig(name=Path(place).name or place, path=place)
    if config.path is not None and not Path(config.path).expanduser().is_dir():
        raise ConfigError(
            config.path,
            found="no such directory; names on a hub are not looked up here",
            expected=f"a directory with a config.json, or one of {', '.join(names)}",
            hint="efflaunch check-model DIRECTORY: its config.json is enough, weights are not read",
        )
    return config


def check_model(config: ModelConfig, *, max_seq_len: int | None, show_all: bool, as_json: bool) -> int:
    """Compare, and print what was found. ConfigError where the model is not supported, or where a gradient differs."""
    from ...model.proof.tiny_config import tiny_config

    tiny = tiny_config(config)
    _check_tokenizer(config, tiny)
    notes = notes_of(config, tiny, max_seq_len)
    from ...model.proof.compare import TOLERANCE, compare
    from ...model.proof.verdict import difference

    def progress(what: str) -> None:
        if not as_json:
            print(f"running {what}", file=sys.stderr, flush=True)

    agreement = compare(tiny, on_progress=progress)
    facts = describe(config, tiny, agreement, notes)
    print(json.dumps(facts, indent=1) if as_json else "\n".join(lines(facts, show_all)))
    if not agreement.is_exact:
        raise difference(config, tiny, agreement, TOLERANCE)
    return EXIT_DONE


def notes_of(config: ModelConfig, tiny: TinyConfig, max_seq_len: int | None) -> list[str]:
    """List what of a directory is not compared because it is not trained, and what would extend the model to `max_seq_len`."""
    from ...model.hf_fields import model_fields
    from ...model.model_check import unread_fields
    from ...model.model_files import read_config_json
    from ...model.spec import longer_positions

    notes = []
    if config.path is not None:
        fields, file = model_fields(config), read_config_json(config.path)
        if file.get("model_type") == fields.facts.wrapped_by:
            notes.append("config.json: its text model alone is trained; the vision tower is not read")
        if file.get("auto_map"):
            notes.append(f"config.json: code beside it (auto_map) is not run; transformers' own {fields.facts.model_type} is what is meant")
        notes += unread_fields(fields)
    if max_seq_len is not None and max_seq_len > tiny.spec.max_positions:
        beyond = f"{format_tokens(max_seq_len)} tokens are beyond the {format_tokens(tiny.spec.max_positions)} positions the model knows"
        notes.append(f"{beyond}: extend it with {' '.join(longer_positions(config, max_seq_len))}")
    return notes


def describe(config: ModelConfig, tiny: TinyConfig, agreement: Agreement, notes: list[str]) -> dict[str, Any]:
    """The stable form of a comparison; differences are null where one side is missing or no number."""
    from ...model.proof.compare import LENGTHS, TOLERANCE

    return {
        "model": config.name,
        "family": tiny.spec.family.value,
        "layers": list(tiny.layers),
        "of_layers": tiny.spec.num_layers,
        "config": dict(tiny.fields),
        "documents": list(LENGTHS),
        "tolerance": TOLERANCE,
        "exact": agreement.is_exact,
        "loss": agreement.loss,
        "loss_difference": {policy: _number(value) for policy, value in agreement.loss_by_policy.items()},
        "parameters": [
            {
                "name": each.name,
                "shape": list(each.shape),
                "difference": {policy: _number(value) for policy, value in each.by_policy.items()},
            }
            for each in agreement.parameters
        ],
        "notes": notes,
    }


def lines(facts: dict[str, Any], show_all: bool) -> list[str]:
    """The comparison as lines of text, the worst parameters first."""
    policies, every = list(facts["loss_difference"]), facts["parameters"]
    shown = every if show_all else every[:ROWS]
    rows = [("relative difference", {policy: policy for policy in policies}), ("loss", _shown(facts["loss_difference"]))]
    rows += [(each["name"], _shown(each["difference"])) for each in shown]
    width = max(len(name) for name, _ in rows) + 2
    out = [*_heading(facts), "", *(f"{name:<{width}}{''.join(f'{cells[each]:<11}' for each in policies)}".rstrip() for name, cells in rows)]
    out += [f"and {len(every) - len(shown)} parameters that differ less (--all)"] * (len(shown) < len(every))
    out += ["", *(f"note: {note}" for note in facts["notes"])]
    verdict = f"proven: loss and every gradient are plain Hugging Face's, to {facts['tolerance']:.0e} of their largest entry"
    return [*out, verdict if facts["exact"] else "not proven"]


def _heading(facts: dict[str, Any]) -> list[str]:
    fields, kept, documents = facts["config"], facts["layers"], facts["documents"]
    heads = f"{fields['num_attention_heads']} heads, {fields['num_key_value_heads']} key/value heads"
    return [
        f"{facts['model']}, family {facts['family']}: layers {', '.join(map(str, kept))} of {facts['of_layers']} stand for all",
        f"tiny copy: {heads}, hidden size {fields['hidden_size']}, random weights in float64",
        f"documents of {', '.join(map(str, documents))} tokens in one pack; loss of plain Hugging Face {facts['loss']:.6f}",
    ]


def _check_tokenizer(config: ModelConfig, tiny: TinyConfig) -> None:
    """DataError where the tokenizer beside config.json has more tokens than the model."""
    if config.path is not None and (Path(config.path).expanduser() / "tokenizer.json").is_file():
        from ...training.data.source import check_vocabularies

        check_vocabularies([], str(Path(config.path).expanduser()), tiny.spec.vocab_size)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _shown(by_policy: dict[str, float | None]) -> dict[str, str]:
    return {policy: "missing" if value is None else f"{value:.1e}" for policy, value in by_policy.items()}
