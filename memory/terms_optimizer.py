"""Optimizer states and what is left of gradients once they are taken, on the device and on the host. Pure."""

from __future__ import annotations

from .residency import IN_FLIGHT
from .setting import BACKWARD, Phase, Setting, Term, reduces_once, term


def weight_bytes(s: Setting) -> int:
    """Of one weight on the device, sharded: the master, or in compute precision where masters live on the host."""
    return s.width if s.residency.on_host else s.master


def optimizer_states(s: Setting) -> Term:
    """On the device, of one rank."""
    each = 0.0 if s.residency.on_host else s.residency.state_bytes(s.master)
    kind = f"two float{8 * s.master} moments" if s.residency.moment_bytes is None else f"two moments of {each / 2:.3g} bytes a number"
    return term("optimizer states", f"{kind}, 1/{s.layout.shard} of each", each * s.parameters / s.layout.shard)


def adds_up(s: Setting) -> bool:
    """Whether reduced gradients of several micro-batches are added."""
    return s.layout.num_micro_batches > 1 and not reduces_once(s)


def gradients_left(s: Setting, all_of_them: Term) -> Term:
    """Of sharded gradients that stay on the device to the end of the step, those that are still there."""
    layer, root = s.master * s.layer_parameters // s.layout.shard, s.master * s.root_parameters // s.layout.shard
    if s.residency.on_host:
        cast = s.width * s.layer_parameters // s.layout.shard if s.width < s.master else 0
        held = dict.fromkeys(BACKWARD, min(IN_FLIGHT * layer, s.spec.num_layers * layer) + cast) | {Phase.REDUCE: root + layer}
        return Term(all_of_them.name, "on their way to the host, a few layers at a time", held)
    if s.residency.in_backward:
        if adds_up(s):
            return Term(all_of_them.name, all_of_them.note, all_of_them.by_phase | {Phase.OPTIMIZER: 0})
        return Term(all_of_them.name, "freed layer by layer", dict.fromkeys(BACKWARD, layer) | {Phase.REDUCE: root})
    return all_of_them


def host_optimizer_bytes(s: Setting) -> int:
    """On the host, of one rank: weights, moments, gradients that wait or add up, and page-locked buffers for what travels."""
    if not s.residency.on_host:
        return 0
    held = s.master if not s.residency.in_backward or adds_up(s) else 0
    moving = (s.master + s.width) * (IN_FLIGHT * s.layer_parameters + s.root_parameters)
    return int((s.parameters * (s.residency.state_bytes(s.master) + held) + moving) / s.layout.shard)
