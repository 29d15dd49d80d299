"""The environment ranks are given. The only place of launcher/ that reads it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..cluster.config import Device
from ..errors import ConfigError
from ..memory.config import Arena
from ..training.optimizers.config import StateDevice
from ..utils.names import check_text
from .config.run_config import Backend, Config
from .config.secrets import secrets_of

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables by which a user sets torch's CUDA allocator, today's and the older one."""

QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
"""Variable with the number of hardware queues that streams of a GPU share; 8 where unset."""

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
"""Variable with the sizes of cuBLAS's workspaces, without which it promises the same bits for one stream alone."""
_CUBLAS_IN_ORDER = (":4096:8", ":16:8")
"""Its values that torch takes for deterministic (aten/src/ATen/Context.cpp)."""
_IN_ORDER = {
    CUBLAS: _CUBLAS_IN_ORDER[0],
    # Not in the node's switches, which add in the order that numbers arrive in (as Megatron-LM's deterministic mode asks for it).
    "NCCL_ALGO": "^NVLS,NVLSTree",
    # What torch.compile makes is not chosen by timing.
    "TORCHINDUCTOR_DETERMINISTIC": "1",
}
"""What train.deterministic sets for libraries that read it when they are loaded."""


def rank_environment(config: Config, interface: str | None = None) -> dict[str, str]:
    """Variables to set in an agent, which its ranks inherit. What the user has set for the network, the device or torch's allocator stays.

    `interface`: where the other nodes are, for gloo. NCCL chooses for itself, but on one machine: there both stay on loopback.
    """
    values = {
        "OMP_NUM_THREADS": _threads(config),
        "TOKENIZERS_PARALLELISM": "false",
        # Elastic insists on handling some signal itself; every one that matters is the agent's own.
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGXCPU",
    }
    if config.launcher.backend is Backend.LOCAL:
        values |= {name: value for name, value in _loopback().items() if name not in os.environ}
    if interface is not None and "GLOO_SOCKET_IFNAME" not in os.environ:
        values["GLOO_SOCKET_IFNAME"] = interface
    if config.cluster.device is Device.CUDA and QUEUES not in os.environ:
        # Streams compute, gather, reduce, offload and save side by side: with fewer queues than streams some would wait for others.
        values[QUEUES] = "32"
    if config.cluster.device is Device.CUDA and config.train.deterministic:
        values |= {name: value for name, value in _IN_ORDER.items() if name not in os.environ}
    if config.cluster.device is Device.CUDA and config.memory.arena is Arena.DEFAULT and not any(name in os.environ for name in ALLOCATOR):
        # Segments that grow: blocks of one length leave no holes that those of the next do not fit.
        values["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return values


def check_order(config: Config) -> None:
    """ConfigError where a variable is set otherwise here than train.deterministic wants it."""
    if config.cluster.device is not Device.CUDA or not config.train.deterministic:
        return
    for name, value in _IN_ORDER.items():
        found = os.environ.get(name)
        if found is not None and not _keeps_order(name, found):
            expected = f"{' or '.join(_CUBLAS_IN_ORDER) if name == CUBLAS else value} with train.deterministic=true"
            raise ConfigError(name, found=repr(found), expected=expected, hint=f"unset {name}: ranks are given {value}")


def _keeps_order(name: str, found: str) -> bool:
    """Whether a user's value of a variable of `_IN_ORDER` lets sums be made in one order alone."""
    if name == CUBLAS:
        return found in _CUBLAS_IN_ORDER
    if name == "NCCL_ALGO":
        in_switches = {"NVLS", "NVLSTREE"} & set(found.upper().lstrip("^").split(","))
        return len(in_switches) == 2 if found.startswith("^") else not in_switches
    return found == _IN_ORDER[name]


def _threads(config: Config) -> str:
    """OMP_NUM_THREADS: where an optimizer's states are on the host of a GPU, its ranks share the cores that this process may use."""
    if config.launcher.threads_per_rank is not None:
        return str(config.launcher.threads_per_rank)
    if os.environ.get("OMP_NUM_THREADS"):
        return os.environ["OMP_NUM_THREADS"]
    if config.cluster.device is Device.CUDA and config.optim.state_device is StateDevice.HOST:
        return str(max(1, _cores() // config.cluster.ranks_per_node))
    return "1"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


RECORDER_PIPE = "TORCH_NCCL_DEBUG_INFO_PIPE_FILE"
_OTHER_NAMES = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE": "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"}
"""Other names by which torch takes the same."""
_RECORDER_ENTRIES = 2000


def recorder_variables(prefix: str) -> dict[str, str]:
    """Return variables that switch NCCL's flight recorder on, with files that begin with `prefix`. What the user has set stays.

    Where that is the place of the dumps, nobody waits for one: there is no pipe to ask by.
    """
    wanted = {"TORCH_NCCL_TRACE_BUFFER_SIZE": str(_RECORDER_ENTRIES), "TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_FR_DUMP_TEMP_FILE": prefix}
    values = {name: value for name, value in wanted.items() if not {name, _OTHER_NAMES.get(name, name)} & os.environ.keys()}
    if "TORCH_FR_DUMP_TEMP_FILE" in values and RECORDER_PIPE not in os.environ:
        values[RECORDER_PIPE] = prefix
    return values


def secrets() -> dict[str, str]:
    """Variables of this process that hold a secret: to be found in no file, no argument and no message."""
    return secrets_of(os.environ)


def _loopback() -> dict[str, str]:
    for _, name in socket.if_nameindex():
        if name in ("lo", "lo0"):
            return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    return {}


RAY_SERVER = "RAY_API_SERVER_ADDRESS"
"""Variable in which Ray's own commands look for a job server."""
_RAY_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/"}
"""Variables that keep Ray from reporting use. Without the second, a head still sends word that reports are off."""
_RAY_SECRETS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def ray_server() -> str | None:
    """The job server a person set for Ray's own commands."""
    return os.environ.get(RAY_SERVER) or None


def chosen_variables(names: list[str]) -> dict[str, str]:
    """Return these variables of this process; ConfigError where one is not set."""
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ConfigError("launcher.ray.env", found=f"no {', '.join(missing)} here", expected="variables of this shell", hint="export them")
    for name in names:
        check_text(f"launcher.ray.env: {name}", os.environ[name])
    return {name: os.environ[name] for name in names}


def set_variables(names: list[str]) -> dict[str, str]:
    """Return those of these variables that are set in this process."""
    return {name: os.environ[name] for name in names if name in os.environ}


def ray_mode() -> str | None:
    """Return RAY_AUTH_MODE as the user set it; None where unset."""
    return os.environ.get("RAY_AUTH_MODE")


def home_variables() -> dict[str, str]:
    """Return the variables that say where the user's own files are."""
    return {name: os.environ[name] for name in ("HOME",) if name in os.environ}


def ray_quiet_variables() -> dict[str, str]:
    """Return variables with which a Ray that is started calls nobody."""
    return dict(_RAY_QUIET)


def agent_variables(*, with_secrets: bool = False) -> dict[str, str]:
    """Return what a process that Ray started hands on: all but Ray's own secrets; `with_secrets` for one that starts Ray."""
    return {name: value for name, value in os.environ.items() if with_secrets or name not in _RAY_SECRETS}


def cpus_of_step() -> int:
    """Cores that a SLURM step may use."""
    return int(os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or len(os.sched_getaffinity(0)))


@contextmanager
def variables_set(values: dict[str, str]) -> Iterator[None]:
    """Have these in this process's environment for the time inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmPlace:
    """This process inside a SLURM job."""

    job: int
    restart: int
    """Times SLURM has requeued the job."""
    node: int
    """Among the nodes of the job step, from 0."""
    num_nodes: int
    """Number of nodes of the job."""
    name: str
    step_nodes: int = 1
    """Number of nodes of the job step."""
    array: str = ""
    """The array's number and this job's index in it, 100_2; empty for a job of no array."""
    hosts: str = ""
    """The job's nodes when it started, as SLURM writes lists of them."""
    partition: str = ""

    @property
    def word(self) -> str:
        """The job as SLURM's commands want it. By its plain number the last one of an array would be the whole array."""
        return self.array or str(self.job)

    @property
    def life(self) -> str:
        """Name of this start of the job: number and restart count."""
        return f"{self.word}.{self.restart}"


def slurm_place() -> SlurmPlace:
    """Read from what srun sets; ConfigError outside of a job step."""
    wanted = ("SLURM_JOB_ID", "SLURM_NODEID", "SLURM_JOB_NUM_NODES", "SLURMD_NODENAME")
    missing = [name for name in wanted if not os.environ.get(name)]
    if missing:
        hint = "efflaunch ... launcher=slurm submits a job; it runs this on its nodes"
        raise ConfigError("environment", found=f"no {', '.join(missing)}", expected="a task started by srun", hint=hint)
    job, node, num_nodes, name = (os.environ[key] for key in wanted)
    restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return SlurmPlace(
        job=int(job),
        restart=restart,
        node=int(node),
        num_nodes=int(num_nodes),
        name=name,
        step_nodes=int(os.environ.get("SLURM_STEP_NUM_NODES") or num_nodes),
        array=f"{array}_{index}" if array and index else "",
        hosts=os.environ.get("SLURM_JOB_NODELIST", ""),
        partition=os.environ.get("SLURM_JOB_PARTITION", ""),
    )
