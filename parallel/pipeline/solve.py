"""Searches for the fastest of partition x schedule x virtual stages x slices x what each stage recomputes, by simulation. Pure.

Every candidate is a published schedule; its partition and recomputation come from partition.py, under the memory of what the schedule
has in flight; then it is simulated with each unit's own costs. What cannot be faster than the best one so far, for its busiest rank or
its slowest slice alone takes as long, is not simulated. Where micro-batches are unequal, an order made for them is tried with the best
one's stages. The result states a lower bound and the gap to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import PlanError
from .generators import gpipe, one_f_one_b, sliced_1f1b, zero_bubble
from .list_schedule import list_schedule
from .partition import GIB, Partition, StageLimits, balanced, least_share, partition
from .pipeline_bound import lower_bound_s
from .pipeline_plan import PipelineSchedule, UnitKind
from .simulate import PipelineCosts, PipelineTimeline, Simulator
from .slices import slice_work
from .virtual_stages import dual_pipe_v, interleaved, zbv
from .work import Batch, ModelLoad, Recompute, unit_costs

Sizes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineProblem:
    """What a schedule is sought for, and among which."""

    model: ModelLoad
    batch: Batch
    ranks: int
    cap_bytes: tuple[float, ...]
    """Of each pipeline rank."""
    alpha_s: float = 0.0
    s_per_byte: float = 0.0
    virtual_stages: tuple[int, ...] = (1, 2)
    slices: tuple[int, ...] = (1, 2, 4)
    recompute: tuple[Recompute, ...] = tuple(Recompute)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule before its stages are cut."""

    name: str
    virtual_stages: int
    slices: int
    make: Callable[[], PipelineSchedule]

    def __str__(self) -> str:
        words = [self.name, f"{self.virtual_stages} stages a rank" * (self.virtual_stages > 1), f"{self.slices} slices" * (self.slices > 1)]
        return ", ".join(filter(None, words))


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What became of a candidate."""

    candidate: Candidate
    partition: Partition | None = None
    timeline: PipelineTimeline | None = None
    """None: it was not simulated, `reason` says why."""
    reason: str = ""
    share: float = 0.0
    """Of the memory there is, what it needs at least: above 1 where it does not fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineChoice:
    """The fastest schedule that fits, and all that was tried."""

    candidate: Candidate
    partition: Partition
    sizes: tuple[tuple[int, ...], ...]
    """Tokens of the slices of each micro-batch."""
    timeline: PipelineTimeline
    lower_bound_s: float
    """No schedule of the problem is faster, whatever its partition."""
    trials: tuple[Trial, ...]

    @property
    def gap(self) -> float:
        """How much slower than the bound, as a share of it: the fastest there is lies between."""
        return self.timeline.step_s / self.lower_bound_s - 1

    def describe(self) -> str:
        """The choice in two lines of words."""
        shares = self.timeline.bubble_shares
        ways = ",".join(way.value for way in self.partition.recompute)
        return (
            f"{self.candidate}: {self.timeline.step_s:.3f} s a step, {self.gap:.1%} above the lower bound of {self.lower_bound_s:.3f} s\n"
            f"layers {self.partition}; recomputed: {ways}; idle {min(shares):.1%} to {max(shares):.1%}; "
            f"peak {max(self.timeline.peak_bytes) / GIB:.1f} GiB"
        )


def solve(problem: PipelineProblem) -> PipelineChoice:
    """The best candidate. PlanError where none fits: it names the one that comes nearest and what stands in the way."""
    _check(problem)
    best: Trial | None = None
    trials = []
    sizes: dict[int, Sizes] = {}
    for candidate in candidates(problem):
        if candidate.slices not in sizes:
            sizes[candidate.slices] = problem.batch.sizes(problem.model, candidate.slices)
        limit = best.timeline.step_s if best and best.timeline else float("inf")
        trial = try_candidate(problem, candidate, limit, sizes[candidate.slices])
        trials.append(trial)
        if trial.timeline is not None and (best is None or best.timeline is None or trial.timeline.step_s < best.timeline.step_s):
            best = trial
    if best is not None and len(set(problem.batch.micro_batches)) > 1:
        for trial in _list_orders(problem, best, sizes[best.candidate.slices]):
            trials.append(trial)
            assert best.timeline is not None
            if trial.timeline is not None and trial.timeline.step_s < best.timeline.step_s:
                best = trial
    if best is None or best.timeline is None or best.partition is None:
        nearest = min(trials, key=lambda trial: trial.share)
        found = f"none of {len(trials)} schedules that fits; nearest is {nearest.candidate}: {nearest.reason}"
        hint = "smaller micro-batches, more ranks, more slices"
        raise PlanError("search for a pipeline", found=found, expected="one within memory", hint=hint)
    return PipelineChoice(
        candidate=best.candidate,
        partition=best.partition,
        sizes=sizes[best.candidate.slices],
        timeline=best.timeline,
        lower_bound_s=lower_bound_s(problem.model, problem.batch, problem.ranks, list(sizes.values())),
        trials=tuple(trials),
    )


def _check(problem: PipelineProblem) -> None:
    short = min((sum(documents) for documents in problem.batch.micro_batches), default=0)
    layers = len(problem.model.layers)
    if not 1 <= problem.ranks <= layers or len(problem.cap_bytes) != problem.ranks or short < 1:
        found = f"{problem.ranks} ranks with {len(problem.cap_bytes)} caps, {layers} layers, shortest micro-batch {short} tokens"
        expected = "as many ranks as layers at most, a cap for each, and tokens in every micro-batch"
        raise PlanError("search for a pipeline", found=found, expected=expected, hint="fewer pipeline ranks")


def candidates(problem: PipelineProblem) -> Iterator[Candidate]:
    """Schedules there are stages and tokens for. Those first that are often the fastest: the others are then left out sooner."""
    ranks, batches = problem.ranks, len(problem.batch.micro_batches)
    most = len(problem.model.layers) // ranks
    shortest = min(sum(documents) for documents in problem.batch.micro_batches)
    for slices in sorted(problem.slices, reverse=True):
        for virtual in problem.virtual_stages:
            if virtual > most or slices > shortest or (virtual, slices) == (1, 1):
                continue
            name = "interleaved" if slices == 1 else "sliced_1f1b" if virtual == 1 else "sliced interleaved"
            yield Candidate(name, virtual, slices, _interleaved(ranks, batches, virtual, slices))
    if most >= 2 and 2 in problem.virtual_stages:
        yield Candidate("zbv", 2, 1, lambda: zbv(ranks, batches))
        yield Candidate("dual_pipe_v", 2, 1, lambda: dual_pipe_v(ranks, batches))
    yield Candidate("zero_bubble", 1, 1, lambda: zero_bubble(ranks, batches))
    yield Candidate("1f1b", 1, 1, lambda: one_f_one_b(ranks, batches))
    yield Candidate("gpipe", 1, 1, lambda: gpipe(ranks, batches))


def _interleaved(ranks: int, batches: int, virtual: int, slices: int) -> Callable[[], PipelineSchedule]:
    if virtual == 1:
        return lambda: sliced_1f1b(ranks, batches, slices)
    return lambda: interleaved(ranks, batches, virtual, slices)


def _list_orders(problem: PipelineProblem, best: Trial, sizes: Sizes) -> Iterator[Trial]:
    """Orders made for unequal micro-batches, with the stages, slices and partition of the best published one."""
    if best.timeline is None or best.partition is None:
        return
    owners, costs = best.timeline.schedule.stage_ranks, _costs(problem, best.partition, sizes)
    # Gradients of weights that wait need what was recomputed for those of inputs: more than was let in.
    for split in (False, True) if set(best.partition.recompute) == {Recompute.NONE} else (False,):
        name = f"list order{', weights apart' * split}, from {best.candidate.name}"
        try:
            schedule = list_schedule(owners, costs, problem.cap_bytes, split=split)
        except PlanError as error:
            candidate = replace(best.candidate, name=name)
            yield Trial(candidate=candidate, partition=best.partition, reason=error.found)
            continue
        candidate = Candidate(name, best.candidate.virtual_stages, best.candidate.slices, _made(schedule))
        simulator = Simulator(schedule)
        share = max(peak / cap for peak, cap in zip(simulator.peak_bytes(costs), problem.cap_bytes, strict=True))
        timeline = simulator.run(costs) if share <= 1.0 else None
        reason = "" if timeline else f"{share:.2f} of a rank's memory"
        yield Trial(candidate=candidate, partition=best.partition, timeline=timeline, reason=reason, share=share)


def _made(schedule: PipelineSchedule) -> Callable[[], PipelineSchedule]:
    return lambda: schedule


def try_candidate(problem: PipelineProblem, candidate: Candidate, faster_than_s: float = float("inf"), sizes: Sizes | None = None) -> Trial:
    """Cut a candidate's stages within memory and simulate it, unless one rank or one slice alone takes `faster_than_s`.

    `sizes`: tokens of the slices of each micro-batch, where they are known.
    """
    schedule = candidate.make()
    simulator: Simulator | None = None
    sizes = sizes or problem.batch.sizes(problem.model, candidate.slices)
    reason, share = "no cap leaves room beside weights", float("inf")
    for limits in _limits(problem, schedule, sizes):
        try:
            cut = _cut(problem, schedule, limits)
        except PlanError as error:
            reason, share = error.found, least_share(problem.model, schedule.num_stages, **_means(problem), limits=limits)
            continue
        costs = _costs(problem, cut, sizes)
        # Recomputation makes no slice's way shorter: what is too slow without it is too slow.
        way = float((costs.forward_s + costs.backward_s).sum(axis=0).max())
        if way >= faster_than_s:
            return Trial(candidate=candidate, partition=cut, reason=f"its slowest slice's way alone takes {way:.3f} s")
        simulator = simulator or Simulator(schedule)
        peaks = simulator.peak_bytes(costs)
        rank = max(range(problem.ranks), key=lambda rank: peaks[rank] / problem.cap_bytes[rank])
        if peaks[rank] > problem.cap_bytes[rank]:
            share = peaks[rank] / problem.cap_bytes[rank]
            reason = f"{peaks[rank] / GIB:.2f} GiB on rank {rank} of {problem.cap_bytes[rank] / GIB:.2f} with layers {cut}"
            continue
        busy = max(simulator.busy_s(costs))
        if busy >= faster_than_s:
            return Trial(candidate=candidate, partition=cut, reason=f"its busiest rank alone takes {busy:.3f} s")
        return Trial(candidate=candidate, partition=cut, timeline=simulator.run(costs))
    return Trial(candidate=candidate, reason=reason, share=share)


def _costs(problem: PipelineProblem, cut: Partition, sizes: Sequence[Sequence[int]]) -> PipelineCosts:
    links = {"alpha_s": problem.alpha_s, "s_per_byte": problem.s_per_byte}
    return unit_costs(problem.model, problem.batch, cut.counts, sizes, cut.recompute, **links)


def _cut(problem: PipelineProblem, schedule: PipelineSchedule, limits: StageLimits | None) -> Partition:
    """The best partition for the mean micro-batch; without limits nothing is recomputed."""
    means = _means(problem)
    cut = partition(problem.model, schedule.num_stages, **means, limits=limits)
    if schedule.num_stages == schedule.num_ranks:
        return cut
    return balanced(problem.model, cut, schedule.stage_ranks, **means, limits=limits)


def _means(problem: PipelineProblem) -> dict[str, Any]:
    """What a partition is made for: the mean micro-batch, and ways to recompute."""
    batches = problem.batch.micro_batches
    pairs = sum(slice_work(documents, [sum(documents)], 0.0, 1.0)[0] for documents in batches) / len(batches)
    return {"tokens": sum(map(sum, batches)) / len(batches), "pairs": pairs, "recompute": problem.recompute}


def _limits(problem: PipelineProblem, schedule: PipelineSchedule, sizes: Sequence[Sequence[int]]) -> Iterator[StageLimits | None]:
    """None at first. Then caps: a rank's goes to its stages by the tokens that each has in flight.

    Stages of a rank hold most at different times, so the rank's peak is shared out before the sum of theirs is.
    What is simulated decides whether memory suffices.
    """
    yield None
    loads = (*problem.model.layers, problem.model.embedding, problem.model.head)
    fixed = sum(one.fixed_bytes for one in loads) / schedule.num_stages
    peaks = peak_tokens(schedule, sizes)
    several = schedule.num_stages > schedule.num_ranks
    # Whether stages of a rank are at their peaks at one time; whether gradients of weights wait while most inputs do.
    for together, deferred in ((False, False), (False, True), (True, True)):
        if (several or together) and (deferred or schedule.split or several):
            caps, shares = _caps(problem, schedule, peaks, fixed, together)
            if min(caps) > 0:
                yield StageLimits(
                    unit_tokens=max(max(row) for row in sizes),
                    waiting_tokens=_products(peaks.waiting, shares),
                    held_tokens=_products(peaks.held, shares),
                    deferred_tokens=_products(peaks.deferred, shares if deferred else [0.0] * len(shares)),
                    cap_bytes=tuple(caps),
                )


def _caps(
    problem: PipelineProblem, schedule: PipelineSchedule, peaks: PeakTokens, fixed: float, together: bool
) -> tuple[list[float], list[float]]:
    """Of each stage, its part of the rank's cap, and the share of its peak that counts."""
    caps, shares = [0.0] * schedule.num_stages, [1.0] * schedule.num_stages
    for rank in range(schedule.num_ranks):
        own = schedule.stages_of(rank)
        total = sum(peaks.waiting[stage] for stage in own)
        for stage in own:
            caps[stage] = fixed + max(0.0, problem.cap_bytes[rank] - len(own) * fixed) * peaks.waiting[stage] / total
            shares[stage] = 1.0 if together else peaks.of_ranks[rank] / total
    return caps, shares


def _products(values: Sequence[float], shares: Sequence[float]) -> tuple[float, ...]:
    return tuple(value * share for value, share in zip(values, shares, strict=True))


@dataclass(frozen=True, slots=True)
class PeakTokens:
    """Tokens that wait at one time, at most: of each virtual stage, as in StageLimits, and of each rank."""

    waiting: list[float]
    held: list[float]
    deferred: list[float]
    of_ranks: list[float]
    """As `waiting`."""


def peak_tokens(schedule: PipelineSchedule, sizes: Sequence[Sequence[int]]) -> PeakTokens:
    """What the orders of a schedule come to. `sizes`: tokens of each micro-batch's slices."""
    stages, split = schedule.num_stages, schedule.split
    peaks = PeakTokens([0.0] * stages, [0.0] * stages, [0.0] * stages, [0.0] * schedule.num_ranks)
    for rank, order in enumerate(schedule.orders):
        held, deferred = dict.fromkeys(schedule.stages_of(rank), 0), dict.fromkeys(schedule.stages_of(rank), 0)
        total = 0
        for unit in order:
            stage, tokens = unit.stage, sizes[unit.micro_batch][unit.slice]
            if unit.kind is UnitKind.FORWARD:
                held[stage] += tokens
                total += tokens
                peaks.held[stage] = max(peaks.held[stage], held[stage])
                peaks.waiting[stage] = max(peaks.waiting[stage], held[stage] + deferred[stage])
                peaks.of_ranks[rank] = max(peaks.of_ranks[rank], total)
            elif unit.kind is UnitKind.WEIGHT:
                deferred[stage] -= tokens
                total -= tokens
            else:
                held[stage] -= tokens
                later = tokens if unit in split else 0
                deferred[stage] += later
                total += later - tokens
                peaks.deferred[stage] = max(peaks.deferred[stage], deferred[stage])
    return peaks
