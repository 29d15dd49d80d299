"""Reads and writes adapters in PEFT's files: adapter_model.safetensors and adapter_config.json (peft_config.py has the names)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...parallel.sharding.parts import memory_of, slices
from ..config import ModelConfig
from .base import check_init_base, model_digest
from .config import AdapterConfig
from .names import is_trained
from .peft_config import BASE_KEY, SETTINGS, WEIGHTS, peft_name, read_settings, settings_of


@torch.no_grad()
def load_adapter(weights: nn.Module, config: AdapterConfig, model: ModelConfig, seed: int, dtype: object) -> None:
    """Fill the trained parameters of `weights` from `config.init`, each rank its own rows; `check_init` passed before.

    ConfigError where the files were made beside other frozen weights.
    """
    assert config.init is not None
    folder = Path(config.init)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        recorded, named = (file.metadata() or {}).get(BASE_KEY), read_settings(folder).get("base_model_name_or_path")
        check_init_base(config, recorded, named, model, model_digest(model, seed, dtype))
        for name, parameter in weights.named_parameters():
            part = slices(parameter)
            if is_trained(name, config) and all(piece.start < piece.stop for piece in part):
                memory_of(parameter).copy_(file.get_slice(peft_name(name))[part])


def write_adapter(tensors: Mapping[str, Tensor], out_dir: Path, config: AdapterConfig, *, base: str | None, digest: str) -> None:
    """Write both files into `out_dir`. `tensors`: every trained parameter, whole, by its name in the model.

    `base`: the model's directory or name for peft; `digest`: of the frozen weights, for `load_adapter`.
    """
    named = {peft_name(name): tensor.contiguous() for name, tensor in tensors.items()}
    path = out_dir / WEIGHTS
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(named, path, metadata={"format": "pt", BASE_KEY: digest})
    # safetensors writes beside it and renames, readable by the owner only.
    path.chmod(mode)
    settings: dict[str, Any] = settings_of(config, base, tensors)
    (out_dir / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
