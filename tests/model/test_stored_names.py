"""Names of experts in files: what Hugging Face saves loads by expert and fused, whole and sharded; what is no such model is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from efflaunch.errors import ConfigError
from efflaunch.model.families import FACTS, family_of
from efflaunch.model.families.facts import FamilyFacts
from efflaunch.model.model_check import check_weights
from efflaunch.model.stored_names import StoredPart, has_tensors_by_expert, stored_parts
from efflaunch.tests.model.model_ranks import weights
from efflaunch.tests.model.small import edit_weights, of, save_model
from efflaunch.tests.ranks import RankPool

BY_EXPERT = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    "qwen2_moe": "model.layers.0.mlp.experts.0.gate_proj.weight",
    "qwen3_moe": "model.layers.0.mlp.experts.0.gate_proj.weight",
}
ONE = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def facts(model_type: str) -> FamilyFacts:
    family = family_of(model_type)
    assert family is not None
    return FACTS[family]


def test_each_experts_gate_lies_above_its_up() -> None:
    shapes = {"model.layers.7.mlp.experts.gate_up_proj": (2, 6, 5), "model.layers.7.mlp.experts.down_proj": (2, 5, 3)}
    gate_up, down = stored_parts(shapes, facts("qwen3_moe"), by_expert=True).values()
    where = "model.layers.7.mlp.experts"
    assert gate_up == (
        StoredPart(f"{where}.0.gate_proj.weight", (3, 5), 0),
        StoredPart(f"{where}.0.up_proj.weight", (3, 5), 0, 3),
        StoredPart(f"{where}.1.gate_proj.weight", (3, 5), 1),
        StoredPart(f"{where}.1.up_proj.weight", (3, 5), 1, 3),
    )
    assert down == tuple(StoredPart(f"{where}.{e}.down_proj.weight", (5, 3), e) for e in range(2))
    fused = stored_parts(shapes, facts("qwen3_moe"), by_expert=False)
    assert fused == {name: (StoredPart(name, shape),) for name, shape in shapes.items()}


def test_mixtrals_router_has_a_name_of_its_own_and_other_weights_keep_theirs() -> None:
    shapes = {"model.layers.0.mlp.gate.weight": (4, 8), "model.layers.0.self_attn.q_proj.weight": (8, 8), "lm_head.weight": (9, 8)}
    named = [part.name for (part,) in stored_parts(shapes, facts("mixtral"), by_expert=True).values()]
    assert named == ["model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]


def test_the_form_is_known_by_its_names() -> None:
    for model_type, name in BY_EXPERT.items():
        assert has_tensors_by_expert([name], facts(model_type))
        assert not has_tensors_by_expert(["model.layers.0.mlp.experts.gate_up_proj", "lm_head.weight"], facts(model_type))
    assert not has_tensors_by_expert([BY_EXPERT["qwen3_moe"]], facts("gpt_oss"))
    assert not has_tensors_by_expert([BY_EXPERT["qwen3_moe"]], facts("qwen3"))


def own_weights(folder: Path) -> dict[str, Tensor]:
    """By Hugging Face's names of parameters, as it loads them."""
    return {name: each.detach() for name, each in AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters()}


@pytest.mark.parametrize("model_type", [*BY_EXPERT, "gpt_oss"])
def test_both_forms_load_as_transformers_loads_them(pool: RankPool, tmp_path: Path, model_type: str) -> None:
    saved, fused = save_model(tmp_path / "saved", model_type), save_model(tmp_path / "fused", model_type)
    expected = own_weights(saved)
    assert (BY_EXPERT.get(model_type, "no") in load_file(saved / "model.safetensors")) == (model_type in BY_EXPERT)
    save_file({name: each.contiguous() for name, each in expected.items()}, fused / "model.safetensors", metadata={"format": "pt"})
    for folder, ranks in ((saved, 1), (saved, 2), (fused, 2)):
        assert check_weights(of(folder)) == []
        loaded = pool.run(weights, of(folder), 0, ranks=ranks)[0]
        assert loaded.keys() == expected.keys()
        for name, value in loaded.items():
            np.testing.assert_array_equal(value, expected[name].numpy(), err_msg=name)


def without(*names: str) -> Any:
    return lambda tensors: {name: each for name, each in tensors.items() if name not in names}


def quantised_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As gpt-oss is published: blocks of 4-bit numbers and their scales."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    packed = {f"{name}_blocks": torch.zeros(4, 96, 1, 16, dtype=torch.uint8), f"{name}_scales": torch.zeros(4, 96, 1, dtype=torch.uint8)}
    return {**without(name)(tensors), **packed}


EXTRA = "model.layers.0.mlp.experts.8.up_proj.weight"
WRONG: dict[str, tuple[str, Any, str, str]] = {
    "a missing expert": ("qwen3_moe", without(ONE), f"no tensor for {ONE} (of ", "weights and config.json of one model"),
    "an extra expert": (
        "qwen3_moe", lambda t: {**t, EXTRA: torch.ones(16, 32)}, f"{EXTRA}, which no part of the model reads", "the config.json of these",
    ),
    "a narrower expert": ("qwen3_moe", lambda t: {**t, ONE: t[ONE][:8].clone()}, f"{ONE} of shape [8, 32]; expected [16, 32]", "one model"),
    "Mixtral without its router": (
        "mixtral", without("model.layers.0.block_sparse_moe.gate.weight"), "no tensor for model.layers.0.block_sparse_moe.gate.weight",
        "weights and config.json of one model",
    ),
    "both forms": (
        "qwen3_moe", lambda t: {**t, "model.layers.0.mlp.experts.gate_up_proj": torch.ones(8, 32, 32)},
        "model.layers.0.mlp.experts.gate_up_proj, which no part", "the config.json of these weights",
    ),
    "experts of 4 bits": ("gpt_oss", quantised_experts, "quantised weights (2 tensors of scales and the like)", "dequantise"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_such_model_is_named(tmp_path: Path, name: str) -> None:
    model_type, change, message, hint = WRONG[name]
    edit_weights(save_model(tmp_path, model_type), change)
    with pytest.raises(ConfigError) as caught:
        check_weights(of(tmp_path))
    assert message in str(caught.value) and hint in caught.value.hint and caught.value.where == f"model.path {tmp_path}"
