"""Estimates of pipelines: layers to stages, what each stage holds, and what the step takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from efflaunch.estimate.build import build_ledger
from efflaunch.estimate.footprint.device import device_terms
from efflaunch.estimate.footprint.host import arena_bytes
from efflaunch.estimate.footprint.term import Phase
from efflaunch.estimate.ledger import Ledger, host_account
from efflaunch.estimate.stages import layers_by_rank, model_load, peak_bytes, stage_inputs, stage_layers
from efflaunch.estimate.timing.flops import weight_gradient_s
from efflaunch.memory.config import ActivationPlace, MemoryConfig
from efflaunch.parallel.pipeline.config import PipelineConfig, PipelineOrder
from efflaunch.tests.memory.settings import LLAMA_8B, make_ledger, policy

AUTO = MemoryConfig(name="auto", solve=True)


def ledger(memory: MemoryConfig | None = None, **pipeline: Any) -> Ledger:
    whole = make_ledger(LLAMA_8B, length=1 << 16, tokens_per_rank=1 << 15, memory=memory or policy(), batch=1 << 20).asked
    return build_ledger(whole.with_parts(parallel=replace(whole.parallel, pipeline=PipelineConfig(**pipeline))))


def test_layers_are_cut_so_that_the_slowest_stage_takes_least() -> None:
    made = ledger(stages=4)
    layers = stage_layers(made.asked)
    assert [layer for part in layers for layer in part] == list(range(32))
    assert len(layers[-1]) <= len(layers[0]), "the last stage has the head too"
    assert made.slowest_stage is not None and max(stage.seconds for stage in made.stages) == pytest.approx(
        min(max(stage.seconds for stage in ledger(stages=4, layers=counts).stages) for counts in ([8, 8, 8, 8], [9, 8, 8, 7], [9, 9, 8, 6]))
    )


def test_given_layers_are_taken_as_they_are() -> None:
    assert [len(part) for part in stage_layers(ledger(stages=2, layers=[30, 2]).asked)] == [30, 2]


def test_interleaved_stages_are_dealt_out() -> None:
    made = ledger(stages=2, order=PipelineOrder.INTERLEAVED, virtual=2, layers=[7, 9, 9, 7])
    assert layers_by_rank(made.asked) == ((range(7), range(16, 25)), (range(7, 16), range(25, 32)))
    first, last = stage_inputs(made.asked)
    assert first.parameters + last.parameters == made.asked.parameters and first.num_parts == 2
    assert first.has_embedding and not first.has_head and last.has_head and not last.has_embedding


@pytest.mark.parametrize("memory", [policy(), policy("keep", "keep"), AUTO], ids=["recompute", "keep", "auto"])
def test_the_ledger_is_that_of_the_stage_that_holds_most(memory: MemoryConfig) -> None:
    made = ledger(memory, stages=4)
    assert made.device.peak_bytes == max(stage.peak_bytes for stage in made.stages) == peak_bytes(made.inputs)
    assert [stage.in_flight for stage in made.stages] == [4, 3, 2, 1]


def test_each_order_has_its_micro_batches_in_flight() -> None:
    gpipe = ledger(stages=4, order=PipelineOrder.GPIPE)
    assert {stage.in_flight for stage in gpipe.stages} == {max(4, gpipe.layout.num_micro_batches)}
    interleaved = ledger(stages=4, order=PipelineOrder.INTERLEAVED, virtual=2, layers=[4] * 8)
    # 11, 9, 7 and 5 units of half a stage.
    assert [stage.in_flight for stage in interleaved.stages] == [6, 5, 4, 3]


def test_the_bubble_is_what_fills_and_drains_the_stages() -> None:
    one, interleaved = ledger(stages=4, layers=[8] * 4), ledger(stages=4, order=PipelineOrder.INTERLEAVED, virtual=2, layers=[4] * 8)
    slowest = max(stage.seconds for stage in one.stages)
    assert one.timing.bubble_s == pytest.approx(3 * slowest, rel=0.05)
    assert interleaved.timing.bubble_s == pytest.approx(one.timing.bubble_s / 2, rel=0.1)
    assert ledger().timing.bubble_s == 0.0


def test_gradients_of_weights_fill_the_bubble_and_their_operands_wait() -> None:
    """F + B - W in place of F + B + W for each stage beyond the first, and as many micro-batches held on every rank."""
    memory = policy("keep", "keep")
    one, zero = ledger(memory, stages=4, layers=[8] * 4), ledger(memory, stages=4, layers=[8] * 4, order=PipelineOrder.ZERO_BUBBLE)
    stages, slowest = stage_inputs(zero.asked), max(stage.seconds for stage in zero.stages)
    apart = max(weight_gradient_s(stage) for stage in stages)
    assert one.timing.bubble_s - zero.timing.bubble_s == pytest.approx(3 * 2 * apart, rel=0.05)
    assert 0.1 * slowest < apart < slowest / 3
    # Two norms, the sums after attention and of the layer; queries twice, keys and values twice, gate, up and their product.
    row = 2 * (4 * 4096 + 2 * (4096 + 1024) + 3 * 14336)
    for stage, inputs in enumerate(stages):
        waits = {term.name: term.by_phase for term in device_terms(inputs)}["operands of weight gradients"]
        assert waits.get(Phase.FORWARD, 0) == stage * 8 * row * inputs.tokens
        # The live micro-batch's come layer by layer.
        assert waits[Phase.BACKWARD_MLP] - waits.get(Phase.FORWARD, 0) in [layers * row * inputs.tokens for layers in range(1, 9)]
    assert [stage.in_flight for stage in zero.stages] == [4, 3, 2, 1]
    assert zero.stages[3].peak_bytes > one.stages[3].peak_bytes


def test_work_is_that_of_all_stages() -> None:
    whole, cut = ledger(), ledger(stages=4)
    assert cut.timing.model_flops == pytest.approx(whole.timing.model_flops, rel=1e-9)
    assert cut.timing.linear_flops == pytest.approx(whole.timing.linear_flops, rel=1e-9)


def test_alike_layers_have_alike_loads() -> None:
    load = model_load(ledger(stages=2).asked)
    assert len(set(load.layers)) == 1 and len(load.layers) == 32 and load.head.token_s > 0


def test_every_rank_has_host_memory_for_the_stage_that_moves_most() -> None:
    """The head's stage may hold most on the device, and the first one has most micro-batches in flight."""
    host = ActivationPlace.HOST
    moved = MemoryConfig(name="m", layer_input=host, attention_output=host, activations=ActivationPlace.RECOMPUTE)
    made = ledger(moved, stages=4, layers=[2, 2, 2, 26])
    most = max(stage.arena_bytes for stage in made.stages)
    assert made.arena_bytes == most > 0
    assert arena_bytes(made.inputs) <= most
    node = {term.name: term.num_bytes for term in made.host.terms}
    assert node["activations on the host"] == made.layout.ranks_per_node * most


def test_the_hosts_account_is_of_the_stage_whose_node_holds_most() -> None:
    made = ledger(stages=4, layers=[2, 2, 2, 26])
    assert made.host.peak_bytes == max(host_account(stage, made.device).peak_bytes for stage in stage_inputs(made.asked))
    assert ledger().on_host is not None and ledger().fullest_on_host is None
