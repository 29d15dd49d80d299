"""Chooses the plan of each step: the same on every rank, and the same when a run resumes from a checkpoint.

Note: what a plan depends on. The lengths of the step, which are a function of (seed, step), and the cost model. The cost model
of a run is fixed when the run starts: checkpoints carry it, so neither a new profile nor what was measured in between changes
the plans of a run that resumes with the same settings. What the run measures of itself goes into RUN_DIR/profile.yaml, for other
runs, or for this one once parallel.profile names it. The one thing left to chance is a plan that is late: it is counted.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..estimate.measured.profile import ProfileKey, find_profile, processor_name, profile_key
from ..estimate.timing.sequence import cost_model_of
from ..parallel.config import SequenceMode
from ..parallel.sequence.cost import CostModel
from ..parallel.sequence.packed import pack_plan, packed_size, unpack_plan
from ..parallel.sequence.plan import StepPlan, check_plan
from ..parallel.sequence.service import PlanRequest, PlanService, greedy_plan, static_plan
from ..parallel.sequence.stored import load_cost
from ..parallel.topology import whole_world

if TYPE_CHECKING:
    from ..estimate.plan_inputs import PlanInputs

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Totals:
    """Sums over all steps of a run, over its attempts."""

    late: int = 0
    """Plans that were not there in time: those steps ran greedy ones."""
    unplanned: int = 0
    """Steps that ran greedy plans because the planning process was gone."""
    steps: int = 0
    """Steps with a static plan to compare with; the two sums are over these."""
    predicted_s: float = 0.0
    static_s: float = 0.0
    timed_s: float = 0.0
    """What steps took, but for each attempt's first, which also warms up."""
    timed_predicted_s: float = 0.0
    """The same steps' seconds by the model."""


class StepPlanner:
    """`plan(step)` on every rank, in step order. Collective where sequence=adaptive: rank 0 decides."""

    def __init__(
        self,
        lengths_of: Callable[[int], Sequence[int]],
        num_steps: int,
        request: PlanRequest,
        mode: SequenceMode,
        *,
        service: PlanService | None,
        barrier_free: bool,
        report: Callable[..., None],
    ) -> None:
        """`service`: rank 0's, where sequence=adaptive; whoever started it closes it. `report(event, **fields)` is called once
        where it fails."""
        self.request, self.totals = request, Totals()
        self._lengths_of, self._barrier_free, self._report = lengths_of, barrier_free, report
        self._mode, self._service, self._reported = mode, service, False
        if service is not None:
            service.begin(lengths_of, num_steps, request)

    def plan(self, step: int) -> StepPlan:
        """Checked, priced, with its bound. PlanError on every rank where a sequence fits nowhere."""
        lengths = self._lengths_of(step)
        if self._mode is SequenceMode.STATIC:
            return self._priced(static_plan(lengths, self.request))
        return self._rank_0s(lengths, lambda: self._decide(step, lengths))

    def plan_lengths(self, lengths: Sequence[int]) -> StepPlan:
        """A plan of sequences that belong to no step, as an evaluation's: static, or greedy if adaptive. Collective as `plan`."""
        if self._mode is SequenceMode.STATIC:
            return static_plan(lengths, self.request)
        return self._rank_0s(lengths, lambda: replace(greedy_plan(lengths, self.request), source="greedy"))

    def _rank_0s(self, lengths: Sequence[int], decide: Callable[[], StepPlan]) -> StepPlan:
        """What rank 0 decides, on every rank."""
        packed = torch.zeros(packed_size(len(lengths)) + 1, dtype=torch.int64)
        error: Exception | None = None
        if self._service is not None:
            try:
                packed[1:] = torch.from_numpy(pack_plan(self._checked(decide())))
            except Exception as failure:  # the others wait for it in the broadcast
                packed[0], error = 1, failure
        dist.broadcast(packed, 0, group=whole_world())
        if error is not None:
            raise error
        if packed[0]:
            greedy_plan(lengths, self.request)  # raises what it raised on rank 0
            raise RuntimeError("rank 0 has no plan for this step; its log says why")
        return unpack_plan(packed[1:].numpy(), self.request.cost.world_size, lengths)

    def pending(self, step: int) -> list[int]:
        """Steps from `step` on that a background process is asked to plan; they are asked for anew after a restart."""
        return [] if self._service is None else self._service.pending(step)

    def _checked(self, plan: StepPlan) -> StepPlan:
        check_plan(plan)
        return self._priced(plan)

    def _decide(self, step: int, lengths: Sequence[int]) -> StepPlan:
        assert self._service is not None
        plan = self._service.plan(step)
        if plan is not None:
            return plan
        if self._service.failure:
            self._report_failure(step, self._service.failure)
            self.totals.unplanned += 1
            return replace(greedy_plan(lengths, self.request), source="greedy")
        self.totals.late += 1
        return replace(greedy_plan(lengths, self.request), source="late")

    def _report_failure(self, step: int, failure: str) -> None:
        if not self._reported:
            self._reported = True
            log.error("%s; from step %d on the greedy plan is used", failure, step + 1)
            self._report("planner_failed", step=step + 1, error=failure)

    def _priced(self, plan: StepPlan) -> StepPlan:
        if not self._barrier_free:
            return plan if plan.predicted_s is not None else self.request.cost.priced(plan)
        # Bounds are of steps with barriers; one without may take less.
        seconds = self.request.cost.plan_s(plan, barrier_free=True)
        return replace(self.request.cost.priced(plan), predicted_s=seconds, lower_bound_s=None, bound="")

    def background_results(self, step: int, plan: StepPlan) -> tuple[float | None, StepPlan]:
        """Modelled seconds of the static plan of the step that just ran, where they are known; the plan with the tightest bound."""
        extras = self._service.extras(step) if self._service is not None else None
        if extras is None or plan.predicted_s is None:
            return None, plan
        if extras.static_s is not None:
            self.totals.steps += 1
            self.totals.predicted_s += plan.predicted_s
            self.totals.static_s += extras.static_s
        if extras.lower_bound_s is not None and plan.lower_bound_s is not None:
            plan = replace(plan, lower_bound_s=extras.lower_bound_s, bound=extras.bound)
        return extras.static_s, plan


@dataclass(frozen=True, slots=True)
class Costs:
    """The cost model of a run, fixed at its start."""

    model: CostModel
    overhead_s: float
    """Of a group and micro-batch, as measured; it is inside the model's beta_s. Zero where nothing was measured."""
    key: ProfileKey
    origin: str
    """Where the figures come from, as a sentence."""
    fingerprint: str
    """Hash of the settings it was made from: the same settings resume with the same model."""
    is_assumed: bool = False
    """Arithmetic, for want of a profile; a probe may still replace it."""

    def dump(self) -> dict[str, Any]:
        """Return it as JSON, exactly; for checkpoints."""
        return {"fingerprint": self.fingerprint, "model": asdict(self.model), "overhead_s": self.overhead_s, "origin": self.origin}


def resolve_costs(config: Any, inputs: PlanInputs, device: torch.device, stored: dict[str, Any] | None) -> Costs:
    """Return the model a checkpoint has `stored`, where it was made from these settings; else measured values, or arithmetic.

    `inputs`: those of the run's ledger, its policy decided; of the slowest stage where there are several.
    """
    spec = inputs.whole or inputs.spec
    # Rates that were measured since do not make other settings.
    arithmetic = cost_model_of(replace(inputs, measured=None))
    key = profile_key(spec, config.memory, config.train, config.cluster, this_hardware(device))
    fields = asdict(arithmetic)
    if arithmetic.num_stages == 1:
        # As in checkpoints of runs that knew of no stages.
        del fields["num_stages"], fields["virtual_stages"]
    if arithmetic.fill_share == 1.0:
        del fields["fill_share"]
    text = json.dumps([fields, config.parallel.profile, asdict(key)])
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
    restored = None if stored is None else load_costs(stored, key, fingerprint)
    if restored is not None:
        return restored
    if arithmetic.num_stages > 1:
        origin = "arithmetic on data sheets: a profile is of all layers, and a stage has some"
        return Costs(arithmetic, 0.0, key, origin, fingerprint, is_assumed=True)
    profile, origin = find_profile(config.parallel.profile, key)
    if profile is None:
        return Costs(arithmetic, 0.0, key, origin, fingerprint, is_assumed=True)
    return Costs(profile.refine(arithmetic), profile.overhead_s, key, origin, fingerprint)


def load_costs(stored: dict[str, Any], key: ProfileKey, fingerprint: str) -> Costs | None:
    """The inverse of `Costs.dump`; None where they were made from other settings than those of `fingerprint`."""
    if stored["fingerprint"] != fingerprint:
        return None
    return Costs(load_cost(stored["model"]), stored["overhead_s"], key, stored["origin"], fingerprint)


def this_hardware(device: torch.device) -> str:
    """Name this device as profiles do."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
