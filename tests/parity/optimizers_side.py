"""What the ranks of an optimizer row do: three steps of the training loop's own order, on documents in memory."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from efflaunch.model.adapters.config import NO_ADAPTER
from efflaunch.model.build import build_empty, master_dtype
from efflaunch.parallel.pipeline.config import PipelineOrder
from efflaunch.parallel.sequence.attention import CpuKernel
from efflaunch.parallel.sharding.parts import write_shard
from efflaunch.parallel.topology import build_topology
from efflaunch.tests.parity.ranks_side import POLICIES, ListSource, of_all_stages, stage_place
from efflaunch.training.micro_batches import count_targets, read_step
from efflaunch.training.objectives.heads import LanguageModelling
from efflaunch.training.optimizers.build import build_updater
from efflaunch.training.optimizers.config import ClipMode, OptimConfig, StateDevice, StateDtype, Update
from efflaunch.training.optimizers.masters import host_weights
from efflaunch.training.step import backward_step
from efflaunch.training.step_setup import StepSetup

RATES = (3e-3, 2e-3, 4e-3)


def optim_config(**fields):
    kinds = {"state_device": StateDevice, "update": Update, "clip_mode": ClipMode, "state_dtype": StateDtype}
    return OptimConfig(
        **{"name": "test", "lr": RATES[0], "weight_decay": 0.3, "grad_clip": None}
        | {key: kinds[key](value) if key in kinds else value for key, value in fields.items()}
    )


class Trainer:
    """A model, its updater and one step's documents; `step` is training.trainer's order of calls."""

    def __init__(self, case, weights, documents, targets, plan, optim):
        from efflaunch.tests.parity.reference import hf_config, lift_to_float64

        torch.set_num_threads(1)
        if case["dtype"] == "float64":
            lift_to_float64()
        dtype, device = getattr(torch, case["dtype"]), torch.device("cpu")
        self.case, self.plan, self.config = case, plan, optim_config(**optim)
        self.topology, config = (
            build_topology(replicate=case.get("replicate", 1), device="cpu", stages=case.get("stages", 1)),
            hf_config(case["family"]),
        )
        on_host = self.config.state_device is StateDevice.HOST
        self.model = build_empty(
            config,
            POLICIES[case.get("policy", "recompute")],
            self.topology.mesh,
            device=device,
            compute_dtype=dtype,
            loss_chunk_tokens=7,
            host_weights=on_host,
            place=stage_place(self.topology, config.num_hidden_layers, case.get("virtual", 1)),
            adapter=case.get("adapter", NO_ADAPTER),
        )
        self.weights = host_weights(self.model, master_dtype(dtype)) if on_host else self.model
        for name, parameter in self.weights.named_parameters():
            write_shard(parameter, torch.from_numpy(weights[name]))
        self.model.model.rotary_emb.__init__(self.model.config)  # to_empty left its tables unset
        ratio = case.get("adapter", NO_ADAPTER).b_lr_ratio
        self.updater = build_updater(self.model, self.weights, self.config, device, b_lr_ratio=ratio)
        self.source, self.snapshots = ListSource(documents, targets), 0

    def backward(self):
        works = read_step(self.source, 0, self.plan, self.topology.stage_rank)
        device = torch.device("cpu")
        setup = StepSetup(
            model=self.model, topology=self.topology, kernel=CpuKernel(), device=device,
            reduce_each=self.case.get("reduce_each", False), barrier_free=self.case.get("barrier_free", False),
            order=self.case.get("order", PipelineOrder.ONE_F_ONE_B), gpipe_in_flight=5,
        )  # fmt: skip
        objective = LanguageModelling(count_targets(works, self.topology, device), device)
        loss = backward_step(setup, works, objective, on_last=self.updater.before_final_backward).sum()
        dist.all_reduce(loss)
        return float(loss)

    def step(self, rate):
        """(loss, what is known of the gradients)."""
        self.updater.start(rate, self._snapshot)
        if self.updater.measures_first:
            self.backward()
            self.updater.finish_measuring()
        loss = self.backward()
        gradients = self.updater.finish()
        self.updater.apply()
        assert all(parameter.grad is None for parameter in self.model.parameters())
        assert all(parameter.grad is None for parameter in self.weights.parameters())
        return loss, gradients

    def _snapshot(self):
        self.snapshots += 1

    def gathered(self, module):
        whole = {name: parameter.full_tensor().detach() for name, parameter in module.named_parameters()}
        return of_all_stages({name: np.array(value.to(master_dtype(value.dtype))) for name, value in whole.items()}, self.topology)

    def states(self):
        named = dict(self.weights.named_parameters())
        states = {
            f"{name}.{key}": np.array((value.full_tensor() if hasattr(value, "full_tensor") else value).detach())
            for name, parameter in named.items()
            for key, value in self.updater.optimizer.state[parameter].items()
        }
        return of_all_stages(states, self.topology)


def run_updates(case, weights, documents, targets, plan, optim):
    """(losses, norms, weights, model's weights, states) after three steps, on rank 0."""
    trainer = Trainer(case, weights, documents, targets, plan, optim)
    steps = [trainer.step(rate) for rate in RATES]
    trainer.updater.close()
    assert trainer.snapshots == len(RATES)
    result = (
        [loss for loss, _ in steps],
        [gradients.norm for _, gradients in steps],
        trainer.gathered(trainer.weights),
        trainer.gathered(trainer.model),
        trainer.states(),
    )
    return result if dist.get_rank() == 0 else None
