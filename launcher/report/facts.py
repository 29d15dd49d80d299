"""Collects what a run directory says of a run: the steps that count, evaluations, starts, checkpoints, settings and their changes."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ..config.aliases import current_data
from ..config.run_config import Config
from ..config.schema import dump_config, flat, load_config
from ..rundir.metrics_reader import Event, MetricsFollower
from ..rundir.progress import RunProgress
from ..rundir.run_dir import config_diff, read_run
from ..rundir.state import Attempt, read_state


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """One run, from its files. Of steps that were taken twice the last counts."""

    run_dir: Path
    config: Config
    revision: int
    progress: RunProgress
    steps: tuple[Event, ...]
    evaluations: tuple[Event, ...]
    events: tuple[Event, ...]
    """Every event but those of steps and evaluations, in order."""
    attempts: tuple[Attempt, ...]
    state: str
    changes: tuple[tuple[int, tuple[str, ...]], ...]
    """(revision, what differs from the one before)."""

    @property
    def name(self) -> str:
        """The run's own name: its directory's."""
        return self.run_dir.resolve().name

    def of(self, *kinds: str) -> list[Event]:
        """Events of these kinds, in order."""
        return [event for event in self.events if event["event"] in kinds]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a number of the step events, where there is one."""
        pairs = [(int(event["step"]), float(event[key])) for event in self.steps if event.get(key) is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def median(self, key: str) -> float | None:
        """The median over steps, without the first, which warms up."""
        values = self.series(key)[1]
        return statistics.median(values[1:] or values) if values else None


def read_facts(run_dir: Path) -> RunFacts:
    """Read them; ConfigError where there is no run. Damaged and half-written lines of metrics.jsonl are passed over."""
    stored = read_run(run_dir)
    events = MetricsFollower(run_dir).read()
    steps, evaluations, others = _counted(events)
    state = read_state(run_dir)
    return RunFacts(
        run_dir=run_dir,
        config=stored.config,
        revision=stored.revision,
        progress=RunProgress().apply(events),
        steps=tuple(steps),
        evaluations=tuple(evaluations),
        events=tuple(others),
        attempts=() if state is None else state.attempts,
        state="not started" if state is None else state.state,
        changes=tuple(_changes(run_dir, stored.config, stored.revision)),
    )


def _counted(events: Iterable[Event]) -> tuple[list[Event], list[Event], list[Event]]:
    """Steps and evaluations that count, and all other events: a start takes back what came after the step it resumes from."""
    steps: dict[int, Event] = {}
    evaluations: dict[tuple[str, int], Event] = {}
    others = []
    for event in events:
        if event["event"] == "step":
            steps[int(event["step"])] = event
        elif event["event"] == "eval":
            evaluations[event["corpus"], int(event["step"])] = event
        else:
            others.append(event)
        if event["event"] == "start":
            kept = event.get("resumed_from") or 0
            steps = {step: value for step, value in steps.items() if step <= kept}
            evaluations = {key: value for key, value in evaluations.items() if key[1] <= kept}
    return [steps[step] for step in sorted(steps)], [evaluations[key] for key in sorted(evaluations)], others


def _changes(run_dir: Path, newest: Config, revision: int) -> list[tuple[int, tuple[str, ...]]]:
    configs = [(number, _revision(run_dir, number)) for number in range(1, revision)] + [(revision, newest)]
    changes = []
    for (_, before), (number, after) in zip(configs, configs[1:], strict=False):
        lines = ("the revision before it cannot be read",) if before is None or after is None else tuple(config_diff(before, after))
        changes.append((number, lines))
    return changes


def _revision(run_dir: Path, number: int) -> Config | None:
    """An earlier configuration; None where its file is gone or of a version that this one does not read."""
    import yaml

    path = run_dir / "revisions" / f"{number}.yaml"
    try:
        data = yaml.safe_load(path.read_bytes())
        own = {key: value for key, value in data.items() if key not in ("efflaunch_version", "revision")}
        return load_config(current_data(own, str(path)))
    except (OSError, ValueError, AttributeError, yaml.YAMLError, ConfigError):
        return None


def settings(config: Config) -> dict[str, str]:
    """Every key of a configuration and its value as text."""
    return {key: json.dumps(value) if isinstance(value, (list, dict)) else str(value) for key, value in flat(dump_config(config))}


def newest_metrics(facts: RunFacts) -> dict[str, Any]:
    """The newest value of every evaluation metric."""
    metrics: dict[str, Any] = {}
    for event in sorted(facts.evaluations, key=lambda event: int(event["step"])):
        metrics |= event["metrics"]
    return metrics
