"""Describes the mixture of experts of a family without torch: the fields of its sizes, what it refuses, its names in files. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...memory.activation_classes import ExpertSizes

EXPERT_FIELDS = frozenset({"num_experts_per_tok", "router_aux_loss_coef", "output_router_logits"})
"""Fields of a config that every family with experts has."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field of a config that cannot be trained."""

    field: str
    actual: str
    expected: str


def every_layer(fields: Mapping[str, Any]) -> Refusal | None:
    """Refuse models in which some layers are dense."""
    dense, step = fields.get("mlp_only_layers") or [], fields.get("decoder_sparse_step", 1)
    if dense:
        return Refusal("mlp_only_layers", str(dense), "no entry: all layers have experts or none")
    return None if step == 1 else Refusal("decoder_sparse_step", str(step), "1: all layers have experts or none")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredNames:
    """Names in files where every expert has tensors of its own, below `model.layers.N.`; `{}` is the expert's number."""

    gate: str = "mlp.experts.{}.gate_proj.weight"
    up: str = "mlp.experts.{}.up_proj.weight"
    down: str = "mlp.experts.{}.down_proj.weight"
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Names in such files by parameter, of what is no expert's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertFacts:
    """The mixture of experts of one family; fields are those of a config.json, defaults filled in."""

    count: str
    """Field with the number of experts."""
    inner: str
    """Field with the width of one expert."""
    shared: str | None = None
    """Field with the width of the expert that all tokens visit."""
    stored: StoredNames | None = field(default_factory=StoredNames)
    """None: files have the fused tensors, as the modules do."""
    router: str = "mlp.gate"
    """Name of the router in a layer."""
    has_router_bias: bool = False
    has_biases: bool = False
    transposed: bool = False
    """Fused weights are (E, inputs, outputs)."""
    problem: Callable[[Mapping[str, Any]], Refusal | None] = field(default=lambda fields: None)
    """What of a config cannot be trained."""

    def sizes(self, fields: Mapping[str, Any]) -> ExpertSizes:
        """The sizes of a config."""
        return ExpertSizes(
            num_experts=fields[self.count],
            per_token=fields["num_experts_per_tok"],
            inner_size=fields[self.inner],
            shared_size=fields[self.shared] if self.shared is not None else 0,
            has_router_bias=self.has_router_bias,
            has_biases=self.has_biases,
            has_shared_gate=self.shared is not None,
        )
