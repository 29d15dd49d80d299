"""What ZeRO's optimizer is made of: groups chosen from whole shapes, AdamW as configured."""

from __future__ import annotations

import torch
from torch import nn

from efflaunch.tests.parity.optimizers_side import optim_config
from efflaunch.tests.training.small import plain_model
from efflaunch.training.optimizers.adamw import build_optimizer
from efflaunch.training.optimizers.zero import zero_optimizer


def test_decay_is_chosen_before_parameters_lose_their_shapes() -> None:
    """Stage 3 leaves an empty vector of every parameter: asked later, nothing would decay."""
    model, config = plain_model(), optim_config()
    build = zero_optimizer(model, config)
    empty = {name: nn.Parameter(torch.empty(0)) for name, _ in model.named_parameters()}
    names = {id(parameter): name for name, parameter in empty.items()}
    ours = {group["name"]: [names[id(each)] for each in group["params"]] for group in build(empty).param_groups}
    theirs = {group["name"]: group["param_names"] for group in build_optimizer(model, config).param_groups}
    assert ours == theirs and "layers.0.up.weight" in ours["decay"] and "embed.weight" in ours["no_decay"]


def test_hyperparameters_are_the_configured_ones() -> None:
    model, config = plain_model(), optim_config(betas=[0.8, 0.9], eps=1e-6)
    made = zero_optimizer(model, config)(dict(model.named_parameters()))
    assert type(made) is torch.optim.AdamW and made.defaults["betas"] == (0.8, 0.9) and made.defaults["eps"] == 1e-6
    assert {group["name"]: group["weight_decay"] for group in made.param_groups} == {"decay": 0.3, "no_decay": 0.0}
