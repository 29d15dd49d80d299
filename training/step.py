"""Computes one optimizer step's gradients by executing a StepPlan on this rank. Everything here is decided by the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from ..model.stage import stage_of
from ..parallel.pipeline.plan import Schedule, check_schedule
from ..parallel.sequence.clock import BusyClock
from .micro_batches import MicroBatchWork
from .non_finite import RowWatch
from .objectives.heads import StepObjective
from .step_passes import StepPasses
from .step_setup import StepSetup


def backward_step(
    setup: StepSetup,
    micro_batches: Sequence[MicroBatchWork],
    objective: StepObjective,
    *,
    schedule: Schedule | None = None,
    clocks: Sequence[BusyClock] | None = None,
    watch: RowWatch | None = None,
    on_last: Callable[[], None] | None = None,
) -> Tensor:
    """Leave the step's gradients in the parameters; returns this rank's share of the mean loss per micro-batch, float64.

    The sum over micro-batches and ranks is the loss. After an exception nothing is as it was before `abandon_step`.
    `schedule`: of one stage, another order of the same passes than `setup.schedule`; PlanError where it is none. `clocks`: one per
    micro-batch, to be filled. `watch`: learns which rows' losses are not finite. `on_last` is called before the backward that completes the
    gradients.
    """
    clocks = clocks or [BusyClock(setup.device) for _ in micro_batches]
    passes, links = StepPasses(setup, micro_batches, objective, clocks, watch, on_last or _nothing), stage_of(setup.model).links
    if links is not None:
        return passes.run_stages(setup.actions(links.place, len(micro_batches)), links)
    own = schedule or setup.schedule(micro_batches)
    check_schedule(own, {index for index, work in enumerate(micro_batches) if work.group is not None or not setup.barrier_free})
    return passes.run(own)


def _nothing() -> None:
    return None


def abandon_step(model: PreTrainedModel) -> None:
    """Clean up after an exception inside `backward_step`: weights are sharded again, host memory free, gradients gone.

    Every rank that raised calls it; none waits for another. An updater's own part of the step is for `Updater.discard`.
    """
    stage = stage_of(model)
    stage.weights.forget()
    stage.forget()
    model.zero_grad()
