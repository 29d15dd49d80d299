"""Chooses how many nodes an attempt runs on: launcher.nodes=MIN:MAX, and a layout and a memory plan that work there. Pure.

Note: what an attempt does with it. Whoever begins one (`launcher/slurm/job.py`, the driver of `launcher/ray/`)

1. counts the nodes it could use now: those it was given, less the lost and the excluded;
2. asks `size_for(read_run(run_dir).config, available)`. Always from run.yaml, which says what was asked for: a run that
   shrank grows back to what it was, not to something made from what it had shrunk to;
3. `Sizing.num_nodes == 0`: does not begin; waits for nodes, or gives what it has back to the scheduler. A ConfigError:
   ends the run with 93, no number of nodes in the range works;
4. else writes `rundir.write_attempt(run_dir, number, sizing.config)`, starts agents on the first `num_nodes` of its nodes,
   and records num_nodes, world_size and hosts in state.Attempt. Agents and ranks read `rundir.read_attempt(run_dir,
   number)`, which is run.yaml where an attempt has no configuration of its own. `changes` are lines for the log.

The documents of a step depend on data.global_batch_tokens and the seed alone, and the loss is divided by the step's own
number of targets, so another number of nodes changes gradients by rounding, and neither order nor batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ..errors import ConfigError, UserError
from ..parallel.config import ParallelConfig
from ..utils.divisors import nearest_divisor
from .config.node_range import NodeRange, _with_nodes, node_range
from .config.run_config import Config

MemoryCheck = Callable[[Config], None]
"""UserError where a configuration does not fit into the memory of its nodes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizing:
    """The decision for one attempt."""

    num_nodes: int
    """0: wait for more."""
    config: Config
    """Configuration of the attempt: the run's, with layout and memory plan of this many nodes; the run's own while waiting."""
    reason: str
    """Why this number of nodes was chosen, as a sentence."""

    @property
    def waits(self) -> bool:
        return self.num_nodes == 0


def size_for(config: Config, available: int, room: MemoryCheck | None = None) -> Sizing:
    """The most nodes up to `available` for which layout and memory work. `config` is the run's own.

    Waits (`Sizing.waits`) where only more nodes than are there would do. ConfigError where none of launcher.nodes works at
    all. One number of nodes is taken as it is: `start.launch` has looked at it.
    """
    wanted, room = node_range(config), room or check_nodes_memory
    if wanted.least == wanted.most:
        if available < wanted.most:
            return _wait(config, f"{_nodes(available)} available, {wanted} needed")
        return Sizing(num_nodes=wanted.most, config=config, reason=_nodes(wanted.most))
    passed: list[str] = []
    for num_nodes in range(min(available, wanted.most), wanted.least - 1, -1):
        planned = _tried(config, num_nodes, room, passed)
        if planned is not None:
            return Sizing(num_nodes=num_nodes, config=planned, reason=_chosen(num_nodes, wanted, available, passed))
    for num_nodes in range(max(available + 1, wanted.least), wanted.most + 1):
        if _tried(config, num_nodes, room, passed) is not None:
            beside = f"; {passed[0]}" if passed else ""
            return _wait(config, f"{_nodes(available)} available, {num_nodes} needed at least{beside}")
    raise _impossible(wanted, passed)


def usable(config: Config, room: MemoryCheck | None = None) -> NodeRange:
    """The smallest and the largest of launcher.nodes that work: what to ask a scheduler for. ConfigError where none does."""
    wanted, room = node_range(config), room or check_nodes_memory
    if wanted.least == wanted.most:
        return wanted
    most = size_for(config, wanted.most, room).num_nodes
    passed: list[str] = []
    least = next(n for n in range(wanted.least, most + 1) if n == most or _tried(config, n, room, passed) is not None)
    return NodeRange(least, most)


def sized(config: Config, num_nodes: int, room: MemoryCheck | None = None) -> Config:
    """The run's configuration on so many nodes; the UserError of the best layout where none fits.

    What was given stays as far as it can; then, in this order: copies of the weights follow the ranks, the SP degree is
    chosen anew, ranks hold more tokens. A solved memory policy is solved again by whoever uses the result.
    """
    room = room or check_nodes_memory
    if num_nodes == config.cluster.num_nodes:
        _check_layout(config)
        room(config)
        return config
    error: UserError | None = None
    for parallel in _layouts(config, num_nodes):
        candidate = replace(_with_nodes(config, num_nodes), parallel=parallel)
        try:
            _check_layout(candidate)
        except UserError as refused:
            error = error or refused
            continue
        try:
            room(candidate)
            return candidate
        except UserError as refused:
            error = refused
    assert error is not None, "there is one layout at least"
    raise error


def _layouts(config: Config, num_nodes: int) -> Iterator[ParallelConfig]:
    """Ways to lay the run over the ranks of so many nodes, the nearest to what was asked for first."""
    world = num_nodes * config.cluster.ranks_per_node
    kept = _weights(config.parallel, world)
    yield kept
    free = replace(kept, sp_degree=None)
    if free != kept:
        yield free
    # The largest group there can be has to hold the longest sequence.
    tokens = -(-config.data.max_seq_len // (1 << (world.bit_length() - 1)))
    if tokens > kept.tokens_per_rank:
        yield replace(free, tokens_per_rank=tokens)


def _weights(parallel: ParallelConfig, world: int) -> ParallelConfig:
    """Weights over `world` ranks: a given number of ranks that share a copy stays, and the number of copies follows; else the reverse."""
    if parallel.shard is not None and parallel.replicate > 1 and world % parallel.shard == 0:
        return replace(parallel, replicate=world // parallel.shard)
    return replace(parallel, replicate=nearest_divisor(world, parallel.replicate), shard=None)


def _check_layout(config: Config) -> None:
    from .config.checks import check_config

    check_config(config)


def check_nodes_memory(config: Config) -> None:
    """UserError where memory does not suffice. What a person asked for by itself may run where only an upper bound is too large."""
    from ..estimate.solver.report import fixed_line
    from ..units import format_bytes
    from .config.ledger import plan

    if config.cluster.num_nodes == node_range(config).most:
        from .checks import check_memory_plan

        check_memory_plan(config)
        return
    ledger = plan(config)
    short = [account for account in ledger.accounts if not account.fits]
    if short:
        # Without the suggestions of check_fits, which are made for one size and take a while.
        worst = short[0]
        fixed = f": {fixed_line(ledger.report)}" if ledger.report is not None else ""
        shortfall = f"{format_bytes(worst.peak_bytes)} at least on each {worst.name} of {format_bytes(worst.usable_bytes)}{fixed}"
        raise ConfigError("memory", found=shortfall, expected="a plan that fits", hint="memory=auto, or a larger MIN of launcher.nodes")


def _tried(config: Config, num_nodes: int, room: MemoryCheck, passed: list[str]) -> Config | None:
    try:
        return sized(config, num_nodes, room)
    except UserError as error:
        passed.append(f"{_nodes(num_nodes)} would not do ({error.where}: {error.found})")
        return None


def _wait(config: Config, reason: str) -> Sizing:
    return Sizing(num_nodes=0, config=config, reason=reason)


def _chosen(num_nodes: int, wanted: NodeRange, available: int, passed: list[str]) -> str:
    return "; ".join([f"{_nodes(num_nodes)} of launcher.nodes={wanted}, {available} available", *passed[:1]])


def _impossible(wanted: NodeRange, passed: list[str]) -> ConfigError:
    reasons = "; ".join(passed[:3]) + ("; ..." if len(passed) > 3 else "")
    hint = "efflaunch plan +experiment=... cluster.num_nodes=N shows what takes the room; memory=auto, or a larger MAX"
    return ConfigError(
        "launcher.nodes", found=f"{wanted}, where {reasons}", expected="a number of nodes the run can be laid over", hint=hint
    )


def _nodes(count: int) -> str:
    return f"{count} node{'s' * (count != 1)}"
