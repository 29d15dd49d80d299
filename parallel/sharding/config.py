"""Settings of the engine: who holds weights, gradients and optimizer states, and updates them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar, Protocol

from ...errors import ConfigError
from ...utils.ranges import Range, check_ranges
from .ds_config import check_zero, ds_config, read_file


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
    config: str | None = None
    """deepspeed: a ds_config.json, whose keys go to DeepSpeed, agree with this configuration, or are refused. None: there is none."""
    zero: dict[str, Any] = field(default_factory=dict)
    """deepspeed: keys of zero_optimization that go to DeepSpeed as they are, {reduce_bucket_size: 500000000}; engine.config sets it."""

    RANGES: ClassVar[Mapping[str, Range]] = {"stage": Range(1, 3)}


TORCH = EngineConfig()


class _Engined(Protocol):
    @property
    def engine(self) -> EngineConfig: ...


def with_ds_config(config: _Engined) -> EngineConfig:
    """The engine of a whole configuration, with what engine.config says. ConfigError for what its file cannot say here.

    The file is read when something is typed, and what goes to DeepSpeed is kept: a run needs no file.
    """
    engine = config.engine
    if engine.config is None or engine.backend is not Backend.DEEPSPEED or engine.stage is None:
        return engine
    said = dict(ds_config(read_file(engine.config), config, engine.config).zero)
    for name, value in engine.zero.items():
        if name in said and said[name] != value:
            raise ConfigError(
                f"engine.zero.{name}",
                found=f"{value}, where {engine.config} says {said[name]}",
                expected="the same in both",
                hint="the file changed, or engine.config=null to go by engine.zero alone",
            )
    return replace(engine, zero={**engine.zero, **said})


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
    _check_keys(engine)


def _check_keys(engine: EngineConfig) -> None:
    """ConfigError for keys of DeepSpeed's that another engine was given, or that do not go to it."""
    if engine.backend is Backend.DEEPSPEED:
        check_zero(engine.zero, engine.stage or 0)
        return
    given = {"config": engine.config, "zero": engine.zero or None}
    for key, value in given.items():
        if value is not None:
            found, off = f"{value} with engine={engine.backend.value}", "null" if key == "config" else "{}"
            hint = f"engine=deepspeed, or engine.{key}={off}"
            raise ConfigError(f"engine.{key}", found=found, expected="it with engine=deepspeed alone", hint=hint)
