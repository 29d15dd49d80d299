"""Makes whole weights of what a checkpoint of adapters says: the frozen model anew, and W + s B A in place of each W. One process.

Memory: the whole model in the precision it was frozen in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..build import build_config, build_on_meta, initialise
from ..config import Family, ModelConfig
from ..hf_fields import hf_config_dict
from ..weights import load_weights, persistent_buffers
from .base import model_digest
from .config import AdapterConfig, AdapterMethod
from .names import FACTORS, MAGNITUDE, is_factor, quantized_names
from .nf4 import byte_levels, pack, unpack


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """What the metadata of a checkpoint says of its adapters and of the frozen model."""

    adapter: AdapterConfig
    model: ModelConfig
    seed: int
    dtype: str
    """Precision of computation, which the frozen weights are in."""
    digest: str
    """Of the frozen weights."""

    @classmethod
    def of(cls, metadata: Mapping[str, Any], root: Path | None = None) -> SavedAdapter | None:
        """From a checkpoint's metadata; None where all weights were trained. `root`: where a relative model.path starts."""
        if metadata.get("adapter") is None:
            return None
        config = metadata["config"]
        model, adapter = dict(config["model"]), dict(config["adapter"])
        model["family"] = None if model["family"] is None else Family(model["family"])
        if model["path"] is not None and root is not None and (root / model["path"]).exists():
            model["path"] = str(root / model["path"])
        adapter["method"] = AdapterMethod(adapter["method"])
        dtype = config["train"]["dtype"]
        return cls(AdapterConfig(**adapter), ModelConfig(**model), metadata["seed"], dtype, metadata["adapter"]["base"])


@torch.no_grad()
def frozen_weights(saved: SavedAdapter, dtype_of_run: object) -> dict[str, Tensor]:
    """Every weight of the frozen model by name, in the precision of the run: read from model.path, or made from the seed.

    Matrices that were packed have the numbers they were computed with, those of NF4.
    `dtype_of_run`: the configuration's own value, as it went into the digest. CheckpointError where they are other weights now.
    """
    if (saved.model.path is not None and not Path(saved.model.path).exists()) or (
        model_digest(saved.model, saved.seed, dtype_of_run) != saved.digest
    ):
        raise CheckpointError(
            f"model.path {saved.model.path or '(none: made from the seed)'}",
            found="other weights than those the adapters were trained beside, or none",
            expected="the frozen model as it was",
            hint="its files where they were; without --merge the adapter alone is written",
        )
    model = build_on_meta(build_config(hf_config_dict(saved.model)), getattr(torch, saved.dtype))
    model.to_empty(device="cpu")
    initialise(model, saved.seed)
    if saved.model.path is not None:
        load_weights(model, saved.model, saved.seed)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()} | persistent_buffers(model)
    packed = tuple(f".{name}.weight" for name in quantized_names(saved.adapter))
    for name in (name for name in weights if packed and name.endswith(packed)):
        matrix = weights[name]
        weights[name] = unpack(pack(matrix), matrix.shape[1], matrix.dtype, byte_levels())
    return weights


@dataclass(frozen=True, slots=True)
class Rounding:
    """What is lost where merged matrices are written in less than float32: the worst matrix, by its share of what adapters add."""

    name: str
    of_update: float
    """Norm of the rounding error over the norm of s B A."""
    of_matrix: float
    """The same over the norm of the merged matrix."""

    def __str__(self) -> str:
        return f"{self.of_update:.2%} of what the adapter adds, {self.of_matrix:.2%} of the matrix, in {self.name}"


@torch.no_grad()
def merge(weights: dict[str, Tensor], trained: Mapping[str, Tensor], scaling: float, dtype: torch.dtype | None = None) -> Rounding | None:
    """Put trained parts in place of the model's, and add each matrix its s B A; sums in float32 (float64 for float64), rounded once.

    Rows of a matrix with a magnitude get that length (dora.py).
    `dtype`: that of the merged matrices; None: as they were. Returns the largest error of that rounding; None where nothing was rounded.
    """
    worst: Rounding | None = None
    for name, tensor in trained.items():
        if not is_factor(name):
            weights[name] = tensor
        elif name.endswith(".A"):
            owner = name.removesuffix(f".{FACTORS}.A") + ".weight"
            wide = torch.promote_types(weights[owner].dtype, torch.float32)
            stem, before = name.removesuffix(".A"), weights[owner].to(wide)
            update = (trained[f"{stem}.B"].to(wide) @ tensor.to(wide)).mul_(scaling)
            exact = before + update
            magnitude = trained.get(f"{stem}.{MAGNITUDE}")
            if magnitude is not None:
                exact *= (magnitude.to(wide) / torch.linalg.vector_norm(exact, dim=1)).unsqueeze(1)
                update = exact - before
            weights[owner] = exact.to(dtype or weights[owner].dtype)
            error, size = (exact - weights[owner].to(wide)).norm().item(), update.norm().item()
            if error and (worst is None or error > worst.of_update * size):
                worst = Rounding(owner, error / size if size else float("inf"), error / exact.norm().item())
    return worst
