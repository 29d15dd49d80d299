"""Checks whether this machine can run a configuration, and says what to type where it cannot. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

from ..cluster.attention_rates import CAPABILITIES
from ..cluster.config import Device
from ..errors import ConfigError, UserError
from ..estimate.attention_case import attention_kernel
from ..estimate.plan_inputs import GIB
from ..model.spec import model_spec
from ..parallel.layout import solve_layout
from ..parallel.sequence.installed_kernels import installed_versions
from ..parallel.sequence.kernel_choice import Installed, KernelChoice
from ..units import format_bytes, format_tokens
from .config.ledger import plan
from .config.run_config import Config
from .env import check_order
from .hardware import Machine, this_machine

MAX_RANKS_PER_CORE = 4
# Cards sold with one size differ by tenths of a GiB; a run plans for what its own have (training/agreed_ledger.py).
_NOMINAL = 0.97
_IN_USE = 0.9
"""A GPU with less of its memory free has somebody else's process on it."""


class MachineError(ConfigError):
    """The configuration is sound, but not for this machine."""

    def __init__(self, where: str, *, found: str, expected: str, hint: str) -> None:
        super().__init__(where, found=found, expected=expected, hint=hint)
        self.args = (f"{where}: needs {expected}, found {found}.\n  Try: {hint}",)


def check_machine(config: Config, machine: Machine | None = None) -> None:
    """MachineError where this machine (looked at now, or `machine`) cannot run its node's part of the configuration."""
    here = machine if machine is not None else this_machine(config.cluster.device)
    if config.cluster.device is Device.CUDA:
        _check_gpus(config, here, is_node=False)
    elif config.cluster.num_nodes > 1:
        nodes = f"{config.cluster.num_nodes} nodes"
        hint = f"launcher=slurm on a SLURM cluster, or {'cluster.num_nodes' if config.launcher.nodes is None else 'launcher.nodes'}=1"
        raise MachineError("cluster.num_nodes", found="this machine, which is one node", expected=nodes, hint=hint)
    check_node(config, here)


def check_node(config: Config, machine: Machine) -> None:
    """MachineError where `machine` cannot be one of the configuration's nodes."""
    if config.cluster.device is Device.CUDA:
        _check_gpus(config, machine, is_node=True)
        kernel_here(config)
        check_order(config)
    else:
        _check_cores(config, machine)
        _check_memory(config, machine)
    _check_packages(config)
    _check_offload_dir(config)
    _check_profile(config, machine)


def _check_packages(config: Config) -> None:
    """ConfigError where the package of the configured engine or optimizer is not here."""
    from ..training.optimizers.algorithms import check_packages
    from ..training.optimizers.engine_check import check_package, engine_facts

    check_package(engine_facts(config), _version_of)
    check_packages(config.optim, _version_of)


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def kernel_here(config: Config) -> KernelChoice:
    """The attention kernel of a run with what this Python has, on GPUs as cluster.gpu says; ConfigError where none can do it."""
    spec, length = model_spec(config.model), config.data.max_seq_len
    layout = solve_layout(config.parallel, config.cluster, spec, max_seq_len=length, global_batch_tokens=config.data.global_batch_tokens)
    on_gpu, capability = config.cluster.device is Device.CUDA, CAPABILITIES.get(config.cluster.gpu or "")
    installed = Installed(installed_versions(), capability) if on_gpu else None
    train = config.train
    return attention_kernel(
        spec, layout, config.parallel, installed, dtype=train.dtype.value, max_seq_len=length, deterministic=train.deterministic
    )


def _check_offload_dir(config: Config) -> None:
    """ConfigError where the files of moved activations cannot be written here, or not all of them."""
    if config.memory.offload_dir is None:
        return
    from ..estimate.footprint.host import arena_bytes
    from ..memory.offload.checks import check_offload_dir

    inputs = plan(config).inputs
    if inputs.policy.uses_host and inputs.policy.offload_dir is not None:
        check_offload_dir(inputs.policy.offload_dir, arena_bytes(inputs), config.cluster.ranks_per_node)


def _check_profile(config: Config, machine: Machine) -> None:
    """ConfigError where parallel.profile names a file that is not of this machine, model and software."""
    from ..estimate.measured.profile import find_profile, processor_name, profile_key

    if config.parallel.profile is not None:
        hardware = processor_name() if config.cluster.device is Device.CPU else machine.gpus[0].name
        key = profile_key(model_spec(config.model), config.memory, config.train, config.cluster, hardware)
        find_profile(config.parallel.profile, key)


def _check_gpus(config: Config, machine: Machine, *, is_node: bool) -> None:
    cluster = config.cluster
    needed, gib = cluster.ranks_per_node, round(cluster.device_memory_bytes / GIB, 1)
    large_enough = [gpu for gpu in machine.gpus if gpu.memory_bytes >= _NOMINAL * cluster.device_memory_bytes]
    if len(large_enough) >= needed and (is_node or cluster.num_nodes == 1):
        return
    places = f" on {cluster.num_nodes} nodes" if cluster.num_nodes > 1 else ""
    raise MachineError(
        config.experiment,
        found=_gpus_in_words(machine) + (" on this machine, which is one node" if places else ""),
        expected=f"{needed * cluster.num_nodes} GPU{'s' * (needed * cluster.num_nodes > 1)} with {gib:g} GiB{places}",
        hint=_instead(config),
    )


def check_free(config: Config, machine: Machine) -> None:
    """MachineError where a node that a scheduler gave us has somebody else's processes on its GPUs."""
    free = [gpu for gpu in machine.gpus if gpu.free_bytes is None or gpu.free_bytes >= _IN_USE * gpu.memory_bytes]
    if config.cluster.device is Device.CPU or len(free) >= config.cluster.ranks_per_node:
        return
    least = min((gpu.free_bytes for gpu in machine.gpus if gpu.free_bytes is not None), default=None)
    others = "" if least is None else f"; one of the others has {format_bytes(least)} left: another process is on it"
    expected = f"{config.cluster.ranks_per_node} with nothing on them"
    raise MachineError("GPUs", found=f"{len(free)} free{others}", expected=expected, hint="nvidia-smi names it")


def _gpus_in_words(machine: Machine) -> str:
    if not machine.gpus:
        return "none"
    sizes = sorted({round(gpu.memory_bytes / GIB, 1) for gpu in machine.gpus})
    return f"{len(machine.gpus)} with {' and '.join(f'{size:g}' for size in sizes)} GiB"


def _instead(config: Config) -> str:
    here = " ".join(local_overrides(config))
    same = f"+experiment={config.experiment} "
    return (
        f"efflaunch plan {same}to see what it needs,\n"
        f"       efflaunch {same}launcher=slurm on a SLURM cluster that has it,\n"
        f"       efflaunch +experiment=quickstart, or the same experiment in miniature on this machine:\n"
        f"       efflaunch {same}{here}"
    )


def local_overrides(config: Config) -> list[str]:
    """Overrides that turn any experiment into one that runs on CPU ranks: a tiny model on built-in text."""
    overrides = [
        "model=tiny",
        "data=stdlib",
        "cluster=local_cpu",
        "cluster.num_nodes=1",
        "data.max_seq_len=8K",
        "data.global_batch_tokens=16K",
        "parallel.tokens_per_rank=4K",
        "train.dtype=float32",
        "train.steps=20",
    ]
    if config.cluster.ranks_per_node == 1:
        # An experiment for one GPU says so itself, and its one rank would not hold the longest sequence.
        overrides.append("cluster.ranks_per_node=2")
    overrides += [f"optim.{name}=null" for name in ("warmup_steps", "decay_steps") if getattr(config.optim, name) is not None]
    parallel = config.parallel
    if parallel.pipeline.stages > 1:
        overrides.append("parallel.pipeline.stages=1")
    if parallel.replicate != 1 or parallel.shard is not None:
        overrides += ["parallel.replicate=1", "parallel.shard=null"]
    if parallel.sp_degree is not None or parallel.ulysses_degree is not None:
        overrides += ["parallel.sp_degree=null", "parallel.ulysses_degree=null", "parallel.scheme=auto"]
    if config.model.path is not None:
        overrides.append("model.path=null")
    return overrides


def _check_cores(config: Config, machine: Machine) -> None:
    ranks, most = config.cluster.ranks_per_node, MAX_RANKS_PER_CORE * machine.num_cores
    if ranks > most:
        raise MachineError(
            "cluster.ranks_per_node",
            found=f"{machine.num_cores} (at most {MAX_RANKS_PER_CORE} ranks a core)",
            expected=f"{-(-ranks // MAX_RANKS_PER_CORE)} cores for {ranks} ranks",
            hint=_fewer_ranks(config, most),
        )


def _check_memory(config: Config, machine: Machine) -> None:
    needed = _memory_needed(config)
    if needed > machine.memory_bytes:
        fitting = [
            n for n in range(config.cluster.ranks_per_node - 1, 0, -1) if (_with_ranks_needed(config, n) or needed) <= machine.memory_bytes
        ]
        raise MachineError(
            config.experiment,
            found=f"{format_bytes(machine.memory_bytes)} free",
            expected=f"{format_bytes(needed)} of memory for {config.cluster.ranks_per_node} ranks",
            hint=_fewer_ranks(config, fitting[0])
            if fitting
            else "a smaller model, data.max_seq_len or parallel.tokens_per_rank; efflaunch plan shows what takes the room",
        )


def _memory_needed(config: Config) -> int:
    counted = ("ranks", "data staging", "activations on the host", "optimizer states on the host")
    return sum(entry.num_bytes for entry in plan(config).host.terms if entry.name in counted)


def _with_ranks_needed(config: Config, ranks: int) -> int | None:
    """Bytes with another number of ranks; None where no layout has that many."""
    try:
        return _memory_needed(replace(config, cluster=replace(config.cluster, ranks_per_node=ranks)))
    except UserError:
        return None


def _fewer_ranks(config: Config, most: int) -> str:
    """The largest number of ranks up to `most` that has a layout, as overrides."""
    for ranks in range(min(most, config.cluster.ranks_per_node - 1), 0, -1):
        if _with_ranks_needed(config, ranks) is not None:
            return f"cluster.ranks_per_node={ranks}"
        spread = replace(
            config, parallel=replace(config.parallel, tokens_per_rank=config.data.max_seq_len, sp_degree=None, shard=None, replicate=1)
        )
        if ranks == 1 and _with_ranks_needed(spread, ranks) is not None:
            return f"cluster.ranks_per_node=1 parallel.tokens_per_rank={format_tokens(config.data.max_seq_len)}"
    return "a larger machine"
