"""Evaluates: the forward passes of a corpus's windows on all ranks, with nothing kept for a backward. Executes plans, decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from ...model.chunked_loss import IGNORE, Head, chunked_hits, chunked_log_probs
from ...model.stage import Stage, stage_of
from ...parallel.sequence.plan import StepPlan
from ...parallel.topology import Topology
from ..data.source import DataSource
from ..forward_only import forward_only
from ..micro_batches import MicroBatchWork, read_step
from ..step_setup import StepSetup
from .corpus import EvalCorpus
from .needles import NeedleResult, NeedleSet, NeedleTally
from .results import CorpusResult
from .tally import Tally
from .windows import SHORT, WHOLE

ROOM_FOR_ALL = 1e6
"""Capacity factor at which no expert is ever full."""
Plan = Callable[[Sequence[int]], StepPlan]
"""From the lengths of some sequences to who computes which; the same on every rank."""


class Judged(Protocol):
    """What is evaluated: one rank's model and what runs it. A training session is one."""

    @property
    def device(self) -> torch.device: ...
    @property
    def topology(self) -> Topology: ...
    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def step_setup(self) -> StepSetup: ...


class Evaluator:
    """Evaluates corpora one after the other. Every rank calls it alike."""

    def __init__(self, judged: Judged, plan: Plan, *, batch_tokens: int, vocab_size: int, context_tokens: int) -> None:
        """`plan` for each step of about `batch_tokens`; `context_tokens` as eval.context_tokens."""
        self._judged, self._plan = judged, plan
        self._batch_tokens, self._vocab_size, self._context_tokens = batch_tokens, vocab_size, context_tokens

    def corpus(self, corpus: EvalCorpus, go_on: Callable[[int, int], bool]) -> CorpusResult | None:
        """All passes over a corpus; None where `go_on` said no. Collective.

        `go_on(tokens done, tokens in all)` is asked after each step but the last, and answers alike on every rank.
        """
        total = sum(windows.num_tokens for windows in corpus.passes.values())
        tallies: dict[str | int, Tally] = {}
        done = 0
        for key in corpus.passes:
            source = corpus.source(key, self._batch_tokens, self._vocab_size)
            tally = tallies[key] = Tally(self._context_tokens if key == WHOLE else None)
            for step in range(source.num_steps):
                lengths = source.lengths(step)
                add_step(self._judged, source, step, self._plan(lengths), tally)
                done += sum(lengths)
                if done < total and not go_on(done, total):
                    return None
            agree(tally, self._judged)
        lengths_of = {key: tally for key, tally in tallies.items() if isinstance(key, int)}
        return CorpusResult(
            corpus=corpus.name,
            whole=tallies[WHOLE],
            short=tallies.get(SHORT),
            lengths=lengths_of,
            context_tokens=self._context_tokens,
            tokens=total,
        )

    def needles(self, needles: NeedleSet, go_on: Callable[[int, int], bool]) -> NeedleResult | None:
        """All texts of eval.needles; None where `go_on` said no, as of `corpus`. Collective."""
        source = needles.source(self._batch_tokens, self._vocab_size)
        tally, total, done = NeedleTally(len(needles.cells)), int(needles.corpus.lengths.sum()), 0
        for step in range(source.num_steps):
            lengths = source.lengths(step)
            add_needle_step(self._judged, source, step, self._plan(lengths), tally)
            done += sum(lengths)
            if done < total and not go_on(done, total):
                return None
        agree(tally, self._judged)
        return NeedleResult(needles.cells, tally, total)


def add_step(judged: Judged, source: DataSource, step: int, plan: StepPlan, tally: Tally) -> None:
    """Add this rank's targets of a step to `tally`: on ranks of the last stage, which alone know their log-probabilities. Collective."""
    for work, values in _scored(judged, source, step, plan, chunked_log_probs):
        tally.add(values, work.shard.position_ids, work.shard.target_ids != IGNORE)


def add_needle_step(judged: Judged, source: DataSource, step: int, plan: StepPlan, tally: NeedleTally) -> None:
    """As `add_step`, for texts with answers."""
    for work, values in _scored(judged, source, step, plan, chunked_hits):
        counts = work.shard.target_ids != IGNORE
        texts = work.shard.by_row(lambda part: source.sequence(step, part.sequence).document)
        tally.add(texts[counts], values[counts, 0], values[counts, 1])


def _scored(
    judged: Judged, source: DataSource, step: int, plan: StepPlan, objective: Callable[[Head], Tensor]
) -> list[tuple[MicroBatchWork, np.ndarray]]:
    """Each micro-batch of this rank with what `objective` gives of its rows, float64; nothing where another stage is the last."""
    topology, stage = judged.topology, stage_of(judged.model)
    works = read_step(source, step, plan, topology.stage_rank, shares_experts=topology.shares_experts)
    with _nothing_dropped(stage):
        scored = forward_only(judged.step_setup, works, lambda work: objective)
    # Training's steps count for themselves.
    stage.expert_load.clear()
    stage.router_losses.take()
    return [(work, np.asarray(values.double().cpu().numpy())) for work, values in scored]


@contextmanager
def _nothing_dropped(stage: Stage) -> Iterator[None]:
    """Give experts room for every row: what is judged is the model as it is used, whatever training drops."""
    capacity = stage.capacity
    if capacity is None:
        yield
        return
    factor, capacity.factor = capacity.factor, ROOM_FOR_ALL
    try:
        yield
    finally:
        capacity.factor = factor


def agree(tally: Tally | NeedleTally, judged: Judged) -> None:
    """Make `tally` that of all ranks: summed in their order, so bit-equal on each. Collective over all ranks.

    Those of earlier stages add zeros, which change no sum.
    """
    ranks = judged.topology.world
    mine = torch.from_numpy(tally.vector()).to(judged.device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(ranks))]
    dist.all_gather(rows, mine, group=ranks)
    total = torch.zeros_like(mine)
    for row in rows:
        total += row
    tally.load(total.cpu().numpy())
