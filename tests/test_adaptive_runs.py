"""Whole runs with parallel.sequence=adaptive: bit-equal after a stop, greedy plans once the planner is gone, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace

import psutil
import pytest

from efflaunch.estimate.measured.profile import load_profiles, save_profile
from efflaunch.launcher.rundir.metrics_reader import MetricsFollower
from efflaunch.tests import test_real_runs as runs
from efflaunch.tests.launcher.runs import descendants, is_alive

STEPS = 16
PATIENT = ("parallel.sequence=adaptive", "parallel.plan_timeout_s=60")
"""So patient that no plan is late: late plans change the order of sums."""
ADAPTIVE = (*PATIENT, "parallel.probe_s=0")
"""By arithmetic: runs that are compared plan by the same costs."""


def train(directory, *overrides):
    return runs.train(directory, *ADAPTIVE, *overrides, steps=STEPS)


def events(directory, kind):
    return [event for event in MetricsFollower(directory / "runs" / "run").read() if event["event"] == kind]


def planner_pids(process):
    lines = []
    for pid in descendants(process.pid):
        try:
            if any("parallel.sequence.service" in word for word in psutil.Process(pid).cmdline()):
                lines.append(pid)
        except psutil.NoSuchProcess:
            continue
    return lines


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run nothing happened to."""
    directory = tmp_path_factory.mktemp("reference")
    runs.make_corpus(directory)
    process = train(directory)
    runs.finish(process, directory)
    assert sorted(runs.losses(directory)) == list(range(1, STEPS + 1))
    return directory


@pytest.fixture
def place(tmp_path, reference):
    for file in reference.glob("corpus.*"):
        shutil.copy(file, tmp_path)
    return tmp_path


def test_what_each_step_says_of_its_plan(reference):
    for event in events(reference, "step"):
        assert event["planned_by"] in ("adaptive", "greedy", "static") and event["plan_totals"]["late"] == 0
        assert 0 < event["lower_bound_s"] <= event["predicted_s"] * (1 + 1e-9) and event["gap"] >= 0 and event["bound"] == "staircase"
        assert 0 <= event["bubble"] < 1
        held = sorted(index for group in event["groups"] for index in group["sequences"])
        assert held == list(range(event["sequences"])) and sum(group["tokens"] for group in event["groups"]) == event["tokens"]
        assert all(group["predicted_s"] > 0 and 0 < group["measured_s"] < event["step_s"] for group in event["groups"])
    totals = events(reference, "step")[-1]["plan_totals"]
    assert totals["steps"] > 0 and totals["static_s"] >= totals["predicted_s"] * (1 - 1e-9)
    assert {group["degree"] for event in events(reference, "step") for group in event["groups"]} == {1, 2}
    text = (reference / "output").read_text()
    assert "x as fast as static groups in the model (" in text and "both modelled; measured steps took " in text and "none late" in text
    (end,) = events(reference, "end")
    assert {row["degree"] for row in end["drift"]} == {1, 2} and end["late_plans"] == 0


def test_a_run_leaves_a_profile_of_itself(reference):
    (profile,) = load_profiles(reference / "runs" / "run" / "profile.yaml")
    assert {row.degree for row in profile.degrees} == {1, 2} and profile.gather_s > 0


def test_stopped_and_started_again_has_the_same_plans_and_losses(place, reference):
    process = runs.hold(place, 6, *ADAPTIVE, steps=STEPS)
    pids = descendants(process.pid)
    assert len(planner_pids(process)) == 1
    runs.stop(place, process, 6)
    assert not [pid for pid in pids if is_alive(pid)]
    # Neither what was measured so far nor a profile that has come up meanwhile changes the plans of this run.
    shutil.copy(place / "runs" / "run" / "profile.yaml", place / "profile.yaml")
    runs.finish(train(place), place)
    assert runs.losses(place) == runs.losses(reference)
    assert plans(place) == plans(reference)


def plans(directory):
    return {event["step"]: [(g["first_rank"], g["degree"], g["sequences"]) for g in event["groups"]] for event in events(directory, "step")}


def test_a_killed_rank_and_a_killed_planner(place, reference):
    process = runs.hold(place, 6, *ADAPTIVE, "checkpoint.every_steps=4", steps=24, then=(14,))
    (planner,) = planner_pids(process)
    os.kill(planner, signal.SIGKILL)
    runs.release(place, 6)
    runs.wait_until_held(place, process, 14)  # plans that were there already are used first
    first = descendants(process.pid)
    os.kill([pid for pid in first if is_alive(pid) and psutil.Process(pid).memory_info().rss > 1 << 28][-1], signal.SIGKILL)
    runs.finish(process, place)
    assert not [pid for pid in first if is_alive(pid)]
    failed = events(place, "planner_failed")
    assert [event["error"] for event in failed] == ["the planning process was killed by SIGKILL"]
    restarted = events(place, "start")[1]["time"]
    steps = events(place, "step")
    without = [event for event in steps if failed[0]["time"] < event["time"] < restarted]
    assert without and {event["planned_by"] for event in without} == {"greedy"}
    assert without[-1]["plan_totals"]["unplanned"] == len(without)
    # The next attempt has a planning process again.
    assert {event["planned_by"] for event in steps if event["time"] > restarted} >= {"adaptive"} and steps[-1]["step"] == 24


def test_without_barriers_the_losses_are_the_same_up_to_rounding(place, reference):
    runs.finish(runs.train(place, *ADAPTIVE, "parallel.barrier_free=true", steps=10), place)
    ours, theirs = runs.losses(place), runs.losses(reference)
    assert all(abs(ours[step] - theirs[step]) < 1e-5 * theirs[step] for step in range(1, 11))
    # Bounds are of steps with barriers.
    assert all(event["lower_bound_s"] is None and event["predicted_s"] > 0 for event in events(place, "step"))


def test_a_probe_changes_nothing_but_plans_and_is_made_once(place):
    """Attempt 1 probes and is killed before it saved anything; attempt 2 starts anew, by the same costs without a probe."""
    process = runs.hold(place, 3, *PATIENT, "parallel.probe_s=5", steps=4)
    os.kill([pid for pid in descendants(process.pid) if psutil.Process(pid).memory_info().rss > 1 << 28][-1], signal.SIGKILL)
    runs.finish(process, place)
    first, second = events(place, "start")
    assert first["cost_model"] == second["cost_model"] and first["costs"] == second["costs"]
    # A loaded machine may hide what tokens cost: then the event has the reason, and arithmetic stays.
    assert first["costs"].startswith("probed before step 1 (") or "a probe before step 1 changed nothing: " in first["costs"]
    kept = json.loads((place / "runs" / "run" / "costs.json").read_text())
    assert kept["origin"] == first["costs"] and kept["model"] == first["cost_model"]
    steps = events(place, "step")
    before = {event["step"]: event for event in steps if event["time"] < second["time"]}
    repeated = {event["step"]: event for event in steps if event["time"] > second["time"]}
    assert sorted(before) == [1, 2] and sorted(repeated) == [1, 2, 3, 4]
    for step, event in before.items():
        assert all(event[key] == repeated[step][key] for key in ("plan", "loss", "grad_norm"))


def test_a_profile_is_taken_used_and_refused_elsewhere(place):
    # Long enough that tokens, not overheads and not neighbours on this machine, decide what a sample takes.
    words = [word for word in runs.BASE if not word.startswith(("run.id", "data.max_seq_len", "data.global", "parallel.tokens"))]
    words += ["data.max_seq_len=8K", "data.global_batch_tokens=8K", "parallel.tokens_per_rank=4K"]
    text = runs.run(place, "profile", *words, "train.steps=20", "--seconds", "1", "--out", "mine.yaml")
    assert "a group's time" in text and "wrote mine.yaml" in text
    (profile,) = load_profiles(place / "mine.yaml")
    assert [row.degree for row in profile.degrees] == [1, 2] and len(profile.collectives) == 4
    runs.finish(runs.train(place, *ADAPTIVE, "parallel.profile=mine.yaml", steps=10), place)
    (start,) = events(place, "start")
    assert start["costs"] == str(place / "mine.yaml") and start["cost_model"]["source"] == "profile"
    save_profile(place / "other.yaml", replace(profile, key=replace(profile.key, hardware="NVIDIA H200")))
    shutil.rmtree(place / "runs")
    text = runs.run(place, "train", *runs.BASE, *ADAPTIVE, "train.steps=10", "parallel.profile=other.yaml", expect=93)
    assert "hardware: NVIDIA H200, not " in text and "Traceback" not in text and not (place / "runs").exists()
