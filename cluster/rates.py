"""Holds what a node's links, disk and optimizer were measured to move per second, all ranks at once. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Copies:
    """Bytes per second of one rank, while every other rank of its node copied too."""

    out: float
    """Bytes per second from the device to host memory, or written to a disk."""
    back: float
    both_out: float
    """Bytes per second out while copies go both ways at one time."""
    both_back: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineRates:
    """One kind of node, as `efflaunch profile` found it."""

    device: str
    """`cuda` or `cpu`."""
    ranks_per_node: int
    link: tuple[Copies, ...]
    """Rates between device and host memory, by rank."""
    disk: tuple[Copies, ...] = ()
    """Rates to and from `directory`, by rank."""
    directory: str | None = None
    """memory.offload_dir, where it was given."""
    device_update: float
    """Bytes per second that AdamW reads and writes on a device: the slowest rank's."""
    host_update: float
    """Bytes per second that AdamW reads and writes in host memory, on the cores of one rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredRates:
    """Rates that stand in place of a cluster's figures, and where they are from."""

    rates: MachineRates
    source: str
    """Source of the rates, for messages: the file, the hardware and when."""
