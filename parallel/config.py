"""How the computation is split over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Protocol

from ..cluster.config import Machines
from ..errors import ConfigError
from ..units import Seconds, Tokens
from ..utils.divisors import common_powers_of_two, divisors, nearest_divisor
from ..utils.ranges import TOKENS, WAIT_S, Range, check_ranges
from .pipeline.config import PipelineConfig, check_pipeline


class SequenceMode(Enum):
    """How sequences are given to groups."""

    STATIC = "static"
    """One SP degree for the whole run."""
    ADAPTIVE = "adaptive"
    """Each step's groups are planned for the lengths that are there."""


class Scheme(Enum):
    """Communication inside a sequence group."""

    AUTO = "auto"
    """Ulysses up to what the heads and the node allow, ring across the rest."""
    ULYSSES = "ulysses"
    RING = "ring"
    HYBRID = "hybrid"
    """Ulysses of `ulysses_degree` ranks inside x ring across."""


class AttentionKernel(Enum):
    """The library that computes attention on GPUs."""

    AUTO = "auto"
    """The fastest that is installed and can do what the model asks; the log says which, and why not the others."""
    FA4 = "fa4"
    """FlashAttention 4, through torch's registry."""
    FA3 = "fa3"
    """FlashAttention 3, through torch's registry."""
    FA2 = "fa2"
    """The flash-attn package."""
    CUDNN = "cudnn"
    """cuDNN's operator; packs of documents go to torch's own flash operators."""
    SDPA = "sdpa"
    """torch's own FlashAttention 2."""


class GradReduce(Enum):
    """When gradients are reduced across ranks."""

    AUTO = "auto"
    """Per step where whole float32 gradients fit in memory, else per micro-batch."""
    STEP = "step"
    MICRO_BATCH = "micro_batch"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """How the experts of each layer are split, for models that have experts."""

    ep: int = 1
    """Ranks next to each other that share the experts of each layer (expert parallelism); 1: experts are sharded as all weights are."""

    degree: int | None = None
    """Chunks in which rows travel to shared experts and back, beside products. null: what the plan has as fastest on GPUs, 1 on CPUs."""

    RANGES: ClassVar[Mapping[str, Range]] = {"ep": Range(1, 1 << 26), "degree": Range(1, 64)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Ranks = stages x replicate x shard; sequence groups are laid over the ranks of each stage."""

    name: str
    replicate: int = 1
    """Copies of the sharded model (HSDP); 1: weights are sharded over all ranks of a stage."""
    shard: int | None = None
    """Ranks that share one copy of weights and optimizer states; None: all ranks of a stage / replicate."""
    sequence: SequenceMode = SequenceMode.STATIC
    sp_degree: int | None = None
    """static: ranks per sequence group, a power of two; None: the smallest that holds the longest sequence."""
    scheme: Scheme = Scheme.AUTO
    ulysses_degree: int | None = None
    """hybrid only: ranks of the inner Ulysses exchange."""
    tokens_per_rank: Tokens
    """Most tokens one rank holds in a micro-batch."""
    attention_kernel: AttentionKernel = AttentionKernel.AUTO
    """The library that computes attention on GPUs."""
    grad_reduce: GradReduce = GradReduce.AUTO
    barrier_free: bool = False
    """Ranks meet once a step instead of once a micro-batch: whole weights and gradients stay on every rank within the step."""
    profile: str | None = None
    """File of measured times (`efflaunch profile`); None: profile.yaml of the working directory, where it is of this machine and model."""
    plan_timeout_s: Seconds = 0.25
    """adaptive: longest a step waits for a plan that is late before the greedy plan is used."""
    probe_s: Seconds = 10.0
    """adaptive: how long a run measures this machine before its first step, where no profile is of it; 0: plans go by arithmetic."""
    collective_timeout_s: Seconds = 1800.0
    """Longest a collective waits for its slowest rank, a save to slow storage included; five expected steps where that is more."""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)

    RANGES: ClassVar[Mapping[str, Range]] = {
        "replicate": Range(1, 1 << 26),
        "shard": Range(1, 1 << 26),
        "sp_degree": Range(1, 1 << 26),
        "ulysses_degree": Range(1, 1 << 26),
        "tokens_per_rank": Range(1, TOKENS),
        "plan_timeout_s": Range(0, WAIT_S),
        "probe_s": Range(0, WAIT_S),
        "collective_timeout_s": Range(0, WAIT_S, above=True),
    }


class ExpertShape(Protocol):
    """What a layout has to know of a model's experts."""

    @property
    def num_experts(self) -> int: ...
    @property
    def inner_size(self) -> int: ...


class ModelShape(Protocol):
    """What a layout has to know of the model."""

    @property
    def num_heads(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def experts(self) -> ExpertShape | None: ...


def check_parallel(parallel: ParallelConfig, cluster: Machines, spec: ModelShape) -> None:
    """ConfigError unless the axes multiply to the world and the sequence groups suit world and heads."""
    check_ranges(parallel, "parallel")
    world, stages = cluster.num_nodes * cluster.ranks_per_node, parallel.pipeline.stages
    layers = spec.num_layers if stages > 1 else 0
    check_pipeline(parallel.pipeline, world_size=world, num_layers=layers, barrier_free=parallel.barrier_free)
    _check_world(parallel, cluster)
    _check_degree(parallel, world // stages)
    _check_scheme(parallel, spec.num_heads)
    _check_barrier_free(parallel)
    check_ranges(parallel.experts, "parallel.experts")
    if parallel.experts.ep > 1:
        _check_experts(parallel, world // stages, spec)
    elif parallel.experts.degree is not None:
        raise ConfigError(
            "parallel.experts.degree",
            found=f"{parallel.experts.degree} with parallel.experts.ep=1",
            expected="null: no rows travel where every rank has all experts",
            hint="parallel.experts.degree=null, or parallel.experts.ep=2",
        )


def _check_experts(parallel: ParallelConfig, world: int, spec: ModelShape) -> None:
    """ConfigError unless the experts divide over ranks, and each rank's over the ranks that have the same."""
    ep, shard = parallel.experts.ep, world // parallel.replicate
    if spec.experts is None:
        raise _wrong_ep(ep, "a model without experts", "1: there is nothing to spread", 1)
    count, sizes = spec.experts.num_experts, {"hidden size": spec.hidden_size, "gate and up": 2 * spec.experts.inner_size}
    allowed = [n for n in divisors(count) if shard % n == 0]
    whole = [n for n in allowed if n == 1 or all(size % (shard // n) == 0 for size in sizes.values())]
    if ep not in allowed:
        copies = f" of each of the {parallel.replicate} copies of the weights" * (parallel.replicate > 1)
        actual, expected = f"{count} experts on {shard} ranks{copies}", f"a divisor of both: {', '.join(map(str, allowed))}"
        raise _wrong_ep(ep, actual, expected, max(n for n in whole if n <= ep))
    beyond = shard // ep
    for what, size in sizes.items():
        if size % beyond:
            # More ranks for each layer's experts leave fewer with the same ones.
            nearest = min((n for n in whole if n > ep), default=1)
            raise _wrong_ep(ep, f"{what} {size} over {beyond} ranks with the same experts", f"a divisor of {size}", nearest)


def _wrong_ep(ep: int, actual: str, expected: str, nearest: int) -> ConfigError:
    return ConfigError("parallel.experts.ep", found=f"{ep} for {actual}", expected=expected, hint=f"parallel.experts.ep={nearest}")


def _check_world(parallel: ParallelConfig, cluster: Machines) -> None:
    world = cluster.num_nodes * cluster.ranks_per_node // parallel.pipeline.stages
    of_a_stage = f" of each of {parallel.pipeline.stages} stages" * (parallel.pipeline.stages > 1)
    if parallel.shard is not None and parallel.replicate * parallel.shard != world:
        raise ConfigError(
            "parallel.shard",
            found=f"replicate {parallel.replicate} x shard {parallel.shard} = {parallel.replicate * parallel.shard} ranks",
            expected=f"{world} ranks{of_a_stage}: {cluster.num_nodes} x {cluster.ranks_per_node} of cluster",
            hint=f"parallel.shard={world // parallel.replicate}"
            if world % parallel.replicate == 0
            else "parallel.replicate=1 parallel.shard=null",
        )
    if world % parallel.replicate:
        raise ConfigError(
            "parallel.replicate",
            found=f"{parallel.replicate} copies over {world} ranks{of_a_stage}",
            expected=f"a divisor of {world}: {', '.join(map(str, divisors(world)))}",
            hint=f"parallel.replicate={nearest_divisor(world, parallel.replicate)}",
        )


def _check_degree(parallel: ParallelConfig, world: int) -> None:
    degree = parallel.sp_degree
    if degree is None:
        return
    if parallel.sequence is SequenceMode.ADAPTIVE:
        raise ConfigError(
            "parallel.sp_degree",
            found=f"{degree} with parallel.sequence=adaptive",
            expected="null: every step gets the degrees that suit its lengths",
            hint="parallel.sp_degree=null, or parallel.sequence=static",
        )
    largest = 1 << (world.bit_length() - 1)
    if degree < 1 or degree & (degree - 1) or degree > largest:
        raise ConfigError(
            "parallel.sp_degree",
            found=str(degree),
            expected=f"a power of two up to {largest} ({world} ranks)",
            hint=f"parallel.sp_degree={min(largest, 1 << max(0, degree.bit_length() - 1))}, or parallel.sp_degree=null",
        )


def _check_barrier_free(parallel: ParallelConfig) -> None:
    if parallel.barrier_free and parallel.grad_reduce is GradReduce.MICRO_BATCH:
        raise ConfigError(
            "parallel.grad_reduce",
            found="micro_batch with parallel.barrier_free=true",
            expected="step: ranks that meet once a step reduce once a step",
            hint="parallel.grad_reduce=auto, or parallel.barrier_free=false",
        )


def _check_scheme(parallel: ParallelConfig, num_heads: int) -> None:
    inner, degree = parallel.ulysses_degree, parallel.sp_degree
    if parallel.scheme is Scheme.HYBRID and inner is None:
        raise ConfigError(
            "parallel.ulysses_degree",
            found="nothing with parallel.scheme=hybrid",
            expected="the ranks of the inner Ulysses exchange",
            hint="parallel.ulysses_degree=2, or parallel.scheme=auto",
        )
    if parallel.scheme is not Scheme.HYBRID and inner is not None:
        raise ConfigError(
            "parallel.ulysses_degree",
            found=f"{inner} with parallel.scheme={parallel.scheme.value}",
            expected="null: only the hybrid scheme has an inner degree",
            hint="parallel.scheme=hybrid, or parallel.ulysses_degree=null",
        )
    key, wanted = ("parallel.ulysses_degree", inner) if parallel.scheme is Scheme.HYBRID else ("parallel.sp_degree", degree)
    if parallel.scheme not in (Scheme.HYBRID, Scheme.ULYSSES) or wanted is None:
        return
    allowed = common_powers_of_two(num_heads, degree or num_heads)
    if wanted not in allowed:
        raise ConfigError(
            key,
            found=f"{wanted} Ulysses ranks for {num_heads} attention heads" + (f" in groups of {degree}" if degree is not None else ""),
            expected=f"one of {', '.join(map(str, allowed))}",
            hint=f"{key}={max([n for n in allowed if n <= max(1, wanted)])}, or parallel.scheme=auto",
        )
