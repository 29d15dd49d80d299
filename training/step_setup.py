"""Settings that all steps of a rank have in common, and what follows from them for one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..parallel.pipeline.config import PipelineOrder
from ..parallel.pipeline.pipeline_plan import PipelineAction
from ..parallel.pipeline.place import StagePlace
from ..parallel.pipeline.plan import Schedule, barrier_free, single_stage
from ..parallel.pipeline.step_actions import step_actions
from ..parallel.sequence.attention import BlockKernel
from ..parallel.sequence.clock import BusyClock
from ..parallel.sequence.runtime import SequenceAttention, sequence_attention
from ..parallel.topology import Topology
from .micro_batches import MicroBatchWork


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSetup:
    """Settings that all steps of a rank have in common."""

    model: PreTrainedModel
    topology: Topology
    kernel: BlockKernel
    device: torch.device
    reduce_each: bool
    """Gradients are reduced after every micro-batch (least memory), else once at the end."""
    barrier_free: bool = False
    """Ranks of different groups do not wait for each other within the step; a rank passes over micro-batches without its groups."""
    order: PipelineOrder = PipelineOrder.ONE_F_ONE_B
    """Of the passes of several stages."""
    gpipe_in_flight: int = 1
    """With `gpipe`: micro-batches that go forward before the first goes backward."""

    def attention(self, work: MicroBatchWork, clock: BusyClock) -> SequenceAttention:
        """Attention of the rank's group in one micro-batch."""
        return sequence_attention(self.topology, self.kernel, work.group, work.layout, clock, work.rank_tokens)

    def schedule(self, micro_batches: Sequence[MicroBatchWork]) -> Schedule:
        """The schedule of this rank's step of `micro_batches`, where one stage is all of the model."""
        if self.barrier_free:
            return barrier_free(index for index, work in enumerate(micro_batches) if work.group is not None)
        return single_stage(len(micro_batches), reduce_each=self.reduce_each)

    def actions(self, place: StagePlace, num_micro_batches: int) -> tuple[PipelineAction, ...]:
        """What this rank of a pipeline does in a step of so many micro-batches."""
        if not num_micro_batches:
            return ()
        virtual = len(place.layers)
        return step_actions(self.order, place.num_ranks, virtual, num_micro_batches, self.gpipe_in_flight)[place.index]
