"""launcher.ray.local=true: a Ray of this machine for one run, in the foreground."""

from __future__ import annotations

import importlib.util
import ipaddress
import signal
from pathlib import Path

import psutil
import pytest

from efflaunch.launcher.rundir.metrics_reader import MetricsFollower
from efflaunch.launcher.rundir.progress import RunProgress
from efflaunch.tests.launcher.runs import BASE, Run, descendants, is_alive
from efflaunch.tests.launcher.test_security import open_sockets

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='no ray: pip install "efflaunch[ray]"'),
]


def test_stopped_and_resumed(tmp_path: Path) -> None:
    words = (*BASE, "launcher=ray", "launcher.ray.local=true", "train.steps=100000", "checkpoint.every_steps=2000")
    run = Run(tmp_path, "train", *words, step_s=0.05)
    run.wait_for_step(3)
    below = descendants(run.process.pid)
    names = [psutil.Process(pid).name() for pid in below]
    assert "raylet" in names and any(name.startswith("ray::NodeKeeper") for name in names)
    rank = next(pid for pid in below if "efflaunch.launcher.ray.task" in " ".join(psutil.Process(pid).cmdline()))
    given = psutil.Process(rank).environ()
    # Ray's own daemons, its metrics and ours.
    addresses = set(open_sockets([run.process.pid, *below]))
    assert addresses and all(ipaddress.ip_address(address.removeprefix("::ffff:")).is_loopback for address in addresses), addresses
    assert "RAY_AUTH_TOKEN" not in given and given["HOME"] == psutil.Process().environ()["HOME"]
    daemon = psutil.Process(below[names.index("raylet")])
    token, home = daemon.environ()["RAY_AUTH_TOKEN"], Path(daemon.environ()["HOME"])
    assert len(token) == 64 and daemon.environ()["RAY_USAGE_STATS_ENABLED"] == "0"
    assert not any(token in " ".join(psutil.Process(pid).cmdline()) for pid in below)
    run.send(signal.SIGINT)
    assert run.wait() == 75, run.text()
    saved = max(RunProgress().apply(MetricsFollower(run.run_dir).read()).losses)
    assert (run.run_dir / "checkpoints" / f"step-{saved:08d}" / "COMMIT").is_file() and "stopped and saved" in run.text()
    assert not [pid for pid in below if is_alive(pid)] and not home.exists()

    resumed = Run(tmp_path, "resume", "runs/run", f"train.steps={saved + 4}")
    assert resumed.wait() == 0, resumed.text()
    assert max(RunProgress().apply(MetricsFollower(run.run_dir).read()).losses) == saved + 4
