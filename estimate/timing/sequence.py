"""The cost model of sequence groups, by arithmetic from a ledger's inputs. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import ConfigError
from ...parallel.config import ParallelConfig, Scheme, SequenceMode
from ...parallel.layout import Layout
from ...parallel.sequence.cost import CostModel, DegreeCost
from ...parallel.sequence.degrees import choose_ulysses
from ..footprint.weight_operands import makes_weights_apart

if TYPE_CHECKING:
    from ..plan_inputs import PlanInputs


def cost_model_of(inputs: PlanInputs) -> CostModel:
    """The model of a ledger's setting, by arithmetic. No one static degree need suit the longest sequence."""
    from .step import fill_share, gather_s, reduce_s
    from .update import update_time

    parallel, cluster = inputs.parallel, inputs.cluster
    world = inputs.layout.stage_size
    ulysses, excluded = allowed_degrees(parallel, num_heads=inputs.spec.num_heads, ranks_per_node=cluster.ranks_per_node, world_size=world)
    degrees = tuple(
        degree_cost(replace(inputs, layout=replace(inputs.layout, sp_degree=degree, ulysses=inner))) for degree, inner in ulysses.items()
    )
    return CostModel(
        world_size=world,
        tokens_per_rank=int(parallel.tokens_per_rank),
        degrees=degrees,
        excluded=excluded,
        beta_s=_exposed_s(inputs),
        gather_s=gather_s(inputs),
        step_s=reduce_s(inputs) + update_time(inputs).shown_s,
        num_stages=inputs.layout.stages,
        virtual_stages=inputs.parallel.pipeline.virtual,
        fill_share=fill_share(inputs) if makes_weights_apart(inputs) else 1.0,
    )


def allowed_degrees(
    parallel: ParallelConfig, *, num_heads: int, ranks_per_node: int, world_size: int
) -> tuple[dict[int, int], tuple[tuple[int, str], ...]]:
    """Ulysses ranks of every group size that can be had, and the sizes that cannot, with the reason."""
    allowed: dict[int, int] = {}
    excluded: list[tuple[int, str]] = []
    for exponent in range(world_size.bit_length()):
        degree = 1 << exponent
        wanted = parallel.ulysses_degree
        inner = min(wanted, degree) if wanted is not None and parallel.scheme is Scheme.HYBRID else wanted
        try:
            allowed[degree] = choose_ulysses(
                degree=degree, num_heads=num_heads, ranks_per_node=ranks_per_node, scheme=parallel.scheme, requested=inner
            )
        except ConfigError as error:
            excluded.append((degree, f"{error.found}: {error.expected}"))
    return allowed, tuple(excluded)


def group_degrees(parallel: ParallelConfig, layout: Layout, *, num_heads: int) -> frozenset[int]:
    """Ranks of every group of two or more that a step's plan can have, the Ulysses groups inside rings among them."""
    found = {layout.sp_degree, layout.ulysses}
    if parallel.sequence is SequenceMode.ADAPTIVE:
        allowed, _ = allowed_degrees(parallel, num_heads=num_heads, ranks_per_node=layout.ranks_per_node, world_size=layout.stage_size)
        found |= {ranks for pair in allowed.items() for ranks in pair}
    return frozenset(found - {1})


def degree_cost(inputs: PlanInputs) -> DegreeCost:
    """Arithmetic of the group size in the setting's layout."""
    from .flops import attention_pass_s, linear_flops
    from .step import exchange_s, experts_exchange_s, experts_wait_s, ring_s

    pair_s = attention_pass_s(inputs) * 4 * inputs.spec.query_size / inputs.layout.sp_degree
    windows = sorted(window for window in inputs.spec.windows if window is not None)
    full = len(inputs.spec.windows) - len(windows)
    return DegreeCost(
        degree=inputs.layout.sp_degree,
        ulysses=inputs.layout.ulysses,
        attention_s=full * pair_s / 2,
        linear_s=linear_flops(inputs) / (inputs.gemm_rate * inputs.layout.sp_degree),
        exchange_s=exchange_s(inputs) + experts_exchange_s(inputs) + experts_wait_s(inputs),
        ring_s=ring_s(inputs),
        windowed_s=tuple((window, pair_s * windows.count(window)) for window in sorted(set(windows))),
    )


def _exposed_s(inputs: PlanInputs) -> float:
    """What hides behind no compute: the gather of embedding and first layer, and the last reduction where each micro-batch has one."""
    from ...parallel.config import GradReduce
    from .step import collective_s

    first = inputs.root_parameters + inputs.layer_parameters
    reduced = 0 if inputs.parallel.grad_reduce is GradReduce.STEP else inputs.master * inputs.trained_root_parameters
    return collective_s(inputs, inputs.width * first - inputs.packed_layer_savings + reduced)
