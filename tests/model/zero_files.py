"""Writes checkpoints of ZeRO's form without DeepSpeed, for tests of what is wrong with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write_zero(folder: Path, weights: dict[str, Tensor], *, stage: int = 3, ranks: int = 2, **model: Any) -> Path:
    """A folder of `ranks` files of flat float32 weights, and one of shapes; `model`: further keys of the latter."""
    folder.mkdir(parents=True)
    names = {"param_shapes": [{name: value.shape for name, value in weights.items()}], "buffer_names": [], "module": {}}
    prefix = "zero_pp_rank_0_mp_rank_00" if stage == 3 else "mp_rank_00"
    torch.save({**names, "shared_params": {}, "ds_version": "0.0", **model}, folder / f"{prefix}_model_states.pt")
    flats = _partitions(weights, ranks) if stage == 3 else _cut(torch.cat([value.flatten() for value in weights.values()]), ranks)
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    for rank, flat in enumerate(flats):
        state = {"zero_stage": stage, "partition_count": ranks, key: [flat.clone()]}
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def _cut(flat: Tensor, ranks: int) -> list[Tensor]:
    """Even parts, the last padded."""
    return list(torch.nn.functional.pad(flat, (0, -flat.numel() % (2 * ranks))).chunk(ranks))


def _partitions(weights: dict[str, Tensor], ranks: int) -> list[Tensor]:
    """Every parameter cut by itself."""
    parts = [torch.nn.functional.pad(value.flatten(), (0, -value.numel() % ranks)).view(ranks, -1) for value in weights.values()]
    return [torch.cat([part[rank] for part in parts]) for rank in range(ranks)]


def write_universal(folder: Path, weights: dict[str, Tensor]) -> Path:
    """A folder with a file per parameter."""
    for name, value in weights.items():
        (folder / "zero" / name).mkdir(parents=True)
        torch.save({"param": value, "cat_dim": 0}, folder / "zero" / name / "fp32.pt")
    return folder
