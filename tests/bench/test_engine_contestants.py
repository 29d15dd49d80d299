"""Our step and the plain loops compute one loss under each engine; each has a time, a peak and a start."""

from __future__ import annotations

import math

import pytest

from efflaunch.bench.engines import measure, summary
from efflaunch.tests.bench.test_bench import TINY

NAMES = {"ours_torch", "ours_deepspeed", "plain_fsdp", "plain_deepspeed"}


@pytest.mark.slow
def test_all_engines_run_the_same_step() -> None:
    row = measure((48, 32, 16), ranks=2, rounds=2, model=TINY)
    losses = row["losses"]
    assert set(losses) == NAMES and max(losses.values()) - min(losses.values()) < 1e-4 * max(losses.values())
    assert all(set(row[key]) == NAMES for key in ("startup_s", "peak_bytes", "seconds", "processor_s", "tokens_per_s"))
    assert all(len(row["seconds"][name]) == 2 and row["peak_bytes"][name] > 0 for name in NAMES)
    assert all(math.isfinite(value) and value > 0 for value in summary(row).values())
