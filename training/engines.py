"""Maps each engine to its builder; which one a run has is chosen by `optimizers/engine_check.py`, `engine_facts`."""

from __future__ import annotations

from ..parallel.sharding.engine import DEEPSPEED, EXPERT_PARALLEL, FSDP2
from .optimizers.build import BuildTrained, Settings, build_trained
from .optimizers.build_zero import build_zero
from .optimizers.engine_check import engine_facts

BUILDERS: dict[str, BuildTrained] = {FSDP2.name: build_trained, EXPERT_PARALLEL.name: build_trained, DEEPSPEED.name: build_zero}


def builder_of(config: Settings) -> BuildTrained:
    """The builder of a model, its weights, updater and state; what the engine cannot run was refused before the run."""
    return BUILDERS[engine_facts(config).name]
