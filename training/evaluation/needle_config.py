"""Settings of needles: what is hidden, in how much context and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from ...units import Tokens
from ...utils.ranges import TOKENS, Range
from .needle_texts import NeedleTask


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleConfig:
    """Settings of retrieval that is made with the run's tokenizer (docs/evaluation.md)."""

    lengths: list[Tokens] = field(default_factory=list)
    """Tokens of context at most, as [8K,128K]; at most data.max_seq_len. Empty: no needles."""
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Shares of the context that lie before the needle."""
    tasks: list[NeedleTask] = field(default_factory=lambda: list(NeedleTask))
    """What is asked for: one_key, many_keys, many_values, variables."""
    samples: int = 4
    """Texts of each task at each length and depth."""
    seed: int = 0
    """What names, numbers and places in the texts depend on."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "lengths": Range(2, TOKENS),
        "depths": Range(0, 1),
        "samples": Range(1, 10_000),
        "seed": Range(0, 1 << 63),
    }
