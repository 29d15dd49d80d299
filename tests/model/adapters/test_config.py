"""The scaling of adapters, and that the conf group says what the dataclass does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from efflaunch.estimate.suggestion_moves import LORA
from efflaunch.launcher.config.compose import compose
from efflaunch.model.adapters.config import NO_ADAPTER, AdapterConfig, AdapterMethod


def test_scaling_is_alpha_over_the_rank_or_over_its_root() -> None:
    assert AdapterConfig(rank=4, alpha=6.0).scaling == 1.5
    assert AdapterConfig(rank=4, alpha=6.0, rslora=True).scaling == 3.0


def test_the_group_has_what_the_dataclass_has() -> None:
    assert compose(["+experiment=quickstart"]).adapter == NO_ADAPTER
    # What is suggested where full training does not fit is what the override makes.
    assert compose(["+experiment=quickstart", "adapter=lora"]).adapter == LORA
    assert compose(["+experiment=quickstart", "adapter=qlora"]).adapter == replace(LORA, name="qlora", method=AdapterMethod.QLORA)


@pytest.mark.parametrize("method", list(AdapterMethod))
def test_lora_trains_adapters_and_qlora_packs_what_is_frozen(method: AdapterMethod) -> None:
    config = AdapterConfig(method=method)
    assert (config.is_trained, config.quantizes) == (method is not AdapterMethod.NONE, method is AdapterMethod.QLORA)
