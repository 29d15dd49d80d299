"""Tiny copies of public models train here as in plain Hugging Face; a family whose layers are computed wrongly is found."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from efflaunch.errors import ConfigError
from efflaunch.memory.heads import HeadIndex
from efflaunch.model.config import ModelConfig
from efflaunch.model.families.gemma2 import Gemma2Layer
from efflaunch.model.families.llama import LlamaAttention, LlamaLayer
from efflaunch.model.families.mistral import MistralLayer
from efflaunch.model.families.mixture import MixtureHalf
from efflaunch.model.proof.compare import POLICIES, TOLERANCE, Agreement, compare, difference
from efflaunch.model.proof.tiny_config import tiny_config
from efflaunch.tests.model.public_configs import SUPPORTED, write_config

LLAMA = SUPPORTED["Llama-3.2-1B"]
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [1.0 + i / 4 for i in range(32)],
    "original_max_position_embeddings": 8192,
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("Llama-3.2-1B", {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "attention_bias": True, "mlp_bias": True}),
    "longrope": ("Llama-3.2-1B", {"rope_scaling": LONGROPE}),
    "windows, dense and experts": ("Qwen1.5-MoE-A2.7B", {"use_sliding_window": True, "decoder_sparse_step": 2}),
    "biases without rotation": ("SmolLM3-3B", {"attention_bias": True}),
    "windows without rotation": ("SmolLM3-3B", {"use_sliding_window": True, "sliding_window": 4096, "layer_types": None}),
    "groups of experts": ("dots.llm1", {"n_routed_experts": 64, "n_group": 4, "topk_group": 2, "sliding_window": 4096}),
}


def agreement_of(folder: Path, name: str, **changes: Any) -> Agreement:
    return compare(tiny_config(ModelConfig(name="m", path=str(write_config(folder, {**SUPPORTED[name], **changes})))))


def check_exact(found: Agreement) -> None:
    assert found.is_exact and math.isfinite(found.loss) and set(found.loss_by_policy) == set(POLICIES)
    assert all(set(each.by_policy) == set(POLICIES) for each in found.parameters)
    assert [each.worst for each in found.parameters] == sorted((each.worst for each in found.parameters), reverse=True)
    assert 0 < found.parameters[0].worst < TOLERANCE, "not one gradient was compared with itself"


@pytest.mark.parametrize("name", SUPPORTED)
def test_public_models_are_exact(name: str, tmp_path: Path) -> None:
    check_exact(agreement_of(tmp_path, name))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_exact(variant: str, tmp_path: Path) -> None:
    name, changes = VARIANTS[variant]
    check_exact(agreement_of(tmp_path, name, **changes))


def without_rotation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Agreement:
    import efflaunch.model.stage as stage

    def still(rotary: Any, like: Tensor, positions: Tensor, lengths: Tensor) -> Any:
        return original(rotary, like, torch.zeros_like(positions), lengths)

    original = stage.rotary_tables
    monkeypatch.setattr(stage, "rotary_tables", still)
    return agreement_of(folder, "Llama-3.2-1B")


def without_a_norm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Agreement:
    monkeypatch.setattr(Gemma2Layer, "residual", LlamaLayer.residual)
    return agreement_of(folder, "gemma-2-27b")


def without_windows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Agreement:
    monkeypatch.setattr(MistralLayer, "_window", lambda self: None)
    return agreement_of(folder, "Mistral-7B-v0.1")


def weights_of_experts_that_are_too_large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Agreement:
    def larger(self: MixtureHalf, logits: Tensor, chosen: Tensor) -> Tensor:
        return original(self, logits, chosen) * 1.001

    original = MixtureHalf.weigh
    monkeypatch.setattr(MixtureHalf, "weigh", larger)
    return agreement_of(folder, "Qwen3-30B-A3B")


@pytest.mark.parametrize("broken", [without_rotation, without_a_norm, without_windows, weights_of_experts_that_are_too_large])
def test_a_wrong_layer_is_found(broken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = broken(tmp_path, monkeypatch)
    assert not found.is_exact and found.parameters[0].worst > 1e-4
    assert all(value > TOLERANCE for value in found.loss_by_policy.values())


def test_a_gradient_that_is_wrong_in_one_policy_alone_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer computes is right; what it says of products whose values are not needed is not."""

    def key_value(self: LlamaAttention, h: Tensor, heads: HeadIndex, graph: bool) -> tuple[Tensor, Tensor]:
        k, v = original(self, h, heads, graph)
        return k, 1.5 * v if graph else v

    original = LlamaAttention.key_value
    monkeypatch.setattr(LlamaAttention, "key_value", key_value)
    found = agreement_of(tmp_path, "Llama-3.2-1B")
    worst = found.parameters[0]
    assert not found.is_exact and "v_proj" in worst.name and worst.by_policy["keep"] < TOLERANCE < worst.by_policy["recompute"]
    assert all(value < TOLERANCE for value in found.loss_by_policy.values())


def test_a_parameter_that_no_step_reads_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gemma2Layer, "norms", LlamaLayer.norms)
    with pytest.raises(ConfigError, match=r"a parameter that no step of a layer reads at pre_feedforward_layernorm.weight"):
        agreement_of(tmp_path, "gemma-2-27b")


def test_a_field_that_transformers_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model: found what transformers [\d.]+ refuses: Validation error for field 'pretraining_tp'"):
        agreement_of(tmp_path, "Llama-3.2-1B", pretraining_tp="many")


def test_differences_are_of_the_largest_entry() -> None:
    wanted = torch.tensor([4.0, 0.0, -2.0])
    assert difference(torch.tensor([4.0, 1.0, -2.0]), wanted) == 0.25 and difference(wanted, wanted) == 0.0
    assert difference(torch.tensor([4.0, 1.0, -2.0]), wanted, 10.0) == 0.1
    assert difference(None, None) == 0.0 and difference(torch.zeros(3), torch.zeros(3)) == 0.0
    for ours, theirs in ((None, wanted), (wanted, None), (wanted, torch.zeros(3)), (torch.full((3,), math.nan), wanted)):
        assert difference(ours, theirs) == math.inf
