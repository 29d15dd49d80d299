"""What a model is made of, as numbers: the one source for plans, parameter counts and checks. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .config import Family, ModelConfig
from .hf_fields import ROPE_KEYS, given_sizes, head_dim, hf_config_dict, model_family

_GEMMA = (Family.GEMMA2, Family.GEMMA3)
_QWEN = (Family.QWEN2, Family.QWEN3)
# What the Hugging Face classes assume where a config.json leaves a field out (save_pretrained leaves defaults out).
_DEFAULTS: Mapping[str, Any] = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "sliding_window_pattern": 6,
}
_FAMILY_DEFAULTS: Mapping[Family, Mapping[str, Any]] = {
    Family.LLAMA: {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    Family.MISTRAL: {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    Family.QWEN2: {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "sliding_window": 4096},
    Family.QWEN3: {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
    },
    Family.GEMMA2: {
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    Family.GEMMA3: {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Sizes of one decoder-only model; every count below follows from these alone."""

    family: Family
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_embeddings: bool
    max_positions: int
    """Positions the rotary table is defined for."""
    windows: tuple[int | None, ...]
    """Per layer: tokens attention looks back over, None for all of them."""
    qk_norm: bool
    """RMS norm over the head dim of queries and keys."""
    attention_bias: bool
    """On the query, key and value projections."""
    output_bias: bool
    """On the attention's output projection."""
    mlp_bias: bool
    norms_per_layer: int
    """RMS norms over the hidden size in one decoder layer: 2, or 4 in Gemma."""

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the keys, and of the values."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """Weights of one decoder layer."""

    total: int
    """All that are there: bytes follow from them."""
    active: int
    """Those one token is multiplied with: FLOPs follow from them. Fewer than `total` where a token visits some experts only."""


def layer_parameters(spec: ModelSpec) -> tuple[LayerParameters, ...]:
    """Weights of each decoder layer, from the first to the last."""
    dense = _dense_layer_parameters(spec)
    return (LayerParameters(total=dense, active=dense),) * spec.num_layers


def active_layer_parameters(spec: ModelSpec) -> float:
    """Weights of a decoder layer that one token is multiplied with, the layers' mean."""
    return sum(layer.active for layer in layer_parameters(spec)) / spec.num_layers


def _dense_layer_parameters(spec: ModelSpec) -> int:
    hidden, queries, keys, inner = spec.hidden_size, spec.query_size, spec.kv_size, spec.intermediate_size
    matrices = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * inner
    biases = (queries + 2 * keys) * spec.attention_bias + hidden * spec.output_bias + (2 * inner + hidden) * spec.mlp_bias
    return matrices + biases + spec.norms_per_layer * hidden + 2 * spec.head_dim * spec.qk_norm


def num_parameters(spec: ModelSpec) -> int:
    """All weights; a tied head counts once."""
    embeddings = spec.vocab_size * spec.hidden_size * (1 if spec.tie_embeddings else 2)
    return sum(layer.total for layer in layer_parameters(spec)) + embeddings + spec.hidden_size


def model_spec(config: ModelConfig) -> ModelSpec:
    """The sizes of a checked config: from its own fields, or from the config.json at its path."""
    check_model(config)
    family = model_family(config)
    fields = {**_DEFAULTS, **_FAMILY_DEFAULTS[family], **hf_config_dict(config)}
    _check_dropout(fields)
    heads, bias = fields["num_attention_heads"], bool(fields.get("attention_bias"))
    return ModelSpec(
        family=family,
        num_layers=fields["num_hidden_layers"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
        vocab_size=fields["vocab_size"],
        tie_embeddings=bool(fields.get("tie_word_embeddings")),
        max_positions=fields["max_position_embeddings"],
        windows=_windows(family, fields),
        qk_norm=family in (Family.QWEN3, Family.GEMMA3),
        attention_bias=family is Family.QWEN2 or (bias and family is not Family.MISTRAL),
        output_bias=bias and family not in (Family.QWEN2, Family.MISTRAL),
        mlp_bias=family is Family.LLAMA and bool(fields.get("mlp_bias")),
        norms_per_layer=4 if family in _GEMMA else 2,
    )


def check_model(config: ModelConfig) -> None:
    """ConfigError unless the config names one model this package can train."""
    if config.path is not None:
        _check_path(config)
    else:
        _check_present(config)
        _check_heads(config)
        _check_window(config)
    _check_rope(config)


def _check_dropout(fields: Mapping[str, Any]) -> None:
    # Refused here for a message before anything starts; the layer adapters rely on it.
    dropout = float(fields.get("attention_dropout") or 0.0)
    if dropout > 0:
        raise ConfigError(
            "model.extra.attention_dropout",
            found=f"{dropout:g}",
            expected="0: block-wise attention has no dropout",
            hint="model.extra.attention_dropout=0.0",
        )


def _check_path(config: ModelConfig) -> None:
    given = given_sizes(config)
    if given:
        raise ConfigError(
            f"model.{given[0]}",
            found=f"{_shown(getattr(config, given[0]))} beside model.path={config.path}",
            expected="sizes from the config.json at model.path only",
            hint=" ".join(f"model.{name}={'false' if name == 'tie_embeddings' else 'null'}" for name in given),
        )
    model_family(config)


def _check_present(config: ModelConfig) -> None:
    needed = ["family", "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "vocab_size", "max_positions"]
    if config.family in _GEMMA and "layer_types" not in config.extra:
        needed.append("sliding_window")
    missing = [name for name in needed if getattr(config, name) is None]
    if missing:
        raise ConfigError(
            f"model.{missing[0]}",
            found=f"no {', '.join(missing)} in model {config.name}",
            expected="every size of a model without model.path",
            hint=" ".join(f"model.{name}=VALUE" for name in missing) + ", or model.path=DIRECTORY",
        )
    for name in [*needed[1:], "head_dim"]:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"model.{name}", found=str(value), expected="a number above 0", hint=f"model.{name}=VALUE")


def _check_heads(config: ModelConfig) -> None:
    heads, kv_heads, hidden = config.num_heads, config.num_kv_heads, config.hidden_size
    assert heads is not None and kv_heads is not None and hidden is not None
    if heads % kv_heads:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ConfigError(
            "model.num_kv_heads",
            found=f"{kv_heads} KV heads for {heads} heads",
            expected=f"a divisor of {heads}: {', '.join(map(str, divisors))}",
            hint=f"model.num_kv_heads={max(n for n in divisors if n <= kv_heads or n == 1)}",
        )
    if config.head_dim is None and hidden % heads:
        raise ConfigError(
            "model.num_heads",
            found=f"{heads} heads for hidden size {hidden}",
            expected="a divisor of the hidden size where model.head_dim is not given",
            hint="model.head_dim=VALUE or another model.num_heads",
        )
    if head_dim(config) % 2:
        raise ConfigError(
            "model.head_dim",
            found=str(head_dim(config)),
            expected="an even number, for rotary embeddings turn pairs",
            hint=f"model.head_dim={head_dim(config) + 1}",
        )


def _check_window(config: ModelConfig) -> None:
    if config.sliding_window is None:
        return
    assert config.family is not None
    if config.family is Family.LLAMA:
        raise ConfigError(
            "model.sliding_window",
            found=f"{config.sliding_window} for a llama model",
            expected="null: this family has no sliding window",
            hint="model.sliding_window=null or model.family=mistral",
        )
    if config.family in _QWEN and not any(_windows(config.family, {**_DEFAULTS, **hf_config_dict(config)})):
        raise ConfigError(
            "model.sliding_window",
            found=f"{config.sliding_window}, but no layer uses it: layers from max_window_layers ({_DEFAULTS['max_window_layers']}) on do",
            expected=f"model.extra.max_window_layers below {config.num_layers}",
            hint="+model.extra.max_window_layers=0",
        )


def _check_rope(config: ModelConfig) -> None:
    if config.rope_scaling is None:
        return
    kind = str(config.rope_scaling.get("rope_type", config.rope_scaling.get("type")))
    if kind not in ROPE_KEYS:
        raise ConfigError(
            "model.rope_scaling.rope_type",
            found=repr(kind),
            expected=f"one of {', '.join(ROPE_KEYS)}",
            hint="model.rope_scaling.rope_type=linear",
        )
    missing = [key for key in ROPE_KEYS[kind] if key not in config.rope_scaling]
    if missing:
        raise ConfigError(
            f"model.rope_scaling.{missing[0]}",
            found=f"no {', '.join(missing)} for rope_type {kind}",
            expected=f"{', '.join(ROPE_KEYS[kind])}",
            hint=" ".join(f"+model.rope_scaling.{key}=VALUE" for key in missing),
        )


def _windows(family: Family, fields: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Per layer, as the family's Hugging Face class reads its config."""
    window: int | None = fields.get("sliding_window")
    num_layers: int = fields["num_hidden_layers"]
    if family is Family.LLAMA or (family in _QWEN and not fields.get("use_sliding_window")):
        return (None,) * num_layers
    if family is Family.MISTRAL:
        return (window,) * num_layers
    types = fields.get("layer_types") or [_slides(family, layer, fields) for layer in range(num_layers)]
    return tuple(window if kind in (True, "sliding_attention") else None for kind in types)


def _slides(family: Family, layer: int, fields: Mapping[str, Any]) -> bool:
    if family in _QWEN:
        return bool(layer >= fields["max_window_layers"])
    period = 2 if family is Family.GEMMA2 else fields["sliding_window_pattern"]
    return bool((layer + 1) % period)


def _shown(value: object) -> str:
    return str(getattr(value, "value", value))
