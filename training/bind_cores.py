"""Keeps a rank on the cores beside its GPU, so that host memory it touches first is on their side of the socket link too.

Without it half the ranks of a node with two sockets may copy activations and update weights through the link between them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Set
from pathlib import Path
from typing import TYPE_CHECKING

from ..cluster.numa import SYSFS, cores_of, numa_node

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def bind_to_gpu(device: torch.device, ranks: int) -> None:
    """Bind this process to cores of its GPU's NUMA node among those it may use: the thread that calls, and those it starts from then on.

    A rank calls it before its process group, whose threads would stay where they are.
    """
    import torch

    if not hasattr(os, "sched_setaffinity"):
        log.info("ranks are not bound to cores: this system cannot")
        return
    properties = torch.cuda.get_device_properties(device)
    bus = tuple(getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
    log.info(bound(bus, os.sched_getaffinity(0), lambda cores: os.sched_setaffinity(0, cores), ranks=ranks))


def bound(bus: tuple[int | None, ...], allowed: Set[int], bind: Callable[[Set[int]], None], sysfs: Path = SYSFS, *, ranks: int) -> str:
    """Bind to the cores beside the device at `bus` (domain, bus, device) that are `allowed`; returns what the log says of it.

    Not to fewer than the share of one of the `ranks` of the node among those allowed: ranks would wait for each other's cores.
    """
    known = [part for part in bus if part is not None]
    if len(known) < len(bus):
        return "ranks are not bound to cores: this torch does not say where the GPU is"
    address = "{:04x}:{:02x}:{:02x}.0".format(*known)
    node = numa_node(address, sysfs)
    cores = None if node is None else cores_of(node, sysfs)
    if cores is None:
        return f"ranks are not bound to cores: the system does not say which are beside GPU {address}"
    mine = cores & allowed
    if not mine:
        return f"ranks are not bound to cores: none of NUMA node {node}, where GPU {address} is, is among those given to this process"
    if ranks * len(mine) < len(allowed):
        beside = f"only {len(mine)} of the {len(allowed)} given to this process are on NUMA node {node}, beside GPU {address}"
        return f"ranks are not bound to cores: {beside}, fewer than the share of one of {ranks} ranks"
    bind(mine)
    return f"bound to {len(mine)} cores of NUMA node {node}, beside GPU {address}"
