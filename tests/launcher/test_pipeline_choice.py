"""The choice among pipelines: each is judged by the ledger that planning it alone has, and what is left out could not be the best."""

from __future__ import annotations

from dataclasses import replace

import pytest

from efflaunch.errors import ConfigError
from efflaunch.estimate.stages import least_step_s
from efflaunch.launcher.config.compose import changed, compose
from efflaunch.launcher.config.ledger import plan, plan_inputs
from efflaunch.launcher.config.overrides import parse_overrides
from efflaunch.launcher.config.pipeline_choice import candidates, decide_pipeline, try_pipelines
from efflaunch.launcher.config.run_config import Config
from efflaunch.parallel.pipeline.config import PipelineConfig

SLOW_LINKS = (
    "+experiment=llama70b_512k",
    "memory=recompute",
    "cluster.inter_node_bandwidth=1e9",
    "data.max_seq_len=8K",
    "data.global_batch_tokens=4M",
    "parallel.tokens_per_rank=8K",
)
QUICK = ("+experiment=quickstart",)


def silent(line: str) -> None:
    """Nothing is printed."""


def test_slow_links_between_nodes_make_a_pipeline_the_best() -> None:
    """Weights of 70 billion parameters go over 1 GB/s in every micro-batch, or stay where they are."""
    trials = try_pipelines(compose([*SLOW_LINKS]))
    best = trials[0]
    assert best.fits and best.config.parallel.pipeline.stages > 1
    planned = [trial for trial in trials if trial.ledger is not None]
    assert [trial.ledger.timing.step_s for trial in planned if trial.ledger] == sorted(
        trial.ledger.timing.step_s for trial in planned if trial.ledger
    )
    assert any(trial.config.parallel.pipeline.stages == 1 for trial in planned), "none is always among them"


def test_a_ledger_is_that_of_its_words_alone() -> None:
    best = try_pipelines(compose([*SLOW_LINKS]))[0]
    alone = plan(compose([*SLOW_LINKS, *best.overrides]))
    assert best.ledger is not None and alone.timing == best.ledger.timing and alone.device == best.ledger.device


@pytest.mark.parametrize("words", [SLOW_LINKS, QUICK, (*QUICK, "memory=recompute")], ids=["slow links", "quickstart", "recompute"])
def test_what_was_not_planned_takes_longer(words: tuple[str, ...]) -> None:
    """Each of them planned after all: no faster than its bound, and not the best."""
    trials = try_pipelines(compose([*words]))
    best = trials[0].ledger
    left_out = [trial for trial in trials if trial.ledger is None and trial.least_s]
    assert best is not None and left_out
    for trial in left_out[:4]:
        ledger = plan(trial.config)
        assert trial.least_s <= ledger.timing.step_s * (1 + 1e-12) and ledger.timing.step_s >= best.timing.step_s


@pytest.mark.parametrize("memory", ["auto", "keep", "recompute", "streambp"])
def test_no_policy_is_faster_than_the_bound(memory: str) -> None:
    for words in ((), ("parallel.pipeline.stages=2",), ("parallel.grad_reduce=micro_batch",)):
        config = compose([*QUICK, f"memory={memory}", *words])
        assert 0 < least_step_s(plan_inputs(config)) <= plan(config).timing.step_s * (1 + 1e-12)


def test_there_are_ranks_layers_and_room_for_every_candidate() -> None:
    config = compose([*QUICK])
    found = list(candidates(config))
    assert [trial.config.parallel.pipeline.stages for trial in found] == [1, 2, 2, 2, 4, 4], "two layers a stage make virtual ones possible"
    assert found[0].overrides == ("parallel.pipeline.stages=1",)
    # Four ranks of 4K tokens hold the longest sequence; one alone needs room for all of it.
    assert found[-1].config.parallel.tokens_per_rank == config.data.max_seq_len
    for trial in found[1:]:
        assert compose([*QUICK, *trial.overrides]).parallel == trial.config.parallel


def test_what_cannot_run_in_stages_runs_without_and_says_why() -> None:
    trials = try_pipelines(compose([*QUICK, "parallel.barrier_free=true"]))
    assert trials[0].config.parallel.pipeline == PipelineConfig()
    assert all("parallel.barrier_free: true" in trial.reason for trial in trials[1:])


def test_where_nothing_fits_it_is_what_comes_nearest() -> None:
    config = compose([*QUICK, "cluster.device_memory_bytes=200MiB"])
    trials = try_pipelines(config)
    assert not trials[0].fits and all(trial.ledger is not None for trial in trials), "no bound speaks against any of them"
    over = [max(account.peak_bytes / account.capacity_bytes for account in trial.ledger.accounts) for trial in trials if trial.ledger]
    assert over == sorted(over)


def decided(config: Config) -> tuple[Config, list[str]]:
    lines: list[str] = []
    return decide_pipeline(config, lines.append), lines


def test_the_decision_is_told_and_leaves_nothing_open(capsys: pytest.CaptureFixture[str]) -> None:
    config = compose([*SLOW_LINKS, "parallel.pipeline.auto=true"])
    assert config.parallel.pipeline.stages > 1 and not config.parallel.pipeline.auto
    told = capsys.readouterr()
    assert told.out == "" and "parallel.pipeline.stages=" in told.err and "no stages: " in told.err
    again, lines = decided(compose([*QUICK, "parallel.pipeline.micro_batches=3"]))
    assert again.parallel.pipeline == PipelineConfig(micro_batches=3) and lines[-1].endswith("parallel.pipeline.stages=1")


@pytest.mark.parametrize("words", ["stages=2", "layers=[4]", "order=gpipe", "virtual=2"])
def test_what_is_to_be_decided_is_not_given(words: str) -> None:
    with pytest.raises(ConfigError, match="auto=true") as caught:
        compose([*QUICK, "parallel.pipeline.auto=true", f"parallel.pipeline.{words}"])
    assert caught.value.where == f"parallel.pipeline.{words.partition('=')[0]}"
    assert caught.value.hint.endswith(", or parallel.pipeline.auto=false")


def test_a_run_in_stages_can_choose_anew() -> None:
    stored = compose([*QUICK, "parallel.pipeline.stages=2"])
    words = ["parallel.pipeline.stages=1", "parallel.pipeline.auto=true"]
    assert changed(stored, parse_overrides(words, None), None).parallel.pipeline == PipelineConfig()


def test_a_stored_configuration_has_nothing_to_decide() -> None:
    config = compose([*QUICK])
    with pytest.raises(ConfigError, match="no command line was read for"):
        plan(replace(config, parallel=replace(config.parallel, pipeline=PipelineConfig(auto=True))))
