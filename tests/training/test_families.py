"""Families as data: two files each, one list, facts without torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from efflaunch.model.config import Family
from efflaunch.model.families import FACTS, facts_of, family_of, layer_adapter

ROOT = Path(__file__).parents[2]


def test_every_family_is_listed_once_with_its_facts() -> None:
    assert list(FACTS) == list(Family)
    assert all(facts.family is family and family_of(facts.model_type) is family for family, facts in FACTS.items())
    assert family_of("opt") is None


@pytest.mark.parametrize("family", list(Family), ids=lambda family: family.value)
def test_every_family_has_an_adapter_for_its_hugging_face_layer(family: Family) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 8, "pad_token_id": None}
    if family is Family.DOTS1:
        sizes |= {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    config = AutoConfig.for_model(facts_of(family).model_type, **sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    with torch.device("meta"):
        layer = AutoModelForCausalLM.from_config(config).model.layers[0]
    adapter = layer_adapter(layer, facts_of(family).model_type)
    assert adapter.spec.head_dim == 8 and (adapter.rope_key is not None) == facts_of(family).rope_per_layer_type
    assert (adapter.sinks is not None) == facts_of(family).attention_sinks


def test_facts_are_read_without_torch() -> None:
    code = "import sys, efflaunch.model.families; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_nothing_but_the_list_and_the_facts_compares_with_a_familys_name() -> None:
    """Estimates, checks and the executor ask facts; configurations and tests may name a family."""
    folders = ("memory", "parallel", "training", "estimate", "model", "launcher")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    named = {path.relative_to(ROOT).name for path in files if re.search(r"\bFamily\.[A-Z]", path.read_text())}
    assert named == {f"{family.value}_facts.py" for family in Family}
