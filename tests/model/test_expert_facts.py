"""Configurations of mixtures that cannot be trained are refused by the field that is wrong, whichever way the model is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher import cli
from efflaunch.model.config import Family, ModelConfig
from efflaunch.model.families import FACTS
from efflaunch.model.spec import check_model, model_spec
from efflaunch.tests.model.small import edit_config, of, save_model

SIZES: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 97, "max_positions": 64,
}  # fmt: skip
WHOLE = "a whole number from 1 to "
WRONG: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "dense layers alone": ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "[0, 1]", "a layer with experts at least"),
    "a layer that is none": ("qwen2_moe", {"mlp_only_layers": [2]}, "[2]", "numbers of layers, 0 to 1"),
    "a layer by name": ("qwen3_moe", {"mlp_only_layers": ["0"]}, "['0']", "numbers of layers, 0 to 1"),
    "every third of two": ("qwen3_moe", {"decoder_sparse_step": 3}, "3", "a layer with experts at least"),
    "every none-th layer": ("qwen2_moe", {"decoder_sparse_step": 0}, "0", "a whole number, 1 or more"),
    "noise": ("mixtral", {"router_jitter_noise": 0.1}, "0.1", "0: routing has no noise"),
    "an auxiliary loss": ("mixtral", {"output_router_logits": True}, "True", "false: no auxiliary loss of the router is trained with"),
    "too many of a token": ("mixtral", {"num_experts_per_tok": 9}, "9", "at most the 8 experts there are (num_local_experts)"),
    "too many of Qwen3's": ("qwen3_moe", {"num_experts": 4}, "8", "at most the 4 experts there are (num_experts)"),
    "no experts": ("qwen3_moe", {"num_experts": 0}, "0", WHOLE),
    "none of a token": ("gpt_oss", {"num_experts_per_tok": 0}, "0", WHOLE),
    "half an expert": ("gpt_oss", {"num_local_experts": 2.5}, "2.5", WHOLE),
    "a word": ("qwen2_moe", {"num_experts_per_tok": "two"}, "two", WHOLE),
    "a switch": ("qwen2_moe", {"num_experts": True}, "True", WHOLE),
    "no width": ("qwen3_moe", {"moe_intermediate_size": None}, "None", WHOLE),
    "no shared expert": ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "0", WHOLE),
    "renormalised by a number": ("qwen3_moe", {"norm_topk_prob": 1}, "1", "true or false"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_trained_is_named(name: str) -> None:
    family, extra, found, expected = WRONG[name]
    window = {"sliding_window": 7} if family == "gpt_oss" else {}
    with pytest.raises(ConfigError) as caught:
        check_model(ModelConfig(name="m", family=Family(family), extra=extra, **window, **SIZES))
    (field,) = extra if name != "too many of Qwen3's" else ("num_experts_per_tok",)
    assert caught.value.where == f"model.extra.{field}" and caught.value.hint == f"model.extra.{field}=VALUE"
    assert f"found {found}; expected {expected}" in str(caught.value)


def test_in_a_file_the_directory_is_named(tmp_path: Path) -> None:
    config = of(save_model(tmp_path, "qwen3_moe"))
    edit_config(tmp_path, mlp_only_layers=[0, 1])
    with pytest.raises(ConfigError) as caught:
        check_model(config)
    assert caught.value.where == f"model.path {tmp_path}: mlp_only_layers"
    assert caught.value.hint == "model.extra.mlp_only_layers=VALUE, or the file as it was published"


def test_a_plan_of_it_ends_with_93(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "+experiment=quickstart_moe", "model.extra.num_experts_per_tok=17"]) == 93
    said = capsys.readouterr()
    assert "model.extra.num_experts_per_tok" in said.err and "at most the 16 experts" in said.err and not said.out


def test_every_mixture_has_its_count_under_two_names_and_its_sizes() -> None:
    mixtures = {family: facts for family, facts in FACTS.items() if facts.experts is not None}
    assert [family.value for family in mixtures] == ["gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe", "dots1"]
    for facts in mixtures.values():
        assert facts.experts is not None
        other = "num_experts" if facts.experts.count == "num_local_experts" else "num_local_experts"
        assert dict(facts.aliases) == {other: facts.experts.count}
        assert {facts.experts.count, facts.experts.inner} <= facts.fields | {"intermediate_size"}


def test_sizes_of_a_mixture_with_a_shared_expert() -> None:
    extra = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
    experts = model_spec(ModelConfig(name="m", family=Family.QWEN2_MOE, extra=extra, **SIZES)).experts
    assert experts is not None
    assert (experts.num_experts, experts.per_token, experts.inner_size, experts.shared_size) == (6, 3, 24, 40)
    assert (experts.active_size, experts.has_shared_gate, experts.has_biases, experts.has_router_bias) == (112, True, False, False)
