"""Configuration of the launcher, and of a run as a whole. Imports neither torch nor Hydra."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Protocol

from ...checkpoint.config import CheckpointConfig
from ...cluster.config import ClusterConfig
from ...memory.config import MemoryConfig
from ...model.adapters.config import NO_ADAPTER, AdapterConfig
from ...model.config import ModelConfig
from ...parallel.config import ParallelConfig
from ...parallel.sharding.config import EngineConfig
from ...training.config import TrainConfig
from ...training.data.config import DataConfig
from ...training.evaluation.config import EvalConfig
from ...training.optimizers.config import OptimConfig
from ...training.reporting.config import LoggingConfig
from ...units import Bytes, Nodes, Seconds
from ...utils.ranges import BYTES, LONG_S, WAIT_S, Range


class Backend(Enum):
    """The backend that starts the agents."""

    LOCAL = "local"
    """Run on this machine, in the foreground."""
    SLURM = "slurm"
    """A batch job of launcher.nodes nodes."""
    RAY = "ray"
    """A Ray cluster: an actor with an agent on each of launcher.nodes nodes."""


class SeveralNodes(Protocol):
    """Keys that back ends of several nodes share; what decides about nodes and attempts asks for these alone.

    The fields themselves stand in each back end's dataclass: from a common base they would come first, and run.yaml, whose
    order follows the fields, would no longer be what earlier versions wrote.
    """

    KEYS: ClassVar[str]
    """The group the keys are typed under."""

    @property
    def requeue(self) -> bool: ...
    @property
    def max_preemptions(self) -> int: ...
    @property
    def interface(self) -> str | None: ...
    @property
    def exclude(self) -> list[str]: ...
    @property
    def max_excluded(self) -> int: ...


_SEVERAL_NODES: Mapping[str, Range] = {"max_preemptions": Range(0, 1_000_000), "max_excluded": Range(0, 65_536)}


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmConfig:
    """How a run lives in SLURM (`SeveralNodes`); what the site asks of a job stands in cluster.slurm."""

    KEYS: ClassVar[str] = "launcher.slurm"

    requeue: bool = True
    """A job that was preempted, or lost a node, goes back into the queue and resumes."""
    max_preemptions: int = 100
    """Times one submission may be requeued after a preemption; failures count by launcher.max_restarts."""
    interface: str | None = None
    """Network interface the nodes meet on, as `ib0`; None: the one their host name resolves to."""
    after: str | None = None
    """Dependency, as `afterok:1234` or `singleton`."""
    exclude: list[str] = field(default_factory=list)
    """Nodes not to use."""
    max_excluded: int = 2
    """Nodes one submission may leave out by itself: those that fail the preflight, or on which it failed twice; 0: none."""
    array: bool = False
    """`efflaunch sweep`: one job array, a point per index, instead of a job per point."""
    array_limit: int | None = None
    """Points of an array that run at the same time; None: as many as there is room for."""
    python: str | None = None
    """Python of the nodes; None: the one that submits, by its path."""

    RANGES: ClassVar[Mapping[str, Range]] = {**_SEVERAL_NODES, "array_limit": Range(1, 1_000_000)}


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    """How a run lives on a Ray cluster (`SeveralNodes`)."""

    KEYS: ClassVar[str] = "launcher.ray"

    address: str | None = None
    """Ray's job server, `http://head:8265`; None: RAY_API_SERVER_ADDRESS; `auto`: the cluster around this process, in the foreground."""
    local: bool = False
    """Start a Ray cluster of this machine alone and run on it, in the foreground."""
    requeue: bool = True
    """A run that was preempted, or lost a node, is restarted on what the cluster has and resumes."""
    max_preemptions: int = 100
    """Times one submission may be restarted after a preemption; failures count by launcher.max_restarts."""
    placement_timeout_s: Seconds = 600.0
    """Longest wait for nodes that have what the run needs."""
    time_limit_s: Seconds | None = None
    """Time after which the run saves and ends with 75; None: none."""
    cpus_per_node: float | None = None
    """CPUs to reserve on every node; None: one a rank. GPUs: one a rank where cluster.device=cuda."""
    resources: dict[str, float] = field(default_factory=dict)
    """Further resources to reserve on every node, as {accelerator_type:H100: 0.001}."""
    exclude: list[str] = field(default_factory=list)
    """Nodes not to use: host names, addresses or beginnings of Ray's node ids."""
    max_excluded: int = 2
    """Nodes one submission may leave out by itself: those that fail the preflight, or on which it failed twice; 0: none."""
    interface: str | None = None
    """Network interface the nodes meet on, as `ib0`; None: the one Ray uses."""
    env: list[str] = field(default_factory=list)
    """Variables of this shell that go with the job; nothing else does, and no secrets."""
    code: list[str] = field(default_factory=list)
    """Your own files and folders to send along; they can be imported on every node, where efflaunch itself has to be installed."""
    max_upload_bytes: Bytes = 16 << 20
    """Most that may be sent along."""
    driver_cpus: float = 0.0
    """CPUs to reserve for the job's driver; with none it runs on Ray's head node."""
    python: str = "python"
    """Python of the cluster, which has efflaunch."""
    work_dir: str | None = None
    """Directory of the nodes where relative paths of the configuration start; None: the one this is submitted from."""
    usage_stats: bool = False
    """True lets a Ray started here report its use to Ray's makers."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        **_SEVERAL_NODES,
        "placement_timeout_s": Range(0, WAIT_S),
        "time_limit_s": Range(0, LONG_S, above=True),
        "cpus_per_node": Range(0, 65_536, above=True),
        "resources": Range(0, 1e12, above=True),
        "max_upload_bytes": Range(0, BYTES),
        "driver_cpus": Range(0, 65_536),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class LauncherConfig:
    """How ranks are started, stopped and started again."""

    name: str
    backend: Backend
    max_restarts: int = 2
    """Restarts after a crash without a new checkpoint in between; a step forward resets the count."""
    grace_s: Seconds = 120.0
    """Time from a stop signal to the end of the save before ranks are killed."""
    threads_per_rank: int | None = None
    """OMP_NUM_THREADS of each rank; None: the environment's, else 1, or its share of the cores where ranks update GPUs' weights."""
    start_timeout_s: Seconds = 300.0
    """Longest time for all ranks to meet."""
    nodes: Nodes | None = None
    """Nodes to run on, as `4`, or `2:4`: at least 2, up to 4 as there are, planned for as many; None: cluster.num_nodes."""
    hang_factor: float | None = 5.0
    """Ranks that say nothing for so many times as a step is expected to take hang: stacks are written, all start again; null: never."""
    hang_min_s: Seconds = 300.0
    """Silence that is never taken for a hang, however short steps are."""
    hang_startup_s: Seconds = 1800.0
    """Longest silence in phases that do not depend on a step's time: start, the first step, saves, scoring."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    RANGES: ClassVar[Mapping[str, Range]] = {
        "max_restarts": Range(0, 1_000_000),
        "grace_s": Range(0, WAIT_S, above=True),
        "threads_per_rank": Range(1, 4096),
        "start_timeout_s": Range(0, WAIT_S, above=True),
        "nodes": Range(1, 65_536),
        "hang_factor": Range(0, 1e6, above=True),
        "hang_min_s": Range(0, LONG_S, above=True),
        "hang_startup_s": Range(0, LONG_S, above=True),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Identity and place of the run. The same id again resumes it."""

    root: str = "runs"
    id: str | None = None
    """Name of the run; None: made from the experiment's name, the time and a random suffix."""
    private: bool = True
    """The run directory is for its owner alone (0700, files 0600); false: the umask decides, as for a group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The whole configuration, resolved and checked: what run.yaml holds and workers read."""

    experiment: str
    """Name of the experiment file, for display."""
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    adapter: AdapterConfig = NO_ADAPTER
    optim: OptimConfig
    parallel: ParallelConfig
    memory: MemoryConfig
    checkpoint: CheckpointConfig
    cluster: ClusterConfig
    launcher: LauncherConfig
    logging: LoggingConfig
    eval: EvalConfig = field(default_factory=EvalConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
