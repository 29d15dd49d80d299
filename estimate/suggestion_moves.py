"""Single changes of a configuration that may make it fit, the least of each kind first; estimate/suggestions.py proves them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ..memory.config import ActivationPlace, MemoryConfig
from ..model.adapters.config import AdapterConfig, AdapterMethod
from ..model.adapters.targets import matrices
from ..parallel.config import GradReduce, ParallelConfig, SequenceMode
from ..parallel.sharding.config import Backend
from ..units import format_tokens
from .optimizer_residency import MOMENT_BYTES
from .plan_inputs import GIB, PlanInputs
from .solver.report import ordinal
from .solver.shapes import SEGMENTS
from .timing.bandwidth import host_update_rate


@dataclass(frozen=True, slots=True)
class Change:
    """Overrides to type, in words what they do, and the setting they make."""

    overrides: tuple[str, ...]
    reason: str
    inputs: PlanInputs

    def then(self, other: Change | None) -> Change:
        """Both, where `other` starts from this one's setting."""
        if other is None:
            return self
        return Change(self.overrides + other.overrides, "; ".join(filter(None, (self.reason, other.reason))), other.inputs)


Move = Callable[[PlanInputs], Iterator[Change]]
"""Changes of one kind, the least intrusive first."""

OPEN = ("layer_input", "attention_output", "activations", "host_fraction", "segment_layers", "chunk_tokens", "attention", "head_groups")
"""Fields of MemoryConfig that the solver decides where they are null."""
_BESIDE = ("segment_layers", "chunk_tokens", "attention", "head_groups")
"""Fields that an experiment sets beside its memory preset."""


LORA = AdapterConfig(name="lora", method=AdapterMethod.LORA)
"""What adapter=lora asks for (conf/adapter/lora.yaml)."""


def _has_every_setting(inputs: PlanInputs) -> bool:
    """Whether the engine runs whatever can be configured; DeepSpeed's refuses what some moves type (parallel/sharding/engine.py)."""
    return inputs.engine.backend is Backend.TORCH


def _higher_stage(inputs: PlanInputs) -> Iterator[Change]:
    """More of what ZeRO can shard."""
    if not _has_every_setting(inputs):
        for stage, shards in ((2, "gradients are sharded too"), (3, "gradients and weights are sharded too")):
            if stage > (inputs.engine.stage or 0):
                yield Change((f"engine.stage={stage}",), shards, replace(inputs, engine=replace(inputs.engine, stage=stage)))


def _auto(inputs: PlanInputs) -> Iterator[Change]:
    """Let the solver decide, first what is open, then also what was given."""
    given = [key for key in OPEN if getattr(inputs.memory, key) is not None]
    if inputs.memory.solve and not given:
        return
    overrides = tuple(f"memory.{key}=null" for key in (given if inputs.memory.solve else [key for key in given if key in _BESIDE]))
    memory = MemoryConfig(
        name="auto", solve=True, host_budget=inputs.memory.host_budget, offload_dir=inputs.memory.offload_dir, arena=inputs.memory.arena
    )
    if inputs.memory.solve:
        yield Change(overrides, "the solver may choose what was given", replace(inputs, memory=memory))
    else:
        yield Change(
            ("memory=auto", *overrides), "what is kept, moved and recomputed is solved to the budget", replace(inputs, memory=memory)
        )


def _states_on_host(inputs: PlanInputs) -> Iterator[Change]:
    if _has_every_setting(inputs) and inputs.residency.is_adamw and not inputs.residency.on_host:
        moved = replace(inputs, residency=replace(inputs.residency, on_host=True))
        unknown = "; the time of that is not in the estimate" if host_update_rate(moved).bytes_per_s is None else ""
        yield Change(("optim.state_device=host",), f"float32 weights and moments on the host and updated there{unknown}", moved)


def _in_backward(inputs: PlanInputs) -> Iterator[Change]:
    """Gradients are freed layer by layer; with a norm to clip by only after a pass of its own."""
    if _has_every_setting(inputs) and inputs.residency.is_adamw and not inputs.residency.in_backward:
        clipped = inputs.residency.clipped
        overrides = ("optim.update=backward", *(("optim.clip_mode=two_pass",) if clipped else ()))
        twice = "; exact, but forward and backward run twice, first for the norm to clip by" if clipped else ""
        changed = replace(inputs, residency=replace(inputs.residency, in_backward=True, two_passes=clipped))
        yield Change(overrides, f"each layer is updated in backward and its gradients freed{twice}", changed)


def _few_bits(inputs: PlanInputs) -> Iterator[Change]:
    if _has_every_setting(inputs) and inputs.residency.is_adamw and inputs.residency.moment_bytes is None and inputs.width < 8:
        changed = replace(inputs.residency, moment_bytes=MOMENT_BYTES["8bit"])
        yield Change(("optim.state_dtype=8bit",), "moments in 8 bits: NOT EXACT", replace(inputs, residency=changed))


def _whole_host(inputs: PlanInputs) -> Iterator[Change]:
    if inputs.memory.host_budget is not None and inputs.memory.offload_dir is None:
        memory = replace(inputs.memory, host_budget=None)
        yield Change(("memory.host_budget=null",), "all the host memory there is", replace(inputs, memory=memory))


def _adapters(inputs: PlanInputs) -> Iterator[Change]:
    """Low-rank adapters on a frozen model: no masters, moments and gradients of its weights. Another training, so not among SETTINGS."""
    rank = min(LORA.rank, *(min(matrix.rows, matrix.columns) for matrix in matrices(inputs.spec)))
    simple = _has_every_setting(inputs) and not inputs.residency.orthogonalise_steps
    if simple and inputs.trains_all and rank == LORA.rank and inputs.expert_parallel == 1:
        dense = inputs.spec.experts is None
        adapter = LORA if dense else replace(LORA, targets=["attention"])
        overrides = ("adapter=lora",) if dense else ("adapter=lora", "adapter.targets=[attention]")
        words = "adapters are trained and the model is frozen: another result than training all of it"
        yield Change(overrides, words, replace(inputs, adapter=adapter))


def _files(inputs: PlanInputs) -> Iterator[Change]:
    """What waits on the host waits in files; whose directory is for its user to know."""
    moves = inputs.memory.solve or ActivationPlace.HOST in (
        inputs.memory.layer_input,
        inputs.memory.attention_output,
        inputs.memory.activations,
    )
    if inputs.memory.offload_dir is None and moves:
        reason = "activations wait in files instead of host memory; DIRECTORY stands for one on a local disk of every node"
        memory = replace(inputs.memory, offload_dir="DIRECTORY")
        yield Change(("memory.offload_dir=DIRECTORY",), reason, replace(inputs, memory=memory))


def _larger_host(inputs: PlanInputs) -> Iterator[Change]:
    for factor in (1.25, 1.5, 2, 3, 4, 8):
        size = max(1, round(factor * inputs.cluster.host_memory_bytes / GIB))
        cluster = replace(inputs.cluster, host_memory_bytes=size * GIB)
        yield Change((f"cluster.host_memory_bytes={size}GiB",), "nodes with more host memory", replace(inputs, cluster=cluster))


def _larger_device(inputs: PlanInputs) -> Iterator[Change]:
    place = "GPUs" if inputs.on_gpu else "ranks"
    for factor in (1.25, 1.5, 2, 3, 4, 8):
        size = max(1, round(factor * inputs.cluster.device_memory_bytes / GIB))
        cluster = replace(inputs.cluster, device_memory_bytes=size * GIB)
        yield Change((f"cluster.device_memory_bytes={size}GiB",), f"{place} with more memory", replace(inputs, cluster=cluster))


def _segments(inputs: PlanInputs) -> Iterator[Change]:
    if inputs.memory.solve or inputs.memory.activations is ActivationPlace.KEEP:
        return
    for every in SEGMENTS:
        if (inputs.memory.segment_layers or 1) < every <= inputs.spec.num_layers:
            words = f"only every {ordinal(every)} layer's input waits, the others are made again"
            yield Change((f"memory.segment_layers={every}",), words, replace(inputs, memory=replace(inputs.memory, segment_layers=every)))


def _recompute(inputs: PlanInputs) -> Iterator[Change]:
    if inputs.memory.solve:
        return
    if ActivationPlace.KEEP in (inputs.memory.activations, inputs.memory.attention_output):
        policy = MemoryConfig(
            name="recompute",
            layer_input=ActivationPlace.KEEP,
            attention_output=ActivationPlace.RECOMPUTE,
            activations=ActivationPlace.RECOMPUTE,
        )
        yield Change(("memory=recompute",), "layers run again in backward", replace(inputs, memory=policy))


def _chunks(inputs: PlanInputs) -> Iterator[Change]:
    if inputs.memory.activations is ActivationPlace.KEEP or inputs.memory.solve:
        return
    for chunk in (16384, 4096, 1024):
        if chunk < min(inputs.tokens, inputs.memory.chunk_tokens or inputs.tokens):
            memory = replace(inputs.memory, chunk_tokens=chunk)
            yield Change(
                (f"memory.chunk_tokens={format_tokens(chunk)}",), "norms, projections and MLP by chunks", replace(inputs, memory=memory)
            )


def _reduce_each(inputs: PlanInputs) -> Iterator[Change]:
    if _has_every_setting(inputs) and inputs.parallel.grad_reduce is GradReduce.STEP and inputs.layout.num_micro_batches > 1:
        parallel = replace(inputs.parallel, grad_reduce=GradReduce.MICRO_BATCH)
        yield Change(("parallel.grad_reduce=micro_batch",), "no whole gradients are kept", replace(inputs, parallel=parallel))


def _small_loss_chunks(inputs: PlanInputs) -> Iterator[Change]:
    for chunk in (1024, 512, 256):
        if chunk < inputs.train.loss_chunk_tokens:
            train = replace(inputs.train, loss_chunk_tokens=chunk)
            yield Change((f"train.loss_chunk_tokens={chunk}",), "fewer logits at a time", replace(inputs, train=train))


def _shard_more(inputs: PlanInputs) -> Iterator[Change]:
    if inputs.parallel.replicate > 1:
        parallel = replace(inputs.parallel, replicate=1, shard=None)
        yield Change(
            ("parallel.replicate=1", "parallel.shard=null"), "weights are sharded over all ranks", replace(inputs, parallel=parallel)
        )


def _spread(inputs: PlanInputs) -> Iterator[Change]:
    """Each sequence over more of the ranks there are: fewer tokens on each."""
    degree = inputs.layout.sp_degree
    while 2 * degree <= inputs.layout.stage_size:
        degree *= 2
        tokens = -(-inputs.data.max_seq_len // degree)
        overrides, parallel = _over(inputs, degree, tokens)
        yield Change(overrides, f"each sequence over {degree} ranks", replace(inputs, parallel=parallel))
    least = -(-inputs.data.max_seq_len // inputs.layout.sp_degree)
    if least < inputs.parallel.tokens_per_rank:
        parallel = replace(inputs.parallel, tokens_per_rank=least)
        yield Change(
            (f"parallel.tokens_per_rank={format_exact(least)}",), "one sequence a group at a time", replace(inputs, parallel=parallel)
        )


def _over(inputs: PlanInputs, degree: int, tokens: int) -> tuple[tuple[str, ...], ParallelConfig]:
    """What puts the longest sequence over `degree` ranks. Adaptive plans choose degrees themselves, by what a rank may hold."""
    adaptive = inputs.parallel.sequence is SequenceMode.ADAPTIVE
    overrides = (*(() if adaptive else (f"parallel.sp_degree={degree}",)), f"parallel.tokens_per_rank={format_exact(tokens)}")
    return overrides, replace(inputs.parallel, sp_degree=None if adaptive else degree, tokens_per_rank=tokens)


def _more_nodes(inputs: PlanInputs) -> Iterator[Change]:
    for factor in (2, 4, 8, 16, 32, 64):
        nodes = inputs.cluster.num_nodes * factor
        world = nodes * inputs.cluster.ranks_per_node
        degree = 1 << (world.bit_length() - 1)
        tokens = max(1, -(-inputs.data.max_seq_len // degree))
        spread, parallel = _over(inputs, degree, tokens)
        parallel, overrides = replace(parallel, shard=None), [f"cluster.num_nodes={nodes}", *spread]
        if inputs.parallel.shard is not None:
            overrides.append("parallel.shard=null")
        yield Change(
            tuple(overrides), f"{world} ranks", replace(inputs, parallel=parallel, cluster=replace(inputs.cluster, num_nodes=nodes))
        )


def shorter(inputs: PlanInputs) -> Iterator[Change]:
    """Half the longest sequence, and half of that, and so on."""
    length = inputs.data.max_seq_len
    for _ in range(16):
        length //= 2
        if length < inputs.layout.sp_degree:
            return
        tokens = -(-length // inputs.layout.sp_degree)
        spread, parallel = _over(inputs, inputs.layout.sp_degree, tokens)
        data, overrides = replace(inputs.data, max_seq_len=length), (f"data.max_seq_len={format_exact(length)}", *spread)
        yield Change(overrides, "shorter sequences", replace(inputs, data=data, parallel=parallel))


def format_exact(num_tokens: int) -> str:
    """Tokens as a person types them: 128K where exact, plain digits otherwise."""
    return format_tokens(num_tokens).replace(",", "")


SETTINGS: tuple[Move, ...] = (
    _auto,
    _recompute,
    _chunks,
    _segments,
    _whole_host,
    _reduce_each,
    _higher_stage,
    _small_loss_chunks,
    _shard_more,
    _states_on_host,
    _spread,
)
"""The run's own settings: exact, on the machines there are."""
OTHERWISE: tuple[Move, ...] = (_more_nodes, _in_backward, _adapters, _files, _larger_host, _larger_device, shorter, _few_bits)
"""Other machines, more time, less to do, another result."""
TOGETHER: tuple[Move, ...] = (_auto, _recompute, _reduce_each, _higher_stage, _chunks, _small_loss_chunks, _shard_more, _states_on_host)
"""Made one after the other where none is enough by itself."""
LAST: tuple[Move, ...] = (_spread, *OTHERWISE)
"""Moves on top of TOGETHER, where even those at once are not enough."""
HARDWARE: tuple[Move, ...] = (_files, _larger_host, _larger_device, _adapters)
"""Moves that need other machines, or another run: not for a run that has just ended on those there are."""
