"""Metrics events to progress, lines, tables and status."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from efflaunch.launcher.commands import status
from efflaunch.launcher.config.compose import changed, compose
from efflaunch.launcher.config.paths import absolute_paths
from efflaunch.launcher.live_display import LiveDisplay, PlainDisplay
from efflaunch.launcher.rundir import state as states
from efflaunch.launcher.rundir.lock import lock_run
from efflaunch.launcher.rundir.metrics_index import newest_step
from efflaunch.launcher.rundir.metrics_reader import MetricsFollower
from efflaunch.launcher.rundir.progress import RunProgress, drift_line, start_line, step_line, summary_lines
from efflaunch.launcher.rundir.run_dir import config_diff, make_run_dir, read_run, store_config
from efflaunch.launcher.rundir.state import Attempt, Failure, new_state, read_state, write_state


def start(step: int = 1, resumed_from: int | None = None) -> dict[str, Any]:
    return {"event": "start", "step": step, "steps": 10, "world_size": 2, "parameters": 5_000_000, "resumed_from": resumed_from}


def step(number: int, loss: float, step_s: float = 2.0, peak: int = 1 << 30) -> dict[str, Any]:
    ranks = [{"rank": 0, "tokens": 70, "peak_bytes": peak}, {"rank": 1, "tokens": 30, "peak_bytes": 2 << 30}]
    numbers = {
        "tokens": 100,
        "tokens_per_s": 50.0,
        "micro_batches": 1,
        "sequences": 3,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "total_tokens": 100 * number,
    }
    return {"event": "step", "step": number, "loss": loss, "step_s": step_s, "plan": "[0+2: 3 seq]", "ranks": ranks, **numbers}


def test_pace_leaves_the_first_step_out() -> None:
    progress = RunProgress().apply([start(), step(1, 9.0, step_s=30.0), step(2, 8.0), step(3, 7.0, step_s=4.0)])
    assert progress.seconds_per_step == 3.0 and progress.time_left_s == 21.0
    assert step_line(progress) == "step 3/10  loss 7.0000  50 tokens/s  grad 0.500  lr 1.00e-03  4.00 s  21 s to go  [0+2: 3 seq]"


def evaluated(number: int, loss: float, corpus: str = "web") -> dict[str, Any]:
    lengths = [{"length": 8192, "loss": loss + 0.1, "targets": 4}, {"length": 1 << 20, "loss": None, "targets": 4}]
    context = {"tokens": 4096, "targets": 3, "loss": loss, "short_loss": loss + 0.25, "gain": 0.25}
    return {
        "event": "eval", "step": number, "corpus": corpus, "loss": loss, "targets": 1234, "tokens": 5000, "eval_s": 1.5,
        "lengths": lengths, "positions": [], "context": context, "metrics": {f"eval/{corpus}/loss": loss},
    }  # fmt: skip


def test_evaluations_are_shown_and_forgotten_with_their_steps(capsys: pytest.CaptureFixture[str]) -> None:
    best = {"event": "best", "step": 2, "metric": "eval/web/loss", "value": 2.0, "pinned": True}
    early = {"event": "early_stop", "step": 3, "metric": "eval/web/loss", "best": 2.0, "best_step": 2, "evaluations": 3}
    events = [start(), step(1, 9.0), step(2, 8.0), evaluated(2, 2.0), best, step(3, 7.0), early]
    PlainDisplay(1).show(events)
    printed = capsys.readouterr().out
    text = "web 2.0000 (8K 2.1000, 1M unknown), +0.2500 from context beyond 4K"
    assert f"evaluation after step 2: {text}, 1,234 targets, 1.50 s" in printed
    assert "best eval/web/loss so far: 2.0000 at step 2; its checkpoint is pinned" in printed
    assert "ending after step 3: eval/web/loss was no better in 3 evaluations than 2.0000 at step 2" in printed
    rows = dict(summary_lines(RunProgress().apply(events)))
    assert rows["evaluation"] == f"{text}, after step 2" and rows["early end"].startswith("ending after step 3")
    resumed = RunProgress().apply([*events, start(2, resumed_from=1)])
    assert resumed.evaluations == {} and resumed.early_stop is None
    console = Console(file=io.StringIO(), width=160, force_terminal=False)
    display = LiveDisplay("title", console)
    display.show([*events, step(4, 6.0) | {"mfu": 0.415, "hfu": 0.5, "device_tokens_per_s": 25.0}])
    display.close()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{text}, after step 2" in shown and "25 tokens/s a rank, MFU 41.5%, HFU 50.0%" in shown


def test_sources_are_shown_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"name": "code", "tokens": 30, "share": 0.3, "epochs": 1.25, "targets": 0, "loss": None},
        {"name": "web", "tokens": 70, "share": 0.7, "epochs": 0.5, "targets": 9, "loss": 2.5},
    ]
    change = "data.sources from step 3 on: code 30.0 % of the tokens, web 70.0 %"
    events = [start(2, resumed_from=2) | {"mix_change": change}, step(3, 2.5) | {"sources": rows}]
    PlainDisplay(1).show(events)
    printed = capsys.readouterr().out
    assert change in printed and "code unknown  web 2.5000" in printed
    texts = ["code: 30.0% of the tokens, 1.25 epochs", "web: loss 2.5000, 70.0% of the tokens, 0.50 epochs"]
    lines = summary_lines(RunProgress().apply(events))
    assert ("sources", texts[0]) in lines and lines[lines.index(("sources", texts[0])) + 1] == ("", texts[1])
    console = Console(file=io.StringIO(), width=160, force_terminal=False)
    display = LiveDisplay("title", console)
    display.show(events)
    display.close()
    assert all(text in console.file.getvalue() for text in texts)  # type: ignore[attr-defined]


def test_on_cpus_the_models_own_flops_are_shown() -> None:
    events = [start(), step(1, 9.0) | {"device_tokens_per_s": 25.0, "model_flops_per_s": 3.25e9}]
    rows = dict(summary_lines(RunProgress().apply(events)))
    assert rows["speed"] == "25 tokens/s a rank, 3.2 GFLOP/s a rank (model's own, no peak known), in the last step"


def test_lost_steps_are_forgotten_on_resume() -> None:
    events = [start(), step(1, 9.0), step(2, 8.0), step(3, 1.0), start(3, resumed_from=2)]
    progress = RunProgress().apply(events)
    assert progress.losses == {1: 9.0, 2: 8.0} and progress.step == 2
    assert progress.apply([step(3, 7.0)]).losses[3] == 7.0


def test_summary() -> None:
    progress = RunProgress().apply([start(), step(1, 9.0, peak=3 << 30), step(2, 8.0)])
    assert dict(summary_lines(progress)) == {
        "steps": "2 of 10",
        "loss": "9.0000 at step 1, 8.0000 at step 2",
        "tokens": "200, 4.00 s of training",
        "peak memory": "rank 0 3.0 GiB, rank 1 2.0 GiB",
    }
    assert summary_lines(RunProgress()) == []


def test_savings_are_called_modelled_beside_how_far_the_model_is_off() -> None:
    totals = {"late": 0, "steps": 3, "predicted_s": 9.0, "static_s": 18.0}

    def plans(**timed: float) -> str:
        events = [{**start(), "sequence": "adaptive"}, {**step(1, 9.0), "plan_totals": {**totals, **timed}}]
        return dict(summary_lines(RunProgress().apply(events)))["plans"]

    saved = "adaptive; 2.00 x as fast as static groups in the model (3.00 s a step, 6.00 s with static groups, both modelled"
    assert plans(timed_s=8.0, timed_predicted_s=6.4) == f"{saved}; measured steps took 1.25 x the modelled time); none late of 1"
    assert plans(timed_s=0.0, timed_predicted_s=0.0) == plans() == f"{saved}); none late of 1", "one step, or a run of another version"


def test_a_start_says_where_its_times_are_from() -> None:
    event = {**start(), "resumed_from": None, "costs": "probed before step 1"}
    assert "step times are modelled: probed before step 1" in start_line({**event, "sequence": "adaptive"}).splitlines()
    assert "probed" not in start_line({**event, "sequence": "static"})


def test_follower_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    follower = MetricsFollower(tmp_path)
    assert follower.read() == []
    file.write_text(json.dumps(step(1, 9.0)) + "\n" + json.dumps(step(2, 8.0))[:20])
    assert [event["step"] for event in follower.read()] == [1]
    with file.open("a") as stream:
        stream.write(json.dumps(step(2, 8.0))[20:] + "\nhalf a line of a killed rank\n")
    assert [event["step"] for event in follower.read()] == [2]
    assert newest_step(tmp_path) == 2
    assert MetricsFollower(tmp_path, from_end=True).read() == []


def test_newest_step_counts_committed_checkpoints(tmp_path: Path) -> None:
    for name in ("step-00000007", "step-00000009.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000007" / "COMMIT").touch()
    assert newest_step(tmp_path) == 7


def test_plain_display(capsys: pytest.CaptureFixture[str]) -> None:
    display = PlainDisplay(every_steps=2)
    display.show([start(), *(step(number, 9.0 - number) for number in range(1, 5))])
    display.show([{"event": "checkpoint", "step": 4, "path": "checkpoints/step-00000004", "save_s": 0.5}])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "5.0 million weights on 2 ranks, 10 steps, starting from the beginning"
    assert [line.split("/")[0] for line in lines[1:4]] == ["step 1", "step 2", "step 4"]
    assert lines[4] == "saved checkpoints/step-00000004 in 0.50 s"


def test_quiet_display_shows_notes_only(capsys: pytest.CaptureFixture[str]) -> None:
    display = PlainDisplay(every_steps=None)
    display.show([start(), step(1, 9.0)])
    display.note("something went wrong")
    assert capsys.readouterr().out == "something went wrong\n"


def test_experts_and_what_is_dropped_are_shown() -> None:
    balance = {"expert_load": 1.9, "expert_load_layer": 7, "expert_load_mean": 1.25, "idle_experts": 3}
    events = [start(), step(1, 9.0), {**step(2, 8.0), **balance, "dropped_rows": 12, "dropped_share": 0.125}]
    assert "grad 0.500  experts 1.9x  dropped 12.5%  lr" in step_line(RunProgress().apply(events))
    assert "dropped" not in step_line(RunProgress().apply([*events[:2], {**step(2, 8.0), **balance}]))
    display = LiveDisplay("quickstart", Console(file=io.StringIO(), width=120, force_terminal=True))
    try:
        display.show(events)
    finally:
        display.close()
    drawing = Console(file=io.StringIO(), width=140)
    drawing.print(display.render())
    shown = drawing.file.getvalue()  # type: ignore[attr-defined]
    assert "the busiest gets 1.9 times the mean (layer 7), 1.2 over layers, 3 idle, 12.5% of all rows dropped" in shown


def test_live_display_draws_what_each_rank_holds() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    display = LiveDisplay("quickstart", console)
    try:
        display.show([start(), step(1, 9.0), step(2, 8.0), {"event": "checkpoint", "step": 2, "path": "x", "save_s": 1.0}])
    finally:
        display.close()
    drawing = Console(file=io.StringIO(), width=120)
    drawing.print(display.render())
    text = drawing.file.getvalue()  # type: ignore[attr-defined]
    for part in (
        "step 2/10",
        "16 s to go",
        "8.0000  (first 9.0000)",
        "50 tokens/s",
        "step 2",
        "[0+2: 3 seq]",
        "70",
        "1.0 GiB",
    ):
        assert part in text, text


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run_dir = tmp_path / "run"
    make_run_dir(run_dir)
    store_config(run_dir, compose(["+experiment=quickstart", "run.id=run"]))
    return run_dir


def test_revisions(run_dir: Path) -> None:
    config = read_run(run_dir).config
    assert store_config(run_dir, config) == (1, [])
    other = compose(["+experiment=quickstart", "run.id=run", "train.steps=99", "memory=recompute"])
    revision, changes = store_config(run_dir, other)
    assert revision == 2 and f"train.steps: {config.train.steps} -> 99" in changes and "memory.name: auto -> recompute" in changes
    assert read_run(run_dir).config == absolute_paths(other) and (run_dir / "revisions" / "1.yaml").is_file()
    assert config_diff(other, other) == []


def test_resume_overrides(run_dir: Path) -> None:
    from efflaunch.launcher.config.overrides import parse_overrides

    config = read_run(run_dir).config
    new = changed(config, parse_overrides(["train.steps=99", "memory=keep", "optim.grad_clip=null", "data.max_seq_len=4K"]), None)
    assert (new.train.steps, new.memory.name, new.optim.grad_clip, new.data.max_seq_len) == (99, "keep", None, 4096)
    for override, text in (("run.id=x", "a change of it"), ("experiment=llama8b_1M", "a change of it"), ("train.stps=3", "an unknown key")):
        with pytest.raises(Exception, match=text):
            changed(config, parse_overrides([override]), None)


def test_edited_run_file_is_refused(run_dir: Path) -> None:
    with (run_dir / "run.yaml").open("a") as file:
        file.write("# mine\n")
    with pytest.raises(Exception, match=r"contents that do not match run\.sha256"):
        read_run(run_dir)


def test_state_round_trip(tmp_path: Path) -> None:
    failure = Failure(rank=1, message="m", traceback="t", log="logs/attempt-1/rank-1.log")
    attempt = Attempt(number=1, started=1.0, ended=2.0, exit_code=1, last_step=3, failure=failure, decision="d", restarted=True)
    state = write_state(tmp_path, new_state(world_size=2, revision=1, attempts=(attempt,)))
    assert read_state(tmp_path) == state and read_state(tmp_path / "none") is None


def test_status_of_a_run_that_never_started(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.print_status(run_dir, as_json=False) == 0
    assert "state       not started" in capsys.readouterr().out


def test_status_running_and_died(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import os

    failure = Failure(rank=1, message="rank 1 was killed by signal 9 (SIGKILL)", traceback="", log="logs/attempt-1/rank-1.log")
    attempts = (Attempt(number=1, started=1.0, ended=2.0, exit_code=1, failure=failure, decision="restart 1 of 2", restarted=True),)
    state = new_state(world_size=2, revision=1, attempts=attempts)
    write_state(run_dir, states.replace(state, state=states.RUNNING))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in (start(), step(1, 9.0), step(2, 8.0))))
    lock = lock_run(run_dir)
    assert status.print_status(run_dir, as_json=True) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["state"], facts["pid"], facts["step"], facts["loss"], facts["tokens_per_s"]) == ("running", os.getpid(), 2, 8.0, 50.0)
    assert facts["last_error"]["rank"] == 1 and facts["peak_bytes"] == [1 << 30, 2 << 30]
    with pytest.raises(Exception, match=rf"found process {os.getpid()} on .*, there since .* running in it"):
        lock_run(run_dir)
    os.close(lock)
    assert status.print_status(run_dir, as_json=False) == 0
    text = capsys.readouterr().out
    assert "state       died" in text and "killed by signal 9" in text and "efflaunch resume" in text


def test_a_profile_is_advised_where_one_can_be_made() -> None:
    event: dict[str, Any] = {"measured_over_predicted": {"2": 1.5}}
    assert drift_line(event).endswith("groups of 2 take 1.50 x the modelled time (efflaunch profile measures this machine)")
    assert drift_line(event | {"can_profile": False}).endswith("the modelled time"), "stages have none"
