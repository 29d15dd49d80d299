"""The ledger all ranks of a run go by, and what the run's memory turns out to be against its certificate."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from ..errors import UserError
from ..memory.advice import check_fits
from ..memory.certificate import Certificate, Check, certify
from ..memory.ledger import Ledger, build_ledger
from ..memory.residency import residency_of

if TYPE_CHECKING:
    from .setup import RunSettings
    from .spec import ModelSpec


def agreed_ledger(config: RunSettings, spec: ModelSpec) -> Ledger:
    """The ledger of the run, the same on every rank: where the policy is solved, rank 0 solves it. Collective where it is.

    PlanError on every rank where nothing fits.
    """
    if not config.memory.solve:
        return _ledger(config, spec)
    told: list[Ledger | UserError | None] = [None]
    if dist.get_rank() == 0:
        try:
            ledger = _ledger(config, spec)
            check_fits(ledger)
            told[0] = ledger
        except UserError as error:  # the others wait for it
            told[0] = error
    dist.broadcast_object_list(told, 0, device=torch.device("cpu"))
    answer = told[0]
    if isinstance(answer, UserError):
        raise answer
    assert answer is not None
    return answer


def _ledger(config: RunSettings, spec: ModelSpec) -> Ledger:
    return build_ledger(
        spec=spec,
        parallel=config.parallel,
        memory=config.memory,
        train=config.train,
        data=config.data,
        cluster=config.cluster,
        residency=residency_of(config.optim, config.checkpoint),
    )


class Report(Protocol):
    def __call__(self, event: str, **fields: Any) -> None: ...


class Watch:
    """Holds measured peaks against the certificate: after the first step, and whenever a later one breaks it for the first time."""

    def __init__(self, ledger: Ledger, device: torch.device, report: Report) -> None:
        self.certificate: Certificate = certify(ledger)
        self._device, self._report = device, report
        self._told = self._broken = False

    def peak_bytes(self) -> int:
        """The most this rank has taken so far: of the allocator on a GPU, of the process elsewhere."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def look(self, step: int, measured_bytes: Sequence[int]) -> None:
        """`measured_bytes`: of every rank, after a step."""
        check = Check(
            predicted_bytes=self.certificate.comparable_bytes, measured_bytes=tuple(measured_bytes), compared=self.certificate.compared
        )
        if self._told and (check.ok or self._broken):
            return
        self._told, self._broken = True, not check.ok
        self._report("certificate", step=step, ok=check.ok, **asdict(check))
