"""The cost model against the ledger's arithmetic, plans timed by hand, and degrees that cannot be had."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from efflaunch.cluster.config import ClusterConfig
from efflaunch.cluster.rates import Copies, MachineRates, MeasuredRates
from efflaunch.errors import PlanError
from efflaunch.estimate.build import build_ledger
from efflaunch.estimate.optimizer_residency import ON_DEVICE, Residency
from efflaunch.estimate.plan_inputs import PlanInputs
from efflaunch.estimate.timing.flops import causal_pairs
from efflaunch.estimate.timing.sequence import allowed_degrees, cost_model_of
from efflaunch.memory.config import MemoryConfig
from efflaunch.model.config import Family, ModelConfig
from efflaunch.model.spec import model_spec
from efflaunch.parallel.config import ParallelConfig, Scheme
from efflaunch.parallel.sequence.cost import CostModel, DegreeCost
from efflaunch.parallel.sequence.plan import Group, MicroBatch, StepPlan
from efflaunch.parallel.sequence.solve import solve_best_static
from efflaunch.tests.memory.settings import LLAMA_8B, cluster, make_ledger, policy
from efflaunch.tests.parallel.sequence.tiny import cost_of
from efflaunch.training.config import TrainConfig
from efflaunch.training.data.config import DataConfig

K = 1024


def model(machines: ClusterConfig, model: dict[str, Any] | None = None, profile: Any = None, **parallel: Any) -> CostModel:
    inputs = PlanInputs.make(
        spec=model_spec(ModelConfig(**(model or LLAMA_8B))),
        parallel=ParallelConfig(name="p", **{"tokens_per_rank": 16 * K, **parallel}),
        memory=policy(),
        train=TrainConfig(steps=1),
        data=DataConfig(name="d", max_seq_len=64 * K, global_batch_tokens=256 * K),
        cluster=machines,
    )
    cost = cost_model_of(build_ledger(inputs).inputs)
    return cost if profile is None else profile.refine(cost)


@pytest.mark.parametrize("degree", [8, 16])
def test_a_static_plan_costs_what_the_ledger_says(degree: int) -> None:
    machines = cluster(num_nodes=2)
    timing = make_ledger(length=64 * K, tokens_per_rank=16 * K, batch=256 * K, machines=machines, sp_degree=degree).timing
    cost = model(machines)
    # Groups take turns in the ledger, one longest sequence after the other; exchanges stand beside compute in both.
    in_turn = 4 // (16 // degree)
    assert in_turn * cost.group_s([64 * K], degree) == pytest.approx(timing.compute_s + timing.sequence_s)


def test_states_on_the_host_leave_room_for_activations() -> None:
    """With memory=auto the policy, and with it the time of a token, is that of the run's own ledger."""
    parts: dict[str, Any] = {
        "spec": model_spec(ModelConfig(**LLAMA_8B)),
        "parallel": ParallelConfig(name="p", tokens_per_rank=8 * K),
        "memory": MemoryConfig(name="auto", solve=True),
        "train": TrainConfig(steps=1),
        "data": DataConfig(name="d", max_seq_len=64 * K, global_batch_tokens=64 * K),
        "cluster": cluster(device_memory_bytes=34 << 30, host_link_bandwidth=1e9, host_memory_bandwidth=1e11),
    }
    on_host = Residency(on_host=True)
    device, host = (cost_model_of(build_ledger(PlanInputs.make(**parts, residency=residency)).inputs) for residency in (ON_DEVICE, on_host))
    assert device != host
    assert host.of(8).sequence_s([64 * K])[0] < device.of(8).sequence_s([64 * K])[0]
    assert host.step_s > device.step_s, "and the update on the host takes longer"


def test_measured_rates_change_the_update_alone() -> None:
    copies = (Copies(out=1e9, back=1e9, both_out=1e9, both_back=1e9),) * 8
    rates = MachineRates(device="cuda", ranks_per_node=8, link=copies, device_update=1e12, host_update=1e10)
    s = make_ledger(length=64 * K, tokens_per_rank=16 * K, batch=256 * K).inputs
    plain, measured = cost_model_of(s), cost_model_of(replace(s, measured=MeasuredRates(rates=rates, source="x")))
    assert measured.step_s - plain.step_s == pytest.approx(s.parameters / 8 * 40 / 1e12)
    assert replace(measured, step_s=plain.step_s) == plain


def test_windows_are_counted_as_the_ledger_counts_them() -> None:
    part = DegreeCost(degree=1, ulysses=1, attention_s=0.0, linear_s=0.0, windowed_s=((100, 1.0),))
    assert [part.sequence_s(n) for n in (40, 100, 1000)] == pytest.approx([causal_pairs(n, 100) for n in (40, 100, 1000)])


def test_gemma_layers_with_and_without_windows() -> None:
    gemma = {"name": "g", "family": Family.GEMMA2, "num_layers": 4, "hidden_size": 256, "intermediate_size": 512, "num_heads": 8}
    cost = model(cluster(), gemma | {"num_kv_heads": 4, "head_dim": 32, "vocab_size": 1000, "max_positions": 8192, "sliding_window": 512})
    part = cost.of(1)
    assert [window for window, _ in part.windowed_s] == [512]
    assert part.windowed_s[0][1] == pytest.approx(2 * part.attention_s)


def test_every_power_of_two_is_a_degree_with_its_scheme() -> None:
    cost = model(cluster(num_nodes=2))
    assert [(part.degree, part.ulysses, part.ring) for part in cost.degrees] == [(1, 1, 1), (2, 2, 1), (4, 4, 1), (8, 8, 1), (16, 8, 2)]
    assert cost.is_monotone()
    assert cost.max_seq_len == 256 * K


def test_degrees_the_heads_forbid_are_excluded_with_the_reason() -> None:
    parallel = ParallelConfig(name="p", tokens_per_rank=1, scheme=Scheme.ULYSSES)
    allowed, excluded = allowed_degrees(parallel, num_heads=12, ranks_per_node=8, world_size=16)
    assert allowed == {1: 1, 2: 2, 4: 4}
    assert [degree for degree, _ in excluded] == [8, 16]
    assert "12 attention heads" in excluded[0][1]
    hybrid = ParallelConfig(name="p", tokens_per_rank=1, scheme=Scheme.HYBRID, ulysses_degree=4)
    assert allowed_degrees(hybrid, num_heads=12, ranks_per_node=8, world_size=16)[0] == {1: 1, 2: 2, 4: 4, 8: 4, 16: 4}


def test_an_excluded_degree_is_named_with_its_reason() -> None:
    cost = replace(cost_of(4), excluded=((8, "a reason"),))
    with pytest.raises(PlanError, match="a reason"):
        cost.group_s([5], 8)


@pytest.mark.parametrize("world", [1, 3, 12])
def test_worlds_of_any_size_have_the_powers_below_them(world: int) -> None:
    allowed, excluded = allowed_degrees(ParallelConfig(name="p", tokens_per_rank=1), num_heads=8, ranks_per_node=4, world_size=world)
    assert list(allowed) == [1 << i for i in range(world.bit_length())]
    assert excluded == ()


def test_a_profile_refines_the_arithmetic() -> None:
    class Profile:
        def refine(self, cost: CostModel) -> CostModel:
            return replace(cost, beta_s=7.0, source="profile")

    fitted = model(cluster(), profile=Profile())
    assert (fitted.beta_s, fitted.source) == (7.0, "profile")


def two_batches() -> StepPlan:
    first = MicroBatch((Group(0, 2, 2, (0,)), Group(2, 1, 1, (1,))))
    second = MicroBatch((Group(0, 1, 1, (2,)), Group(2, 2, 2, (3,))))
    return StepPlan(4, (900, 200, 300, 800), (first, second))


def test_a_step_is_the_sum_of_its_slowest_groups() -> None:
    cost, plan = cost_of(4, beta_s=0.5, step_s=0.1), two_batches()
    t = cost.group_s
    expected = 0.1 + 0.5 + max(t([900], 2), t([200], 1)) + 0.5 + max(t([300], 1), t([800], 2))
    assert cost.plan_s(plan) == pytest.approx(expected)
    slow = replace(cost, gather_s=3.0)
    assert slow.plan_s(plan) == pytest.approx(0.1 + 2 * 3.5)


def test_without_barriers_ranks_only_wait_for_their_groups() -> None:
    cost, plan = cost_of(4, beta_s=0.5, step_s=0.1, gather_s=0.2), two_batches()
    t = cost.group_s
    first, alone = 0.5 + t([900], 2), 0.5 + t([200], 1)
    expected = max(first + 0.5 + t([300], 1), alone + 0.5 + t([800], 2))
    assert cost.plan_s(plan, barrier_free=True) == pytest.approx(0.1 + 0.2 + expected)


def test_priced_plans_carry_what_the_model_says() -> None:
    cost = cost_of(4)
    plan = cost.priced(two_batches())
    assert plan.predicted_s == cost.plan_s(plan)
    assert plan.micro_batches[0].groups[0].predicted_s == cost.group_s([900], 2)
    assert plan == two_batches()


def test_gap_needs_both_figures() -> None:
    plan = two_batches()
    assert plan.gap is None
    assert replace(plan, predicted_s=1.1, lower_bound_s=1.0).gap == pytest.approx(0.1)
    assert replace(plan, predicted_s=0.999, lower_bound_s=1.0).gap == 0.0
    assert replace(plan, predicted_s=1.0).gap is None


def test_the_best_static_plan_uses_one_degree() -> None:
    cost = cost_of(8)
    plan = solve_best_static([3000, 50, 60, 70, 2500], cost)
    assert len({group.degree for batch in plan.micro_batches for group in batch.groups}) == 1
    assert plan.source == "static"


@pytest.mark.parametrize("degrees", [(), (2, 1), (16,)])
def test_models_without_sense_are_refused(degrees: tuple[int, ...]) -> None:
    parts = tuple(DegreeCost(degree=d, ulysses=1, attention_s=1.0, linear_s=1.0) for d in degrees)
    with pytest.raises(PlanError, match="cost model"):
        CostModel(world_size=8, tokens_per_rank=10, degrees=parts)
