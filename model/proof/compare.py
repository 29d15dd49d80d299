"""Compares a tiny model trained here with plain Hugging Face in one process: loss and every gradient, in float64.

The reference is Hugging Face's own model with its own attention, each document alone, so that nothing of packing, of memory policies
or of adapters is in it. Here the documents are one packed micro-batch. Both have the same random weights, norms and biases included.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from ...memory.config import AttentionTiling
from ...memory.policy import KEEP_ALL, MemoryPolicy
from ...parallel.sequence.attention import CpuKernel
from ...parallel.sequence.clock import BusyClock
from ...parallel.sequence.layout import group_layout
from ...parallel.sequence.plan import Group
from ...parallel.sequence.runtime import SequenceAttention, sequence_attention
from ...parallel.topology import Topology
from ..build import build_config, install
from ..chunked_loss import IGNORE, cross_entropy
from ..stage import Tokens
from ..weights import persistent_buffers
from .tiny_config import TinyConfig
from .wide_floats import WideFloats

TOLERANCE = 1e-10
"""Largest difference, relative to the largest entry of the loss or gradient, that is rounding."""
LENGTHS = (29, 1, 48, 17)
"""Tokens of the documents."""
POLICIES: Mapping[str, MemoryPolicy] = {
    "keep": KEEP_ALL,
    "recompute": MemoryPolicy(),
    "streamed": MemoryPolicy(attention=AttentionTiling.CHUNKS, chunk_tokens=7),
}
_LOSS_CHUNK = 16
_LEAST_SHARE = 1e-3
"""Of the largest gradient of the model: smaller ones are compared with it. Some are zero but for rounding, as biases of keys that
nothing rotates: a softmax does not change with them."""
_SEED = 1234
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class ParameterAgreement:
    """Differences of one parameter's gradient, by policy; infinite where one side has none or is no number."""

    name: str
    shape: tuple[int, ...]
    by_policy: Mapping[str, float]

    @property
    def worst(self) -> float:
        return max(self.by_policy.values())


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a comparison found."""

    loss: float
    """Plain Hugging Face's."""
    loss_by_policy: Mapping[str, float]
    """Relative differences of the loss."""
    parameters: tuple[ParameterAgreement, ...]
    """Every parameter, the worst first."""

    @property
    def worst_parameter(self) -> tuple[str, Mapping[str, float]]:
        """Name and differences by policy of the parameter that differs most."""
        return self.parameters[0].name, self.parameters[0].by_policy

    @property
    def is_exact(self) -> bool:
        return all(value <= TOLERANCE for value in (*self.loss_by_policy.values(), *(each.worst for each in self.parameters)))


def compare(tiny: TinyConfig, on_progress: Callable[[str], None] = lambda what: None) -> Agreement:
    """Run plain Hugging Face and this package's passes under every policy. `on_progress` is told what runs next.

    ConfigError where an adapter does not know the layers that transformers builds.
    """
    with WideFloats(), torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(_SEED)
        plain = _random_model(dict(tiny.fields))
        documents = [torch.randint(0, plain.config.vocab_size, (length,)) for length in LENGTHS]
        models = {name: copy.deepcopy(plain) for name in POLICIES}
        on_progress("plain Hugging Face")
        loss = _plain_loss(plain, documents)
        loss.backward()  # type: ignore[no-untyped-call]
        losses = {}
        for name, policy in POLICIES.items():
            on_progress(f"this package, {name}")
            losses[name] = _trunk_loss(models[name], policy, documents)
    return _agreement(plain, float(loss.detach()), models, losses)


def _random_model(fields: dict[str, Any]) -> PreTrainedModel:
    """Hugging Face's model in float64, with random numbers in every weight and bias."""
    config = build_config(fields)
    # Its grouped products know no float64; the loop over experts is what they stand for.
    config._experts_implementation = "eager"
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        for weight in (*model.parameters(), *persistent_buffers(model).values()):
            weight.add_(torch.randn_like(weight) * (0.1 if weight.ndim < 2 else weight.shape[-1] ** -0.5))
    return model.double().train()  # tables of angles are buffers


def _plain_loss(model: Any, documents: list[Tensor]) -> Tensor:
    """Mean loss over all targets, each document in a forward of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for tokens in documents:
        # Tables that grow with the length seen start anew: each document is alone.
        rotary = model.model.rotary_emb
        model.model.rotary_emb = type(rotary)(model.config).double()
        positions = torch.arange(len(tokens)).unsqueeze(0)
        logits = model(input_ids=tokens.unsqueeze(0), position_ids=positions, use_cache=False).logits[0]
        total = total + F.cross_entropy(logits, _targets(tokens), ignore_index=IGNORE, reduction="sum")
    return total / _num_targets(documents)


def _trunk_loss(model: PreTrainedModel, policy: MemoryPolicy, documents: list[Tensor]) -> float:
    """The same loss by this package, with its gradients left in the model: one packed micro-batch."""
    install(model, policy, loss_chunk_tokens=_LOSS_CHUNK)
    tokens = Tokens(
        torch.cat(documents),
        torch.cat([_targets(each) for each in documents]),
        torch.cat([torch.arange(len(each)) for each in documents]),
        torch.cat([torch.full((len(each),), len(each)) for each in documents]),
    )
    loss = model(tokens, _attention(documents), partial(cross_entropy, scale=1 / _num_targets(documents)))
    loss.backward()
    return float(loss.detach())


class _OneRank:
    stage_rank = 0
    world_size = 1


def _attention(documents: list[Tensor]) -> SequenceAttention:
    lengths = tuple(map(len, documents))
    group = Group(0, 1, 1, tuple(range(len(lengths))))
    layout = group_layout(lengths, ulysses=1, ring=1)
    return sequence_attention(cast(Topology, _OneRank()), CpuKernel(), group, layout, BusyClock(_CPU))


def _targets(tokens: Tensor) -> Tensor:
    return torch.cat([tokens[1:], tokens.new_tensor([IGNORE])])


def _num_targets(documents: list[Tensor]) -> int:
    return sum(len(tokens) - 1 for tokens in documents)


def _agreement(plain: PreTrainedModel, loss: float, models: Mapping[str, PreTrainedModel], losses: Mapping[str, float]) -> Agreement:
    least = _LEAST_SHARE * max(float(each.grad.abs().max()) for each in plain.parameters() if each.grad is not None)
    ours = {policy: dict(model.named_parameters()) for policy, model in models.items()}
    rows = [
        ParameterAgreement(name, tuple(wanted.shape), {policy: difference(ours[policy][name].grad, wanted.grad, least) for policy in ours})
        for name, wanted in plain.named_parameters()
    ]
    by_policy = {policy: abs(value - loss) / abs(loss) for policy, value in losses.items()}
    return Agreement(loss, by_policy, tuple(sorted(rows, key=lambda row: -row.worst)))


def difference(ours: Tensor | None, wanted: Tensor | None, least: float = 0.0) -> float:
    """Largest difference of two tensors over the largest entry of `wanted`, or `least`; infinite where one is missing or no number."""
    if ours is None or wanted is None:
        return 0.0 if ours is wanted else math.inf
    apart, size = float((ours - wanted).abs().max()), max(float(wanted.abs().max()), least)
    if apart == 0.0:
        return 0.0
    return apart / size if math.isfinite(apart) and size > 0.0 else math.inf
