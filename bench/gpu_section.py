"""What a section of bench/first_gpu.py is given, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""Plain data, as JSON has it."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Where sections run and how large; `out` is for files beside the rows."""

    device: str
    tiny: bool
    out: Path
    seconds: float
    """What the section may take."""

    def pick(self, full: int, tiny: int) -> int:
        """The size for this scale."""
        return tiny if self.tiny else full
