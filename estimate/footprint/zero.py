"""Weights and their gradients on one rank under DeepSpeed's ZeRO, by stage: the mirror of weights.py, which follows FSDP2. Pure.

Follows deepspeed/runtime/zero (0.19): stage_1_and_2.py has every weight whole in compute precision beside its part of the float32
ones; stage3.py has a part of both. Gradients are added up in float32; those of a step lie flat once more when they are taken.
"""

from __future__ import annotations

from ...parallel.sharding.config import Backend
from ..plan_inputs import PlanInputs
from . import weights as fsdp2
from .term import BACKWARD, KEEPING, Phase, Term, term


def is_zero(inputs: PlanInputs) -> bool:
    """Whether the engine is DeepSpeed's."""
    return inputs.engine.backend is Backend.DEEPSPEED


def shards_weights(inputs: PlanInputs) -> bool:
    """Whether weights come together layer by layer; with stages 1 and 2 they always are whole."""
    return inputs.engine.stage == 3


def weights(inputs: PlanInputs) -> Term:
    """Float32 weights and those that the model computes with; they are two, in float32 too."""
    ranks = inputs.layout.shard
    share = 1 / ranks if shards_weights(inputs) else 1
    kind = f"float32, 1/{ranks} of each; in compute precision " + (f"1/{ranks} of each" if shards_weights(inputs) else "whole")
    return term("weights", kind, (inputs.master / ranks + inputs.width * share) * inputs.parameters)


def gradients(inputs: PlanInputs, layer: int) -> Term:
    """Stage 1 has them whole up to the update, 2 and 3 this rank's part; taken, the part lies flat beside them.

    Stage 1 in bfloat16 (bf16_optimizer.py) adds up float32 beside the layers' own gradients, and updates from a view of the sums.
    """
    part = inputs.master * inputs.parameters // inputs.layout.shard
    if inputs.engine.stage == 1:
        is_narrow = inputs.width < inputs.master
        whole = (inputs.master + inputs.width * is_narrow) * inputs.parameters
        note = "float32, whole, and the layers' own" if is_narrow else "float32, whole"
        by_phase = dict.fromkeys((*KEEPING, Phase.REDUCE), whole) | {Phase.OPTIMIZER: whole + part * (not is_narrow)}
        return Term("gradients", note, by_phase)
    by_phase = dict.fromkeys((*KEEPING, Phase.REDUCE), part) | {Phase.OPTIMIZER: 2 * part}
    return Term("gradients", f"float32, 1/{inputs.layout.shard} of each", by_phase)


def whole_gradients(inputs: PlanInputs) -> Term:
    """None: those of stage 1 are in `gradients`."""
    return Term("gradients, whole", "", {})


def gathered_root(inputs: PlanInputs) -> Term:
    """Stage 3: last norm, head and embedding, as FSDP2 has them."""
    return fsdp2.gathered_root(inputs) if shards_weights(inputs) else Term("embedding and head, gathered", "", {})


def gathered_layers(inputs: PlanInputs, layer: int) -> Term:
    """Stage 3: the running layer, and the next one, which is gathered ahead; as many weights more as engine.zero lets it keep."""
    if not shards_weights(inputs):
        return Term("layers, gathered", "", {})
    term = fsdp2.gathered_layers(inputs, layer)
    kept = inputs.width * (_kept_gathered(inputs) + _never_sharded(inputs))
    phases = (Phase.FORWARD, Phase.LOSS, *BACKWARD, Phase.REDUCE, Phase.EVALUATION, Phase.EVALUATION_LOSS)
    more = {phase: max(term.by_phase.get(phase, 0), kept) for phase in phases} if kept else {}
    return Term(term.name, term.note + ", and those that engine.zero keeps" * bool(kept), {**term.by_phase, **more})


def _kept_gathered(inputs: PlanInputs) -> int:
    """Weights that may stay gathered for a second use: up to stage3_max_live_parameters where any is near enough."""
    zero = inputs.engine.zero
    ahead, again = int(zero.get("stage3_prefetch_bucket_size", 0)), int(zero.get("stage3_max_reuse_distance", 0))
    most = int(zero.get("stage3_max_live_parameters", 2 * inputs.layer_parameters))
    return min(most, inputs.parameters) if again or ahead > inputs.layer_parameters else 0


def _never_sharded(inputs: PlanInputs) -> int:
    """Weights of parameters too small to be sharded, at most: stage3_param_persistence_threshold numbers each."""
    zero, spec = inputs.engine.zero, inputs.spec
    least = int(zero.get("stage3_param_persistence_threshold", 0))
    most = int(zero.get("stage3_model_persistence_threshold", inputs.parameters))
    if not least:
        return 0
    # No matrix of attention has fewer numbers than a head's; below that there are norms, biases and routers.
    vectors = (8 + (0 if spec.experts is None else spec.experts.num_experts)) * spec.hidden_size * len(inputs.layers)
    return min(vectors if least < spec.hidden_size * spec.head_dim else inputs.parameters, most, inputs.parameters)


def reduction(inputs: PlanInputs, layer: int) -> Term:
    """The bucket that gradients are reduced in, and a copy of it on its way."""
    largest = max(inputs.layer_parameters, inputs.head_parameters)
    bucket = inputs.master * max(largest, int(inputs.engine.zero.get("reduce_bucket_size", 0)))
    phases = (Phase.FORWARD, Phase.LOSS, *BACKWARD, Phase.REDUCE)
    return Term("reduction", "a bucket of gradients, and its copy on the way", dict.fromkeys(phases, 2 * bucket))
