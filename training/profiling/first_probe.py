"""The probe before a run's first step: where nobody measured this machine, an adaptive run's cost model is fitted to the run's own model.

Note: what it may not change. It runs backward passes of random tokens and throws the gradients away: no update, no random number of
training, no state. So a run with a probe is bit-equal to one without that happens to go by the same plans. An updater that works within
backward would move its moments: there the probe is left out. Its result is stored, in RUN_DIR/costs.json and in checkpoints, for
another probe would make other plans, and with them other last bits.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ...estimate.measured.profile import FittedDegree, Profile, attention_units, fit_of, least_squares, squares_s
from ...estimate.timing.update import update_time
from ...parallel.config import SequenceMode
from ...parallel.sequence.cost import CostModel, DegreeCost
from ...utils.atomic_files import write_cache
from ...utils.decode import set_aside
from ..micro_batches import EMPTY
from ..optimizers.config import Update
from ..run_settings import RunSettings
from ..step_planner import Costs, load_costs
from .probe import Probed, Prober, Sample, lengths_of

log = logging.getLogger(__name__)
COSTS_FILE = "costs.json"
SHAPES = ((64, 1), (16, 1), (4, 1), (2, 1), (1, 1))
"""(fraction of the longest sequence a group meets, number of such sequences); what is cheap for what it shows comes first."""
ENOUGH = 2
"""Shapes of every degree without which there is no fit: they tell what is linear in tokens from the constant."""
FIRST_PASS = 0.85
"""Of the time; the rest goes to the same shapes again, for the least time of each is the machine's."""
PASSES = 3
GOOD = 0.05
"""Mean relative error of a fit with which no further pass is made."""
SCATTER = 0.5
"""Mean relative error beyond which a fit is not used."""


def probe_before_training(
    config: RunSettings, built: Probed, costs: Costs, run_dir: Path, *, step: int, beat: Callable[[str], None]
) -> Costs:
    """`costs`; or, where they are assumed, those of an earlier attempt's probe or of one made now. Collective, alike on every rank.

    `step`: the one that follows, for people. `beat` is called with every sample. Where the probe shows nothing, `costs` with the reason.
    """
    if config.parallel.sequence is not SequenceMode.ADAPTIVE or config.parallel.probe_s == 0:
        return costs
    leads, world = built.topology.rank == 0, built.topology.world
    costs_at_hand = _of_rank_0(without_probe(costs, run_dir) if leads else None, world)
    if costs_at_hand is not None:
        return costs_at_hand
    if config.parallel.pipeline.stages > 1:
        return replace(costs, origin=f"{costs.origin}; not probed: a probe's micro-batch would go through all stages in turn")
    if config.optim.update is Update.BACKWARD:
        return replace(costs, origin=f"{costs.origin}; not probed: with optim.update=backward a probe would move the optimizer's states")
    measured = QuickProbe(config, built, beat).measure()
    probed = _of_rank_0(measured.applied(costs, step), world)
    assert probed is not None
    if leads:
        log.info("step times: %s", probed.origin)
        write_cache(run_dir / COSTS_FILE, json.dumps(probed.dump(), indent=1), log)
    return probed


def without_probe(costs: Costs, run_dir: Path) -> Costs | None:
    """The costs that need no probe: measured or stored costs, or those of an earlier attempt's probe with the same settings."""
    if not costs.is_assumed:
        return costs
    path = run_dir / COSTS_FILE
    if not path.exists():
        return None
    try:
        return load_costs(json.loads(path.read_text(encoding="utf-8")), costs.key, costs.fingerprint)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("%s", set_aside(path, f"{type(error).__name__}: {error}"))
        return None


def _of_rank_0(costs: Costs | None, world: dist.ProcessGroup) -> Costs | None:
    payload = [costs]
    dist.broadcast_object_list(payload, 0, group=world, device=torch.device("cpu"))
    return payload[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The result of a probe: a profile's figures, or why there are none."""

    degrees: tuple[FittedDegree, ...] = ()
    overhead_s: float = 0.0
    gather_s: float = 0.0
    empty_s: float = 0.0
    step_s: float = 0.0
    failure: str = ""

    def applied(self, costs: Costs, step: int) -> Costs:
        """`costs` with these figures in place of arithmetic; unchanged, with the reason, where there are none."""
        if self.failure:
            return replace(costs, origin=f"{costs.origin}; a probe before step {step} changed nothing: {self.failure}", is_assumed=False)
        profile = Profile(
            key=costs.key,
            degrees=self.degrees,
            overhead_s=self.overhead_s,
            gather_s=self.gather_s,
            empty_s=self.empty_s,
            step_s=self.step_s,
        )
        count, error = sum(row.fit.samples for row in self.degrees), max(row.fit.mean_error for row in self.degrees)
        origin = f"probed before step {step} ({count} samples; mean error of their fit up to {error:.0%})"
        return replace(costs, model=profile.refine(costs.model), overhead_s=self.overhead_s, origin=origin, is_assumed=False)


class QuickProbe:
    """Few shapes of every group size within parallel.probe_s. Collective: every rank makes the same samples."""

    def __init__(
        self, config: RunSettings, built: Probed, beat: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.prober, self._beat, self._clock = Prober(config, built), beat, clock
        self._budget_s, self._longest = config.parallel.probe_s, int(config.data.max_seq_len)

    def measure(self) -> Measured:
        """All of it."""
        prober, begun = self.prober, self._now()
        self._beat("probing empty micro-batches")
        prober.run([EMPTY])  # buffers, threads and kernels are new
        two_s = prober.run([EMPTY] * 2).wall_s
        samples = self._samples(begun)
        failure = too_few(samples, prober.cost, self._budget_s)
        if failure:
            return Measured(failure=failure)
        degrees, overhead_s = fit_few(samples, prober.cost)
        # One micro-batch and the reduction; two micro-batches and the reduction.
        one_s = statistics.median(sample.rest_s for sample in samples)
        each_s = min(max(0.0, two_s - one_s), one_s)
        reduce_s = one_s - each_s
        return Measured(
            degrees=degrees,
            overhead_s=overhead_s,
            gather_s=each_s,
            empty_s=each_s,
            # An update cannot be tried out on weights that are to be trained.
            step_s=reduce_s + update_time(prober.inputs).shown_s,
            failure=meaningless(degrees),
        )

    def _samples(self, begun: float) -> list[Sample]:
        """Each shape on each degree while the time lasts, by the pace of those before; then the quickest of them once more."""
        taken: list[tuple[float, DegreeCost, tuple[int, int], Sample]] = []
        last: dict[int, Sample] = {}
        ends = begun + FIRST_PASS * self._budget_s
        for shape in SHAPES:
            # The largest first: it holds the longest sequences, which tell most of attention.
            for cost in reversed(self.prober.cost.degrees):
                started = self._now()
                if cost.degree in last and started + expected_s(last[cost.degree], self._lengths(cost, shape), cost) > ends:
                    continue
                last[cost.degree] = sample = self._sample(cost, shape)
                taken.append((self._now() - started, cost, shape, sample))
        return self._repeated(sorted(taken, key=lambda row: row[0]), begun + self._budget_s)

    def _repeated(self, taken: Sequence[tuple[float, DegreeCost, tuple[int, int], Sample]], ends: float) -> list[Sample]:
        kept = [sample for *_, sample in taken]
        for _ in range(PASSES - 1):
            degrees, _ = fit_few(kept, self.prober.cost)
            # The fit of the same samples may differ in its last bits from one processor to another.
            if self.prober.agreed(max(row.fit.mean_error for row in degrees)) < GOOD:
                break
            for index, (took_s, cost, shape, _) in enumerate(taken):
                if self._now() + took_s <= ends:
                    kept[index] = kept[index].least(self._sample(cost, shape))
        return kept

    def _sample(self, cost: DegreeCost, shape: tuple[int, int]) -> Sample:
        self._beat(f"probing groups of {cost.degree}")
        return self.prober.sample(cost.degree, cost.ulysses, self._lengths(cost, shape))

    def _lengths(self, cost: DegreeCost, shape: tuple[int, int]) -> tuple[int, ...]:
        return lengths_of(shape, min(cost.degree * self.prober.cost.tokens_per_rank, self._longest))

    def _now(self) -> float:
        return self.prober.agreed(self._clock())


def fit_few(samples: Sequence[Sample], cost: CostModel) -> tuple[tuple[FittedDegree, ...], float]:
    """FittedDegrees and the constant seconds of a group, from samples too few and too short to fit each degree's attention.

    Multipliers of the arithmetic `cost`, by least squares on relative errors: one of attention for all degrees, one of what is linear in
    tokens for each. One made-up sample each holds them to the multiplier that suits all samples best: what no sample is long enough to
    show scales with the rest, and noise does not set degrees apart. Every degree has a sample.
    """
    count = len(cost.degrees)
    place = {row.degree: index for index, row in enumerate(cost.degrees)}
    rows, seconds, owner = [], [], []
    for sample in samples:
        index = place[sample.degree]
        modelled = cost.degrees[index]
        row = [0.0] * count + [float(attention_units(modelled, sample.lengths).sum()) * squares_s(modelled), 1.0]
        row[index] = sum(sample.lengths) * (modelled.linear_s + modelled.exchange_s)
        rows += [row] * len(sample.group_s)
        seconds += list(sample.group_s)
        owner += [sample.degree] * len(sample.group_s)
    overall, _ = least_squares([[sum(row[:-1]), 1.0] for row in rows], seconds)
    # Without a cost of tokens there is nothing to hold anything to: `meaningless` sees zeros.
    made_up = [[float(index == column) for column in range(count + 2)] for index in range(count + 1)] if overall > 0 else []
    *factors, overhead_s = least_squares(rows + made_up, seconds + [overall] * len(made_up))
    fitted = []
    local_s = factors[0] * (cost.degrees[0].linear_s + cost.degrees[0].exchange_s) * cost.degrees[0].degree
    for index, modelled in enumerate(cost.degrees):
        mine = [at for at, degree in enumerate(owner) if degree == modelled.degree]
        predicted = np.array(rows)[mine] @ np.array([*factors, overhead_s])
        linear_s = factors[index] * (modelled.linear_s + modelled.exchange_s)
        share = min(linear_s, local_s / modelled.degree)
        fitted.append(
            FittedDegree(
                degree=modelled.degree,
                ulysses=modelled.ulysses,
                attention_s=factors[count] * squares_s(modelled),
                linear_s=share,
                exchange_s=linear_s - share,
                fit=fit_of(predicted, np.array(seconds)[mine]),
            )
        )
    return tuple(fitted), overhead_s


def expected_s(sample: Sample, lengths: Sequence[int], cost: DegreeCost) -> float:
    """Wall seconds of a micro-batch of these lengths, by the pace of `sample`; too many where the constant had much part in that."""
    work, done = (float(cost.sequence_s(group).sum()) for group in (lengths, sample.lengths))
    return sample.rest_s + max(sample.group_s) * work / done


def too_few(samples: Sequence[Sample], cost: CostModel, budget_s: float) -> str:
    """Which group sizes have no fit, the time being too short for them; empty: all have one."""
    counts = {row.degree: sum(sample.degree == row.degree for sample in samples) for row in cost.degrees}
    short = [degree for degree, count in counts.items() if count < ENOUGH]
    sizes = ", ".join(map(str, short))
    return f"parallel.probe_s={budget_s:g} is too short for groups of {sizes} (efflaunch profile takes its time)" if short else ""


def meaningless(degrees: Sequence[FittedDegree]) -> str:
    """Why fits are not to be planned by; empty: they may be."""
    for row in degrees:
        if row.linear_s + row.exchange_s <= 0:
            return f"the times of groups of {row.degree} do not grow with their tokens: too much else runs here"
        if row.fit.mean_error > SCATTER:
            return f"the times of groups of {row.degree} are {row.fit.mean_error:.0%} off their fit: too much else runs here"
    return ""
