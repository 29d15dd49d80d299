"""Cohere 2 as its config.json says it: which layers have a window, and turn."""

from __future__ import annotations

from pathlib import Path

from efflaunch.model.families.cohere2_facts import FACTS
from efflaunch.model.spec import model_spec
from efflaunch.tests.model.mixtures import assert_windows_alike
from efflaunch.tests.model.small import edit_config, of, save_model


def test_layers_without_a_window_do_not_turn(tmp_path: Path) -> None:
    assert assert_windows_alike(tmp_path / "fourth", "cohere2", num_hidden_layers=5, layer_types=None) == (7, 7, 7, None, 7)
    config = of(save_model(tmp_path / "third", "cohere2", num_hidden_layers=5, layer_types=None, sliding_window_pattern=3))
    edit_config(tmp_path / "third", "layer_types", sliding_window_pattern=3)
    spec = model_spec(config)
    assert spec.windows == (7, 7, None, 7, 7) and spec.unrotated_layers == (2,) and spec.rotary_tables == 2


def test_halves_are_parallel_behind_one_norm(tmp_path: Path) -> None:
    spec = model_spec(of(save_model(tmp_path, "cohere2")))
    assert (spec.parallel, spec.norms_per_layer, spec.norms_computed, spec.residual_size) == (True, 1, 2, 64)
    assert FACTS.logit_scale({"logit_scale": 0.25}) == 0.25 and FACTS.logit_scale({}) == 0.0625
