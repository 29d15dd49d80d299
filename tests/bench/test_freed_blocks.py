"""The comparison of C allocators: medians of ratios, and the page's section. A real round is in tests/test_c_allocator.py's kind."""

from __future__ import annotations

from typing import Any

from efflaunch.bench.freed_blocks import summary
from efflaunch.bench.report import SECTIONS


def test_medians_of_ratios_and_their_section() -> None:
    def row(own_s: float, returned_s: float, own: float, returned: float) -> dict[str, dict[str, float]]:
        return {"own": {"processor_s": own_s, "resident_bytes": own}, "returned": {"processor_s": returned_s, "resident_bytes": returned}}

    rounds = [row(10.0, 11.0, 400e6, 100e6), row(10.0, 12.0, 400e6, 80e6), row(10.0, 10.5, 400e6, 120e6)]
    result: dict[str, Any] = {**summary(rounds), "rounds": rounds}
    assert result["processor_ratio"] == 1.1 and result["resident_ratio"] == 0.25
    assert "Processor time 1.10 x, resident memory past the libraries 0.25 x" in "\n".join(SECTIONS["freed_blocks"](result))
