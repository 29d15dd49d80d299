"""Estimates of a stage: some of the layers, with or without embedding and head, several micro-batches in flight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from efflaunch.estimate.footprint.device import device_terms
from efflaunch.estimate.footprint.host import arena_bytes, moved_bytes
from efflaunch.estimate.footprint.term import FORWARD_ALONE, KEEPING, Phase
from efflaunch.estimate.plan_inputs import LayerSums, PlanInputs
from efflaunch.estimate.timing.flops import linear_flops, matrix_parameters, sequence_flops
from efflaunch.estimate.timing.step import estimate_time
from efflaunch.memory.config import ActivationPlace, MemoryConfig
from efflaunch.model.config import Family
from efflaunch.model.spec import LayerParameters
from efflaunch.parallel.pipeline.place import SENDS_UNDER_WAY
from efflaunch.tests.memory.settings import LLAMA_8B, make_ledger, policy

HOST = MemoryConfig(
    name="m", layer_input=ActivationPlace.HOST, attention_output=ActivationPlace.HOST, activations=ActivationPlace.RECOMPUTE
)
GEMMA: dict[str, Any] = LLAMA_8B | {"family": Family.GEMMA2, "num_layers": 26, "tie_embeddings": True, "sliding_window": 4096}
SLICES = (range(7), range(7, 16), range(16, 31), range(31, 32))


def inputs(memory: MemoryConfig | None = None, model: dict[str, Any] = LLAMA_8B, **parallel: Any) -> PlanInputs:
    return make_ledger(model, length=1 << 16, tokens_per_rank=8192, memory=memory or policy(), **parallel).inputs


def by_name(inputs: PlanInputs) -> dict[str, dict[Phase, int]]:
    return {entry.name: entry.by_phase for entry in device_terms(inputs)}


@pytest.mark.parametrize("memory", [policy(), policy("keep", "keep"), HOST])
def test_all_layers_are_the_whole_model(memory: MemoryConfig) -> None:
    whole = inputs(memory)
    stage = whole.stage(range(whole.spec.num_layers))
    assert replace(stage, whole=None) == whole
    assert device_terms(stage) == device_terms(whole) and estimate_time(stage) == estimate_time(whole)


def test_stages_add_up_to_the_whole_model() -> None:
    whole = inputs()
    stages = [whole.stage(layers) for layers in SLICES]
    assert sum(s.parameters for s in stages) == whole.parameters
    assert sum(linear_flops(s) for s in stages) == pytest.approx(linear_flops(whole), rel=1e-12)
    assert sum(matrix_parameters(s) for s in stages) == matrix_parameters(whole)
    both = [sequence_flops(s, 1 << 16) for s in stages]
    assert sum(attention for attention, _ in both) == pytest.approx(sequence_flops(whole, 1 << 16)[0], rel=1e-12)
    assert [s.has_embedding for s in stages] == [True, False, False, False] and [s.has_head for s in stages] == [False, False, False, True]


def test_sums_over_layers_are_made_once() -> None:
    """Layers of different sizes; afterwards nothing walks over them, however often a solver asks."""
    layers = tuple(LayerParameters(total=10 * n, active=n) for n in (3, 1, 4, 1, 5))
    sums = LayerSums.of(layers)
    assert sums == LayerSums(largest=50, active=14, totals=(140, 110, 100, 60, 50, 0))
    whole = inputs(HOST)
    assert whole.decoder_parameters(3) == sum(layer.total for layer in whole.layers[3:]) and whole.decoder_parameters(99) == 0
    walked = replace(whole, layers=Unwalked(whole.layers))
    assert device_terms(walked) == device_terms(whole) and estimate_time(walked) == estimate_time(whole)


class Unwalked(tuple[LayerParameters, ...]):
    def __iter__(self) -> Any:
        raise AssertionError("walked over all layers")


def test_windows_go_with_their_layers_and_a_tied_matrix_is_on_both_ends() -> None:
    whole = inputs(model=GEMMA)
    first, last = whole.stage(range(13)), whole.stage(range(13, 26))
    assert first.spec.windows + last.spec.windows == whole.spec.windows
    matrix = whole.spec.vocab_size * whole.spec.hidden_size
    assert first.parameters + last.parameters == whole.parameters + matrix
    assert last.head_parameters == matrix and first.head_parameters == 0


def test_only_the_stage_with_the_head_has_logits() -> None:
    whole = inputs()
    terms = by_name(whole.stage(range(16)))
    assert not {"loss chunk", "head gradient", "kernel scratch"} & terms.keys() and "embedding and head, gathered" in terms
    middle = by_name(whole.stage(range(8, 16)))
    assert "embedding and head, gathered" not in middle
    alone = whole.stage(range(8, 16), has_head=True)
    assert by_name(alone)["loss chunk"] == by_name(whole)["loss chunk"]


@pytest.mark.parametrize("memory", [policy(), policy("keep", "keep"), policy("recompute", "keep")])
def test_each_micro_batch_in_flight_holds_what_its_forward_left(memory: MemoryConfig) -> None:
    whole = inputs(memory)
    one, four = (whole.stage(range(8, 16), in_flight=count) for count in (1, 4))
    before, after = by_name(one), by_name(four)
    for name in ("layer inputs", "attention outputs kept", "activations kept"):
        if name in before:
            left = before[name][Phase.LOSS]
            assert all(after[name][phase] - before[name].get(phase, 0) == 3 * left for phase in KEEPING)
    assert after["batch and rotary tables"][Phase.FORWARD] == 4 * before["batch and rotary tables"][Phase.FORWARD]
    fixed = ("weights", "optimizer states", "gradients", "layers, gathered", "live layer, all rows")
    assert all(after[name] == before[name] for name in fixed)


def test_the_host_has_room_for_every_micro_batch_in_flight() -> None:
    whole = inputs(HOST)
    one, three = (whole.stage(range(8, 16), in_flight=count) for count in (1, 3))
    assert moved_bytes(three) == 3 * moved_bytes(one) > 0
    assert arena_bytes(three) == 3 * arena_bytes(one)
    assert moved_bytes(whole) == 4 * moved_bytes(one)


def test_activations_between_stages_are_there_once() -> None:
    row = 4096 * 2 * 8192
    for memory, received in ((policy(), 0), (HOST, row)):
        whole = inputs(memory)
        term = {name: by_name(whole.stage(layers, in_flight=2)).get("activations between stages") for name, layers in
                (("first", range(8)), ("middle", range(8, 16)), ("last", range(16, 32)))}  # fmt: skip
        assert term["first"] is not None and term["middle"] is not None and term["last"] is not None
        assert term["first"][Phase.FORWARD] == 2 * row and term["middle"][Phase.FORWARD] == 2 * (row + received)
        assert term["last"][Phase.FORWARD] == 2 * received
        assert "activations between stages" not in by_name(whole)


def test_forward_alone_receives_and_sends() -> None:
    """An evaluation's micro-batch waits for nothing; no gradient comes back."""
    row, whole = 4096 * 2 * 8192, inputs()
    in_stages = replace(whole, layout=replace(whole.layout, stages=4))
    for layers, ends in ((range(8), 1), (range(8, 16), 2), (range(24, 32), 1)):
        terms = by_name(in_stages.stage(layers, in_flight=3))
        assert {terms["activations between stages"][phase] for phase in FORWARD_ALONE} == {ends * row}
        before, behind = layers.start > 0, layers.stop < 32
        assert terms["messages between stages"][Phase.EVALUATION] == (before + behind * SENDS_UNDER_WAY) * row


@pytest.mark.parametrize(
    ("layers", "in_flight"), [(range(0), 1), (range(30, 33), 1), (range(-1, 3), 1), (range(0, 8, 2), 1), (range(8), 0)]
)
def test_layers_the_model_does_not_have_are_refused(layers: range, in_flight: int) -> None:
    with pytest.raises(ValueError, match="32 layers"):
        inputs().stage(layers, in_flight=in_flight)
