"""The ledger: what each rank and each node must hold, whether it fits, and how long a step takes. Pure, no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..parallel.config import GradReduce, ParallelConfig, check_cluster
from ..parallel.layout import Layout, solve_layout
from .config import MemoryConfig
from .policy import MemoryPolicy, explicit_policy
from .residency import ON_DEVICE, Residency
from .setting import ALL, Phase, Setting, Term
from .terms import device_terms
from .terms_host import file_bytes, host_terms
from .timing import Timing, estimate_time

if TYPE_CHECKING:
    from ..parallel.config import ClusterConfig
    from ..parallel.rates import Measured
    from ..training.config import DataConfig, TrainConfig
    from ..training.spec import ModelSpec
    from .report import SolveReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """One memory: its terms and how much there is."""

    name: str
    terms: tuple[Term, ...]
    capacity_bytes: int

    def phase_bytes(self, phase: Phase) -> int:
        return sum(entry.by_phase.get(phase, 0) for entry in self.terms)

    @property
    def peak_phase(self) -> Phase:
        return max(ALL, key=self.phase_bytes)

    @property
    def peak_bytes(self) -> int:
        return self.phase_bytes(self.peak_phase)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.capacity_bytes

    @property
    def largest(self) -> Term:
        """The biggest term at the peak."""
        return max(self.terms, key=lambda entry: entry.by_phase.get(self.peak_phase, 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """The memory of one rank and of one node, and the time of a step, for one configuration."""

    asked: Setting
    """As configured; `setting` is the same with what was left to `auto` decided."""
    setting: Setting
    device: Account
    host: Account
    budget: Account | None
    """memory.host_budget, where it is given."""
    file_bytes: int
    """What one node writes under memory.offload_dir and reads back; no capacity is known for it."""
    timing: Timing
    report: SolveReport | None = None
    """How the policy was found, with memory.solve."""

    @property
    def layout(self) -> Layout:
        return self.setting.layout

    @property
    def accounts(self) -> tuple[Account, ...]:
        """All that have a capacity."""
        return (self.device, self.host, *((self.budget,) if self.budget is not None else ()))

    @property
    def fits(self) -> bool:
        return all(account.fits for account in self.accounts)


def build_ledger(
    *,
    spec: ModelSpec,
    parallel: ParallelConfig,
    memory: MemoryConfig,
    train: TrainConfig,
    data: DataConfig,
    cluster: ClusterConfig,
    residency: Residency = ON_DEVICE,
    measured: Measured | None = None,
) -> Ledger:
    """The ledger of a step whose sequences all have `data.max_seq_len` tokens; ConfigError where no layout exists.

    `measured`: rates in place of the cluster's, by which times are estimated (parallel/measured.py).
    With memory.solve the policy is solved (memory/solve.py). Where none fits, the ledger is that of the one that needs least.
    """
    setting = make_setting(
        spec=spec, parallel=parallel, memory=memory, train=train, data=data, cluster=cluster, residency=residency, measured=measured
    )
    if memory.solve:
        from .solve import solve_memory

        return _ledger(setting, *solve_memory(setting))
    return _ledger(setting, resolve_grad_reduce(setting))


def make_setting(
    *,
    spec: ModelSpec,
    parallel: ParallelConfig,
    memory: MemoryConfig,
    train: TrainConfig,
    data: DataConfig,
    cluster: ClusterConfig,
    residency: Residency = ON_DEVICE,
    measured: Measured | None = None,
) -> Setting:
    """All a ledger depends on, with nothing decided that is left open. ConfigError where no layout exists."""
    from ..training.spec import layer_parameters, num_parameters

    check_cluster(cluster)
    layout = solve_layout(parallel, cluster, spec, max_seq_len=data.max_seq_len, global_batch_tokens=data.global_batch_tokens)
    return Setting(
        spec=spec,
        parallel=parallel,
        memory=memory,
        policy=MemoryPolicy() if memory.solve else explicit_policy(memory),
        train=train,
        data=data,
        cluster=cluster,
        layout=layout,
        layer_parameters=layer_parameters(spec),
        parameters=num_parameters(spec),
        residency=residency,
        measured=measured,
    )


def resolve_grad_reduce(setting: Setting) -> Setting:
    """With `auto`: once per step without barriers, or where whole gradients fit on the device, else after every micro-batch."""
    if setting.parallel.grad_reduce is not GradReduce.AUTO:
        return setting
    per_step = replace(setting, parallel=replace(setting.parallel, grad_reduce=GradReduce.STEP))
    if setting.parallel.barrier_free or device_account(per_step).fits:
        return per_step
    return replace(setting, parallel=replace(setting.parallel, grad_reduce=GradReduce.MICRO_BATCH))


def device_account(s: Setting) -> Account:
    return Account(name="GPU" if s.on_gpu else "rank", terms=device_terms(s), capacity_bytes=s.cluster.device_memory_bytes)


def host_account(s: Setting, device: Account) -> Account:
    return Account(name="host", terms=host_terms(s, device.peak_bytes), capacity_bytes=s.cluster.host_memory_bytes)


def budget_account(s: Setting, host: Account) -> Account | None:
    """What memory.host_budget limits: activations and optimizer states of one node."""
    if s.memory.host_budget is None:
        return None
    limited = tuple(entry for entry in host.terms if entry.name in ("activations on the host", "optimizer states on the host"))
    return Account(name="host budget", terms=limited, capacity_bytes=s.memory.host_budget)


def _ledger(asked: Setting, setting: Setting, report: SolveReport | None = None) -> Ledger:
    device = device_account(setting)
    host = host_account(setting, device)
    return Ledger(
        asked=asked,
        setting=setting,
        device=device,
        host=host,
        budget=budget_account(setting, host),
        file_bytes=file_bytes(setting),
        timing=estimate_time(setting),
        report=report,
    )
