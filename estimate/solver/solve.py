"""memory=auto: the policy that fits the memories there are in the least time. Pure.

`solve_memory` looks at every shape of the executor that the given fields allow (shapes.py), solves the linear program of the shares
inside those that can be the best (linear_program.py, search.py), then verifies the rounded result against the ledger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ...memory.heads import num_head_groups
from ...memory.policy import MemoryPolicy
from ...parallel.config import GradReduce, SequenceMode
from ..plan_inputs import PlanInputs, reduces_once, reduction_of_engine
from .evaluate import measure_of
from .report import SolveReport
from .search import Candidate, PolicySearch
from .shadow_prices import report_of
from .shapes import Evaluate, Shape, policy_of, shapes, shares


def search_of(inputs: PlanInputs) -> PolicySearch:
    """Every shape for the configuration behind `inputs` (its policy is not looked at)."""
    candidates: list[Candidate] = []
    for reduce in _reductions(inputs):
        s = replace(inputs, parallel=replace(inputs.parallel, grad_reduce=reduce))
        measure = measure_of(s)
        for shape in shapes(
            s.memory,
            tokens=s.tokens,
            layers=s.spec.num_layers,
            head_groups=_head_groups(s),
            ring=s.layout.ring > 1,
        ):
            candidates.append(_candidate(s, shape, measure))
    return PolicySearch(candidates, inputs.tokens, inputs.layout.ranks_per_node)


def _candidate(inputs: PlanInputs, shape: Shape, measure: Evaluate) -> Candidate:
    variables = shares(inputs.memory, shape)

    def policy(x: Sequence[float]) -> MemoryPolicy:
        return policy_of(inputs.memory, shape, variables, x)

    # A rank without a GPU has its memory from the node's.
    roomy = ("device, ", "host, ") if inputs.on_gpu else ("host, ",)
    return Candidate(shape, inputs.parallel.grad_reduce, variables, policy, measure, roomy)


def _head_groups(inputs: PlanInputs) -> list[int]:
    """Numbers of groups that the heads of a rank fall into, whatever Ulysses degree a step is planned with."""
    adaptive = inputs.parallel.sequence is SequenceMode.ADAPTIVE
    ulysses = math.gcd(inputs.spec.num_heads, 1 << (inputs.layout.stage_size.bit_length() - 1)) if adaptive else inputs.layout.ulysses
    return [
        groups
        for groups in (1, 2, 4, 8)
        if num_head_groups(inputs.spec.num_heads, inputs.spec.num_kv_heads, most=groups, ulysses=ulysses) == groups
    ]


def _reductions(inputs: PlanInputs) -> list[GradReduce]:
    asked = inputs.parallel.grad_reduce
    if asked is not GradReduce.AUTO:
        return [asked]
    if (own := reduction_of_engine(inputs)) is not None:
        return [own]
    once = replace(inputs, parallel=replace(inputs.parallel, grad_reduce=GradReduce.STEP))
    several = reduces_once(once) and not inputs.parallel.barrier_free
    return [GradReduce.STEP, GradReduce.MICRO_BATCH] if several else [GradReduce.STEP]


def solved_setting(inputs: PlanInputs, candidate: Candidate, policy: MemoryPolicy) -> PlanInputs:
    """The setting with what was left open decided."""
    return replace(inputs, policy=policy, parallel=replace(inputs.parallel, grad_reduce=candidate.reduce))


def solve_memory(inputs: PlanInputs) -> tuple[PlanInputs, SolveReport]:
    """The setting with the policy that fits in the least time, and how that was found.

    Fields of `inputs.memory` that are given are held fixed; `inputs.policy` is not looked at. Where nothing fits it is the
    policy that needs least of what is missing, and the report says so.
    """
    search = search_of(inputs)
    result = search.best() or search.last_resort()
    decided = (result.candidate, result.policy) if result is not None else search.least()
    solved = solved_setting(inputs, *decided)
    return solved, report_of(solved, search, result)


def can_fit(inputs: PlanInputs) -> bool:
    """Whether some policy fits; nothing is said about the nearest one where none does, which takes longer."""
    return search_of(inputs).best(looks=0) is not None
