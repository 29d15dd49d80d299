"""What is refused with several stages, before anything is written, and what to type instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher.commands.profile import profile
from efflaunch.launcher.config.checks import check_config
from efflaunch.launcher.config.compose import compose

STAGES = ("+experiment=quickstart", "parallel.pipeline.stages=2")
INTERLEAVED = ("parallel.pipeline.order=interleaved", "parallel.pipeline.virtual=2")
ZERO = "parallel.pipeline.order=zero_bubble"


@pytest.mark.parametrize(
    ("overrides", "where", "hint"),
    [
        (("parallel.pipeline.stages=3",), "parallel.pipeline.stages", "parallel.pipeline.stages=2"),
        (("parallel.barrier_free=true",), "parallel.barrier_free", "parallel.barrier_free=false"),
        (("parallel.pipeline.layers=[1,2]",), "parallel.pipeline.layers", "parallel.pipeline.layers=[2,2]"),
        (("model.tie_embeddings=true", "optim.state_device=host"), "optim.state_device", "optim.state_device=device"),
        (("model.tie_embeddings=true", "optim.update=backward", "optim.grad_clip=null"), "optim.update", "optim.update=step"),
        ((*INTERLEAVED, "optim.state_device=host"), "optim.state_device", "parallel.pipeline.order=1f1b"),
        ((ZERO, "optim.state_device=host"), "optim.state_device", "parallel.pipeline.order=1f1b"),
        ((ZERO, "memory.compile=true"), "memory.compile", "parallel.pipeline.order=1f1b"),
        ((ZERO, "adapter=lora"), "adapter.method", "parallel.pipeline.order=1f1b"),
        ((ZERO, "parallel.pipeline.virtual=2"), "parallel.pipeline.virtual", "parallel.pipeline.order=interleaved"),
        (("parallel.profile=profile.yaml",), "parallel.profile", "parallel.profile=null"),
        (("parallel.replicate=4",), "parallel.replicate", "parallel.replicate=2"),
        (("parallel.sequence=static", "parallel.sp_degree=4"), "parallel.sp_degree", "parallel.sp_degree=2"),
    ],
)
def test_a_refusal_says_what_to_type(overrides: tuple[str, ...], where: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(compose([*STAGES, *overrides]))
    assert caught.value.where == where and hint in caught.value.hint


def test_there_is_no_profile_of_stages(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a profile"):
        profile(compose([*STAGES]), tmp_path / "profile.yaml", 1.0, False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "overrides",
    [(), INTERLEAVED, (ZERO,), ("parallel.pipeline.order=gpipe",), ("parallel.pipeline.layers=[3,1]",), ("optim.state_device=host",)],
)
def test_what_works_is_accepted(overrides: tuple[str, ...]) -> None:
    config = compose([*STAGES, *overrides])
    check_config(config)
    assert config.parallel.pipeline.stages == 2
