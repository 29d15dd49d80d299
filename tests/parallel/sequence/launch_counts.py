"""Counts what a decoder layer asks of a GPU: a step on fake tensors with CUDA's flash kernel, and what in it would wait for the device.

Launches are operations that are no views; FlashAttention's backward is three kernels. Fake tensors lie on the CPU, for a build without
CUDA has no autograd on others: the operations are the same.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

import efflaunch
from efflaunch.memory.arena.fake import fake_tensors
from efflaunch.memory.policy import MemoryPolicy
from efflaunch.model.build import install
from efflaunch.model.chunked_loss import cross_entropy
from efflaunch.model.stage import Tokens
from efflaunch.parallel.sequence.attention import BlockKernel
from efflaunch.parallel.sequence.clock import BusyClock
from efflaunch.parallel.sequence.flash import TorchFlashKernel
from efflaunch.parallel.sequence.layout import group_layout
from efflaunch.parallel.sequence.plan import Group
from efflaunch.parallel.sequence.runtime import SequenceAttention, sequence_attention

ROOT = Path(efflaunch.__file__).resolve().parent
CPU = torch.device("cpu")
VIEWS = {
    "view", "_unsafe_view", "detach", "transpose", "t", "slice", "unsqueeze", "squeeze", "select", "as_strided", "expand", "split",
    "split_with_sizes", "alias", "permute", "reshape", "unflatten", "chunk", "empty", "empty_like", "new_empty", "empty_strided",
    "unbind", "narrow", "flatten", "_reshape_alias", "is_same_size",
}  # fmt: skip
"""Operations without a kernel of their own."""
KERNELS = {"_flash_attention_backward": 3}
WAITS = {
    "_local_scalar_dense": "a number read from the device",
    "nonzero": "as many rows as values say",
    "masked_select": "as many rows as values say",
    "unique_consecutive": "as many rows as values say",
    "_unique2": "as many rows as values say",
    "bincount": "as many rows as values say",
    "lift_fresh": "numbers of Python that go to the device",
}
"""Operations that make the host wait for the GPU, or that carry a Python list there."""


@dataclass
class Count(TorchDispatchMode):
    """Operations by name, and the places in the package that wait, as `file:function operation`."""

    names: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        self.names[name] += space != "prim"
        sized = (kwargs or {}).get("output_size") is not None
        if name in WAITS or (name == "repeat_interleave" and not sized):
            self.waits[f"{_place()} {name}"] += 1
        return func(*args, **(kwargs or {}))

    @property
    def tolist(self) -> Any:
        """A `Tensor.tolist`, which no dispatch sees, that is counted."""

        def counted(tensor: Tensor) -> Any:
            self.waits[f"{_place()} tolist"] += 1
            return torch._C.TensorBase.tolist(tensor)

        return counted

    @property
    def launches(self) -> int:
        return sum(count * KERNELS.get(name, 1) for name, count in self.names.items() if name not in VIEWS)

    @property
    def dispatches(self) -> int:
        return self.names.total()


def _place() -> str:
    """The innermost function of the package that is running."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename).resolve()
        inside = path.relative_to(ROOT).parts if ROOT in path.parents else ()
        if inside and inside[0] not in ("tests", ".venv"):
            return f"{'/'.join(inside)}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside"


class Store:
    """A host store that keeps what it is given."""

    def put(self, rows: Tensor) -> Tensor:
        return rows.contiguous()

    def get(self, key: Tensor) -> Tensor:
        return key

    def prefetch(self, key: Tensor) -> None: ...

    def done(self, key: Tensor) -> None: ...

    def drop(self, key: Tensor) -> None: ...

    def reset(self) -> None: ...


class OneOfMany:
    """The topology of one rank whose groups have no communicator."""

    stage_rank = 0
    world_size = 1

    def group(self, first: int, size: int) -> None: ...


def attention_of(lengths: tuple[int, ...], ulysses: int, kernel: BlockKernel) -> SequenceAttention:
    """The attention of the first of `ulysses` ranks; exchanges are to be stubbed by `without_exchanges`."""
    layout = group_layout(lengths, ulysses=ulysses, ring=1)
    group = Group(0, ulysses, ulysses, tuple(range(len(lengths))))
    return sequence_attention(OneOfMany(), kernel, group, layout, BusyClock(CPU))  # type: ignore[arg-type]


def without_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exchanges bring zeros: what a rank computes with has the same shapes."""
    monkeypatch.setattr("torch.distributed.all_to_all_single", lambda received, *_, **__: received.zero_())


def rows_of(lengths: tuple[int, ...], rank_tokens: int) -> Tokens:
    """The first `rank_tokens` rows of a pack."""
    ids = torch.zeros(rank_tokens, dtype=torch.int64)
    positions = torch.cat([torch.arange(n) for n in lengths])[:rank_tokens]
    return Tokens(ids, ids.clone(), positions, torch.full_like(ids, max(lengths)))


def step_on_fakes(policy: MemoryPolicy, lengths: tuple[int, ...], *, layers: int, ulysses: int = 1) -> Count:
    """What one micro-batch of a small Llama in bfloat16 asks of its GPU, forward and backward."""
    fields = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 256}
    config = AutoConfig.for_model("llama", num_hidden_layers=layers, max_position_embeddings=1 << 20, **fields)
    with fake_tensors():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16).train()
        install(model, policy, loss_chunk_tokens=16384, store=Store())  # type: ignore[arg-type]
        attention = attention_of(lengths, ulysses, TorchFlashKernel())
        tokens = rows_of(lengths, sum(lengths) // ulysses)
        with Count() as count:
            model(tokens, attention, lambda head: cross_entropy(head, 1.0)).backward()
    return count
