"""What of routers cannot be: losses and biases that a model does not have, capacities of spread documents. All exit 93 before anything."""

from __future__ import annotations

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher import cli
from efflaunch.launcher.config.checks import check_config
from efflaunch.launcher.config.compose import compose

DENSE, SOFTMAX = ["+experiment=quickstart"], ["+experiment=quickstart_moe"]
SIGMOID = ["+experiment=qwen3_30b_a3b_1M", "model=dots_llm1", "cluster.num_nodes=16"]
WHOLE = ["parallel.sequence=static", "parallel.sp_degree=1", "parallel.tokens_per_rank=8K"]
WRONG = {
    "a balance without experts": (DENSE, "train.router_balance=0.01", "0.01 for a model without experts", "train.router_balance=0"),
    "a bias without experts": (DENSE, "train.router_bias_rate=0.1", "0.1 for a model without experts", "train.router_bias_rate=0"),
    "a capacity without experts": (DENSE, "train.expert_capacity=2", "2 for a model without experts", "train.expert_capacity=null"),
    "a bias of softmaxes": (SOFTMAX, "train.router_bias_rate=0.1", "of qwen3_moe, which have no", "train.router_balance=0.01"),
    "a balance of sigmoids": (SIGMOID, "train.router_balance=0.01", "whose scores are sigmoids", "train.router_bias_rate=0.001"),
    "a z-loss of sigmoids": (SIGMOID, "train.router_z_loss=0.1", "whose scores are sigmoids", "train.router_z_loss=0"),
    "a capacity, adaptive": (SOFTMAX, "train.expert_capacity=1.2", "1.2 with parallel.sequence=adaptive", "parallel.sp_degree=1"),
    "a capacity of groups": (SIGMOID, "train.expert_capacity=1.2", "1.2 with sequence groups of 8 ranks", "train.expert_capacity=null"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused(name: str) -> None:
    words, wrong, found, hint = WRONG[name]
    with pytest.raises(ConfigError) as caught:
        check_config(compose([*words, wrong]))
    assert caught.value.where == wrong.partition("=")[0] and found in caught.value.found and hint in caught.value.hint


def test_a_capacity_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="train.expert_capacity"):
        check_config(compose([*SOFTMAX, *WHOLE, "train.expert_capacity=0"]))


@pytest.mark.parametrize("words", [[*SOFTMAX, *WHOLE, "train.expert_capacity=1.25"], [*SIGMOID, "train.router_bias_rate=0.001"]])
def test_what_can_be_is_not(words: list[str]) -> None:
    check_config(compose(words))


def test_the_hint_of_a_capacity_is_one_that_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *SOFTMAX, "train.expert_capacity=1.2"]) == 93
    said = " ".join(capsys.readouterr().err.split())
    hint = said.partition("Try: ")[2].partition(", or ")[0]
    words = [word for word in hint.split() if word.startswith("parallel.")]
    assert len(words) == 3 and cli.main(["plan", *SOFTMAX, "train.expert_capacity=1.2", *words]) == 0
