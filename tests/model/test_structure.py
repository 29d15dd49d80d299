"""Decoder layers are recognised by their modules; what is unknown in one is named with its class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from efflaunch.errors import ConfigError
from efflaunch.model.families import FACTS, Family
from efflaunch.model.families.structure import HeadNorms, Pairs, Structure, read_structure, turned
from efflaunch.tests.model.small import FAMILIES, SIZES

DENSE = [family for family, facts in FACTS.items() if facts.experts is None]
NEIGHBOURS = (Family.GLM4, Family.COHERE2)


def layer_of(family: Family, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    name = FACTS[family].model_type
    with torch.device("meta"):
        config = AutoConfig.for_model(name, **{**SIZES, **FAMILIES[name], **changes})
        return AutoModelForCausalLM.from_config(config).model.layers[0]


@pytest.mark.parametrize("family", DENSE, ids=lambda family: family.value)
def test_what_is_read_is_what_the_facts_say(family: Family) -> None:
    """Of every dense family, those with adapters of their own as well."""
    structure, facts = read_structure(layer_of(family)), FACTS[family]
    assert set(structure.norms.names) == set(facts.layer_norms) and structure.parallel == facts.parallel
    assert (structure.norms.after_mlp is not None) == (structure.norms.after_attention is not None) == facts.ends_with_norms
    kinds = {(False, False): HeadNorms.NONE, (True, False): HeadNorms.EACH_HEAD, (True, True): HeadNorms.ALL_HEADS}
    assert structure.head_norms is kinds[facts.qk_norm, facts.norm_of_all_heads]
    assert (structure.fused_qkv, structure.fused_gate_up) == (facts.fused_qkv, facts.fused_gate_up)
    assert structure.pairs is (Pairs.NEIGHBOURS if family in NEIGHBOURS else Pairs.HALVES)
    assert structure.turns_in_float32 == (family is Family.COHERE2)
    assert structure.residual_scale == (0.5 if family is Family.GRANITE else 1.0)


def test_numbers_turn_in_pairs() -> None:
    x = torch.arange(1.0, 5.0)
    assert turned(x, Pairs.HALVES).tolist() == [-3.0, -4.0, 1.0, 2.0] and turned(x, Pairs.NEIGHBOURS).tolist() == [-2.0, 1.0, -4.0, 3.0]


class Odd(nn.Module):
    """No module of any family."""


def other_norms(layer: Any) -> None:
    layer.pre_feedforward_layernorm = nn.RMSNorm(32)


def a_module_more(layer: Any) -> None:
    layer.self_attn.sub_norm = Odd()


def a_number_more(layer: Any) -> None:
    layer.mlp.gate_multiplier = 0.5


def another_activation(layer: Any) -> None:
    layer.mlp.act_fn = nn.PReLU()


def dropout(layer: Any) -> None:
    layer.resid_dropout = nn.Dropout(0.1)


def head_norms_of_a_size(layer: Any) -> None:
    layer.self_attn.q_norm, layer.self_attn.k_norm = nn.RMSNorm(6), nn.RMSNorm(6)


def one_head_norm(layer: Any) -> None:
    layer.self_attn.q_norm = nn.RMSNorm(8)


WRONG = {
    other_norms: "norms input_layernorm (LlamaRMSNorm), post_attention_layernorm (LlamaRMSNorm), pre_feedforward_layernorm (RMSNorm) in",
    a_module_more: "self_attn.sub_norm, a Odd of a decoder layer",
    a_number_more: "mlp.gate_multiplier, 0.5 in a LlamaMLP",
    another_activation: "mlp, a LlamaMLP of a decoder layer",
    dropout: "resid_dropout, a Dropout",
    head_norms_of_a_size: "self_attn.q_norm, a RMSNorm of 6",
    one_head_norm: "self_attn.q_norm, a RMSNorm of a decoder layer",
}


@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_what_is_not_recognised_is_named(change: Any) -> None:
    layer = layer_of(Family.LLAMA)
    change(layer)
    with pytest.raises(ConfigError) as caught:
        read_structure(layer)
    assert WRONG[change] in caught.value.found and caught.value.found.endswith("which is not recognised")


def test_attention_of_other_code_is_not_recognised() -> None:
    layer = layer_of(Family.LLAMA)

    class Attention(type(layer.self_attn)):  # type: ignore[misc]
        """Of a module that is not transformers'."""

    layer.self_attn.__class__ = Attention
    with pytest.raises(ConfigError, match="attention of transformers with its rotation"):
        read_structure(layer)


def test_a_structure_names_its_matrices() -> None:
    phi: Structure = read_structure(layer_of(Family.PHI3))
    assert phi.projections == ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert phi.modules == ("input_layernorm", "post_attention_layernorm")
    assert read_structure(layer_of(Family.OLMO2)).modules[-2:] == ("self_attn.q_norm", "self_attn.k_norm")
