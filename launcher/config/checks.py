"""Checks of a whole configuration: what no single dataclass can see."""

from __future__ import annotations

from ...errors import ConfigError
from ...model.model_check import check_weights
from ...model.spec import longer_positions, model_spec
from ...parallel.layout import solve_layout
from ...training.config import check_train
from ...units import format_tokens
from .run_config import Config


def check_config(config: Config) -> None:
    """ConfigError unless model, layout and batch go together, on whatever machine."""
    check_train(config.train)
    spec = model_spec(config.model)
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


def model_notes(config: Config) -> list[str]:
    """List surprises of the model and its files: parts that are not read, and lengths beyond its positions."""
    positions, length = model_spec(config.model).max_positions, config.data.max_seq_len
    lines = check_weights(config.model)
    if length > positions:
        beyond = f"data.max_seq_len={format_tokens(length)} is beyond the {format_tokens(positions)} positions the model knows"
        lines.append(f"{beyond}: extend it with {' '.join(longer_positions(config.model, length))}")
    return lines
