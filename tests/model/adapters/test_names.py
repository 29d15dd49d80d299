"""Which parameters adapters train, by their names alone."""

from __future__ import annotations

from efflaunch.model.adapters.config import NO_ADAPTER, AdapterConfig, AdapterMethod
from efflaunch.model.adapters.names import (
    ATTENTION,
    GATE_UP,
    MLP,
    QKV,
    is_factor,
    is_factor_b,
    is_packed,
    is_trained,
    matching,
    plain_name,
    quantized_names,
    target_names,
)


def lora(**fields):
    return AdapterConfig(name="lora", method=AdapterMethod.LORA, **fields)


def test_groups_and_single_names() -> None:
    assert set(matching("all-linear")) == {*ATTENTION, *MLP, QKV, GATE_UP} and matching("x_proj") == ()
    assert matching("attention") == (*ATTENTION[:3], QKV, ATTENTION[3]) and matching("qkv_proj") == (QKV,)
    assert matching("up_proj") == matching("mlp.up_proj") == ("mlp.up_proj",)
    assert target_names(lora(targets=["mlp", "q_proj", "up_proj"])) == ("self_attn.q_proj", *MLP[:2], GATE_UP, MLP[2])


def test_what_is_trained() -> None:
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.lora.B",
             "model.layers.0.self_attn.q_norm.weight", "model.norm.weight", "lm_head.weight"]  # fmt: skip
    assert all(is_trained(name, NO_ADAPTER) for name in names)
    assert [is_trained(name, lora()) for name in names] == [False, False, True, False, False, False]
    assert [is_trained(name, lora(modules_to_save=["norms"])) for name in names] == [False, False, True, True, True, False]
    assert [is_trained(name, lora(modules_to_save=["head", "embedding"])) for name in names] == [True, False, True, False, False, True]
    assert [is_factor(name) for name in names] == [is_factor_b(name) for name in names] == [False, False, True, False, False, False]
    assert not is_factor_b("model.layers.0.mlp.up_proj.lora.A")


def test_what_is_packed() -> None:
    qlora = AdapterConfig(method=AdapterMethod.QLORA, targets=["q_proj"], quantized=["mlp", "o_proj"])
    assert quantized_names(qlora) == ("self_attn.o_proj", *MLP[:2], GATE_UP, MLP[2])
    assert quantized_names(lora()) == () == quantized_names(NO_ADAPTER)
    name = "model.layers.0.mlp.up_proj.packed"
    assert is_packed(name) and plain_name(name) == "model.layers.0.mlp.up_proj.weight" and not is_trained(name, qlora)
    assert not is_packed("lm_head.weight") and plain_name("lm_head.weight") == "lm_head.weight"
