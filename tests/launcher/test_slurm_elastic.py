"""launcher=slurm on a real SLURM of three nodes: runs that shrink and grow, nodes left out, job arrays, time limits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from efflaunch.bench.clusters.slurm import SlurmCluster, why_not
from efflaunch.bench.clusters.spaces import TIMEOUT_S, wait_until
from efflaunch.launcher.rundir.metrics_index import newest_step
from efflaunch.launcher.rundir.metrics_reader import MetricsFollower
from efflaunch.launcher.rundir.run_dir import read_attempt, read_run
from efflaunch.tests.launcher.cluster_jobs import losses
from efflaunch.tests.launcher.runs import HERE, environment
from efflaunch.tests.launcher.slurm_jobs import ENDED, FAKE, Job, efflaunch, submit
from efflaunch.tests.test_real_runs import BASE as REAL
from efflaunch.tests.test_real_runs import make_corpus

REASON = why_not()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON))]
STEPS = 40


@pytest.fixture(scope="module")
def cluster(place: Path) -> Iterator[SlurmCluster]:
    """Node 1 does not see what the others have in `private`."""
    with SlurmCluster(place / "cluster", private={1: place / "private"}) as running:
        yield running


def steps_of(run_dir: Path) -> dict[int, tuple[int, int, int]]:
    """Of each step as it counts in the end: tokens, sequences and target tokens of its global batch."""
    events = [event for event in MetricsFollower(run_dir).read() if event["event"] == "step"]
    for event in events:
        held = sorted(n for row in event["groups"] for n in row["sequences"])
        assert set(held) == set(range(event["sequences"])), "every sequence of the batch has a place"
    return {event["step"]: (event["tokens"], event["sequences"], event["target_tokens"]) for event in events}


def weights(place: Path, name: str) -> dict[str, torch.Tensor]:
    command = [sys.executable, "-m", "efflaunch", "export", f"runs/{name}", f"exported-{name}", "--dtype", "float32"]
    done = subprocess.run(command, cwd=place, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return load_file(place / f"exported-{name}" / "model.safetensors")


@pytest.mark.slow
def test_three_nodes_two_nodes_three_nodes(cluster: SlurmCluster, place: Path) -> None:
    """A node loses power: the run continues in the same job on the two that are left. Requeued, it has three again."""
    make_corpus(place)
    words = [word for word in REAL if not word.startswith(("run.id", "cluster.ranks_per_node"))] + [f"train.steps={STEPS}"]
    local = [sys.executable, "-m", "efflaunch", *words, "cluster.ranks_per_node=2", "run.id=local"]
    with (place / "local.out").open("wb") as out:
        reference = subprocess.Popen(local, cwd=place, env=environment(), stdout=out, stderr=out)
    try:
        spread = ("cluster.ranks_per_node=1", "launcher=slurm", "launcher.nodes=2:3", "run.id=elastic")
        efflaunch(cluster, place, *words, *spread, script=None)
        job = Job(place / "runs" / "elastic", cluster)
        job.wait_for_step(8)
        cluster.crash(1)
        wait_until(lambda: len(job.state().attempts) > 1, "the second attempt")
        assert "nodes       2 of 2:3, 2 ranks: node0, node2" in efflaunch(cluster, place, "status", "runs/elastic")
        cluster.boot(1)
        wait_until(lambda: "idle" in cluster.states(), "the node to be back")
        job.wait_for_step(job.state().attempts[0].last_step + 1)
        cluster.run("scancel", "--signal=USR2", job.number)
        assert job.end() == "COMPLETED", job.output()
        assert reference.wait(TIMEOUT_S) == 0, (place / "local.out").read_text()
    finally:
        reference.kill()
        reference.wait()
    attempts = job.state().attempts
    sizes = [(item.num_nodes, item.world_size, item.exit_code) for item in attempts]
    # SLURM tells a node that is back, late, to end the step it had; by then the requeued job has one of that number.
    assert sizes[:2] == [(3, 3, 1), (2, 2, 75)] and sizes[-1] == (3, 3, 0) and set(sizes[2:-1]) <= {(3, 3, 75)}, job.output()
    assert attempts[0].lost == ("node1",) and attempts[1].hosts == ("node0", "node2")
    assert attempts[0].place == attempts[1].place != attempts[2].place
    assert "cluster.num_nodes: 3 -> 2" in job.output() and "2 nodes of launcher.nodes=2:3, 2 available: node0, node2" in job.output()
    assert read_run(job.run_dir).config.cluster.num_nodes == 3 and read_attempt(job.run_dir, 2).cluster.num_nodes == 2
    local_dir = place / "runs" / "local"
    assert steps_of(job.run_dir) == steps_of(local_dir) and len(set(steps_of(local_dir).values())) > STEPS // 2
    for step, loss in losses(local_dir).items():
        assert abs(job.losses()[step] - loss) < 1e-4 * loss, step
    ours, theirs = weights(place, "elastic"), weights(place, "local")
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_nodes_are_left_out(cluster: SlurmCluster, place: Path) -> None:
    """One that fails the preflight, at once; one on which ranks are killed, the second time. Both jobs continue on other nodes."""
    wait_until(lambda: cluster.states() == ["idle"] * 3, "the nodes to be free")
    efflaunch(cluster, place, *FAKE, "run.id=apart", f"run.root={place}/private", "train.steps=5")
    unfit = Job(place / "private" / "apart", cluster)
    killed = submit(cluster, place, "killed", "train.steps=12", "launcher.slurm.exclude=[node2]", mishaps="kill:1:4,kill:1:6")
    assert unfit.end() == "COMPLETED", unfit.output()
    first, last = unfit.state().attempts
    assert first.hosts == ("node0", "node1") and last.hosts == ("node0", "node2") and max(unfit.losses()) == 5
    assert unfit.state().excluded.keys() == {"node1"} and "failed the preflight: run directory" in unfit.state().excluded["node1"]
    assert "node1 is left out from now on" in unfit.output() and " ExcNodeList=node1 " in facts_of(cluster, unfit)
    assert "left out    node1: failed the preflight" in efflaunch(cluster, place, "status", str(unfit.run_dir))

    assert killed.end() == "COMPLETED", killed.output()
    assert [item.hosts for item in killed.state().attempts] == [("node0", "node1")] * 3, "there is no third node to go to"
    assert not killed.state().excluded and "node0" in killed.state().attempts[1].blamed

    wait_until(lambda: cluster.states() == ["idle"] * 3, "the nodes to be free")
    efflaunch(cluster, place, *FAKE[:-1], "run.id=shrinks", f"run.root={place}/private", "train.steps=5", "launcher.nodes=2:3")
    elastic = Job(place / "private" / "shrinks", cluster)
    assert elastic.end() == "COMPLETED", elastic.output()
    assert [item.num_nodes for item in elastic.state().attempts] == [3, 2] and len({item.place for item in elastic.state().attempts}) == 1


def facts_of(cluster: SlurmCluster, job: Job) -> str:
    return cluster.run("scontrol", "show", "job", "-o", job.number)


@pytest.mark.slow
def test_a_node_on_which_ranks_die_twice(cluster: SlurmCluster, place: Path) -> None:
    """Left out at the second death; with launcher.slurm.max_excluded=0 it is used again."""
    mishaps = "kill:2:4,kill:2:6"
    moved = submit(cluster, place, "moved", "train.steps=8", mishaps=mishaps)
    stays = submit(cluster, place, "stays", "train.steps=8", "launcher.slurm.max_excluded=0", mishaps=mishaps)
    assert moved.end() == "COMPLETED", moved.output()
    hosts = [item.hosts for item in moved.state().attempts]
    assert hosts[0] == hosts[1] and hosts[0][1] not in hosts[2] and moved.state().excluded.keys() == {hosts[0][1]}
    assert "2 attempts failed on it, the last one: rank 2 was killed by signal 9" in moved.state().excluded[hosts[0][1]]
    assert stays.end() == "COMPLETED", stays.output()
    assert len({item.hosts for item in stays.state().attempts}) == 1 and len(stays.state().attempts) == 3 and not stays.state().excluded


@pytest.mark.slow
def test_a_job_array_and_a_time_limit(cluster: SlurmCluster, place: Path) -> None:
    """A sweep as one job: a point is requeued, cancelled, looked at by itself. Beside it a job reaches its time limit."""
    limit = ("cluster.num_nodes=1", "cluster.slurm.time_s=60", "launcher.grace_s=10")
    limited = submit(cluster, place, "limited", *limit, "train.steps=400", "launcher.slurm.max_preemptions=20", step_s=0.1)
    words = ("launcher.slurm.array=true", "launcher.slurm.array_limit=2", "cluster.num_nodes=1", "run.id=grid")
    text = efflaunch(cluster, place, "sweep", *FAKE, *words, "train.steps=200,8,100000", FAKE_STEP_S="0.05")
    requeued, short, cancelled = (Job(place / "runs" / f"grid-steps-{steps}", cluster) for steps in (200, 8, 100000))
    array = requeued.number.partition("_")[0]
    assert f"job array {array} of SLURM submitted: 3 runs, {array}_0 to {array}_2" in text
    assert [job.number for job in (requeued, short, cancelled)] == [f"{array}_{index}" for index in range(3)]
    assert "queued, job" in efflaunch(cluster, place, "status", "runs/grid-steps-100000")
    requeued.wait_for_step(3)
    cluster.run("scancel", "--signal=USR2", requeued.number)
    cancelled.wait_for_step(3)
    assert f"running, job {array}_2 RUNNING on node" in efflaunch(cluster, place, "status", "runs/grid-steps-100000")
    assert "told to finish its step" in efflaunch(cluster, place, "cancel", "runs/grid-steps-100000")
    assert cancelled.end() == "FAILED" and cancelled.state().exit_code == 75 and cancelled.state().state == "preempted"
    assert short.end() == "COMPLETED" and max(short.losses()) == 8 and len(short.state().attempts) == 1
    assert requeued.end() == "COMPLETED" and max(requeued.losses()) == 200
    assert [item.exit_code for item in requeued.state().attempts] == [75, 0], requeued.output()
    assert "attempt 1: preempted and saved; requeued" in requeued.output() and "attempt 1" in short.output()
    assert efflaunch(cluster, place, "logs", "runs/grid-steps-8").count("rank-0.log") == 1

    assert limited.end() == "COMPLETED", limited.output()
    codes = [item.exit_code for item in limited.state().attempts]
    assert len(codes) > 1 and set(codes[:-1]) == {75} and codes[-1] == 0 and max(limited.losses()) == 400
    last_steps = [item.last_step for item in limited.state().attempts]
    assert last_steps == sorted(last_steps) and limited.losses() == {step: 10.0 / step for step in range(1, 401)}


def test_two_launches_of_one_id_at_once(cluster: SlurmCluster, place: Path) -> None:
    command = [sys.executable, str(HERE / "drive.py"), *FAKE, "run.id=twins", "train.steps=5"]
    variables = {**environment(), **cluster.environment, "PYTHONPATH": environment()["PYTHONPATH"]}
    started = [
        subprocess.Popen(command, cwd=place, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in started]
    assert sorted(process.returncode for process in started) == [0, 93], errors
    refused = next(text for text in errors if text)
    assert "expected one job per run directory" in refused or "expected one efflaunch per run directory" in refused
    twins = Job(place / "runs" / "twins", cluster)
    assert twins.end() == "COMPLETED" and len(twins.state().attempts) == 1 and newest_step(twins.run_dir) == 5


def test_a_node_count_that_cannot_be(cluster: SlurmCluster, place: Path) -> None:
    """Refused before SLURM is asked where no layout works, else in SLURM's own words."""
    layout = efflaunch(cluster, place, *FAKE, "run.id=never", "launcher.nodes=4:2", expect=93)
    assert "launcher.nodes: found 4:2" in layout and "launcher.nodes=2:4" in layout
    both = efflaunch(cluster, place, *FAKE, "run.id=never", "launcher.nodes=3:4", expect=93)
    assert "cluster.num_nodes: found 2 with launcher.nodes=3:4" in both
    many = efflaunch(cluster, place, *FAKE[:-1], "run.id=many", "launcher.nodes=8", expect=93)
    assert "sbatch: found error: " in many and "requested" in many
    assert not list((place / "runs").glob("never*"))


def test_nothing_is_left_running(cluster: SlurmCluster) -> None:
    """The last test of this module."""
    wait_until(lambda: cluster.states() == ["idle"] * 3, "the nodes to be free")
    lines = [path.read_bytes().replace(b"\0", b" ").decode() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in lines if "launcher.slurm" in line and str(cluster.directory.parent) in line]
    assert ENDED
