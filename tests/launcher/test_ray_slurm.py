"""slurm/ray.sbatch on a real SLURM of three nodes: Ray comes up on the job's nodes, and goes with it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from efflaunch.bench.clusters.ray import why_not as why_no_ray
from efflaunch.bench.clusters.slurm import SlurmCluster, why_not
from efflaunch.bench.clusters.spaces import TIMEOUT_S, wait_until
from efflaunch.launcher.ray.on_slurm import ray_command
from efflaunch.launcher.rundir.metrics_index import newest_step
from efflaunch.launcher.rundir.metrics_reader import MetricsFollower
from efflaunch.launcher.rundir.progress import RunProgress
from efflaunch.launcher.rundir.state import read_state
from efflaunch.tests.launcher.runs import HERE, environment

REASON = why_not() or why_no_ray()
needs_both = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SCRIPT = HERE.parent.parent / "slurm" / "ray.sbatch"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def test_the_script_is_sound() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True).stderr == ""
    lines = [line.partition("#")[0] for line in SCRIPT.read_text().splitlines() if not line.startswith("#")]
    assert not any("ray stop" in line for line in lines)


def test_the_head_and_the_others() -> None:
    head = ray_command("10.0.0.1:20017", "10.0.0.1", 8, Path("/tmp/ray1/t"), ["--num-gpus=1"])
    assert head[-3:] == ["--head", "--port=20017", "--dashboard-host=10.0.0.1"] and "--num-gpus=1" in head and "--block" in head
    other = ray_command("10.0.0.1:20017", "10.0.0.2", 8, Path("/tmp/ray1/t"))
    assert other[-1] == "--address=10.0.0.1:20017" and "--node-ip-address=10.0.0.2" in other and "--head" not in other


@pytest.fixture(scope="module")
def cluster(place: Path) -> Iterator[SlurmCluster]:
    with SlurmCluster(place / "cluster") as running:
        yield running


@needs_both
@pytest.mark.slow
def test_asked_to_save_requeued_and_finished(cluster: SlurmCluster, place: Path) -> None:
    """The script as it stands but for its Python; the fake training function in place of the real one."""
    text = SCRIPT.read_text().replace("python=python\n", f"python={sys.executable}\n")
    text = text.replace('"$python" -m efflaunch cluster.', f'"$python" {HERE / "drive.py"} cluster.')
    (place / "mine.sbatch").write_text(text.replace("ray_options=()", "ray_options=(--object-store-memory=80000000)"))
    words = ["+experiment=quickstart", "cluster.ranks_per_node=1", "train.steps=150", "checkpoint.every_steps=5", f"run.root={place}/runs"]
    variables = {**environment(), **cluster.environment, "PYTHONPATH": environment()["PYTHONPATH"]}
    variables = {name: value for name, value in variables.items() if not name.startswith("RAY_")}
    command = ["sbatch", "--parsable", "mine.sbatch", *words, "launcher.ray.env=[HOME,FAKE_STEP_S]"]
    done = subprocess.run(command, cwd=place, env={**variables, "FAKE_STEP_S": "0.1"}, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    job = int(done.stdout)
    run_dir, output = place / "runs" / f"job-{job}", place / f"efflaunch-ray-{job}.out"

    def reached() -> bool:
        assert cluster.job_state(job) not in ENDED, output.read_text()
        return newest_step(run_dir) >= 6

    wait_until(reached, "step 6")
    cluster.run("scancel", "--batch", "--signal=USR2", str(job))
    assert cluster.wait_for(job, *ENDED) == "COMPLETED", output.read_text()
    run_state = read_state(run_dir)
    assert (
        run_state is not None and [attempt.exit_code for attempt in run_state.attempts] == [75, 0] and run_state.attempts[0].last_step < 150
    )
    losses = RunProgress().apply(MetricsFollower(run_dir).read()).losses
    assert losses == {step: 10.0 / step for step in range(1, 151)}
    assert " Restarts=1 " in cluster.run("scontrol", "show", "job", "-o", str(job))
    wait_until(lambda: cluster.states() == ["idle"] * 3, "the nodes to be free")
    left = [path for path in Path("/proc").glob("[0-9]*") if _belongs(path, cluster)]
    assert not left


def _belongs(process: Path, cluster: SlurmCluster) -> bool:
    """Whether it is one of Ray's or of ours on the cluster's nodes, by the network address in its arguments."""
    try:
        command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return False
    return cluster.net in command and any(word in command for word in ("raylet", "gcs_server", "efflaunch.launcher"))
