"""What an engine cannot run is refused by the key that asks for it, before anything starts; FSDP2 runs everything."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher.config.compose import compose
from efflaunch.parallel.config import ExpertsConfig, GradReduce
from efflaunch.parallel.sharding.config import EngineConfig
from efflaunch.parallel.sharding.engine import DEEPSPEED, EXPERT_PARALLEL, FSDP2, EngineFacts, Refused
from efflaunch.training.config import TrainConfig
from efflaunch.training.engines import BUILDERS
from efflaunch.training.optimizers.config import OptimConfig, StateDevice, Update
from efflaunch.training.optimizers.engine_check import check_engine, check_package, engine_facts

LACKING = EngineFacts(
    "lacking",
    (),
    (
        Refused("optim.update", ("backward",), "reduces gradients out of reach of an update in backward"),
        Refused("train.dtype", ("float64",), "has float32 masters"),
        Refused("parallel.barrier_free", ("true",), "gathers weights in every micro-batch"),
        Refused("parallel.replicate", ("2", "4"), "shards over all ranks"),
    ),
)


@dataclass
class Parallel:
    barrier_free: bool = False
    replicate: int = 1
    grad_reduce: GradReduce = GradReduce.AUTO
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)


@dataclass
class Config:
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(name="test", lr=1e-3))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1))
    parallel: Parallel = field(default_factory=Parallel)
    engine: EngineConfig = field(default_factory=EngineConfig)


@pytest.mark.parametrize(
    ("config", "key", "hint"),
    [
        (Config(optim=OptimConfig(name="test", lr=1e-3, update=Update.BACKWARD)), "optim.update", "optim.update=step"),
        (Config(parallel=Parallel(barrier_free=True)), "parallel.barrier_free", "parallel.barrier_free=false"),
        (Config(parallel=Parallel(replicate=2)), "parallel.replicate", "another parallel.replicate"),
    ],
)
def test_the_refused_setting_is_named(config: Config, key: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_engine(LACKING, config)
    assert error.value.where == key and "engine lacking" in str(error.value) and hint in str(error.value)
    check_engine(FSDP2, config)


def test_all_refused_settings_are_named_at_once() -> None:
    both = Config(optim=OptimConfig(name="test", lr=1e-3, update=Update.BACKWARD), parallel=Parallel(barrier_free=True, replicate=4))
    with pytest.raises(ConfigError, match=r"backward, and parallel\.barrier_free=true, and parallel\.replicate=4"):
        check_engine(LACKING, both)


def test_what_is_not_refused_is_accepted() -> None:
    check_engine(LACKING, Config(optim=OptimConfig(name="test", lr=1e-3, state_device=StateDevice.HOST), parallel=Parallel(replicate=3)))


def test_every_engine_that_can_be_chosen_can_be_built() -> None:
    assert engine_facts(Config()).name in BUILDERS


SPREAD = (
    *("+experiment=quickstart_moe", "parallel.experts.ep=2", "optim.grad_clip=null"),
    *("adapter.targets=[attention]", "adapter.quantized=[attention]"),
)
REFUSED = {
    "adapter.method=lora": "adapter.method=none",
    "adapter.method=qlora": "adapter.method=none",
    "parallel.barrier_free=true": "parallel.barrier_free=false",
    "optim.update=backward": "optim.update=step",
    "optim.state_device=host": "optim.state_device=device",
    "memory.compile=true": "memory.compile=false",
    "memory.arena=planned": "memory.arena=default",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_what_experts_over_ranks_cannot_be_combined_with(typed: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose([*SPREAD, typed])
    key, value = typed.split("=")
    assert error.value.where == key and REFUSED[typed] in error.value.hint
    assert f"found {value} with the engine {EXPERT_PARALLEL.name}" in str(error.value)


def test_every_pair_that_is_refused_is_tried() -> None:
    assert {f"{pair.key}={value}" for pair in EXPERT_PARALLEL.refused for value in pair.values} == set(REFUSED)
    assert EXPERT_PARALLEL.name in BUILDERS and engine_facts(compose(list(SPREAD))) is EXPERT_PARALLEL


ZERO = ("+experiment=quickstart", "engine=deepspeed")
REFUSED_BY_ZERO = {
    "train.dtype=float64": "train.dtype=bfloat16 or train.dtype=float32",
    "optim.algorithm=nadam": "optim.algorithm=adamw",
    "optim.update=backward": "optim.update=step",
    "optim.state_device=host": "optim.state_device=device",
    "optim.state_dtype=8bit": "optim.state_dtype=float32",
    "parallel.barrier_free=true": "parallel.barrier_free=false",
    "parallel.grad_reduce=step": "parallel.grad_reduce=auto",
    "parallel.replicate=2": "parallel.replicate=1",
    "parallel.pipeline.stages=2": "parallel.pipeline.stages=1",
    "adapter.method=lora": "adapter.method=none",
    "memory.compile=true": "memory.compile=false",
    "memory.arena=planned": "memory.arena=default",
}


@pytest.mark.parametrize("typed", REFUSED_BY_ZERO)
def test_what_zero_cannot_be_combined_with(typed: str) -> None:
    more = ["optim.grad_clip=null"] if typed == "optim.update=backward" else []
    with pytest.raises(ConfigError) as error:
        compose([*ZERO, typed, *more])
    key, value = typed.split("=")
    assert error.value.where == key and error.value.hint == f"{REFUSED_BY_ZERO[typed]}, or engine=torch"
    assert f"found {value} with the engine deepspeed" in str(error.value)


def test_experts_over_ranks_are_refused_under_zero() -> None:
    with pytest.raises(ConfigError) as error:
        compose(["+experiment=quickstart_moe", "engine=deepspeed", "parallel.experts.ep=2"])
    assert error.value.where == "parallel.experts.ep" and "parallel.experts.ep=1" in error.value.hint


def test_every_pair_that_zero_refuses_is_tried() -> None:
    assert {pair.key for pair in DEEPSPEED.refused} == {typed.partition("=")[0] for typed in REFUSED_BY_ZERO} | {"parallel.experts.ep"}
    assert DEEPSPEED.name in BUILDERS and engine_facts(compose(list(ZERO))) is DEEPSPEED


@pytest.mark.parametrize(("there", "found"), [(None, "no package deepspeed"), ("0.18.1", "deepspeed 0.18.1")])
def test_an_engine_that_is_not_installed_is_named_with_what_to_install(there: str | None, found: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_package(DEEPSPEED, lambda package: there)
    assert found in str(error.value) and "pip install" in error.value.hint and "deepspeed==0.19.8" in error.value.hint
    assert error.value.where == "engine=deepspeed" and "engine=torch" in error.value.hint


def test_the_version_that_is_asked_for_is_the_one_that_is_tested() -> None:
    assert DEEPSPEED.package is not None
    check_package(DEEPSPEED, lambda package: DEEPSPEED.package.version)
    check_package(FSDP2, lambda package: None)
    assert f"deepspeed=={DEEPSPEED.package.version}\n" in (Path(__file__).parents[2] / "constraints.txt").read_text()
