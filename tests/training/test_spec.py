"""Parameter counts and Hugging Face configs against transformers itself, and every message of check_model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from efflaunch.errors import ConfigError
from efflaunch.model.config import Family, ModelConfig
from efflaunch.model.families import facts_of
from efflaunch.model.hf_fields import MODEL_TYPES, hf_config_dict, model_family
from efflaunch.model.load_plan import parameter_shapes
from efflaunch.model.spec import (
    LayerParameters,
    ModelSpec,
    active_layer_parameters,
    check_model,
    expert_weights,
    layer_parameters,
    model_spec,
    num_parameters,
)
from efflaunch.units import parse_quantity

CONF = Path(__file__).parents[2] / "conf" / "model"
PRESETS = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "pretrained")
TINY: dict[str, Any] = {
    "name": "t",
    "num_layers": 7,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 128,
    "max_positions": 256,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
NO_DEFAULTS = {Family.DOTS1: {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2}}
"""Fields that Hugging Face's config classes leave open, and models need."""
VARIANTS: list[dict[str, Any]] = [
    {"family": Family.LLAMA},
    {"family": Family.LLAMA, "tie_embeddings": True, "extra": {"attention_bias": True, "mlp_bias": True}},
    {"family": Family.LLAMA, "head_dim": 32},
    {"family": Family.MISTRAL, "sliding_window": 16},
    {"family": Family.MISTRAL},
    {"family": Family.QWEN2},
    {"family": Family.QWEN2, "sliding_window": 16, "extra": {"max_window_layers": 3}},
    {"family": Family.QWEN3},
    {"family": Family.QWEN3, "head_dim": 32, "tie_embeddings": True, "extra": {"attention_bias": True}},
    {"family": Family.GEMMA2, "sliding_window": 16, "head_dim": 32},
    {"family": Family.GEMMA2, "sliding_window": 16, "tie_embeddings": True, "extra": {"attention_bias": True}},
    {"family": Family.GEMMA3, "sliding_window": 16, "tie_embeddings": True},
    {"family": Family.GEMMA3, "sliding_window": 16, "extra": {"sliding_window_pattern": 3}},
    {"family": Family.SMOLLM3, "tie_embeddings": True, "extra": {"attention_bias": True, "mlp_bias": True}},
    {"family": Family.SMOLLM3, "sliding_window": 16},
    {"family": Family.OLMO2, "extra": {"attention_bias": True}},
    {"family": Family.OLMO3, "sliding_window": 16, "extra": {"layer_types": [*["full_attention"] * 2, *["sliding_attention"] * 5]}},
    {"family": Family.PHI3, "sliding_window": 16, "tie_embeddings": True, "extra": {"partial_rotary_factor": 0.75}},
    {"family": Family.GRANITE, "extra": {"attention_bias": True, "mlp_bias": True, "logits_scaling": 8.0}},
    {"family": Family.GLM4, "head_dim": 32},
    {"family": Family.COHERE2, "sliding_window": 16, "tie_embeddings": True, "extra": {"sliding_window_pattern": 3}},
    {"family": Family.MINISTRAL, "sliding_window": 16, "extra": {"layer_types": ["sliding_attention", *["full_attention"] * 6]}},
    {"family": Family.STABLELM, "extra": {"use_qkv_bias": True}},
    {"family": Family.QWEN3_MOE, "extra": {**EXPERTS, "mlp_only_layers": [0, 4]}},
    {"family": Family.QWEN2_MOE, "extra": {**EXPERTS, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 7}},
    {"family": Family.DOTS1, "extra": {**NO_DEFAULTS[Family.DOTS1], "moe_intermediate_size": 24, "first_k_dense_replace": 2}},
]
ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64},
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64},
    {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
]


def tiny(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**TINY, **changes})


def preset(name: str) -> ModelConfig:
    found = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert set(found) <= {field.name for field in fields(ModelConfig)}
    found["family"], found["max_positions"] = Family(found["family"]), parse_quantity(found["max_positions"], "tokens")
    return ModelConfig(**found)


def hugging_face(config: ModelConfig) -> Any:
    from transformers import AutoConfig

    fields = hf_config_dict(config)
    assert fields["model_type"] == MODEL_TYPES[model_family(config)]
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def count_on_meta(hf: Any) -> tuple[int, int]:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    layer = sum(p.numel() for p in model.model.layers[-1].parameters())
    return sum(p.numel() for p in model.parameters()), layer


def hf_windows(hf: Any) -> tuple[int | None, ...]:
    if getattr(hf, "layer_types", None) is None:
        return (getattr(hf, "sliding_window", None),) * hf.num_hidden_layers
    return tuple(hf.sliding_window if kind == "sliding_attention" else None for kind in hf.layer_types)


def idle_weights(spec: ModelSpec) -> int:
    """Weights of a layer's experts that a token does not visit, each with a gate, an up and a down."""
    assert spec.experts is not None
    one = 3 * spec.hidden_size * spec.experts.inner_size
    biases = (2 * spec.experts.inner_size + spec.hidden_size) * spec.experts.has_biases
    return (spec.experts.num_experts - spec.experts.per_token) * (one + biases)


@pytest.mark.parametrize("config", [*map(preset, PRESETS), *(tiny(**v) for v in VARIANTS)], ids=lambda c: f"{c.name}-{c.family.value}")
def test_counts_equal_the_hugging_face_model(config: ModelConfig) -> None:
    spec, hf = model_spec(config), hugging_face(config)
    total, layer = count_on_meta(hf)
    active = layer if spec.experts is None else layer - idle_weights(spec)
    assert num_parameters(spec) == total
    layers, routed = layer_parameters(spec), LayerParameters(layer, active, expert_weights(spec))
    others = [each for number, each in enumerate(layers) if number not in spec.dense_layers]
    assert others == [routed] * (spec.num_layers - len(spec.dense_layers))
    assert active_layer_parameters(spec) == sum(each.active for each in layers) / spec.num_layers
    assert spec.windows == hf_windows(hf)
    assert (spec.head_dim, spec.num_kv_heads, spec.max_positions) == (
        getattr(hf, "head_dim", hf.hidden_size // hf.num_attention_heads),
        hf.num_key_value_heads,
        hf.max_position_embeddings,
    )


def test_sinks_are_counted_and_looked_for_in_files() -> None:
    import torch

    from efflaunch.tests.parity.gpt_oss_dense import DenseModel
    from efflaunch.tests.parity.reference import hf_config

    sizes = {"num_layers": 3, "num_heads": 8, "head_dim": 16, "intermediate_size": 112, "vocab_size": 97}
    like = tiny(family=Family.LLAMA, **sizes, extra={"attention_bias": True})
    spec = replace(model_spec(like), attention_sinks=True)
    with torch.device("meta"):
        model = DenseModel(hf_config("gpt_oss_dense"))
    assert parameter_shapes(spec) == {name: tuple(each.shape) for name, each in model.named_parameters()}
    assert num_parameters(spec) == sum(each.numel() for each in model.parameters())
    assert num_parameters(spec) - num_parameters(replace(spec, attention_sinks=False)) == 3 * spec.num_heads


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("tiny", 4.8),
        ("llama3_8b", 8030.3),
        ("llama3_70b", 70553.7),
        ("mistral_7b", 7248.0),
        ("qwen2_7b", 7615.6),
        ("qwen3_8b", 8190.7),
        ("qwen3_32b", 32762.1),
        ("tiny_moe", 7.9),
        ("qwen3_30b_a3b", 30532.1),
        ("mixtral_8x7b", 46702.8),
        ("gpt_oss_20b", 20914.8),
        ("smollm3_3b", 3075.1),
        ("olmo2_7b", 7298.6),
        ("olmo3_7b", 7298.0),
        ("phi4_14b", 14659.5),
        ("granite3_8b", 8170.8),
        ("glm4_9b", 9400.3),
        ("command_r7b", 8028.0),
        ("gemma3_4b", 3880.3),
        ("mistral_small_24b", 23572.4),
        ("stablelm_3b", 2795.4),
    ],
)
def test_presets_have_their_published_sizes(name: str, millions: float) -> None:
    assert round(num_parameters(model_spec(preset(name))) / 1e6, 1) == pytest.approx(millions, abs=0.11)


@pytest.mark.parametrize("family", list(Family), ids=lambda f: f.value)
@pytest.mark.parametrize("scaling", [None, *ROPES], ids=lambda r: "default" if r is None else str(r.get("rope_type", "old")))
def test_rope_arrives_where_transformers_reads_it(family: Family, scaling: dict[str, Any] | None) -> None:
    facts = facts_of(family)
    kind = (scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default"
    if facts.rope_types and kind not in facts.rope_types:
        return
    if facts.partial_rotary is not None and kind == "longrope":
        pairs = int(16 * facts.partial_rotary) // 2
        scaling = {name: value[:pairs] if isinstance(value, list) else value for name, value in (scaling or {}).items()}
    window = None if not facts.has_window or family in (Family.QWEN2, Family.QWEN3, Family.DOTS1) else 16
    config = tiny(family=family, rope_theta=12345.0, rope_scaling=scaling, sliding_window=window, extra=NO_DEFAULTS.get(family, {}))
    found = hugging_face(config).rope_parameters
    full = found["full_attention"] if facts.rope_per_layer_type else found
    wanted = dict(scaling or {})
    if facts.partial_rotary is not None and wanted.get("rope_type") != "proportional":
        wanted["partial_rotary_factor"] = facts.partial_rotary
    wanted["rope_type"] = wanted.pop("rope_type", None) or wanted.pop("type", None) or "default"
    wanted.pop("type", None)
    if wanted["rope_type"] == "dynamic":  # takes the original length from max_position_embeddings
        assert hugging_face(config).max_position_embeddings == wanted.pop("original_max_position_embeddings")
        assert model_spec(config).max_positions == 256
    assert full == {**wanted, "rope_theta": 12345.0}
    if facts.rope_per_layer_type:
        assert found["sliding_attention"] == {"rope_type": "default", "rope_theta": facts.local_theta}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v["family"].value)
def test_a_saved_model_directory_gives_the_same_spec(variant: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(**variant)
    hugging_face(config).save_pretrained(tmp_path)
    from_path = ModelConfig(name="t", path=str(tmp_path))
    assert model_spec(from_path) == model_spec(config)
    assert hugging_face(from_path).to_dict() | {"architectures": None} == hugging_face(config).to_dict() | {"architectures": None}


@pytest.mark.parametrize("family", list(Family), ids=lambda f: f.value)
def test_a_file_with_defaults_left_out_reads_as_transformers_reads_it(family: Family, tmp_path: Path) -> None:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps({"model_type": MODEL_TYPES[family], **NO_DEFAULTS.get(family, {})}))
    spec, hf = model_spec(ModelConfig(name="t", path=str(tmp_path))), AutoConfig.for_model(MODEL_TYPES[family])
    assert (spec.num_layers, spec.hidden_size, spec.intermediate_size, spec.vocab_size, spec.num_heads, spec.num_kv_heads) == (
        hf.num_hidden_layers,
        hf.hidden_size,
        hf.intermediate_size,
        hf.vocab_size,
        hf.num_attention_heads,
        hf.num_key_value_heads,
    )
    assert (spec.tie_embeddings, spec.max_positions, spec.windows) == (hf.tie_word_embeddings, hf.max_position_embeddings, hf_windows(hf))


def test_context_extension_of_a_saved_model(tmp_path: Path) -> None:
    hugging_face(tiny(family=Family.LLAMA, rope_theta=5e5)).save_pretrained(tmp_path)
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    config = ModelConfig(name="t", path=str(tmp_path), max_positions=1024, rope_scaling=scaling)
    hf = hugging_face(config)
    assert hf.rope_parameters == {**scaling, "rope_theta": 5e5} and hf.max_position_embeddings == 1024
    assert model_spec(config).max_positions == 1024


BAD: list[tuple[ModelConfig, str, str]] = [
    (ModelConfig(name="t"), "model.family: found no family, num_layers,", "model.num_layers=VALUE"),
    (
        tiny(family=Family.LLAMA, vocab_size=None),
        "model.vocab_size: found no vocab_size in model t",
        "model.vocab_size=VALUE, or model.path",
    ),
    (tiny(family=Family.LLAMA, num_layers=0), "model.num_layers: found 0; expected a number above 0", "model.num_layers=VALUE"),
    (
        tiny(family=Family.LLAMA, num_kv_heads=3),
        "model.num_kv_heads: found 3 KV heads for 4 heads; expected a divisor of 4: 1, 2, 4",
        "num_kv_heads=2",
    ),
    (tiny(family=Family.LLAMA, hidden_size=66), "model.num_heads: found 4 heads for hidden size 66", "model.head_dim=VALUE"),
    (tiny(family=Family.LLAMA, head_dim=15), "model.head_dim: found 15; expected an even number", "model.head_dim=16"),
    (tiny(family=Family.LLAMA, sliding_window=8), "model.sliding_window: found 8 for a llama model", "model.family=mistral"),
    (tiny(family=Family.QWEN2, sliding_window=8), "model.sliding_window: found 8, but no layer uses it", "max_window_layers=0"),
    (tiny(family=Family.GEMMA2), "model.sliding_window: found no sliding_window", "model.sliding_window=VALUE"),
    (
        tiny(family=Family.LLAMA, rope_scaling={"rope_type": "ntk"}),
        "model.rope_scaling.rope_type: found 'ntk'; expected one of default, linear",
        "=linear",
    ),
    (
        tiny(family=Family.LLAMA, rope_scaling={"rope_type": "yarn"}),
        "model.rope_scaling.factor: found no factor, original_max_position_embeddings for rope_type yarn",
        "+model.rope_scaling.factor",
    ),
    (
        ModelConfig(name="t", path="/nowhere/at/all"),
        "model.path /nowhere/at/all: found no such directory (/nowhere/at/all)",
        "model.path=DIRECTORY",
    ),
]


@pytest.mark.parametrize(("config", "message", "hint"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_mistakes_are_named(config: ModelConfig, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_model(config)
    assert str(caught.value).startswith(message) and hint in caught.value.hint


def test_sizes_beside_a_path(tmp_path: Path) -> None:
    hugging_face(tiny(family=Family.LLAMA)).save_pretrained(tmp_path)
    config = ModelConfig(name="t", path=str(tmp_path))
    check_model(config)
    with pytest.raises(ConfigError, match=r"model.num_layers: found 3 beside model.path"):
        check_model(replace(config, num_layers=3))
    for value in (True, False):
        hint = rf"model.tie_embeddings=null, and \+model.extra.tie_word_embeddings={str(value).lower()} instead"
        with pytest.raises(ConfigError, match=hint):
            check_model(replace(config, tie_embeddings=value))


def test_an_unknown_model_type_names_the_adapter_to_write(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi"}))
    with pytest.raises(ConfigError, match=r"found model_type 'phi'") as caught:
        check_model(ModelConfig(name="t", path=str(tmp_path)))
    assert "model/families/phi.py" in caught.value.hint
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(ConfigError, match=r"no readable config.json"):
        check_model(ModelConfig(name="t", path=str(tmp_path)))


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, efflaunch.model.spec; print([m for m in ('torch', 'transformers', 'numpy', 'huggingface_hub') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("field", "key"),
    [("hidden_size", "hidden_size"), ("num_hidden_layers", "num_layers"), ("num_key_value_heads", "num_kv_heads")],
)
def test_a_size_is_asked_for_once(field: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.extra\.{field}.*beside model\.{key}="):
        check_model(tiny(family=Family.LLAMA, head_dim=16, extra={field: 32}))
