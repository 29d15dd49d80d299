"""OLMo 2 as its config.json says it: norms behind both halves, and over all heads."""

from __future__ import annotations

from pathlib import Path

from efflaunch.model.spec import model_spec
from efflaunch.tests.model.small import of, save_model


def test_norms_are_counted_where_they_are(tmp_path: Path) -> None:
    spec = model_spec(of(save_model(tmp_path, "olmo2")))
    assert spec.ends_with_norms and spec.norm_of_all_heads and spec.norms_per_layer == 2
    assert spec.head_norm_weights == 4 * 8 + 2 * 8 and spec.windows == (None, None)
