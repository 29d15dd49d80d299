"""Granite 3 as its config.json says it: four multipliers, of which two are outside the layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from efflaunch.errors import ConfigError
from efflaunch.model.families.granite_facts import FACTS
from efflaunch.model.spec import check_model
from efflaunch.tests.model.small import edit_config, of, save_model


def test_scales_outside_the_layers() -> None:
    fields = {"embedding_multiplier": 12.0, "logits_scaling": 16.0}
    assert FACTS.embedding_scale(fields) == 12.0 and FACTS.logit_scale(fields) == 0.0625
    assert FACTS.embedding_scale({}) == FACTS.logit_scale({}) == 1.0


@pytest.mark.parametrize("field", ["embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"])
def test_a_multiplier_is_a_number(tmp_path: Path, field: str) -> None:
    config = of(save_model(tmp_path, "granite"))
    edit_config(tmp_path, **{field: 0})
    with pytest.raises(ConfigError, match=f"{field}: found 0; expected a finite number above 0"):
        check_model(config)
