"""Seconds a plan takes, by a model that is additive over the sequences of a group. Pure; numpy is imported when asked for.

A micro-batch takes `beta_s` plus its slowest group; a group takes the sum of its sequences. One sequence of n tokens over d ranks
takes its linear work and Ulysses exchanges, both linear in n, and attention or ring hops, whichever is longer: they run side by side.
All seconds of a DegreeCost already contain the division by the degree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...errors import PlanError
from ...units import format_tokens
from .plan import Group, MicroBatch, StepPlan

if TYPE_CHECKING:  # plans are shared, runtimes are not
    import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class DegreeCost:
    """What one sequence of n tokens adds to a group of `degree` ranks."""

    degree: int
    ulysses: int
    attention_s: float
    """Per n^2: layers whose attention sees the whole sequence."""
    linear_s: float
    """Per token: all that is local to tokens."""
    exchange_s: float = 0.0
    """Per token: Ulysses all-to-alls, which compute waits for."""
    ring_s: float = 0.0
    """Per token: ring hops, hidden as long as attention takes."""
    windowed_s: tuple[tuple[int, float], ...] = ()
    """(window, seconds per query-key pair) of layers whose attention looks back that many tokens."""

    @property
    def ring(self) -> int:
        return self.degree // self.ulysses

    def sequence_s(self, lengths: Any) -> np.ndarray:
        """Seconds of each sequence; any shape of token counts."""
        import numpy as np

        n = np.asarray(lengths, dtype=np.float64)
        attention = self.attention_s * n * n
        for window, pair_s in self.windowed_s:
            attention = attention + pair_s * np.where(n <= window, n * n / 2, window * (n - window / 2))
        return n * (self.linear_s + self.exchange_s) + np.maximum(attention, n * self.ring_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """Modelled time of one step over `world_size` ranks, and the limit on what a rank holds."""

    world_size: int
    tokens_per_rank: int
    """A group of d ranks holds at most d times this in a micro-batch."""
    degrees: tuple[DegreeCost, ...]
    """Ascending."""
    excluded: tuple[tuple[int, str], ...] = ()
    """Degrees that model or topology forbid, and why."""
    beta_s: float = 0.0
    """Seconds of every micro-batch, whatever it holds."""
    gather_s: float = 0.0
    """Collectives on weights and gradients beside a micro-batch's compute: it takes at least this, and beta_s."""
    step_s: float = 0.0
    """Seconds of every step, whatever its plan."""
    num_stages: int = 1
    """Stages of the pipeline; all else is of the slowest one, over its ranks."""
    virtual_stages: int = 1
    """Of each stage, where they are interleaved."""
    fill_share: float = 1.0
    """Of a micro-batch's time, what a stage adds that fills and drains; less than 1 where gradients of weights come later."""
    source: str = "arithmetic"
    """Where the figures come from: "arithmetic", "profile" or a publication."""

    def __post_init__(self) -> None:
        degrees = [cost.degree for cost in self.degrees]
        if not degrees or degrees != sorted(set(degrees)) or degrees[-1] > self.world_size or self.tokens_per_rank < 1:
            raise PlanError(
                "cost model",
                found=f"degrees {degrees} over {self.world_size} ranks of {self.tokens_per_rank} tokens",
                expected="ascending degrees no larger than the world, and room for a token",
                hint=f"degrees that can be had: {'; '.join(f'{d}: {why}' for d, why in self.excluded) or 'all powers of two'}",
            )

    @property
    def largest(self) -> int:
        """Ranks of the largest group."""
        return self.degrees[-1].degree

    @property
    def max_seq_len(self) -> int:
        """Longest sequence any group can hold."""
        return self.largest * self.tokens_per_rank

    def of(self, degree: int) -> DegreeCost:
        """PlanError, with the reason, where the degree is excluded."""
        for cost in self.degrees:
            if cost.degree == degree:
                return cost
        raise PlanError(
            "cost model",
            found=f"a group of {degree} ranks",
            expected=f"one of {', '.join(str(cost.degree) for cost in self.degrees)}",
            hint=dict(self.excluded).get(degree, "a degree of the cost model"),
        )

    def sequence_s(self, lengths: Any, degree: int) -> np.ndarray:
        """Seconds each sequence adds to a group of `degree` ranks."""
        return self.of(degree).sequence_s(lengths)

    def group_s(self, lengths: Any, degree: int) -> float:
        """Seconds of a group that holds sequences of these lengths; without beta_s."""
        return float(self.sequence_s(lengths, degree).sum())

    def micro_batch_s(self, batch: MicroBatch, lengths: Sequence[int]) -> float:
        """The slowest group (or the collectives on weights, where those take longer), and beta_s."""
        slowest = max((self.group_s([lengths[i] for i in group.sequences], group.degree) for group in batch.groups), default=0.0)
        return self.beta_s + max(self.gather_s, slowest)

    def plan_s(self, plan: StepPlan, *, barrier_free: bool = False) -> float:
        """Seconds of the step. `barrier_free`: ranks meet only inside groups and at the end; weights are gathered once."""
        if barrier_free:
            return self.step_s + self.gather_s + self._barrier_free_s(plan)
        return self.step_s + self.pipelined_s([self.micro_batch_s(batch, plan.lengths) for batch in plan.micro_batches])

    def pipelined_s(self, micro_batches_s: Sequence[float]) -> float:
        """Seconds of micro-batches that take so long in each stage: the stages fill and drain behind the longest one.

        Note: exact for all forward passes in a row, and all backward ones, where every stage takes as long (a flow shop whose machines
        are alike); one forward, one backward in turn is as long.
        """
        return sum(micro_batches_s) + (self.num_stages - 1) * self.fill_share / self.virtual_stages * max(micro_batches_s, default=0.0)

    def _barrier_free_s(self, plan: StepPlan) -> float:
        ready = [0.0] * plan.world_size
        for batch in plan.micro_batches:
            for group in batch.groups:
                ranks = range(group.first_rank, group.first_rank + group.degree)
                spent = self.group_s([plan.lengths[i] for i in group.sequences], group.degree)
                done = max(ready[rank] for rank in ranks) + self.beta_s + spent
                for rank in ranks:
                    ready[rank] = done
        return max(ready, default=0.0)

    def priced(self, plan: StepPlan) -> StepPlan:
        """A copy of the plan with predicted_s of the step and of every group."""

        def group(bare: Group) -> Group:
            return replace(bare, predicted_s=self.group_s([plan.lengths[i] for i in bare.sequences], bare.degree))

        batches = tuple(MicroBatch(tuple(group(bare) for bare in batch.groups)) for batch in plan.micro_batches)
        return replace(plan, micro_batches=batches, predicted_s=self.plan_s(plan))

    def is_monotone(self) -> bool:
        """Whether time per token never falls with length, and rank-seconds of a sequence never fall with the degree."""
        import numpy as np

        lengths = np.unique(np.geomspace(1, self.max_seq_len, 256).astype(np.int64))
        table = np.stack([cost.sequence_s(lengths) * cost.degree for cost in self.degrees])
        slack = 1e-9 * np.abs(table)
        per_token = table / lengths
        rising = bool(np.all(np.diff(per_token, axis=1) >= -slack[:, 1:] / lengths[1:]))
        return rising and bool(np.all(np.diff(table, axis=0) >= -slack[1:])) and bool(np.all(table > 0))


def check_lengths(lengths: Iterable[int], cost: CostModel) -> None:
    """PlanError naming the sequence, the limit and what would raise it."""
    for index, length in enumerate(lengths):
        if 1 <= length <= cost.max_seq_len:
            continue
        limit = f"{cost.largest} ranks x parallel.tokens_per_rank={format_tokens(cost.tokens_per_rank)}"
        why = "; ".join(f"groups of {degree} are out: {reason}" for degree, reason in cost.excluded if degree > cost.largest)
        raise PlanError(
            "sequence lengths",
            found=f"sequence {index} with {length} tokens",
            expected=f"1 to {cost.max_seq_len} tokens ({limit})" + (f"; {why}" if why else ""),
            hint="drop sequences without tokens"
            if length < 1
            else f"parallel.tokens_per_rank={format_tokens(-(-int(length) // cost.largest))}, more ranks, or a smaller data.max_seq_len",
        )
