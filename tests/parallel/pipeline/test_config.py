"""Pipelines that cannot be, in the words of the configuration."""

from __future__ import annotations

from typing import Any

import pytest

from efflaunch.errors import ConfigError
from efflaunch.parallel.pipeline.config import PipelineConfig, PipelineOrder, check_pipeline

INTERLEAVED = PipelineOrder.INTERLEAVED


def check(world: int = 8, layers: int = 8, barrier_free: bool = False, **fields: Any) -> None:
    check_pipeline(PipelineConfig(**fields), world_size=world, num_layers=layers, barrier_free=barrier_free)


@pytest.mark.parametrize(
    ("fields", "key", "found", "hint"),
    [
        ({"stages": 3}, "stages", "3 on 8 ranks", "parallel.pipeline.stages=2"),
        ({"stages": 8, "layers": None}, None, "", ""),
        ({"stages": 16, "world": 16}, "stages", "16 for 8 decoder layers", "parallel.pipeline.stages=8"),
        ({"stages": 2, "layers": [3, 4]}, "layers", "2 stages of 7 layers", "parallel.pipeline.layers=[4,4]"),
        ({"stages": 2, "layers": [3, 4, 1]}, "layers", "3 stages of 8 layers", "parallel.pipeline.layers=[4,4]"),
        ({"layers": [8]}, "layers", "[8]", "parallel.pipeline.layers=null"),
        ({"stages": 2, "virtual": 2}, "virtual", "2 with parallel.pipeline.order=1f1b", "parallel.pipeline.order=interleaved"),
        ({"stages": 2, "order": INTERLEAVED}, "virtual", "1 with interleaved", "parallel.pipeline.virtual=2"),
        ({"stages": 2, "order": INTERLEAVED, "virtual": 5}, "virtual", "5 with interleaved", "parallel.pipeline.virtual=4"),
        ({"stages": 8, "order": INTERLEAVED, "virtual": 2}, "order", "interleaved with 8 decoder layers", "parallel.pipeline.order=1f1b"),
        ({"stages": 2, "micro_batches": 0}, "micro_batches", "0", ""),
    ],
)
def test_what_is_refused_names_the_nearest_that_works(fields: dict[str, Any], key: str | None, found: str, hint: str) -> None:
    asked = dict(fields)
    layers = asked.pop("layers", None)
    world = asked.pop("world", 8)
    if key is None:
        assert check_pipeline(PipelineConfig(layers=layers, **asked), world_size=world, num_layers=8, barrier_free=False) is None
        return
    with pytest.raises(ConfigError) as caught:
        check_pipeline(PipelineConfig(layers=layers, **asked), world_size=world, num_layers=8, barrier_free=False)
    assert caught.value.where == f"parallel.pipeline.{key}" and found in caught.value.found and hint in caught.value.hint


def test_stages_wait_for_each_other() -> None:
    with pytest.raises(ConfigError, match="barrier_free"):
        check(stages=2, barrier_free=True)


def test_with_one_stage_nothing_is_asked_of_the_model() -> None:
    assert check_pipeline(PipelineConfig(), world_size=7, num_layers=0, barrier_free=True) is None
