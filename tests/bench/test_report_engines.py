"""The section on engines has a row for each contestant and the headline figures."""

from __future__ import annotations

from efflaunch.bench.report_engines import NAMES, engines


def test_each_contestant_has_its_row() -> None:
    figures = {f"{start}vs_plain_{name}": 0.75 for start in ("", "peak_") for name in ("deepspeed", "fsdp")}
    each = {key: dict.fromkeys(NAMES, value) for key, value in (("tokens_per_s", 1234.0), ("peak_bytes", 3 << 20), ("startup_s", 2.0))}
    lines = engines({"lengths": [30, 20], "ranks": 2, "rounds": 3, **figures, **each})
    assert [line for line in lines if line.startswith("| ")][1:] == [f"| {shown} | 1,234 | 3.0 | 2.0 |" for shown in NAMES.values()]
    assert "documents of 30, 20 tokens on each of 2" in lines[2] and "**vs_plain_deepspeed 0.750**" in "\n".join(lines)
