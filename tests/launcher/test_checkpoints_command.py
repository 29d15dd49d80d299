"""`efflaunch checkpoints`: what it lists, and what its exit code says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from efflaunch.bench.chaos import State
from efflaunch.checkpoint import files
from efflaunch.checkpoint.config import Replica
from efflaunch.launcher.cli import main
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.rundir.lock import holding
from efflaunch.launcher.rundir.run_dir import make_run_dir, read_run, store_config
from efflaunch.launcher.slurm.launcher import SlurmLauncher


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with two checkpoints, mirrored."""
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "there"
    config = compose(["+experiment=quickstart", "run.id=run", f"checkpoint.mirror={there}"])
    path = tmp_path / "runs" / "run"
    make_run_dir(path)
    store_config(path, config)
    state = State()
    engine = state.engine(path / "checkpoints", mirror=str(there))
    for step in (1, 2):
        state.set(step)
        engine.save(step, {})
        engine.wait(mirrored=True)
    engine.close()
    return path


def _rows(capsys: pytest.CaptureFixture[str], *words: str, expect: int = 0) -> list[dict[str, object]]:
    assert main(["checkpoints", *words, "--json"]) == expect
    rows: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return rows


def test_both_places_are_listed_and_verified(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = _rows(capsys, str(run_dir))
    assert [(row["step"], row["state"]) for row in rows] == [(1, "committed"), (2, "committed")] * 2
    assert {row["where"] for row in rows} == {"here", str(run_dir.parent.parent / "there")}
    assert all(row["state"] == "verified" for row in _rows(capsys, str(run_dir), "--verify"))
    assert main(["checkpoints", str(run_dir)]) == 0
    assert "--verify reads every byte" in capsys.readouterr().out


def test_damage_that_only_hashes_show(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = run_dir / "checkpoints" / "step-00000002" / "__0_0.distcp"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    _rows(capsys, str(run_dir))
    rows = _rows(capsys, str(run_dir), "--verify", expect=93)
    assert [row["state"] for row in rows] == ["verified", "damaged", "verified", "verified"]
    assert "__0_0.distcp" in str(rows[1]["problems"])
    (victim.parent / "COMMIT").unlink()
    _rows(capsys, str(run_dir), expect=93)


def test_pinned_ones_say_so(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(run_dir), "--pin", "1"]) == 0
    assert "pinned" in capsys.readouterr().out
    assert files.scan(run_dir / "checkpoints")[0].is_pinned
    assert main(["checkpoints", str(run_dir), "--unpin", "1"]) == 0
    assert not files.scan(run_dir / "checkpoints")[0].is_pinned
    assert main(["checkpoints", str(run_dir), "--pin", "7"]) == 93
    assert "one of the steps there are: 1, 2" in capsys.readouterr().err


def test_listing_imports_nothing_heavy(run_dir: Path) -> None:
    code = "import sys; from efflaunch.launcher.cli import main; main(sys.argv[1:]); sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    words = ["checkpoints", str(run_dir), "--verify"]
    assert subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=False).returncode == 0


def test_what_is_in_memory_alone_is_listed_and_is_no_checkpoint(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = State()
    engine = state.engine(run_dir / "checkpoints", replica=Replica.PEER, mirror=str(run_dir.parent.parent / "there"))
    state.set(3)
    engine.save(3, {})
    engine.wait(replicated=True, mirrored=True)
    rows = [row for row in _rows(capsys, str(run_dir)) if str(row["where"]).startswith("memory of")]
    assert [(row["step"], row["state"]) for row in rows] == [(3, "replicated")] and "(1 of 1 ranks)" in str(rows[0]["where"])
    for step in (2, 3):
        (run_dir / "checkpoints" / f"step-0000000{step}" / "COMMIT").unlink()
    # Damage on disk is not made good by memory.
    assert any(row["state"] == "replicated" for row in _rows(capsys, str(run_dir), expect=93))
    assert main(["checkpoints", str(run_dir)]) == 93
    assert "replicated" in capsys.readouterr().out
    engine.close()
    assert not [row for row in _rows(capsys, str(run_dir), expect=93) if row["state"] == "replicated"]


def test_a_mirror_that_lacks_the_newest_is_no_success(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = run_dir.parent.parent / "there"
    shutil.rmtree(there / "step-00000002")
    (row,) = (row for row in _rows(capsys, str(run_dir), expect=93) if row["state"] == "missing")
    assert (row["step"], row["where"], row["problems"]) == (2, str(there), ["it was never copied there"])
    with holding(run_dir):
        # It may be on its way, unless the run has said that it is not.
        _rows(capsys, str(run_dir))
        event = {"event": "mirror_failed", "step": 2, "error": "OSError: away"}
        (run_dir / "metrics.jsonl").write_text(json.dumps(event) + "\n")
        rows = _rows(capsys, str(run_dir), expect=93)
    assert "OSError: away" in str(rows[-1]["problems"])
    assert main(["status", str(run_dir), "--json"]) == 0
    assert "OSError: away" in json.loads(capsys.readouterr().out)["mirror_error"]


def test_a_mirror_that_cannot_be_read_hides_nothing_of_what_is_here(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = read_run(run_dir).config
    checkpoint = replace(config.checkpoint, mirror="nosuch://bucket/run")
    store_config(run_dir, replace(config, checkpoint=checkpoint))
    rows = _rows(capsys, str(run_dir), expect=93)
    assert [(row["step"], row["state"]) for row in rows] == [(1, "committed"), (2, "committed"), (None, "unreachable")]
    assert main(["checkpoints", str(run_dir)]) == 93 and "nosuch" in capsys.readouterr().out


def test_a_mirror_that_cannot_be_written_is_refused_before_a_run_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for mirror, found in (("file/there", "file, which is no directory"), ("''", "found ''"), (str(tmp_path), "which holds other things")):
        assert main(["+experiment=quickstart", "run.id=run", f"checkpoint.mirror={mirror}"]) == 93
        error = capsys.readouterr().err
        assert error.startswith("efflaunch: checkpoint.mirror: found") and found in error, error
        # Jobs of a scheduler are refused where they are submitted, as far as that can be seen from there.
        words = ["+experiment=quickstart", "run.id=run", "launcher=slurm", f"checkpoint.mirror={mirror}"]
        monkeypatch.setattr(SlurmLauncher, "check", lambda launcher, config: None)
        assert main(words) == 93 and capsys.readouterr().err.startswith("efflaunch: checkpoint.mirror: found")
    assert os.listdir(tmp_path) == ["file"]
