"""What every estimate depends on, gathered once from a configuration. Pure; bytes everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Protocol

from ..cluster.attention_rates import AttentionRate, RatedKernel, attention_rate, in_order
from ..cluster.config import check_cluster
from ..memory.config import AttentionTiling, MemoryConfig
from ..memory.policy import MemoryPolicy, explicit_policy
from ..model.adapters.config import NO_ADAPTER, AdapterConfig
from ..model.adapters.targets import quantized, targets, trained_numbers
from ..model.spec import LayerParameters, expert_weights, layer_parameters, model_spec, num_parameters
from ..parallel.config import AttentionKernel, GradReduce, ParallelConfig, SequenceMode
from ..parallel.layout import Layout, solve_layout
from ..parallel.sharding.config import TORCH, Backend, EngineConfig
from .attention_case import attention_case, estimated_kernel
from .optimizer_residency import ON_DEVICE, Residency, residency_of

if TYPE_CHECKING:  # plans are shared, runtimes and the launcher are not
    from ..checkpoint.config import CheckpointConfig
    from ..cluster.config import ClusterConfig
    from ..cluster.rates import MeasuredRates
    from ..model.config import ModelConfig
    from ..model.spec import ModelSpec
    from ..training.config import TrainConfig
    from ..training.data.config import DataConfig
    from ..training.optimizers.config import OptimConfig

GIB = 1 << 30
BUSIEST_RANK = 1.5
"""Rows that the busiest of the ranks that share experts gets, over the mean: assumed, for routing is known when it happens."""
_WIDTHS = {"bfloat16": 2, "float32": 4, "float64": 8}
_PARTS = ("spec", "parallel", "memory", "train", "data", "cluster", "residency", "measured", "adapter", "engine")
"""What the other fields follow from."""


class Configured(Protocol):
    """What estimates read of a whole configuration; training reads `logging` too (training.run_settings.RunSettings)."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def adapter(self) -> AdapterConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def memory(self) -> MemoryConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def cluster(self) -> ClusterConfig: ...
    @property
    def engine(self) -> EngineConfig: ...


@dataclass(frozen=True, slots=True)
class LayerSums:
    """Sums over the decoder layers, made once: estimates ask for them thousands of times, and models have hundreds of layers."""

    largest: int
    """Weights of the largest layer."""
    active: int
    """Weights of all layers that one token is multiplied with."""
    totals: tuple[int, ...]
    """Weights of the layers from each one on; 0 behind the last."""
    largest_dense: int = 0
    """Weights of the largest layer without experts, beside layers with them; 0: there is none."""

    @classmethod
    def of(cls, layers: Sequence[LayerParameters]) -> LayerSums:
        """Sums of one or more layers."""
        from_the_end = accumulate((layer.total for layer in reversed(layers)), initial=0)
        routed = any(layer.experts for layer in layers)
        dense = max((layer.total for layer in layers if routed and not layer.experts), default=0)
        return cls(max(layer.total for layer in layers), sum(layer.active for layer in layers), tuple(from_the_end)[::-1], dense)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanInputs:
    """All a ledger depends on."""

    spec: ModelSpec
    parallel: ParallelConfig
    memory: MemoryConfig
    """Memory options as configured; `policy` is what they come to."""
    policy: MemoryPolicy
    train: TrainConfig
    data: DataConfig
    cluster: ClusterConfig
    layout: Layout
    layers: tuple[LayerParameters, ...]
    """Weights of each decoder layer."""
    layer_sums: LayerSums
    """Sums of `layers`."""
    parameters: int
    residency: Residency = field(default_factory=Residency)
    measured: MeasuredRates | None = None
    """Rates that stand in place of the cluster's."""
    adapter: AdapterConfig = NO_ADAPTER
    """Adapters that are trained beside a frozen model; their weights are in all counts of weights."""
    engine: EngineConfig = TORCH
    """Engine that shards and updates."""
    packed: float = 1.0
    """Share of a rank's tokens in two documents that attention walks one after the other; 0: every pack is one document."""
    in_flight: int = 1
    """Micro-batches that went forward and wait for their backward, at most at one time, the live one counted."""
    has_embedding: bool = True
    has_head: bool = True
    """False: another stage has it; this one sends its last layer's output on."""
    num_parts: int = 1
    """Runs of layers that are not next to each other: virtual stages of the rank."""
    whole: ModelSpec | None = None
    """The model that these inputs are a stage of; None: they are of all of it."""

    def stage(self, *parts: range, in_flight: int = 1, has_embedding: bool | None = None, has_head: bool | None = None) -> PlanInputs:
        """These inputs for ranks that hold these runs of decoder layers alone, numbered from 0 to L - 1 in the whole model.

        `has_embedding`, `has_head`: also the embedding, also last norm and head; None: with the first layer, with the last. A tied
        matrix counts on each stage that uses it. `in_flight`: as the field. ValueError for layers the model does not have.
        """
        count = self.spec.num_layers
        if any(not part or part.step != 1 or part.start < 0 or part.stop > count for part in parts) or not parts or in_flight < 1:
            raise ValueError(f"a stage of {parts} with {in_flight} micro-batches in flight, of a model of {count} layers")
        embedding = parts[0].start == 0 if has_embedding is None else has_embedding
        head = parts[-1].stop == count if has_head is None else has_head
        matrix, both_tied = self.spec.vocab_size * self.spec.hidden_size, self.spec.tie_embeddings and embedding and head
        # Adapters are in the layers' own counts.
        ends = matrix * (embedding + head - both_tied) + self.spec.hidden_size * head
        numbers = tuple(layer for part in parts for layer in part)
        own = tuple(self.layers[layer] for layer in numbers)
        return replace(
            self,
            spec=self.spec.of_layers(numbers),
            layers=own,
            layer_sums=LayerSums.of(own),
            parameters=sum(layer.total for layer in own) + ends,
            in_flight=in_flight,
            has_embedding=embedding,
            has_head=head,
            num_parts=len(parts),
            whole=self.whole or self.spec,
        )

    @classmethod
    def of(cls, config: Configured, measured: MeasuredRates | None = None) -> PlanInputs:
        """Inputs of a configuration, with nothing decided that is left open; ConfigError where no layout exists.

        `measured`: rates in place of the cluster's, by which times are estimated (estimate/measured/find_rates.py).
        """
        return cls.make(
            spec=model_spec(config.model),
            parallel=config.parallel,
            memory=config.memory,
            train=config.train,
            data=config.data,
            cluster=config.cluster,
            residency=residency_of(config.optim, config.checkpoint),
            measured=measured,
            adapter=config.adapter,
            engine=config.engine,
        )

    @classmethod
    def make(
        cls,
        *,
        spec: ModelSpec,
        parallel: ParallelConfig,
        memory: MemoryConfig,
        train: TrainConfig,
        data: DataConfig,
        cluster: ClusterConfig,
        residency: Residency = ON_DEVICE,
        measured: MeasuredRates | None = None,
        adapter: AdapterConfig = NO_ADAPTER,
        engine: EngineConfig = TORCH,
    ) -> PlanInputs:
        """`of` from parts, for what has no whole configuration: layout, policy and counts follow from them."""
        check_cluster(cluster)
        beside = trained_numbers(adapter, spec).adapter
        layers = tuple(LayerParameters(each.total + beside, each.active + beside) for each in layer_parameters(spec))
        return cls(
            spec=spec,
            parallel=parallel,
            memory=memory,
            policy=MemoryPolicy() if memory.solve else explicit_policy(memory),
            train=train,
            data=data,
            cluster=cluster,
            layout=solve_layout(parallel, cluster, spec, max_seq_len=data.max_seq_len, global_batch_tokens=data.global_batch_tokens),
            layers=layers,
            layer_sums=LayerSums.of(layers),
            parameters=num_parameters(spec) + spec.num_layers * beside,
            residency=residency,
            measured=measured,
            adapter=adapter,
            engine=engine,
        )

    def with_parts(self, **changes: Any) -> PlanInputs:
        """Inputs of the whole model made from the same parts but for `changes`: layout and policy are chosen anew."""
        parts = {name: getattr(self, name) for name in _PARTS} | {"spec": self.whole or self.spec}
        return PlanInputs.make(**parts | changes)

    @property
    def width(self) -> int:
        """Bytes of one number in computation."""
        return _WIDTHS[self.train.dtype.value]

    @property
    def master(self) -> int:
        """Bytes of one master weight, gradient or optimizer number; also of accumulations."""
        return max(4, self.width)

    @property
    def passes(self) -> int:
        """Forward and backward passes of a step: those of its micro-batches, twice where the norm is measured first."""
        return self.layout.num_micro_batches * (2 if self.residency.two_passes else 1)

    @property
    def tokens(self) -> int:
        return self.layout.tokens_per_rank

    @property
    def piece_tokens(self) -> int:
        """Most rows that token-local work has at one time: cut by chunks and where a class changes its place (memory/ranges.py)."""
        return self.tokens if self.policy.graph else _largest_piece(self.policy, self.tokens)

    @property
    def in_pieces(self) -> bool:
        return self.piece_tokens < self.tokens

    @property
    def segment_layers(self) -> int:
        """Layers that share one stored input."""
        return 1 if self.policy.graph else min(self.policy.segment_layers, self.spec.num_layers)

    @property
    def stored_inputs(self) -> int:
        """Layer inputs there are when backward starts in the last segment: one a segment, and the live segment's own."""
        # A segment ends where a run of layers does.
        cut = (self.num_parts - 1) * (self.segment_layers > 1)
        return -(-self.spec.num_layers // self.segment_layers) + self.segment_layers - 1 + cut

    @property
    def by_chunks(self) -> bool:
        """Whether attention walks over chunks of queries; with a ring it works on all rows (memory/executor/layer.py)."""
        return not self.policy.graph and self.policy.attention is AttentionTiling.CHUNKS and self.layout.ring == 1

    @property
    def head_parameters(self) -> int:
        """The output matrix, where it is here, tied or not."""
        return self.spec.vocab_size * self.spec.hidden_size * self.has_head

    @property
    def root_parameters(self) -> int:
        """Embedding, head and last norm, as far as they are here: what is not in a decoder layer."""
        return self.parameters - self.decoder_parameters()

    @property
    def layer_parameters(self) -> int:
        """Weights of the largest decoder layer: what gathers, reductions and sums of one layer need room for."""
        return self.layer_sums.largest

    @property
    def expert_parallel(self) -> int:
        """Ranks that share the experts of a layer."""
        return self.parallel.experts.ep

    @property
    def row_share(self) -> float:
        """Rows that a rank's experts get, over those its own tokens send: 1 with all experts, an assumption where ranks share them."""
        return BUSIEST_RANK if self.expert_parallel > 1 else 1.0

    @property
    def parameters_elsewhere(self) -> int:
        """Weights of one layer with experts that this rank never gathers: those of experts on other ranks."""
        if not self.spec.expert_layers:
            return 0
        return expert_weights(self.spec) // self.expert_parallel * (self.expert_parallel - 1)

    @property
    def gathered_layer_parameters(self) -> int:
        """Weights of the largest decoder layer that one rank computes with."""
        return max(self.layer_parameters - self.parameters_elsewhere, self.layer_sums.largest_dense)

    @property
    def gathered_parameters(self) -> int:
        """Weights of the stage that one rank computes with."""
        return self.parameters - self.spec.expert_layers * self.parameters_elsewhere

    def decoder_parameters(self, first: int = 0) -> int:
        """Weights of the decoder layers from `first` on."""
        return self.layer_sums.totals[min(first, len(self.layers))]

    @property
    def active_parameters(self) -> int:
        """Weights of all decoder layers that one token is multiplied with."""
        return self.layer_sums.active

    @property
    def active_layer_parameters(self) -> float:
        """The mean of them over the layers."""
        return self.active_parameters / self.spec.num_layers

    @property
    def trains_all(self) -> bool:
        """Whether every weight is trained; otherwise the model is frozen and the properties below count what is not."""
        return not self.adapter.is_trained

    @property
    def adapter_layer_parameters(self) -> int:
        """Numbers of one layer's adapters; 0 without."""
        return trained_numbers(self.adapter, self.spec).adapter

    @property
    def makes_reference(self) -> bool:
        """Whether each step has one forward pass more, of the frozen model: DPO's reference (training/objectives/implicit_reference.py)."""
        return self.train.objective.value == "dpo" and self.adapter.leaves_reference

    @property
    def adapter_inner_flops(self) -> float:
        """FLOPs of one token's x A^T in all adapters of a layer, for each product through a fused matrix anew."""
        return 2.0 * self.adapter.rank * sum(matrix.columns * matrix.products for matrix in targets(self.adapter, self.spec))

    @property
    def turned_layer_parameters(self) -> int:
        """Weights of one layer's matrices whose rows have a trained length (adapter.dora)."""
        return sum(matrix.rows * matrix.columns for matrix in targets(self.adapter, self.spec)) if self.adapter.dora else 0

    @property
    def packed_layer_parameters(self) -> int:
        """Weights of one decoder layer that are packed in NF4 (adapter=qlora)."""
        return sum(matrix.rows * matrix.columns for matrix in quantized(self.adapter, self.spec))

    @property
    def packed_layer_savings(self) -> int:
        """Bytes that one decoder layer takes less, frozen and gathered, than with all of it in compute precision."""
        if not self.adapter.quantizes:  # asked for by several terms of every policy the solver looks at
            return 0
        return self.width * self.packed_layer_parameters - sum(matrix.packed_bytes for matrix in quantized(self.adapter, self.spec))

    @property
    def trains_norms(self) -> bool:
        """Whether the layers' norms are trained."""
        return self.trains_all or "norms" in self.adapter.modules_to_save

    @property
    def trained_layer_parameters(self) -> int:
        """Trained weights of the largest decoder layer that one rank computes with."""
        return self.gathered_layer_parameters if self.trains_all else trained_numbers(self.adapter, self.spec).layer

    @property
    def trained_head_parameters(self) -> int:
        """The output matrix, where it is here and trained."""
        return self.head_parameters if self.trains_all else trained_numbers(self.adapter, self.spec).head * self.has_head

    @property
    def trained_root_parameters(self) -> int:
        """Trained weights of what is not in a decoder layer."""
        if self.trains_all:
            return self.root_parameters
        numbers = trained_numbers(self.adapter, self.spec)
        return numbers.embedding * self.has_embedding + (numbers.head + numbers.last_norm) * self.has_head

    @property
    def trained_gathered_parameters(self) -> int:
        """Trained weights of the stage that one rank computes with: whole gradients are of these."""
        return self.gathered_parameters if self.trains_all else self.trained_parameters

    @property
    def trained_parameters(self) -> int:
        """Trained weights of the stage: gradients, masters, moments and checkpoints are of these."""
        return self.parameters if self.trains_all else self.trained_decoder_parameters() + self.trained_root_parameters

    def trained_decoder_parameters(self, first: int = 0) -> int:
        """Trained weights of the decoder layers from `first` on."""
        if self.trains_all:
            return self.decoder_parameters(first)
        return max(0, len(self.layers) - first) * self.trained_layer_parameters

    @property
    def gemm_rate(self) -> float:
        """FLOP/s of one rank in matrix products."""
        return self.cluster.peak_flops * self.cluster.gemm_efficiency

    @property
    def attention_kernel(self) -> RatedKernel:
        """The kernel that time and memory are estimated for."""
        dtype, length, ordered = self.train.dtype.value, self.data.max_seq_len, self.train.deterministic
        case = attention_case(self.whole or self.spec, self.layout, dtype=dtype, max_seq_len=length, deterministic=ordered)
        return estimated_kernel(self.parallel.attention_kernel, case, self.cluster.gpu)

    @property
    def attention_rate(self) -> AttentionRate:
        """FLOP/s of one rank in that kernel, forward and backward."""
        is_open = self.parallel.attention_kernel is AttentionKernel.AUTO
        rate = attention_rate(self.cluster, self.attention_kernel, or_nearest=is_open)
        return in_order(rate, self.attention_kernel) if self.sums_in_order else rate

    @property
    def sums_in_order(self) -> bool:
        """Whether a flash kernel's backward is told to add in the same order every time (train.deterministic)."""
        return self.train.deterministic and self.on_gpu and self.width == 2

    @property
    def on_gpu(self) -> bool:
        return self.cluster.device.value == "cuda"

    @property
    def kv_copies(self) -> int:
        """Key/value numbers per token between the Ulysses exchanges, over those before it: above 1 where heads are replicated."""
        return max(1, -(-self.layout.ulysses // self.spec.num_kv_heads))


@lru_cache(maxsize=64)  # asked for by every term of every policy the solver looks at
def _largest_piece(policy: MemoryPolicy, tokens: int) -> int:
    inside = [split for split in policy.splits.values() if 0.0 < split.keep < 1.0 or 0.0 < split.keep + split.host < 1.0]
    cuts = sorted({0, tokens, *(row for split in inside for row in split.rows(tokens))})
    largest = max(stop - start for start, stop in pairwise(cuts)) if len(cuts) > 1 else 0
    return min(largest, policy.chunk_tokens or largest)


def reduction_of_engine(inputs: PlanInputs) -> GradReduce | None:
    """When gradients are reduced, where the engine's stage says so and there is nothing to choose; None: FSDP2 does either."""
    if inputs.engine.backend is not Backend.DEEPSPEED:
        return None
    return GradReduce.STEP if inputs.engine.stage == 1 else GradReduce.MICRO_BATCH


def reduces_once(inputs: PlanInputs) -> bool:
    """Whether gradients of several micro-batches pile up whole before they are reduced."""
    # An adaptive plan may have more micro-batches than the static one of longest sequences.
    several = inputs.layout.num_micro_batches > 1 or inputs.parallel.sequence is SequenceMode.ADAPTIVE or inputs.parallel.barrier_free
    return inputs.parallel.grad_reduce is GradReduce.STEP and several
