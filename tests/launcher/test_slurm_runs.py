"""launcher=slurm on a real SLURM of three nodes (bench/clusters/slurm.py): real sbatch, real gloo ranks on several nodes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from efflaunch.bench.clusters.slurm import SlurmCluster, why_not
from efflaunch.bench.clusters.spaces import TIMEOUT_S, wait_until
from efflaunch.launcher.rundir.metrics_index import newest_step
from efflaunch.launcher.rundir.metrics_reader import MetricsFollower
from efflaunch.tests.launcher.cluster_jobs import HELD, losses
from efflaunch.tests.launcher.runs import HERE, environment
from efflaunch.tests.launcher.slurm_jobs import ENDED, FAKE, Job, efflaunch, submit
from efflaunch.tests.launcher.test_security import arguments_with, open_to_others
from efflaunch.tests.test_real_runs import BASE as REAL
from efflaunch.tests.test_real_runs import make_corpus

REASON = why_not()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON))]
ROOT = HERE.parent.parent
SECRET = "wandb-key-0123456789abcdef"


@pytest.fixture(scope="module")
def cluster(place: Path) -> Iterator[SlurmCluster]:
    with SlurmCluster(place / "cluster", private={2: place / "private"}) as running:
        yield running


def test_preempted_requeued_and_bit_equal_to_a_local_run(cluster: SlurmCluster, place: Path) -> None:
    make_corpus(place)
    words = [word for word in REAL if not word.startswith(("run.id", "cluster.ranks_per_node", "cluster="))]
    local = [sys.executable, "-m", "efflaunch", *words, "cluster=local_cpu", "cluster.ranks_per_node=2", "train.steps=30", "run.id=local"]
    with (place / "local.out").open("wb") as out:
        reference = subprocess.Popen(local, cwd=place, env=environment(), stdout=out, stderr=out)
    spread = ["cluster=local_cpu", "cluster.ranks_per_node=1", "cluster.num_nodes=2", "launcher=slurm", "train.steps=30", "run.id=real"]
    try:
        text = efflaunch(cluster, place, *words, *spread, script=HELD, WANDB_API_KEY=SECRET, HOLD_STEPS="4")
        job = Job(place / "runs" / "real", cluster)
        assert f"job {job.number} of SLURM submitted" in text
        job.wait_until_held("held-4")
        assert not arguments_with((int(path.name) for path in Path("/proc").glob("[0-9]*")), [SECRET])
        cluster.run("scancel", "--signal=USR2", str(job.number))
        wait_until(lambda: job.state().state == "stopping", "word of the signal")
        (job.run_dir / "released-4").touch(0o600)
        wait_until(lambda: len(job.state().attempts) > 1, "the second attempt")
        assert job.end() == "COMPLETED", job.output()
        assert reference.wait(TIMEOUT_S) == 0, (place / "local.out").read_text()
    finally:
        reference.kill()
        reference.wait()
    first, second = job.state().attempts
    assert (first.exit_code, first.restarted, second.exit_code) == (75, True, 0) and first.last_step == 4
    assert "preempted and saved; requeued, 1 of 100" in job.output() and job.state().state == "done"
    assert job.losses() == losses(place / "runs" / "local") and max(job.losses()) == 30
    logs = [path for path in job.run_dir.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    assert len(logs) > 5 and not [path for path in logs if SECRET.encode() in path.read_bytes()]
    assert not open_to_others(job.run_dir)
    assert "state       done, job" in efflaunch(cluster, place, "status", "runs/real")


def test_a_failing_rank_and_a_mistake(cluster: SlurmCluster, place: Path) -> None:
    """Two jobs side by side: one fails once and is started again on its nodes, the other cannot succeed and is not.

    Where the first fails, the ranks of its other node wait for ever, as they would in a GPU's collective.
    """
    failing = submit(cluster, place, "failing", "train.steps=12", mishaps="raise:3:7,hang:0:7,hang:1:7")
    mistaken = submit(cluster, place, "mistaken", "train.steps=12", mishaps="user:2:3")
    assert failing.end() == "COMPLETED", failing.output()
    first, second = failing.state().attempts
    assert first.failure is not None and first.failure.rank == 3 and first.failure.message == "rank 3: RuntimeError: the wheels came off"
    assert first.decision == "restart 1 of 2 since the last progress" and second.exit_code == 0, failing.output()
    assert failing.losses() == {step: 10.0 / step for step in range(1, 13)}

    assert mistaken.end() == "FAILED"
    assert "ExitCode=93:0" in cluster.run("scontrol", "show", "job", "-o", str(mistaken.number))
    assert len(mistaken.state().attempts) == 1 and mistaken.state().exit_code == 93
    text = efflaunch(cluster, place, "logs", "runs/mistaken")
    assert text.rstrip().endswith("first failure: document 17: found nothing; expected tokens.\n  Try: another corpus")
    assert "rank-0.log" in text and "rank-2.log, in full" in text


def test_a_node_loses_power(cluster: SlurmCluster, place: Path) -> None:
    job = submit(cluster, place, "power", "train.steps=12", mishaps="hold:0:7")
    job.wait_until_held("happened-hold-0-7")
    cluster.crash(1)
    try:
        assert job.end() == "COMPLETED", job.output()
    finally:
        cluster.boot(1)
    first, *_, last = job.state().attempts
    assert first.failure is not None and "without a word" in first.failure.message and first.restarted and last.exit_code == 0
    assert max(job.losses()) == 12
    assert " NodeList=node[0,2] " in cluster.run("scontrol", "show", "job", "-o", str(job.number))
    wait_until(lambda: cluster.states() == ["idle"] * 3, "the node to be back")


def test_status_cancel_and_one_job_a_run(cluster: SlurmCluster, place: Path) -> None:
    """With a restart of the scheduler in between, which the running job must not notice."""
    job = submit(cluster, place, "long", "train.steps=100000", step_s=0.05)
    waiting = submit(cluster, place, "waiting", "train.steps=5", f"launcher.slurm.after=afterok:{job.number}")
    job.wait_for_step(3)
    for node in range(2):
        # Nothing but the job's own network, where others could reach it.
        left = cluster.listening(node)
        assert left and set(left) <= {cluster.address(node), "127.0.0.1"}
    cluster.restart_controller()
    job.wait_for_step(newest_step(job.run_dir) + 3)
    assert re.search(r"state       running, job \d+ RUNNING on node\[", efflaunch(cluster, place, "status", "runs/long"))
    assert "queued, job" in efflaunch(cluster, place, "status", "runs/waiting")
    second = efflaunch(cluster, place, *FAKE, "run.id=long", "train.steps=100000", expect=93)
    assert f"found job {job.number}, RUNNING" in second and "efflaunch cancel" in second
    assert "taken from the queue" in efflaunch(cluster, place, "cancel", "runs/waiting")
    assert waiting.end() == "CANCELLED" and "state       cancelled" in efflaunch(cluster, place, "status", "runs/waiting")
    assert "is told to finish its step, save and stop" in efflaunch(cluster, place, "cancel", "runs/long")
    assert job.end() == "FAILED", job.output()
    assert job.state().state == "preempted" and job.state().exit_code == 75
    stopped_at = max(job.losses())
    assert (job.run_dir / "checkpoints" / f"step-{stopped_at:08d}" / "COMMIT").is_file()
    assert "found no job of it in SLURM" in efflaunch(cluster, place, "cancel", "runs/long", expect=93)


def test_a_script_submitted_by_hand(cluster: SlurmCluster, place: Path) -> None:
    """slurm/efflaunch.sbatch as it stands, but for its marked head: the Python of this test, and the fake training function."""
    text = (ROOT / "slurm" / "efflaunch.sbatch").read_text()
    text = text.replace("python=python\n", f"python={sys.executable}\n").replace(
        "agent_options=()", "agent_options=(--entry fake_training:train)"
    )
    (place / "mine.sbatch").write_text(text)
    words = ["+experiment=quickstart", "cluster.ranks_per_node=2", "train.steps=6", f"run.root={place}/byhand"]
    variables = {**environment(), **cluster.environment, "PYTHONPATH": environment()["PYTHONPATH"]}

    def sbatch(*more: str) -> Job:
        command = ["sbatch", "--parsable", *more[:-1], "mine.sbatch", *words, *filter(None, more[-1:])]
        done = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, done.stderr
        return Job(place / "byhand" / f"job-{int(done.stdout)}", cluster)

    good, wrong = sbatch(""), sbatch("--nodes=1", "cluster.num_nodes=2")
    number = int(good.run_dir.name.partition("-")[2])
    assert cluster.wait_for(number, *ENDED) == "COMPLETED", (place / f"efflaunch-{number}.out").read_text()
    assert good.state().state == "done" and max(good.losses()) == 6 and good.number == str(number)
    assert cluster.wait_for(number + 1, *ENDED) == "FAILED"
    said = (place / f"efflaunch-{number + 1}.out").read_text()
    # srun's own words may come between two lines.
    assert "cluster.num_nodes: found a job of 1 nodes; expected 2.\n" in said and "\n  Try: sbatch --nodes=2, or" in said
    assert wrong.state().exit_code == 93


def test_a_run_directory_that_is_not_shared(cluster: SlurmCluster, place: Path) -> None:
    words = ("run.id=apart", f"run.root={place}/private", "train.steps=5", "launcher.slurm.exclude=[node1]")
    efflaunch(cluster, place, *FAKE, *words)
    job = Job(place / "private" / "apart", cluster)
    assert job.end() == "FAILED", job.output()
    lines = [line for line in job.output().splitlines() if line.startswith(("FAIL", "ok"))]
    assert lines[0].startswith("FAIL  node2  run directory: No such file or directory") and lines[1].startswith("ok    node0")
    assert job.state().exit_code == 93 and job.state().failure is not None
    assert job.state().failure.message.endswith("launcher.slurm.exclude=[node2]")


def test_a_sweep_and_what_comes_after_it(cluster: SlurmCluster, place: Path) -> None:
    efflaunch(cluster, place, "sweep", *FAKE, "cluster.ranks_per_node=1", "run.id=sweep", "train.steps=5", "train.seed=0,1")
    points = [Job(place / "runs" / f"sweep-seed-{seed}", cluster) for seed in range(2)]
    last = submit(cluster, place, "after", "train.steps=5", f"launcher.slurm.after='afterok:{points[0].number}:{points[1].number}'")
    assert last.end() == "COMPLETED", last.output()
    assert [point.end() for point in points] == ["COMPLETED", "COMPLETED"]
    assert all(max(job.losses()) == 5 for job in (*points, last))
    starts = [min(event["time"] for event in MetricsFollower(job.run_dir).read()) for job in (*points, last)]
    assert starts[2] > max(starts[:2])


def test_scancel_by_hand_ends_it_for_good(cluster: SlurmCluster, place: Path) -> None:
    job = submit(cluster, place, "scancelled", "train.steps=100000", step_s=0.05)
    job.wait_for_step(3)
    cluster.run("scancel", str(job.number))
    assert job.end() == "CANCELLED"
    wait_until(lambda: cluster.states() == ["idle"] * 3, "the nodes to be free")
    assert re.search(r"state       (cancelled|preempted|failed), job", efflaunch(cluster, place, "status", "runs/scancelled"))


def test_a_clock_that_is_off(cluster: SlurmCluster, place: Path) -> None:
    """Nodes here share one clock, so the Python of node 1 is told another time."""
    (place / "skewed").mkdir()
    moved = "import os, time\nif os.environ.get('SLURMD_NODENAME') == 'node1':\n    now = time.time\n    time.time = lambda: now() + 45\n"
    (place / "skewed" / "sitecustomize.py").write_text(moved)
    path = f"{place}/skewed:{environment()['PYTHONPATH']}"
    efflaunch(cluster, place, *FAKE, "run.id=skewed", "train.steps=5", "launcher.slurm.exclude=[node2]", PYTHONPATH=path)
    job = Job(place / "runs" / "skewed", cluster)
    assert job.end() == "FAILED", job.output()
    assert job.state().exit_code == 93 and "\nFAIL  node1  its clock is +45 s off the head's; " in job.output()
    assert "Try: mend them, or leave them out: launcher.slurm.exclude=[node1]" in job.output()


def test_the_doctor_asks_the_controller(cluster: SlurmCluster, place: Path) -> None:
    facts = json.loads(efflaunch(cluster, place, "doctor", "--json", "--storage-mib", "0"))
    (slurm,) = (each for each in facts["findings"] if each["name"] == "SLURM")
    assert slurm["state"] == "ok" and slurm["found"].startswith("slurm") and slurm["found"].endswith("is UP")
    assert {each["name"]: each["can"] for each in facts["works"]}["launcher=slurm"] is True


def test_sbatch_refuses(cluster: SlurmCluster, place: Path) -> None:
    text = efflaunch(cluster, place, *FAKE, "run.id=refused", "train.steps=5", "cluster.slurm.partition=nonesuch", expect=93)
    assert "sbatch: found error: " in text and "nvalid partition" in text
    assert "state       failed" in efflaunch(cluster, place, "status", "runs/refused")


def test_nothing_is_left_running(cluster: SlurmCluster) -> None:
    """After all jobs: no agent and no rank of theirs, whatever became of them. The last test of this module."""
    wait_until(lambda: cluster.states() == ["idle"] * 3, "the nodes to be free")
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "launcher.slurm" in command and str(cluster.directory.parent) in command:
            left.append(command)
    assert not left
