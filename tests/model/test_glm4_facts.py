"""GLM-4 as its config.json says it: half of each head turns, whether the file says so or not."""

from __future__ import annotations

from pathlib import Path

from efflaunch.model.hf_fields import hf_config_dict
from efflaunch.model.spec import model_spec
from efflaunch.tests.model.small import edit_config, of, save_model


def test_half_of_each_head_turns(tmp_path: Path) -> None:
    config = of(save_model(tmp_path, "glm4"))
    assert hf_config_dict(config)["rope_parameters"]["partial_rotary_factor"] == 0.5
    edit_config(tmp_path, "rope_parameters", rope_theta=1e4)
    assert hf_config_dict(config)["rope_parameters"]["partial_rotary_factor"] == 0.5
    edit_config(tmp_path, partial_rotary_factor=1.0)
    assert hf_config_dict(config)["rope_parameters"]["partial_rotary_factor"] == 1.0
    again = of(tmp_path, extra={"partial_rotary_factor": 0.25}, rope_scaling={"rope_type": "linear", "factor": 2.0})
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    assert hf_config_dict(again)["rope_parameters"] == rope


def test_biases_are_of_queries_keys_and_values(tmp_path: Path) -> None:
    spec = model_spec(of(save_model(tmp_path, "glm4")))
    assert spec.attention_bias and not spec.output_bias and spec.norms_per_layer == 4 and spec.ends_with_norms
