"""Which matrices have adapters, what is trained, how many numbers that is; what cannot be asked for is refused with what can."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from efflaunch.errors import ConfigError
from efflaunch.launcher.config.compose import compose
from efflaunch.model.adapters.config import NO_ADAPTER, AdapterConfig, AdapterMethod
from efflaunch.model.adapters.names import target_names
from efflaunch.model.adapters.targets import check_adapter, matrices, quantized, targets, trained_numbers
from efflaunch.model.build import build_config, build_on_meta
from efflaunch.model.hf_fields import hf_config_dict
from efflaunch.model.spec import model_spec


def lora(**fields):
    return AdapterConfig(name="lora", method=AdapterMethod.LORA, **fields)


def spec_of(*overrides):
    return model_spec(compose(["+experiment=quickstart", *overrides]).model)


def test_groups_and_names() -> None:
    assert target_names(lora(targets=["attention"])) == tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "qkv", "o"))
    assert target_names(lora(targets=["down_proj", "self_attn.v_proj", "v_proj"])) == ("self_attn.v_proj", "mlp.down_proj")
    assert targets(lora(), spec_of()) == matrices(spec_of()) and len(matrices(spec_of())) == 7
    assert targets(NO_ADAPTER, spec_of()) == ()


@pytest.mark.parametrize(
    ("name", "count"), [("llama3_8b", 7), ("qwen3_8b", 7), ("mistral_7b", 7), ("qwen2_7b", 7), ("phi4_14b", 4), ("glm4_9b", 6)]
)
def test_matrices_are_those_of_the_model(name: str, count: int) -> None:
    config = compose(["+experiment=quickstart", f"model={name}"]).model
    model = build_on_meta(build_config(hf_config_dict(config)), torch.float32)
    layer = model.model.layers[0]
    shapes = {matrix.name: (matrix.rows, matrix.columns) for matrix in matrices(model_spec(config))}
    assert shapes == {key: tuple(layer.get_submodule(key).weight.shape) for key in shapes}
    assert len(shapes) == count
    assert all(sum(matrix.parts) in (0, matrix.rows) for matrix in matrices(model_spec(config)))


def test_counts_are_those_of_the_modules() -> None:
    from efflaunch.model.adapters.lora import insert_adapters

    apart, fused = (compose(["+experiment=quickstart", f"model={name}"]).model for name in ("qwen3_8b", "phi4_14b"))
    parts = lora(targets=["attention", "down_proj"], modules_to_save=["norms", "head"], rank=5)
    for config, adapter in ((apart, lora()), (apart, parts), (fused, lora()), (fused, replace(parts, dora=True))):
        model, spec = build_on_meta(build_config(hf_config_dict(config)), torch.float32), model_spec(config)
        insert_adapters(model, adapter, torch.bfloat16)
        numbers = trained_numbers(adapter, spec)
        want = spec.num_layers * numbers.layer + numbers.embedding + numbers.head + numbers.last_norm
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == want
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert trained_numbers(NO_ADAPTER, spec).layer == 0


@pytest.mark.parametrize(
    ("fields", "found", "hint"),
    [
        ({"targets": ["q_poj"]}, "'q_poj', which matches no matrix", "adapter.targets=[all-linear]"),
        ({"targets": []}, "none", "adapter.targets=[attention]"),
        ({"rank": 200}, "200 for self_attn.k_proj, a matrix of 128 x 256", "adapter.rank=128"),
        ({"dropout": 0.1}, "0.1", "adapter.dropout=0"),
        ({"modules_to_save": ["lm_head"]}, "'lm_head'", "adapter.modules_to_save=[]"),
    ],
)
def test_what_cannot_be_asked_for(fields, found, hint) -> None:
    with pytest.raises(ConfigError) as caught:
        check_adapter(lora(**fields), spec_of())
    assert found in caught.value.found and hint in caught.value.hint
    if "targets" in fields:
        assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in caught.value.expected


def test_experts_tied_heads_and_files_without_adapters() -> None:
    with pytest.raises(ConfigError, match="all-linear for a model with experts.*\n*.*attention"):
        check_adapter(lora(), spec_of("model=tiny_moe"))
    check_adapter(lora(targets=["attention"]), spec_of("model=tiny_moe"))
    with pytest.raises(ConfigError, match="head of a model whose head is its embedding"):
        check_adapter(lora(modules_to_save=["head"]), spec_of("model.tie_embeddings=true"))
    with pytest.raises(ConfigError, match="adapter.init"):
        check_adapter(AdapterConfig(init="somewhere"), spec_of())
    with pytest.raises(ConfigError, match="adapter.dora: found true without adapters"):
        check_adapter(AdapterConfig(dora=True), spec_of())
    for method in (AdapterMethod.LORA, AdapterMethod.QLORA):
        check_adapter(AdapterConfig(method=method, dora=True), spec_of())


@pytest.mark.parametrize(
    ("model", "refused", "there"),
    [
        ("phi4_14b", {"q_proj": "qkv_proj", "up_proj": "gate_up_proj"}, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
        ("glm4_9b", {"gate_proj": "gate_up_proj"}, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]),
    ],
)
def test_matrices_that_a_family_has_fused_have_one_adapter(model: str, refused: dict[str, str], there: list[str]) -> None:
    spec = spec_of(f"model={model}")
    for target, whole in refused.items():
        with pytest.raises(ConfigError, match=f"{target} for a {spec.family.value} model(.|\n)*adapter.targets=\\[{whole}\\]"):
            check_adapter(lora(targets=[target]), spec)
    for words in (["all-linear"], ["attention", "mlp"], there):
        check_adapter(lora(targets=words), spec)
        assert [matrix.name.rpartition(".")[2] for matrix in targets(lora(targets=words), spec)] == there
    with pytest.raises(ConfigError, match="'qkv_proj', which matches no matrix"):
        check_adapter(lora(targets=["qkv_proj"]), spec_of())


def test_what_can_be_packed() -> None:
    def qlora(**fields):
        return AdapterConfig(name="qlora", method=AdapterMethod.QLORA, **fields)

    mlp = quantized(qlora(quantized=["mlp"]), spec_of())
    assert [matrix.name for matrix in mlp] == [f"mlp.{name}_proj" for name in ("gate", "up", "down")] and quantized(lora(), spec_of()) == ()
    assert sum(matrix.packed_bytes for matrix in mlp) < 0.3 * sum(2 * matrix.rows * matrix.columns for matrix in mlp)
    check_adapter(qlora(), spec_of())
    check_adapter(qlora(targets=["attention"], quantized=["attention"]), spec_of("model=tiny_moe"))
    for words, overrides, found in (
        (["lm_head"], ["model.tie_embeddings=true"], "lm_head, of a model whose head is its embedding"),
        (["embedding", "mlp"], [], "embedding"),
        (["q_poj"], [], "'q_poj', which matches no matrix of a decoder layer"),
        ([], [], "none"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_adapter(qlora(quantized=words), spec_of(*overrides))
        assert caught.value.where == "adapter.quantized" and caught.value.found == found
    with pytest.raises(ConfigError, match="(?s)all-linear for a model with experts.*are not packed yet"):
        check_adapter(qlora(targets=["attention"]), spec_of("model=tiny_moe"))
