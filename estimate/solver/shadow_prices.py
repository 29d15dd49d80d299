"""What the solver's answer rests on: what is full, what more of it would save, and what no policy can change. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ...memory.config import AttentionTiling
from ...memory.policy import KEEP_ALL, KEPT, MOVED, RECOMPUTED, MemoryPolicy
from ...units import format_bytes
from ..footprint.device import reserve_share
from ..footprint.term import Term
from ..ledger import device_account, host_account
from ..plan_inputs import GIB, PlanInputs
from .evaluate import measures
from .report import ShadowPrice, SolveReport, describe_policy
from .search import PREFERENCE, ExtraCapacity, PolicySearch, SearchResult
from .shapes import BUDGET

MIB = 1 << 20
_FULL = 0.98
"""A memory that is fuller than this is called full."""


def report_of(solved: PlanInputs, search: PolicySearch, result: SearchResult | None) -> SolveReport:
    """Report on the `result` of a search; None: nothing fits."""
    keep = measures(replace(solved, policy=KEEP_ALL)).step_s(link=float("inf"))
    recompute_s = measures(replace(solved, policy=MemoryPolicy(layer_input=KEPT, attention_output=RECOMPUTED))).step_s(link=float("inf"))
    fixed = fixed_terms(solved)
    return SolveReport(
        policy=describe_policy(solved.policy, solved),
        feasible=result is not None,
        gap=result.gap if result is not None else 0.0,
        num_shapes=len(search.candidates),
        num_solved=result.num_solved if result is not None else 0,
        binding=_binding(solved),
        find_prices=lambda: _prices(solved, search, result) if result is not None else (),
        step_s=measures(solved).step_s(),
        keep_s=keep,
        recompute_s=recompute_s,
        fixed_bytes=sum(size for _, size in fixed),
        fixed_terms=fixed[:5],
        least_budget=least_budget(solved) if result is None else None,
    )


def _binding(solved: PlanInputs) -> tuple[str, ...]:
    """Full memories, each at its fullest phase, and directions of the link that computation does not hide."""
    measured = measures(solved)
    fullest: dict[str, tuple[float, str]] = {}
    for name, (used, limit) in measured.rows.items():
        memory, _, phase = name.partition(", ")
        fullest[memory] = max(fullest.get(memory, (0.0, "")), (used / max(limit, 1.0), phase))
    title = {"device": "GPU memory" if solved.on_gpu else "memory of a rank", "host": "host memory"}
    memories = [
        f"{title.get(memory, 'memory.host_budget')}{f' in {phase}' if phase else ''}, {100 * share:.0f} %"
        for memory, (share, phase) in fullest.items()
        if share >= _FULL
    ]
    ways = {"forward": (measured.to_host_s, measured.forward_s), "backward": (measured.from_host_s, measured.backward_s)}
    place = "files" if solved.policy.offload_dir else "the host"
    busy = [
        f"the way to {place} in {phase}, {100 * moving / beside:.0f} % of the computation beside it"
        for phase, (moving, beside) in ways.items()
        if moving >= _FULL * beside
    ]
    return (*memories, *busy)


@dataclass(frozen=True, slots=True)
class _Change:
    """One thing there could be more of: the rows it speaks of, bytes a rank, and the room it makes."""

    memory: str
    words: str
    num_bytes: float
    room: ExtraCapacity


def _prices(solved: PlanInputs, search: PolicySearch, result: SearchResult) -> tuple[ShadowPrice, ...]:
    """What more memory and a faster link would save; nothing is solved where the bound shows that it could not count."""
    if result.least_s <= search.in_order[0].bound_s * (1.0 + PREFERENCE):
        return ()
    made = [_first_that_counts(search, result, changes) for changes in _changes(solved)]
    return tuple(price for price in made if price is not None)


def _changes(inputs: PlanInputs) -> Iterator[list[_Change]]:
    """Changes of the machine by kind, the small one before the large one."""
    place, ranks, budget = "GPU" if inputs.on_gpu else "rank", inputs.layout.ranks_per_node, inputs.memory.host_budget
    kept = 1.0 - reserve_share(inputs) - inputs.cluster.reserve
    yield [
        _Change("device", f"{format_bytes(size)} more memory on each {place}", size * kept, ExtraCapacity(device_bytes=size * kept))
        for size in _amounts(inputs.cluster.device_memory_bytes)
    ]
    yield [
        _Change("host, ", f"{format_bytes(size)} more host memory for each {place}", size * ranks, ExtraCapacity(host_bytes=size * ranks))
        for size in _amounts(inputs.cluster.host_memory_bytes / ranks)
    ]
    if budget is not None:
        yield [
            _Change(
                BUDGET,
                f"{format_bytes(size)} more of memory.host_budget for each {place}",
                size * ranks,
                ExtraCapacity(budget_bytes=size * ranks),
            )
            for size in _amounts(budget / ranks)
        ]
    words = "files twice as fast" if inputs.memory.offload_dir else "a link to the host twice as fast"
    yield [_Change("link", words, 0.0, ExtraCapacity(link=2.0))]


def _first_that_counts(search: PolicySearch, result: SearchResult, changes: Sequence[_Change]) -> ShadowPrice | None:
    """The smallest of the changes that saves something, by a solution with it."""
    for change in changes:
        changed = search.best(change.room, looks=0)
        if changed is None or result.least_s - changed.least_s < PREFERENCE * result.least_s:
            continue
        # What a person would see: the policies taken may be slower than the fastest by a little.
        saved = result.time_s - changed.time_s
        if saved >= PREFERENCE * result.time_s:
            slope = sum(price for name, price in result.prices.items() if name.startswith(change.memory)) * change.num_bytes
            share = saved / result.time_s
            return ShadowPrice(change=change.words, saved_s=saved, saved_share=share, slope_s=None if change.memory == "link" else slope)
    return None


def _amounts(capacity_bytes: float) -> list[float]:
    """A tenth and a half, in whole GiB where that is one or more."""
    return [float(round(part / GIB) * GIB) if part >= GIB else part for part in (capacity_bytes / 10, capacity_bytes / 2)]


def fixed_terms(inputs: PlanInputs) -> tuple[tuple[str, int], ...]:
    """Terms of the device that are the same whatever the policy, at its fullest phase for them; the largest first."""
    others = (
        KEEP_ALL,
        MemoryPolicy(layer_input=MOVED, chunk_tokens=1, head_groups=2, segment_layers=2),
        MemoryPolicy(layer_input=MOVED, attention_output=MOVED, chunk_tokens=1, attention=AttentionTiling.CHUNKS),
    )
    first, *rest = ({term.name: term for term in device_account(replace(inputs, policy=policy)).terms} for policy in others)
    fixed = [term for name, term in first.items() if all(_same(term, seen.get(name)) for seen in rest)]
    phases = {phase for term in fixed for phase in term.by_phase}
    peak = max(sorted(phases, key=lambda phase: phase.value), key=lambda phase: sum(term.by_phase.get(phase, 0) for term in fixed))
    return tuple(sorted(((term.name, term.by_phase.get(peak, 0)) for term in fixed), key=lambda item: (-item[1], item[0])))


def _same(term: Term, other: Term | None) -> bool:
    return other is not None and term.by_phase == other.by_phase


def least_budget(least: PlanInputs) -> str | None:
    """The override with the least memory, in whole MiB, that the policy which needs least fits; None where one memory is not enough."""
    device = device_account(least)
    if device.fits:
        host = host_account(least, device)
        return None if host.fits else f"cluster.host_memory_bytes={-(-host.peak_bytes // MIB)}MiB"
    for _ in range(16):
        # What is reserved is a share of the device, so it grows with it.
        size = int(device.peak_bytes / (1.0 - least.cluster.reserve))
        least = replace(least, cluster=replace(least.cluster, device_memory_bytes=(size // MIB + 1) * MIB))
        device = device_account(least)
        if device.fits:
            return f"cluster.device_memory_bytes={device.capacity_bytes // MIB}MiB" if host_account(least, device).fits else None
    return None
