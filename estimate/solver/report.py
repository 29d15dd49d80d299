"""The solver's result, in words and numbers: the policy, what is proven, what is full, what more of it would save. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from ...memory.activation_classes import activation_classes
from ...memory.config import AttentionTiling
from ...memory.policy import MemoryPolicy, Split
from ...units import format_bytes, format_tokens
from ..plan_inputs import PlanInputs


@dataclass(frozen=True, kw_only=True, slots=True)
class ShadowPrice:
    """Time that a change of the machine would save, by a solution with it."""

    change: str
    """`6.0 GiB more host memory for each GPU`"""
    saved_s: float
    """The steps of both policies compared, each the one the solver would take."""
    saved_share: float
    """Share of the step's time that is saved."""
    slope_s: float | None
    """What the first byte saves, times the bytes of the change, by the program's duals: no shape changed, it could not save more.
    None for a faster link."""

    def __str__(self) -> str:
        return f"{self.change} would save {percent(self.saved_share)} of the step"


@dataclass(frozen=True, kw_only=True)
class SolveReport:
    """How memory=auto was decided."""

    policy: tuple[str, ...]
    """The policy in words, one clause each."""
    feasible: bool
    """False: nothing fits, and the policy is the one that needs least of what is missing."""
    gap: float
    """No policy is faster by more than this share of the step, by the estimates."""
    num_shapes: int
    num_solved: int
    binding: tuple[str, ...]
    """Memories that are full, and in which phase."""
    find_prices: Callable[[], tuple[ShadowPrice, ...]] = field(compare=False, repr=False)
    """Solves anew with more of each memory, for `prices`."""
    step_s: float
    keep_s: float
    """The step if every activation could be kept."""
    recompute_s: float
    """The step if every layer were recomputed in backward (memory=recompute), whether that fits or not."""
    fixed_bytes: int
    """Bytes on the device at its fullest phase whatever the policy."""
    fixed_terms: tuple[tuple[str, int], ...]
    """The largest of them, in bytes."""
    least_budget: str | None
    """Where nothing fits: the one override that gives the device, or the host, the least that works; None where one is not enough."""

    def __reduce__(self) -> tuple[Callable[..., SolveReport], tuple[dict[str, Any]]]:
        """A copy for another process has its prices solved: what would solve them stays here."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return _copied, (values | {"find_prices": self.prices},)

    @cached_property
    def prices(self) -> tuple[ShadowPrice, ...]:
        """What more memory and a faster link would save; solved when first asked for, as it takes longer than the policy itself."""
        return self.find_prices()

    @property
    def proof(self) -> str:
        """One sentence."""
        looked = f"{self.num_shapes} shapes, {self.num_solved} solved, the others cannot be faster"
        return f"no policy is faster{'' if self.gap < 0.0005 else f' by more than {percent(self.gap)}'} ({looked})"


def _copied(values: dict[str, Any]) -> SolveReport:
    prices = values["find_prices"]
    return SolveReport(**values | {"find_prices": lambda: prices})


def percent(share: float) -> str:
    """`3.2 %`; what is nothing is said so."""
    return "under 0.1 %" if abs(share) < 0.0005 else f"{100 * share:.1f} %"


def describe_policy(policy: MemoryPolicy, inputs: PlanInputs) -> tuple[str, ...]:
    """The policy in clauses: what waits where, what is recomputed, in what pieces."""
    place = "GPU" if inputs.on_gpu else "rank"
    host = "files" if policy.offload_dir else "host"
    compiled = ("norms, projections and MLP compiled",) if policy.compile else ()
    if policy.graph:
        return (f"every activation is kept on the {place}; no layer runs again", *compiled)
    clauses = [_inputs(policy, place, host), _attention(policy, place, host), *_others(policy, inputs, place, host)]
    return (*clauses, _pieces(policy, inputs), *compiled)


def _inputs(policy: MemoryPolicy, place: str, host: str) -> str:
    every = "layer inputs" if policy.segment_layers == 1 else f"inputs of every {ordinal(policy.segment_layers)} layer"
    return f"{every} {_where(policy.layer_input, place, host)}"


def _attention(policy: MemoryPolicy, place: str, host: str) -> str:
    if policy.attention_output.recompute >= 0.5:
        return "attention runs again in backward"
    return f"attention outputs {_where(policy.attention_output, place, host)}"


def _others(policy: MemoryPolicy, inputs: PlanInputs, place: str, host: str) -> list[str]:
    """Classes of one treatment in one clause; layer inputs and attention outputs have clauses of their own."""
    by_split: dict[Split, list[str]] = {}
    for kind in activation_classes(inputs.spec):
        if kind.by_token:
            by_split.setdefault(policy.split(kind), []).append(kind.description)
    if len(by_split) == 1:
        (split,) = by_split
        return ["everything else recomputed" if split == Split() else f"everything else {_where(split, place, host)}"]
    return [f"{_joined(names)} {_where(split, place, host)}" for split, names in by_split.items()]


def _joined(names: list[str]) -> str:
    return ", ".join(names)


def _where(split: Split, place: str, host: str) -> str:
    """`kept on the GPU`, `to the host`, `recomputed`, or the shares of each."""
    parts = [
        (split.keep, f"kept on the {place}"),
        (split.host, f"to the {host}" if host == "host" else f"to {host}"),
        (split.recompute, "recomputed"),
    ]
    parts = [(share, words) for share, words in parts if share > 5e-4]
    if len(parts) == 1:
        return parts[0][1]
    return ", ".join(f"{100 * share:.3g} % {words}" for share, words in parts)


def _pieces(policy: MemoryPolicy, inputs: PlanInputs) -> str:
    if policy.chunk_tokens is None or policy.chunk_tokens >= inputs.tokens:
        pieces = "whole layers at a time"
    else:
        pieces = f"chunks of {format_tokens(policy.chunk_tokens)} tokens"
        if policy.attention is AttentionTiling.CHUNKS:
            pieces += ", attention by chunks" if inputs.layout.ring == 1 else ", attention whole for it goes around a ring"
    if policy.head_groups > 1:
        pieces += f", attention in {policy.head_groups} groups of heads"
    return pieces


def ordinal(number: int) -> str:
    """`2nd`, `3rd`, `4th`"""
    return f"{number}{ {2: 'nd', 3: 'rd'}.get(number, 'th') }"


def describe_report(report: SolveReport) -> list[str]:
    """Lines for `efflaunch plan`: proof, times, what is full and what more would save."""
    lines = [report.proof] if report.feasible else ["nothing fits; this policy needs least of what is missing"]
    lines.append(
        f"against every activation kept {_relative(report.step_s, report.keep_s)}, "
        f"against every layer run again {_relative(report.step_s, report.recompute_s)}"
    )
    lines += [f"full: {name}" for name in report.binding]
    lines += [str(price) for price in report.prices]
    if report.feasible and not report.prices:
        lines.append("more memory of any kind would save nothing that counts")
    if not report.feasible:
        lines.append(fixed_line(report))
        if report.least_budget is not None:
            lines.append(f"the least that works: {report.least_budget}")
    return lines


def fixed_line(report: SolveReport) -> str:
    """What no policy can do anything about."""
    named = ", ".join(f"{name} {format_bytes(size)}" for name, size in report.fixed_terms)
    return f"{format_bytes(report.fixed_bytes)} of each device are there whatever the policy: {named}"


def _relative(seconds: float, other: float) -> str:
    change = seconds / other - 1.0
    if abs(change) < 0.0005:
        return "the same time"
    return f"{percent(abs(change))} {'slower' if change > 0 else 'faster'}"
