"""How the decoder layers are spread over ranks as a pipeline, and what refuses a pipeline that cannot be. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from ...errors import ConfigError
from ...utils.divisors import divisors, nearest_divisor
from ...utils.ranges import Range, check_ranges


class PipelineOrder(Enum):
    """In which order each stage makes the forward and backward passes of a step's micro-batches."""

    ONE_F_ONE_B = "1f1b"
    """One forward, one backward in turn once the pipeline is full: at most as many micro-batches in flight as stages from here on."""
    GPIPE = "gpipe"
    """All forward passes, then all backward ones (1811.06965): every micro-batch of the step is in flight."""
    INTERLEAVED = "interleaved"
    """1f1b over several virtual stages on each rank (2104.04473): the bubble is so many times smaller, and more is in flight."""
    ZERO_BUBBLE = "zero_bubble"
    """1f1b whose gradients of weights are made later, where a rank would wait (ZB-H1, 2401.10241): their operands wait too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig:
    """Stages: runs of decoder layers on ranks of their own, through which micro-batches go one after the other."""

    stages: int = 1
    """Stages that the decoder layers are cut into, each on as many ranks, next to each other; 1: every rank has all layers."""
    order: PipelineOrder = PipelineOrder.ONE_F_ONE_B
    virtual: int = 1
    """interleaved: virtual stages of each stage's ranks; the layers are cut into `stages` x `virtual` pieces, dealt out in turn."""
    layers: list[int] | None = None
    """Decoder layers of each (virtual) stage, from the first on; None: chosen so that the slowest is as fast as can be."""
    auto: bool = False
    """Decide stages, order, virtual and layers, when a command line is read: the least estimated step time that fits, none included."""
    micro_batches: int | None = None
    """Micro-batches of a step, at least; fewer where there are not as many sequences. None: chosen for the least step time."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "stages": Range(1, 1 << 16),
        "virtual": Range(1, 1 << 10),
        "layers": Range(1, 1 << 16),
        "micro_batches": Range(1, 1 << 20),
    }


def check_pipeline(pipeline: PipelineConfig, *, world_size: int, num_layers: int, barrier_free: bool) -> None:
    """ConfigError unless ranks and layers divide over the stages; nothing is checked of `num_layers` where there is one stage."""
    check_ranges(pipeline, "parallel.pipeline")
    stages = pipeline.stages
    if pipeline.auto:
        found = "true in a configuration that no command line was read for"
        expected = "false: what was decided stands in the stages of a run's configuration"
        _refuse("auto", found, expected, "efflaunch resume RUN_DIR parallel.pipeline.auto=true")
    if stages == 1:
        if pipeline.layers is not None:
            _refuse("layers", str(pipeline.layers), "null with one stage, which has all layers", "parallel.pipeline.layers=null")
        return
    if world_size % stages:
        nearest = nearest_divisor(world_size, min(stages, num_layers))
        which = ", ".join(map(str, divisors(world_size)))
        _refuse("stages", f"{stages} on {world_size} ranks", f"a divisor of {world_size}: {which}", f"parallel.pipeline.stages={nearest}")
    if stages > num_layers:
        nearest = max(n for n in divisors(world_size) if n <= num_layers)
        _refuse("stages", f"{stages} for {num_layers} decoder layers", "at least one layer a stage", f"parallel.pipeline.stages={nearest}")
    _check_virtual(pipeline, num_layers)
    if barrier_free:
        raise ConfigError(
            "parallel.barrier_free",
            found=f"true with parallel.pipeline.stages={stages}",
            expected="false: a stage waits for the activations of the stage before",
            hint="parallel.barrier_free=false, or parallel.pipeline.stages=1",
        )
    if pipeline.layers is not None:
        _check_layers(pipeline.layers, stages * pipeline.virtual, num_layers)


def _check_virtual(pipeline: PipelineConfig, num_layers: int) -> None:
    """ConfigError unless there are several virtual stages where the order is made of them, and only there."""
    virtual, most = pipeline.virtual, num_layers // pipeline.stages
    if pipeline.order is not PipelineOrder.INTERLEAVED:
        if virtual > 1:
            found = f"{virtual} with parallel.pipeline.order={pipeline.order.value}"
            _refuse("virtual", found, "1: only interleaved ranks have several", "parallel.pipeline.order=interleaved")
        return
    if most < 2:
        found = f"interleaved with {num_layers} decoder layers in {pipeline.stages} stages"
        _refuse("order", found, "two layers a stage, at least", "parallel.pipeline.order=1f1b, or fewer stages")
    if not 2 <= virtual <= most:
        found = f"{virtual} with interleaved, and {num_layers} decoder layers in {pipeline.stages} stages"
        hint = f"parallel.pipeline.virtual={min(max(virtual, 2), most)}, or parallel.pipeline.order=1f1b"
        _refuse("virtual", found, f"2 to {most}, at least one layer each", hint)


def _check_layers(layers: list[int], stages: int, num_layers: int) -> None:
    """ConfigError unless there is a count for each stage, and they add up to the model."""
    if len(layers) == stages and sum(layers) == num_layers:
        return
    even = [num_layers * (index + 1) // stages - num_layers * index // stages for index in range(stages)]
    found = f"{layers}: {len(layers)} stages of {sum(layers)} layers in all"
    expected = f"{stages} counts (parallel.pipeline.stages x virtual) that add up to {num_layers}, the model's decoder layers"
    _refuse("layers", found, expected, f"parallel.pipeline.layers=[{','.join(map(str, even))}], or parallel.pipeline.layers=null")


def _refuse(key: str, found: str, expected: str, hint: str) -> None:
    raise ConfigError(f"parallel.pipeline.{key}", found=found, expected=expected, hint=hint)
