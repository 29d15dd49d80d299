"""The environment ranks are given. The only place of launcher/ that reads it."""

from __future__ import annotations

import os
import socket

from ..memory.config import Arena
from ..parallel.config import Device
from .config import Backend, Config

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Where a user sets torch's CUDA allocator, today and before."""


def rank_environment(config: Config) -> dict[str, str]:
    """Variables to set in an agent, which its ranks inherit. What the user has set for the network or torch's allocator stays."""
    values = {
        "OMP_NUM_THREADS": str(config.launcher.threads_per_rank),
        "TOKENIZERS_PARALLELISM": "false",
        # Elastic insists on handling some signal itself; every one that matters is the agent's own.
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGXCPU",
    }
    if config.launcher.backend is Backend.LOCAL and "GLOO_SOCKET_IFNAME" not in os.environ:
        values |= _loopback()
    if config.cluster.device is Device.CUDA and config.memory.arena is Arena.DEFAULT and not any(name in os.environ for name in ALLOCATOR):
        # Segments that grow: blocks of one length leave no holes that those of the next do not fit.
        values["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return values


def _loopback() -> dict[str, str]:
    for _, name in socket.if_nameindex():
        if name in ("lo", "lo0"):
            return {"GLOO_SOCKET_IFNAME": name}
    return {}
