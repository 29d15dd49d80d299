"""One micro-batch on one rank: what every layer left, and how inputs that were not kept are made again.

Note: segments. With `segment_layers` = k only the input of every k-th layer is kept. When backward reaches the last layer of
a segment, the other inputs of the segment are made again from its first, running each layer's forward once more (without
attention where its output was stored), and go where the policy puts layer inputs. Layers' weights are gathered for it one
after the other by the caller's `gathered`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch import Tensor

from .policy import MemoryPolicy
from .position import Position
from .saved import HostStore, Key, Saved

if TYPE_CHECKING:
    from .run import AttentionRuntime

Tables = Mapping[str | None, tuple[Tensor, Tensor]]
MakeAgain = Callable[[], Tensor]


class Tape:
    """The saved pieces of all layers of one micro-batch."""

    def __init__(self, policy: MemoryPolicy, num_layers: int, store: HostStore | None) -> None:
        self.policy = policy
        self.saved = [Saved(store) for _ in range(num_layers)]
        self._again: dict[int, MakeAgain] = {}
        self._save: dict[int, Callable[[Tensor], None]] = {}
        self._orders: dict[int, Callable[[], Sequence[Key]]] = {}

    def keeps_input(self, layer: int) -> bool:
        """Whether the layer's input is stored in forward."""
        return layer % self.policy.segment_layers == 0

    def record(self, layer: int, *, again: MakeAgain, save_input: Callable[[Tensor], None], order: Callable[[], Sequence[Key]]) -> None:
        """How to make the layer's output again from what it saved, how to store its input, and what its backward reads first."""
        self._again[layer], self._save[layer], self._orders[layer] = again, save_input, order

    def restore_input(self, layer: int) -> None:
        """Make the inputs of the segment that ends in `layer` where they are not stored."""
        base = layer - layer % self.policy.segment_layers
        for below in range(base, layer):
            if ("layer_input", 0, 0) not in self.saved[below + 1]:
                self._save[below + 1](self._again[below]())

    def prefetch_below(self, layer: int) -> None:
        """Start bringing back what the backward after this layer's reads first."""
        if layer - 1 in self._orders:
            self.saved[layer - 1].prefetch(self._orders[layer - 1]())

    def clear(self, layer: int) -> None:
        """The layer's backward is done."""
        self.saved[layer].clear()
        for kept in (self._again, self._save, self._orders):
            kept.pop(layer, None)


class LayerContext:
    """What every layer of a micro-batch is given besides its input."""

    def __init__(
        self,
        tables: Tables,
        attention: AttentionRuntime,
        tape: Tape | None,
        gathered: Callable[[int], AbstractContextManager[None]],
        position: Position | None = None,
    ) -> None:
        self.tables, self.attention, self.tape, self.gathered = tables, attention, tape, gathered
        """Rotary tables by kind of layer; the tape is None where no backward follows; `gathered(layer)` holds a layer's whole weights."""
        self.position = position or Position()
        """Where this rank is, for reports."""
