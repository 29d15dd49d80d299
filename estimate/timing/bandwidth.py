"""Bytes per second between a rank and where its activations and optimizer states wait, all ranks of its node at once. Pure.

What a profile measured goes before the cluster's figures; each rate says where it is from.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...cluster.rates import Copies
from ..plan_inputs import PlanInputs


@dataclass(frozen=True, slots=True)
class Link:
    """One rank's share of a link or a disk, in bytes per second."""

    out: float
    """Bytes per second from the device."""
    back: float
    shared: float
    """What of the shorter of two transfers adds to the longer when both are under way: 0, each way has its own; 1, they take turns."""
    source: str
    """Where the figures are from."""

    def seconds(self, out_bytes: float, back_bytes: float = 0.0) -> float:
        """Seconds for so many bytes out and so many back, started together."""
        out, back = out_bytes / self.out, back_bytes / self.back
        return max(out, back) + self.shared * min(out, back)

    @property
    def both(self) -> float:
        """Bytes per second of each direction, while as much goes the other way."""
        return 1.0 / self.seconds(1.0, 1.0)


def host_link(inputs: PlanInputs) -> Link:
    """Between device and host memory."""
    if inputs.measured is not None:
        return _slowest(inputs.measured.rates.link, inputs.measured.source)
    rate = inputs.cluster.host_link_bandwidth
    return Link(rate, rate, 0.0, "cluster.host_link_bandwidth")


def offload_link(inputs: PlanInputs) -> Link:
    """Between device and where the policy moves rows: host memory, or through it to files, which go no faster than the link."""
    link = host_link(inputs)
    if inputs.policy.offload_dir is None:
        return link
    disk = _disk_way(inputs, link)
    return Link(min(link.out, disk.out), min(link.back, disk.back), max(link.shared, disk.shared), disk.source)


def _disk_way(inputs: PlanInputs, link: Link) -> Link:
    measured = inputs.measured
    if measured is not None and measured.rates.disk and measured.rates.directory == inputs.policy.offload_dir:
        return _slowest(measured.rates.disk, measured.source)
    ranks, cluster = inputs.layout.ranks_per_node, inputs.cluster
    written, read = cluster.disk_write_bandwidth, cluster.disk_read_bandwidth
    if written is None and read is None:
        return Link(link.out, link.back, link.shared, f"no figure of the disk is given, so the link's: {link.source}")
    given = [name for name, rate in (("disk_write_bandwidth", written), ("disk_read_bandwidth", read)) if rate is not None]
    out = link.out if written is None else written / ranks
    back = link.back if read is None else read / ranks
    # A disk does one thing after the other.
    return Link(out, back, 1.0, f"{' and '.join(f'cluster.{name}' for name in given)} over {ranks} ranks")


def _slowest(rows: tuple[Copies, ...], source: str) -> Link:
    """The step waits for the slowest rank."""
    out, back = min(row.out for row in rows), min(row.back for row in rows)
    both = min(min(row.both_out, row.both_back) for row in rows)
    longer, shorter = max(1 / out, 1 / back), min(1 / out, 1 / back)
    return Link(out, back, min(1.0, max(0.0, (1 / both - longer) / shorter)), source)


def gb_per_s(bytes_per_s: float) -> str:
    """`50 GB/s`, `2,700 GB/s`"""
    return f"{bytes_per_s / 1e9:,.0f} GB/s" if bytes_per_s >= 1e11 else f"{bytes_per_s / 1e9:.3g} GB/s"


@dataclass(frozen=True, slots=True)
class UpdateRate:
    """Bytes per second that a rank's optimizer update reads and writes; None: not known."""

    bytes_per_s: float | None
    source: str
    """Where the figure is from, or what would give one."""


def device_update_rate(inputs: PlanInputs) -> UpdateRate:
    """Rate of an update on the device."""
    if inputs.measured is not None:
        return UpdateRate(inputs.measured.rates.device_update, inputs.measured.source)
    if inputs.cluster.device_memory_bandwidth is not None or inputs.on_gpu:
        return UpdateRate(inputs.cluster.device_memory_bandwidth, "cluster.device_memory_bandwidth")
    return host_update_rate(inputs)


def host_update_rate(inputs: PlanInputs) -> UpdateRate:
    """Rate of an update on a rank's part of its node's processors."""
    if inputs.measured is not None:
        return UpdateRate(inputs.measured.rates.host_update, inputs.measured.source)
    whole, ranks = inputs.cluster.host_memory_bandwidth, inputs.layout.ranks_per_node
    return UpdateRate(None if whole is None else whole / ranks, f"cluster.host_memory_bandwidth over {ranks} ranks")
