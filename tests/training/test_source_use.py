"""What a step's event says of each source."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from efflaunch.training.data.mix import SourceUse
from efflaunch.training.reporting.source_use import source_fields

USES = [SourceUse("a", 300, 0.75, 1.5), SourceUse("b", 100, 0.25, 0.1)]


def fields(uses: list[SourceUse], names: tuple[str, ...], sums: list[float]) -> dict[str, Any]:
    source: Any = SimpleNamespace(usage=lambda step: uses if step == 4 else None)
    objective: Any = SimpleNamespace(names=names)
    return source_fields(source, 3, objective, sums)


def test_losses_are_means_over_the_targets_of_the_step() -> None:
    first, second = fields(USES, (), [6.0, 0.0, 4.0, 0.0])["sources"]
    assert first == {"name": "a", "tokens": 300, "share": 0.75, "epochs": 1.5, "targets": 4, "loss": 1.5}
    assert (second["targets"], second["loss"]) == (0, None)


def test_other_objectives_have_no_losses_of_sources() -> None:
    first, _ = fields(USES, ("dpo_margin",), [2.0])["sources"]
    assert first == {"name": "a", "tokens": 300, "share": 0.75, "epochs": 1.5}


def test_without_sources_there_is_no_entry() -> None:
    assert fields([], (), []) == {}
