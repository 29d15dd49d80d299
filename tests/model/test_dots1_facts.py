"""What a dots.llm1 config.json says: windows as Hugging Face's masks have them, dense layers, and groups that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from efflaunch.errors import ConfigError
from efflaunch.model.spec import check_model, model_spec
from efflaunch.tests.model.mixtures import assert_either_name, assert_windows_alike, experts_of
from efflaunch.tests.model.small import edit_config, of, save_model

SLIDES = {"sliding_window": 9, "num_hidden_layers": 3}


def test_windows_are_hugging_faces(tmp_path: Path) -> None:
    assert assert_windows_alike(tmp_path / "none", "dots1") == (None, None)
    assert assert_windows_alike(tmp_path / "late", "dots1", **SLIDES, max_window_layers=2) == (None, None, 9)
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert assert_windows_alike(tmp_path / "listed", "dots1", **SLIDES, layer_types=types) == (9, None, None)


def test_experts_are_counted_under_either_name(tmp_path: Path) -> None:
    assert_either_name(tmp_path, "dots1", "n_routed_experts", "num_local_experts")


def test_sizes(tmp_path: Path) -> None:
    config = of(save_model(tmp_path, "dots1", num_hidden_layers=4))
    spec = model_spec(config)
    assert spec.dense_layers == (0,) and spec.expert_layers == 3 and experts_of(config) == 8
    sizes = spec.experts
    assert sizes is not None and sizes.has_correction_bias and sizes.has_wide_router and not sizes.has_shared_gate
    assert (sizes.active_size, sizes.shared_size, sizes.dense_size, sizes.dense_share) == (3 * 12 + 24, 24, 48, 0.25)
    assert sizes.widest_size == 60 and sizes.mean_size == 57


WRONG: dict[str, tuple[str, int, str]] = {
    "groups that do not divide": ("n_group", 3, "a divisor of the 8 experts, 2 of them in a group at least"),
    "one in a group": ("n_group", 8, "a divisor of the 8 experts, 2 of them in a group at least"),
    "more groups than there are": ("topk_group", 5, "at most the 4 groups there are (n_group)"),
    "more experts than the groups have": ("num_experts_per_tok", 5, "at most the 4 experts of 2 groups (topk_group)"),
    "dense layers alone": ("first_k_dense_replace", 2, "below the 2 layers: some have experts"),
    "no shared expert": ("n_shared_experts", 0, "a whole number from 1 to 16,384"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_named(tmp_path: Path, name: str) -> None:
    field, value, expected = WRONG[name]
    config = of(save_model(tmp_path, "dots1"))
    edit_config(tmp_path, **{field: value})
    with pytest.raises(ConfigError) as caught:
        check_model(config)
    assert caught.value.where == f"model.path {tmp_path}: {field}" and f"found {value}; expected {expected}" in str(caught.value)


def test_fields_that_have_no_default_are_asked_for(tmp_path: Path) -> None:
    config: Any = of(save_model(tmp_path, "dots1"))
    edit_config(tmp_path, "n_routed_experts", "num_local_experts")
    with pytest.raises(ConfigError, match="n_routed_experts"):
        check_model(config)
