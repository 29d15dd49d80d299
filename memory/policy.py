"""The memory policy of a run: for every class of activations which share of the tokens is kept, moved or recomputed. Pure.

Every published scheme is one value of `MemoryPolicy`; `explicit_policy` makes it of a configuration that says everything,
estimate/solver/solve.py of one that leaves things to it; memory/executor/layer.py executes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .activation_classes import CLASSES, ActivationClass
from .config import ActivationPlace, AttentionTiling, MemoryConfig


@dataclass(frozen=True, slots=True)
class Split:
    """Shares of the tokens of one class: the first `keep` stay on the device, the next `host` go to the host, the rest is recomputed."""

    keep: float = 0.0
    host: float = 0.0

    def __post_init__(self) -> None:
        if not (self.keep >= 0.0 and self.host >= 0.0 and self.keep + self.host <= 1.0 + 1e-9):
            raise ValueError(f"shares of tokens are between 0 and 1 together, not {self.keep:g} and {self.host:g}")

    def rows(self, num_tokens: int) -> tuple[int, int]:
        """(a, b): rows [0, a) are kept, [a, b) moved, [b, num_tokens) recomputed."""
        kept = round(self.keep * num_tokens)
        return kept, num_tokens if self.complete else max(kept, round((self.keep + self.host) * num_tokens))

    @property
    def complete(self) -> bool:
        """Nothing is recomputed."""
        return self.keep + self.host > 1.0 - 1e-6

    @property
    def recompute(self) -> float:
        return 0.0 if self.complete else 1.0 - self.keep - self.host


KEPT, MOVED, RECOMPUTED = Split(keep=1.0), Split(host=1.0), Split()


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPolicy:
    """What every decoder layer does with its activations.

    One split for each class of activation_classes.py, under its name; that table has widths and costs. Norm outputs and the
    activation product are always recomputed.
    """

    graph: bool = False
    """Keep autograd's own graph of the layer: everything, nothing is recomputed. The splits below are then all `keep`."""
    layer_input: Split = KEPT
    """Nothing of it is recomputed, except within segments."""
    attention_output: Split = RECOMPUTED
    """Recomputed for all tokens or none."""
    query: Split = RECOMPUTED
    key_value: Split = RECOMPUTED
    residual: Split = RECOMPUTED
    """Layer input plus attention's projected output."""
    mlp: Split = RECOMPUTED
    segment_layers: int = 1
    chunk_tokens: int | None = None
    attention: AttentionTiling = AttentionTiling.WHOLE
    head_groups: int = 1
    offload_dir: str | None = None
    compile: str | None = None
    """What compiles the token-local steps (a backend of torch.compile); None: nothing does."""

    @property
    def splits(self) -> dict[str, Split]:
        """Splits by class, in the order they are made."""
        return {kind.name: getattr(self, kind.name) for kind in CLASSES}

    def split(self, kind: ActivationClass) -> Split:
        """The shares of one class. Decisions are kept whatever the policy."""
        if kind.decision:
            return KEPT
        split: Split = getattr(self, kind.name)
        return split

    def with_splits(self, splits: Mapping[str, Split]) -> MemoryPolicy:
        """A copy with other shares of the classes named."""
        changes: dict[str, Any] = dict(splits)
        return replace(self, **changes)

    @property
    def uses_host(self) -> bool:
        return any(split.host > 0 for split in self.splits.values())


KEEP_ALL = MemoryPolicy(graph=True).with_splits({kind.name: KEPT for kind in CLASSES})
"""The preset `keep`."""
AHEAD = 2
"""Pieces that are on their way back from the host while one is used."""


def explicit_policy(memory: MemoryConfig) -> MemoryPolicy:
    """The policy of a configuration that leaves nothing to be solved (`check_memory` has passed)."""
    places = memory.layer_input, memory.attention_output, memory.activations
    assert None not in places, "with memory.solve the policy comes from estimate/solver/solve.py"
    shares = {ActivationPlace.KEEP: KEPT, ActivationPlace.HOST: MOVED, ActivationPlace.RECOMPUTE: RECOMPUTED}
    layer_input, attention_output, activations = (shares[place] for place in places if place is not None)
    if memory.activations is ActivationPlace.HOST and memory.host_fraction is not None:
        activations = Split(host=memory.host_fraction)
    policy = MemoryPolicy(
        graph=set(places) == {ActivationPlace.KEEP},
        layer_input=layer_input,
        attention_output=attention_output,
        segment_layers=memory.segment_layers or 1,
        chunk_tokens=memory.chunk_tokens,
        attention=memory.attention or AttentionTiling.WHOLE,
        head_groups=memory.head_groups or 1,
        offload_dir=memory.offload_dir,
        compile=compiler(memory),
    )
    return policy.with_splits({kind.name: activations for kind in CLASSES if kind.by_token})


def compiler(memory: MemoryConfig) -> str | None:
    """`MemoryPolicy.compile` of a configuration."""
    return "inductor" if memory.compile else None
