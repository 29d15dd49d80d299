"""What a SmolLM3 config.json says: which layers rotate, and windows as Hugging Face's masks have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from efflaunch.errors import ConfigError
from efflaunch.model.spec import check_model, model_spec
from efflaunch.tests.model.mixtures import assert_windows_alike
from efflaunch.tests.model.small import edit_config, of, save_model

SLIDES: dict[str, Any] = {"sliding_window": 9, "num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]}


def test_windows_are_hugging_faces(tmp_path: Path) -> None:
    assert assert_windows_alike(tmp_path / "none", "smollm3", **SLIDES) == (None, None, None)
    assert assert_windows_alike(tmp_path / "unrotated", "smollm3", **SLIDES, use_sliding_window=True) == (None, 9, None)
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert assert_windows_alike(tmp_path / "listed", "smollm3", **SLIDES, use_sliding_window=True, layer_types=types) == (9, None, None)


def test_which_layers_rotate(tmp_path: Path) -> None:
    """A list may be longer than the model is deep; without one, every so many."""
    config = of(save_model(tmp_path, "smollm3", num_hidden_layers=9, no_rope_layers=None))
    for fields, unrotated in (
        ({"no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 0, 1, 0]}, (3, 7)),
        ({"no_rope_layers": None}, (3, 7)),
        ({"no_rope_layers": None, "no_rope_layer_interval": 2}, (1, 3, 5, 7)),
        ({"no_rope_layers": [1] * 9}, ()),
    ):
        edit_config(tmp_path, **fields)
        spec = model_spec(config)
        assert spec.unrotated_layers == unrotated and spec.rotary_tables == 1 + bool(unrotated)
        assert spec.of_layers((2, 3, 4)).unrotated_layers == ((1,) if 3 in unrotated else ())


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("no_rope_layers", [1], "1 (rotates) or 0 for each of the 2 layers"),
        ("no_rope_layers", [1, 2], "1 (rotates) or 0 for each of the 2 layers"),
        ("no_rope_layers", 4, "1 (rotates) or 0 for each of the 2 layers"),
        ("no_rope_layer_interval", 0, "a whole number, 1 or more"),
        ("no_rope_layer_interval", "4", "a whole number, 1 or more"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, field: str, value: Any, expected: str) -> None:
    config = of(save_model(tmp_path, "smollm3"))
    edit_config(tmp_path, **{field: value})
    with pytest.raises(ConfigError) as caught:
        check_model(config)
    assert caught.value.where == f"model.path {tmp_path}: {field}" and caught.value.expected == expected
