"""Opens the store that a run's settings ask for."""

from __future__ import annotations

import torch

from .arena import HostArena
from .cuda import CudaDevice, CudaPinner
from .device import Device, PlainDevice
from .store import ArenaStore, HostStore

IN_FLIGHT_BYTES = 1 << 30


def open_store(*, device: torch.device, capacity_bytes: int, in_flight_bytes: int = IN_FLIGHT_BYTES) -> HostStore:
    """A store of `capacity_bytes` of this rank's host memory: pinned now where `device` is a GPU, plain where it is the CPU.

    in_flight_bytes: device memory that waits for its copy to the host at most, or one parcel if that is more.
    """
    pinner = CudaPinner(device) if device.type == "cuda" else None
    return ArenaStore(HostArena(capacity_bytes, pinner=pinner), device_for(device), in_flight_bytes)


def device_for(device: torch.device) -> Device:
    """The streams of a device."""
    return CudaDevice(device) if device.type == "cuda" else PlainDevice()
