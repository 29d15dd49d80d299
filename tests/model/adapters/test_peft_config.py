"""Adapters in peft's words: what files of others hold, and what of it is refused before anything starts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from efflaunch.errors import ConfigError
from efflaunch.model.adapters.config import AdapterConfig, AdapterMethod
from efflaunch.model.adapters.peft_config import SETTINGS, WEIGHTS, check_init, peft_name, settings_of, trained_shapes
from efflaunch.model.config import Family, ModelConfig
from efflaunch.model.spec import model_spec
from efflaunch.tests.parity.reference import BASE, hf_config

SPEC = model_spec(
    ModelConfig(
        name="test", family=Family.LLAMA, num_layers=BASE["num_hidden_layers"], hidden_size=BASE["hidden_size"],
        intermediate_size=BASE["intermediate_size"], num_heads=BASE["num_attention_heads"], num_kv_heads=BASE["num_key_value_heads"],
        vocab_size=BASE["vocab_size"], max_positions=BASE["max_position_embeddings"],
    )
)  # fmt: skip
OURS = AdapterConfig(name="lora", method=AdapterMethod.LORA, rank=3, alpha=6.0, targets=["q_proj", "mlp"], modules_to_save=["norms"])


def saved_by_peft(folder, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf_config("llama"))
    fields = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"], "modules_to_save": ["norm"]}
    get_peft_model(model, LoraConfig(**{**fields, "task_type": "CAUSAL_LM", **options})).save_pretrained(folder)
    return replace(OURS, init=str(folder))


def test_what_peft_saves_is_what_is_wanted(tmp_path) -> None:
    config = saved_by_peft(tmp_path, lora_dropout=0.1)
    check_init(config, SPEC)
    assert peft_name("model.layers.0.mlp.up_proj.lora.A") == "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    assert trained_shapes(OURS, SPEC)["model.layers.1.mlp.down_proj.lora.B"] == (64, 3)
    check_init(OURS, SPEC)


@pytest.mark.parametrize(
    ("options", "found", "hint"),
    [
        ({"use_dora": True}, "rslora false, dora true", "adapter.dora=true"),
        ({"lora_bias": True}, "lora_bias: true", "an adapter made without it"),
        ({"rank_pattern": {"q_proj": 5}}, "rank_pattern", "an adapter made without it"),
        ({"layers_to_transform": [0]}, "layers_to_transform: [0]", "an adapter made without it"),
        ({"bias": "all"}, "bias", "an adapter made without it"),
        ({"r": 4}, "rank 4, alpha 6, rslora false", "adapter.rank=4 adapter.alpha=6 adapter.rslora=false"),
        ({"use_rslora": True}, "rank 3, alpha 6, rslora true", "adapter.rslora=true"),
        ({"target_modules": ["v_proj"], "modules_to_save": None}, "no base_model", "adapter.targets=[v_proj] adapter.modules_to_save=[]"),
        ({"modules_to_save": ["norm", "lm_head"]}, "also base_model.model.lm_head.weight", "adapter.modules_to_save=[head,norms]"),
    ],
)
def test_what_others_have_asked_of_peft(tmp_path, options, found, hint) -> None:
    config = saved_by_peft(tmp_path, **options)
    with pytest.raises(ConfigError) as caught:
        check_init(config, SPEC)
    assert found in caught.value.found and hint in caught.value.hint


def test_other_files(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no adapter at all, no adapter_config.json"):
        check_init(replace(OURS, init=str(tmp_path)), SPEC)
    config = saved_by_peft(tmp_path)
    with pytest.raises(ConfigError, match="the adapter is of another model"):
        check_init(config, replace(SPEC, hidden_size=128))
    settings = json.loads((tmp_path / SETTINGS).read_text())
    (tmp_path / SETTINGS).write_text(json.dumps({**settings, "an_option_of_tomorrow": 1}))
    with pytest.raises(ConfigError, match="an_option_of_tomorrow: 1"):
        check_init(config, SPEC)
    (tmp_path / SETTINGS).write_text(json.dumps({**settings, "peft_type": "ADALORA"}))
    with pytest.raises(ConfigError, match="ADALORA"):
        check_init(config, SPEC)
    (tmp_path / SETTINGS).write_text("[]")
    with pytest.raises(ConfigError, match="no object"):
        check_init(config, SPEC)
    (tmp_path / WEIGHTS).write_bytes(b"cut")
    with pytest.raises(ConfigError):
        check_init(config, SPEC)


def test_our_settings_are_pefts(tmp_path) -> None:
    known = LoraConfig(**{key: value for key, value in settings_of(OURS, "base", trained_shapes(OURS, SPEC)).items() if key != "peft_type"})
    assert (known.r, known.lora_alpha, known.base_model_name_or_path) == (3, 6.0, "base")
    assert set(known.target_modules) == {"q_proj", "gate_proj", "up_proj", "down_proj"} and known.modules_to_save == ["norm"]
