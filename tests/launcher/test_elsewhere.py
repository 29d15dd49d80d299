"""A run that one launcher has is not started by another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher.backend import Standing
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.rundir import state
from efflaunch.launcher.rundir.run_dir import make_run_dir, store_config
from efflaunch.launcher.slurm.launcher import SlurmLauncher
from efflaunch.launcher.start import check_elsewhere

LOCAL = compose(["+experiment=quickstart", "run.id=run"])
SLURM = compose(["+experiment=quickstart", "run.id=run", "launcher=slurm"])


@pytest.fixture
def queued(tmp_path: Path) -> Path:
    make_run_dir(tmp_path / "run")
    store_config(tmp_path / "run", SLURM)
    run_state = state.new_state(world_size=4, revision=1, attempts=())
    state.write_state(tmp_path / "run", replace(run_state, state=state.QUEUED, job="17"))
    return tmp_path / "run"


def stands(monkeypatch: pytest.MonkeyPatch, what: str) -> list[Path]:
    """SLURM's answer; returns the run directories it is asked about from now on."""
    asked: list[Path] = []

    def status(self: SlurmLauncher, run_dir: Path, run_state: object) -> Standing:
        asked.append(run_dir)
        return Standing(state=what, detail=f"job 17 {what}", job="17")

    monkeypatch.setattr(SlurmLauncher, "status", status)
    return asked


def test_a_queued_job_is_not_started_here(queued: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stands(monkeypatch, state.QUEUED)
    with pytest.raises(ConfigError, match="found the run queued under launcher=slurm: job 17 queued") as caught:
        check_elsewhere(LOCAL, queued)
    assert f"efflaunch cancel {queued}" in str(caught.value)
    check_elsewhere(SLURM, queued)


@pytest.mark.parametrize("what", ["died", state.DONE, state.PREEMPTED, "cancelled"])
def test_one_that_is_over_is(queued: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The other backend is asked, once, and what it answers counts."""
    asked = stands(monkeypatch, what)
    check_elsewhere(LOCAL, queued)
    assert asked == [queued]


def test_a_new_run_has_no_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is asked."""
    asked = stands(monkeypatch, state.QUEUED)
    check_elsewhere(LOCAL, tmp_path / "none")
    assert asked == []
