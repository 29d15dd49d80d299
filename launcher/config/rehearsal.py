"""Shrinks any configuration to one of the same kind that runs on a few CPU ranks in a minute: what is kept, what cannot be. Pure.

Sizes go down: layers, widths, lengths, ranks, steps. What decides which code runs stays: the family and every kind of its layers, the
objective, adapters, the optimizer's places, the memory policy, how a sequence is cut over ranks, stages, experts, replicas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...cluster.config import Device
from ...errors import ConfigError
from ...estimate.plan_inputs import PlanInputs
from ...estimate.solver.report import describe_policy
from ...estimate.timing.expert_order import expert_order
from ...memory.activation_classes import CLASSES
from ...memory.policy import MemoryPolicy, Split
from ...model.adapters.config import AdapterMethod
from ...model.config import ModelConfig
from ...model.families import facts_of
from ...model.families.facts import READ_BY_ALL
from ...model.hf_fields import SIZE_NAMES
from ...model.proof.tiny_config import tiny_config
from ...parallel.experts.layer_order import LayerOrder
from ...training.config import Objective
from ...training.data.config import corpus_prefixes
from ...training.reporting.config import WandbMode
from ...units import format_bytes, format_tokens
from .ledger import plan
from .run_config import Backend, Config

VOCABULARY = 4096
"""Tokens of the built-in corpus."""
FIRST_STEPS, STEPS = 2, 4
"""Steps until the first save, and in all."""
_MOST_OF_AN_AXIS = 2
_MOST_MICRO_BATCHES = 4
_MOST_CHUNKS = 8
_CHUNKS = 2
"""Of rows to experts, where there is more than one at full size."""
_MOST_RANK = 4
"""Of an adapter: small matrices have no higher one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """One experiment in miniature."""

    overrides: tuple[str, ...]
    """Words behind those of the experiment."""
    same: tuple[str, ...]
    """What runs as it will run at full size."""
    left_out: tuple[str, ...]
    """What is not tried by it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axes:
    """How few ranks are split, in the manner of many."""

    ranks: int
    stages: int
    replicate: int
    experts: int
    group: int
    """Ranks that share a sequence."""
    micro_batches: int


def rehearsal(config: Config, *, ranks: int, tokens: int) -> Rehearsal:
    """The miniature of a configuration on `ranks` CPU ranks, its longest sequence `tokens` tokens. ConfigError where none is possible."""
    axes = axes_of(config, ranks)
    if tokens < 64 * axes.group or tokens % axes.group:
        expected = f"a multiple of the {axes.group} ranks that share a sequence, from {64 * axes.group} on"
        raise ConfigError("--tokens", found=str(tokens), expected=expected, hint=f"--tokens {format_tokens(256 * axes.group)}")
    inputs, rows = plan(config).inputs, tokens // axes.group
    policy = inputs.policy
    layers = max(2 * axes.stages, 2 * policy.segment_layers)
    words = [*_model(config.model, layers), *_data(config, axes, tokens), *_parallel(config, axes, tokens), *_machine(config, axes)]
    words += [*_memory(policy, rows, config.parallel.tokens_per_rank), *_rest(config)]
    order = _solved_order(config, inputs)
    if order is not None:
        words.append(f"parallel.experts.degree={_CHUNKS}")
    return Rehearsal(
        overrides=tuple(words),
        same=tuple(_same(config, axes, "; ".join(describe_policy(policy, inputs)), order)),
        left_out=tuple(_left_out(config, order)),
    )


def _solved_order(config: Config, inputs: PlanInputs) -> LayerOrder | None:
    """That of chunks of rows to experts at full size, where the solver chose it and it is not one exchange: on CPUs it would not."""
    order = expert_order(inputs).order
    return None if config.parallel.experts.degree is not None or order.is_plain else order


def axes_of(config: Config, ranks: int) -> Axes:
    """Two of every axis that has more than one, then sequence groups in their share of a stage. ConfigError where ranks are too few."""
    parallel, world = config.parallel, config.cluster.num_nodes * config.cluster.ranks_per_node
    ranks = min(ranks, world)
    stages = min(parallel.pipeline.stages, _MOST_OF_AN_AXIS)
    replicate, experts = min(parallel.replicate, _MOST_OF_AN_AXIS), min(parallel.experts.ep, _MOST_OF_AN_AXIS)
    needed = stages * replicate * experts
    if ranks % needed:
        split = f"{stages} stages x {replicate} copies x {experts} parts of the experts"
        raise ConfigError("--ranks", found=str(ranks), expected=f"a multiple of {needed}: {split}", hint=f"--ranks {needed}")
    if ranks & (ranks - 1):
        raise ConfigError("--ranks", found=str(ranks), expected="a power of two", hint=f"--ranks {_power(ranks)}")
    whole, small = max(world // parallel.pipeline.stages, 1), ranks // stages
    degree = parallel.sp_degree or -(-config.data.max_seq_len // parallel.tokens_per_rank)
    group = small if degree >= whole else min(degree, max(small // 2, 1))
    rows = parallel.tokens_per_rank * whole
    micro_batches = max(min(-(-config.data.global_batch_tokens // rows), _MOST_MICRO_BATCHES), stages)
    return Axes(ranks=ranks, stages=stages, replicate=replicate, experts=experts, group=_power(group), micro_batches=micro_batches)


def _power(number: int) -> int:
    """The largest power of two that is not above a number."""
    return 1 << (number.bit_length() - 1)


def _model(model: ModelConfig, layers: int) -> list[str]:
    """Every size given, so that those of the experiment are gone; a directory's are read and then left."""
    tiny = tiny_config(model, layers)
    fields = {**tiny.fields, "vocab_size": VOCABULARY}
    sizes = {key: fields.get(name) for name, key in SIZE_NAMES.items() if name in fields}
    words = [f"model.family={tiny.spec.family.value}", *(f"model.{key}={_word(value)}" for key, value in sizes.items())]
    others = {name: value for name, value in fields.items() if name not in (*SIZE_NAMES, *_OWN)}
    # The built-in corpus ends documents with token 0, and nothing begins one.
    others |= {"eos_token_id": 0, "bos_token_id": None}
    extra = {
        name: value for name, value in others.items() if name in ("eos_token_id", "bos_token_id") or model.extra.get(name, value) != value
    }
    if model.path is not None:
        read = facts_of(tiny.spec.family)
        extra = {name: value for name, value in others.items() if name in (*read.fields, *READ_BY_ALL)}
        words += ["model.path=null", *_rope(fields)]
    return [*words, *(f"model.extra.{name}={_word(value)}" for name, value in extra.items())]


_OWN = ("model_type", "use_cache", "rope_parameters", "max_position_embeddings")
"""Fields of a Hugging Face config that keys of their own stand for, or that training sets."""


def _rope(fields: dict[str, Any]) -> list[str]:
    """Rotary settings of a directory as keys of a model from scratch."""
    parameters = dict(fields["rope_parameters"])
    words = [f"model.max_positions={fields['max_position_embeddings']}"]
    if "rope_type" not in parameters:
        return [*words, "model.rope_theta=null", "model.rope_scaling=null", f"model.extra.rope_parameters={_word(parameters)}"]
    words.append(f"model.rope_theta={parameters.pop('rope_theta', 10000.0)!r}")
    return [*words, f"model.rope_scaling={'null' if parameters['rope_type'] == 'default' else _word(parameters)}"]


def _word(value: Any) -> str:
    """A value as the right side of an override."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_word(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_word, value)) + "]"
    return str(value)


def _data(config: Config, axes: Axes, tokens: int) -> list[str]:
    step = tokens * (axes.ranks // axes.stages // axes.group) * axes.micro_batches
    words = ["data=stdlib", "data.prefixes=[]", "data.sources={}", "data.tokenizer=null", f"data.vocab_size={VOCABULARY}"]
    words += [f"data.max_seq_len={tokens}", f"data.global_batch_tokens={step}"]
    # Pairs and rewarded completions are no built-in corpus: whoever starts the miniature makes one.
    return words if config.train.objective is Objective.LANGUAGE_MODELLING else [*words, "data.builtin=null"]


def _parallel(config: Config, axes: Axes, tokens: int) -> list[str]:
    parallel = config.parallel
    words = [f"parallel.tokens_per_rank={tokens // axes.group}", "parallel.shard=null", "parallel.profile=null", "parallel.probe_s=0"]
    words += [f"parallel.replicate={axes.replicate}", f"parallel.experts.ep={axes.experts}", f"parallel.pipeline.stages={axes.stages}"]
    words += ["parallel.pipeline.layers=null", "parallel.pipeline.micro_batches=null", "parallel.pipeline.auto=false"]
    if axes.experts == 1 and parallel.experts.degree is not None:
        words.append("parallel.experts.degree=null")
    if parallel.sp_degree is not None:
        words.append(f"parallel.sp_degree={axes.group}")
    if parallel.ulysses_degree is not None:
        words.append(f"parallel.ulysses_degree={min(parallel.ulysses_degree, axes.group)}")
    if parallel.pipeline.virtual > 1:
        words.append("parallel.pipeline.virtual=2")
    return words


def _machine(config: Config, axes: Axes) -> list[str]:
    words = ["cluster=local_cpu", "cluster.name=local_cpu", "cluster.device=cpu", "cluster.num_nodes=1"]
    words.append(f"cluster.ranks_per_node={axes.ranks}")
    words += ["cluster.device_memory_bytes=3GiB", f"cluster.host_memory_bytes={3 * axes.ranks}GiB", "launcher=local", "launcher.nodes=null"]
    if config.logging.wandb is WandbMode.ONLINE:
        words.append("logging.wandb=offline")
    return words


def _memory(policy: MemoryPolicy, rows: int, full_rows: int) -> list[str]:
    """The policy that was chosen at full size as keys of the group: shares that two places divide go to the host as a whole."""
    places = {"layer_input": _place(policy.layer_input), "attention_output": _place(policy.attention_output)}
    by_token = [policy.split(kind) for kind in CLASSES if kind.by_token and not kind.decision]
    moved = [split.host for split in by_token if split.host > 0]
    places["activations"] = "host" if moved else "keep" if all(split.keep == 1 for split in by_token) else "recompute"
    words = ["memory.solve=false", *(f"memory.{name}={place}" for name, place in places.items())]
    words.append(f"memory.host_fraction={sum(moved) / len(by_token):.2f}" if moved else "memory.host_fraction=null")
    chunk = None if policy.chunk_tokens is None else max(rows * policy.chunk_tokens // full_rows, rows // _MOST_CHUNKS)
    words += [f"memory.segment_layers={policy.segment_layers}", f"memory.chunk_tokens={_word(chunk)}"]
    words += [f"memory.attention={policy.attention.value}", f"memory.head_groups={min(policy.head_groups, 2)}"]
    return [*words, "memory.host_budget=null", "memory.offload_dir=null"]


def _place(split: Split) -> str:
    return "host" if split.host > 0 else "keep" if split.keep > 0 else "recompute"


def _rest(config: Config) -> list[str]:
    words = [f"train.steps={FIRST_STEPS}", "train.stages=[]", f"checkpoint.every_steps={FIRST_STEPS}", "checkpoint.interval=fixed"]
    words += ["checkpoint.mirror=null", "checkpoint.pool_bytes=null", "optim.warmup_steps=null", "optim.schedule_on_resume=stretch"]
    words.append("optim.decay_steps=" + ("1" if config.optim.schedule == "wsd" else "null"))
    words += ["eval=none", "train.keep_best=null", "train.patience=null"]
    if config.eval.is_on:
        # What was typed stays behind another group, and lengths may be beyond the miniature's.
        words += ["eval.needles.lengths=[]", "eval.lengths=[]", "eval.every_steps=null", "eval.at_start=false"]
    if config.adapter.method is not AdapterMethod.NONE:
        words += [f"adapter.rank={min(config.adapter.rank, _MOST_RANK)}", "adapter.init=null"]
    return words


def _same(config: Config, axes: Axes, policy: str, order: LayerOrder | None) -> list[str]:
    """What the miniature has in common with the experiment, in words."""
    parallel, pipeline = config.parallel, config.parallel.pipeline
    adapter = f", adapter={config.adapter.name}" * (config.adapter.method is not AdapterMethod.NONE)
    found = [f"objective {config.train.objective.value}, {config.train.dtype.value}, optim={config.optim.name}{adapter}"]
    found.append(f"memory={config.memory.name}: {policy}")
    found.append(f"sequences {parallel.sequence.value}, over {axes.group} of {axes.ranks // axes.stages} ranks")
    found += [f"{axes.stages} pipeline stages, {pipeline.order.value}"] * (axes.stages > 1)
    found += [f"experts over {axes.experts} ranks"] * (axes.experts > 1)
    found += [f"rows to experts in chunks beside products, here {_CHUNKS} each way"] * (order is not None)
    found += [f"{axes.replicate} copies of the weights"] * (axes.replicate > 1)
    return [*found, f"save at step {FIRST_STEPS}, resume to step {STEPS}"]


def _left_out(config: Config, order: LayerOrder | None) -> list[str]:
    """What only the whole run will show."""
    cluster, data = config.cluster, config.data
    world = cluster.num_nodes * cluster.ranks_per_node
    found = [f"{world} rank{'s' * (world > 1)}" + " on GPUs, their kernels and NCCL" * (cluster.device is Device.CUDA)]
    found.append(
        f"sequences of {format_tokens(data.max_seq_len)} tokens, {format_bytes(cluster.device_memory_bytes)} a device: efflaunch plan"
    )
    if order is not None:
        found.append(f"the chosen order of rows to experts: forward {order.forward.words}, backward {order.backward.words}")
    corpora = corpus_prefixes(data)
    if corpora or data.builtin is None:
        stand_in = "Python's own sources stand" if config.train.objective is Objective.LANGUAGE_MODELLING else "random answers stand"
        found.append(f"the corpora ({', '.join(corpora) or 'none is given yet'}): {stand_in} for them")
    if config.model.path is not None:
        found.append(f"the weights of {config.model.path}: random ones stand for them")
    if config.launcher.backend is not Backend.LOCAL:
        found.append(f"launcher={config.launcher.backend.value}: --dry-run shows what it would submit")
    found += ["checkpoint.mirror: not written to"] * (config.checkpoint.mirror is not None)
    found += ["memory.offload_dir: host memory stands for it"] * (config.memory.offload_dir is not None)
    found += [f"train.stages: {len(config.train.stages)}, here one of the longest sequences"] * bool(config.train.stages)
    if config.eval.is_on:
        on = ["eval.corpora"] * bool(config.eval.corpora) + ["eval.needles"] * bool(config.eval.needles.lengths)
        found.append(f"evaluation on {' and '.join(on)}")
    found += ["adapter.init: adapters start anew"] * (config.adapter.init is not None)
    found += ["parallel.shard: weights are sharded over all ranks"] * (config.parallel.shard is not None)
    return found
