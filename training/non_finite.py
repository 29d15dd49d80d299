"""Finds where a non-finite loss came from: rows are marked as they are computed, and read only once something is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import NonFiniteLossError
from ..parallel.sharding.parts import memory_of
from ..parallel.topology import whole_world
from .data.shard import PackedShard

NUM_NAMED = 8
"""Documents a message names at most."""


class RowWatch:
    """Holds a flag per row of each micro-batch, on the device: nothing is synchronised before `spans` asks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flags: dict[int, Tensor] = {}

    def flags(self, micro_batch: int, num_rows: int) -> Tensor:
        """Flags (num_rows,) bool, all False, for the loss to set."""
        self._flags[micro_batch] = torch.zeros(num_rows, dtype=torch.bool, device=self._device)
        return self._flags[micro_batch]

    def spans(self, micro_batch: int, shard: PackedShard) -> list[tuple[int, int, int]]:
        """Spans (part of the shard, first, last + 1) of the marked tokens of each slice that has any."""
        if micro_batch not in self._flags:
            return []
        flags, out, row = self._flags[micro_batch].cpu(), [], 0
        for piece in shard.slices:
            marked = flags[row : row + len(piece)].nonzero().squeeze(1)
            row += len(piece)
            if len(marked):
                out.append((piece.sequence, piece.start + int(marked[0]), piece.start + int(marked[-1]) + 1))
        return out


class _Work(Protocol):
    """training.step.Work, as far as it is read here."""

    @property
    def shard(self) -> PackedShard: ...
    @property
    def group(self) -> Any: ...


class _Source(Protocol):
    def describe(self, step: int, index: int, start: int = 0, stop: int | None = None) -> str: ...


def non_finite(
    value: float,
    shares: Tensor,
    micro_batches: Sequence[_Work],
    watch: RowWatch,
    source: _Source,
    step: int,
    *,
    layer: str | None = None,
    partly_applied: bool = False,
    bad_weights: Sequence[str] = (),
) -> NonFiniteLossError:
    """The error for a step whose loss or gradient norm is `value`: ranks, documents and their tokens. Collective over all ranks.

    `shares`: this rank's loss of each micro-batch. Where none is to blame alone, the gradients are. `layer`: the first in backward
    whose gradients are not finite; `partly_applied`: those before it have been updated. `bad_weights` (`weights_at_fault`): with
    any, it is those and no document.
    """
    if bad_weights:
        more = f" and {len(bad_weights) - NUM_NAMED} more" if len(bad_weights) > NUM_NAMED else ""
        return NonFiniteLossError(
            f"step {step + 1}",
            found=f"a loss or gradient norm of {value}: NaN or infinite weights in {', '.join(bad_weights[:NUM_NAMED])}{more}",
            expected="finite weights before the step; no document is at fault",
            hint="an earlier checkpoint or other weights at model.path, and a lower optim.lr if they became so in training",
        )
    mine = [
        span
        for index, share in enumerate(shares.tolist())
        if not math.isfinite(share)
        for span in _tokens_of(micro_batches[index], watch.spans(index, micro_batches[index].shard))
    ]
    world = whole_world()
    everyone: list[list[tuple[int, int, int | None]] | None] = [None] * dist.get_world_size(world)
    dist.all_gather_object(everyone, mine, group=world)
    ranks = ", ".join(str(rank) for rank, spans in enumerate(everyone) if spans)
    documents = [source.describe(step, *span) for span in _merged([span for spans in everyone for span in spans or ()])]
    more = f"; {len(documents) - NUM_NAMED} more" if len(documents) > NUM_NAMED else ""
    named = "; ".join(documents[:NUM_NAMED]) + more
    ranks = ranks or "none: every loss is finite, the gradients are not"
    where = "" if layer is None else f"; first in the gradients of {layer}"
    kept = "nothing of this step was applied and the last checkpoint is intact"
    if partly_applied:
        kept = f"{layer} was not updated, but modules before it in backward were (optim.update=backward); the last checkpoint is intact"
    return NonFiniteLossError(
        f"step {step + 1}",
        found=f"a loss or gradient norm of {value} (ranks {ranks}; {named or 'no single document'}{where})",
        expected=f"finite numbers; {kept}",
        hint="a lower optim.lr or a smaller optim.grad_clip, or take the documents named out of the corpus",
    )


def weights_at_fault(model: nn.Module, group: dist.ProcessGroup) -> list[str]:
    """Names of parameters with numbers that are not finite, on any rank. Collective over `group`."""
    mine = []
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(memory_of(parameter)).all()):
            mine.append(name)
    everyone: list[list[str] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return list(dict.fromkeys(name for names in everyone for name in names or ()))


def _tokens_of(work: _Work, spans: list[tuple[int, int, int]]) -> list[tuple[int, int, int | None]]:
    """Spans (sequence of the step, first, last + 1); all sequences of the group where no row is to blame (a sum overflowed)."""
    if work.group is None:
        return []
    if not spans:
        return [(sequence, 0, None) for sequence in work.group.sequences]
    parts = work.shard.parts
    return [(parts[part].sequence, parts[part].offset + first, parts[part].offset + stop) for part, first, stop in spans]


def _merged(spans: list[tuple[int, int, int | None]]) -> list[tuple[int, int, int | None]]:
    """One span per sequence, over all ranks that hold a part of it."""
    out: dict[int, tuple[int, int, int | None]] = {}
    for sequence, first, stop in spans:
        _, low, high = out.get(sequence, (sequence, first, stop))
        out[sequence] = sequence, min(low, first), None if stop is None or high is None else max(high, stop)
    return list(out.values())
