"""The ledger of a configuration, by measured rates where there are any."""

from __future__ import annotations

from ...cluster.config import Device
from ...estimate.build import build_ledger
from ...estimate.ledger import Ledger
from ...estimate.measured.find_rates import find_rates
from ...estimate.measured.profile import processor_name
from ...estimate.plan_inputs import PlanInputs
from .run_config import Config


def plan(config: Config) -> Ledger:
    """The ledger of a whole configuration."""
    return build_ledger(plan_inputs(config))


def plan_inputs(config: Config) -> PlanInputs:
    """What the ledger is made from, with nothing decided that is left open."""
    measured = find_rates(config.parallel.profile, config.cluster, hardware_of(config), config.memory.offload_dir)
    return PlanInputs.of(config, measured)


def hardware_of(config: Config) -> str:
    """Name what a rank computes on, as profiles call it; empty for GPUs: which ones a cluster has is not looked up here."""
    return processor_name() if config.cluster.device is Device.CPU else ""
