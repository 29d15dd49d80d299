"""Experts spread over ranks as a person runs them: a rank is killed, the run goes on, and then on other numbers of ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from efflaunch.launcher.rundir.metrics_reader import MetricsFollower
from efflaunch.tests.launcher.runs import descendants, is_alive
from efflaunch.tests.test_real_runs import SIDE, command, finish, losses, make_corpus, run, start, wait_until_held

STEPS = 8
SMALL = (
    "+experiment=quickstart_moe", "data=indexed", "data.prefixes=[corpus]", "data.max_seq_len=256", "data.global_batch_tokens=1K",
    "model.num_layers=2", "model.hidden_size=64", "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=16", "model.vocab_size=97",
    "parallel.tokens_per_rank=128", "parallel.probe_s=0", "parallel.experts.ep=2", "optim.schedule=constant", "optim.lr=1e-3",
    "optim.warmup_steps=2", "checkpoint.every_steps=2", "run.id=run", "logging.display=plain",
)  # fmt: skip
"""The experiment's own settings with a corpus that is there and small sizes: four ranks, adaptive groups."""
QWEN = ("model.extra.num_experts=8", "model.extra.moe_intermediate_size=32")
DOTS = (
    "model=dots_llm1", "model.intermediate_size=96", "model.max_positions=1K", "model.extra.n_routed_experts=8",
    "model.extra.n_shared_experts=1", "model.extra.num_experts_per_tok=2", "model.extra.moe_intermediate_size=32",
    "train.router_bias_rate=0.01",
)  # fmt: skip
"""Routers that a bias balances, and a first layer without experts."""
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def ranks_of(pid: int) -> list[int]:
    """The processes of a run's four ranks; a rank's own children plan steps and write checkpoints."""
    (agent,) = (child for child in psutil.Process(pid).children() if "launcher.agent" in command(child.pid))
    ranks = [child.pid for child in agent.children() if child.memory_info().rss > 1 << 28]
    assert len(ranks) == 4, [command(child.pid) for child in agent.children()]
    return ranks


def steps_of(place: Path) -> dict[int, dict]:
    return {event["step"]: event for event in MetricsFollower(place / "runs" / "run").read() if event["event"] == "step"}


@pytest.mark.slow
@pytest.mark.parametrize("more", [QWEN, DOTS], ids=["quickstart_moe", "with router biases"])
def test_a_killed_rank_resumes_and_so_do_other_numbers_of_expert_ranks(tmp_path: Path, more: tuple[str, ...]) -> None:
    undisturbed, place = tmp_path / "undisturbed", tmp_path / "place"
    for each in (undisturbed, place):
        each.mkdir()
        make_corpus(each)
    finish(start(undisturbed, "train", *SMALL, *more, f"train.steps={STEPS + 4}"), undisturbed)
    expected = losses(undisturbed)
    assert sorted(expected) == list(range(1, STEPS + 5)) and expected[STEPS] < expected[1]

    process = start(place, "train", *SMALL, *more, f"train.steps={STEPS}", script=SIDE, HOLD_STEPS="5")
    wait_until_held(place, process, 5)
    pids = descendants(process.pid)
    os.kill(ranks_of(process.pid)[-1], signal.SIGKILL)
    finish(process, place)
    assert "signal 9" in (place / "output").read_text() and not [pid for pid in pids if is_alive(pid)]
    # Plans may come late and be others on a loaded machine: losses are the same but for rounding.
    assert losses(place) == pytest.approx({step: loss for step, loss in expected.items() if step <= STEPS}, rel=1e-3)

    for ep, steps in ((1, STEPS + 2), (4, STEPS + 4)):
        run(place, "resume", "runs/run", f"parallel.experts.ep={ep}", f"train.steps={steps}")
        assert losses(place) == pytest.approx({step: loss for step, loss in expected.items() if step <= steps}, rel=1e-3)
    shown = steps_of(place)
    assert all(event["expert_load"] >= 1.0 for event in shown.values()) and sorted(shown) == sorted(expected)
    if more is DOTS:
        assert_biases_went_on(place, undisturbed, shown)


def assert_biases_went_on(place: Path, undisturbed: Path, shown: dict[int, dict]) -> None:
    """The biases of both runs are whole numbers of steps away from zero, nearly the same, and exported in float32."""
    largest = [event["router_bias"] for _, event in sorted(shown.items())]
    assert largest[0] == pytest.approx(0.01) and max(largest) > 0.02
    exported = []
    for each in (place, undisturbed):
        run(each, "export", "runs/run", "exported")
        exported.append(load_file(each / "exported" / "model.safetensors")[BIAS])
    # A choice between near equals may be rounded otherwise, and with it a count that is at the mean.
    assert str(exported[0].dtype) == "torch.float32" and float((exported[0] - exported[1]).abs().max()) < 0.05
    in_steps = exported[0].double() / 0.01
    assert float((in_steps - in_steps.round()).abs().max()) < 1e-4 and bool(in_steps.round().any())
