"""efflaunch sweep: combinations, names, and what is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher import cli, start
from efflaunch.launcher.commands.sweep import expand
from efflaunch.launcher.config.overrides import split_values
from efflaunch.launcher.config.run_config import Config


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1", ["1"]),
        ("1,2", ["1", "2"]),
        ("[1,2],[3]", ["[1,2]", "[3]"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("", [""]),
        ('"it\'s,",b', ['"it\'s,"', "b"]),
    ],
)
def test_values(text: str, values: list[str]) -> None:
    assert split_values(text) == values


def test_points() -> None:
    points = expand(["+experiment=quickstart", "optim.lr=1e-3,1e-4", "train.seed=0,1"])
    assert [point.suffix for point in points] == ["lr-1e-3-seed-0", "lr-1e-3-seed-1", "lr-1e-4-seed-0", "lr-1e-4-seed-1"]
    assert points[2].overrides == ("+experiment=quickstart", "optim.lr=1e-4", "train.seed=0")
    alike = expand(["data.prefixes=[a/b],[a:b]"])
    assert len({point.suffix for point in alike}) == 2
    with pytest.raises(ConfigError, match="sweep: found one value for every key"):
        expand(["+experiment=quickstart"])


def test_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    started: list[Config] = []
    codes = iter([1, 0, 75])
    monkeypatch.setattr(start, "launch", lambda config: started.append(config) or next(codes))  # type: ignore[func-returns-value]
    words = ["sweep", "+experiment=quickstart", "run.id=try", "train.seed=0,1,2,3"]
    assert cli.main(words) == 1
    assert [(config.run.id, config.train.seed) for config in started] == [("try-seed-0", 0), ("try-seed-1", 1), ("try-seed-2", 2)]
    assert cli.main([*words, "launcher=slurm", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert [f"run_dir={tmp_path}/runs/try-seed-{seed}\n" in printed for seed in range(4)] == [True] * 4
    assert cli.main(["sweep", "+experiment=quickstart", "train.sed=0,1"]) == 93
    assert "train.sed: found an unknown key" in capsys.readouterr().err and len(started) == 3
