"""What DeepSpeed is told: sums and not means, float32 wherever gradients meet, no weights kept whole."""

from __future__ import annotations

from dataclasses import replace

import pytest

from efflaunch.parallel.sharding.deepspeed_settings import ZeroSettings, deepspeed_config, gradient_factor

SETTINGS = ZeroSettings(stage=3, dtype="bfloat16", grad_clip=1.0, layer_numbers=1000, largest_numbers=4000, on_gpu=False)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_are_summed_over_ranks(stage: int) -> None:
    config = deepspeed_config(replace(SETTINGS, stage=stage))
    sums = config.get("gradient_allreduce_op") == "sum"
    assert sums == (stage < 3) and gradient_factor(stage, 8) == (1 if sums else 8)


def test_gradients_meet_in_float32() -> None:
    config = deepspeed_config(SETTINGS)
    assert config["data_types"] == {"grad_accum_dtype": "fp32"} and config["communication_data_type"] == "fp32"
    assert config["bf16"] == {"enabled": True} and "bf16" not in deepspeed_config(replace(SETTINGS, dtype="float32"))


def test_clipping_is_what_is_configured() -> None:
    assert deepspeed_config(SETTINGS)["gradient_clipping"] == 1.0
    assert deepspeed_config(replace(SETTINGS, grad_clip=None))["gradient_clipping"] == 0.0


def test_a_bucket_takes_the_largest_parameter() -> None:
    assert deepspeed_config(SETTINGS)["zero_optimization"]["reduce_bucket_size"] == 4000
    assert deepspeed_config(replace(SETTINGS, stage=1))["zero_optimization"]["allgather_bucket_size"] == 4000


def test_no_weight_stays_whole_and_one_layer_is_gathered_ahead() -> None:
    zero = deepspeed_config(SETTINGS)["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] == zero["stage3_max_reuse_distance"] == 0
    assert zero["stage3_prefetch_bucket_size"] == 1000 and zero["stage3_max_live_parameters"] == 2000
    alone = deepspeed_config(replace(SETTINGS, gathers_ahead=False))["zero_optimization"]
    assert alone["stage3_prefetch_bucket_size"] == 0


def test_what_is_asked_for_takes_the_place_of_what_is_chosen_within_the_models_bounds() -> None:
    asked = {"reduce_bucket_size": 10, "stage3_prefetch_bucket_size": 77, "overlap_comm": True}
    zero = deepspeed_config(replace(SETTINGS, asked=asked))["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"], zero["overlap_comm"]) == (4000, 77, True)
    alone = deepspeed_config(replace(SETTINGS, asked=asked, gathers_ahead=False))["zero_optimization"]
    assert alone["stage3_prefetch_bucket_size"] == 0
