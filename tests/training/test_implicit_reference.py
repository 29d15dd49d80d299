"""DPO with adapters: the reference is the model without them, against peft with its adapters switched off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from efflaunch.launcher.config.compose import compose
from efflaunch.parallel.sequence.plan import StepPlan
from efflaunch.tests.parity import objective_reference
from efflaunch.tests.parity.nf4_reference import packed_and_plain, qlora
from efflaunch.tests.parity.objective_ranks import CPU, UnitSource
from efflaunch.tests.parity.peft_reference import arrays, lifted, lora
from efflaunch.tests.parity.test_objectives import ALL, BETA, LENGTHS, batch, pairs
from efflaunch.tests.parity.test_parity import worst
from efflaunch.tests.ranks import RankPool
from efflaunch.training.objectives.build import has_implicit_reference

PLANS = {
    "one rank": lambda: [1, batch((0, 1, 1, ALL["dpo"]))],
    "ulysses 2, accumulation": lambda: [2, batch((0, 2, 2, (0, 3))), batch((0, 2, 2, (1,)), ), batch((0, 1, 1, (2,)))],
    "ring 2": lambda: [2, batch((0, 2, 1, ALL["dpo"]))],
    "2 stages": lambda: [1, batch((0, 1, 1, (0, 3))), batch((0, 1, 1, (1, 2)))],
    "2 stages of 2": lambda: [2, batch((0, 2, 1, (0,))), batch((0, 1, 1, (1,)), (1, 1, 1, (2, 3)))],
    "barrier-free, mixed groups": lambda: [4, batch((0, 2, 1, (1,)), (2, 1, 1, (0,))), batch((2, 2, 2, (2, 3)))],
}  # fmt: skip


@pytest.mark.parametrize("policy", ["recompute", "keep"])
@pytest.mark.parametrize("row", PLANS)
def test_loss_reference_and_gradients_equal_peft(row: str, policy: str) -> None:
    config = lora()
    model, named = lifted("llama", "float64", config)
    check_dpo(row, policy, config, model, named, arrays(named))


@pytest.mark.parametrize(("row", "policy"), [("ulysses 2, accumulation", "recompute"), ("ring 2", "keep")])
def test_beside_packed_matrices_the_reference_is_what_they_say(row: str, policy: str) -> None:
    weights, model, named = packed_and_plain("llama", "float64", qlora())
    check_dpo(row, policy, qlora(), model, named, weights)


def check_dpo(row, policy, config, model, named, weights) -> None:
    """Loss, reference and gradients of the ranks are those of peft's `model`, whose parameters are `named`; `weights`: the ranks'."""
    halves, _ = pairs()
    with torch.no_grad(), _switched_off(model):
        reference = [[float(objective_reference.answer(model, *half)) for half in pair] for pair in halves]
    loss, _ = objective_reference.dpo(model, halves, reference, BETA)
    loss.backward()
    world, *batches = PLANS[row]()
    stages = 2 if row.startswith("2 stages") else 1
    plan = StepPlan(world, LENGTHS["dpo"], tuple(batches))
    case = {"policy": policy, "barrier_free": row.startswith("barrier-free"), "stages": stages}
    with RankPool() as pool:
        got_loss, got_reference, got = pool.run(run_dpo, case, config, weights, halves, plan, ranks=world * stages)[0]
    np.testing.assert_allclose(got_reference, reference, rtol=1e-10)
    assert got_loss == pytest.approx(float(loss), rel=1e-10)
    assert worst(got, arrays(named, lambda p: p.grad))[0] <= 1e-10


def _switched_off(model):
    from contextlib import ExitStack

    from peft.tuners.lora import LoraLayer

    stack = ExitStack()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(False)
            stack.callback(module.enable_adapters, True)
    return stack


def run_dpo(case, config, weights, halves, plan):
    """(loss, reference, gradients by name) on rank 0."""
    from efflaunch.model.build import build_model
    from efflaunch.parallel.sequence.attention import CpuKernel
    from efflaunch.parallel.sharding.parts import write_shard
    from efflaunch.parallel.topology import build_topology
    from efflaunch.tests.parity.ranks_side import POLICIES, of_all_stages, stage_place
    from efflaunch.tests.parity.reference import hf_config, lift_to_float64
    from efflaunch.training.micro_batches import read_step
    from efflaunch.training.objectives.heads import Preference
    from efflaunch.training.objectives.implicit_reference import pair_reference
    from efflaunch.training.objectives.preference import PairOptions
    from efflaunch.training.step import backward_step
    from efflaunch.training.step_setup import StepSetup

    torch.set_num_threads(1)
    lift_to_float64()
    topology = build_topology(replicate=1, device="cpu", stages=case["stages"])
    model = build_model(
        hf_config("llama"), POLICIES[case["policy"]], topology.mesh,
        device=CPU, compute_dtype=torch.float64, seed=0, loss_chunk_tokens=7, adapter=config,
        place=stage_place(topology, hf_config("llama").num_hidden_layers),
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        write_shard(parameter, torch.from_numpy(weights[name]))
    works = read_step(UnitSource(halves), 0, plan, topology.stage_rank)
    setup = StepSetup(
        model=model, topology=topology, kernel=CpuKernel(), device=CPU, reduce_each=False, barrier_free=case["barrier_free"]
    )  # fmt: skip
    for _ in range(2):  # a second step starts from what the first one left
        model.zero_grad()
        reference = pair_reference(setup, works, len(halves))
        step = Preference(len(halves), CPU, options=PairOptions(BETA), reference=reference.__getitem__)
        loss = backward_step(setup, works, step).sum()
    dist.all_reduce(loss)
    gradients = {name: np.array(p.grad.full_tensor()) for name, p in model.named_parameters() if p.grad is not None}
    gradients = of_all_stages(gradients, topology)
    return (float(loss), reference, gradients) if dist.get_rank() == 0 else None


def test_which_runs_have_one() -> None:
    def has(*overrides):
        config = compose(["+experiment=quickstart", *overrides])
        return has_implicit_reference(config.train, config.adapter)

    assert has("train.objective=dpo", "adapter=lora")
    assert not has("train.objective=dpo")
    assert not has("train.objective=grpo", "adapter=lora")
    # Parts that are trained whole are in no place as they were.
    assert not has("train.objective=dpo", "adapter=lora", "adapter.modules_to_save=[norms]")
