"""A configured model as layers of a pipeline, against the estimates of the same configuration without one."""

from __future__ import annotations

import pytest

from efflaunch.estimate.footprint.activations import class_bytes
from efflaunch.estimate.pipeline_work import STATE_BYTES, pipeline_model
from efflaunch.estimate.plan_inputs import PlanInputs
from efflaunch.estimate.timing.flops import sequence_flops
from efflaunch.launcher.config.compose import compose
from efflaunch.parallel.pipeline.work import PAIR_BACKWARD


def test_layers_come_to_the_flops_and_bytes_of_the_whole_model() -> None:
    inputs = PlanInputs.of(compose(["+experiment=llama70b_512k", "memory=keep"]))
    model = pipeline_model(inputs, group=16, weight_shards=32)
    length, rate = inputs.data.max_seq_len, inputs.gemm_rate * 16
    layers = (*model.layers, model.embedding, model.head)
    attention, linear = sequence_flops(inputs, length)
    assert 3 * sum(one.token_s for one in layers) * length * rate == pytest.approx(linear, rel=1e-3)
    pairs = length * length / 2
    in_pairs = (1 + PAIR_BACKWARD) * sum(one.pair_s for one in layers) * pairs
    assert in_pairs * inputs.attention_rate.both * 16 == pytest.approx(attention, rel=1e-3)
    assert sum(one.fixed_bytes for one in layers) == pytest.approx(inputs.parameters * STATE_BYTES / 32)
    assert len(model.layers) == 80 and sum(class_bytes(inputs).values()) == pytest.approx(16 * model.layers[0].kept_bytes)
    assert 0 < model.layers[0].input_bytes < model.layers[0].attention_bytes + 1e-9 < model.layers[0].kept_bytes


def test_windows_cost_tokens_and_not_pairs() -> None:
    inputs = PlanInputs.of(compose(["model=mistral_7b", "data=stdlib", "cluster=h100_80g_8", "train.steps=1"]))
    windows = inputs.spec.windows
    model = pipeline_model(inputs, group=1, weight_shards=8)
    assert all((one.pair_s == 0) == (window is not None) for one, window in zip(model.layers, windows, strict=True))
