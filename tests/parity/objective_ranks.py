"""What the ranks of an objective's parity row do."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from efflaunch.model.build import build_model
from efflaunch.parallel.sequence.attention import CpuKernel
from efflaunch.parallel.sharding.parts import write_shard
from efflaunch.parallel.topology import build_topology
from efflaunch.tests.parity.ranks_side import POLICIES, of_all_stages, stage_place
from efflaunch.training.config import DpoLoss, GrpoNormalize, GrpoRatio
from efflaunch.training.micro_batches import count_targets, read_step
from efflaunch.training.objectives.heads import LanguageModelling, Preference, Rollout, SourceLosses
from efflaunch.training.objectives.preference import CHOSEN, PairOptions
from efflaunch.training.objectives.rollout import RolloutOptions
from efflaunch.training.step import backward_step
from efflaunch.training.step_setup import StepSetup

CPU = torch.device("cpu")


class UnitSource:
    """Sequences of one or two documents, each (tokens, mask)."""

    def __init__(self, units):
        self.units = units

    def lengths(self, step):
        return tuple(sum(self.parts(step, index)) for index in range(len(self.units)))

    def parts(self, step, index):
        return tuple(len(tokens) for tokens, _ in self.units[index])

    def tokens(self, step, index, start, stop):
        ids = np.concatenate([tokens for tokens, _ in self.units[index]])
        targets = np.concatenate([np.append(np.where(mask[1:], tokens[1:], -100), -100) for tokens, mask in self.units[index]])
        return ids[start:stop], targets[start:stop]


def units_of(objective, options):
    return options["documents"] if objective == "dpo" else [(document,) for document in options["documents"]]


def objective_of(objective, options, works, topology):
    if objective == "fine-tuning":
        owners = options.get("owners")
        by_source = None if owners is None else SourceLosses(max(owners) + 1, owners.__getitem__)
        return LanguageModelling(count_targets(works, topology, CPU), CPU, smoothing=options["smoothing"], by_source=by_source)
    if objective == "dpo":
        reference = options["reference"]
        loss, smoothing, weight = (options.get(name, default) for name, default in (("loss", "sigmoid"), ("smoothing", 0.0), ("sft", 0.0)))
        settings = PairOptions(options["beta"], DpoLoss(loss), smoothing, weight)
        chosen = count_targets(works, topology, CPU, number=CHOSEN)
        return Preference(len(reference), CPU, options=settings, reference=lambda sequence: reference[sequence], chosen_tokens=chosen)

    def data(sequence, start, stop):
        old, reference = (np.append(options[name][sequence], 0.0)[start + 1 : stop + 1] for name in ("old", "reference"))
        return options["advantages"][sequence], old, reference

    settings = RolloutOptions(
        options["low"], options["high"], options["weight"], delta=options.get("delta"), max_completion=options.get("length"),
        normalize=GrpoNormalize(options.get("normalize", "dapo")), level=GrpoRatio(options.get("level", "token")),
    )  # fmt: skip
    return Rollout(count_targets(works, topology, CPU), len(options["advantages"]), CPU, options=settings, data=data, kl=True)


def run_objective(objective, case, weights, options, plan):
    """(loss, means, gradients by name) on rank 0."""
    from efflaunch.tests.parity.reference import hf_config, lift_to_float64

    torch.set_num_threads(1)
    lift_to_float64()
    topology, config = build_topology(replicate=1, device="cpu", stages=case.get("stages", 1)), hf_config(case["family"])
    model = build_model(
        config, POLICIES[case.get("policy", "keep")], topology.mesh,
        device=CPU, compute_dtype=torch.float64, seed=0, loss_chunk_tokens=case["loss_chunk"],
        place=stage_place(topology, config.num_hidden_layers),
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        write_shard(parameter, torch.from_numpy(weights[name]))
    works = read_step(UnitSource(units_of(objective, options)), 0, plan, topology.stage_rank)
    step = objective_of(objective, options, works, topology)
    setup = StepSetup(
        model=model, topology=topology, kernel=CpuKernel(), device=CPU,
        reduce_each=False, barrier_free=case.get("barrier_free", False),
    )  # fmt: skip
    loss = backward_step(setup, works, step).sum()
    sums = torch.cat([loss.reshape(1), step.stats])
    dist.all_reduce(sums)
    mine = {name: np.array(parameter.grad.full_tensor()) for name, parameter in model.named_parameters()}
    gradients = of_all_stages(mine, topology)
    return (float(sums[0]), sums[1:].numpy() / step.count, gradients) if dist.get_rank() == 0 else None
