"""StreamBP as released (2506.03077): the `streambp` package's own code, driven as its version of transformers drove it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from .host import HostMemory
from .shape import Task
from .stock import Contestant, stock_model, token_ids


class ReleasedStreamBP(Contestant):
    """StreamModel with its checkpoint function; backward runs inside its forward.

    Note: the mask of forward. The released forward runs each layer over the whole sequence with a dense T x T mask (bfloat16,
    and a boolean one while it is made: 3 bytes x T^2). Without `as_shipped` forward takes the code's own branch for no mask,
    which is causal and right for a square block; backward needs the mask, because its chunks are not square.
    """

    def __init__(self, task: Task, *, as_shipped: bool = False) -> None:
        released = _released_module()
        model, self.host, self._ids = stock_model(task), HostMemory(), token_ids(task)
        self._mask = torch.ones_like(self._ids)
        self._stream = released.StreamModel(
            model,
            gradient_accumulation_steps=1,
            logits_chunk_size=task.chunks.streambp_loss,
            checkpoint_chunk_size=task.chunks.streambp_layer,
        )
        released.CheckpointFunctionForStreamBackward.chunk_size = task.chunks.streambp_layer
        for index, layer in enumerate(model.model.layers):
            forward_mask = None if as_shipped else self._stream.stream_buffer
            model.model.layers[index] = _Driven(layer, released.CheckpointFunctionForStreamBackward, forward_mask)
        self.model, self._as_shipped = model, as_shipped
        # It divides by the number of labels; the first label is no target.
        self._scale = task.num_tokens / (task.num_tokens - 1)

    def step(self) -> float:
        out = self._stream(
            input_ids=self._ids,
            attention_mask=self._mask,
            labels=self._ids,
            use_cache=False,
            output_attentions=False,
            output_hidden_states=False,
            return_dict=True,
        )
        return float(out.loss) * self._scale

    def gradients(self) -> dict[str, Tensor]:
        wrappers = {".layer.base_layer.": ".", ".self_attn.self_attn.": ".self_attn."}
        gradients = {}
        for name, gradient in super().gradients().items():
            for wrapped, plain in wrappers.items():
                name = name.replace(wrapped, plain)
            gradients[name] = gradient * self._scale
        return gradients

    def notes(self) -> str:
        shipped = "with the dense T x T mask of its forward" if self._as_shipped else "better than released: forward without its T x T mask"
        return (
            f"{shipped}; "
            f"the released package (streambp {metadata.version('streambp')}), its StreamModel, layers, attention and checkpoint function "
            "unchanged. Only its edges are fitted to today's transformers: the import of LossKwargs, its trainers (which need trl) are not "
            "imported, and its layers are called through its checkpoint function as the layer loop of transformers 4.5x did"
        )


class _Driven(nn.Module):
    """A StreamDecoderLayer under its checkpoint function, in the place of a decoder layer."""

    def __init__(self, layer: nn.Module, checkpoint: Any, buffer: dict[str, Any] | None) -> None:
        super().__init__()
        self.layer, self._checkpoint, self._buffer = layer, checkpoint, buffer

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], position_ids: Tensor | None = None, **_: Any
    ) -> Tensor:
        if not hidden_states.requires_grad:
            hidden_states.requires_grad_()
        rest = (None, position_ids, None, False, False, None, position_embeddings)
        with self._without_mask():
            out = self._checkpoint.apply(self.layer, True, hidden_states, *rest)
        first: Tensor = out[0]
        return first

    @contextmanager
    def _without_mask(self) -> Iterator[None]:
        if self._buffer is None:
            yield
            return
        mask = self._buffer["attention_mask"]
        self._buffer["attention_mask"] = None
        yield
        self._buffer["attention_mask"] = mask


def _released_module() -> Any:
    """`streambp.stream_model` without the package's own imports of trl; loaded once."""
    name = "streambp.stream_model"
    if name in sys.modules:
        return sys.modules[name]
    import transformers.utils

    utils: Any = transformers.utils
    file = metadata.distribution("streambp").locate_file("streambp/stream_model.py")
    spec = importlib.util.spec_from_file_location(name, str(file))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    gone = not hasattr(utils, "LossKwargs")
    if gone:
        utils.LossKwargs = utils.TransformersKwargs
    try:
        spec.loader.exec_module(module)
    finally:
        if gone:
            del utils.LossKwargs
    sys.modules[name] = module
    return module
