"""The checkpoint benchmark measures what it says and its page shows it; small, and no figure is judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from efflaunch.bench import chaos, checkpoint
from efflaunch.bench.report import page

KEYS = ("stall_vs_sync", "durable_vs_raw", "step_inflation", "restore_vs_dcp", "hash_cost", "hash_share")


@pytest.mark.filterwarnings("ignore")
def test_every_contestant_saves_and_the_page_shows_it(tmp_path: Path) -> None:
    words = ["--gigabytes", "0.02", "--rounds", "1", "--window", "0.3", "--training-steps", "0", "--folder", str(tmp_path)]
    others = "ours_unhashed,ours_replicated,torch_save,dcp,async_thread,raw"
    checkpoint.main([*words, "--contestants", others, "--json", str(tmp_path / "a.json")])
    result = json.loads((tmp_path / "a.json").read_text())
    assert all(isinstance(result[key], float) for key in KEYS) and result["num_bytes"] > 1.6e7
    assert set(result["contestants"]) == {"ours", *others.split(","), "nothing"}
    assert "| ours |" in page([result]) and "at least 0.7" in page([result])


def test_damage_trials_count_and_show(tmp_path: Path) -> None:
    assert chaos.main(["--kills", "0", "--faults", "4", "--folder", str(tmp_path), "--json", str(tmp_path / "c.json")]) == 0
    result = json.loads((tmp_path / "c.json").read_text())
    assert (result["faults"], result["lost"], result["torn"], result["silent"]) == (4, 0, 0, 0)
    assert "0 of 0 kills, 4 of 4 damaged checkpoints" in page([result]) and "fault " in page([result])


def test_a_run_that_was_cut_off_is_counted_on(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    words = ["--kills", "0", "--folder", str(tmp_path), "--json", str(file)]
    assert chaos.main([*words, "--faults", "3"]) == 0
    assert chaos.main([*words, "--faults", "5", "--resume"]) == 0
    result = json.loads(file.read_text())
    assert (result["faults"], sum(result["tallies"]["faults"]["by_kind"].values()), result["asked"]["faults"]) == (5, 5, 5)
    # From the start it is the same series.
    assert chaos.main([*words, "--faults", "5"]) == 0
    assert json.loads(file.read_text())["tallies"]["faults"] == result["tallies"]["faults"]
