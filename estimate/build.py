"""From a configuration to its ledger and its cost model. Pure, no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..memory.config import MemoryConfig
from ..parallel.config import ParallelConfig
from ..parallel.sequence.cost import CostModel, Fitted
from .footprint.host import file_bytes
from .ledger import Ledger, budget_account, device_account, host_account, make_plan_inputs, resolve_grad_reduce
from .optimizer_residency import ON_DEVICE, Residency
from .plan_inputs import PlanInputs
from .timing.sequence import cost_model_of
from .timing.step import estimate_time

if TYPE_CHECKING:
    from ..cluster.config import ClusterConfig
    from ..cluster.rates import MeasuredRates
    from ..model.spec import ModelSpec
    from ..training.config import TrainConfig
    from ..training.data.config import DataConfig
    from .solver.report import SolveReport


def build_ledger(
    *,
    spec: ModelSpec,
    parallel: ParallelConfig,
    memory: MemoryConfig,
    train: TrainConfig,
    data: DataConfig,
    cluster: ClusterConfig,
    residency: Residency = ON_DEVICE,
    measured: MeasuredRates | None = None,
) -> Ledger:
    """The ledger of a step whose sequences all have `data.max_seq_len` tokens; ConfigError where no layout exists.

    `measured`: rates in place of the cluster's, by which times are estimated (estimate/measured/find_rates.py).
    With memory.solve the policy is solved (estimate/solver/solve.py). Where none fits, the ledger is that of the one that needs least.
    """
    setting = make_plan_inputs(
        spec=spec, parallel=parallel, memory=memory, train=train, data=data, cluster=cluster, residency=residency, measured=measured
    )
    if memory.solve:
        from .solver.solve import solve_memory

        return _ledger(setting, *solve_memory(setting))
    return _ledger(setting, resolve_grad_reduce(setting))


def _ledger(asked: PlanInputs, setting: PlanInputs, report: SolveReport | None = None) -> Ledger:
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


def cost_model(
    spec: ModelSpec,
    parallel: ParallelConfig,
    memory: MemoryConfig,
    train: TrainConfig,
    data: DataConfig,
    cluster: ClusterConfig,
    profile: Fitted | None = None,
    *,
    residency: Residency | None = None,
    measured: MeasuredRates | None = None,
) -> CostModel:
    """The model of one configuration: by arithmetic from data sheets (or `measured` rates), then refined by `profile`.

    `residency`: where the optimizer's numbers are; None: on the device. With memory.solve the policy depends on it.
    """
    from .optimizer_residency import ON_DEVICE

    ledger = build_ledger(
        spec=spec,
        parallel=parallel,
        memory=memory,
        train=train,
        data=data,
        cluster=cluster,
        residency=ON_DEVICE if residency is None else residency,
        measured=measured,
    )
    cost = cost_model_of(ledger.setting)
    return cost if profile is None else profile.refine(cost)
