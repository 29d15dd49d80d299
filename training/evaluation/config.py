"""Settings of evaluation: which held-out corpora, when, and with how much context."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from ...errors import ConfigError
from ...units import Tokens, format_tokens
from ...utils.ranges import STEPS, TOKENS, Range, check_ranges
from .needle_config import NeedleConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
GAIN = "context_gain"
EXACT = "exact"
NEEDLES = "needles"
"""Name that results of eval.needles have among those of corpora."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Settings of the corpora the model is judged on while it trains, and how (docs/evaluation.md)."""

    name: str = "none"
    corpora: dict[str, str] = field(default_factory=dict)
    """Names and prefixes of held-out corpora, as {web: heldout/web, code: heldout/code}; empty: no evaluation."""
    every_steps: int | None = None
    """Updates from one evaluation to the next; None: only at_start and at_end."""
    at_start: bool = False
    """Also before the first update."""
    at_end: bool = True
    """Also after the last update."""
    lengths: list[Tokens] = field(default_factory=list)
    """Context lengths at which the same targets are judged, as [8K,128K]; at most data.max_seq_len. Empty: whole documents alone."""
    max_tokens: Tokens | None = None
    """Most tokens that each pass over a corpus reads, of windows spread over it; None: all of them."""
    context_tokens: Tokens = 4096
    """What is left of the context in the pass that shows what the rest of it is worth."""
    needles: NeedleConfig = field(default_factory=NeedleConfig)
    """Synthetic retrieval, beside the corpora or by itself."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "every_steps": Range(1, STEPS),
        "lengths": Range(2, TOKENS),
        "max_tokens": Range(2, 1 << 50),
        "context_tokens": Range(2, TOKENS),
    }

    @property
    def is_on(self) -> bool:
        """Whether there is anything to evaluate."""
        return bool(self.corpora or self.needles.lengths)


def check_eval(config: EvalConfig, *, max_seq_len: int, max_positions: int, longer: str) -> None:
    """Raise ConfigError where names, lengths or times of evaluation make no sense.

    `max_positions` of the model; `longer`: what to type for more of them.
    """
    check_ranges(config, "eval")
    for name in config.corpora:
        if not _NAME.fullmatch(name):
            expected, hint = "letters, digits, `.`, `_` and `-`", "eval.corpora={web: PREFIX}"
            raise ConfigError("eval.corpora", found=f"the name {name!r}"[:200], expected=expected, hint=hint)
    if NEEDLES in config.corpora:
        expected = "another name: results of eval.needles have this one"
        raise ConfigError("eval.corpora", found=f"the name {NEEDLES}", expected=expected, hint="eval.corpora={web: PREFIX}")
    _check_needles(config.needles)
    if not config.is_on and (config.every_steps is not None or config.at_start or config.lengths):
        asked = "every_steps" if config.every_steps is not None else "at_start" if config.at_start else "lengths"
        raise ConfigError(f"eval.{asked}", found="it, and no corpora", expected="corpora to evaluate on", hint="eval.corpora={web: PREFIX}")
    if config.is_on and not config.corpora:
        own = {"lengths": config.lengths, "max_tokens": config.max_tokens, "context_tokens": config.context_tokens}
        for key, value in own.items():
            if value != getattr(EvalConfig(), key):
                expected = "corpora, which it is of: eval.needles has its own lengths"
                raise ConfigError(f"eval.{key}", found="it, and no corpora", expected=expected, hint="eval.corpora={web: PREFIX}")
    for key, lengths in (("eval.lengths", config.lengths), ("eval.needles.lengths", config.needles.lengths)):
        for length in lengths:
            _check_length(key, length, max_seq_len, max_positions, longer)


def _check_needles(config: NeedleConfig) -> None:
    """ConfigError where there are lengths, and nothing to hide or nowhere to hide it."""
    check_ranges(config, "eval.needles")
    for name in ("depths", "tasks"):
        if config.lengths and not getattr(config, name):
            example = "[0,0.5,1]" if name == "depths" else "[one_key]"
            raise ConfigError(f"eval.needles.{name}", found="none", expected="at least one", hint=f"eval.needles.{name}={example}")


def _check_length(key: str, length: int, max_seq_len: int, max_positions: int, longer: str) -> None:
    if length > max_positions:
        raise ConfigError(
            key,
            found=f"{format_tokens(length)}",
            expected=f"at most the {format_tokens(max_positions)} positions the model knows",
            hint=f"shorter {key}, or {longer}",
        )
    if length > max_seq_len:
        raise ConfigError(
            key,
            found=f"{format_tokens(length)}",
            expected=f"at most data.max_seq_len={format_tokens(max_seq_len)}, which layout and memory are planned for",
            hint=f"shorter {key}, or data.max_seq_len={format_tokens(length)}",
        )


def length_name(num_tokens: int) -> str:
    """`8K`, `1M`, `1000`: a number of tokens in the name of a metric."""
    return format_tokens(num_tokens).replace(",", "")


def metric_names(config: EvalConfig, max_seq_len: int) -> list[str]:
    """Names of the metrics an evaluation results in: what train.keep_best may follow."""
    names = []
    for corpus in sorted(config.corpora):
        names.append(f"eval/{corpus}/loss")
        names += [f"eval/{corpus}/loss_{length_name(length)}" for length in sorted(set(config.lengths))]
        if config.context_tokens < max_seq_len:
            names.append(f"eval/{corpus}/{GAIN}")
    if config.needles.lengths:
        lengths = [f"_{length_name(length)}" for length in sorted(set(config.needles.lengths))]
        names += [f"eval/{NEEDLES}/{name}" for name in ("loss", EXACT)]
        names += [f"eval/{NEEDLES}/{name}{length}" for name in ("loss", EXACT) for length in lengths]
    return names


def is_better_higher(metric: str) -> bool:
    """Whether more of a metric is better."""
    name = metric.rpartition("/")[2]
    return name == GAIN or name.partition("_")[0] == EXACT


def check_keep_best(metric: str | None, patience: int | None, config: EvalConfig, max_seq_len: int) -> None:
    """Raise ConfigError where train.keep_best names no metric of an evaluation, or train.patience has none to follow."""
    if metric is None:
        if patience is not None:
            raise ConfigError(
                "train.patience", found=f"{patience} without train.keep_best", expected="a metric to follow", hint="train.keep_best=METRIC"
            )
        return
    names = metric_names(config, max_seq_len)
    if metric not in names:
        there = ", ".join(names) or "none: eval.corpora and eval.needles.lengths are empty"
        hint = f"train.keep_best={names[0]}" if names else "eval.corpora={web: PREFIX} eval.every_steps=100"
        raise ConfigError("train.keep_best", found=metric, expected=f"a metric of this run's evaluations ({there})", hint=hint)
    if config.every_steps is None:
        raise ConfigError(
            "train.keep_best", found=f"{metric} with eval.every_steps=null", expected="evaluations to compare", hint="eval.every_steps=100"
        )
