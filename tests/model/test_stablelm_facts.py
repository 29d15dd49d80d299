"""StableLM as its config.json says it: norms with biases, and what of its switches is not trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from efflaunch.errors import ConfigError
from efflaunch.model.spec import check_model, model_spec
from efflaunch.tests.model.small import edit_config, of, save_model


def test_norms_have_biases(tmp_path: Path) -> None:
    spec = model_spec(of(save_model(tmp_path, "stablelm", use_qkv_bias=True)))
    assert spec.norm_bias and spec.norm_weights == 64 and spec.attention_bias and not spec.output_bias


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("qk_layernorm", True, "false: norms with weights of each head of StableLM are not trained here"),
        ("use_parallel_residual", True, "false: parallel halves of StableLM are not trained here"),
        ("hidden_dropout", 0.1, "0: layers are computed again in backward, without dropout"),
        ("head_dim", 16, "8, the hidden size over the heads"),
        ("use_qkv_bias", 1, "true or false"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, field: str, value: Any, expected: str) -> None:
    config = of(save_model(tmp_path, "stablelm"))
    edit_config(tmp_path, **{field: value})
    with pytest.raises(ConfigError) as caught:
        check_model(config)
    assert caught.value.where == f"model.path {tmp_path}: {field}" and caught.value.expected == expected
