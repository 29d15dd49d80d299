"""OLMo 3 as its config.json says it: windows by type, scaling of the layers without one alone."""

from __future__ import annotations

from pathlib import Path

from efflaunch.model.hf_fields import hf_config_dict
from efflaunch.tests.model.mixtures import assert_windows_alike
from efflaunch.tests.model.small import edit_config, of, save_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def test_windows_are_hugging_faces(tmp_path: Path) -> None:
    assert assert_windows_alike(tmp_path, "olmo3", num_hidden_layers=5, layer_types=None) == (7, 7, 7, None, 7)


def test_the_base_of_layers_with_a_window_is_the_class_default(tmp_path: Path) -> None:
    """transformers gives the file's base to the other layers alone; `rope_local_base_freq` it does not read here."""
    from transformers import AutoConfig

    folder = save_model(tmp_path, "olmo3")
    edit_config(folder, "rope_parameters", rope_theta=1e4, rope_scaling=YARN, rope_local_base_freq=123.0)
    rope = hf_config_dict(of(folder))["rope_parameters"]
    assert rope["full_attention"] == {**YARN, "rope_theta": 1e4} and rope["sliding_attention"]["rope_theta"] == 5e5
    theirs = AutoConfig.from_pretrained(folder).rope_parameters
    assert {key: theirs[key]["rope_theta"] for key in rope} == {key: rope[key]["rope_theta"] for key in rope}
