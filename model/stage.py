"""Stages: a run of a model's decoder layers as one callable, with the embedding before the first and the objective behind the last.

Between two stages goes one tensor per micro-batch, the activations of this rank's rows (T, M), and back its gradient. A model in
one piece is one stage that is first and last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..memory.executor.capacity import Capacity
from ..memory.executor.layer_pass import AttentionRuntime
from ..memory.executor.mixture import ExpertLoad
from ..memory.executor.router_bias import RouterBiases
from ..memory.executor.router_losses import RouterLosses
from ..memory.executor.saved import HostStore
from ..memory.executor.tape import LayerContext, Tables, Tape
from ..memory.executor.weight_products import WeightProducts
from ..memory.policy import MemoryPolicy
from ..memory.position import Position
from ..parallel.pipeline.links import StageLinks
from ..parallel.pipeline.place import StagePart
from ..parallel.sharding.engine import PlainWeights, Weights
from .chunked_loss import Head, LossOptions
from .families.rope import rotary_tables
from .load_plan import HEAD


@dataclass(frozen=True, slots=True)
class Tokens:
    """One rank's rows of a micro-batch, on its device; each (T,) int64. `document_lengths`: tokens of each row's whole document."""

    token_ids: Tensor
    target_ids: Tensor
    position_ids: Tensor
    document_lengths: Tensor
    not_finite: Tensor | None = None
    """Flags (T,) bool, set by the loss where a row's loss is not a finite number."""


Objective = Callable[[Head], Tensor]
"""Maps the last layer's output to a loss, or to whatever else is wanted of it."""


@dataclass(frozen=True, slots=True)
class StagePass:
    """One micro-batch that went forward through a stage: what backward starts from and ends at."""

    output: Tensor
    """Activations (T, M) for the next stage, in its graph; of the last stage what the objective made."""
    received: Tensor | None
    """The activations of the stage before, whose gradient backward fills; None in the first stage."""
    products: WeightProducts | None = None
    """Operands of the weights' gradients, which wait for `Stage.weight_gradients`; None: backward makes them."""


class Stage:
    """Stands in for a causal LM's `forward`: embedding -> `layers` -> objective, by chunks from the norm on.

    Only the first stage reads token ids, only the last one targets; all of them read positions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parts: Sequence[StagePart],
        *,
        options: LossOptions,
        policy: MemoryPolicy,
        store: HostStore | None,
    ) -> None:
        """Build it of runs of the model's layers. `store` must have room for the micro-batches in flight at one time."""
        self._model, self._options, self._policy, self._store = model, options, policy, store
        self.parts = tuple(parts)
        """Its virtual stages: one, but on ranks whose stages are interleaved."""
        self.embedding_scale = 1.0
        """What embeddings are multiplied with, beside what their module does."""
        self.position = Position()
        """Where this rank is, for reports."""
        self.weights: Weights = PlainWeights(model)
        """The holder of the model's weights; an engine puts itself here."""
        self.expert_load = ExpertLoad()
        """How many rows each expert got."""
        self.router_losses = RouterLosses()
        """The losses of the layers' routers."""
        self.links: StageLinks | None = None
        """Links to the stages before and behind; None: this stage is all of the model."""
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(each.shape) for name, each in model.named_parameters()}
        """Shape of every parameter of the whole model, by name."""
        self.router_biases = RouterBiases({})
        """The biases by which the layers' routers choose."""
        self.capacity: Capacity | None = None
        """Most rows that an expert takes of a document; None: nothing is dropped."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of its layers."""
        return tuple(layer for part in self.parts for layer in part.layers)

    def __call__(
        self,
        tokens: Tokens,
        attention: AttentionRuntime,
        objective: Objective | None = None,
        received: Tensor | None = None,
        part: int = 0,
        products: WeightProducts | None = None,
    ) -> Tensor:
        """What `objective` makes of the last layer's output (last stage), or that output (T, M).

        `received` (T, M): the output of the stage before; None in the first stage. `part`: which of its virtual stages. `products`: where
        a backward leaves the operands of weights' gradients; None: it makes them.
        """
        own = self.parts[part]
        assert own.first == (received is None) and own.last == (objective is not None), "what enters and leaves follows from the place"
        if self.capacity is not None:
            self.capacity.begin(tokens.position_ids, tokens.document_lengths)
        x = self.embed(tokens) if received is None else received
        x = self.run_layers(x, own.layers, self._context(self._tables(x, tokens), attention, products))
        return x if objective is None else self.head(x, tokens, attention, objective)

    def forward(
        self,
        tokens: Tokens,
        attention: AttentionRuntime,
        objective: Objective | None = None,
        received: Tensor | None = None,
        part: int = 0,
        *,
        weights_apart: bool = False,
    ) -> StagePass:
        """Run a virtual stage through the engine, for a backward that follows. `received` becomes a leaf of its own. Collective.

        `weights_apart`: that backward leaves the gradients of layers' matrices to `weight_gradients`.
        """
        if received is not None:
            received = received.detach().requires_grad_()
        products = WeightProducts() if weights_apart else None
        output = self.weights.forward(tokens, attention, objective, received, part, products)
        return StagePass(output, received, products)

    def backward(self, stage_pass: StagePass, gradient: Tensor | None = None) -> Tensor | None:
        """Add the stage's gradients; returns that of what it received (T, M), for the stage before. Collective.

        `gradient` (T, M): of the output, from the stage behind; it may be overwritten. None in the last stage. A first stage in which
        nothing is trained has no use for it.
        """
        if gradient is None or stage_pass.output.requires_grad:
            self.weights.backward(stage_pass.output, gradient)
        return None if stage_pass.received is None else stage_pass.received.grad

    def weight_gradients(self, products: WeightProducts, part: int = 0) -> None:
        """Add the gradients of a virtual stage's matrices that a backward left, from its last layer to its first. Collective."""
        layers = self._model.model.layers

        def added() -> Iterator[nn.Module]:
            for index in reversed(self.parts[part].layers):
                self.position.at("weight gradients", index)
                products.add_gradients(index)
                yield layers[index]

        self.weights.weight_pass(added())

    def embed(self, tokens: Tokens) -> Tensor:
        """Activations (T, M) that the first layer starts from."""
        self.position.at("embedding")
        x: Tensor = self._model.model.embed_tokens(tokens.token_ids)
        return x if self.embedding_scale == 1.0 else x * self.embedding_scale

    def run_layers(self, x: Tensor, layers: range, context: LayerContext) -> Tensor:
        """Layers of this stage, one after the other, on x (T, M)."""
        for index in layers:
            x = self._model.model.layers[index](x, context)
        return x

    def head(self, x: Tensor, tokens: Tokens, attention: AttentionRuntime, objective: Objective) -> Tensor:
        """What `objective` makes of the last layer's output x (T, M)."""
        self.position.at("loss")
        with attention.busy():
            # The last layer's output is nobody's but the loss's: its gradient takes its place.
            norm, weight = self._model.model.norm, self._model.lm_head.weight
            return objective(Head(x, norm, weight, tokens.target_ids, self._options, overwrite=True, not_finite=tokens.not_finite))

    def forget(self) -> None:
        """Drop what aborted passes left with the host store and on the links, of every micro-batch in flight."""
        if self.links is not None:
            self.links.forget()
        if self._store is not None:
            self._store.reset()

    def _tables(self, x: Tensor, tokens: Tokens) -> Tables:
        return rotary_tables(self._model.model.rotary_emb, x, tokens.position_ids, tokens.document_lengths)

    def _context(self, tables: Tables, attention: AttentionRuntime, products: WeightProducts | None) -> LayerContext:
        """What the layers of one micro-batch share: each micro-batch in flight has a tape of its own."""
        layers = self._model.model.layers
        tape = Tape(self._policy, len(layers), self._store) if torch.is_grad_enabled() else None
        return LayerContext(tables, attention, tape, lambda index: self.weights.gathered(layers[index]), self.position, products)

    @property
    def has_experts(self) -> bool:
        """Whether any layer of the whole model has experts."""
        return any(".experts." in name for name in self.shapes)

    @property
    def is_tied(self) -> bool:
        """Whether the output matrix is the embedding: where there are several stages, the first and the last have it."""
        return HEAD not in self.shapes


def stage_of(model: PreTrainedModel) -> Stage:
    """The stage that stands in for the forward of `model`, once `install` put it there."""
    stage = model.forward
    assert isinstance(stage, Stage)
    return stage
