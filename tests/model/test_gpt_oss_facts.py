"""What a gpt-oss config.json says: its windows, its rotary settings where it has none, and both names of the number of experts."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig

from efflaunch.model.build import build_config
from efflaunch.model.hf_fields import hf_config_dict
from efflaunch.tests.model.mixtures import assert_either_name, assert_windows_alike
from efflaunch.tests.model.small import edit_config, of, save_model


def test_windows_are_hugging_faces(tmp_path: Path) -> None:
    assert assert_windows_alike(tmp_path / "own", "gpt_oss", num_hidden_layers=3) == (7, None, 7)
    types = ["full_attention", "full_attention", "sliding_attention"]
    assert assert_windows_alike(tmp_path / "listed", "gpt_oss", num_hidden_layers=3, layer_types=types) == (None, None, 7)


def test_without_rotary_settings_they_are_hugging_faces_yarn(tmp_path: Path) -> None:
    config = of(save_model(tmp_path, "gpt_oss"))
    edit_config(tmp_path, "rope_parameters", "rope_theta", "rope_scaling")
    theirs = AutoConfig.from_pretrained(tmp_path)
    ours = build_config(hf_config_dict(config))
    assert theirs.rope_parameters["rope_type"] == "yarn" and theirs.rope_parameters["rope_theta"] == 150_000.0
    assert ours.rope_parameters == theirs.rope_parameters
    assert ours.max_position_embeddings == theirs.max_position_embeddings


def test_experts_are_counted_under_either_name(tmp_path: Path) -> None:
    assert_either_name(tmp_path, "gpt_oss", "num_local_experts", "num_experts")
