"""Lets Hugging Face's own code compute in float64 throughout: `WideFloats`.

Its norms, rotary tables, routers and eager softmax go through float32 whatever the model's precision, which bounds what a comparison
can show at 1e-7. Its code is not rewritten for that: within this mode every operation that asks for float32 gets float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class WideFloats(TorchDispatchMode):
    """Within, float32 is float64 wherever it is asked for: `x.float()`, `x.to(torch.float32)`, `softmax(dtype=torch.float32)`.

    A mode of dispatch, for those hold in backward as well, where layers are computed again. What is in float32 already is not asked
    for: buffers have to be float64 before.
    """

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        words = dict(kwargs or {})
        if words.get("dtype") is torch.float32:
            words["dtype"] = torch.float64
        return func(*args, **words)
