"""Opens the store that a run's settings ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from .cuda import CudaDevice, CudaPinner
from .device import OffloadDevice, PlainDevice
from .file_blocks import OffloadFile, WriteMeter, warn_slow
from .file_store import FileStore
from .host_pool import HostArena
from .host_store import ArenaStore, HostStore
from .staging import PIECE_BYTES, STAGING_BYTES, Staging, staging_bytes_for

IN_FLIGHT_BYTES = 1 << 30


def open_store(
    *,
    device: torch.device,
    capacity_bytes: int,
    offload_dir: str | None = None,
    in_flight_bytes: int = IN_FLIGHT_BYTES,
    staging_bytes: int = STAGING_BYTES,
    piece_bytes: int = PIECE_BYTES,
    expected_write_bytes_per_s: float | None = None,
    on_slow: Callable[[float, float], None] | None = None,
) -> HostStore:
    """A store of `capacity_bytes` of this rank's host memory, or of a file in `offload_dir`, all of it taken now.

    Host memory is pinned where `device` is a GPU, plain where it is the CPU. ConfigError where it cannot be had; checks.py says
    so for all ranks of a node before any of them starts.
    in_flight_bytes: device memory that waits for its copy to the host at most, or one parcel if that is more.
    With files: at most `staging_bytes` of host memory in pieces of `piece_bytes` (a power of two), of which parcels are made up;
    on_slow(measured, expected) is called once if writes are slower than expected_write_bytes_per_s (default: it is logged).
    """
    pinner = CudaPinner(device) if device.type == "cuda" else None
    if offload_dir is None:
        return ArenaStore(HostArena(capacity_bytes, pinner=pinner), device_for(device), in_flight_bytes)
    directory = Path(offload_dir)
    file = OffloadFile(directory, capacity_bytes)
    meter = WriteMeter(expected_write_bytes_per_s, on_slow or warn_slow(directory))
    slots = HostArena(staging_bytes_for(capacity_bytes, staging_bytes, piece_bytes), block_bytes=piece_bytes, pinner=pinner)
    return FileStore(file, Staging(slots), device_for(device), in_flight_bytes=in_flight_bytes, meter=meter)


def device_for(device: torch.device) -> OffloadDevice:
    """The streams of a device."""
    return CudaDevice(device) if device.type == "cuda" else PlainDevice()
