"""Our model config as the fields of a Hugging Face config, and back from a config.json. Pure but for reading that file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import ConfigError
from .config import Family, ModelConfig

MODEL_TYPES: Mapping[Family, str] = MappingProxyType(
    {
        Family.LLAMA: "llama",
        Family.MISTRAL: "mistral",
        Family.QWEN2: "qwen2",
        Family.QWEN3: "qwen3",
        Family.GEMMA2: "gemma2",
        Family.GEMMA3: "gemma3_text",
    }
)
"""What `AutoConfig.for_model` calls each family; Gemma 3 is its text model."""

ROPE_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default": (),
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
)
"""Rotary scaling types and the parameters each cannot do without."""

_DEFAULT_THETA = 10_000.0
_GEMMA3_GLOBAL_THETA = 1_000_000.0
_SIZES = (
    "family",
    "num_layers",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "sliding_window",
)
# Labels of a file on disk that say nothing about the architecture.
_LABELS = ("architectures", "transformers_version", "_name_or_path", "auto_map")


def model_family(config: ModelConfig) -> Family:
    """The family named by the config, or by `model_type` in the config.json at `config.path`."""
    if config.path is None:
        if config.family is None:
            raise _missing(config, "family")
        return config.family
    found = read_config_json(config.path).get("model_type")
    for family, model_type in MODEL_TYPES.items():
        if model_type == found:
            return family
    raise ConfigError(
        f"model.path {config.path}",
        found=f"model_type {found!r}",
        expected=f"one of {', '.join(MODEL_TYPES.values())}",
        hint=f"a supported model, or write its adapter: model/families/{found}.py",
    )


def hf_config_dict(config: ModelConfig) -> dict[str, Any]:
    """Arguments for `AutoConfig.for_model(model_type, **others)`: `model_type` and the fields of that family's class."""
    if config.path is not None:
        return _fields_from_path(config)
    family = model_family(config)
    fields: dict[str, Any] = {
        "model_type": MODEL_TYPES[family],
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "head_dim": head_dim(config),
        "rope_parameters": _rope_parameters(config, family),
        "use_cache": False,
        # A padding id zeroes one embedding row and its gradient, and packs have no padding.
        "pad_token_id": None,
    }
    fields.update(_window_fields(config, family))
    extra = {key: value for key, value in config.extra.items() if key != "rope_local_base_freq"}
    return {**fields, **extra}


def head_dim(config: ModelConfig) -> int:
    """Given, or hidden_size / num_heads."""
    if config.head_dim is not None:
        return config.head_dim
    if config.hidden_size is None or config.num_heads is None:
        raise _missing(config, "hidden_size" if config.hidden_size is None else "num_heads")
    return config.hidden_size // config.num_heads


def given_sizes(config: ModelConfig) -> list[str]:
    """Fields that a config.json decides and that this config states all the same."""
    given = [name for name in _SIZES if getattr(config, name) is not None]
    return given + (["tie_embeddings"] if config.tie_embeddings else [])


def read_config_json(path: str) -> dict[str, Any]:
    """The config.json of a local directory or of a hub name; ConfigError when there is none to read."""
    file = _config_file(path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path {path}",
            found=f"no readable config.json ({error})",
            expected="a Hugging Face model directory",
            hint="model.path=DIRECTORY with config.json and *.safetensors in it",
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"model.path {path}", found="a config.json that is no object", expected="a Hugging Face config", hint="check model.path"
        )
    return found


def _config_file(path: str) -> Path:
    local = Path(path)
    if local.exists() or path.startswith((".", "/", "~")):
        return local.expanduser() / "config.json"
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(path, "config.json"))
    except (OSError, ValueError) as error:  # the hub's own errors are both
        raise ConfigError(
            f"model.path {path}",
            found="neither a directory here nor a hub name that can be reached",
            expected="a directory with config.json, or a cached or reachable hub model",
            hint="model.path=DIRECTORY, or download the model on a machine with a network first",
        ) from error


def _fields_from_path(config: ModelConfig) -> dict[str, Any]:
    assert config.path is not None
    fields = {key: value for key, value in read_config_json(config.path).items() if key not in _LABELS}
    fields["use_cache"] = False
    if config.max_positions is not None:
        fields["max_position_embeddings"] = config.max_positions
    if config.rope_theta is not None or config.rope_scaling is not None:
        _override_rope(fields, config)
    return {**fields, **config.extra}


def _override_rope(fields: dict[str, Any], config: ModelConfig) -> None:
    """Context extension of existing weights: `rope_theta` and `rope_scaling` replace what the file says."""
    old = fields.pop("rope_parameters", None) or {}
    scaling_before = fields.pop("rope_scaling", None)
    theta_before = fields.pop("rope_theta", None)
    nested = old.get("full_attention")
    full = dict(nested or old or scaling_before or {})
    theta = config.rope_theta or full.get("rope_theta") or theta_before or _default_theta(model_family(config))
    rope = _rope_dict(config.rope_scaling, theta) if config.rope_scaling is not None else {**full, "rope_theta": theta}
    fields["rope_parameters"] = {**old, "full_attention": rope} if nested else rope


def _rope_parameters(config: ModelConfig, family: Family) -> dict[str, Any]:
    theta = config.rope_theta if config.rope_theta is not None else _default_theta(family)
    rope = _rope_dict(config.rope_scaling, theta)
    if family is not Family.GEMMA3:
        return rope
    local = config.extra.get("rope_local_base_freq", _DEFAULT_THETA)
    return {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}


def _default_theta(family: Family) -> float:
    return _GEMMA3_GLOBAL_THETA if family is Family.GEMMA3 else _DEFAULT_THETA


def _rope_dict(scaling: dict[str, Any] | None, theta: float) -> dict[str, Any]:
    # Older config files say `type`; transformers 5 reads `rope_type` and wants theta inside.
    fields = dict(scaling or {})
    kind = fields.pop("rope_type", None) or fields.pop("type", None) or "default"
    fields.pop("type", None)
    return {"rope_type": kind, **fields, "rope_theta": theta}


def _window_fields(config: ModelConfig, family: Family) -> dict[str, Any]:
    if family is Family.LLAMA:
        return {}
    fields: dict[str, Any] = {"sliding_window": config.sliding_window}
    if family in (Family.QWEN2, Family.QWEN3):
        fields["use_sliding_window"] = config.sliding_window is not None
    return fields


def _missing(config: ModelConfig, name: str) -> ConfigError:
    return ConfigError(
        f"model.{name}",
        found="nothing",
        expected=f"a value, for model {config.name} has no path",
        hint=f"model.{name}=VALUE or model.path=DIRECTORY",
    )
