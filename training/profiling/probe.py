"""Probes on the real ranks: what micro-batches and collectives take here, fitted to a Profile (estimate/measured/profile.py).

Note: what is probed. Whole micro-batches of the real, sharded model: for every group degree, all groups of that degree at once
hold the same lengths, short ones and long ones, one or several. Busy time inside the groups is fitted to attention, linear and
constant terms; what is left of the wall time is gathers of weights. Nothing is extrapolated from a kernel to a layer, and ranks
that share a processor or a link disturb each other as they will in training.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ...errors import ConfigError
from ...estimate.ledger import Ledger
from ...estimate.measured.profile import (
    DEFAULT_FILE,
    Fit,
    FittedDegree,
    Profile,
    attention_units,
    fit_of,
    least_squares,
    profile_key,
    save_profile,
)
from ...estimate.timing.sequence import cost_model_of
from ...model.build import position_of
from ...model.spec import model_spec
from ...parallel.layout import solve_layout
from ...parallel.sequence.attention import BlockKernel
from ...parallel.sequence.clock import BusyClock
from ...parallel.sequence.cost import CostModel
from ...parallel.sequence.plan import Group, MicroBatch, StepPlan
from ...parallel.sharding.engine import FSDP2
from ...parallel.topology import Topology
from ...utils.heartbeat import Heartbeat
from ..agreed_ledger import agreed_ledger
from ..agreed_order import take_planned_order
from ..engines import builder_of
from ..make_groups import make_groups
from ..micro_batches import EMPTY, MicroBatchWork, read_step
from ..objectives.heads import LanguageModelling
from ..optimizers.room import check_update_memory
from ..optimizers.updater import Updater
from ..run_settings import RunSettings
from ..session import host_store, joined_ranks, rank_kernel, step_setup
from ..step import backward_step
from ..step_planner import this_hardware
from .collectives import probe_collectives
from .node_rates import measure_rates

log = logging.getLogger(__name__)
PRELOAD = FSDP2.preload
REQUEST_FILE = "probe.json"
RATES_SHARE = 0.15
"""Of the time, for links, disk and updates."""
REPEATS = 3
EXTRA_PASSES = 3
"""Further passes at most, where a busy machine hid the cost of tokens."""
SHAPES = ((16, 1), (4, 1), (16, 8), (1, 1), (64, 8), (2, 1), (8, 4), (8, 1), (4, 3))
"""(one sequence's fraction of a group's capacity, number of such sequences); what shows most comes first."""
LEAST_SHAPES = 4
"""Shapes that are always probed: there are two coefficients and a constant."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One group size and one set of lengths, the same in every group."""

    degree: int
    ulysses: int
    lengths: tuple[int, ...]
    group_s: tuple[float, ...]
    """Busy seconds of each group of the world; the least of the repeats, for what disturbs one of them is not the machine's."""
    rest_s: float
    """Wall seconds of the micro-batch and its reduction beyond the busiest group."""

    def least(self, other: Sample) -> Sample:
        """The same sample, each time the lesser of both."""
        pairs = zip(self.group_s, other.group_s, strict=True)
        return replace(self, group_s=tuple(min(pair) for pair in pairs), rest_s=min(self.rest_s, other.rest_s))


@dataclass(frozen=True, slots=True)
class Run:
    """One step's gradients: wall seconds of the slowest rank, `busy_s[rank][micro_batch]`, and the loss."""

    wall_s: float
    busy_s: list[list[float]]
    loss: float


def probe(config: RunSettings, run_dir: Path, stop: object, pulse: Heartbeat) -> int:
    """Write the profile of this machine and model to RUN_DIR/profile.yaml. Collective over the ranks the agent started."""
    request = json.loads((run_dir / REQUEST_FILE).read_text())
    with joined_ranks(config.cluster, config.parallel.collective_timeout_s) as device:
        prober = Prober.of(config, device)
        position_of(prober.model).listener = pulse.at
        profile = prober.profile(float(request["seconds"]))
        if prober.topology.rank == 0:
            save_profile(run_dir / DEFAULT_FILE, profile)
    return 0


class Probed(Protocol):
    """What is probed: one rank's built model and what runs it. A training session is one."""

    @property
    def device(self) -> torch.device: ...
    @property
    def topology(self) -> Topology: ...
    @property
    def ledger(self) -> Ledger: ...
    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def updater(self) -> Updater: ...
    @property
    def kernel(self) -> BlockKernel: ...


@dataclass(frozen=True, slots=True)
class Built:
    """A model built to be probed, and for nothing else."""

    device: torch.device
    topology: Topology
    ledger: Ledger
    model: PreTrainedModel
    updater: Updater
    kernel: BlockKernel


class Prober:
    """The real model of a configuration, and documents of any lengths."""

    def __init__(self, config: RunSettings, built: Probed) -> None:
        self.config, self.device, self.topology = config, built.device, built.topology
        self.model, self.updater, self.inputs = built.model, built.updater, built.ledger.inputs
        self.spec = self.inputs.spec
        # Barriers stay: what is fitted are micro-batches that all ranks run together.
        inputs = replace(self.inputs, parallel=replace(self.inputs.parallel, barrier_free=False))
        self.setup = step_setup(self.model, self.topology, inputs, self.device, built.kernel)
        self.cost: CostModel = cost_model_of(self.inputs)

    @classmethod
    def of(cls, config: RunSettings, device: torch.device) -> Self:
        """One with a model of its own, its weights random. Collective."""
        parallel, data = config.parallel, config.data
        layout = solve_layout(
            parallel, config.cluster, model_spec(config.model), max_seq_len=data.max_seq_len, global_batch_tokens=data.global_batch_tokens
        )
        kernel, _ = rank_kernel(config, layout, device)
        topology = make_groups(config, layout, device, every_degree=True)
        ledger = agreed_ledger(config, device)
        check_update_memory(ledger.on_host)
        store = host_store(ledger, device)
        build, policy = builder_of(config), ledger.inputs.policy
        trained = build(config, policy, topology.mesh, device, store, load=False, expert_mesh=topology.experts)
        take_planned_order(trained.model, ledger.inputs, topology)
        return cls(config, Built(device, topology, ledger, trained.model, trained.updater, kernel))

    def profile(self, seconds: float) -> Profile:
        """All probes, in about `seconds` beyond the shortest of each kind."""
        config = self.config
        # First, while the device is all but empty.
        rates = measure_rates(self.device, config.cluster.ranks_per_node, config.memory.offload_dir, RATES_SHARE * seconds)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.run([EMPTY])
        empty_s, reduce_s = self._empty()
        samples = self._samples(seconds)
        collectives = probe_collectives(self.topology, self.device, [cost.degree for cost in self.cost.degrees if cost.degree > 1])
        degrees, overhead_s = fit_degrees(samples, self.cost)
        for _ in range(EXTRA_PASSES):
            if all(_grows(row) for row in degrees):
                break
            samples = self._repeated(samples)
            degrees, overhead_s = fit_degrees(samples, self.cost)
        _check_fit(degrees)
        return Profile(
            key=profile_key(self.spec, config.memory, config.train, config.cluster, this_hardware(self.device)),
            degrees=degrees,
            overhead_s=overhead_s,
            gather_s=max(0.0, statistics.median(sample.rest_s for sample in samples) - reduce_s),
            empty_s=empty_s,
            reduce_s=reduce_s,
            step_s=reduce_s + self._optimizer_s(),
            collectives=collectives,
            taken=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            rates=rates,
        )

    def _empty(self) -> tuple[float, float]:
        """Seconds of a micro-batch without tokens, and of the reduction at the end of a step."""
        one, three = (min(self.run([EMPTY] * count).wall_s for _ in range(REPEATS)) for count in (1, 3))
        each = max(0.0, (three - one) / 2)
        return each, max(0.0, one - each)

    def _samples(self, seconds: float) -> list[Sample]:
        """Every shape on every degree, short ones first, as far as a first pass gets in its share of the time; then all of them once more.

        Degrees take turns and passes are apart in time, so that a slow moment of the machine hits all degrees, and few samples twice.
        """
        kept, ends = [], self.agreed(time.monotonic()) + seconds / REPEATS
        pace: dict[int, float] = {}
        for index, shape in enumerate(SHAPES):
            for cost in self.cost.degrees:
                lengths = lengths_of(shape, cost.degree * self.cost.tokens_per_rank)
                work = float(cost.sequence_s(lengths).sum())
                if index >= LEAST_SHAPES and self.agreed(time.monotonic()) + pace[cost.degree] * work > ends:
                    continue
                begun = time.monotonic()
                kept.append(self.sample(cost.degree, cost.ulysses, lengths))
                pace[cost.degree] = self.agreed((time.monotonic() - begun) / work)
        for _ in range(REPEATS - 1):
            kept = self._repeated(kept)
        return kept

    def _repeated(self, samples: Sequence[Sample]) -> list[Sample]:
        """Another pass over the same shapes, each time the lesser of both."""
        return [sample.least(self.sample(sample.degree, sample.ulysses, sample.lengths)) for sample in samples]

    def sample(self, degree: int, ulysses: int, lengths: tuple[int, ...]) -> Sample:
        """One micro-batch of random tokens, in which every group of that degree holds sequences of these lengths. Collective."""
        world, count = self.topology.stage_size, len(lengths)
        firsts = range(0, world - degree + 1, degree)
        groups = tuple(
            Group(first, degree, ulysses, tuple(range(index * count, (index + 1) * count))) for index, first in enumerate(firsts)
        )
        plan = StepPlan(world, lengths * len(groups), (MicroBatch(groups),))
        documents, topology = _Documents(plan.lengths, self.spec.vocab_size), self.topology
        works = read_step(documents, 0, plan, topology.stage_rank, shares_experts=topology.shares_experts)  # type: ignore[arg-type]
        run = self.run(works)
        busy = tuple(max(run.busy_s[rank][0] for rank in range(group.first_rank, group.first_rank + degree)) for group in groups)
        return Sample(degree, ulysses, lengths, busy, run.wall_s - max(busy))

    def run(self, works: Sequence[MicroBatchWork], num_targets: int | None = None) -> Run:
        """One step's gradients, thrown away. Collective."""
        clocks = [BusyClock(self.device) for _ in works]
        dist.barrier(group=self.topology.world)
        self._synchronize()
        begun = time.perf_counter()
        shares = self._backward(works, clocks, num_targets)
        self._synchronize()
        wall_s = self.agreed(time.perf_counter() - begun)
        self.updater.discard()
        mine = torch.tensor([float(shares.sum()), *(clock.seconds() for clock in clocks)], dtype=torch.float64)
        table = [torch.zeros_like(mine) for _ in range(self.topology.world_size)]
        dist.all_gather(table, mine, group=self.topology.world)
        losses, *_ = rows = torch.stack(table).T.tolist()
        return Run(wall_s, [list(times) for times in zip(*rows[1:], strict=True)], sum(losses))

    def _backward(
        self, works: Sequence[MicroBatchWork], clocks: Sequence[BusyClock] | None, num_targets: int | None = None
    ) -> torch.Tensor:
        # A rate of zero: where layers are updated in backward, that takes its time and changes no weight.
        self.updater.start(0.0, lambda: None)
        objective = LanguageModelling(num_targets or max(1, sum(work.shard.num_tokens for work in works)), self.device)
        return backward_step(self.setup, works, objective, clocks=clocks, on_last=self.updater.before_final_backward)

    def _optimizer_s(self) -> float:
        """From the end of backward to the new weights, on gradients of zero."""
        seconds = []
        for _ in range(REPEATS + 1):
            self._backward([EMPTY], None)
            self._synchronize()
            dist.barrier(group=self.topology.world)
            begun = time.perf_counter()
            if not self.updater.measures_first:
                self.updater.finish()
            self.updater.apply()
            self._synchronize()
            seconds.append(self.agreed(time.perf_counter() - begun))
        return statistics.median(seconds[1:])

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def agreed(self, value: float) -> float:
        """Collective. The largest of all ranks: decisions must be the same everywhere."""
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.topology.world)
        return float(largest)


class _Documents:
    """Random tokens; a DataSource as far as read_step looks."""

    def __init__(self, lengths: tuple[int, ...], vocab_size: int) -> None:
        self._lengths, self._vocab_size = lengths, vocab_size

    def lengths(self, step: int) -> tuple[int, ...]:
        return self._lengths

    def parts(self, step: int, index: int) -> tuple[int, ...]:
        return (self._lengths[index],)

    def tokens(self, step: int, index: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.random.default_rng(index).integers(0, self._vocab_size, stop - start)
        return ids, ids


def lengths_of(shape: tuple[int, int], capacity: int) -> tuple[int, ...]:
    """The sequences of a shape (see SHAPES) in a group that holds `capacity` tokens."""
    fraction, count = shape
    return (max(1, capacity // fraction),) * count


def _grows(row: FittedDegree) -> bool:
    """Whether tokens cost anything by this fit."""
    return row.attention_s + row.linear_s + row.exchange_s > 0


def _check_fit(degrees: Sequence[FittedDegree]) -> None:
    """ConfigError where noise or overhead hid the cost of tokens: plans by such a profile would mean nothing."""
    for row in degrees:
        if not _grows(row):
            raise ConfigError(
                "efflaunch profile",
                found=f"times of groups of {row.degree} ranks that do not grow with their tokens (r2 {row.fit.r2:.2f})",
                expected="longer sequences to take longer",
                hint="a quieter machine, more --seconds, or a larger data.max_seq_len and parallel.tokens_per_rank",
            )


def fit_degrees(samples: Sequence[Sample], cost: CostModel) -> tuple[tuple[FittedDegree, ...], float]:
    """Attention and linear seconds of each degree and one constant for all, by least squares on relative errors."""
    modelled = {row.degree: row for row in cost.degrees}
    present = [row.degree for row in cost.degrees if any(sample.degree == row.degree for sample in samples)]
    rows, seconds, owner = [], [], []
    for sample in samples:
        units = float(attention_units(modelled[sample.degree], sample.lengths).sum())
        row = [0.0] * (2 * len(present)) + [1.0]
        row[2 * present.index(sample.degree)], row[2 * present.index(sample.degree) + 1] = units, float(sum(sample.lengths))
        rows += [row] * len(sample.group_s)
        seconds += list(sample.group_s)
        owner += [sample.degree] * len(sample.group_s)
    solution = least_squares(rows, seconds)
    predicted = np.array(rows) @ np.array(solution)
    fits: dict[int, Fit] = {}
    for degree in present:
        mine = [index for index, name in enumerate(owner) if name == degree]
        fits[degree] = fit_of(predicted[mine], np.array(seconds)[mine])
    local = solution[1] * present[0]
    degrees = []
    for index, degree in enumerate(present):
        attention, linear = solution[2 * index], solution[2 * index + 1]
        share = min(linear, local / degree)
        degrees.append(
            FittedDegree(
                degree=degree,
                ulysses=modelled[degree].ulysses,
                attention_s=attention,
                linear_s=share,
                exchange_s=linear - share,
                fit=fits[degree],
            )
        )
    return tuple(degrees), solution[-1]
