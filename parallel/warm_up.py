"""Uses every group of a rank once before anything is planned or trained, so that its communicator and buffers are there.

NCCL makes a communicator, and the buffers of each kind of transfer, at first use: in the middle of a step, when the device's memory is
full, and in seconds that count as training. The first batch of sends and receives of a group must also have all its ranks
(torch.distributed.batch_isend_irecv), and a ring's rank without rows sends nothing.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..units import format_bytes
from .topology import Topology, groups_of

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What a rank's groups took."""

    num_groups: int
    time_s: float
    device_bytes: int
    """Device memory taken meanwhile, beside the allocator's; 0 on a CPU."""


def warm_up(topology: Topology, device: torch.device) -> WarmUp:
    """Use every group of this rank as steps do. Collective over all ranks.

    Every rank is in at most one group of each kind, and takes the kinds in one order: no rank waits for one that waits for it.
    """
    begun, before = time.perf_counter(), _used_bytes(device)
    groups = {group.group_name: group for group in groups_of(topology)}
    sequence = {group.group_name for group in topology.groups.values()}
    for name, group in groups.items():
        _sum_once(group, device)
        if name in sequence:
            _exchange_once(group, device)
            _hop_once(group, device)
    done = WarmUp(len(groups), time.perf_counter() - begun, max(0, _used_bytes(device) - before))
    if topology.rank == 0:
        taken = f", {format_bytes(done.device_bytes)} of device memory" if device.type == "cuda" else ""
        log.info("%d groups of ranks ready after %.1f s%s", done.num_groups, done.time_s, taken)
    return done


def _sum_once(group: ProcessGroup, device: torch.device) -> None:
    import torch
    import torch.distributed as dist

    total = torch.ones(1, device=device)
    dist.all_reduce(total, group=group)
    assert int(total) == group.size(), "every rank of the group takes part"


def _exchange_once(group: ProcessGroup, device: torch.device) -> None:
    import torch
    import torch.distributed as dist

    sent = torch.full((group.size(),), float(group.rank()), device=device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    assert received.tolist() == list(range(group.size())), "a number comes from every rank"


def _hop_once(group: ProcessGroup, device: torch.device) -> None:
    import torch
    import torch.distributed as dist

    size, rank = group.size(), group.rank()
    sent, received = torch.full((1,), float(rank), device=device), torch.empty(1, device=device)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, sent, group=group, group_peer=(rank + 1) % size),
            dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % size),
        ]
    )
    for work in works:
        work.wait()
    assert int(received) == (rank - 1) % size, "the number of the rank before"


def _used_bytes(device: torch.device) -> int:
    """Device memory in use that is not the allocator's; waits for the device."""
    if device.type != "cuda":
        return 0
    import torch

    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
