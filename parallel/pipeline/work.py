"""What layers and micro-batches cost, and what that makes of the units of a pipeline's stages. Pure; seconds and bytes of one rank.

A layer takes so long for each token and for each query-key pair of causal attention. Backward repeats both for gradients of inputs, the
pairs `PAIR_BACKWARD` times, and the tokens' part once more for gradients of weights: attention itself has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from ...errors import PlanError
from .simulate import Floats, PipelineCosts
from .slices import balanced_slices, slice_work

PAIR_BACKWARD = 2.5
"""Products of flash attention's backward pass over its forward pass's: five against two."""
FINEST_CUT = 4096
"""Places in a micro-batch at which slices may end."""


class Recompute(Enum):
    """What a stage keeps of a micro-batch between forward and backward."""

    NONE = "none"
    """Everything that backward reads."""
    LINEAR = "linear"
    """The input and the attention output of each layer: one layer at a time runs forward again, but for attention."""
    LAYER = "layer"
    """The input of each layer: one layer at a time runs forward again."""
    STAGE = "stage"
    """The stage's input alone, as GPipe does: all its layers run forward again, and are all there at one time."""

    @property
    def tokens_again(self) -> float:
        """Forward passes without attention that backward adds."""
        return float(self is not Recompute.NONE)

    @property
    def pairs_again(self) -> float:
        """Forward passes of attention that backward adds."""
        return float(self in (Recompute.LAYER, Recompute.STAGE))


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerLoad:
    """What one layer costs a rank: embedding and head are such layers too."""

    token_s: float = 0.0
    """Forward, of each token, without attention."""
    pair_s: float = 0.0
    """Forward, of each query-key pair."""
    kept_bytes: float = 0.0
    """Of each token, where all is kept that backward reads."""
    attention_bytes: float = 0.0
    """Of each token: attention's output, which is part of what is kept."""
    input_bytes: float = 0.0
    """Of each token: the layer's input, which is what goes from stage to stage."""
    fixed_bytes: float = 0.0
    """Weights, gradients, optimizer states, whatever there is beside activations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLoad:
    """A model as a row of layers. Ends may be empty."""

    layers: tuple[LayerLoad, ...]
    embedding: LayerLoad = LayerLoad()
    """Always on the first stage."""
    head: LayerLoad = LayerLoad()
    """Last norm, head and loss: always on the last stage."""

    def on_stages(self, counts: Sequence[int]) -> list[tuple[LayerLoad, ...]]:
        """The layers of each stage, ends with the first and the last one."""
        bounds = np.cumsum([0, *counts])
        stages = [self.layers[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]
        stages[0] = (self.embedding, *stages[0])
        stages[-1] = (*stages[-1], self.head)
        return stages


@dataclass(frozen=True, slots=True)
class Batch:
    """Micro-batches of a step, each the tokens of its documents end to end."""

    micro_batches: tuple[tuple[int, ...], ...]

    @classmethod
    def equal(cls, micro_batches: int, tokens: int) -> Batch:
        """Micro-batches of one document each, all as long."""
        return cls(((tokens,),) * micro_batches)

    def sizes(self, model: ModelLoad, slices: int) -> tuple[tuple[int, ...], ...]:
        """Tokens of the slices of each micro-batch, even in the model's work to a `FINEST_CUT`-th of it.

        PlanError where one has too few tokens.
        """
        layers = (*model.layers, model.embedding, model.head)
        token, pair = sum(layer.token_s for layer in layers), sum(layer.pair_s for layer in layers)
        cut = {
            documents: balanced_slices(documents, slices, token_work=token, pair_work=pair, granule=max(1, sum(documents) // FINEST_CUT))
            for documents in set(self.micro_batches)
        }
        return tuple(cut[documents] for documents in self.micro_batches)


def unit_costs(
    model: ModelLoad,
    batch: Batch,
    counts: Sequence[int],
    sizes: Sequence[Sequence[int]],
    recompute: Sequence[Recompute],
    *,
    alpha_s: float = 0.0,
    s_per_byte: float = 0.0,
) -> PipelineCosts:
    """Costs of each virtual stage's units for a partition into `counts` layers, each of which recomputes in its own way.

    `sizes`: tokens of each micro-batch's slices.
    """
    if sum(counts) != len(model.layers) or min(counts, default=0) < 1 or len(recompute) != len(counts):
        found, expected = f"stages of {list(counts)} layers", f"1 or more each, {len(model.layers)} together"
        raise PlanError("pipeline partition", found=found, expected=expected, hint="`partition` of parallel/pipeline/partition.py")
    tokens = np.array(sizes, dtype=np.float64)
    pairs = np.array([slice_work(documents, size, 0.0, 1.0) for documents, size in zip(batch.micro_batches, sizes, strict=True)])
    stages = model.on_stages(counts)
    token_s, pair_s = (_of_stages([sum(getattr(one, name) for one in stage) for stage in stages]) for name in ("token_s", "pair_s"))
    tokens_again = _of_stages([way.tokens_again for way in recompute])
    pairs_again = _of_stages([way.pairs_again for way in recompute])
    forward = token_s * tokens + pair_s * pairs
    bytes_ = [activation_bytes(stage, way) for stage, way in zip(stages, recompute, strict=True)]
    held, work = (_of_stages(values) * tokens for values in zip(*bytes_, strict=True))
    return PipelineCosts(
        forward_s=forward,
        backward_s=(1 + tokens_again) * token_s * tokens + (PAIR_BACKWARD + pairs_again) * pair_s * pairs,
        weight_s=token_s * tokens,
        output_bytes=_of_stages([*(stage[0].input_bytes for stage in stages[1:]), 0.0]) * tokens,
        held_bytes=held,
        # Gradients of weights read inputs of products and gradients of their outputs: as much as was kept, recomputed or not.
        weight_bytes=_of_stages([sum(one.kept_bytes for one in stage) for stage in stages]) * tokens,
        work_bytes=work,
        fixed_bytes=np.array([sum(one.fixed_bytes for one in stage) for stage in stages]),
        alpha_s=alpha_s,
        s_per_byte=s_per_byte,
    )


def _of_stages(values: Sequence[float]) -> Floats:
    return np.array(values, dtype=np.float64)[:, None, None]


def activation_bytes(stage: Sequence[LayerLoad], recompute: Recompute) -> tuple[float, float]:
    """Of each token: what waits, and what is there beside it while a unit runs."""
    kept = [one.kept_bytes for one in stage]
    if recompute is Recompute.NONE:
        return sum(kept), 0.0
    if recompute is Recompute.LINEAR:
        return sum(one.input_bytes + one.attention_bytes for one in stage), max(kept)
    if recompute is Recompute.LAYER:
        return sum(one.input_bytes for one in stage), max(kept)
    return next((one.input_bytes for one in stage if one.input_bytes), 0.0), sum(kept)
