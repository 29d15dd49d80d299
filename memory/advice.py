"""What would make a configuration fit: sets of overrides, each proven by the same ledger, and by the solver where it decides. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..errors import PlanError, UserError
from ..parallel.config import GradReduce, ParallelConfig, SequenceMode
from ..units import format_bytes, format_tokens
from .config import MemoryConfig, Place
from .ledger import Account, Ledger, build_ledger, make_setting
from .report import fixed_line
from .residency import MOMENT_BYTES
from .setting import Setting
from .solve import can_fit


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """Overrides to type, in words what they do, and the ledger that shows they fit."""

    overrides: tuple[str, ...]
    reason: str
    ledger: Ledger

    def __str__(self) -> str:
        return f"{' '.join(self.overrides)}  ({self.reason})"


@dataclass(frozen=True, slots=True)
class _Change:
    overrides: tuple[str, ...]
    reason: str
    setting: Setting


OPEN = ("layer_input", "attention_output", "activations", "host_fraction", "segment_layers", "chunk_tokens", "attention", "head_groups")
"""Fields of MemoryConfig that the solver decides where they are null."""
_BESIDE = ("segment_layers", "chunk_tokens", "attention", "head_groups")
"""Of those, the ones an experiment sets beside its memory preset."""

_MIB = 1 << 20

_Move = Callable[[Setting], Iterator[_Change]]


def suggest(ledger: Ledger, *, most: int = 4) -> tuple[Suggestion, ...]:
    """At most `most` override sets that fit, the least intrusive first: one change if one is enough, else changes on top of each other."""
    if ledger.fits:
        return ()
    found: list[Suggestion] = []
    for move in _SINGLE:
        proven = _first_that_fits(move(ledger.asked))
        if proven is not None:
            found.append(proven)
    return tuple(found[:most] if found else _stacked(ledger.asked)[:most])


def largest_length(ledger: Ledger) -> int | None:
    """The longest data.max_seq_len, halving, that fits with everything else as it is; None if none of 16 halvings does."""
    proven = _first_that_fits(_shorter(ledger.asked))
    return proven.ledger.setting.data.max_seq_len if proven is not None else None


def _first_that_fits(changes: Iterator[_Change]) -> Suggestion | None:
    for change in changes:
        proven = _prove(change)
        if proven is not None:
            return proven
    return None


def _prove(change: _Change) -> Suggestion | None:
    s = change.setting
    names = ("spec", "parallel", "memory", "train", "data", "cluster", "residency")
    parts: dict[str, Any] = {name: getattr(s, name) for name in names}
    try:
        if s.memory.solve and not can_fit(make_setting(**parts)):
            return None
        ledger = build_ledger(**parts)
    except UserError:  # a layout that does not exist is no suggestion
        return None
    return Suggestion(overrides=change.overrides, reason=change.reason, ledger=ledger) if ledger.fits else None


def _stacked(setting: Setting) -> list[Suggestion]:
    """All that saves memory without other machines at once; then more nodes or shorter sequences on top of it."""
    base = _Change((), "", setting)
    for move in (_auto, _recompute, _reduce_each, _chunks, _small_loss_chunks, _shard_more, _states_on_host):
        base = _on_top(base, next(move(base.setting), None))
    if base.overrides and (proven := _prove(base)) is not None:
        return [proven]
    out = []
    for move in (_spread, _more_nodes, _shorter):
        proven = _first_that_fits(_on_top(base, change) for change in move(base.setting))
        if proven is not None:
            out.append(proven)
    return out


def _on_top(base: _Change, change: _Change | None) -> _Change:
    if change is None:
        return base
    return _Change(base.overrides + change.overrides, "; ".join(filter(None, (base.reason, change.reason))), change.setting)


def _auto(s: Setting) -> Iterator[_Change]:
    """Let the solver decide, first what is open, then also what was given."""
    given = [key for key in OPEN if getattr(s.memory, key) is not None]
    if s.memory.solve and not given:
        return
    overrides = tuple(f"memory.{key}=null" for key in (given if s.memory.solve else [key for key in given if key in _BESIDE]))
    memory = MemoryConfig(name="auto", solve=True, host_budget=s.memory.host_budget, offload_dir=s.memory.offload_dir, arena=s.memory.arena)
    if s.memory.solve:
        yield _Change(overrides, "the solver may choose what was given", replace(s, memory=memory))
    else:
        yield _Change(("memory=auto", *overrides), "what is kept, moved and recomputed is solved to the budget", replace(s, memory=memory))


def _states_on_host(s: Setting) -> Iterator[_Change]:
    if not s.residency.on_host:
        reason = "float32 weights and moments on the host and updated there; the time of that is not in the estimate"
        yield _Change(("optim.states=host",), reason, replace(s, residency=replace(s.residency, on_host=True)))


def _few_bits(s: Setting) -> Iterator[_Change]:
    if s.residency.moment_bytes is None and s.width < 8:
        changed = replace(s.residency, moment_bytes=MOMENT_BYTES["8bit"])
        yield _Change(("optim.state_dtype=8bit",), "moments in 8 bits: NOT EXACT", replace(s, residency=changed))


def _whole_host(s: Setting) -> Iterator[_Change]:
    if s.memory.host_budget is not None and s.memory.offload_dir is None:
        memory = replace(s.memory, host_budget=None)
        yield _Change(("memory.host_budget=null",), "all the host memory there is", replace(s, memory=memory))


def _recompute(s: Setting) -> Iterator[_Change]:
    if s.memory.solve:
        return
    if Place.KEEP in (s.memory.activations, s.memory.attention_output):
        policy = MemoryConfig(name="recompute", layer_input=Place.KEEP, attention_output=Place.RECOMPUTE, activations=Place.RECOMPUTE)
        yield _Change(("memory=recompute",), "layers run again in backward", replace(s, memory=policy))


def _chunks(s: Setting) -> Iterator[_Change]:
    if s.memory.activations is Place.KEEP or s.memory.solve:
        return
    for chunk in (16384, 4096, 1024):
        if chunk < min(s.tokens, s.memory.chunk_tokens or s.tokens):
            memory = replace(s.memory, chunk_tokens=chunk)
            yield _Change(
                (f"memory.chunk_tokens={format_tokens(chunk)}",), "norms, projections and MLP by chunks", replace(s, memory=memory)
            )


def _reduce_each(s: Setting) -> Iterator[_Change]:
    if s.parallel.grad_reduce is GradReduce.STEP and s.layout.num_micro_batches > 1:
        parallel = replace(s.parallel, grad_reduce=GradReduce.MICRO_BATCH)
        yield _Change(("parallel.grad_reduce=micro_batch",), "no whole gradients are kept", replace(s, parallel=parallel))


def _small_loss_chunks(s: Setting) -> Iterator[_Change]:
    for chunk in (1024, 512, 256):
        if chunk < s.train.loss_chunk_tokens:
            train = replace(s.train, loss_chunk_tokens=chunk)
            yield _Change((f"train.loss_chunk_tokens={chunk}",), "fewer logits at a time", replace(s, train=train))


def _shard_more(s: Setting) -> Iterator[_Change]:
    if s.parallel.replicate > 1:
        parallel = replace(s.parallel, replicate=1, shard=None)
        yield _Change(("parallel.replicate=1", "parallel.shard=null"), "weights are sharded over all ranks", replace(s, parallel=parallel))


def _spread(s: Setting) -> Iterator[_Change]:
    """Each sequence over more of the ranks there are: fewer tokens on each."""
    degree = s.layout.sp_degree
    while 2 * degree <= s.layout.world_size:
        degree *= 2
        tokens = -(-s.data.max_seq_len // degree)
        overrides, parallel = _over(s, degree, tokens)
        yield _Change(overrides, f"each sequence over {degree} ranks", replace(s, parallel=parallel))
    least = -(-s.data.max_seq_len // s.layout.sp_degree)
    if least < s.parallel.tokens_per_rank:
        parallel = replace(s.parallel, tokens_per_rank=least)
        yield _Change((f"parallel.tokens_per_rank={format_exact(least)}",), "one sequence a group at a time", replace(s, parallel=parallel))


def _over(s: Setting, degree: int, tokens: int) -> tuple[tuple[str, ...], ParallelConfig]:
    """What puts the longest sequence over `degree` ranks. Adaptive plans choose degrees themselves, by what a rank may hold."""
    adaptive = s.parallel.sequence is SequenceMode.ADAPTIVE
    overrides = (*(() if adaptive else (f"parallel.sp_degree={degree}",)), f"parallel.tokens_per_rank={format_exact(tokens)}")
    return overrides, replace(s.parallel, sp_degree=None if adaptive else degree, tokens_per_rank=tokens)


def _more_nodes(s: Setting) -> Iterator[_Change]:
    for factor in (2, 4, 8, 16, 32, 64):
        nodes = s.cluster.num_nodes * factor
        world = nodes * s.cluster.ranks_per_node
        degree = 1 << (world.bit_length() - 1)
        tokens = max(1, -(-s.data.max_seq_len // degree))
        spread, parallel = _over(s, degree, tokens)
        parallel, overrides = replace(parallel, shard=None), [f"cluster.num_nodes={nodes}", *spread]
        if s.parallel.shard is not None:
            overrides.append("parallel.shard=null")
        yield _Change(tuple(overrides), f"{world} ranks", replace(s, parallel=parallel, cluster=replace(s.cluster, num_nodes=nodes)))


def _shorter(s: Setting) -> Iterator[_Change]:
    length = s.data.max_seq_len
    for _ in range(16):
        length //= 2
        if length < s.layout.sp_degree:
            return
        tokens = -(-length // s.layout.sp_degree)
        spread, parallel = _over(s, s.layout.sp_degree, tokens)
        data, overrides = replace(s.data, max_seq_len=length), (f"data.max_seq_len={format_exact(length)}", *spread)
        yield _Change(overrides, "shorter sequences", replace(s, data=data, parallel=parallel))


_SINGLE: tuple[_Move, ...] = (
    _auto,
    _recompute,
    _chunks,
    _whole_host,
    _reduce_each,
    _small_loss_chunks,
    _shard_more,
    _states_on_host,
    _spread,
    _more_nodes,
    _shorter,
    _few_bits,
)


def format_exact(num_tokens: int) -> str:
    """As a person types it: 128K where exact, plain digits otherwise."""
    return format_tokens(num_tokens).replace(",", "")


def check_fits(ledger: Ledger) -> None:
    """PlanError where the solver found no policy that fits: what is there whatever the policy, the least that works, what to type."""
    report = ledger.report
    if report is None or report.feasible:
        return
    short = [account for account in ledger.accounts if not account.fits]
    missing = " and ".join(
        f"{format_bytes(account.peak_bytes - account.capacity_bytes)} too little on each {_place(account)}" for account in short
    )
    options = [" ".join(entry.overrides) for entry in suggest(ledger, most=2)]
    if report.least_budget is not None:
        options.append(report.least_budget)
    raise PlanError(
        "memory.solve",
        found=f"no policy that fits: {missing} for the one that needs least; {fixed_line(report)}",
        expected="room for what no policy changes and for the smallest pieces of the rest",
        hint=", or ".join(options) or "more nodes, a smaller model or shorter sequences; efflaunch plan shows what takes the room",
    )


def check_budget(ledger: Ledger) -> None:
    """PlanError where a given policy moves more to the host than memory.host_budget allows. (A solved one is `check_fits`'s.)"""
    budget = ledger.budget
    if budget is None or budget.fits or ledger.setting.memory.solve:
        return
    least = -(-budget.peak_bytes // _MIB)
    options = [" ".join(entry.overrides) for entry in suggest(ledger, most=2)]
    raise PlanError(
        "memory.host_budget",
        found=format_bytes(budget.capacity_bytes),
        expected=f"at least {format_bytes(budget.peak_bytes)} for what memory={ledger.setting.memory.name} and optim.states put there "
        f"({', '.join(f'{entry.name} {format_bytes(entry.num_bytes)}' for entry in budget.terms)})",
        hint=", or ".join([f"memory.host_budget={least}MiB", *options]),
    )


def _place(account: Account) -> str:
    return {"host": "node"}.get(account.name, account.name)
