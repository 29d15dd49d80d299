"""Rotary settings of every family, type and form of config.json: what is asked for stands where transformers reads it, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from efflaunch.errors import ConfigError
from efflaunch.model.build import build_config
from efflaunch.model.config import Family, ModelConfig
from efflaunch.model.families import facts_of, family_of
from efflaunch.model.hf_fields import hf_config_dict, model_fields
from efflaunch.model.rope_fields import ORIGINAL
from efflaunch.model.spec import longer_positions, model_spec

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97, "head_dim": 8}
LENGTH = {"max_position_embeddings": 64}
BLOCKS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 8.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "beta_fast": 16.0},
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "proportional": {"factor": 2.0, "partial_rotary_factor": 0.5},
}
HAS_ORIGINAL = ("yarn", "longrope", "llama3")


MUST_SAY: dict[Family, dict[str, Any]] = {
    Family.DOTS1: {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    Family.SMOLLM3: {"pad_token_id": None},
    Family.GLM4: {"pad_token_id": None},
    Family.PHI3: {"pad_token_id": None, ORIGINAL: 64},
}
"""What transformers has no sensible default for: padding tokens beyond a small vocabulary, a length beyond a small one."""


def file(folder: Path, family: Family = Family.LLAMA, **fields: Any) -> Path:
    own = MUST_SAY.get(family, {})
    (folder / "config.json").write_text(json.dumps({"model_type": facts_of(family).model_type, **SIZES, **LENGTH, **own, **fields}))
    return folder


def of(folder: Path, **overrides: Any) -> ModelConfig:
    return ModelConfig(name="m", path=str(folder), **overrides)


def arrives(config: ModelConfig) -> tuple[dict[str, Any], int]:
    """The block of layers without a window, and the positions, as the Hugging Face config has them."""
    built = build_config(hf_config_dict(config))
    return built.rope_parameters.get("full_attention", built.rope_parameters), built.max_position_embeddings


def forms(family: Family, block: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The same rotary settings in each form that files of this family come in."""
    theta = {"rope_theta": 5e5}
    local = {"rope_type": "default", "rope_theta": 1e4}
    if facts_of(family).rope_per_layer_type:
        new = {"rope_parameters": {"full_attention": {**block, **theta}, "sliding_attention": local}}
        old = {"rope_scaling": block, **theta, "rope_local_base_freq": 1e4}
        return {"new": new, "old": old, "both": {**new, **old}}
    old = {"rope_scaling": {"type" if key == "rope_type" else key: value for key, value in block.items()}, **theta}
    new = {"rope_parameters": {**block, **theta}}
    return {"new": new, "old": old, "both": {**new, **old}}


def is_known(family: Family, kind: str) -> bool:
    """Whether the family's config class takes a rotary type."""
    return kind in (facts_of(family).rope_types or (kind,))


def own(family: Family, block: dict[str, Any]) -> dict[str, Any]:
    """The block with the share of a head that turns in this family, and a factor for each of its pairs."""
    share = facts_of(family).partial_rotary
    if share is None or block["rope_type"] == "proportional":
        return block
    cut = {name: value[: int(8 * share) // 2] for name, value in block.items() if isinstance(value, list)}
    return {**block, **cut, "partial_rotary_factor": share}


KNOWN = [(family, kind) for family in Family for kind in BLOCKS if is_known(family, kind)]


@pytest.mark.parametrize(("family", "kind"), KNOWN, ids=lambda value: getattr(value, "value", value))
def test_files_of_every_form_and_overrides_of_them(tmp_path: Path, family: Family, kind: str) -> None:
    block, other = own(family, {"rope_type": kind, **BLOCKS[kind]}), {"rope_type": "linear", "factor": 3.0}
    other = own(family, other if is_known(family, "linear") else {"rope_type": "default"})
    original = {ORIGINAL: 64} if kind in HAS_ORIGINAL else {}
    for fields in [*forms(family, block).values(), *forms(family, other).values()]:
        asked = of(file(tmp_path, family, **fields), rope_scaling={**block}, max_positions=256, rope_theta=7e5)
        assert arrives(asked) == ({**block, **original, "rope_theta": 7e5}, 64 if kind == "dynamic" else 256)
        assert model_spec(asked).max_positions == 256
    for fields in forms(family, block).values():
        found, positions = arrives(of(file(tmp_path, family, **fields)))
        assert found == {**block, **original, "rope_theta": 5e5} and positions == 64
        raised, positions = arrives(of(tmp_path, max_positions=256))
        assert raised == found and positions == (64 if kind == "dynamic" else 256)
        based, _ = arrives(of(tmp_path, rope_theta=9e5))
        assert based == {**found, "rope_theta": 9e5}
        assert not {"rope_scaling", "rope_theta", "rope_local_base_freq"} & set(hf_config_dict(of(tmp_path)))


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if kind in (*HAS_ORIGINAL, "dynamic")])
def test_from_scratch_the_original_length_is_given(kind: str) -> None:
    sizes = {"num_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 97}
    scaling = {"rope_type": kind, **BLOCKS[kind]}
    config = ModelConfig(name="m", family=Family.LLAMA, max_positions=256, rope_scaling=scaling, **sizes)
    with pytest.raises(ConfigError, match=ORIGINAL):
        model_spec(config)
    given = ModelConfig(name="m", family=Family.LLAMA, max_positions=256, rope_scaling={**scaling, ORIGINAL: "64"}, **sizes)
    assert arrives(given)[1] == (64 if kind == "dynamic" else 256)
    assert dict(given.rope_scaling or {})[ORIGINAL] == "64"


def test_the_files_own_original_stays_the_original(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 64, "rope_theta": 1e4}
    file(tmp_path, rope_parameters=yarn, max_position_embeddings=256)
    assert arrives(of(tmp_path, rope_scaling={"rope_type": "yarn", "factor": 8}, max_positions=512)) == ({**yarn, "factor": 8}, 512)
    # Left out, transformers makes the factor from both lengths: raising one must not change it.
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    file(tmp_path, rope_parameters=longrope, max_position_embeddings=256, **{ORIGINAL: 64})
    assert arrives(of(tmp_path, max_positions=512))[0]["factor"] == 4.0
    assert "factor" not in arrives(of(tmp_path))[0]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rope_parameters": {"rope_type": "axial"}}, "'axial'"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "no factor for rope_type yarn"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "found 0; expected a finite number above 0"),
    ({"rope_scaling": {"type": "linear", "factor": "many"}}, "found 'many'"),
    ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "found nan"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2}, "rope_scaling": {"type": "linear", "factor": 4}}, "both to say the same"),
    ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "expected one block"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "found 0.5"),
    ({"partial_rotary_factor": 0.5}, "found 0.5"),
    (
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4}},
        "found 1 numbers; expected 4 numbers",
    ),
    ({"rope_scaling": [1]}, "found [1]"),
    ({"rope_theta": -1}, "found -1"),
    ({"max_position_embeddings": 10**30}, "max_position_embeddings"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_files_that_transformers_would_read_in_part(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model_spec(of(file(tmp_path, **fields)))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, "factor, rope_type outside the blocks"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}, "rope_theta": 1e6}}, "rope_theta outside the blocks"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "`type`, which transformers does not read here"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "truncate": False}}, "gemma3_text layers do not read it"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5; expected 1"),
    ],
    ids=["flat", "mixed", "type", "truncate", "partial"],
)
def test_gemma3_files_that_transformers_would_read_in_part(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model_spec(of(file(tmp_path, Family.GEMMA3, **fields)))
    assert message in str(caught.value)


PARTS: dict[str, list[Any]] = {
    "rope_theta": [1e4, 5e5, 1000],
    "rope_scaling": [
        *({"rope_type": kind, **block} for kind, block in BLOCKS.items()),
        *({"type": "yarn", "factor": 2, ORIGINAL: 32}, {}, None),
    ],
    "rope_local_base_freq": [1e4, 333.0],
    ORIGINAL: [16, 32],
    "partial_rotary_factor": [1.0, 0.5],
}
NESTED = [*PARTS["rope_scaling"], {"rope_type": "linear", "factor": 2.0, "rope_theta": 777.0}]


def random_fields(chosen: Random, family: Family) -> dict[str, Any]:
    """Rotary fields as a file might have them, in any form and mixture."""
    fields = {name: chosen.choice(values) for name, values in PARTS.items() if chosen.random() < 0.35}
    if chosen.random() < 0.4:
        by_type = {kind: chosen.choice(NESTED) for kind in ("full_attention", "sliding_attention")}
        fields["rope_parameters"] = by_type if facts_of(family).rope_per_layer_type else chosen.choice(NESTED)
    return fields


def tables(config: Any) -> list[torch.Tensor]:
    """Rotary tables as the family's own module makes them, of a short and a long sequence and every type of layer."""
    with torch.device("meta"):
        made = type(AutoModelForCausalLM.from_config(config).model.rotary_emb)
    rotary, out = made(config=config), []
    for length in (5, 100):
        for kind in dict.fromkeys(config.layer_types) if facts_of(family_of(config.model_type)).rope_per_layer_type else [None]:
            out += rotary(torch.zeros(1, length, 32), torch.arange(length)[None], *([kind] if kind else []))
    return out


@pytest.mark.parametrize("family", list(Family), ids=lambda family: family.value)
def test_tables_of_files_in_any_form_are_those_of_transformers(tmp_path: Path, family: Family) -> None:
    """What is not refused is read as transformers reads it."""
    chosen, compared = Random(family.value), 0
    sizes = {"intermediate_size": 48, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
    for _ in range(60):
        fields = random_fields(chosen, family)
        file(tmp_path, family, **fields, **(sizes if facts_of(family).rope_per_layer_type else {"intermediate_size": 48}))
        try:
            ours = build_config(hf_config_dict(of(tmp_path)))
        except ConfigError:
            continue
        try:
            theirs = tables(AutoConfig.from_pretrained(tmp_path))
        except (KeyError, TypeError, AttributeError):
            continue  # transformers cannot read it
        found = tables(ours)
        assert len(found) == len(theirs) and all(map(torch.equal, found, theirs)), fields
        compared += 1
    assert compared >= 10


ASKED: list[tuple[Family, dict[str, Any], str]] = [
    (
        Family.LLAMA,
        {"rope_scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 3}},
        "rope_scaling.beta_fast: found a parameter that is not",
    ),
    (
        Family.LLAMA,
        {"rope_scaling": {"rope_type": "linear", "factor": 2, "rope_theta": 5.0}, "rope_theta": 6.0},
        "found 5.0 beside model.rope_theta=6",
    ),
    (Family.LLAMA, {"extra": {"rope_theta": 5.0}}, "model.extra.rope_theta: found a second name"),
    (Family.LLAMA, {"extra": {"rope_scaling": {}}}, "model.extra.rope_scaling: found a second name"),
    (Family.LLAMA, {"extra": {"max_position_embeddings": 128}}, "expected model.max_positions"),
    (Family.LLAMA, {"extra": {"rope_local_base_freq": 5.0}}, "model.extra.rope_local_base_freq"),
    (Family.LLAMA, {"extra": {"sliding_window": 5}}, "no llama layer reads"),
    (Family.LLAMA, {"extra": {"atention_bias": True}}, "no llama layer reads"),
    (Family.LLAMA, {"extra": {"final_logit_softcapping": 5.0}}, "no llama layer reads"),
    (Family.LLAMA, {"extra": {"vocab_size": 130}}, "expected model.vocab_size"),
    (Family.GEMMA3, {"extra": {"attn_logit_softcapping": 5.0}}, "no gemma3_text layer reads"),
    (Family.QWEN2, {"extra": {"sliding_window": 5}}, "but no layer uses it"),
    (Family.GEMMA3, {"extra": {"rope_parameters": {}}, "rope_theta": 5.0}, "it beside model.rope_theta"),
    (Family.GEMMA3, {"extra": {"use_bidirectional_attention": True}}, "causal attention"),
    (Family.GEMMA3, {"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": False}}, "do not read it"),
    (Family.MISTRAL, {"extra": {"layer_types": ["full_attention"] * 2}}, "no mistral layer reads"),
]


@pytest.mark.parametrize(("family", "overrides", "message"), ASKED, ids=[str(number) for number in range(len(ASKED))])
def test_what_no_layer_would_read_is_refused(tmp_path: Path, family: Family, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model_spec(of(file(tmp_path, family), **overrides))
    assert message in str(caught.value)


def test_patterns_replace_listed_layer_types(tmp_path: Path) -> None:
    """Saved files list the type of every layer, and transformers then reads no pattern."""
    file(tmp_path, Family.GEMMA3, layer_types=["sliding_attention", "full_attention"], sliding_window=7)
    assert model_spec(of(tmp_path, extra={"sliding_window_pattern": 6})).windows == (7, 7)
    file(tmp_path, Family.QWEN3, layer_types=["full_attention"] * 2, sliding_window=None, use_sliding_window=False)
    extra = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    config = of(tmp_path, extra=extra)
    assert model_spec(config).windows == (None, 5)
    assert build_config(hf_config_dict(config)).layer_types == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize("family", list(Family), ids=lambda family: family.value)
def test_the_second_rotary_base(tmp_path: Path, family: Family) -> None:
    file(tmp_path, family)
    if facts_of(family).rope_per_layer_type and facts_of(family).has_local_theta:
        found = model_fields(of(tmp_path, extra={"rope_local_base_freq": 123.0})).rope.parameters
        assert found["sliding_attention"]["rope_theta"] == 123.0 and found["full_attention"]["rope_theta"] == 1e6
    scaling = {"rope_type": "linear", "factor": 2.0} if is_known(family, "linear") else {"rope_type": "default"}
    asked = own(family, {**scaling, "rope_theta": 5e4})
    parameters = {"full_attention": asked, "sliding_attention": {"rope_type": "default", "rope_theta": 7.0}}
    whole = parameters if facts_of(family).rope_per_layer_type else asked
    assert build_config(hf_config_dict(of(tmp_path, extra={"rope_parameters": whole}))).rope_parameters == whole


NONSENSE: dict[str, Any] = {
    "num_hidden_layers": [10**9, 0, -1, 2.5, "2", True, None],
    "hidden_size": [10**12, 0, None, "32"],
    "num_attention_heads": [0, 3, 10**9],
    "num_key_value_heads": [3, 0, "2"],
    "head_dim": [7, 0, -8, 10**9],
    "vocab_size": [0, -1, 10**12, 1.5],
    "max_position_embeddings": [0, -1, "64", float("inf")],
    "intermediate_size": [0, 10**12],
    "rms_norm_eps": [0, -1e-6, float("nan"), "tiny"],
    "initializer_range": [float("nan"), -1],
    "hidden_act": ["prelu", "nothing", 5],
    "attention_dropout": [0.1, float("nan")],
    "attention_bias": [1, "yes"],
    "tie_word_embeddings": ["true", 2],
    "pad_token_id": [97, 1.5, "0"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NONSENSE.items() for value in values], ids=str)
def test_nonsense_in_config_json_is_named_at_once(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        model_spec(of(file(tmp_path, **{name: value})))
    assert (name in str(caught.value) and "config.json" in str(caught.value)) or "model.path" in str(caught.value)


@pytest.mark.parametrize(
    "types", [["full_attention"], ["full_attention"] * 3, ["full_attention", "linear_attention"], "full", [1, 2]], ids=str
)
def test_layer_types_that_are_none(tmp_path: Path, types: Any) -> None:
    with pytest.raises(ConfigError, match="layer_types"):
        model_spec(of(file(tmp_path, Family.GEMMA3, layer_types=types)))


def test_the_advice_to_extend_a_model_is_right(tmp_path: Path) -> None:
    file(tmp_path)
    assert longer_positions(of(tmp_path), 250) == [
        "model.max_positions=250",
        f"'model.rope_scaling={{rope_type: yarn, factor: 4.0, {ORIGINAL}: 64}}'",
    ]


SLIDES = {"layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("family", "fields", "extra", "name"),
    [
        (Family.QWEN2, {}, SLIDES, "layer_types"),
        (Family.QWEN3, {"sliding_window": 7}, SLIDES, "layer_types"),
        (Family.QWEN3, {**SLIDES, "use_sliding_window": False}, {}, "layer_types"),
        (Family.QWEN2, {**SLIDES, "use_sliding_window": True, "sliding_window": 7}, {"sliding_window": None}, "layer_types"),
        (Family.GEMMA2, {}, {"sliding_window": None}, "sliding_window"),
        (Family.GEMMA3, {**SLIDES, "sliding_window": 7}, {"sliding_window": None}, "layer_types"),
    ],
)
def test_layers_with_a_window_need_one(tmp_path: Path, family: Family, fields: Any, extra: Any, name: str) -> None:
    """transformers fails at such a layer's mask; nothing is taken for full attention."""
    with pytest.raises(ConfigError, match=rf"{name}: found .*; expected sliding_window=TOKENS.*, which these layers need"):
        model_spec(of(file(tmp_path, family, **fields), extra=extra))
    full = ["full_attention"] * 2
    assert model_spec(of(tmp_path, extra={**extra, "layer_types": full})).windows == (None, None)
