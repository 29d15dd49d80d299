"""The objective of a run: from its settings and corpora to what one step trains for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from ...errors import DataError
from ...parallel.sequence.plan import StepPlan
from ..config import ModelConfig, Objective, TrainConfig
from ..data.scores import Scores
from ..score import Stop, fill_scores
from ..setup import Session
from .heads import LanguageModelling, Preference, Rollout, StepObjective
from .rollout import RolloutOptions


class _Config(Protocol):
    @property
    def train(self) -> TrainConfig: ...
    @property
    def model(self) -> ModelConfig: ...


class RunObjective:
    """`ready` once, then `step` for each step."""

    def __init__(self, config: _Config, session: Session, run_dir: Path, *, resumed: bool) -> None:
        """`resumed`: the weights are from a checkpoint."""
        self._train, self._session, self._run_dir, self._resumed = config.train, session, run_dir, resumed
        self._weights = _initial_weights(config)
        self._scores = Scores(session.source, run_dir, config.train, None if resumed else self._weights)

    def ready(self, plan: Callable[[tuple[int, ...]], StepPlan], *, stop: Stop, report: Callable[..., None]) -> bool:
        """Score what is missing with the initial weights; False where it was told to stop meanwhile. Collective over all ranks.

        DataError where weights are not the initial ones any more.
        """
        missing = self._scores.missing
        if not missing:
            return True
        if self._resumed:
            raise _lost(self._session.source.corpora[missing[0]].prefix)
        if not fill_scores(self._session, self._run_dir, missing, self._weights, plan, stop=stop, report=report):
            return False
        self._scores = Scores(self._session.source, self._run_dir, self._train, self._weights)
        assert not self._scores.missing
        return True

    def step(self, step: int, *, num_targets: int, num_sequences: int) -> StepObjective:
        """What step `step` (from 0) trains for."""
        train, scores, device = self._train, self._scores, self._session.device
        if train.objective is Objective.DPO:
            return Preference(num_sequences, device, beta=train.dpo_beta, reference=lambda index: scores.pair(step, index))
        if train.objective is Objective.GRPO:
            options = RolloutOptions(train.grpo_clip_low, train.grpo_clip_high, train.grpo_kl_weight)
            return Rollout(
                num_targets, device, options=options, data=lambda *place: scores.completion(step, *place), kl=scores.has_reference
            )
        return LanguageModelling(num_targets, device)


def means(objective: StepObjective, sums: list[float]) -> dict[str, float]:
    """What metrics.jsonl says of the objective, from sums over all ranks."""
    return {name: total / objective.count for name, total in zip(objective.names, sums, strict=True)}


def _initial_weights(config: _Config) -> str:
    """Changes with what the weights of a run that begins are made from."""
    made_from = [asdict(config.model), config.train.dtype, config.train.seed if config.model.path is None else None]
    return hashlib.sha256(repr(made_from).encode()).hexdigest()


def _lost(prefix: str) -> DataError:
    return DataError(
        f"corpus {prefix}",
        found="no log-probabilities under the weights this run began with, and weights that were trained since",
        expected="them in RUN_DIR/scores, or beside the corpus",
        hint=f"put {prefix}.ref.bin (grpo: .old.bin) there, or start a new run",
    )
