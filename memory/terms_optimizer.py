"""Optimizer states, on the device and on the host. Pure."""

from __future__ import annotations

from .setting import Setting, Term, term


def optimizer_states(s: Setting) -> Term:
    """On the device, of one rank."""
    return term(
        "optimizer states", f"two float{8 * s.master} moments, 1/{s.layout.shard} of each", 2 * s.master * s.parameters / s.layout.shard
    )


def host_optimizer_bytes(s: Setting) -> int:
    """On the host, of one rank: none, states live on the device."""
    return 0
