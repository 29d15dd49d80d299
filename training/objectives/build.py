"""Builds the objective of a run from its settings and corpora."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from ...errors import DataError
from ...model.adapters.base import model_digest
from ...model.adapters.config import AdapterConfig
from ...model.adapters.peft_config import WEIGHTS
from ...model.config import ModelConfig
from ...parallel.sequence.plan import StepPlan
from ...parallel.topology import Topology
from ..config import Objective, TrainConfig
from ..data.scores import Scores, needed_scores
from ..micro_batches import MicroBatchWork, count_targets
from ..run_settings import Stop
from ..score_corpus import fill_scores
from ..session import Session
from .heads import LanguageModelling, Preference, Rollout, SourceLosses, StepObjective
from .implicit_reference import pair_reference
from .preference import CHOSEN, PairOptions
from .rollout import RolloutOptions


class _Config(Protocol):
    @property
    def train(self) -> TrainConfig: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def adapter(self) -> AdapterConfig: ...


def has_implicit_reference(train: TrainConfig, adapter: AdapterConfig) -> bool:
    """Whether the reference is the frozen model itself: that of DPO, where nothing but adapters is trained."""
    return train.objective is Objective.DPO and adapter.leaves_reference


class RunObjective:
    """The objective of a run: call `ready` once, then `step` for each step."""

    def __init__(self, config: _Config, session: Session, run_dir: Path, *, resumed: bool) -> None:
        """Open the objective; `resumed`: the weights are from a checkpoint."""
        self._train, self._session, self._run_dir, self._resumed = config.train, session, run_dir, resumed
        needed = not resumed and any(needed_scores(config.train))
        self._weights = _agreed(initial_weights(config), session.topology) if needed else None
        self._scores = Scores(session.source, run_dir, config.train, self._weights)
        self._implicit = has_implicit_reference(config.train, config.adapter) and bool(self._scores.missing)
        self._reference: tuple[int, np.ndarray] | None = None
        """The step that was last asked for, and its pairs' log-probabilities under the frozen model."""

    def ready(self, plan: Callable[[tuple[int, ...]], StepPlan], *, stop: Stop, report: Callable[..., None]) -> bool:
        """Score what is missing with the initial weights; False where a stop was requested meanwhile. Collective over all ranks.

        DataError where weights are not the initial ones any more.
        """
        missing = self._scores.missing
        if not missing or self._implicit:
            return True
        if self._resumed:
            raise _lost(self._session.source.corpora[missing[0]].prefix)
        assert self._weights is not None
        if not fill_scores(self._session, self._run_dir, missing, self._weights, plan, stop=stop, report=report):
            return False
        self._scores = Scores(self._session.source, self._run_dir, self._train, self._weights)
        assert not self._scores.missing
        return True

    def step(self, step: int, *, num_targets: int, num_sequences: int, works: Sequence[MicroBatchWork]) -> StepObjective:
        """The objective of step `step` (from 0), whose work on this rank is `works`. Collective over the stage."""
        train, scores, device = self._train, self._scores, self._session.device
        if train.objective is Objective.DPO:
            return self._preference(step, num_sequences, works)
        if train.objective is Objective.GRPO:
            data, options = (lambda *place: scores.completion(step, *place)), _rollout_options(train)
            return Rollout(num_targets, num_sequences, device, options=options, data=data, kl=scores.has_reference)
        return LanguageModelling(num_targets, device, smoothing=train.label_smoothing, by_source=self._by_source(step))

    def _by_source(self, step: int) -> SourceLosses | None:
        source = self._session.source
        if not source.source_names:
            return None
        return SourceLosses(len(source.source_names), lambda sequence: source.source_of(step, sequence))

    def _preference(self, step: int, num_pairs: int, works: Sequence[MicroBatchWork]) -> Preference:
        train, device, scores = self._train, self._session.device, self._scores
        options = PairOptions(train.dpo_beta, train.dpo_loss, train.dpo_label_smoothing, train.dpo_sft_weight)
        chosen = count_targets(works, self._session.topology, device, number=CHOSEN) if train.dpo_sft_weight else 0
        pairs = self._implicit_reference(step, num_pairs, works) if self._implicit else None

        def reference(sequence: int) -> np.ndarray:
            return scores.pair(step, sequence) if pairs is None else pairs[sequence]

        return Preference(num_pairs, device, options=options, reference=reference, chosen_tokens=chosen)

    def _implicit_reference(self, step: int, num_pairs: int, works: Sequence[MicroBatchWork]) -> np.ndarray:
        if self._reference is None or self._reference[0] != step:
            self._reference = step, pair_reference(self._session.step_setup, works, num_pairs)
        return self._reference[1]


def _rollout_options(train: TrainConfig) -> RolloutOptions:
    return RolloutOptions(
        train.grpo_clip_low,
        train.grpo_clip_high,
        train.grpo_kl_weight,
        delta=train.grpo_delta,
        normalize=train.grpo_normalize,
        max_completion=train.grpo_max_completion,
        level=train.grpo_ratio,
    )


def means(objective: StepObjective, sums: list[float]) -> dict[str, float]:
    """The objective's entries of metrics.jsonl, from sums over all ranks."""
    return {name: total / objective.count for name, total in zip(objective.names, sums[: len(objective.names)], strict=True)}


def initial_weights(config: _Config) -> str:
    """A digest of the run's first model (`model_digest`), and of the adapter it starts from; one that starts at zero changes nothing."""
    digest = model_digest(config.model, config.train.seed, config.train.dtype)
    if config.adapter.init is None:
        return digest
    with (Path(config.adapter.init) / WEIGHTS).open("rb") as file:
        return digest + hashlib.file_digest(file, "sha256").hexdigest()


def _agreed(name: str, topology: Topology) -> str:
    """Give rank 0's value to all ranks: nodes may have other copies, and what is missing must be missing for all. Collective."""
    payload = [name]
    dist.broadcast_object_list(payload, 0, group=topology.world, device=torch.device("cpu"))
    return payload[0]


def _lost(prefix: str) -> DataError:
    return DataError(
        f"corpus {prefix}",
        found="no log-probabilities under the weights this run began with, and weights that were trained since",
        expected="them in RUN_DIR/scores, or beside the corpus",
        hint=f"put {prefix}.ref.bin (grpo: .old.bin) there, or start a new run",
    )
