"""The discrete half of memory=auto: shapes of the layer executor, and the linear program inside each. Pure.

Note: coefficients by differences. The ledger and the timing are the only places that know what a policy costs. A program is made
from them by moving one share at a time and looking at the difference, so no formula is written twice. Where a phase is a maximum
of two things the ledger is convex in the shares, and its tangents at some shares are rows that hold everywhere: solve.py adds
tangents where a solution turns out to be too large, which is Kelley's cutting-plane method (J. SIAM 8, 1960).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ...memory.activation_classes import ATTENTION_OUTPUT, CLASSES, LAYER_INPUT
from ...memory.config import ActivationPlace, AttentionTiling, MemoryConfig
from ...memory.policy import KEEP_ALL, KEPT, MOVED, RECOMPUTED, MemoryPolicy, Split, compiler
from .linear_program import Affine, PolicyProgram, Row, step_s

CHUNKS = (16384, 4096, 1024)
"""Sizes tried where memory.chunk_tokens is null and a rank has more tokens: 16K rows fill any device, and larger chunks save nothing."""
SEGMENTS = (1, 2, 3, 4, 6)
BUDGET = "host budget"
"""The row of memory.host_budget."""
_STEP = 1 / 16
"""Shares differ by this much between the two looks of a difference."""
_FREE = tuple(kind.name for kind in CLASSES if kind.by_token)
"""The classes memory.activations speaks of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Everything about a policy that is not a share."""

    graph: bool = False
    stored: bool = False
    """Attention outputs are kept or moved; otherwise attention is recomputed."""
    segment_layers: int = 1
    chunk_tokens: int | None = None
    attention: AttentionTiling = AttentionTiling.WHOLE
    head_groups: int = 1

    @property
    def complexity(self) -> tuple[int, ...]:
        """Simpler shapes have less: what is preferred among equals."""
        return (
            self.segment_layers,
            self.head_groups,
            int(self.attention is AttentionTiling.CHUNKS),
            -(self.chunk_tokens or 1 << 40),
            int(not self.stored),
        )


@dataclass(frozen=True, slots=True)
class Share:
    """One variable: the share of tokens of `classes` that is kept (else: moved). With `rest`, all that is not kept is moved."""

    classes: tuple[str, ...]
    keep: bool
    rest: bool = False


@dataclass(frozen=True)
class PolicyCost:
    """What the ledger and the timing say of one policy."""

    read_rows: Callable[[], dict[str, tuple[float, float]]]
    read_rounding: Callable[[], dict[str, float]]
    forward_s: float
    backward_s: float
    to_host_s: float
    from_host_s: float
    fixed_s: float
    hidden_s: float = 0.0

    @cached_property
    def rows(self) -> dict[str, tuple[float, float]]:
        """Rows by name: bytes, and how many there may be. Asked for last: a bound of the time needs none."""
        return self.read_rows()

    @cached_property
    def rounding(self) -> dict[str, float]:
        """Rounding by row: bytes that are there for rows wait in whole blocks of the arena.

        None where nothing waits, so no tangent has them.
        """
        return self.read_rounding()

    def smooth(self, name: str) -> float:
        """Bytes of a row without rounding: never more than the ledger's, and convex in the shares."""
        return self.rows[name][0] - self.rounding.get(name, 0.0)

    def step_s(self, link: float = 1.0) -> float:
        """The step; `link`: times as fast a link to the host."""
        to_host, from_host = self.to_host_s / link, self.from_host_s / link
        return step_s(self.forward_s, self.backward_s, to_host, from_host, fixed_s=self.fixed_s, hidden_s=self.hidden_s)


Evaluate = Callable[[MemoryPolicy], PolicyCost]


def shapes(memory: MemoryConfig, *, tokens: int, layers: int, head_groups: Sequence[int], ring: bool) -> Iterator[Shape]:
    """Every shape that the given fields of `memory` allow for so many tokens a rank; `head_groups`: numbers that divide the heads."""
    if _may_keep_graph(memory):
        yield Shape(graph=True, stored=True)
    stored = {None: (True, False), ActivationPlace.RECOMPUTE: (False,)}.get(memory.attention_output, (True,))
    for segment in [memory.segment_layers] if memory.segment_layers else [k for k in SEGMENTS if k <= max(1, layers // 2)]:
        for chunk, walk, groups in _pieces(memory, tokens, head_groups, ring):
            for kept in stored:
                yield Shape(stored=kept, segment_layers=segment, chunk_tokens=chunk, attention=walk, head_groups=groups)


def _may_keep_graph(memory: MemoryConfig) -> bool:
    places = (memory.layer_input, memory.attention_output, memory.activations)
    whole = (memory.chunk_tokens, memory.attention, memory.head_groups, memory.segment_layers)
    return all(place in (None, ActivationPlace.KEEP) for place in places) and all(
        value in (None, 1, AttentionTiling.WHOLE) for value in whole
    )


def _pieces(memory: MemoryConfig, tokens: int, head_groups: Sequence[int], ring: bool) -> Iterator[tuple[int | None, AttentionTiling, int]]:
    """(chunk, walk, head groups)"""
    chunks: list[int | None] = [memory.chunk_tokens] if memory.chunk_tokens else [c for c in CHUNKS if c < tokens]
    if memory.chunk_tokens is None and tokens <= CHUNKS[0]:
        chunks.insert(0, None)
    for chunk in chunks:
        if memory.attention is not AttentionTiling.CHUNKS:
            for groups in [memory.head_groups] if memory.head_groups else head_groups:
                yield chunk, AttentionTiling.WHOLE, groups
        # Around a ring attention by chunks works as whole.
        by_chunks = memory.attention is AttentionTiling.CHUNKS or (memory.attention is None and not ring)
        if by_chunks and chunk is not None and (memory.head_groups or 1) == 1:
            yield chunk, AttentionTiling.CHUNKS, 1


def shares(memory: MemoryConfig, shape: Shape) -> list[Share]:
    """What is left to be chosen inside a shape."""
    if shape.graph:
        return []
    shares = []
    if memory.layer_input is None:
        shares.append(Share((LAYER_INPUT.name,), keep=True, rest=True))
    if shape.stored and memory.attention_output is None:
        shares.append(Share((ATTENTION_OUTPUT.name,), keep=True, rest=True))
    if memory.activations is None:
        shares += [Share((name,), keep) for name in _FREE for keep in (True, False)]
    elif memory.activations is ActivationPlace.HOST and memory.host_fraction is None:
        shares.append(Share(_FREE, keep=False))
    return shares


def policy_of(memory: MemoryConfig, shape: Shape, variables: Sequence[Share], x: Sequence[float]) -> MemoryPolicy:
    """The policy with these shares; what the configuration gives is as given."""
    if shape.graph:
        return replace(KEEP_ALL, offload_dir=memory.offload_dir, compile=compiler(memory))
    splits = _given(memory, shape)
    for variable, share in zip(variables, x, strict=True):
        for name in variable.classes:
            was = splits[name]
            if variable.rest:
                splits[name] = Split(keep=share, host=1.0 - share)
            else:
                splits[name] = Split(keep=share, host=was.host) if variable.keep else Split(keep=was.keep, host=min(share, 1.0 - was.keep))
    policy = MemoryPolicy(
        segment_layers=shape.segment_layers,
        chunk_tokens=shape.chunk_tokens,
        attention=shape.attention,
        head_groups=shape.head_groups,
        offload_dir=memory.offload_dir,
        compile=compiler(memory),
    )
    return policy.with_splits(splits)


def _given(memory: MemoryConfig, shape: Shape) -> dict[str, Split]:
    places = {ActivationPlace.KEEP: KEPT, ActivationPlace.HOST: MOVED, ActivationPlace.RECOMPUTE: RECOMPUTED, None: RECOMPUTED}
    activations = places[memory.activations]
    if memory.activations is ActivationPlace.HOST:
        activations = Split(host=memory.host_fraction or 0.0)
    attention = places[memory.attention_output] if shape.stored else RECOMPUTED
    return {LAYER_INPUT.name: places[memory.layer_input], ATTENTION_OUTPUT.name: attention} | dict.fromkeys(_FREE, activations)


def linearise(
    measure: Evaluate, policy_at: Callable[[Sequence[float]], MemoryPolicy], variables: Sequence[Share], near: Sequence[float]
) -> PolicyProgram:
    """The program whose functions touch those of `measure` next to the shares `near`, where every share has room to grow."""
    x = tuple(share * (1.0 - _STEP) for share in near)
    here = measure(policy_at(x))
    there = [measure(policy_at((*x[:index], x[index] + _STEP, *x[index + 1 :]))) for index in range(len(variables))]

    def affine(read: Callable[[PolicyCost], float]) -> Affine:
        slope = tuple((read(measured) - read(here)) / _STEP for measured in there)
        return Affine(read(here) - sum(a * b for a, b in zip(slope, x, strict=True)), slope)

    def row(name: str, limit: float) -> Row:
        return Row(name, affine(lambda measured: measured.smooth(name)), limit)

    return PolicyProgram(
        forward_s=affine(lambda measured: measured.forward_s),
        backward_s=affine(lambda measured: measured.backward_s),
        to_host_s=affine(lambda measured: measured.to_host_s),
        from_host_s=affine(lambda measured: measured.from_host_s),
        rows=tuple(row(name, limit) for name, (_, limit) in here.rows.items()),
        exclusive=_exclusive(variables),
        fixed_s=here.fixed_s,
        hidden_s=here.hidden_s,
    )


def _exclusive(variables: Sequence[Share]) -> tuple[tuple[int, ...], ...]:
    by_class: dict[tuple[str, ...], list[int]] = {}
    for index, variable in enumerate(variables):
        by_class.setdefault(variable.classes, []).append(index)
    return tuple(tuple(indices) for indices in by_class.values() if len(indices) > 1)


def rounded(variables: Sequence[Share], x: Sequence[float], tokens: int) -> tuple[float, ...]:
    """Shares a person can read, in tenths of a percent (or whole tokens where there are fewer): what is kept never more than `x`."""
    grid = min(1000, max(1, tokens))
    short = [min(1.0, int(share * grid + 1e-6) / grid) for share in x]
    for together in _exclusive(variables):
        keep, host = sorted(together, key=lambda index: not variables[index].keep)
        if x[keep] + x[host] > 1.0 - 1e-4:
            # All of it waits somewhere: rounding leaves no tokens over to be recomputed.
            short[host] = 1.0 - short[keep]
    return tuple(short)
