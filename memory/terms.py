"""What one rank must hold, one function per term. Pure; bytes everywhere, tokens are of one rank in one micro-batch.

Note: phases. Peaks of different terms do not fall together, so each term says how much it holds in each phase:
`forward` (the last layer's), `loss`, `backward mlp` and `backward attention` (of the last layer, when all layer inputs are
still there), `reduce` (the end of backward: embedding and head) and `optimizer`. A phase's sum is what must fit.

Note: the formulas follow the executors: memory/layer.py (two halves, each freed before the next), training/loss.py,
parallel/sharding.py (FSDP2, next layer prefetched, last reduction's input alive until the next) and
parallel/sequence/{ulysses,ring}.py. tests/memory/test_ledger_measured.py compares them with a traced run.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ..parallel.config import GradReduce, ParallelConfig, SequenceMode
from ..parallel.layout import Layout
from .config import MemoryConfig
from .policy import MemoryPolicy

if TYPE_CHECKING:  # plans are shared, runtimes and the launcher are not
    from ..parallel.config import ClusterConfig
    from ..training.config import DataConfig, TrainConfig
    from ..training.spec import ModelSpec

GIB = 1 << 30


class Phase(Enum):
    """A moment of the step at which some term is at its largest."""

    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD_MLP = "backward mlp"
    BACKWARD_ATTENTION = "backward attention"
    REDUCE = "reduce"
    OPTIMIZER = "optimizer"


@dataclass(frozen=True, slots=True)
class Term:
    """Something that takes memory: bytes in each phase it exists in."""

    name: str
    note: str
    by_phase: dict[Phase, int]

    @property
    def num_bytes(self) -> int:
        """The most it ever takes."""
        return max(self.by_phase.values(), default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """All a ledger depends on."""

    spec: ModelSpec
    parallel: ParallelConfig
    memory: MemoryConfig
    """As configured; `policy` is what it comes to."""
    policy: MemoryPolicy
    train: TrainConfig
    data: DataConfig
    cluster: ClusterConfig
    layout: Layout
    layer_parameters: int
    parameters: int

    @property
    def width(self) -> int:
        """Bytes of one number in computation."""
        return {"bfloat16": 2, "float32": 4, "float64": 8}[self.train.dtype.value]

    @property
    def master(self) -> int:
        """Bytes of one master weight, gradient or optimizer number; also of accumulations."""
        return max(4, self.width)

    @property
    def tokens(self) -> int:
        return self.layout.tokens_per_rank

    @property
    def chunk_tokens(self) -> int | None:
        """Rows a layer's token-local work has at one time, where that is fewer than all."""
        chunk = self.policy.chunk_tokens
        return chunk if chunk is not None and chunk < self.tokens and not self.policy.graph else None

    @property
    def root_parameters(self) -> int:
        """Embedding, head and last norm: what is not in a decoder layer."""
        return self.parameters - self.spec.num_layers * self.layer_parameters

    @property
    def on_gpu(self) -> bool:
        return self.cluster.device.value == "cuda"

    @property
    def kv_copies(self) -> int:
        """Key/value numbers per token between the Ulysses exchanges, over those before it: above 1 where heads are replicated."""
        return max(1, -(-self.layout.ulysses // self.spec.num_kv_heads))


BACKWARD = (Phase.BACKWARD_MLP, Phase.BACKWARD_ATTENTION)
ALL = tuple(Phase)
COMPUTE = (Phase.FORWARD, Phase.LOSS, *BACKWARD, Phase.REDUCE)


def term(name: str, note: str, num_bytes: float, phases: tuple[Phase, ...] = ALL) -> Term:
    """The same number of bytes in each of `phases`."""
    return Term(name, note, {phase: int(num_bytes) for phase in phases})


def weights(s: Setting) -> Term:
    return term("weights", f"float{8 * s.master} master, 1/{s.layout.shard} of each", s.master * s.parameters / s.layout.shard)


def optimizer_states(s: Setting) -> Term:
    return term(
        "optimizer states", f"two float{8 * s.master} moments, 1/{s.layout.shard} of each", 2 * s.master * s.parameters / s.layout.shard
    )


def reduces_once(s: Setting) -> bool:
    """Whether gradients of several micro-batches pile up whole before they are reduced."""
    # An adaptive plan may have more micro-batches than the static one of longest sequences.
    several = s.layout.num_micro_batches > 1 or s.parallel.sequence is SequenceMode.ADAPTIVE or s.parallel.barrier_free
    return s.parallel.grad_reduce is GradReduce.STEP and several


def gradients(s: Setting) -> Term:
    """In the only or last micro-batch they grow as layer inputs (or whole gradients) go: beside all of those there are none yet."""
    total = s.master * s.parameters // s.layout.shard
    early = 0 if s.layout.num_micro_batches == 1 or reduces_once(s) else total
    growing = 0 if reduces_once(s) else max(early, total - kept_bytes(s))
    held = {Phase.FORWARD: early, Phase.LOSS: early} | dict.fromkeys(BACKWARD, growing)
    return Term("gradients", f"float{8 * s.master}, 1/{s.layout.shard} of each", held | {Phase.REDUCE: total, Phase.OPTIMIZER: total})


def whole_gradients(s: Setting) -> Term:
    """Reduced once per step, gradients of all weights pile up unsharded; at the end only those of embedding and head are left."""
    whole = s.master * s.parameters * reduces_once(s)
    held = dict.fromkeys((Phase.FORWARD, Phase.LOSS, *BACKWARD), whole)
    return Term(
        "gradients, whole",
        "kept over micro-batches, reduced once a step",
        held | {Phase.REDUCE: s.master * s.root_parameters * reduces_once(s)},
    )


def gathered_root(s: Setting) -> Term:
    return term(
        "embedding and head, gathered", "in compute precision, from forward to the end of backward", s.width * s.root_parameters, COMPUTE
    )


def gathered_layers(s: Setting) -> Term:
    phases = (Phase.FORWARD, *BACKWARD)
    if s.parallel.barrier_free:
        note = "all layers, in compute precision, from the first micro-batch to the last"
        return term("layers, gathered", note, s.width * s.spec.num_layers * s.layer_parameters, (Phase.LOSS, *phases))
    return term("layers, gathered", "the running layer and the next, in compute precision", 2 * s.width * s.layer_parameters, phases)


def layer_gradients(s: Setting) -> Term:
    note = "one layer's gradients, and the buffer of the reduction before"
    return term("layer gradients and reduction", note, (s.width + s.master) * s.layer_parameters, BACKWARD)


def head_gradient(s: Setting) -> Term:
    head = s.spec.vocab_size * s.spec.hidden_size
    root = s.root_parameters
    held = {Phase.LOSS: (s.master + s.width) * head} | dict.fromkeys(BACKWARD, s.width * head)
    # At the end: both gradients, and the same again as the reduction's input in master precision.
    return Term(
        "head and embedding gradients",
        f"summed in float{8 * s.master} over chunks, reduced last",
        held | {Phase.REDUCE: (s.width + s.master) * root},
    )


def layer_inputs(s: Setting) -> Term:
    note = f"{s.spec.num_layers} layers, one hidden vector a token"
    kept = s.spec.num_layers * s.spec.hidden_size * s.width * s.tokens
    return Term("layer inputs", note, dict.fromkeys((Phase.FORWARD, Phase.LOSS, *BACKWARD), kept))


def kept_bytes(s: Setting) -> int:
    """What forward leaves for the backward of all layers."""
    return sum(made.num_bytes for made in (layer_inputs(s), attention_outputs(s), activations(s)))


def attention_outputs(s: Setting) -> Term:
    kept = s.policy.attention_output.keep > 0 and not s.policy.graph
    per_token = s.spec.query_size * s.width + s.spec.num_heads * s.master
    num_bytes = s.spec.num_layers * per_token * s.tokens * kept
    return term("attention outputs kept", "output and log-sum-exp of every layer", num_bytes, (Phase.FORWARD, Phase.LOSS, *BACKWARD))


def activations(s: Setting) -> Term:
    """With `keep`, what every layer but the last leaves for its backward (the last is the live layer)."""
    kept = s.policy.graph
    num_bytes = (s.spec.num_layers - 1) * saved_per_token(s) * s.tokens * kept
    return Term(
        "activations kept", "all that the other layers' backward needs", dict.fromkeys((Phase.FORWARD, Phase.LOSS, *BACKWARD), num_bytes)
    )


def live_layer(s: Setting) -> Term:
    """Token-local work of the layer that runs: projections, norms, feed-forward, and their gradients."""
    if s.chunk_tokens is not None:
        return live_layer_by_chunks(s, s.chunk_tokens)
    hidden, inner = s.spec.hidden_size * s.width, s.spec.intermediate_size * s.width
    saved = saved_per_token(s)
    forward = saved if s.policy.graph else max(3 * inner + 4 * hidden, before_attention_saved_per_token(s)) + attention_saved_per_token(s)
    by_phase = {
        Phase.FORWARD: forward,
        Phase.LOSS: saved if s.policy.graph else 0,
        # Gate, its activation and up, and their three gradients: 6 inner; dy, y and dx beside them.
        Phase.BACKWARD_MLP: saved + 2 * inner + 3 * hidden,
        Phase.BACKWARD_ATTENTION: before_attention_saved_per_token(s) + attention_saved_per_token(s) + 2 * hidden,
    }
    note = "saved for and made by one layer's forward and backward"
    return Term("live layer", note, {phase: per_token * s.tokens for phase, per_token in by_phase.items()})


def live_layer_by_chunks(s: Setting, chunk: int) -> Term:
    """Rows that attention needs are there for all tokens, what is between them for one chunk (memory/layer.py)."""
    hidden, inner = s.spec.hidden_size * s.width, s.spec.intermediate_size * s.width
    queries, keys = s.width * s.spec.query_size, 2 * s.width * s.spec.kv_size
    # With one Ulysses rank the projections are what attention reads; otherwise their exchanged copies are counted with it.
    attention = attention_saved_per_token(s) + (queries + keys if s.layout.ulysses == 1 else 0)
    after = saved_per_token(s) - before_attention_saved_per_token(s) - attention_saved_per_token(s) + 2 * inner + 3 * hidden
    before = before_attention_saved_per_token(s) + hidden
    per_token_and_chunk = {
        Phase.FORWARD: (attention + hidden, max(3 * inner + 4 * hidden, before)),
        # dx of the second half and do for all rows, and dy from the layer above.
        Phase.BACKWARD_MLP: (attention + queries + 2 * hidden, after),
        # Attention's own gradients are counted with K/V; after it only q, k, v gradients and both dx are left beside a chunk.
        Phase.BACKWARD_ATTENTION: (max(attention + queries + 2 * hidden, queries + keys + 3 * hidden), 0),
    }
    by_phase = {phase: whole * s.tokens + part * chunk for phase, (whole, part) in per_token_and_chunk.items()}
    return Term("live layer", f"what attention reads and makes; the rest of one layer {chunk} tokens at a time", by_phase)


def saved_per_token(s: Setting) -> int:
    """Bytes a token leaves in one layer between its forward and its backward, besides the layer's input."""
    after_norms = norm_bytes(s) * s.spec.hidden_size * (s.spec.norms_per_layer - 1)
    residual = s.spec.hidden_size * s.width if s.width == 4 else 0  # bfloat16 norms save a float32 copy instead
    mlp = 4 * s.spec.intermediate_size * s.width
    return before_attention_saved_per_token(s) + attention_saved_per_token(s) + after_norms + residual + mlp


def before_attention_saved_per_token(s: Setting) -> int:
    """First norm, projections q, k, v, and their own norms where the family has them."""
    projected = s.spec.query_size + 2 * s.spec.kv_size
    per_head = norm_bytes(s) * (s.spec.query_size + s.spec.kv_size) * s.spec.qk_norm
    return norm_bytes(s) * s.spec.hidden_size + s.width * projected + per_head


def attention_saved_per_token(s: Setting) -> int:
    """Output and log-sum-exp; beyond one Ulysses rank the exchanged q, k, v and the output on both sides."""
    output, lse = s.spec.query_size * s.width, s.spec.num_heads * s.master
    if s.layout.ulysses == 1:
        return output + lse
    return 2 * output + lse + s.width * (s.spec.query_size + 2 * s.kv_copies * s.spec.kv_size)


def norm_bytes(s: Setting) -> int:
    """Bytes per number that an RMS norm and the product after it save: float32 copy, normalised value and output."""
    return {2: 8, 4: 8, 8: 20}[s.width]


def keys_and_values(s: Setting) -> Term:
    """What attention itself makes: visiting keys and values of a ring, merged outputs, and the gradients of q, k, v."""
    kv, queries = 2 * s.kv_copies * s.spec.kv_size, s.spec.query_size
    ring = s.layout.ring > 1
    travelling = 2 * s.width * kv * ring
    forward = travelling + s.master * queries
    # Gradients in float32, the kernel's own results beside them, and do on both sides of the exchange.
    backward = (s.master + s.width) * (queries + kv) + 2 * s.width * queries + travelling + 2 * s.master * kv * ring
    workspace = (2 * s.width + s.master) * queries if s.on_gpu else 0
    by_phase = {Phase.FORWARD: forward, Phase.BACKWARD_ATTENTION: backward + workspace}
    note = f"ring of {s.layout.ring}, heads over {s.layout.ulysses}" + (f", each KV head on {s.kv_copies} ranks" if s.kv_copies > 1 else "")
    return Term("K/V and attention gradients", note, {phase: per_token * s.tokens for phase, per_token in by_phase.items()})


def loss_chunk(s: Setting) -> Term:
    """Logits of one chunk: in compute precision, in float32, and one float32 temporary."""
    per_logit = s.master + (s.width if s.width < s.master else 0) + s.master
    chunk = min(s.train.loss_chunk_tokens, s.tokens)
    return term("loss chunk", f"logits of {chunk} tokens x {s.spec.vocab_size}", per_logit * s.spec.vocab_size * chunk, (Phase.LOSS,))


def last_hidden(s: Setting) -> Term:
    """Around the last norm: the last layer's output, what its norm saves, and the gradient of the hidden vectors."""
    per_token = (norm_bytes(s) + 2 * s.width) * s.spec.hidden_size
    held = {Phase.LOSS: per_token, Phase.BACKWARD_MLP: s.width * s.spec.hidden_size}
    return Term("last hidden vectors", "output of the last layer, its norm and its gradient", {p: n * s.tokens for p, n in held.items()})


def batch(s: Setting) -> Term:
    """Token, target and position ids, and rotary tables."""
    per_token = 3 * 8 + 2 * s.spec.head_dim * s.width
    return term("batch and rotary tables", "ids of the micro-batch, cos and sin", per_token * s.tokens, COMPUTE)


def communicators(s: Setting) -> Term:
    """One communicator per power of two of ranks, and the mesh's own; on GPUs each has buffers."""
    count = s.layout.world_size.bit_length() if s.layout.world_size > 1 else 0
    each = GIB // 4 if s.on_gpu else 8 << 20
    return term("communicators", f"{count} groups of ranks, about {each >> 20} MiB each (assumed)", count * each)


def context(s: Setting) -> Term:
    num_bytes, note = (2 * GIB, "CUDA context, libraries (assumed)") if s.on_gpu else (GIB // 2, "Python and torch (assumed)")
    return term("context", note, num_bytes)


def reserve(s: Setting) -> Term:
    share = 0.03 if s.on_gpu else 0.0
    return term("allocator reserve", "3 % of the device lost between blocks (assumed)", share * s.cluster.device_memory_bytes)


def device_terms(s: Setting) -> tuple[Term, ...]:
    """Every term of one rank, those of no bytes left out."""
    makers = (
        weights, optimizer_states, gradients, whole_gradients, gathered_root, gathered_layers, layer_gradients, head_gradient,
        layer_inputs, attention_outputs, activations, live_layer, keys_and_values, loss_chunk, last_hidden, batch,
        communicators, context, reserve,
    )  # fmt: skip
    return tuple(made for made in (make(s) for make in makers) if made.num_bytes)
