"""Any plan of a step's sequences, drawn by hypothesis."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from efflaunch.parallel.sequence.plan import Group, MicroBatch, StepPlan, check_plan


@st.composite
def step_plans(draw: st.DrawFn, lengths: Sequence[int], world_sizes: Sequence[int]) -> StepPlan:
    """Any split of the sequences into micro-batches of aligned groups of any degree and scheme; ranks may stay idle."""
    world_size = draw(st.sampled_from(world_sizes))
    powers = [1 << i for i in range(world_size.bit_length())]
    rest = list(draw(st.permutations(range(len(lengths)))))
    micro_batches = []
    while rest:
        groups, rank = [], 0
        while rank < world_size and rest:
            degree = draw(st.sampled_from([d for d in powers if rank % d == 0 and rank + d <= world_size]))
            if draw(st.integers(0, 3)):  # else these ranks stay idle
                ulysses = draw(st.sampled_from([u for u in powers if degree % u == 0]))
                count = draw(st.integers(1, len(rest)))
                groups.append(Group(rank, degree, ulysses, tuple(rest[:count])))
                rest = rest[count:]
            rank += degree
        if groups:
            micro_batches.append(MicroBatch(tuple(groups)))
    plan = StepPlan(world_size, tuple(lengths), tuple(micro_batches))
    check_plan(plan)
    return plan
