"""Agrees on one memory ledger for all ranks of a run, and checks the measured memory against its certificate."""

from __future__ import annotations

import logging
import resource
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from ..errors import UserError
from ..estimate.build import build_ledger
from ..estimate.certificate import Certificate, Check, certify
from ..estimate.ledger import Ledger
from ..estimate.plan_inputs import PlanInputs
from ..estimate.stage_plans import check_stage_plans
from ..estimate.suggestions import check_fits
from ..parallel.topology import whole_world
from ..units import format_bytes
from .agreed_rates import frozen_rates
from .data.train_stages import train_stages
from .step_planner import this_hardware

if TYPE_CHECKING:
    from .run_settings import RunSettings

log = logging.getLogger(__name__)


def agreed_ledger(config: RunSettings, device: torch.device, run_dir: Path | None = None) -> Ledger:
    """Build the run's ledger on rank 0, with a solved policy where one is asked for, and give it to every rank. Collective.

    `run_dir` keeps the measured rates it goes by, for later attempts. GPUs have what their driver says where that is less than configured:
    a card sold with 80 GB gives out less.
    PlanError on every rank where nothing fits; what else rank 0 fails with ends the other ranks too.
    """
    payload: list[Ledger | UserError | str | None] = [None]
    failure: Exception | None = None
    world = whole_world()
    capacity = _agreed_capacity(config, device)
    if dist.get_rank(world) == 0:
        try:
            ledger = build_ledger(_inputs(config, device, run_dir, capacity))
            check_fits(ledger)
            check_stage_plans(ledger, [stage.data for stage in train_stages(config.train, config.data)])
            payload[0] = ledger
        except UserError as error:
            payload[0] = error
        except Exception as error:  # the others wait in the broadcast
            payload[0], failure = f"{type(error).__name__}: {error}", error
    dist.broadcast_object_list(payload, 0, group=world, device=torch.device("cpu"))
    answer = payload[0]
    if isinstance(answer, UserError):
        raise answer
    if failure is not None:
        raise failure
    if isinstance(answer, str):
        raise RuntimeError(f"rank 0 could not make the ledger of this run ({answer}); its log says where")
    assert answer is not None
    return answer


def real_capacity(device: torch.device) -> int | None:
    """Memory of this rank's GPU in bytes, as its driver has it; None on a CPU, whose ranks have what the configuration gives them."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None


def _agreed_capacity(config: RunSettings, device: torch.device) -> int:
    """The memory of a rank to plan for: the least of what is configured and what any rank has. Collective where ranks have GPUs."""
    configured, mine = config.cluster.device_memory_bytes, real_capacity(device)
    if mine is None:
        return configured
    least = torch.tensor(min(configured, mine), dtype=torch.int64)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=whole_world())
    return int(least)


def _inputs(config: RunSettings, device: torch.device, run_dir: Path | None, capacity: int) -> PlanInputs:
    """Inputs of the run's ledger, with `capacity` bytes on each rank."""
    inputs = PlanInputs.of(config, frozen_rates(config, this_hardware(device), run_dir))
    if capacity == inputs.cluster.device_memory_bytes:
        return inputs
    configured = format_bytes(inputs.cluster.device_memory_bytes)
    log.warning("a GPU of this run has %s: planned for that, not for cluster.device_memory_bytes=%s", format_bytes(capacity), configured)
    return inputs.with_parts(cluster=replace(inputs.cluster, device_memory_bytes=capacity))


class Report(Protocol):
    def __call__(self, event: str, **fields: Any) -> None: ...


class PeakMemoryCheck:
    """Checks measured peaks against the certificate: after the first step, and when a later one breaks it for the first time."""

    def __init__(self, ledger: Ledger, device: torch.device, report: Report) -> None:
        self.certificate: Certificate = certify(ledger)
        self._device, self._report = device, report
        self._reported = self._broken = False

    def peak_bytes(self) -> int:
        """The most memory this rank has taken so far: the allocator's on a GPU, the process's elsewhere."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def look(self, step: int, measured_bytes: Sequence[int]) -> None:
        """Compare `measured_bytes` of every rank, after a step, with the certificate."""
        check = Check(
            predicted_bytes=self.certificate.comparable_bytes, measured_bytes=tuple(measured_bytes), compared=self.certificate.compared
        )
        if self._reported and (check.ok or self._broken):
            return
        self._reported, self._broken = True, not check.ok
        self._report("certificate", step=step, ok=check.ok, **asdict(check))
