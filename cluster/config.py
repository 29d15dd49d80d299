"""The machines a plan is made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Protocol

from ..units import Bytes
from ..utils.ranges import BYTES, PER_S, Range, check_ranges
from .attention_rates import check_gpu
from .slurm_site import SlurmSite


class Device(Enum):
    """What a rank computes on."""

    CUDA = "cuda"
    CPU = "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """The machines a plan is made for; every number of time comes from here until it is measured."""

    name: str
    device: Device
    num_nodes: int
    ranks_per_node: int
    """GPUs of a node, or processes on a CPU machine."""
    device_memory_bytes: Bytes
    """Memory that one GPU gives out (CUDA's total, which is less than its data sheet's), or one CPU rank's share."""
    host_memory_bytes: Bytes
    """Host memory of one node."""
    peak_flops: float
    """Dense bfloat16 FLOP/s of one rank, by its data sheet."""
    gemm_efficiency: float
    """Share of peak_flops that matrix products reach, with norms, rotations and activations between them; an assumption of estimates."""
    intra_node_bandwidth: float
    """Bytes/s of one rank to another of its node, one direction."""
    inter_node_bandwidth: float
    """Bytes/s of one rank to another node, one direction."""
    host_link_bandwidth: float
    """Bytes/s between one GPU and host memory, each way, all GPUs of the node copying at once; a profile's measured rates go before it."""
    device_memory_bandwidth: float | None = None
    """Bytes/s that the optimizer's update reads and writes on one GPU. null: host_memory_bandwidth's share without GPUs; with them the
    update takes no time in estimates, which then say so."""
    host_memory_bandwidth: float | None = None
    """Bytes/s that an update on the processors of one node reads and writes, all ranks together. null: it takes no time in estimates."""
    disk_write_bandwidth: float | None = None
    """Bytes/s that the disk under memory.offload_dir takes, all ranks of a node together. null: as fast as host_link_bandwidth."""
    disk_read_bandwidth: float | None = None
    """Bytes/s that it gives, all ranks of a node together. null: as fast as host_link_bandwidth."""
    storage_bandwidth: float | None = None
    """Bytes/s that one node writes to where checkpoints go, all nodes writing at once. null: not known before the first one."""
    gpu: str | None = None
    """Kind of GPU, by which published speeds of attention kernels are known (cluster/attention_rates.py): a100, h100, h200 or b200."""
    attention_efficiency: float | None = None
    """Share of peak_flops that attention reaches, forward and backward alike. null: what is published for cluster.gpu and the kernel."""
    reserve: float = 0.05
    """Share of device_memory_bytes that no plan uses: head-room for what estimates miss, which plans show as a row of its own."""
    slurm: SlurmSite = field(default_factory=SlurmSite)

    RANGES: ClassVar[Mapping[str, Range]] = {
        "num_nodes": Range(1, 65_536),
        "ranks_per_node": Range(1, 1024),
        "device_memory_bytes": Range(1, BYTES),
        "host_memory_bytes": Range(1, BYTES),
        "peak_flops": Range(0, 1e21, above=True),
        "gemm_efficiency": Range(0, 1, above=True),
        "attention_efficiency": Range(0, 1, above=True),
        "intra_node_bandwidth": Range(0, PER_S, above=True),
        "inter_node_bandwidth": Range(0, PER_S, above=True),
        "host_link_bandwidth": Range(0, PER_S, above=True),
        "device_memory_bandwidth": Range(0, PER_S, above=True),
        "host_memory_bandwidth": Range(0, PER_S, above=True),
        "disk_write_bandwidth": Range(0, PER_S, above=True),
        "disk_read_bandwidth": Range(0, PER_S, above=True),
        "storage_bandwidth": Range(0, PER_S, above=True),
        "reserve": Range(0, 0.5),
    }


class Machines(Protocol):
    """Facts of the cluster that a layout has to know."""

    @property
    def num_nodes(self) -> int: ...

    @property
    def ranks_per_node(self) -> int: ...


def check_cluster(cluster: ClusterConfig) -> None:
    """Raise ConfigError where a count, a speed or a memory is out of its range, or nothing tells how fast attention is."""
    check_ranges(cluster, "cluster")
    check_gpu(cluster.gpu, has_own_rate=cluster.attention_efficiency is not None)
