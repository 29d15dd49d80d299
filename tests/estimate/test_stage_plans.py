"""What each stage of a run takes, with the run's own layout and policy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from efflaunch.errors import PlanError
from efflaunch.estimate.stage_plans import check_stage_plans, stage_plans
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.config.ledger import plan

WORDS = ("+experiment=quickstart", "data.max_seq_len=4K", "data.global_batch_tokens=32K")


@pytest.mark.parametrize("memory", ["recompute", "auto"])
def test_the_stage_of_the_longest_sequences_is_the_runs_own_plan(memory: str) -> None:
    config = compose([*WORDS, f"memory={memory}"])
    run, data = plan(config), config.data
    short = replace(data, max_seq_len=1024, global_batch_tokens=8192)
    (first, last) = stage_plans(run, [short, data])
    assert (last.ledger.device, last.ledger.host, last.ledger.timing.step_s) == (run.device, run.host, run.timing.step_s)
    assert first.ledger.inputs.policy == run.inputs.policy and first.ledger.layout.sp_degree == run.layout.sp_degree
    assert first.ledger.timing.tokens < run.timing.tokens and first.ledger.timing.step_s < run.timing.step_s
    # Fewer tokens a step, in as many of them a rank: no more memory.
    assert first.ledger.device.peak_bytes <= run.device.peak_bytes
    assert check_stage_plans(run, [short, data]) is None


@pytest.mark.parametrize("sequence", ["adaptive", "static"])
def test_a_stage_of_short_sequences_counts_all_its_tokens(sequence: str) -> None:
    """Its groups are the run's, which are for longer ones."""
    run = plan(compose(["+experiment=quickstart", "data.max_seq_len=16K", "data.global_batch_tokens=64K", f"parallel.sequence={sequence}"]))
    (same, short) = stage_plans(run, [run.asked.data, replace(run.asked.data, max_seq_len=2048)])
    assert run.layout.sp_degree > 1 and short.ledger.timing.tokens == same.ledger.timing.tokens == 65536


def test_a_stage_that_takes_more_than_was_planned_is_refused() -> None:
    config = compose([*WORDS])
    run = plan(config)
    longer = replace(config.data, global_batch_tokens=65536)
    lean = replace(run, device=replace(run.device, terms=run.device.terms[:1]))
    with pytest.raises(PlanError, match=r"train.stages\[0\]: found .* for sequences up to 4K in steps of 64K tokens"):
        check_stage_plans(lean, [longer])
