"""Reads the fields of a Hugging Face config: our own or a config.json's, overrides in place. Pure but for reading it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from ..errors import ConfigError
from .config import Family, ModelConfig
from .config_checks import check_fields
from .families import FACTS, facts_of, family_of, wrapped_family
from .families.facts import LABELS, READ_BY_ALL, FamilyFacts
from .model_files import read_config_json
from .plain_weights import quantised
from .rope_fields import LEGACY_KEYS, ORIGINAL, RopeFields, rope_fields

MODEL_TYPES: Mapping[Family, str] = MappingProxyType({family: facts.model_type for family, facts in FACTS.items()})
"""What `AutoConfig.for_model` calls each family; Gemma 3 is its text model."""

# What the Hugging Face classes assume where a config.json leaves a field out (save_pretrained leaves defaults out).
_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "sliding_window_pattern": 6,
    }
)
_OWN_NAMES = MappingProxyType({"rope_scaling": "rope_scaling", "rope_theta": "rope_theta", "max_position_embeddings": "max_positions"})
"""Fields of a Hugging Face config that have a key here, which says more than the field."""
SIZE_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "tie_word_embeddings": "tie_embeddings",
        **{name: name for name in ("hidden_size", "intermediate_size", "head_dim", "vocab_size", "sliding_window")},
    }
)
"""Fields of a Hugging Face config that a model from scratch takes from a key here, by that key."""
_MAKE_LAYER_TYPES = ("sliding_window_pattern", "max_window_layers", "use_sliding_window")
"""Fields that layer types are made from where they are not listed."""
_TOWERS = ("vision_config", "visual", "mm_vision_tower", "audio_config")
"""Fields of a config that has parts beside a language model."""
_DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Ends of the names of classes with a decoder."""
_SIZES = (
    "family",
    "num_layers",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "sliding_window",
    "tie_embeddings",
)


def model_family(config: ModelConfig) -> Family:
    """The family named by the config, or by `model_type` in the config.json at `config.path`."""
    if config.path is None:
        if config.family is None:
            raise _missing(config, "family")
        return config.family
    file = read_config_json(config.path)
    model_type = file.get("model_type")
    family = family_of(model_type) or wrapped_family(file)
    if family is not None:
        return family
    raise ConfigError(
        f"model.path {config.path}",
        found=f"model_type {model_type!r}{_other_kind(file)}",
        expected=f"one of {', '.join(MODEL_TYPES.values())}",
        hint=f"a supported model, or write its facts and adapter: model/families/{model_type}_facts.py and model/families/{model_type}.py",
    )


def _other_kind(file: Mapping[str, Any]) -> str:
    """What a config.json says of itself that no family here has."""
    names = [name for name in file.get("architectures") or () if isinstance(name, str)]
    words, text = [], file.get("text_config")
    if isinstance(text, Mapping) and text.get("model_type") is not None:
        words.append(f"around a text model of type {text['model_type']!r}")
    if file.get("auto_map"):
        words.append("with code of its own (auto_map), which is not run")
    if any(file.get(name) is not None for name in _TOWERS):
        words.append("with a tower for images or sound, which is not trained")
    if file.get("is_encoder_decoder") or (names and not any(name.endswith(_DECODERS) for name in names)):
        words.append(f"no decoder alone ({', '.join(names) or 'is_encoder_decoder'})")
    return "".join(f", {word}" for word in words)


@dataclass(frozen=True, slots=True)
class ModelFields:
    """A model as fields of its Hugging Face config, and what is known of its family."""

    facts: FamilyFacts
    given: dict[str, Any]
    """What the Hugging Face config is built from: `model_type` and the fields of that family's class."""
    full: dict[str, Any]
    """The fields of `given`, with the family's defaults in place of what is left out."""
    rope: RopeFields
    file: dict[str, Any] = field(default_factory=dict)
    """The fields of the config.json as it is; nothing for a model from scratch."""


def hf_config_dict(config: ModelConfig) -> dict[str, Any]:
    """Arguments for `AutoConfig.for_model(model_type, **others)`: `model_type` and the fields of that family's class."""
    return model_fields(config).given


def model_fields(config: ModelConfig) -> ModelFields:
    """The fields of the config.json at `config.path`, or of the config itself, with everything that is asked for in its place."""
    facts = facts_of(model_family(config))
    check_extra(config, facts)
    file = {} if config.path is None else file_fields(read_config_json(config.path), facts)
    _check_plain_numbers(config, file)
    fields = _from_scratch(config, facts) if config.path is None else {**file, "use_cache": False}
    fields |= {name: value for name, value in config.extra.items() if name not in (*LEGACY_KEYS, "rope_parameters")}
    if config.path is not None and config.vocab_size is not None:
        _check_growth(config, {**facts.defaults, **file}["vocab_size"])
        fields["vocab_size"] = config.vocab_size
    if "layer_types" not in config.extra and any(name in config.extra for name in _MAKE_LAYER_TYPES):
        # Saved files list every layer's type, and transformers then reads no pattern.
        fields.pop("layer_types", None)
    where = "model.extra." if config.path is None else f"model.path {config.path}: "
    full = {**_DEFAULTS, **facts.defaults, **fields}
    check_fields(full, facts, where)
    heads = full["num_attention_heads"]
    rope = rope_fields(config, facts, file, full.get("head_dim") or full["hidden_size"] // heads, full["max_position_embeddings"])
    settled = {"rope_parameters": rope.parameters, "max_position_embeddings": rope.positions}
    if facts.outer_original_length and ORIGINAL in rope.parameters:
        settled[ORIGINAL] = rope.parameters[ORIGINAL]
    fields = {name: value for name, value in fields.items() if name not in LEGACY_KEYS} | settled
    return ModelFields(facts, fields, {**full, **settled}, rope, file)


def file_fields(config: Mapping[str, Any], facts: FamilyFacts) -> dict[str, Any]:
    """The fields of a config.json that describe the language model: its own, or those under `text_config`."""
    if facts.wrapped_by is None or config.get("model_type") != facts.wrapped_by:
        fields = {key: value for key, value in config.items() if key not in LABELS - {"model_type"}}
        # A field that is there under both its names is read by its own.
        return {facts.aliases[key]: value for key, value in fields.items() if key in facts.aliases} | {
            key: value for key, value in fields.items() if key not in facts.aliases
        }
    inner = config.get("text_config") or {}
    # The whole model ties its head by its own switch; ids of the end and the beginning may be given there alone.
    shared = {key: config[key] for key in ("bos_token_id", "eos_token_id", "quantization_config") if config.get(key) is not None}
    fields = {**shared, **{key: value for key, value in inner.items() if key not in LABELS}}
    return {**fields, "model_type": facts.model_type, "tie_word_embeddings": config.get("tie_word_embeddings", True)}


def _from_scratch(config: ModelConfig, facts: FamilyFacts) -> dict[str, Any]:
    return {
        "model_type": facts.model_type,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": bool(config.tie_embeddings),
        "head_dim": head_dim(config),
        "use_cache": False,
        # A padding id zeroes one embedding row and its gradient, and packs have no padding.
        "pad_token_id": None,
        **facts.window_fields(config.sliding_window),
    }


def _check_plain_numbers(config: ModelConfig, file: Mapping[str, Any]) -> None:
    kind = file.get("quantization_config") or file.get("compression_config")
    if kind:
        method = kind.get("quant_method", "unknown method") if isinstance(kind, Mapping) else kind
        raise quantised(str(config.path), f"quantization_config in config.json ({method}): quantised weights")


def _check_growth(config: ModelConfig, rows: Any) -> None:
    """Raise ConfigError where the vocabulary asked for is smaller than the file's: rows that are there are kept."""
    assert config.vocab_size is not None
    if isinstance(rows, int) and config.vocab_size < rows:
        raise ConfigError(
            "model.vocab_size",
            found=f"{config.vocab_size} beside model.path={config.path}, whose vocabulary has {rows}",
            expected=f"{rows}, or more for tokens that were added",
            hint="model.vocab_size=null",
        )


def check_extra(config: ModelConfig, facts: FamilyFacts) -> None:
    """Raise ConfigError for a key of `model.extra` that has a name of its own, or that no layer of the family reads."""
    readable = READ_BY_ALL | facts.fields
    for name in config.extra:
        if name in _OWN_NAMES:
            key = _OWN_NAMES[name]
            raise ConfigError(f"model.extra.{name}", found="a second name", expected=f"model.{key}", hint=f"model.{key}=VALUE")
        own = SIZE_NAMES.get(name)
        if config.path is None and own is not None and getattr(config, own) is not None:
            actual, expected = f"{config.extra[name]} beside model.{own}={getattr(config, own)}", f"model.{own} alone"
            raise ConfigError(f"model.extra.{name}", found=actual, expected=expected, hint=f"model.{own}={config.extra[name]}")
        if name == "vocab_size" and config.path is not None:
            raise ConfigError("model.extra.vocab_size", found="a second name", expected="model.vocab_size", hint="model.vocab_size=VALUE")
        is_readable = name in readable or (name == "rope_local_base_freq" and facts.rope_per_layer_type)
        if not is_readable and not (name in facts.unread and config.extra[name] is None):
            near = get_close_matches(name, readable, 1)
            raise ConfigError(
                f"model.extra.{name}",
                found=f"a field that no {facts.model_type} layer reads",
                expected=f"one of {', '.join(sorted(readable))}",
                hint=f"did you mean model.extra.{near[0]}?" if near else f"no model.extra.{name}",
            )


def head_dim(config: ModelConfig) -> int:
    """The head dim: as given, or hidden_size / num_heads."""
    if config.head_dim is not None:
        return config.head_dim
    if config.hidden_size is None or config.num_heads is None:
        raise _missing(config, "hidden_size" if config.hidden_size is None else "num_heads")
    return config.hidden_size // config.num_heads


def given_sizes(config: ModelConfig) -> list[str]:
    """Fields that a config.json decides and that this config states all the same."""
    return [name for name in _SIZES if getattr(config, name) is not None]


def _missing(config: ModelConfig, name: str) -> ConfigError:
    return ConfigError(
        f"model.{name}",
        found="nothing",
        expected=f"a value, for model {config.name} has no path",
        hint=f"model.{name}=VALUE or model.path=DIRECTORY",
    )
