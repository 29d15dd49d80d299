"""Describes the mixture of experts of a family without torch: the fields of its sizes, what it refuses, its names in files. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...memory.activation_classes import ExpertSizes

EXPERT_FIELDS = frozenset({"num_experts_per_tok", "router_aux_loss_coef", "output_router_logits"})
"""Fields of a config that families with experts have."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field of a config that cannot be trained."""

    field: str
    actual: str
    expected: str


def listed_dense_layers(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers without experts: those listed, and all but every `decoder_sparse_step`-th."""
    listed, step = fields.get("mlp_only_layers") or (), fields.get("decoder_sparse_step", 1)
    return tuple(layer for layer in range(fields["num_hidden_layers"]) if layer in listed or (layer + 1) % step)


def listed_problem(fields: Mapping[str, Any]) -> Refusal | None:
    """Refuse lists of dense layers that are none, and lists of all layers."""
    listed, step, layers = fields.get("mlp_only_layers") or [], fields.get("decoder_sparse_step", 1), fields["num_hidden_layers"]
    if not isinstance(listed, (list, tuple)) or any(not _is_count(layer) or layer >= layers for layer in listed):
        return Refusal("mlp_only_layers", str(listed), f"numbers of layers, 0 to {layers - 1}")
    if not _is_count(step) or step < 1:
        return Refusal("decoder_sparse_step", str(step), "a whole number, 1 or more")
    if len(listed_dense_layers(fields)) < layers:
        return None
    wrong = ("decoder_sparse_step", step) if step > layers else ("mlp_only_layers", listed)
    return Refusal(wrong[0], str(wrong[1]), "a layer with experts at least: a family without them has none")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def no_shared(fields: Mapping[str, Any]) -> int:
    """The width of a shared expert that there is not."""
    return 0


def no_dense_layers(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Every layer has experts."""
    return ()


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
    shared: Callable[[Mapping[str, Any]], int] = no_shared
    """Width of the expert that all tokens visit."""
    shared_name: str = "mlp.shared_expert"
    """Its name in a layer."""
    has_shared_gate: bool = False
    """`NAME_gate` scales its output token by token."""
    dense_layers: Callable[[Mapping[str, Any]], tuple[int, ...]] = no_dense_layers
    """Numbers of the layers without experts; their feed-forwards are `intermediate_size` wide."""
    stored: StoredNames | None = field(default_factory=StoredNames)
    """None: files have the fused tensors, as the modules do."""
    router: str = "mlp.gate"
    """Name of the router in a layer."""
    has_router_bias: bool = False
    correction_bias: str | None = None
    """Name in the router of the bias that is added to scores where experts are chosen, and nowhere else: no gradient reaches it."""
    has_wide_router: bool = False
    """Logits are made in float32."""
    has_biases: bool = False
    transposed: bool = False
    """Fused weights are (E, inputs, outputs)."""
    problem: Callable[[Mapping[str, Any]], Refusal | None] = field(default=lambda fields: None)
    """What of a config cannot be trained."""

    @property
    def has_dense_layers(self) -> bool:
        """Whether a config may have layers without experts among the others."""
        return self.dense_layers is not no_dense_layers

    def sizes(self, fields: Mapping[str, Any]) -> ExpertSizes:
        """The sizes of a config."""
        dense = self.dense_layers(fields)
        return ExpertSizes(
            num_experts=fields[self.count],
            per_token=fields["num_experts_per_tok"],
            inner_size=fields[self.inner],
            shared_size=self.shared(fields),
            has_router_bias=self.has_router_bias,
            has_biases=self.has_biases,
            has_shared_gate=self.has_shared_gate,
            has_correction_bias=self.correction_bias is not None,
            has_wide_router=self.has_wide_router,
            dense_size=fields["intermediate_size"] if dense else 0,
            dense_share=len(dense) / fields["num_hidden_layers"],
        )
