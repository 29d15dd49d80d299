"""Settings of the engine: who holds weights, gradients and optimizer states, and updates them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from ...errors import ConfigError
from ...utils.ranges import Range, check_ranges


class Backend(Enum):
    """The library that shards and updates."""

    TORCH = "torch"
    """PyTorch's FSDP2: runs everything that can be configured."""
    DEEPSPEED = "deepspeed"
    """DeepSpeed's ZeRO (1910.02054), by stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The engine of a run (docs/engines.md)."""

    name: str = "torch"
    backend: Backend = Backend.TORCH
    stage: int | None = None
    """deepspeed: ZeRO's stage. 1: optimizer states are sharded, 2: gradients as well, 3: weights as well. None: engine=torch has none."""

    RANGES: ClassVar[Mapping[str, Range]] = {"stage": Range(1, 3)}


TORCH = EngineConfig()


def check_stage(engine: EngineConfig) -> None:
    """ConfigError unless there is a stage where the engine has stages, and none where it has not."""
    check_ranges(engine, "engine")
    if engine.backend is Backend.DEEPSPEED and engine.stage is None:
        raise ConfigError("engine.stage", found="null with engine=deepspeed", expected="1, 2 or 3", hint="engine.stage=3")
    if engine.backend is Backend.TORCH and engine.stage is not None:
        raise ConfigError(
            "engine.stage",
            found=f"{engine.stage} with engine=torch",
            expected="null: FSDP2 shards weights, gradients and optimizer states, as ZeRO's stage 3 does",
            hint="engine=deepspeed, or engine.stage=null",
        )
