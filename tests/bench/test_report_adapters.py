"""The section on adapters: a row for each contestant, its bytes over peft's."""

from __future__ import annotations

from efflaunch.bench.report_adapters import NAMES, adapters


def test_every_contestant_has_a_row_with_its_share_of_pefts_bytes() -> None:
    rows = {
        name: {"bytes_per_token": 1000.0 * (index + 1), "device_bytes": [1 << 20, 2 << 20], "host_bytes": [0, 1 << 20]}
        for index, name in enumerate(NAMES)
    }
    settings = {"layers": 4, "shape": "8x32", "lengths": [512, 1024], "time_tokens": 256, "rounds": 3}
    times = {name: 1.0 + index for index, name in enumerate(NAMES)}
    lines = adapters(
        {"settings": settings, "rank": 8, "gradient_error": 2e-6, "rows": rows, "time_ratio": times, "processor_ratio": times}
    )
    assert lines[0] == "## Adapters" and "peak at 1024, MiB" in "\n".join(lines) and "within 2.0e-06" in lines[2]
    assert "| peft, gradient checkpointing | 1,000 | 1.00 | 2.0 | 1.0 | 1.00 x | 1.00 x |" in lines
    assert "| QLoRA, auto where everything is full | 4,000 | 4.00 | 2.0 | 1.0 | 4.00 x | 4.00 x |" in lines
    assert len(lines) == 6 + len(NAMES)
