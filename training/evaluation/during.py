"""Evaluates a run while it trains: when it is due, on every rank alike, and what follows from it. Weights and steps stay what they are.

Note: interruptions. A stop signal during an evaluation ends it after the step that runs; the run saves and ends as ever, and since
no checkpoint says that this evaluation is done, the next start begins with it. A crash in it is a crash after a step that was not
saved yet. A restart repeats whole evaluations, never parts of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ...checkpoint.files import step_path
from ...model.build import position_of
from ...parallel.sequence.plan import StepPlan
from ...parallel.timeouts import CollectiveTimeout
from ...utils.heartbeat import Heartbeat
from ..run_settings import RunSettings, Stop
from ..session import Session
from .best import load_best
from .corpus import EvalCorpus, check_followed, open_corpora
from .measure import Evaluator, Plan
from .needles import make_needles
from .pin import is_ours, pin_best

log = logging.getLogger(__name__)


class RunEvaluation:
    """The evaluations of one run: `begin` before its first step, `after` each; `state` goes into checkpoints."""

    def __init__(
        self,
        config: RunSettings,
        session: Session,
        plan: Plan,
        *,
        report: Callable[..., None],
        pulse: Heartbeat,
        expected_s: Callable[[float | None], float],
        timeout: CollectiveTimeout,
        saved: Mapping[str, Any] | None,
    ) -> None:
        """`saved`: the `state` of the checkpoint that was restored. `expected_s`: of a step, from what its plan predicts, as training's."""
        self._eval, self._train, self._session, self._report, self._pulse = config.eval, config.train, session, report, pulse
        self._expected_s, self._timeout, self._plan = expected_s, timeout, plan
        self._corpora: list[EvalCorpus] = []
        if config.eval.is_on:
            self._corpora = open_corpora(
                config.eval, max_seq_len=config.data.max_seq_len, vocab_size=session.spec.vocab_size, tokenizer=session.source.tokenizer
            )
            check_followed(config.train.keep_best, self._corpora)
        with pulse.long("making needles"):
            self._needles = make_needles(config.eval, session.source.tokenizer, session.spec.vocab_size)
        self._evaluator = Evaluator(
            session,
            self._planned,
            batch_tokens=config.data.global_batch_tokens,
            vocab_size=session.spec.vocab_size,
            context_tokens=config.eval.context_tokens,
        )
        saved = saved or {}
        self._last: int | None = saved.get("step")
        self._best = load_best(config.train.keep_best, saved.get("best"))
        self._is_first = True

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the step of the last whole evaluation, and the best one."""
        return {"step": self._last, "best": None if self._best is None else self._best.dump()}

    @property
    def ends(self) -> bool:
        """Whether the run ends here: as many evaluations as train.patience says were no better."""
        return self._best is not None and self._best.ends(self._train.patience)

    def is_over(self, done: int) -> bool:
        """Whether there is nothing left to train after `done` updates."""
        return done == self._train.steps or self.ends

    def is_best(self, done: int) -> bool:
        """Whether the weights after `done` updates are the best so far."""
        return self._best is not None and self._best.step == done and self._last == done

    def pending(self, done: int) -> bool:
        """Whether there is an evaluation after `done` updates that has not come to its end."""
        if not self._eval.is_on or self._last == done:
            return False
        every, over = self._eval.every_steps, self.is_over(done)
        return (every is not None and done > 0 and done % every == 0) or (self._eval.at_start and done == 0) or (self._eval.at_end and over)

    def begin(self, done: int, stop: Stop) -> bool:
        """Evaluate what is due before the next step; True where a stop was asked for meanwhile. Collective."""
        # A crash may have come between a save and its pin.
        self._pin(only_new=True)
        if not self.pending(done):
            return False
        stopped = self._evaluate(done, stop)
        if not stopped:
            # Its checkpoint, where there is one, is the one that was restored.
            self.pin(done)
        return stopped

    def after(self, done: int, stop: Stop, stopping: bool) -> bool:
        """Evaluate what is due after `done` updates, unless the run is `stopping`; whether it is to stop. Collective."""
        if stopping or not self.pending(done):
            return stopping
        return self._evaluate(done, stop)

    def pin(self, done: int) -> None:
        """Pin the checkpoint of `done` where it is the best one and on disk."""
        if self.is_best(done):
            self._pin()

    def _pin(self, *, only_new: bool = False) -> None:
        best, rank = self._best, self._session.topology.rank
        if best is None or best.step is None or rank != 0:
            return
        directory = self._session.checkpointer.directory
        if only_new and is_ours(step_path(directory, best.step)):
            return
        try:
            pinned = pin_best(directory, best.step, f"{best.metric} {best.value} at step {best.step}")
        except OSError as error:
            log.warning("the best checkpoint cannot be pinned: %s", error)
            pinned = False
        self._report("best", step=best.step, metric=best.metric, value=best.value, pinned=pinned)

    def _evaluate(self, done: int, stop: Stop) -> bool:
        """All corpora; True where a stop was asked for before the end."""
        self._pulse.begin_step(done, expected_s=self._expected_s(None), is_long=self._is_first)
        self._is_first = False
        position_of(self._session.model).at("evaluating")
        metrics: dict[str, float | None] = {}
        for corpus in self._corpora:
            begun = time.monotonic()
            result = self._evaluator.corpus(corpus, lambda _done, _total: not self._any_rank(stop.requested))
            if result is None:
                return True
            metrics |= result.metrics()
            self._report("eval", step=done, **result.fields(), eval_s=time.monotonic() - begun)
        if self._needles is not None:
            begun = time.monotonic()
            found = self._evaluator.needles(self._needles, lambda _done, _total: not self._any_rank(stop.requested))
            if found is None:
                return True
            metrics |= found.metrics()
            self._report("eval", step=done, **found.fields(), eval_s=time.monotonic() - begun)
        self._last = done
        if self._best is not None:
            self._best = self._best.add(done, metrics)
            if self.ends and done < self._train.steps:
                facts = {"metric": self._best.metric, "best": self._best.value, "best_step": self._best.step}
                self._report("early_stop", step=done, **facts, evaluations=self._best.worse)
        return False

    def _planned(self, lengths: Sequence[int]) -> StepPlan:
        """The plan of a step, which may be larger than training's in an early one of train.stages."""
        plan = self._plan(lengths)
        expected_s = self._expected_s(plan.predicted_s)
        self._pulse.expect(expected_s)
        self._timeout.expect(expected_s)
        return plan

    def _any_rank(self, flag: bool) -> bool:
        flags = torch.tensor(int(flag), device=self._session.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._session.topology.world)
        return bool(flags)
