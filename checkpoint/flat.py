"""A tensor of which this rank holds a run of numbers that is no box: what engines that flatten parameters leave a rank with.

It follows torch.distributed.checkpoint's own protocol for such tensors (`_Checkpointable`, torch/distributed/_checkpointable.py), so
the files it goes into are plain ones: a run is a few boxes (boxes.py), and each is a piece of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from .boxes import boxes

Piece = tuple[Tensor, tuple[int, ...]]
"""This rank's memory of a box, and where the box starts in the whole tensor."""


class Flat(Tensor):
    """The whole tensor by its shape, dtype and device; of its numbers this rank has `run`, the first of which is number `begin`."""

    run: Tensor
    begin: int

    @staticmethod
    def __new__(cls, shape: Sequence[int], run: Tensor, begin: int) -> Flat:
        """Wrap a run (n,) without a copy. ValueError, at the first `pieces`, where it is not inside the tensor."""
        made: Flat = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=run.dtype, device=run.device)  # type: ignore[attr-defined]
        made.run, made.begin = run, begin
        return made

    def __init__(self, shape: Sequence[int], run: Tensor, begin: int) -> None:
        """All is done where it is made."""

    def pieces(self) -> list[Piece]:
        """This rank's memory, box by box; views of the run."""
        cut = boxes(tuple(self.shape), self.begin, self.begin + self.run.numel())
        return [(self.run.narrow(0, box.first, box.size).view(box.shape), box.offsets) for box in cut]

    def at(self, offsets: Sequence[int]) -> Tensor:
        """This rank's memory of the box that starts there. KeyError where none does."""
        for memory, start in self.pieces():
            if start == tuple(offsets):
                return memory
        raise KeyError(tuple(offsets))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Itself where only its graph is asked about; nothing computes with a run as if it were the whole. TypeError otherwise."""
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise TypeError(f"{func} of a tensor that is here in part")

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        """Which part of what it is."""
        return f"Flat({tuple(self.shape)}, {self.dtype}, numbers {self.begin} to {self.begin + self.run.numel()})"

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.run)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), memory.size()) for memory, offsets in self.pieces()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.at(index.offset)
