"""One micro-batch on one rank: what every layer left, and how inputs that were not kept are recomputed.

Note: segments. With `segment_layers` = k only the input of every k-th layer is kept. When backward reaches the last layer of
a segment, the other inputs of the segment are recomputed from its first, running each layer's forward once more (without
attention where its output was stored), and go where the policy puts layer inputs. Layers' weights are gathered for it one
after the other by the caller's `gathered`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..activation_classes import LAYER_INPUT
from ..policy import MemoryPolicy
from ..position import Position
from .saved import HostStore, Key, Saved
from .weight_products import WeightProducts

if TYPE_CHECKING:
    from .layer_pass import AttentionRuntime

Tables = Mapping[str | None, tuple[Tensor, Tensor]]
Recompute = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Reads:
    """What a layer's passes read of what it saved, in order (memory/executor/read_order.py)."""

    backward: Callable[[], Sequence[Key]]
    recompute: Callable[[], Sequence[Key]]


class Tape:
    """The saved pieces of all layers of one micro-batch."""

    def __init__(self, policy: MemoryPolicy, num_layers: int, store: HostStore | None) -> None:
        self.policy = policy
        self.saved = [Saved(store) for _ in range(num_layers)]
        self._recompute: dict[int, Recompute] = {}
        self._save: dict[int, Callable[[Tensor], None]] = {}
        self._reads: dict[int, Reads] = {}
        self._restoring: int | None = None

    def keeps_input(self, layer: int) -> bool:
        """Whether the layer's input is stored in forward: also where the layer below, without a backward, left nothing."""
        return layer % self.policy.segment_layers == 0 or layer - 1 not in self._recompute

    def record(self, layer: int, *, recompute: Recompute, save_input: Callable[[Tensor], None], reads: Reads) -> None:
        """Note how to recompute the layer's output from what it saved, how to store its input, and what its passes read."""
        self._recompute[layer], self._save[layer], self._reads[layer] = recompute, save_input, reads

    def restore_input(self, layer: int) -> None:
        """Make the inputs of the segment that ends in `layer` where they are not stored."""
        self._restoring = layer
        for below in self._missing(layer):
            self._save[below + 1](self._recompute[below]())

    def _missing(self, layer: int) -> list[int]:
        """Layers of the segment that ends in `layer` whose output is the input of another and is not stored."""
        base = layer - layer % self.policy.segment_layers
        inner = (below for below in range(base, layer) if below in self._recompute)
        return [below for below in inner if (LAYER_INPUT.name, 0, 0) not in self.saved[below + 1]]

    def prefetch_below(self, layer: int) -> None:
        """Start bringing back what is read first once this layer's backward is done: for a segment's recompute, or the next backward."""
        missing = self._missing(layer - 1) if layer else []
        if missing:
            self._prefetch(missing[0], recompute=True)
        elif layer - 1 in self._reads:
            self._prefetch(layer - 1, recompute=False)

    def prefetch_above(self, layer: int) -> None:
        """Start bringing back what the layer above reads first, once this layer was recomputed."""
        self._prefetch(layer + 1, recompute=layer + 1 != self._restoring)

    def _prefetch(self, layer: int, *, recompute: bool) -> None:
        reads = self._reads[layer]
        self.saved[layer].prefetch(reads.recompute() if recompute else reads.backward())

    def clear(self, layer: int) -> None:
        """Forget the layer: its backward is done."""
        self.saved[layer].clear()
        for kept in (self._recompute, self._save, self._reads):
            kept.pop(layer, None)


class LayerContext:
    """The arguments that all layers of a micro-batch share besides their input."""

    def __init__(
        self,
        tables: Tables,
        attention: AttentionRuntime,
        tape: Tape | None,
        gathered: Callable[[int], AbstractContextManager[None]],
        position: Position | None = None,
        products: WeightProducts | None = None,
    ) -> None:
        self.tables, self.attention, self.tape, self.gathered = tables, attention, tape, gathered
        """Rotary tables by kind of layer; the tape is None where no backward follows; `gathered(layer)` holds a layer's whole weights."""
        self.position = position or Position()
        """Where this rank is, for reports."""
        self.products = products
        """Where operands of the weights' gradients wait for a pass of their own; None: backward makes them."""
