"""Runs the training loop of one rank: plan, gradients, update, report, save; until done or stopped.

Note: the order of a step, the same on every rank (`_Run._step`, then `loop`). Steps with a star meet all ranks.
  1. planner.plan *           the step's plan, priced and with its bound; the heartbeat expects its predicted time
  2. read_step                only the tokens this rank holds; the allocator of the step opens for their shapes
  3. count_targets *          the divisor of the loss, checked against the lengths
  4. updater.start            the learning rate; weights change only after the checkpoint's snapshot (wait_for_snapshot)
  5. [measuring pass] *       where optim.clip_mode needs the norm first: a backward, `finish_measuring`, the finiteness check
  6. backward_step *          gradients; with update=backward each module is updated here, as its gradients are reduced
  7. gather_results *         loss, tokens, peaks, busy times and the stop flag of every rank
  8. updater.finish *         the norm and clipping; a number that is not finite ends the run on every rank, before
  9. updater.apply            what was not updated in backward is; then the step's allocations are gone
 10. _finish_step             counts, certificate, stragglers, drift, metrics; `loop` then evaluates (*) and saves (*) where that is due
"""

from __future__ import annotations

import logging
import math
import os
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..checkpoint.restore import Restored
from ..errors import EXIT_DONE, EXIT_PREEMPTED
from ..estimate.measured.profile import DEFAULT_FILE, save_profile
from ..estimate.timing.utilisation import utilisation
from ..memory.arena.replay import Arena
from ..memory.arena.step import open_arena, step_allocator
from ..memory.position import Position
from ..model.adapters.base import check_same_base
from ..model.build import position_of
from ..model.stage import stage_of
from ..parallel.config import SequenceMode
from ..parallel.sequence.clock import BusyClock
from ..parallel.sequence.drift import Drift
from ..parallel.sequence.plan import StepPlan
from ..parallel.sequence.service import PlanRequest, PlanService, static_plan
from ..parallel.sharding.engine import FSDP2
from ..parallel.timeouts import CollectiveTimeout
from ..parallel.topology import whole_world
from ..utils.heartbeat import Heartbeat
from ..utils.orderly_end import closed_in_order
from ..utils.text import typed
from .agreed_ledger import PeakMemoryCheck
from .checkpointing import Saves
from .data.identity import DataChanges, check_data_changes, data_changes
from .evaluation.during import RunEvaluation
from .micro_batches import MicroBatchWork, count_targets, read_step, step_shape
from .non_finite import RowWatch, non_finite, weights_at_fault
from .objectives.build import RunObjective, means
from .objectives.heads import StepObjective
from .oom import LOW_HOST_BYTES, host_error, memory_errors_named
from .optimizers.algorithms import check_same_algorithm
from .optimizers.lr_course import Course, first_course, load_course, resumed_course
from .optimizers.updater import Gradients
from .profiling.first_probe import probe_before_training
from .reporting.events import start_fields, step_fields, straggler_rows
from .reporting.expert_balance import agreed_rows, balance_fields
from .reporting.metrics import Metrics
from .reporting.predicted_vs_measured import StepComparison, StepTimes, plan_report
from .reporting.source_use import source_fields
from .reporting.step_pace import Pace
from .reporting.step_results import Results, gather_results, host_names
from .reporting.stragglers import StageStragglers
from .run_settings import RunSettings, Stop
from .session import Session, build_session, close_store, joined_ranks, plain_config
from .step import backward_step
from .step_planner import Costs, StepPlanner, Totals, resolve_costs

log = logging.getLogger(__name__)
PRELOAD = ("torch.distributed.checkpoint.state_dict", *FSDP2.preload)
"""What the agent imports once, before it forks the ranks."""


def train(config: RunSettings, run_dir: Path, stop: Stop, pulse: Heartbeat | None = None) -> int:
    """Run to `train.steps` (exit code 0) or to a stop signal, saved (75). Collective over the ranks the agent started.

    `pulse` beats on the way, for the agent.
    """
    arena = open_arena(config.memory.arena, config.cluster.device.value)
    pulse = pulse or Heartbeat()
    pulse.at("joining the other ranks")
    # Nothing here or below closes after an error, which is not to wait for anything: what was snapshotted is written by itself.
    with joined_ranks(config.cluster, config.parallel.collective_timeout_s) as device:
        # First of all: it starts while the model is built.
        service = _plan_service(config)
        run = _Run(config, run_dir, device, service, pulse, arena)
        code = run.loop(stop)
        with pulse.long("closing"):
            run.session.checkpointer.close()
        if service is not None:
            service.close()
    return code


def _plan_service(config: RunSettings) -> PlanService | None:
    adaptive = config.parallel.sequence is SequenceMode.ADAPTIVE and dist.get_rank(whole_world()) == 0
    return PlanService(patience_s=config.parallel.plan_timeout_s) if adaptive else None


def _check_goes_on(config: RunSettings, session: Session, restored: Restored | None) -> None:
    """Raise ConfigError where the checkpoint's adapters are of another model, or its states another optimizer's."""
    if restored is not None:
        check_same_base(restored.metadata.get("adapter"), session.adapter, config.model, restored.step)
        check_same_algorithm(restored.metadata, config.optim, restored.step)


def _data_changes(config: RunSettings, session: Session, restored: Restored | None) -> DataChanges:
    """What is different from the data of the checkpoint; DataError where nobody asked for it."""
    if restored is None:
        return DataChanges((), ())
    changes = data_changes(restored.metadata.get("data"), session.data)
    check_data_changes(changes, config.data.changed, restored.step)
    return changes


def _course(config: RunSettings, extra: dict[str, Any], done: int) -> tuple[Course, str | None]:
    """The learning rate's schedule from here on, and a line on it where it is another than it was."""
    saved = load_course(extra.get("schedule", {}), config.optim)
    if saved is None:
        return first_course(config.optim, config.train.steps), None
    return resumed_course(config.optim, saved, done, config.train.steps)


class _Run:
    def __init__(
        self,
        config: RunSettings,
        run_dir: Path,
        device: torch.device,
        service: PlanService | None,
        pulse: Heartbeat,
        arena: Arena | None = None,
    ) -> None:
        self.config, self.rank, self.run_dir, self.pulse = config, dist.get_rank(whole_world()), run_dir, pulse
        saves = self.saves = Saves()
        pulse.at("building the model")
        self.session: Session = build_session(
            config, run_dir, device, saves.on_saved, saves.replicated, saves.mirrored, on_progress=pulse.at
        )
        pulse.at("looking for a checkpoint")
        restored = self.session.checkpointer.restore(lambda: pulse.at("reading a checkpoint"))
        extra = restored.extra if restored is not None else {}
        _check_goes_on(config, self.session, restored)
        self.data_changes = _data_changes(config, self.session, restored)
        self.done = self.began = restored.step if restored is not None else 0
        self.course, self.course_change = _course(config, extra, self.done)
        self.mix_change = self.session.source.resume_mix(extra.get("mix"), self.done, config.train.steps)
        self.first_loss: float | None = extra.get("first_loss")
        self.last_loss: float | None = extra.get("last_loss")
        self.total_tokens: int = extra.get("total_tokens", 0)
        self.peak_bytes: list[int] = []
        if restored is not None:
            self.session.updater.weights_changed()
            self.session.updater.load_state_dict(extra.get("updater", {}))
        self.step_s: list[float] = []
        self.pace, self.timeout = Pace(), CollectiveTimeout(self.session.topology, config.parallel.collective_timeout_s)
        self.metrics = Metrics(run_dir, config.logging, plain_config(config), restored is not None, rank=self.rank)
        self.only_in_memory = restored is not None and not restored.is_durable
        durable = None if restored is None or self.only_in_memory else restored.step
        saves.begin(self.session.checkpointer, self.metrics.write, durable)
        self.arena, self.allocator = arena, step_allocator(arena, self.metrics.write)
        self.position: Position = position_of(self.session.model)
        self.costs: Costs = self._resolve_costs(extra.get("costs"))
        self.planner = self._planner(service, extra)
        self.measured = StepComparison(Drift(self.costs.model), self.costs.overhead_s)
        if extra.get("costs", {}).get("fingerprint") == self.costs.fingerprint:
            self.measured.drift.load(extra.get("drift", {}))
        self.stragglers = StageStragglers(self.costs.model, self.session.topology.num_stages)
        self.objective = RunObjective(config, self.session, run_dir, resumed=restored is not None)
        self.certified = PeakMemoryCheck(self.session.ledger, device, self.metrics.write)
        self.position.listener = pulse.at
        self.low_on_host: tuple[int, int] | None = None
        """The first rank whose node has next to nothing left, and the bytes it has."""
        self.hosts = host_names(self.session.topology.world)
        self.evaluation = RunEvaluation(
            config, self.session, self.planner.plan_lengths, report=self.metrics.write, pulse=pulse,
            expected_s=self.pace.expected_s, timeout=self.timeout, saved=extra.get("evaluation"),
        )  # fmt: skip
        self._write_start(restored)

    def _resolve_costs(self, stored: dict[str, Any] | None) -> Costs:
        """The costs a checkpoint stored, those of a profile of this machine, or those a probe measures now. Collective."""
        costs = resolve_costs(self.config, self.session.ledger.slowest, self.session.device, stored)
        if self.done == self.config.train.steps:
            return costs
        self.position.at("probing this machine")
        with self.pulse.long("probing this machine"), self._memory_errors_named():
            return probe_before_training(self.config, self.session, costs, self.run_dir, step=self.done + 1, beat=self.pulse.at)

    def _planner(self, service: PlanService | None, extra: dict[str, Any]) -> StepPlanner:
        layout = self.session.layout
        request = PlanRequest(
            cost=self.costs.model,
            static_degree=layout.sp_degree,
            static_ulysses=layout.ulysses,
            linear_cost_tokens=self.session.linear_cost_tokens,
            certify=(os.cpu_count() or 1) > self.config.cluster.ranks_per_node,
            micro_batches=self.config.parallel.pipeline.micro_batches,
        )
        planner = StepPlanner(
            self.session.source.lengths,
            self.config.train.steps,
            request,
            self.config.parallel.sequence,
            service=service,
            barrier_free=self.config.parallel.barrier_free,
            report=self.metrics.write,
        )
        planner.totals = Totals(**extra.get("plan_totals", {}))
        return planner

    def loop(self, stop: Stop) -> int:
        """Steps until the end. After an error only the metrics end, and nothing is waited for (utils/orderly_end.py)."""
        with self.metrics, closed_in_order(self._close), self._memory_errors_named():
            if not self._ready(stop):
                self.metrics.write("stop", step=self.done, reason="signal")
                return EXIT_PREEMPTED
            self._secure()
            if self.evaluation.begin(self.done, stop):
                self.metrics.write("stop", step=self.done, reason="signal")
                return EXIT_PREEMPTED
            while not self.evaluation.is_over(self.done):
                stopping = self._step(stop)
                stopping = self.evaluation.after(self.done, stop, stopping)
                last = self.evaluation.is_over(self.done) and not self.evaluation.pending(self.done)
                best = self.evaluation.is_best(self.done)
                if stopping or last or best or self.session.checkpointer.due(self.done):
                    self._save(final=stopping or last or best)
                if best:
                    self._pin_best()
                if stopping or last:
                    with self.pulse.long("waiting for the checkpoint"):
                        self.saves.ensure_saved(self.done, mirrored=last)
                if self.low_on_host is not None and not last:
                    self._save(final=True)
                    self.session.checkpointer.wait()
                    raise host_error(self.session.ledger, *self.low_on_host, step=self.done, resume=typed("resume", self.run_dir))
                if stopping and not last:
                    self.metrics.write("stop", step=self.done, reason="signal")
                    return EXIT_PREEMPTED
            self._write_end()
        return EXIT_DONE

    def _close(self) -> None:
        close_store(self.session)
        self.session.updater.close()
        self.allocator.close()

    def _memory_errors_named(self) -> AbstractContextManager[None]:
        return memory_errors_named(
            self.session.ledger, self.position, self.session.device, step=lambda: self.done + 1, resume=typed("resume", self.run_dir)
        )

    def _ready(self, stop: Stop) -> bool:
        def plan(lengths: tuple[int, ...]) -> StepPlan:
            return static_plan(lengths, self.planner.request)

        return self.objective.ready(plan, stop=stop, report=self.metrics.write)

    def _step(self, stop: Stop) -> bool:
        """One update; True where any rank was asked to stop."""
        started = time.monotonic()
        self.pulse.begin_step(self.done, expected_s=self.pace.expected_s(), is_long=self.done == self.began)
        plan = self.planner.plan(self.done)
        expected_s = self.pace.expected_s(plan.predicted_s)
        self.pulse.expect(expected_s)
        self.timeout.expect(expected_s)
        self.position.at("reading data")
        topology = self.session.topology
        works = read_step(self.session.source, self.done, plan, topology.stage_rank, shares_experts=topology.shares_experts)
        with self.allocator.step(step_shape(works)):
            results, numbers, backward_s = self._update(plan, works, stop)
        self._finish_step(results, plan, numbers, started, backward_s)
        return results.stop

    def _update(self, plan: StepPlan, works: list[MicroBatchWork], stop: Stop) -> tuple[Results, dict[str, Any], float]:
        """Gradients and the optimizer's step; everything the step allocates is gone when it returns."""
        step, session, updater = self.done, self.session, self.session.updater
        targets = count_targets(works, session.topology, session.device)
        assert targets == session.source.num_target_tokens(step), "ranks and lengths disagree about the step's target tokens"
        clocks, watch, begun = [BusyClock(session.device) for _ in works], RowWatch(session.device), time.monotonic()
        rate = self.course.rate(self.config.optim, step)
        updater.start(rate, session.checkpointer.wait_for_snapshot)
        if updater.measures_first:
            shares = self._backward(works, self._objective(plan, targets, works), watch)
            self._check_finite(updater.finish_measuring(), shares, works, watch)
        objective = self._objective(plan, targets, works)
        shares = self._backward(works, objective, watch, clocks)
        self.position.at("gathering results")
        tokens = sum(work.shard.num_tokens for work in works)
        results = gather_results(
            session.topology.world, shares.sum(), objective.stats, clocks, tokens=tokens, peak_bytes=self._peak(), stop=stop.requested,
            num_stages=session.topology.num_stages,
        )
        backward_s = time.monotonic() - begun
        self.position.at("optimizer")
        gradients = updater.finish()
        self._check_finite(gradients, shares, works, watch, loss=results.loss)
        updater.apply()
        stage, topology = stage_of(session.model), session.topology
        rows, layers = agreed_rows(stage.expert_load, topology.stage)
        if rows is not None:
            stage.router_biases.update(rows[:, :-1], layers)
        balance = balance_fields(stage, rows, layers, topology)
        numbers = {"target_tokens": targets, "grad_norm": gradients.norm, "lr": rate, **means(objective, results.objective), **balance}
        numbers |= source_fields(session.source, step, objective, results.objective)
        if (number := session.source.stage(step)) is not None:
            numbers["train_stage"] = number
        return results, numbers, backward_s

    def _objective(self, plan: StepPlan, targets: int, works: list[MicroBatchWork]) -> StepObjective:
        """Anew for each pass over the step: it counts."""
        return self.objective.step(self.done, num_targets=targets, num_sequences=len(plan.lengths), works=works)

    def _backward(
        self, works: list[MicroBatchWork], objective: StepObjective, watch: RowWatch, clocks: list[BusyClock] | None = None
    ) -> torch.Tensor:
        """One pass over the step: this rank's losses; gradients go where the updater takes them."""
        on_last = self.session.updater.before_final_backward
        return backward_step(self.session.step_setup, works, objective, clocks=clocks, watch=watch, on_last=on_last)

    def _peak(self) -> int:
        """The most this rank has taken so far: with a planned arena of the plan, else what the certificate is held against."""
        planned = None if self.arena is None else self.arena.device_peak_bytes()
        return self.certified.peak_bytes() if planned is None else planned

    def _check_finite(
        self, gradients: Gradients, shares: torch.Tensor, works: list[MicroBatchWork], watch: RowWatch, loss: float = 0.0
    ) -> None:
        """NonFiniteLossError on every rank, naming the ranks, documents and tokens it came from."""
        session = self.session
        for value in (loss, gradients.norm):
            if not math.isfinite(value):
                raise non_finite(
                    value,
                    shares,
                    works,
                    watch,
                    session.source,
                    self.done,
                    layer=gradients.first_bad,
                    partly_applied=gradients.partly_applied,
                    # Where modules before were updated with bad numbers, weights say nothing of where those came from.
                    bad_weights=() if gradients.partly_applied else weights_at_fault(session.updater.weights, session.topology.world),
                )

    def _finish_step(self, results: Results, plan: StepPlan, numbers: dict[str, Any], started: float, backward_s: float) -> None:
        self.done += 1
        self.last_loss = results.loss
        self.first_loss = results.loss if self.first_loss is None else self.first_loss
        # Every stage sees each token.
        self.total_tokens += sum(results.tokens) // self.session.topology.num_stages
        self.peak_bytes = results.peak_bytes
        self.certified.look(self.done, results.peak_bytes)
        least = LOW_HOST_BYTES * self.config.cluster.ranks_per_node
        self.low_on_host = next(((rank, size) for rank, size in enumerate(results.host_free_bytes) if size < least), None)
        if self.session.device.type == "cuda":
            torch.cuda.synchronize(self.session.device)
        elapsed = time.monotonic() - started
        self.step_s.append(elapsed)
        self.pace.add(elapsed)
        self._name_stragglers(plan, results)
        times = StepTimes(results.busy_s, backward_s, elapsed)
        planned = self._measure(plan, times)
        if self.done % self.config.logging.every_steps and self.done != self.config.train.steps:
            return
        stages, arena = self.session.topology.num_stages, self.allocator.outcome()
        fields = step_fields(results, plan, step_s=elapsed, total_tokens=self.total_tokens, arena=arena, num_stages=stages)
        used = utilisation(self.session.ledger.whole, self.session.source.documents(self.done - 1), elapsed)
        self.metrics.write("step", step=self.done, **fields, **used.fields(), **numbers, **planned)

    def _name_stragglers(self, plan: StepPlan, results: Results) -> None:
        # Rank 0 alone reports.
        slow = self.stragglers.add(plan, results.own_s) if self.rank == 0 else None
        if slow is not None:
            self.metrics.write("stragglers", step=self.done, ranks=straggler_rows(slow, self.hosts))

    def _measure(self, plan: StepPlan, times: StepTimes) -> dict[str, Any]:
        """Compare the step with its plan; returns the fields for metrics.jsonl. News of drift is an event of its own."""
        static_s, plan = self.planner.background_results(self.done - 1, plan)
        self.measured.add(plan, times)
        if plan.predicted_s is not None and self.done - 1 > self.began:
            self.planner.totals.timed_s += times.step_s
            self.planner.totals.timed_predicted_s += plan.predicted_s
        drifted = self.measured.drift.news()
        if drifted:
            ratios = {str(degree): ratio for degree, ratio in drifted.items()}
            whole = self.session.topology.num_stages == 1
            self.metrics.write("drift", step=self.done, measured_over_predicted=ratios, can_profile=whole)
        totals, barrier_free = asdict(self.planner.totals), self.config.parallel.barrier_free
        return plan_report(plan, times, self.costs.overhead_s, barrier_free=barrier_free) | {"static_s": static_s, "plan_totals": totals}

    def _save(self, *, final: bool) -> None:
        """Start writing the state after the updates done so far; nothing where that was done already."""
        with self.pulse.long("saving"):
            if not self.saves.request(self.done, self._extra, final=final):
                return
            # Of stages there is no profile: it would be taken for one of all layers.
            whole = self.session.topology.num_stages == 1
            refitted = self.measured.profile(self.costs.key) if self.rank == 0 and whole else None
            if refitted is not None:
                rates = self.session.ledger.inputs.measured
                try:
                    save_profile(self.run_dir / DEFAULT_FILE, replace(refitted, rates=None if rates is None else rates.rates))
                except OSError as error:
                    # A full disk costs what was measured, and no step.
                    log.warning("%s cannot be written: %s", DEFAULT_FILE, error)

    def _extra(self) -> dict[str, Any]:
        """What a checkpoint holds beside the state."""
        return {
            "train": {"seed": self.config.train.seed, "step": self.done},
            "schedule": self.course.dump(self.config.optim, self.done),
            "layout": str(self.session.layout),
            "first_loss": self.first_loss,
            "last_loss": self.last_loss,
            "total_tokens": self.total_tokens,
            "costs": self.costs.dump(),
            "drift": self.measured.drift.dump(),
            "plan_totals": asdict(self.planner.totals),
            "planner": {"sequence": self.config.parallel.sequence.value, "pending": self.planner.pending(self.done)},
            "updater": self.session.updater.state_dict(),
            "evaluation": self.evaluation.state(),
            "mix": self.session.source.mix_state(),
            "wandb_id": wandb.read_text().strip() if (wandb := self.run_dir / "wandb_id").exists() else None,
        }

    def _pin_best(self) -> None:
        """Later checkpoints may remove this one as soon as they are on disk: it is pinned before."""
        with self.pulse.long("waiting for the checkpoint"):
            self.session.checkpointer.wait()
        self.evaluation.pin(self.done)

    def _secure(self) -> None:
        """What was restored from memory goes to disk first of all."""
        if self.only_in_memory:
            self._save(final=True)
            if self.done == self.config.train.steps:
                with self.pulse.long("waiting for the checkpoint"):
                    self.saves.ensure_saved(self.done, mirrored=True)

    def _write_start(self, restored: Restored | None) -> None:
        fields = start_fields(self.config, self.session, self.costs, self.certified.certificate, restored, self.hosts)
        schedule = {**self.course.dump(self.config.optim, self.done), "change": self.course_change}
        changes = {"data_changes": list(self.data_changes.lines), "mix_change": self.mix_change}
        self.metrics.write("start", step=self.done, **fields, schedule=schedule, **changes)

    def _write_end(self) -> None:
        self.metrics.write(
            "end",
            step=self.done,
            first_loss=self.first_loss,
            last_loss=self.last_loss,
            total_tokens=self.total_tokens,
            peak_bytes=self.peak_bytes,
            step_s_mean=sum(self.step_s) / len(self.step_s) if self.step_s else None,
            drift=self.measured.summary(),
            late_plans=self.planner.totals.late,
        )
