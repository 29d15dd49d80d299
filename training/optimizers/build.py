"""A model and what updates it, by configuration."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import OptimConfig, States, Update
from ..optim import build_optimizer
from .device import BackwardUpdater, StepUpdater
from .host import HostUpdater
from .updater import Updater


def build_updater(model: PreTrainedModel, weights: nn.Module, config: OptimConfig, device: torch.device) -> Updater:
    """The updater of a sharded `model`. `weights`: the model itself, or its host weights where states live on the host.

    Call once the weights are filled: the model gets them.
    """
    optimizer = build_optimizer(weights, config)
    if config.states is States.HOST:
        updater = HostUpdater(model, weights, optimizer, config, device)
        updater.weights_changed()
        return updater
    return (BackwardUpdater if config.update is Update.BACKWARD else StepUpdater)(model, optimizer, config)
