"""The ledger of a configuration, by measured rates where there are any."""

from __future__ import annotations

from ...cluster.config import Device
from ...estimate.build import build_ledger
from ...estimate.ledger import Ledger
from ...estimate.measured.find_rates import find_rates
from ...estimate.measured.profile import processor_name
from ...estimate.optimizer_residency import residency_of
from ...model.spec import model_spec
from .run_config import Config


def plan(config: Config) -> Ledger:
    """The ledger of a whole configuration."""
    return build_ledger(
        spec=model_spec(config.model),
        parallel=config.parallel,
        memory=config.memory,
        train=config.train,
        data=config.data,
        cluster=config.cluster,
        residency=residency_of(config.optim, config.checkpoint),
        measured=find_rates(config.parallel.profile, config.cluster, hardware_of(config), config.memory.offload_dir),
    )


def hardware_of(config: Config) -> str:
    """What a rank computes on, as profiles call it; empty for GPUs: which ones a cluster has is not looked up here."""
    return processor_name() if config.cluster.device is Device.CPU else ""
