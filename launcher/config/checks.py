"""Checks of a whole configuration: what no single dataclass can see."""

from __future__ import annotations

from ...errors import ConfigError
from ...model.adapters.peft_config import check_init
from ...model.adapters.targets import check_adapter
from ...model.model_check import check_weights
from ...model.spec import ModelSpec, longer_positions, model_spec
from ...parallel.config import AttentionKernel, SequenceMode
from ...parallel.layout import Layout, solve_layout
from ...parallel.pipeline.config import PipelineOrder
from ...parallel.sequence.kernel_choice import FACTS
from ...parallel.sequence.kernel_choice import KEY as KERNEL_KEY
from ...training.config import Objective, check_train
from ...training.data.config import check_cross_document, check_sources
from ...training.data.train_stages import check_stages, train_stages
from ...training.evaluation.config import check_eval, check_keep_best
from ...training.optimizers.check import rate_notes
from ...units import format_tokens
from .run_config import Config


def check_config(config: Config) -> None:
    """ConfigError unless model, layout and batch go together, on whatever machine."""
    check_train(config.train)
    check_sources(config.data)
    check_cross_document(config.data, language_modelling=config.train.objective is Objective.LANGUAGE_MODELLING)
    spec = model_spec(config.model)
    _check_order(config)
    _check_routers(config, spec)
    check_adapter(config.adapter, spec)
    _check_evaluation(config, spec)
    if config.data.global_batch_tokens < config.data.max_seq_len:
        raise ConfigError(
            "data.global_batch_tokens",
            found=format_tokens(config.data.global_batch_tokens),
            expected=f"at least data.max_seq_len={format_tokens(config.data.max_seq_len)}",
            hint=f"data.global_batch_tokens={format_tokens(config.data.max_seq_len)}",
        )
    layout = solve_layout(
        config.parallel,
        config.cluster,
        spec,
        max_seq_len=config.data.max_seq_len,
        global_batch_tokens=config.data.global_batch_tokens,
    )
    check_stages(config.train, config.data)
    _check_stage_layouts(config, spec, layout)
    _check_capacity(config, layout)
    if config.parallel.pipeline.stages > 1:
        _check_stages(config, spec)


def _check_stage_layouts(config: Config, spec: ModelSpec, layout: Layout) -> None:
    """ConfigError for a stage of train.stages whose sequences want other groups of ranks: a run's communicators are made once."""
    if config.parallel.sequence is SequenceMode.ADAPTIVE:
        return
    for stage in train_stages(config.train, config.data):
        length, batch = stage.data.max_seq_len, stage.data.global_batch_tokens
        own = solve_layout(config.parallel, config.cluster, spec, max_seq_len=length, global_batch_tokens=batch)
        if (own.sp_degree, own.ulysses) != (layout.sp_degree, layout.ulysses):
            groups, best = f"groups of {own.sp_degree} ranks", f"of {layout.sp_degree}, as data.max_seq_len has"
            raise ConfigError(
                f"{stage.key}.max_seq_len",
                found=f"{format_tokens(length)}, for {groups}",
                expected=f"a length for groups {best}: one layout serves all stages",
                hint=f"parallel.sp_degree={layout.sp_degree}, parallel.sequence=adaptive, or a run of its own for the stage",
            )


def _check_stages(config: Config, spec: ModelSpec) -> None:
    """ConfigError for what has not been tried in stages, and for updates within backward where gradients are not complete with it."""
    optim, pipeline = config.optim, config.parallel.pipeline
    tried = "parallel.pipeline.stages=1"
    if config.parallel.profile is not None:
        found = f"{config.parallel.profile} with parallel.pipeline.stages={pipeline.stages}"
        expected = "null: a profile is of all layers, and plans of stages go by arithmetic"
        raise ConfigError("parallel.profile", found=found, expected=expected, hint=f"parallel.profile=null, or {tried}")
    if pipeline.order is PipelineOrder.ZERO_BUBBLE:
        _check_weights_apart(config)
    if spec.tie_embeddings:
        what, why = "tied embeddings", "the first and the last stage add up their gradients of the embedding after backward"
        other_way = "parallel.pipeline.stages=1"
    elif pipeline.order is PipelineOrder.INTERLEAVED:
        what, why = f"parallel.pipeline.order={pipeline.order.value}", "virtual stages make their last backward passes at different times"
        other_way = "parallel.pipeline.order=1f1b parallel.pipeline.virtual=1"
    elif pipeline.order is PipelineOrder.ZERO_BUBBLE:
        what, why = f"parallel.pipeline.order={pipeline.order.value}", "gradients of weights come after backward, in a pass of their own"
        other_way = "parallel.pipeline.order=1f1b"
    else:
        return
    for key, value, other in (("update", optim.update.value, "step"), ("state_device", optim.state_device.value, "device")):
        if value != other:
            raise ConfigError(
                f"optim.{key}",
                found=f"{value} with parallel.pipeline.stages={pipeline.stages} and {what}",
                expected=f"{other}: {why}",
                hint=f"optim.{key}={other}, or {other_way}",
            )


def _check_weights_apart(config: Config) -> None:
    """ConfigError where backward makes all gradients at once, or leaves none of matrices, so that nothing could be put off."""
    found = f"with parallel.pipeline.order={config.parallel.pipeline.order.value}"
    other = "parallel.pipeline.order=1f1b"
    if config.memory.compile:
        expected = "false: a compiled backward makes gradients of weights with those of inputs"
        raise ConfigError("memory.compile", found=f"true {found}", expected=expected, hint=f"memory.compile=false, or {other}")
    if config.adapter.is_trained:
        expected = "none: frozen matrices have no gradients that could come later"
        raise ConfigError("adapter.method", found=f"{config.adapter.method.value} {found}", expected=expected, hint=other)


def _check_evaluation(config: Config, spec: ModelSpec) -> None:
    longest, longer = max([*config.eval.lengths, *config.eval.needles.lengths], default=0), ""
    if longest > spec.max_positions:
        longer = " ".join(longer_positions(config.model, longest))
    check_eval(config.eval, max_seq_len=config.data.max_seq_len, max_positions=spec.max_positions, longer=longer)
    check_keep_best(config.train.keep_best, config.train.patience, config.eval, config.data.max_seq_len)


def _check_order(config: Config) -> None:
    """ConfigError where an attention kernel is asked for that cannot add in the same order every time, and that is asked for too."""
    asked = config.parallel.attention_kernel
    if not config.train.deterministic or asked is AttentionKernel.AUTO or FACTS[asked].most_deterministic_head_dim:
        return
    able = ", ".join(kernel.value for kernel, facts in FACTS.items() if facts.most_deterministic_head_dim)
    raise ConfigError(
        "train.deterministic",
        found=f"true with {KERNEL_KEY}={asked.value}, which has no deterministic backward",
        expected=f"one of {able}",
        hint=f"{KERNEL_KEY}=auto, or train.deterministic=false",
    )


def _check_routers(config: Config, spec: ModelSpec) -> None:
    """ConfigError for what is asked of routers that the model does not have, or that are balanced otherwise."""
    train = config.train
    losses = [name for name in ("router_balance", "router_z_loss") if getattr(train, name)]
    asked = losses + ["router_bias_rate"] * bool(train.router_bias_rate) + ["expert_capacity"] * (train.expert_capacity is not None)
    if asked and spec.experts is None:
        off = "null" if asked[0] == "expert_capacity" else "0"
        actual = f"{getattr(train, asked[0]):g} for a model without experts"
        raise ConfigError(f"train.{asked[0]}", found=actual, expected=f"{off}: there is no router", hint=f"train.{asked[0]}={off}")
    has_bias = spec.experts is not None and spec.experts.has_correction_bias
    if losses and has_bias:
        actual = f"{getattr(train, losses[0]):g} for routers of {spec.family.value}, whose scores are sigmoids"
        hint = f"train.{losses[0]}=0 train.router_bias_rate=0.001"
        raise ConfigError(f"train.{losses[0]}", found=actual, expected="0: a bias balances them, these losses are of softmaxes", hint=hint)
    if train.router_bias_rate and not has_bias:
        actual = f"{train.router_bias_rate:g} for routers of {spec.family.value}, which have no correction bias"
        hint = "train.router_bias_rate=0, and train.router_balance=0.01 in its place"
        raise ConfigError("train.router_bias_rate", found=actual, expected="0: there is no bias to move", hint=hint)
    if config.train.router_balance and config.parallel.barrier_free:
        raise ConfigError(
            "train.router_balance",
            found=f"{config.train.router_balance:g} with parallel.barrier_free=true",
            expected="ranks that meet in every micro-batch: routing is counted over all of them before the first backward",
            hint="parallel.barrier_free=false, or train.router_balance=0",
        )


def _check_capacity(config: Config, layout: Layout) -> None:
    """ConfigError where documents would be spread over ranks: none of them sees the tokens that come first."""
    if config.train.expert_capacity is None:
        return
    adaptive = config.parallel.sequence is SequenceMode.ADAPTIVE
    if not adaptive and layout.sp_degree == 1:
        return
    found = "parallel.sequence=adaptive" if adaptive else f"sequence groups of {layout.sp_degree} ranks"
    room = f"parallel.sequence=static parallel.sp_degree=1 parallel.tokens_per_rank={format_tokens(config.data.max_seq_len)}"
    raise ConfigError(
        "train.expert_capacity",
        found=f"{config.train.expert_capacity:g} with {found}",
        expected="documents whole on a rank: the earliest tokens of each are served first, whatever the layout",
        hint=f"{room}, or train.expert_capacity=null",
    )


def model_notes(config: Config) -> list[str]:
    """List surprises of the model, its files and its rate: parts that are not read, lengths beyond its positions, rates of pretraining."""
    positions, length = model_spec(config.model).max_positions, config.data.max_seq_len
    check_init(config.adapter, model_spec(config.model))
    lines = check_weights(config.model)
    if length > positions:
        beyond = f"data.max_seq_len={format_tokens(length)} is beyond the {format_tokens(positions)} positions the model knows"
        lines.append(f"{beyond}: extend it with {' '.join(longer_positions(config.model, length))}")
    return [*lines, *rate_notes(config.optim, config.train.objective.value)]
