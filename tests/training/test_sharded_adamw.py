"""AdamW on each rank's parts against torch's over the sharded tensors themselves: the same bits, and the same kind of states."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

from efflaunch.parallel.sharding.parts import local
from efflaunch.tests.ranks import run_ranks
from efflaunch.tests.training.small import backward, plain_model, shard
from efflaunch.training.optimizers.config import OptimConfig
from efflaunch.training.optimizers.sharded_adamw import ShardedAdamW, fused_adamw

CONFIG = OptimConfig(name="test", lr=1e-2, weight_decay=0.3)


def _updated(kind: type[torch.optim.AdamW]) -> tuple[dict[str, torch.Tensor], set[type]]:
    """This rank's parts of weights and states after three updates, one without a gradient for the first weight; and what states are."""
    model = shard(plain_model(torch.float32), 1)
    named = dict(model.named_parameters())
    optimizer = fused_adamw([{"params": list(named.values())}], CONFIG, kind)
    for step in range(3):
        backward(model, step, scale=3.0)
        if step == 1:
            next(iter(named.values())).grad = None
        optimizer.step()
        optimizer.zero_grad()
    parts = {name: local(weight).detach().clone() for name, weight in named.items()}
    for name, weight in named.items():
        parts |= {f"{name} {key}": local(value) for key, value in optimizer.state[weight].items()}
    return parts, {type(value) for state in optimizer.state.values() for key, value in state.items() if key != "step"}


def _both() -> tuple[list[str], bool]:
    (ours, kinds), (theirs, wanted) = _updated(ShardedAdamW), _updated(torch.optim.AdamW)
    assert ours.keys() == theirs.keys()
    return [name for name, part in ours.items() if not torch.equal(part, theirs[name])], kinds == wanted == {DTensor}


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_same_bits_and_states_as_torch_over_sharded_tensors(ranks: int) -> None:
    """On three ranks parts are uneven, and some are empty."""
    assert run_ranks(_both, ranks) == [([], True)] * ranks
