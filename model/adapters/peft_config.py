"""Adapters as PEFT's files have them: names, settings, and which settings of others are refused. Reads headers; no torch.

Note: a directory has adapter_config.json and adapter_model.safetensors, whose names are the model's own behind `base_model.model.`,
`.lora_A.weight` and `.lora_B.weight` for factors, `.lora_magnitude_vector` for DoRA's (as huggingface/peft saves them). What peft puts
into its file for an option that is not here would be trained as something else, so every setting that is not known to change nothing is
refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ..load_plan import parameter_shapes
from ..spec import ModelSpec
from ..weight_files import read_header
from .config import AdapterConfig
from .names import FACTORS, MAGNITUDE, is_factor, is_trained
from .targets import targets

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE_KEY = "efflaunch_base"
"""Key in the metadata of the weights' file: the digest of the frozen weights they were trained beside (base.py)."""
_SAYS_NOTHING = frozenset(
    {
        *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "inference_mode", "peft_version", "runtime_config"),
        *("target_modules", "modules_to_save", "r", "lora_alpha", "use_rslora", "use_dora", "lora_dropout", "qalora_group_size"),
        *("megatron_core", "eva_config"),
    }
)
"""Settings that are compared elsewhere (tensors tell of targets), or that change nothing of what the files mean."""
_NEEDED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
"""Settings with the values that are understood. Other ways to start (pissa, olora, corda, loftq) change the model itself."""


_NAMES = {f".{FACTORS}.A": ".lora_A.weight", f".{FACTORS}.B": ".lora_B.weight", f".{FACTORS}.{MAGNITUDE}": ".lora_magnitude_vector"}
"""Ends of names of an adapter's parameters, here and in PEFT's files."""


def peft_name(name: str) -> str:
    """Name in PEFT's files of a trained parameter of the model."""
    end = next((end for end in _NAMES if name.endswith(end)), "")
    return PREFIX + name.removesuffix(end) + _NAMES.get(end, "")


def trained_shapes(config: AdapterConfig, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every trained parameter of a run with adapters, by its name in the model."""
    shapes = {name: shape for name, shape in parameter_shapes(spec).items() if is_trained(name, config)}
    for layer in range(spec.num_layers):
        for matrix in targets(config, spec):
            name = f"model.layers.{layer}.{matrix.name}.{FACTORS}"
            shapes |= {f"{name}.A": (config.rank, matrix.columns), f"{name}.B": (matrix.rows, config.rank)}
            shapes |= {f"{name}.{MAGNITUDE}": (matrix.rows,)} if config.dora else {}
    return shapes


def settings_of(config: AdapterConfig, base: str | None, names: Iterable[str]) -> dict[str, Any]:
    """What adapter_config.json says of these adapters, for peft. `base`: the model's directory or name.

    `names`: of trained parameters in the model; those of factors say which matrices have adapters.
    """
    saved = {"embedding": "embed_tokens", "head": "lm_head", "norms": "norm"}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": config.dora,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": _matrices(names),
        "modules_to_save": [saved[part] for part in config.modules_to_save] or None,
    }


def check_init(config: AdapterConfig, spec: ModelSpec) -> None:
    """Raise ConfigError where the files at `adapter.init` are not of these adapters, or need what is not here."""
    if config.init is None:
        return
    folder = Path(config.init)
    saved = read_settings(folder)
    _check_options(saved, folder)
    _check_scale(config, saved, folder)
    stored = {name: entry.shape for name, entry in read_header(folder / WEIGHTS).items()}
    wanted = {peft_name(name): shape for name, shape in trained_shapes(config, spec).items()}
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or extra:
        raise ConfigError(
            f"adapter.init {folder}",
            found="; ".join(_named("no", missing) + _named("also", extra)),
            expected="a tensor for each trained parameter of this run, and no other",
            hint=_as_in_the_file(stored) or "the targets and modules_to_save of the file, and the model it was made for",
        )
    for name, shape in wanted.items():
        if stored[name] != shape:
            raise ConfigError(
                f"adapter.init {folder}",
                found=f"{name} of {'x'.join(map(str, stored[name]))}",
                expected=f"{'x'.join(map(str, shape))}: the adapter is of another model",
                hint="model.path=DIRECTORY of the model it was trained beside",
            )


def read_settings(folder: Path) -> dict[str, Any]:
    """What adapter_config.json holds. ConfigError where one of both files is missing or damaged."""
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            there = ", ".join(sorted(path.name for path in folder.glob("adapter_*"))) or "no adapter at all"
            raise ConfigError(
                f"adapter.init {folder}",
                found=f"{there}, no {name}",
                expected=f"{SETTINGS} and {WEIGHTS}, as peft's save_pretrained and efflaunch export write them",
                hint="adapter.init=DIRECTORY; adapter.init=null to go on from a checkpoint",
            )
    try:
        saved = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if not isinstance(saved, dict):
            raise ValueError("no object")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            str(folder / SETTINGS), found=str(error), expected="an object, as peft writes it", hint="the file as it was written"
        ) from error
    return saved


def _check_options(saved: Mapping[str, Any], folder: Path) -> None:
    for key, value in saved.items():
        known = key in _SAYS_NOTHING or (value in _NEEDED[key] if key in _NEEDED else not value)
        if not known:
            raise ConfigError(
                str(folder / SETTINGS),
                found=f"{key}: {json.dumps(value)[:80]}",
                expected="LoRA without options that are not trained here: the same numbers would mean another function",
                hint="an adapter made without it, or merge it into the model with peft and start anew",
            )
    if saved.get("peft_type") != "LORA":
        raise ConfigError(str(folder / SETTINGS), found="no peft_type", expected="LORA", hint="a LoRA adapter")


def _check_scale(config: AdapterConfig, saved: Mapping[str, Any], folder: Path) -> None:
    theirs = saved.get("r"), saved.get("lora_alpha"), _word(saved.get("use_rslora")), _word(saved.get("use_dora"))
    ours = config.rank, config.alpha, _word(config.rslora), _word(config.dora)
    if theirs != ours:
        raise ConfigError(
            f"adapter.init {folder}",
            found=f"rank {theirs[0]}, alpha {theirs[1]}, rslora {theirs[2]}, dora {theirs[3]}",
            expected=f"this run's: {ours[0]}, {ours[1]:g}, {ours[2]}, {ours[3]}",
            hint=f"adapter.rank={theirs[0]} adapter.alpha={theirs[1]} adapter.rslora={theirs[2]} adapter.dora={theirs[3]}",
        )


def _word(flag: object) -> str:
    return "true" if flag else "false"


def _named(word: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return [f"{word} {', '.join(names[:2])}{more}"] if names else []


def _as_in_the_file(stored: Mapping[str, Any]) -> str:
    """The overrides that ask for what the file has."""
    ours = [_our_name(name) for name in stored]
    matrices = _matrices(ours)
    parts = list(dict.fromkeys(_parts(name for name in ours if not is_factor(name))))
    return f"adapter.targets=[{','.join(matrices)}] adapter.modules_to_save=[{','.join(parts)}]" if matrices else ""


def _matrices(names: Iterable[str]) -> list[str]:
    """Last names of the matrices beside which there are factors, each once."""
    return list(dict.fromkeys(name.split(f".{FACTORS}.")[0].rpartition(".")[2] for name in names if is_factor(name)))


def _parts(names: Iterator[str]) -> Iterator[str]:
    for name in names:
        yield "embedding" if "embed_tokens" in name else "head" if name.startswith("lm_head") else "norms"


def _our_name(name: str) -> str:
    end = next((ours for ours, theirs in _NAMES.items() if name.endswith(theirs)), "")
    return name.removeprefix(PREFIX).removesuffix(_NAMES.get(end, "")) + end
