"""Measures what a node moves per second with all its ranks at it: the host's links, the disk, and optimizer updates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from ...cluster.rates import Copies, MachineRates
from ...estimate.timing.update import adam_bytes
from ...memory.offload.checks import check_offload_dir
from ...memory.offload.measure_bandwidth import COPY_BYTES, ROUNDS, measure_directory, measure_host_link
from ...parallel.topology import whole_world

NUMBERS = 8 << 20
"""Weights of a timed update: with gradient and moments more than a processor's caches hold."""
FILE_BYTES = 128 << 20
"""Bytes of each rank's file, for a second of these probes; 1 GiB at most."""


def measure_rates(device: torch.device, ranks_per_node: int, directory: str | None, seconds: float) -> MachineRates:
    """Measure a node's rates in about `seconds`, every rank at once; `directory`: memory.offload_dir. Collective over all ranks.

    ConfigError where the directory cannot be used.
    """
    world = whole_world()

    def together() -> None:
        dist.barrier(group=world)

    share = seconds / (4 if directory is not None else 3)
    # A process that stands for a GPU has a small share of the machine's memory.
    copy_bytes = COPY_BYTES if device.type == "cuda" else COPY_BYTES // 4
    link = measure_host_link(device, share, copy_bytes=copy_bytes, together=together)
    disk = None if directory is None else _measure_disk(directory, ranks_per_node, share, seconds, together)
    on_device = measure_update(device, share / 2, together=together)
    on_host = on_device if device.type == "cpu" else measure_update(torch.device("cpu"), share / 2, together=together)
    rows: list[tuple[Copies, Copies | None, float, float]] = [(link, disk, on_device, on_host)] * dist.get_world_size(world)
    dist.all_gather_object(rows, rows[0], group=world)
    return MachineRates(
        device=device.type,
        ranks_per_node=ranks_per_node,
        link=tuple(row[0] for row in rows),
        disk=tuple(row[1] for row in rows if row[1] is not None),
        directory=directory,
        device_update=min(row[2] for row in rows),
        host_update=min(row[3] for row in rows),
    )


def _measure_disk(directory: str, ranks: int, share: float, seconds: float, together: Callable[[], object]) -> Copies:
    file_bytes = max(2 * COPY_BYTES, min(1 << 30, int(seconds * FILE_BYTES)))
    check_offload_dir(directory, file_bytes, ranks)
    together()
    return measure_directory(directory, share, file_bytes=file_bytes, together=together)


def measure_update(
    device: torch.device, seconds: float, *, num_numbers: int = NUMBERS, together: Callable[[], object] = lambda: None
) -> float:
    """Bytes per second that a norm and torch's fused AdamW read and write over `num_numbers` float32 weights; the median of ROUNDS."""
    weights = torch.nn.Parameter(torch.ones(num_numbers, device=device))
    weights.grad = torch.ones_like(weights)
    optimizer = torch.optim.AdamW([weights], lr=1e-9, fused=True)
    optimizer.step()
    rates = []
    for _ in range(ROUNDS):
        together()
        rates.append(_updates_per_s(optimizer, weights.grad, seconds / ROUNDS) * num_numbers * (adam_bytes(4, 4) + 4))
    return statistics.median(rates)


def _updates_per_s(optimizer: torch.optim.Optimizer, gradient: torch.Tensor, seconds: float) -> float:
    device, begun, count = gradient.device, time.perf_counter(), 0
    while True:
        torch.linalg.vector_norm(gradient)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        count += 1
        elapsed = time.perf_counter() - begun
        if elapsed >= seconds:
            return count / max(elapsed, 1e-9)
