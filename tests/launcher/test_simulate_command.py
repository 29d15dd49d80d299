"""`efflaunch simulate` and `efflaunch plan --lengths`: what they say, and that nobody is better than ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from efflaunch.errors import PlanError
from efflaunch.launcher import cli
from efflaunch.launcher.commands.plan_step import draw_step_lengths
from efflaunch.launcher.commands.sequence_plan import step_cost
from efflaunch.launcher.commands.simulate import SimulateRequest, step_lengths
from efflaunch.launcher.config.compose import compose
from efflaunch.parallel.sequence.plan import StepPlan
from efflaunch.parallel.sequence.solve import solve_adaptive, solve_greedy
from efflaunch.parallel.simulate import Contestant, gaps, rows, simulate

NODES = ["+experiment=llama8b_1M", "cluster=a100_40g_8x8", "cluster.num_nodes=2", "data.max_seq_len=128K", "parallel.tokens_per_rank=8K"]


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_ours_is_never_slower_and_never_below_the_bound(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", *NODES, "--lengths", "commoncrawl", "--sequences", "96", "--steps", "3", "--flexsp-steps", "1"]
    shown = run_json(capsys, *words, "--flexsp-seconds", "1")
    planners = {row["name"]: row for row in shown["planners"]}
    assert list(planners) == ["best static degree", "greedy", "FlexSP's MILP", "efflaunch"]
    assert [row["steps"] for row in planners.values()] == [3, 3, 1, 3] and shown["world_size"] == 16
    for step in shown["steps"]:
        ours = step["step_s"]["efflaunch"]
        assert all(ours <= other * (1 + 1e-9) for other in step["step_s"].values())
        assert step["lower_bound_s"] <= ours * (1 + 1e-9) and step["longest"] <= 128 << 10 and step["sequences"] == 96
    for row in planners.values():
        mine = [step["step_s"]["efflaunch"] for step in shown["steps"][: row["steps"]]]
        theirs = [step["step_s"][row["name"]] for step in shown["steps"][: row["steps"]]]
        assert row["speedup"] == pytest.approx(sum(theirs) / sum(mine)) and row["mean_s"] == pytest.approx(sum(theirs) / len(theirs))
        assert row["least"] == pytest.approx(min(a / b for a, b in zip(theirs, mine, strict=True))) and row["least"] >= 1 - 1e-9
    assert 0 <= shown["gap_mean"] <= shown["gap_max"]


def test_the_same_words_give_the_same_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", *NODES, "--lengths", "github", "--sequences", "64", "--steps", "2", "--flexsp-steps", "0"]
    first, repeated, other = (run_json(capsys, *words, "--seed", seed)["steps"] for seed in ("1", "1", "2"))
    assert first == repeated != other


MOE = ["+experiment=qwen3_30b_a3b_1M", "data.max_seq_len=128K", "parallel.tokens_per_rank=32K", "--lengths", "github", "--sequences", "48"]


def test_experts_over_ranks_cost_exchanges_and_waiting(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", *MOE, "--steps", "2", "--flexsp-steps", "0"]
    gathered, spread = (run_json(capsys, *words, f"parallel.experts.ep={ep}") for ep in (1, 8))
    sizes = {"experts": 128, "experts_per_token": 8, "layers": 48}
    assert sizes.items() <= gathered["experts"].items() and sizes.items() <= spread["experts"].items()
    assert 3.0e9 < spread["experts"]["active_parameters"] == gathered["experts"]["active_parameters"] < 3.4e9
    assert (gathered["experts"]["exchange_s"], gathered["experts"]["wait_s"], gathered["experts"]["imbalance"]) == (0.0, 0.0, 1.0)
    experts = spread["experts"]
    assert experts["imbalance"] == 1.5 and experts["exchange_s"] > 0 and experts["wait_s"] > 0
    # Both are in the steps, which lack nothing else but what need not be gathered any more.
    added = experts["exchange_s"] + experts["wait_s"]
    means = [row["planners"][-1]["mean_s"] for row in (gathered, spread)]
    assert 0 < means[1] - means[0] < 1.5 * added


def test_what_is_assumed_of_experts_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", *MOE, "--steps", "1", "--flexsp-steps", "0"]
    assert cli.main([*words, "parallel.experts.ep=8"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "8 of 128 experts" in shown and "rows to experts on 8 ranks and back, not hidden" in shown
    assert "the busiest rank, which is taken to get 1.5 times the mean." in shown
    assert cli.main(words) == 0 and "experts are gathered as all weights are." in " ".join(capsys.readouterr().out.split())


def test_a_table_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", *NODES, "--lengths", "wikipedia", "--sequences", "64", "--steps", "2", "--flexsp-steps", "0"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "llama8b_1M on 16 ranks of a100_40g_8x8",
        "best static degree",
        "greedy",
        "efflaunch is faster",
        "above the best there can be",
    ):
        assert part in shown, shown


def test_a_thousand_ranks_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("\n".join(["64K", "20K", *["2000"] * 30, *["300"] * 200]))
    words = [
        "simulate",
        *NODES,
        "cluster.num_nodes=128",
        "--lengths",
        str(lengths),
        "--steps",
        "1",
        "--sequences",
        "500",
        "--flexsp-steps",
        "0",
    ]
    shown = run_json(capsys, *words)
    assert shown["world_size"] == 1024 and shown["longest"] == 64 << 10


def test_plan_with_lengths_of_a_file_is_that_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("70000 300 4096 12")
    shown = run_json(capsys, "plan", *NODES, "--lengths", str(lengths))
    held = sorted(length for batch in shown["micro_batches"] for group in batch["groups"] for length in group["lengths"])
    assert held == [12, 300, 4096, 70000] and shown["longest"]["tokens"] == 70000 and shown["longest"]["degree"] >= 16
    assert shown["lengths"] == str(lengths)


def test_plan_with_a_distribution_shows_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "step.svg"
    words = ["plan", *NODES, "parallel.sequence=adaptive", "--lengths", "commoncrawl", "--sequences", "200", "--out", str(picture)]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "200 sequences" in shown and "Next best" in shown and f"wrote {picture}" in shown
    assert "llama3_8b, lengths of commoncrawl" in picture.read_text()


def test_a_step_holds_the_tokens_of_a_batch_where_no_number_is_given() -> None:
    config = compose(NODES)
    lengths = draw_step_lengths(config, "wikipedia", None, 5)
    assert sum(lengths[:-1]) < config.data.global_batch_tokens <= sum(lengths)
    request = SimulateRequest(lengths="wikipedia", sequences=None, seed=5, steps=2, flexsp_steps=0, flexsp_s=1.0)
    for step in step_lengths(config, request):
        assert sum(step[:-1]) < config.data.global_batch_tokens <= sum(step)


def test_a_certificate_is_at_least_the_closed_bound(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", *NODES, "parallel.sequence=adaptive", "--lengths", "commoncrawl", "--sequences", "40"]
    closed, tighter = run_json(capsys, *words), run_json(capsys, *words, "--certify", "1")
    assert closed["bound"] == "staircase" and tighter["bound"] in ("staircase", "class MILP")
    assert closed["lower_bound_s"] <= tighter["lower_bound_s"] <= tighter["predicted_s"] * (1 + 1e-9)
    assert tighter["predicted_s"] == closed["predicted_s"]
    assert cli.main([*words, "--certify", "0"]) == 93
    assert "argument --certify: '0' is not more than 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "wikipedia", "--steps", "0"], "argument --steps: '0' is not a whole number, 1 or more"),
        (["--lengths", "nothing"], "--lengths: found 'nothing', which is no file"),
        ([], "the following arguments are required: --lengths"),
        (["--lengths", "wikipedia", "--sequences", "0"], "argument --sequences: '0' is not a whole number, 1 or more"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert cli.main(["simulate", "+experiment=quickstart", *words]) == 93
    assert message in capsys.readouterr().err


def test_a_file_with_a_sequence_nobody_can_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("129K")
    assert cli.main(["plan", *NODES, "--lengths", str(lengths)]) == 93
    assert "a sequence of 132096 tokens" in capsys.readouterr().err


def test_planners_that_cannot_are_left_out_and_judged_by_the_model() -> None:
    cost = step_cost(compose(NODES))

    def never(lengths: Any, model: Any) -> StepPlan:
        raise PlanError("x", found="y", expected="z", hint="w")

    asked = [
        Contestant(name="never", plan=never),
        Contestant(name="greedy", plan=solve_greedy),
        Contestant(name="ours", plan=solve_adaptive, max_steps=1),
    ]
    steps = simulate([(5000, 300), (700, 20, 9)], cost, asked)
    assert [list(step.outcomes) for step in steps] == [["greedy", "ours"], ["greedy"]]
    assert steps[0].outcomes["ours"].step_s == cost.plan_s(solve_adaptive((5000, 300), cost))
    assert [(row.name, row.steps) for row in rows(steps, "ours")] == [("greedy", 2), ("ours", 1)] and len(gaps(steps, "ours")) == 1
    with pytest.raises(PlanError):
        simulate([(5000,)], cost, asked[:1])
