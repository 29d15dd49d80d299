"""Names the frozen weights that adapters belong to: a digest, kept in checkpoints and exports in place of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ..config import ModelConfig
from ..spec import ModelSpec
from ..weights import weights_fingerprint
from .config import AdapterConfig
from .targets import quantized


def model_digest(config: ModelConfig, seed: int, dtype: object) -> str:
    """A digest that changes with a run's first model: every override, and the weights' files by content, not place.

    The seed counts where it makes weights: all of them without files, and rows for added tokens. `dtype`: what they are computed in.
    """
    model = {key: value for key, value in asdict(config).items() if key not in ("name", "path")}
    path = config.path
    origin = seed if path is None else weights_fingerprint(path)
    seeded = [seed] if path is not None and config.vocab_size is not None else []
    return hashlib.sha256(repr([model, dtype, origin, *seeded]).encode()).hexdigest()


def adapter_identity(adapter: AdapterConfig, base: str, spec: ModelSpec) -> dict[str, Any]:
    """What a checkpoint of adapters keeps of the function they are a part of, as JSON; shapes are in its tensors."""
    packed = {"packed": [matrix.name for matrix in quantized(adapter, spec)]} if adapter.quantizes else {}
    dora = {"dora": True} if adapter.dora else {}
    return {"base": base, "scaling": adapter.scaling, "rank": adapter.rank, **packed, **dora}


def check_same_base(saved: Mapping[str, Any] | None, now: Mapping[str, Any] | None, config: ModelConfig, step: int) -> None:
    """Raise ConfigError where the adapters of the checkpoint of `step` would meet other frozen weights, or another scaling, than before.

    None: a run without adapters.
    """
    if saved is None or now is None:
        return  # tensors that one has and the other has not are named by whoever restores them
    where = f"checkpoint of step {step}"
    if saved["base"] != now["base"]:
        raise ConfigError(
            where,
            found=f"adapters that were trained beside other weights than {config.path or 'those of this seed and these sizes'}",
            expected="the frozen model the run began with: adapters mean nothing beside another",
            hint="the model's files as they were (model.path, model.*, train.seed, train.dtype); run.id=ANOTHER for a new run",
        )
    if saved.get("packed") != now.get("packed"):
        before = f"adapter=qlora adapter.quantized=[{','.join(saved['packed'])}]" if saved.get("packed") else "adapter=lora"
        raise ConfigError(
            where,
            found="adapters that were trained beside matrices of another precision: others were in NF4",
            expected="the frozen numbers they were trained with",
            hint=f"{before}; run.id=ANOTHER for a new run",
        )
    if saved.get("dora", False) != now.get("dora", False):
        before = "with" if saved.get("dora") else "without"
        raise ConfigError(
            where,
            found=f"adapters {before} magnitudes of their own",
            expected="the same parameters as before",
            hint=f"adapter.dora={str(bool(saved.get('dora'))).lower()}; run.id=ANOTHER for a new run",
        )
    if saved["scaling"] != now["scaling"]:
        raise ConfigError(
            where,
            found=f"adapters scaled by {saved['scaling']:g}; now by {now['scaling']:g}",
            expected="the scaling they were trained with",
            hint="adapter.alpha and adapter.rslora as they were; run.id=ANOTHER for a new run",
        )


def check_init_base(adapter: AdapterConfig, recorded: str | None, named: str | None, model: ModelConfig, base: str) -> None:
    """Raise ConfigError where the files at `adapter.init` say that they are of another model.

    `recorded`: the digest they carry; `named`: the base_model_name_or_path in their settings, compared where it is a directory here.
    """
    other = recorded is not None and recorded != base
    if not other and recorded is None and named is not None and model.path is not None and Path(named).is_dir():
        other = Path(named).resolve() != Path(model.path).resolve() and weights_fingerprint(named) != weights_fingerprint(model.path)
    if other:
        raise ConfigError(
            f"adapter.init {adapter.init}",
            found=f"an adapter of {named or 'another model'}, whose weights are not those of {model.path or 'this seed'}",
            expected="the frozen weights it was trained beside",
            hint=f"model.path={named or 'DIRECTORY'}, or without adapter.init",
        )
