"""Checks of a whole configuration: what no single dataclass can see."""

from __future__ import annotations

from ...errors import ConfigError
from ...model.model_check import check_weights
from ...model.spec import ModelSpec, longer_positions, model_spec
from ...parallel.layout import solve_layout
from ...training.config import check_train
from ...training.evaluation.config import check_eval, check_keep_best
from ...units import format_tokens
from .run_config import Config


def check_config(config: Config) -> None:
    """ConfigError unless model, layout and batch go together, on whatever machine."""
    check_train(config.train)
    spec = model_spec(config.model)
    _check_router_losses(config, spec)
    _check_evaluation(config, spec)
    if config.data.global_batch_tokens < config.data.max_seq_len:
        raise ConfigError(
            "data.global_batch_tokens",
            found=format_tokens(config.data.global_batch_tokens),
            expected=f"at least data.max_seq_len={format_tokens(config.data.max_seq_len)}",
            hint=f"data.global_batch_tokens={format_tokens(config.data.max_seq_len)}",
        )
    solve_layout(
        config.parallel,
        config.cluster,
        spec,
        max_seq_len=config.data.max_seq_len,
        global_batch_tokens=config.data.global_batch_tokens,
    )


def _check_evaluation(config: Config, spec: ModelSpec) -> None:
    longest, longer = max(config.eval.lengths, default=0), ""
    if longest > spec.max_positions:
        longer = " ".join(longer_positions(config.model, longest))
    check_eval(config.eval, max_seq_len=config.data.max_seq_len, max_positions=spec.max_positions, longer=longer)
    check_keep_best(config.train.keep_best, config.train.patience, config.eval, config.data.max_seq_len)


def _check_router_losses(config: Config, spec: ModelSpec) -> None:
    asked = [name for name in ("router_balance", "router_z_loss") if getattr(config.train, name)]
    if asked and spec.experts is None:
        actual = f"{getattr(config.train, asked[0]):g} for a model without experts"
        raise ConfigError(f"train.{asked[0]}", found=actual, expected="0: there is no router", hint=f"train.{asked[0]}=0")
    if config.train.router_balance and config.parallel.barrier_free:
        raise ConfigError(
            "train.router_balance",
            found=f"{config.train.router_balance:g} with parallel.barrier_free=true",
            expected="ranks that meet in every micro-batch: routing is counted over all of them before the first backward",
            hint="parallel.barrier_free=false, or train.router_balance=0",
        )


def model_notes(config: Config) -> list[str]:
    """List surprises of the model and its files: parts that are not read, and lengths beyond its positions."""
    positions, length = model_spec(config.model).max_positions, config.data.max_seq_len
    lines = check_weights(config.model)
    if length > positions:
        beyond = f"data.max_seq_len={format_tokens(length)} is beyond the {format_tokens(positions)} positions the model knows"
        lines.append(f"{beyond}: extend it with {' '.join(longer_positions(config.model, length))}")
    return lines
