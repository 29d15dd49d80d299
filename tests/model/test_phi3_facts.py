"""Phi-3 and Phi-4 as their config.json says them: the length beside the rotary settings, older names, dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from efflaunch.errors import ConfigError
from efflaunch.model.hf_fields import hf_config_dict
from efflaunch.model.portable_config import with_old_fields
from efflaunch.model.spec import check_model, longer_positions, model_spec
from efflaunch.tests.model.small import edit_config, of, save_model

LENGTHS = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
FACTORS = {"short_factor": [1.0] * 3, "long_factor": [2.0] * 3}


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_older_names_mean_longrope(tmp_path: Path, kind: str) -> None:
    """And the original length is the field beside the settings, as transformers has it."""
    from transformers import AutoConfig

    folder = save_model(tmp_path, "phi3")
    scaling = {"type": kind, **FACTORS}
    edit_config(folder, "rope_parameters", rope_scaling=scaling, partial_rotary_factor=0.75, original_max_position_embeddings=16)
    fields = hf_config_dict(of(folder))
    rope = fields["rope_parameters"]
    assert rope["rope_type"] == "longrope" and rope["partial_rotary_factor"] == 0.75
    assert fields["original_max_position_embeddings"] == rope["original_max_position_embeddings"] == 16
    made = AutoConfig.for_model(fields.pop("model_type"), **fields)
    assert made.rope_parameters == rope and made.original_max_position_embeddings == 16


def test_what_is_exported_is_read_back(tmp_path: Path) -> None:
    """Both forms in one file say the same; a factor that three keys cannot say is in either."""
    folder = save_model(tmp_path, "phi3")
    edit_config(folder, "rope_parameters", rope_scaling={"type": "longrope", **FACTORS}, partial_rotary_factor=0.75, **LENGTHS)
    fields = hf_config_dict(of(folder))
    for own in (fields, hf_config_dict(of(folder, max_positions=256))):
        exported = with_old_fields({**own, "model_type": "phi3"})
        assert (set(exported["rope_scaling"]) == {"type", *FACTORS}) == (own is fields)
        edit_config(folder, **exported)
        assert hf_config_dict(of(folder)) == {**own, "use_cache": False}


def test_matrices_are_fused_and_more_positions_come_without_yarn(tmp_path: Path) -> None:
    config = of(save_model(tmp_path, "phi3"))
    assert model_spec(config).windows == (11, 11)
    assert longer_positions(config, 128) == ["model.max_positions=128"]


@pytest.mark.parametrize(
    ("fields", "where", "expected"),
    [
        ({"resid_pdrop": 0.1}, "resid_pdrop", "0: layers are computed again in backward, without dropout"),
        ({"embd_pdrop": 0.1}, "embd_pdrop", "0: layers are computed again in backward, without dropout"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters.rope_type", "one of default, longrope"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.4}}, "rope_parameters.partial_rotary_factor",
            "a share of which an even number of a head's 8 turns",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(tmp_path: Path, fields: dict[str, Any], where: str, expected: str) -> None:
    config = of(save_model(tmp_path, "phi3"))
    edit_config(tmp_path, **fields)
    with pytest.raises(ConfigError) as caught:
        check_model(config)
    assert caught.value.where == f"model.path {tmp_path}: {where}" and caught.value.expected == expected
