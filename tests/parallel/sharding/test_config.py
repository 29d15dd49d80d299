"""A stage where the engine has stages, and none where it has not; what is typed reaches the run."""

from __future__ import annotations

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher.config.compose import compose
from efflaunch.parallel.sharding.config import Backend, EngineConfig, check_stage


def test_the_default_is_torch_and_a_group_chooses_another() -> None:
    assert compose(["+experiment=quickstart"]).engine == EngineConfig(name="torch")
    chosen = compose(["+experiment=quickstart", "engine=deepspeed", "engine.stage=2"]).engine
    assert chosen.backend is Backend.DEEPSPEED and chosen.stage == 2
    assert compose(["+experiment=quickstart", "engine=deepspeed"]).engine.stage == 3


@pytest.mark.parametrize(
    ("engine", "found", "hint"),
    [
        (EngineConfig(stage=2), "2 with engine=torch", "engine=deepspeed"),
        (EngineConfig(name="deepspeed", backend=Backend.DEEPSPEED), "null with engine=deepspeed", "engine.stage=3"),
        (EngineConfig(name="deepspeed", backend=Backend.DEEPSPEED, stage=4), "4", "engine.stage=null, or a number such as 1"),
    ],
)
def test_a_stage_that_is_none_is_refused(engine: EngineConfig, found: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_stage(engine)
    assert error.value.where == "engine.stage" and found in str(error.value) and hint in error.value.hint
