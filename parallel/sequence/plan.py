"""StepPlan: which ranks hold which sequences in each micro-batch of one step. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...errors import PlanError


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks `first_rank ... first_rank + degree - 1` share the sequences; an aligned power-of-two block.

    `ulysses` ranks (a divisor of `degree`) exchange heads; `degree // ulysses` rings run across them.
    `sequences` are indices into `StepPlan.lengths`.
    """

    first_rank: int
    degree: int
    ulysses: int
    sequences: tuple[int, ...]
    predicted_s: float | None = field(default=None, compare=False)
    """Modelled seconds of the group in its micro-batch, without what every micro-batch costs."""

    @property
    def ring(self) -> int:
        return self.degree // self.ulysses

    def __str__(self) -> str:
        inner = f"{self.degree}" if self.ring == 1 else f"{self.ulysses}x{self.ring}"
        return f"[{self.first_rank}+{inner}: {len(self.sequences)} seq]"


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Groups that run at the same time on disjoint ranks; ranks in no group run with no tokens."""

    groups: tuple[Group, ...]

    def group_of(self, rank: int) -> Group | None:
        for group in self.groups:
            if group.first_rank <= rank < group.first_rank + group.degree:
                return group
        return None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The micro-batches of one step over `world_size` ranks; `lengths[i]` is sequence i's tokens."""

    world_size: int
    lengths: tuple[int, ...]
    micro_batches: tuple[MicroBatch, ...]
    predicted_s: float | None = field(default=None, compare=False)
    """Modelled seconds of the step."""
    lower_bound_s: float | None = field(default=None, compare=False)
    """No plan of these lengths is faster in the same model; None where no bound was made or it does not hold."""
    bound: str = field(default="", compare=False)
    """Which bound: "staircase", "class LP" or "class MILP"."""
    source: str = field(default="static", compare=False)
    """Who made it: "static", "adaptive", "greedy", or "late" (greedy, because the planner was)."""

    @property
    def gap(self) -> float | None:
        """How much slower than the bound the plan is at most, as a share; None without both figures."""
        if self.predicted_s is None or not self.lower_bound_s:
            return None
        return max(0.0, self.predicted_s / self.lower_bound_s - 1)

    def __str__(self) -> str:
        return " | ".join(" ".join(str(group) for group in batch.groups) for batch in self.micro_batches)


def check_plan(plan: StepPlan) -> None:
    """PlanError unless every sequence is held exactly once by aligned, disjoint groups inside the world."""
    seen = [0] * len(plan.lengths)
    for index, batch in enumerate(plan.micro_batches):
        used: set[int] = set()
        for group in batch.groups:
            _check_group(group, plan.world_size, f"micro-batch {index}")
            ranks = set(range(group.first_rank, group.first_rank + group.degree))
            if used & ranks:
                raise _wrong(f"micro-batch {index}", f"ranks {sorted(used & ranks)} in two groups", "disjoint groups")
            used |= ranks
            for sequence in group.sequences:
                if not 0 <= sequence < len(seen):
                    raise _wrong(f"micro-batch {index}", f"sequence {sequence}", f"an index below {len(seen)}")
                seen[sequence] += 1
    missing = [i for i, count in enumerate(seen) if count != 1]
    if missing:
        raise _wrong("step plan", f"sequences {missing[:8]} not held exactly once", "each sequence in one group")


def _check_group(group: Group, world_size: int, where: str) -> None:
    if group.degree < 1 or group.degree & (group.degree - 1):
        raise _wrong(where, f"a group of {group.degree} ranks", "a power of two")
    if group.first_rank % group.degree or group.first_rank + group.degree > world_size:
        raise _wrong(where, f"group {group}", f"a block aligned to its size inside {world_size} ranks")
    if group.ulysses < 1 or group.degree % group.ulysses:
        raise _wrong(where, f"{group.ulysses} Ulysses ranks in a group of {group.degree}", "a divisor of the group")
    if not group.sequences:
        raise _wrong(where, f"group {group} without sequences", "at least one (leave idle ranks out)")


def _wrong(where: str, found: str, expected: str) -> PlanError:
    return PlanError(where, found=found, expected=expected, hint="report this plan: the solver should never make it")
