"""Memory under ZeRO by stage: what each one shards is what its published formulas say (1910.02054, sec. 5), P weights on N ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from efflaunch.estimate.build import build_ledger
from efflaunch.estimate.footprint import zero
from efflaunch.estimate.footprint.device import device_terms
from efflaunch.estimate.footprint.optimizer import optimizer_states
from efflaunch.estimate.footprint.term import Phase
from efflaunch.estimate.ledger import resolve_grad_reduce
from efflaunch.estimate.plan_inputs import PlanInputs
from efflaunch.estimate.suggestions import suggest
from efflaunch.launcher.config.compose import compose
from efflaunch.parallel.config import GradReduce


def inputs(*typed: str) -> PlanInputs:
    return PlanInputs.of(compose(["+experiment=llama8b_128k_sft", *typed]))


@pytest.mark.parametrize(("stage", "per_weight"), [(1, "2 + 4/N, 6, 8/N"), (2, "2 + 4/N, 4/N, 8/N"), (3, "2/N + 4/N, 4/N, 8/N")])
def test_each_stage_shards_what_it_says(stage: int, per_weight: str) -> None:
    plan = inputs("engine=deepspeed", f"engine.stage={stage}")
    ranks, numbers = plan.layout.shard, plan.parameters
    found = (zero.weights(plan).num_bytes, zero.gradients(plan, 0).by_phase[Phase.REDUCE], optimizer_states(plan).num_bytes)
    wanted = [eval(text, {"N": ranks}) * numbers for text in per_weight.split(", ")]
    assert ranks == 8 and found == pytest.approx(wanted, rel=1e-6)


def test_in_float32_stage_one_adds_up_in_the_layers_own_gradients() -> None:
    plan = inputs("engine=deepspeed", "engine.stage=1", "train.dtype=float32")
    held = zero.gradients(plan, 0).by_phase
    assert held[Phase.REDUCE] == 4 * plan.parameters and held[Phase.OPTIMIZER] == held[Phase.REDUCE] + 4 * plan.parameters // 8


def test_only_stage_three_gathers_weights() -> None:
    def gathered(stage: int) -> set[str]:
        return {entry.name for entry in device_terms(inputs("engine=deepspeed", f"engine.stage={stage}")) if "gathered" in entry.name}

    assert gathered(1) == gathered(2) == set()
    assert gathered(3) == {"embedding and head, gathered", "layers, gathered"}


def test_what_is_asked_of_deepspeed_is_counted() -> None:
    """Larger buckets, and weights that stay gathered."""
    plain = inputs("engine=deepspeed")
    numbers, bucket = plain.parameters, 10**10
    asked = inputs("engine=deepspeed", f"engine.zero={{reduce_bucket_size: {bucket}}}")
    assert zero.reduction(asked, 0).num_bytes == 2 * 4 * bucket > zero.reduction(plain, 0).num_bytes
    kept = inputs("engine=deepspeed", "engine.zero={stage3_max_live_parameters: 1000000000000, stage3_max_reuse_distance: 1000000000}")
    assert zero.gathered_layers(kept, 0).num_bytes == 2 * numbers > zero.gathered_layers(plain, 0).num_bytes
    small = inputs("engine=deepspeed", "engine.zero={stage3_param_persistence_threshold: 100000}")
    assert zero.gathered_layers(small, 0).num_bytes == zero.gathered_layers(plain, 0).num_bytes, "norms are less than a layer"


def test_higher_stages_need_less() -> None:
    sums = [
        sum(term.by_phase.get(Phase.OPTIMIZER, 0) for term in device_terms(inputs("engine=deepspeed", f"engine.stage={n}")))
        for n in (1, 2, 3)
    ]
    assert sums[0] > sums[1] > sums[2]


def test_when_gradients_are_reduced_follows_from_the_stage() -> None:
    for stage, when in ((1, GradReduce.STEP), (2, GradReduce.MICRO_BATCH), (3, GradReduce.MICRO_BATCH)):
        assert resolve_grad_reduce(inputs("engine=deepspeed", f"engine.stage={stage}")).parallel.grad_reduce is when


def test_the_same_terms_are_counted_under_either_engine() -> None:
    """Whatever an engine adds or leaves out is about weights and gradients alone."""
    torch, deepspeed = ({term.name for term in device_terms(inputs(*typed))} for typed in ((), ("engine=deepspeed",)))
    assert torch ^ deepspeed <= {"gradients, whole"}
    assert zero.is_zero(replace(inputs("engine=deepspeed"))) and not zero.is_zero(inputs())


def test_what_is_suggested_is_what_the_engine_runs() -> None:
    """A model too large for stage 1: a higher stage is named, and nothing that is refused with this engine."""
    typed = ["+experiment=llama8b_128k_sft", "engine=deepspeed", "engine.stage=1", "cluster.device_memory_bytes=60GiB"]
    ledger = build_ledger(PlanInputs.of(compose(typed)))
    suggestions = suggest(ledger, most=20)
    assert not ledger.fits and suggestions
    for suggestion in suggestions:
        compose([*typed, *suggestion.overrides])
    assert any("engine.stage=3" in suggestion.overrides or "engine.stage=2" in suggestion.overrides for suggestion in suggestions)
