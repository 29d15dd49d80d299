"""LoRA's contestants: the same factors under the same names, and the same function."""

from __future__ import annotations

import pytest
import torch

from efflaunch.bench.contest import CHECK
from efflaunch.bench.peers.adapted import Adapted, PeftLora
from efflaunch.bench.peers.ours import preset
from efflaunch.model.adapters.config import AdapterConfig, AdapterMethod


def test_losses_and_gradients_are_pefts_and_packing_changes_them() -> None:
    pytest.importorskip("peft")
    lora = AdapterConfig(method=AdapterMethod.LORA, rank=4)
    theirs, ours = PeftLora(CHECK, rank=4), Adapted(CHECK, preset("recompute"), adapter=lora)
    packed = Adapted(CHECK, preset("recompute"), adapter=AdapterConfig(method=AdapterMethod.QLORA, rank=4))
    losses = [contestant.step() for contestant in (theirs, ours, packed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=0.05) and losses[2] != losses[1]
    expected, computed = theirs.gradients(), ours.gradients()
    assert len(expected) == 2 * 7 * CHECK.num_layers and set(computed) == set(expected) == set(packed.gradients())
    for name, gradient in expected.items():
        torch.testing.assert_close(computed[name], gradient, rtol=1e-3, atol=1e-6)
