"""What the ranks of an engine's row do: the training loop's own order of calls under DeepSpeed, on documents in memory."""

from __future__ import annotations

import os

import numpy as np
import torch
import torch.distributed as dist

from efflaunch.checkpoint.flat import Flat
from efflaunch.model.build import RouterSettings, build_on_meta, install, master_dtype
from efflaunch.model.weights import persistent_buffers
from efflaunch.parallel.sequence.attention import CpuKernel
from efflaunch.parallel.sharding.config import Backend, EngineConfig
from efflaunch.parallel.sharding.parts import write_shard
from efflaunch.parallel.topology import build_topology
from efflaunch.tests.parity.objective_ranks import UnitSource, objective_of, units_of
from efflaunch.tests.parity.optimizers_side import optim_config
from efflaunch.tests.parity.ranks_side import POLICIES, ListSource, _store
from efflaunch.training.forward_only import forward_only
from efflaunch.training.micro_batches import count_targets, read_step
from efflaunch.training.objectives.heads import LanguageModelling
from efflaunch.training.optimizers.build_zero import shard
from efflaunch.training.step import backward_step
from efflaunch.training.step_setup import StepSetup


def engine_of(case):
    """The engine of a row: its stage, and what goes to DeepSpeed as it is."""
    return EngineConfig(name="deepspeed", backend=Backend.DEEPSPEED, stage=case["stage"], zero=case.get("zero", {}))


class ZeroTrainer:
    """A model under ZeRO, its updater and one step's documents; `step` is training.trainer's order of calls."""

    def __init__(self, case, weights, documents, targets):
        from efflaunch.tests.parity.reference import hf_config

        os.environ["LOCAL_RANK"] = str(dist.get_rank())
        torch.set_num_threads(1)
        compute = getattr(torch, case["dtype"])
        self.topology, self.model = (
            build_topology(replicate=1, device="cpu"),
            build_on_meta(hf_config(case["family"]), master_dtype(compute)),
        )
        policy = POLICIES[case["policy"]]
        routers = RouterSettings(*case.get("router", (0.0, 0.0)))
        install(self.model, policy, loss_chunk_tokens=7, store=_store("strict"), routers=routers)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(compute)
        self.trained = shard(self.model, torch.device("cpu"), optim_config(**case.get("optim", {})), engine_of(case), policy)
        self.updater, self.state, self.weights = self.trained.updater, self.trained.state, self.trained.updater.weights
        for name, flat in self.weights.named_parameters():
            write_shard(flat, torch.from_numpy(weights[name]))
        for name, buffer in persistent_buffers(self.model).items():
            buffer.copy_(torch.from_numpy(weights[name]))
        self.model.model.rotary_emb.__init__(self.model.config)  # to_empty left its tables unset
        self.updater.weights_changed()
        self.source = ListSource(documents, targets)

    def setup(self):
        return StepSetup(model=self.model, topology=self.topology, kernel=CpuKernel(), device=torch.device("cpu"), reduce_each=True)

    def backward(self, plan):
        works, device = read_step(self.source, 0, plan, self.topology.stage_rank), torch.device("cpu")
        objective = LanguageModelling(count_targets(works, self.topology, device), device)
        loss = backward_step(self.setup(), works, objective, on_last=self.updater.before_final_backward).sum()
        dist.all_reduce(loss)
        return float(loss)

    def step(self, plan, rate):
        self.updater.start(rate, lambda: None)
        loss = self.backward(plan)
        gradients = self.updater.finish()
        self.updater.apply()
        return loss, gradients.norm

    def gradients(self):
        """Whole gradients by name, float32."""
        from deepspeed.utils import safe_get_full_grad

        return {name: np.array(safe_get_full_grad(parameter)) for name, parameter in self.model.named_parameters()}

    def close(self):
        self.trained.weights._engine.destroy()


def run_zero_objective(objective, case, weights, options, plan):
    """Rank 0: loss, gradients and norm of an objective's step."""
    trainer = ZeroTrainer(case, weights, None, None)
    trainer.updater.start(0.0, lambda: None)
    works = read_step(UnitSource(units_of(objective, options)), 0, plan, trainer.topology.stage_rank)
    step = objective_of(objective, options, works, trainer.topology)
    loss = backward_step(trainer.setup(), works, step, on_last=trainer.updater.before_final_backward).sum()
    dist.all_reduce(loss)
    gradients, norm = trainer.gradients(), trainer.updater.finish().norm
    trainer.close()
    return (float(loss), gradients, norm) if dist.get_rank() == 0 else None


def whole(tensors):
    """Whole tensors of runs, on every rank."""
    out = {}
    for key, value in tensors.items():
        full = torch.zeros(value.shape, dtype=value.dtype)
        if isinstance(value, Flat):
            for memory, offsets in value.pieces():
                full[tuple(slice(at, at + size) for at, size in zip(offsets, memory.shape, strict=True))] = memory
            dist.all_reduce(full)
        else:
            full.copy_(value)
        out[key] = full.numpy()
    return out


def run_with_forwards(case, weights, documents, targets, plan, rates):
    """(loss, norm) of each step, with forward passes alone in between and without."""
    outcomes = []
    for looks in (False, True):
        trainer, steps = ZeroTrainer(case, weights, documents, targets), []
        for rate in rates:
            if looks:
                works = read_step(trainer.source, 0, plan, trainer.topology.stage_rank)
                forward_only(trainer.setup(), works, lambda work: _squares)
            steps.append(trainer.step(plan, rate))
        trainer.close()
        outcomes.append(steps)
    return outcomes


def _squares(head):
    return head.x.float().square().sum()


def run_zero(case, weights, documents, targets, plans, rates):
    """Rank 0: [(loss, gradients, norm)] of each plan, each step thrown away; then losses, norms and weights of steps at `rates`."""
    trainer = ZeroTrainer(case, weights, documents, targets)
    passes = []
    for plan in plans:
        trainer.updater.start(0.0, lambda: None)
        loss, gradients = trainer.backward(plan), trainer.gradients()
        passes.append((loss, gradients, trainer.updater.finish().norm))
        trainer.updater.discard()
    steps = [trainer.step(plans[0], rate) for rate in rates]
    trained = whole(dict(trainer.weights.named_parameters()))
    trainer.close()
    return (passes, steps, trained) if dist.get_rank() == 0 else None
