"""The ranks' process group is destroyed at an orderly end and never after an error."""

from __future__ import annotations

from typing import Any

import pytest

from efflaunch.launcher.config.compose import compose
from efflaunch.training import session


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was called of torch.distributed."""
    made: list[str] = []

    def noted(name: str) -> Any:
        return lambda *args, **kwargs: made.append(name)

    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(session.dist, name, noted(name))
    return made


def test_an_orderly_end_destroys_the_group(calls: list[str]) -> None:
    with session.joined_ranks(compose(["+experiment=quickstart"]).cluster, 60.0) as device:
        assert device.type == "cpu" and calls == ["init_process_group"]
    assert calls == ["init_process_group", "destroy_process_group"]


def test_an_error_leaves_it_alone(calls: list[str]) -> None:
    with pytest.raises(ZeroDivisionError), session.joined_ranks(compose(["+experiment=quickstart"]).cluster, 60.0):
        _ = 1 // 0
    assert calls == ["init_process_group"]
