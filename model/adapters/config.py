"""Settings of adapters: small matrices that are trained while the model itself is frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from ...utils.ranges import Range


class AdapterMethod(Enum):
    """What is trained."""

    NONE = "none"
    """Every weight of the model."""
    LORA = "lora"
    """Two factors beside each targeted matrix (LoRA, 2106.09685, sec. 4.1); the model itself is frozen, in compute precision."""
    QLORA = "qlora"
    """The same beside matrices that stay packed in NF4 (QLoRA, 2305.14314, sec. 3) and are wide for one product at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """Low-rank adapters: W x becomes W x + scaling B (A x), A (rank, columns of W), B (rows of W, rank); A and B are trained."""

    name: str = "none"
    method: AdapterMethod = AdapterMethod.NONE
    rank: int = 16
    """Rows of A and columns of B."""
    alpha: float = 32.0
    """Numerator of the scaling: alpha / rank, or alpha / sqrt(rank) with rslora."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps updates the same size for any rank (2312.03732)."""
    dora: bool = False
    """Train a length for each row of a matrix apart from its direction, which the factors change (DoRA, 2402.09353)."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Matrices with an adapter: all-linear, attention, mlp, or names as q_proj."""
    quantized: list[str] = field(default_factory=lambda: ["all-linear"])
    """Matrices of decoder layers that are packed with adapter=qlora: all-linear, attention, mlp, or names as q_proj."""
    modules_to_save: list[str] = field(default_factory=list)
    """Parts that are trained whole beside the adapters, and saved with them: embedding, head, norms."""
    dropout: float = 0.0
    """Dropout before A. Only 0: what backward makes again would be dropped otherwise than in forward."""
    b_lr_ratio: float = 1.0
    """Learning rate of B over that of A and of everything else (LoRA+, 2402.12354: 16)."""
    init: str | None = None
    """A directory with adapter_config.json and adapter_model.safetensors to start from; None: A random, B zero."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "rank": Range(1, 65_536),
        "alpha": Range(0, 1e6, above=True),
        "dropout": Range(0, 1, below=True),
        "b_lr_ratio": Range(0, 1e6, above=True),
    }

    @property
    def is_trained(self) -> bool:
        """Whether adapters are trained, and the model is frozen."""
        return self.method is not AdapterMethod.NONE

    @property
    def quantizes(self) -> bool:
        """Whether frozen matrices are packed."""
        return self.method is AdapterMethod.QLORA

    @property
    def leaves_reference(self) -> bool:
        """Whether the model as it was is there all the time: nothing but adapters is trained, and without them it is itself."""
        return self.is_trained and not self.modules_to_save

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


NO_ADAPTER = AdapterConfig()
"""Every weight is trained."""
