"""Cuts the decoder layers into the stages of a pipeline, and finds what each of them must hold and how long it takes. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..memory.policy import KEEP_ALL
from ..parallel.config import GradReduce
from ..parallel.pipeline.config import PipelineOrder
from .footprint.device import device_terms
from .footprint.host import arena_bytes
from .footprint.term import ALL
from .plan_inputs import PlanInputs
from .timing.step import Timing, estimate_time, fill_share

if TYPE_CHECKING:  # numpy is loaded where stages are cut, not with the launcher
    from ..parallel.pipeline.work import ModelLoad


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """What a rank of one stage holds at most."""

    layers: tuple[range, ...]
    """Decoder layers of each of its virtual stages, numbered as in the whole model."""
    in_flight: int
    """Micro-batches that wait for their backward, at most."""
    peak_bytes: int
    arena_bytes: int
    """Of host memory, or files, for what its policy moves there."""
    seconds: float
    """Seconds of one micro-batch of longest sequences, forward and backward."""


def stage_layers(inputs: PlanInputs) -> tuple[range, ...]:
    """Decoder layers of each (virtual) stage: as configured, or so that the slowest takes least; of those the most even.

    Where ranks have several virtual stages, layers then move between them until no move makes the slowest rank faster.
    """
    stages = inputs.layout.stages * inputs.parallel.pipeline.virtual
    given = inputs.parallel.pipeline.layers
    counts = tuple(given) if given is not None else _even_counts(inputs, stages)
    ends = [sum(counts[: index + 1]) for index in range(stages)]
    return tuple(range(end - size, end) for end, size in zip(ends, counts, strict=True))


def _even_counts(inputs: PlanInputs, stages: int) -> tuple[int, ...]:
    from ..parallel.pipeline.partition import balanced, partition

    model, ranks = model_load(inputs), inputs.layout.stages
    cut = partition(model, stages, tokens=1.0, pairs=0.0)
    if stages == ranks:
        return cut.counts
    return balanced(model, cut, [stage % ranks for stage in range(stages)], tokens=1.0, pairs=0.0).counts


def layers_by_rank(inputs: PlanInputs) -> tuple[tuple[range, ...], ...]:
    """Decoder layers of each stage's ranks, by virtual stage: dealt out in turn."""
    layers, ranks = stage_layers(inputs), inputs.layout.stages
    return tuple(layers[rank::ranks] for rank in range(ranks))


def stage_inputs(inputs: PlanInputs) -> tuple[PlanInputs, ...]:
    """The inputs of each stage's ranks, from those of the whole model."""
    layers = layers_by_rank(inputs)
    return tuple(inputs.stage(*parts, in_flight=in_flight(inputs, index, parts)) for index, parts in enumerate(layers))


def in_flight(inputs: PlanInputs, stage: int, parts: tuple[range, ...]) -> int:
    """Micro-batches that a stage has in flight at most, whatever a step's plan is; those of a virtual stage count as its share."""
    stages, order = inputs.layout.stages, inputs.parallel.pipeline.order
    if order is PipelineOrder.GPIPE:
        return gpipe_in_flight(inputs)
    if order in (PipelineOrder.ONE_F_ONE_B, PipelineOrder.ZERO_BUBBLE):
        return stages - stage
    units = 2 * (stages - 1 - stage) + (len(parts) - 1) * stages + 1
    return -(-units * max(map(len, parts)) // sum(map(len, parts)))


def gpipe_in_flight(inputs: PlanInputs) -> int:
    """Micro-batches that go forward before the first goes backward: those of the step of longest sequences."""
    return max(inputs.layout.num_micro_batches, inputs.layout.stages)


def memories(stages: tuple[PlanInputs, ...], layers: tuple[tuple[range, ...], ...]) -> tuple[StageMemory, ...]:
    """What each stage's ranks hold, by the policies of `stages`."""
    return tuple(
        StageMemory(
            layers=each,
            in_flight=stage.in_flight,
            peak_bytes=peak_bytes(stage),
            arena_bytes=arena_bytes(stage),
            seconds=micro_batch_s(stage),
        )
        for stage, each in zip(stages, layers, strict=True)
    )


def peak_bytes(inputs: PlanInputs) -> int:
    """Most bytes of a rank, over the phases of its step."""
    terms = device_terms(inputs)
    return max(sum(term.by_phase.get(phase, 0) for term in terms) for phase in ALL)


def micro_batch_s(inputs: PlanInputs) -> float:
    """Seconds of one micro-batch of longest sequences in one stage."""
    timing = estimate_time(inputs)
    return (timing.compute_s + timing.sequence_s + timing.experts_s + timing.host_s) / inputs.passes


def pipelined(stages: tuple[PlanInputs, ...]) -> Timing:
    """The step of all stages: as long as the slowest, and longer by what fills and drains the pipeline; work is that of all."""
    each = [estimate_time(stage) for stage in stages]
    slowest = max(range(len(stages)), key=lambda index: micro_batch_s(stages[index]))
    share = fill_share(stages[slowest])
    bubble = (len(stages) - 1) * (micro_batch_s(stages[slowest]) * share + transfer_s(stages[slowest]))
    first = stages[0]
    line = (
        f"{first.layout.num_micro_batches} micro-batches through {len(stages)} stages: filling and draining take "
        f"{(len(stages) - 1) * share:.3g} more; "
        "activations between stages hide behind compute once the pipeline is full"
    )
    return replace(
        each[slowest],
        attention_flops=sum(timing.attention_flops for timing in each),
        linear_flops=sum(timing.linear_flops for timing in each),
        model_flops=sum(timing.model_flops for timing in each),
        bubble_s=bubble * first.passes / first.layout.num_micro_batches,
        assumptions=(*each[slowest].assumptions, line),
    )


def least_step_s(inputs: PlanInputs) -> float:
    """Seconds of a step that no memory policy makes shorter: everything kept on the device, whether it fits or not."""
    policy = KEEP_ALL if inputs.memory.solve else inputs.policy
    fastest = replace(inputs, policy=policy, parallel=replace(inputs.parallel, grad_reduce=GradReduce.STEP))
    if inputs.layout.stages == 1:
        return estimate_time(fastest).step_s
    return pipelined(stage_inputs(fastest)).step_s


def transfer_s(inputs: PlanInputs) -> float:
    """Seconds of one micro-batch's activations to the next stage, and of their gradients back."""
    num_bytes = 2 * inputs.width * inputs.spec.hidden_size * inputs.tokens
    crosses = inputs.layout.stage_size * inputs.layout.stages > inputs.layout.ranks_per_node
    return num_bytes / (inputs.cluster.inter_node_bandwidth if crosses else inputs.cluster.intra_node_bandwidth)


def model_load(inputs: PlanInputs) -> ModelLoad:
    """What each layer and the head take of a micro-batch of longest sequences, as if it were one token's work."""
    from ..parallel.pipeline.work import LayerLoad, ModelLoad

    seconds: dict[tuple[object, ...], float] = {}

    def alone(layer: int, *, has_head: bool = False) -> float:
        stage = inputs.stage(range(layer, layer + 1), has_embedding=False, has_head=has_head)
        key = (stage.spec.windows, stage.layers, has_head)
        if key not in seconds:
            seconds[key] = micro_batch_s(stage)
        return seconds[key]

    last = inputs.spec.num_layers - 1
    # A layer load's forward and backward of one token without attention are three times its `token_s` (work.py).
    layers = tuple(LayerLoad(token_s=alone(layer) / 3) for layer in range(last + 1))
    return ModelLoad(layers=layers, head=LayerLoad(token_s=max(0.0, alone(last, has_head=True) - alone(last)) / 3))
