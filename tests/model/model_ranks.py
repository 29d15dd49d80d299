"""What ranks do in tests of model files: build from a configuration, load, one backward."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from efflaunch.memory.policy import MemoryPolicy
from efflaunch.model.build import build_config, build_model
from efflaunch.model.hf_fields import hf_config_dict
from efflaunch.model.weights import load_weights
from efflaunch.parallel.topology import build_topology
from efflaunch.tests.parity.ranks_side import ListSource, _gathered, _gradients
from efflaunch.tests.parity.reference import lift_to_float64


def losses(configs, documents, targets, plan):
    """For each configuration: loss and gradients by name in float64, on rank 0."""
    torch.set_num_threads(1)
    lift_to_float64()
    topology, results = build_topology(replicate=1, device="cpu"), []
    for config in configs:
        model = _loaded(config, topology, torch.float64)
        loss = _gradients(model, topology, ListSource(documents, targets), plan, {})
        results.append((loss, _gathered(model, topology, lambda p: p.grad)))
    return results if dist.get_rank() == 0 else None


def weights(config, seed):
    """All weights in float32, on rank 0."""
    model = _loaded(config, build_topology(replicate=1, device="cpu"), torch.float32, seed)
    whole = {name: np.array(parameter.full_tensor().detach()) for name, parameter in model.named_parameters()}
    return whole if dist.get_rank() == 0 else None


def _loaded(config, topology, dtype, seed=0):
    model = build_model(
        build_config(hf_config_dict(config)),
        MemoryPolicy(graph=True),
        topology.mesh,
        device=torch.device("cpu"),
        compute_dtype=dtype,
        seed=seed,
        loss_chunk_tokens=7,
    )
    load_weights(model, config, seed)
    return model
