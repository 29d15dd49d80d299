"""Stages of a run: which steps they have, with which data settings, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from efflaunch.errors import ConfigError
from efflaunch.training.config import Objective, TrainConfig, TrainStage
from efflaunch.training.data.config import DataConfig, SourceConfig
from efflaunch.training.data.train_stages import check_stages, train_stages

SOURCES = {"short": SourceConfig(prefixes=["s"]), "long": SourceConfig(prefixes=["l"], weight=0.0)}


def configs(*stages: TrainStage, steps: int = 10, **changes: Any) -> tuple[TrainConfig, DataConfig]:
    data = {"sources": SOURCES, "max_seq_len": 4096, "global_batch_tokens": 8192} | changes
    objective = data.pop("objective", Objective.LANGUAGE_MODELLING)
    return TrainConfig(steps=steps, stages=list(stages), objective=objective), DataConfig(name="t", **data)


def test_stages_follow_each_other_and_the_last_has_what_is_left() -> None:
    asked = configs(TrainStage(steps=6, max_seq_len=1024, global_batch_tokens=2048), TrainStage(weights={"long": 2.0}))
    check_stages(*asked)
    first, second = train_stages(*asked)
    assert [(stage.number, stage.start, stage.stop, stage.steps, stage.key) for stage in (first, second)] == [
        (1, 0, 6, 6, "train.stages[0]"),
        (2, 6, 10, 4, "train.stages[1]"),
    ]
    assert (first.data.max_seq_len, first.data.global_batch_tokens) == (1024, 2048)
    assert (second.data.max_seq_len, second.data.global_batch_tokens) == (4096, 8192)
    weights = [{name: source.weight for name, source in stage.data.sources.items()} for stage in (first, second)]
    assert weights == [{"short": 1.0, "long": 0.0}, {"short": 1.0, "long": 2.0}]
    assert train_stages(*configs()) == ()


WRONG: dict[str, tuple[list[TrainStage], dict[str, Any]]] = {
    "train.stages: found 9 steps; expected train.steps=10 in all": ([TrainStage(steps=9)], {}),
    "train.stages: found 10 steps, and a last stage of what is left": ([TrainStage(steps=10), TrainStage()], {}),
    "train.stages[0].steps: found null": ([TrainStage(), TrainStage()], {}),
    "train.stages[0].max_seq_len: found 8K; expected at most data.max_seq_len=4K": ([TrainStage(max_seq_len=8192)], {}),
    "train.stages[0].global_batch_tokens: found 16K; expected at most": ([TrainStage(global_batch_tokens=16384)], {}),
    "train.stages[0].global_batch_tokens: found 2K; expected at least 4K": ([TrainStage(global_batch_tokens=2048)], {}),
    "train.stages[0].weights: found the name 'web'": ([TrainStage(weights={"web": 1.0})], {}),
    "train.stages[0].weights: found 0 for every source": ([TrainStage(weights={"short": 0.0})], {}),
    "train.stages: found stages without data.sources": ([TrainStage()], {"sources": {}}),
    "train.stages: found stages with train.objective=dpo": ([TrainStage()], {"objective": Objective.DPO}),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_makes_no_stages_is_refused(message: str) -> None:
    stages, changes = WRONG[message]
    with pytest.raises(ConfigError) as error:
        check_stages(*configs(*stages, **changes))
    assert message in str(error.value) and error.value.hint
