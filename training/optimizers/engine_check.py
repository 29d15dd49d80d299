"""Refuses settings that an engine cannot run, in the words of the configuration, before anything starts. Pure, no torch."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Protocol

from ...errors import ConfigError
from ...parallel.config import ParallelConfig
from ...parallel.sharding.config import Backend, EngineConfig
from ...parallel.sharding.ds_config import typed
from ...parallel.sharding.engine import DEEPSPEED, EXPERT_PARALLEL, FSDP2, EngineFacts, Refused


class _Chosen(Protocol):
    @property
    def engine(self) -> EngineConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...


def engine_facts(config: _Chosen) -> EngineFacts:
    """The engine that `config` is trained with: it is chosen here and nowhere else."""
    if config.engine.backend is Backend.DEEPSPEED:
        return DEEPSPEED
    return EXPERT_PARALLEL if config.parallel.experts.ep > 1 else FSDP2


def check_engine(engine: EngineFacts, config: object) -> None:
    """Raise ConfigError for the first setting of `config` (dataclasses of dataclasses) that `engine` cannot run; all of them are named."""
    refused = [(pair, text) for pair in engine.refused if pair.refuses(text := typed(config, pair.key))]
    if not refused:
        return
    pair, text = refused[0]
    others = "".join(f", and {other.key}={value}" for other, value in refused[1:])
    raise ConfigError(
        pair.key,
        found=f"{text}{others} with the engine {engine.name}",
        expected=f"something else: the engine {pair.reason}",
        hint=_hint(config, pair) + (f", or engine={Backend.TORCH.value}" if engine.package is not None else ""),
    )


def check_package(engine: EngineFacts, version_of: Callable[[str], str | None]) -> None:
    """Raise ConfigError where the package of an engine is not here in its version. `version_of`: of what is installed, None if nothing."""
    package = engine.package
    if package is None or (version := version_of(package.name)) == package.version:
        return
    raise ConfigError(
        f"engine={engine.name}",
        found=f"no package {package.name}" if version is None else f"{package.name} {version}",
        expected=f"{package.name} {package.version}, whose inner parts this engine is written for",
        hint=f"{package.install}, or engine={Backend.TORCH.value}",
    )


def _hint(config: object, pair: Refused) -> str:
    """The values of the same key that are not refused, where it has a list of them."""
    value = config
    for part in pair.key.split("."):
        value = getattr(value, part)
    if pair.accepts:
        return " or ".join(f"{pair.key}={text}" for text in pair.values)
    if isinstance(value, Enum):
        kept = [str(other.value) for other in type(value) if str(other.value) not in pair.values]
        return " or ".join(f"{pair.key}={text}" for text in kept) or f"another engine for {pair.key}"
    if isinstance(value, bool):
        return f"{pair.key}={str(not value).lower()}"
    return f"another {pair.key}"
