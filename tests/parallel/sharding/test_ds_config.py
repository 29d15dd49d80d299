"""A user's ds_config.json: each key goes to DeepSpeed, agrees, or is refused by its name, with what to type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher.config.compose import changed, compose
from efflaunch.launcher.config.overrides import parse_overrides
from efflaunch.launcher.config.run_config import Config
from efflaunch.parallel.sharding.ds_config import check_zero, describe, ds_config, read_file

FILE = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": False, "loss_scale": 0},
    "optimizer": {"type": "Adam", "params": {"lr": 3e-5, "betas": [0.9, 0.999], "eps": "auto", "weight_decay": 0, "torch_adam": True}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "reduce_bucket_size": 5e8,
        "prefetch_bucket_size": 1000,
        "stage3_max_live_parameters": "auto",
        "overlap_comm": False,
    },
    "gradient_clipping": 0.0,
    "train_batch_size": "auto",
    "wall_clock_breakdown": False,
}
TYPED = ("optim.lr=3e-5", "optim.betas=[0.9,0.999]", "optim.weight_decay=0", "optim.grad_clip=null")


@pytest.fixture(scope="module")
def config() -> Config:
    return compose(["+experiment=quickstart", "engine=deepspeed", *TYPED])


def refused(content: dict[str, Any], config: Config) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        ds_config(content, config, "my.json")
    assert error.value.where == "engine.config=my.json"
    return error.value


def test_every_key_is_sent_or_agrees_or_is_left_open(config: Config) -> None:
    said = ds_config(FILE, config, "my.json")
    assert said.zero == {"reduce_bucket_size": 500_000_000, "stage3_prefetch_bucket_size": 1000, "overlap_comm": False}
    assert set(said.auto) == {
        *("bf16.enabled", "optimizer.params.eps", "zero_optimization.stage3_max_live_parameters", "train_batch_size"),
    }
    assert {"zero_optimization.stage", "gradient_clipping", "optimizer.type", "optimizer.params.lr", "fp16"} <= set(said.agreed)
    line = describe(said, "my.json")
    assert "reduce_bucket_size=500000000" in line and "optimizer.params.betas" in line and "auto: bf16.enabled" in line


@pytest.mark.parametrize(
    ("content", "found", "hint"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0, where optim.grad_clip=null", "optim.grad_clip=1"),
        ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, "where optim.betas=[0.9,0.999]", "optim.betas=[0.9,0.95]"),
        ({"optimizer": {"type": "Lamb"}}, 'optimizer.type="Lamb", where optim.algorithm=adamw', "optim.algorithm=Lamb"),
        ({"bf16": {"enabled": True}}, "where train.dtype=float32", "train.dtype=bfloat16"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage=2, where engine.stage=3", "engine.stage=2"),
        ({"fp16": {"enabled": True}}, "fp16 (", "in place of fp16, train.dtype=bfloat16"),
        ({"train_micro_batch_size_per_gpu": 4}, "a batch is a number of tokens here", "data.global_batch_tokens"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler (rates follow", "optim.schedule="),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer (", "optim.state_device=host"),
        ({"zero_optimization": {"stage": 3, "allgather_bucket_size": 5}}, "which stage 3 does not read (stages 1 and 2 do)", "remove"),
        ({"zero_optimization": {"stage3_max_live_parameters": 1.5}}, "no number of elements", "500000000"),
        ({"zero_optimization": {"overlap_comm": 1}}, "no truth value", "overlap_comm: true"),
        ({"communication_data_type": "bf16"}, "summed in float32", "fp32 for communication_data_type"),
        ({"zero_optimization": {"stage3_max_live_parameter": 5}}, "which no DeepSpeed reads", "stage3_max_live_parameters?"),
        ({"qqq": {"a": 1}}, "qqq, which no DeepSpeed reads", "remove qqq"),
    ],
)
def test_what_cannot_be_is_named_with_what_to_type(config: Config, content: dict[str, Any], found: str, hint: str) -> None:
    error = refused(content, config)
    assert found in error.found and hint in error.hint


def test_all_that_is_wrong_is_one_error_whose_overrides_can_be_pasted(config: Config) -> None:
    error = refused(FILE | {"gradient_clipping": 0.5, "steps_per_print": 20, "nebula": {"enabled": True}}, config)
    assert error.found.count(";") == 2 and error.hint.startswith("optim.grad_clip=0.5 logging.every_steps=20; in place of nebula, ")


def test_a_file_reaches_the_run_and_is_judged_again_when_the_run_changes(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(FILE))
    composed = compose(["+experiment=quickstart", "engine=deepspeed", f"engine.config={path}", *TYPED])
    assert composed.engine.zero == ds_config(FILE, composed, "").zero
    with pytest.raises(ConfigError, match=r"optimizer\.params\.lr=3e-05, where optim\.lr=0\.1"):
        changed(composed, parse_overrides(["optim.lr=0.1"], None), None)
    with pytest.raises(ConfigError, match=r"engine\.zero\.\w+: found .*, where .*ds\.json says"):
        name, value = next(iter(composed.engine.zero.items()))
        compose(["+experiment=quickstart", "engine=deepspeed", f"engine.config={path}", *TYPED, f"+engine.zero.{name}={value + 2}"])
    other = changed(composed, parse_overrides(["engine=torch"], None), None)
    assert other.engine.config is None and other.engine.zero == {}
    with pytest.raises(ConfigError, match="with engine=torch"):
        compose(["+experiment=quickstart", f"engine.config={path}"])


@pytest.mark.parametrize(
    ("text", "found"),
    [(None, "No such file"), ("{", "no JSON"), ("[1]", "no keys"), ('{"a": 1, "a": 2}', "a stands there twice"), ("[" * 99_999, "no JSON")],
)
def test_a_file_that_is_none(tmp_path: Path, text: str | None, found: str) -> None:
    if text is not None:
        (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_file(str(tmp_path / "ds.json"))
    assert error.value.where == "engine.config" and found in error.value.found


def test_keys_that_are_typed_are_checked_alike() -> None:
    check_zero({"reduce_bucket_size": 10, "overlap_comm": True}, 2)
    wrong = [("reduce_buckets_size", 10), ("stage3_max_live_parameters", 5), ("allgather_bucket_size", 0), ("allgather_bucket_size", 7)]
    for where, value in wrong:
        with pytest.raises(ConfigError) as error:
            check_zero({where: value}, 2)
        assert error.value.where == f"engine.zero.{where}"
