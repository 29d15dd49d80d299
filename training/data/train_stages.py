"""Decides which stage of train.stages each step is in, and what its data settings are. No torch, no numpy."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...errors import ConfigError
from ...units import format_tokens
from ..config import Objective, TrainConfig, TrainStage
from .config import DataConfig


@dataclass(frozen=True, slots=True)
class Stage:
    """Steps `start ... stop - 1` of a run, counted from 0, and their data settings."""

    number: int
    """Counted from 1."""
    start: int
    stop: int
    data: DataConfig

    @property
    def key(self) -> str:
        """Its place in the configuration, for messages."""
        return f"train.stages[{self.number - 1}]"

    @property
    def steps(self) -> int:
        return self.stop - self.start


def train_stages(train: TrainConfig, data: DataConfig) -> tuple[Stage, ...]:
    """The stages of a run in their order, those of train.stages that `check_stages` has seen; none without any."""
    stages, start = [], 0
    for number, asked in enumerate(train.stages, 1):
        stop = train.steps if asked.steps is None else start + asked.steps
        stages.append(Stage(number, start, stop, _data(asked, data)))
        start = stop
    return tuple(stages)


def _data(stage: TrainStage, data: DataConfig) -> DataConfig:
    """The data settings of a run in one of its stages."""
    sources = {name: replace(source, weight=stage.weights.get(name, source.weight)) for name, source in data.sources.items()}
    return replace(
        data,
        sources=sources,
        max_seq_len=data.max_seq_len if stage.max_seq_len is None else stage.max_seq_len,
        global_batch_tokens=data.global_batch_tokens if stage.global_batch_tokens is None else stage.global_batch_tokens,
    )


def check_stages(train: TrainConfig, data: DataConfig) -> None:
    """Raise ConfigError where train.stages do not make up train.steps, or one of them cannot be trained as `data` is planned."""
    if not train.stages:
        return
    if train.objective is not Objective.LANGUAGE_MODELLING:
        found = f"stages with train.objective={train.objective.value}"
        raise ConfigError("train.stages", found=found, expected="language modelling", hint="train.stages=[]")
    if not data.sources:
        expected, hint = "data.sources, of which each stage has its shares", "data.sources={all: {prefixes: [PREFIX]}}"
        raise ConfigError("train.stages", found="stages without data.sources", expected=expected, hint=hint)
    _check_steps(train)
    for stage, asked in zip(train_stages(train, data), train.stages, strict=True):
        _check_sizes(stage, data)
        _check_weights(stage, asked)


def _check_steps(train: TrainConfig) -> None:
    given = [stage.steps for stage in train.stages]
    if None in given[:-1]:
        where, hint = f"train.stages[{given.index(None)}].steps", "steps: NUMBER in every stage but the last"
        raise ConfigError(where, found="null", expected="steps: only the last stage may have what is left", hint=hint)
    total = sum(steps for steps in given if steps is not None)
    if total == train.steps and given[-1] is not None:
        return
    if given[-1] is not None or total >= train.steps:
        left = "" if given[-1] is not None else ", and a last stage of what is left"
        expected = f"train.steps={train.steps} in all" if given[-1] is not None else f"fewer than train.steps={train.steps} before the last"
        hint = f"train.steps={total + (given[-1] is None)}, or other steps in train.stages"
        raise ConfigError("train.stages", found=f"{total} steps{left}", expected=expected, hint=hint)


def _check_sizes(stage: Stage, data: DataConfig) -> None:
    for name in ("max_seq_len", "global_batch_tokens"):
        mine, most = getattr(stage.data, name), getattr(data, name)
        if mine > most:
            raise ConfigError(
                f"{stage.key}.{name}",
                found=format_tokens(mine),
                expected=f"at most data.{name}={format_tokens(most)}, which layout and memory are planned for",
                hint=f"data.{name}={format_tokens(mine)}".replace(",", ""),
            )
    if stage.data.global_batch_tokens < stage.data.max_seq_len:
        length = format_tokens(stage.data.max_seq_len)
        raise ConfigError(
            f"{stage.key}.global_batch_tokens",
            found=format_tokens(stage.data.global_batch_tokens),
            expected=f"at least {length}, the stage's longest sequence",
            hint=f"global_batch_tokens: {length} in that stage",
        )


def _check_weights(stage: Stage, asked: TrainStage) -> None:
    names = sorted(stage.data.sources)
    for name in asked.weights:
        if name not in names:
            expected = f"sources of data.sources: {', '.join(names)}"
            hint = f"weights: {{{names[0]}: 1}} in that stage"
            raise ConfigError(f"{stage.key}.weights", found=f"the name {name!r}"[:200], expected=expected, hint=hint)
    if not any(source.weight for source in stage.data.sources.values()):
        hint = f"weights: {{{names[0]}: 1}} in that stage"
        raise ConfigError(f"{stage.key}.weights", found="0 for every source", expected="weights that sum to more than 0", hint=hint)
