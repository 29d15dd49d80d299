"""Every term of one rank; each subject has its file. Pure.

tests/memory/test_ledger_measured.py and `python -m efflaunch.bench.predicted` compare their sum with traced steps.
"""

from __future__ import annotations

from ...utils.c_allocator import LARGE_BYTES
from ..plan_inputs import GIB, PlanInputs
from ..timing.sequence import group_degrees
from . import weights as fsdp2
from . import zero
from .activations import activations, attention_outputs, between_stages, graph_row, in_flight, layer_inputs, messages
from .kernels import loss_chunk, masked_scores, row_losses, scratch
from .live_layer import layer_rows
from .optimizer import optimizer_states, whole_matrices
from .term import Phase, Term, term
from .weight_operands import weight_operands
from .weights import batch, head_gradient, layer_gradients, unpacked_matrix
from .zero import is_zero

UNSEEN = ("kernel scratch", "communicators", "context", "allocator reserve")
"""Terms that are assumed: no count of tensors can show them."""


def communicators(inputs: PlanInputs) -> Term:
    """A rank's groups, each a communicator, with buffers on GPUs: those that training/make_groups.py makes and warms.

    Of plans, one for each of their sizes but that of a single rank; of all ranks, and of a stage's where there are several; of the
    mesh, one for each axis that has ranks; of a pipeline, four at its ends. Axes of one rank have no traffic, and so no buffers.
    """
    layout, parallel = inputs.layout, inputs.parallel
    whole = inputs.whole or inputs.spec
    sequences = len(group_degrees(parallel, layout, num_heads=whole.num_heads))
    several, shared = layout.stages > 1, parallel.experts.ep
    axes = [layout.replicate, layout.shard, *((layout.replicate, shared, layout.shard // shared) if shared > 1 else ())]
    meshes = sum(ranks > 1 for ranks in axes)
    count = (layout.world_size > 1) + (several and layout.stage_size > 1) + sequences + meshes + 4 * several
    each = GIB // 4 if inputs.on_gpu else 8 << 20
    return term("communicators", f"{count} groups of ranks, about {each >> 20} MiB each (assumed)", count * each)


def context(inputs: PlanInputs) -> Term:
    num_bytes, note = (2 * GIB, "CUDA context, libraries (assumed)") if inputs.on_gpu else (GIB // 2, "Python and torch (assumed)")
    return term("context", note, num_bytes)


def reserve_share(inputs: PlanInputs) -> float:
    """Share of a device that its allocator loses between blocks."""
    return 0.03 if inputs.on_gpu else 0.0


def reserve(inputs: PlanInputs) -> Term:
    if not inputs.on_gpu:
        return term("allocator reserve", "freed blocks that the C library keeps, as much as small ones in use (assumed)", _heaps(inputs))
    size = reserve_share(inputs) * inputs.cluster.device_memory_bytes
    return term("allocator reserve", "3 % of the device lost between blocks (assumed)", size)


TENSORS_PER_LAYER = 20
"""Tensors that one layer leaves for its backward at most: what norms, projections, rotation, exchanges, attention and a feed-forward do."""


def _heaps(inputs: PlanInputs) -> int:
    """What heaps of a rank without a GPU keep of blocks that are freed: of those below LARGE_BYTES (utils/c_allocator.py).

    Documents differ in length from step to step, so holes seldom fit what comes: there is as much free between blocks as the layers'
    tensors can take in heaps, whatever is kept of them. (`quickstart_lora` grew by 50 MiB of holes in 14 steps, of 80 here.)
    """
    in_heaps = inputs.spec.num_layers * TENSORS_PER_LAYER * LARGE_BYTES
    return min(in_heaps, inputs.spec.num_layers * graph_row(inputs) * inputs.tokens)


def device_terms(inputs: PlanInputs) -> tuple[Term, ...]:
    """Every term of one rank, those of no bytes left out."""
    engine = zero if is_zero(inputs) else fsdp2
    fixed = (
        engine.weights, unpacked_matrix, optimizer_states, whole_matrices, engine.whole_gradients, engine.gathered_root, layer_gradients,
        head_gradient, loss_chunk, row_losses, masked_scores, scratch, batch, between_stages, messages, communicators, context, reserve,
    )  # fmt: skip
    made = [*layer_rows(inputs), *worst_layers(inputs), *(make(inputs) for make in fixed)]
    return tuple(entry for entry in made if entry.num_bytes)


def worst_layers(inputs: PlanInputs) -> list[Term]:
    """Terms that differ from layer to layer in backward: in each phase those of the layer where their sum is largest."""
    engine = zero if is_zero(inputs) else fsdp2
    makers = (
        engine.gradients, engine.gathered_layers, engine.reduction, layer_inputs, attention_outputs, activations, in_flight,
        weight_operands,
    )  # fmt: skip
    layers = [[make(inputs, layer) for make in makers] for layer in candidates(inputs)]
    worst = {phase: max(layers, key=lambda terms: sum(entry.by_phase.get(phase, 0) for entry in terms)) for phase in Phase}
    return [
        Term(entry.name, entry.note, {phase: num_bytes for phase in Phase if (num_bytes := worst[phase][index].by_phase.get(phase, 0))})
        for index, entry in enumerate(layers[0])
    ]


def candidates(inputs: PlanInputs) -> list[int]:
    """Layers whose backward may hold most: what goes and what comes is linear between the ends of segments."""
    count, k = inputs.spec.num_layers, inputs.segment_layers
    ends = ((count - 1) // k * k - 1, k - 1, k - 2)
    return sorted({layer for layer in (count - 1, count - 2, *ends, 1, 0) if 0 <= layer < count}, reverse=True)
