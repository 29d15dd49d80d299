"""Tiny copies of models: every kind of layer once, ratios kept, and nothing lost that decides how a layer computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from efflaunch.errors import ConfigError
from efflaunch.model.config import ModelConfig
from efflaunch.model.families import FACTS, family_of, wrapped_family
from efflaunch.model.proof.tiny_config import CLAMP, LENGTH_SEEN, VOCABULARY, WINDOW, TinyConfig, kept_layers, tiny_config
from efflaunch.model.spec import ModelSpec, model_spec
from efflaunch.tests.model.public_configs import REFUSED, SUPPORTED, write_config
from efflaunch.tests.model.small import edit_config


def tiny_of(folder: Path, config: dict[str, Any], **changes: Any) -> TinyConfig:
    return tiny_config(ModelConfig(name="m", path=str(write_config(folder, {**config, **changes}))))


def spec_of(folder: Path, tiny: TinyConfig) -> ModelSpec:
    """The sizes of the tiny model, as a config.json of it would be read."""
    return model_spec(ModelConfig(name="t", path=str(write_config(folder / "tiny", dict(tiny.fields)))))


def test_there_is_a_config_of_every_family() -> None:
    assert {family_of(config["model_type"]) or wrapped_family(config) for config in SUPPORTED.values()} == set(FACTS)


@pytest.mark.parametrize("name", SUPPORTED)
def test_what_a_copy_keeps(name: str, tmp_path: Path) -> None:
    tiny = tiny_of(tmp_path, SUPPORTED[name])
    large, small = tiny.spec, spec_of(tmp_path, tiny)
    assert small.num_heads * large.num_kv_heads == large.num_heads * small.num_kv_heads
    assert abs(small.query_size / small.hidden_size / (large.query_size / large.hidden_size) - 1) < 0.02
    if large.experts is None or large.dense_layers:
        assert abs(small.intermediate_size / small.hidden_size / (large.intermediate_size / large.hidden_size) - 1) < 0.05
    assert small.head_dim % 2 == 0 and small.hidden_size <= 256 and small.vocab_size == VOCABULARY
    for switch in ("family", "tie_embeddings", "qk_norm", "attention_sinks", "attention_bias", "output_bias", "mlp_bias", "rotary_tables"):
        assert getattr(small, switch) == getattr(large, switch), switch
    assert (small.has_score_softcap, small.has_logit_softcap) == (large.has_score_softcap, large.has_logit_softcap)
    kept = large.of_layers(tiny.layers)
    assert small.windows == tuple(None if window is None else WINDOW for window in kept.windows)
    assert small.unrotated_layers == kept.unrotated_layers and small.dense_layers == kept.dense_layers and small.num_layers >= 2
    if large.experts is not None:
        assert small.experts is not None and small.experts.per_token == large.experts.per_token
        assert small.experts.per_token < small.experts.num_experts <= large.experts.num_experts
        assert bool(small.experts.shared_size) == bool(large.experts.shared_size)


@pytest.mark.parametrize(
    ("name", "changes", "layers"),
    [
        ("Llama-3.2-1B", {}, (0, 1)),
        ("Llama-3.2-1B", {"num_hidden_layers": 1}, (0,)),
        ("gemma-2-27b", {}, (0, 1)),
        ("gemma-3-1b", {}, (0, 5)),
        ("SmolLM3-3B", {}, (0, 3)),
        ("SmolLM3-3B", {"no_rope_layers": None, "no_rope_layer_interval": 6}, (0, 5)),
        ("dots.llm1", {}, (0, 1)),
        ("dots.llm1", {"first_k_dense_replace": 3}, (0, 3)),
        ("dots.llm1", {"first_k_dense_replace": 3, "sliding_window": 4096, "max_window_layers": 40}, (0, 3, 40)),
        ("Qwen3-30B-A3B", {"mlp_only_layers": [4, 5]}, (0, 4)),
        ("Qwen3-30B-A3B", {"decoder_sparse_step": 2}, (0, 1)),
        ("Qwen2.5-7B", {"use_sliding_window": True, "max_window_layers": 20}, (0, 20)),
        ("Qwen1.5-MoE-A2.7B", {"use_sliding_window": True, "decoder_sparse_step": 2}, (0, 1, 22)),
    ],
)
def test_which_layers_stand_for_all(name: str, changes: dict[str, Any], layers: tuple[int, ...], tmp_path: Path) -> None:
    """Layers 22 and 23 of the last are the first without a window; 23 has experts, as 1 does, but no window."""
    tiny = tiny_of(tmp_path, SUPPORTED[name], **changes)
    kinds = {(window, layer in tiny.spec.dense_layers) for layer, window in enumerate(tiny.spec.windows)}
    assert {(tiny.spec.windows[layer], layer in tiny.spec.dense_layers) for layer in tiny.layers} == kinds
    assert tiny.layers == layers == kept_layers(tiny.spec)
    small = spec_of(tmp_path, tiny)
    assert small.dense_layers == tiny.spec.of_layers(layers).dense_layers


def test_what_a_small_input_would_not_reach_is_brought_within_reach(tmp_path: Path) -> None:
    assert tiny_of(tmp_path, SUPPORTED["gpt-oss-20b"]).fields["swiglu_limit"] == CLAMP
    fields = tiny_of(tmp_path, SUPPORTED["gemma-2-27b"]).fields
    assert fields["query_pre_attn_scalar"] / fields["head_dim"] == 144 / 128
    assert fields["attn_logit_softcapping"] == 50.0 and fields["pad_token_id"] == 0
    dynamic = tiny_of(tmp_path, SUPPORTED["Llama-3.2-1B"], rope_scaling={"type": "dynamic", "factor": 4.0}).fields
    assert dynamic["max_position_embeddings"] == LENGTH_SEEN and dynamic["rope_parameters"]["factor"] == 4.0
    block = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [1.0 + i for i in range(32)]}
    longer = tiny_of(tmp_path, SUPPORTED["Llama-3.2-1B"], rope_scaling={**block, "original_max_position_embeddings": 8192}).fields
    assert longer["rope_parameters"]["original_max_position_embeddings"] == LENGTH_SEEN
    assert longer["max_position_embeddings"] == 16 * LENGTH_SEEN
    assert longer["rope_parameters"]["long_factor"] == [1.0 + i for i in range(0, 32, 4)]


def test_scaling_that_does_not_depend_on_the_length_stays(tmp_path: Path) -> None:
    fields = tiny_of(tmp_path, SUPPORTED["gpt-oss-20b"]).fields
    assert fields["rope_parameters"] == {**SUPPORTED["gpt-oss-20b"]["rope_scaling"], "rope_theta": 150000}
    assert fields["max_position_embeddings"] == 131072


def test_groups_of_experts_stay(tmp_path: Path) -> None:
    """DeepSeek-V3's: 8 groups of 32, of which 4 are taken; half of what a token may choose from is chosen."""
    groups = {"n_routed_experts": 256, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8}
    fields = tiny_of(tmp_path, SUPPORTED["dots.llm1"], **groups).fields
    assert {name: fields[name] for name in groups} == {**groups, "n_routed_experts": 32}


@pytest.mark.parametrize("name", REFUSED)
def test_what_training_refuses_is_refused(name: str, tmp_path: Path) -> None:
    config, message = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        tiny_of(tmp_path, config)
    assert message in str(caught.value)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path, SUPPORTED["Qwen3-0.6B"])
    edit_config(tmp_path, num_key_value_heads=3)
    with pytest.raises(ConfigError, match="num_key_value_heads: found 3; expected a divisor of the 16 heads"):
        tiny_config(ModelConfig(name="m", path=str(tmp_path)))


def test_no_torch_is_needed() -> None:
    code = "import sys, efflaunch.model.proof.tiny_config; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
