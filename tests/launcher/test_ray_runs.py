"""launcher=ray on a real Ray of three nodes (bench/clusters/ray.py): real jobs, real gloo ranks on several nodes, real deaths."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from efflaunch.bench.clusters.ray import RayCluster, why_not
from efflaunch.bench.clusters.spaces import TIMEOUT_S, wait_until
from efflaunch.launcher.ray.files import read_submission
from efflaunch.launcher.rundir.metrics_index import newest_step
from efflaunch.tests.launcher.cluster_jobs import FAKE as FAKE_TRAINING
from efflaunch.tests.launcher.cluster_jobs import HELD, ClusterJob, losses, run_efflaunch
from efflaunch.tests.launcher.runs import environment
from efflaunch.tests.test_real_runs import BASE as REAL
from efflaunch.tests.test_real_runs import make_corpus

REASON = why_not()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON))]
FAKE = ("+experiment=quickstart", "cluster.ranks_per_node=2", "checkpoint.every_steps=5", "launcher=ray", "cluster.num_nodes=2")
SECRET = "wandb-key-0123456789abcdef"
ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
AGENT = "efflaunch.launcher.ray.task"


@pytest.fixture(scope="module")
def cluster(place: Path) -> Iterator[RayCluster]:
    (place / "cluster").mkdir()
    variables = {"PYTHONPATH": environment()["PYTHONPATH"], "OMP_NUM_THREADS": "1"}
    with RayCluster(place / "cluster", variables=variables, private={2: place / "private"}) as running:
        yield running


@dataclass
class Job(ClusterJob):
    """One run handed to Ray."""

    cluster: RayCluster

    @property
    def name(self) -> str:
        submission = read_submission(self.run_dir)
        assert submission is not None
        return submission.job

    def facts(self) -> dict[str, object]:
        """What Ray's job server has of it."""
        job_facts = self.cluster.ask(f"/api/jobs/{self.name}")
        assert job_facts is not None, self.name
        return job_facts

    def end(self) -> tuple[str, object]:
        """Ray's word for how it ended, and the exit code of its driver."""
        wait_until(self.has_ended, f"the end of {self.name}")
        facts = self.facts()
        return str(facts["status"]), facts["driver_exit_code"]

    def has_ended(self) -> bool:
        return self.facts()["status"] in ENDED

    def wait_for_attempt(self, number: int) -> None:
        """Until it runs for the n-th time."""
        wait_until(lambda: len(self.state().attempts) >= number and self.state().state == "running", f"attempt {number}")

    def agents(self) -> list[int]:
        """Process ids of its agents and ranks, by node."""
        return [pid for pid, command in self.cluster.processes() if AGENT in command and f"/{self.run_dir.name} " in command]

    def output(self) -> str:
        return "".join(path.read_text() for path in sorted((self.run_dir / "ray").glob("*.out"))) + str(self.facts()["message"])


def efflaunch(cluster: RayCluster, place: Path, *words: str, script: Path | None = FAKE_TRAINING, expect: int = 0, **variables: str) -> str:
    """What an efflaunch command prints; with the fake training function unless told otherwise."""
    return run_efflaunch(cluster.environment, place, *words, script=script, expect=expect, variables=variables)


def on_ray(cluster: RayCluster) -> list[str]:
    return [f"launcher.ray.address={cluster.server}", f"launcher.ray.python={sys.executable}"]


def submit(cluster: RayCluster, place: Path, name: str, *words: str, mishaps: str = "", step_s: float = 0.02) -> Job:
    """A run of the fake training function on two nodes with two ranks each."""
    words = (*FAKE, *on_ray(cluster), "launcher.ray.env=[FAKE_TRAINING,FAKE_STEP_S]", f"run.id={name}", *words)
    efflaunch(cluster, place, *words, FAKE_TRAINING=mishaps, FAKE_STEP_S=str(step_s))
    return Job(place / "runs" / name, cluster)


def export(cluster: RayCluster, place: Path, name: str) -> bytes:
    """The final weights of a run, as Hugging Face reads them."""
    efflaunch(cluster, place, "export", f"runs/{name}", f"out-{name}", "--dtype=float32", script=None)
    (weights,) = (place / f"out-{name}").glob("*.safetensors")
    return weights.read_bytes()


class Beside:
    """Real training on this machine, while the same goes on elsewhere."""

    def __init__(self, place: Path, words: list[str]) -> None:
        self.output = place / "local.out"
        with self.output.open("wb") as out:
            command = [sys.executable, "-m", "efflaunch", *words, "run.id=local"]
            self.process = subprocess.Popen(command, cwd=place, env=environment(), stdout=out, stderr=out)

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self) -> None:
        assert self.process.wait(TIMEOUT_S) == 0, self.output.read_text()


def lose_actor(cluster: RayCluster) -> None:
    keeper = next(pid for pid, command in cluster.processes() if command.startswith("ray::NodeKeeper"))
    subprocess.run(["kill", "-9", str(keeper)], check=True)


def check_equal(cluster: RayCluster, place: Path, job: Job, name: str, steps: int) -> None:
    """Losses and weights of two runs, bit by bit; and no secret in what the one on Ray left."""
    assert job.losses() == losses(place / "runs" / name) and max(job.losses()) == steps
    assert export(cluster, place, job.run_dir.name) == export(cluster, place, name)
    files = [path for path in job.run_dir.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    assert len(files) > 5 and not [
        path for path in files if SECRET.encode() in path.read_bytes() or cluster.token.encode() in path.read_bytes()
    ]
    assert SECRET not in str(job.facts()) and cluster.token not in str(job.facts())
    assert not any(cluster.token in command for _, command in cluster.processes())


def real_words(place: Path, *more: str) -> list[str]:
    make_corpus(place)
    return [word for word in REAL if not word.startswith(("run.id", "cluster.ranks_per_node"))] + list(more)


def test_an_actor_lost_and_bit_equal_to_a_local_run(cluster: RayCluster, place: Path) -> None:
    """Real training on 2 nodes with a rank each."""
    words = real_words(place, "train.steps=16")
    with Beside(place, [*words, "cluster.ranks_per_node=2"]) as reference:
        spread = ["launcher=ray", "cluster.ranks_per_node=1", "cluster.num_nodes=2", "run.id=real", *on_ray(cluster)]
        spread.append("launcher.ray.env=[HOLD_STEPS]")
        text = efflaunch(cluster, place, *words, *spread, script=HELD, WANDB_API_KEY=SECRET, HOLD_STEPS="8")
        job = Job(place / "runs" / "real", cluster)
        assert f"job {job.name} submitted to Ray " in text
        job.wait_until_held("held-8")
        lose_actor(cluster)
        assert job.end() == ("SUCCEEDED", 0), job.output()
        reference.wait()
    first, second = job.state().attempts
    assert first.failure is not None and first.restarted and first.last_step == 7
    assert second.exit_code == 0 and job.state().state == "done"
    check_equal(cluster, place, job, "local", 16)


@pytest.mark.slow
def test_actor_and_node_lost_and_bit_equal_to_a_local_run(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Real training on 2 nodes x 2 ranks: an actor is killed, then a node loses power."""
    place = tmp_path_factory.mktemp("both")
    words = real_words(place, "train.steps=40")
    with Beside(place, [*words, "cluster.ranks_per_node=4"]) as reference:
        spread = ["launcher=ray", "cluster.ranks_per_node=2", "cluster.num_nodes=2", "run.id=twice", *on_ray(cluster)]
        efflaunch(cluster, place, *words, *spread, script=None, WANDB_API_KEY=SECRET)
        job = Job(place / "runs" / "twice", cluster)
        job.wait_for_step(7)
        lose_actor(cluster)
        job.wait_for_attempt(2)
        job.wait_for_step(max(14, newest_step(job.run_dir) + 2))
        victim = next(node for node in (2, 1) if any(AGENT in command for _, command in cluster.on_node(node)))
        cluster.crash(victim)
        assert job.end() == ("SUCCEEDED", 0), job.output()
        reference.wait()
    cluster.boot(victim)
    first, second, third = job.state().attempts
    assert first.failure is not None and first.restarted and 7 <= first.last_step < 40
    assert second.failure is not None and "ended without a word" in second.failure.message and second.restarted
    assert third.exit_code == 0 and job.state().state == "done"
    assert "requeued 1 of 2 since the last progress" in job.output()
    check_equal(cluster, place, job, "local", 40)
    cluster.wait_for_nodes(3)


def test_a_failing_rank_and_a_mistake(cluster: RayCluster, place: Path) -> None:
    """One fails once and is restarted, the other cannot succeed and is not.

    Where the first fails, the ranks of its other node wait for ever, as they would in a GPU's collective.
    """
    failing = submit(cluster, place, "failing", "train.steps=12", mishaps="raise:3:7,hang:0:7,hang:1:7")
    mistaken = submit(cluster, place, "mistaken", "train.steps=12", mishaps="user:2:3")
    assert failing.end() == ("SUCCEEDED", 0), failing.output()
    first, second = failing.state().attempts
    assert first.failure is not None and first.failure.rank == 3 and first.failure.message == "rank 3: RuntimeError: the wheels came off"
    assert first.decision == "restart 1 of 2 since the last progress" and second.exit_code == 0
    assert failing.losses() == {step: 10.0 / step for step in range(1, 13)}

    assert mistaken.end() == ("FAILED", 93)
    assert len(mistaken.state().attempts) == 1 and mistaken.state().exit_code == 93
    text = efflaunch(cluster, place, "logs", "runs/mistaken")
    assert text.rstrip().endswith("first failure: document 17: found nothing; expected tokens.\n  Try: another corpus")
    assert "rank-0.log" in text and "rank-2.log, in full" in text


def test_status_cancel_and_one_job_a_run(cluster: RayCluster, place: Path) -> None:
    job = submit(cluster, place, "long", "train.steps=100000", step_s=0.05)
    waiting = submit(cluster, place, "waiting", "train.steps=5", "launcher.ray.cpus_per_node=4")
    job.wait_for_step(3)
    assert re.search(r"state       running, job efflaunch-long-1 RUNNING", efflaunch(cluster, place, "status", "runs/long"))
    second = efflaunch(cluster, place, *FAKE, *on_ray(cluster), "run.id=long", "train.steps=100000", expect=93)
    assert "found job efflaunch-long-1, RUNNING" in second and "efflaunch cancel" in second
    wait_until(lambda: "waiting for nodes" in waiting.output(), "the table of what is wanted")
    assert "wanted on each of 2 nodes: CPU 4" in waiting.output() and re.search(r"busy +node\d .*CPU 2 free of 4", waiting.output())
    assert "state       queued" in efflaunch(cluster, place, "status", "runs/waiting")
    assert "is told to finish its step, save and stop" in efflaunch(cluster, place, "cancel", "runs/waiting")
    assert waiting.end() == ("FAILED", 75) and waiting.state().state == "preempted"
    assert "is told to finish its step, save and stop" in efflaunch(cluster, place, "cancel", "runs/long")
    assert job.end() == ("FAILED", 75), job.output()
    assert job.state().state == "preempted" and job.state().exit_code == 75
    stopped_at = max(job.losses())
    assert (job.run_dir / "checkpoints" / f"step-{stopped_at:08d}" / "COMMIT").is_file()
    assert "found nothing running, state preempted" in efflaunch(cluster, place, "cancel", "runs/long", expect=93)


@pytest.mark.slow
def test_a_stopped_job_saves_and_one_ended_now_does_not(cluster: RayCluster, place: Path) -> None:
    """`ray job stop` is SIGTERM to the driver, with the time to save that the job asked for."""
    job = submit(cluster, place, "stopped", "train.steps=100000", "checkpoint.every_steps=2000", step_s=0.05)
    job.wait_for_step(3)
    assert cluster.ask(f"/api/jobs/{job.name}/stop", method="POST") == {"stopped": True}
    assert job.end()[0] == "STOPPED" and job.state().state == "preempted"
    stopped_at = max(job.losses())
    assert (job.run_dir / "checkpoints" / f"step-{stopped_at:08d}" / "COMMIT").is_file()

    efflaunch(cluster, place, "resume", "runs/stopped", FAKE_TRAINING="", FAKE_STEP_S="0.05")
    assert job.name == "efflaunch-stopped-2"
    job.wait_for_step(stopped_at + 3)
    assert "ended; its last checkpoint stands" in efflaunch(cluster, place, "cancel", "runs/stopped", "--now")
    assert job.end()[0] == "STOPPED"
    assert not (job.run_dir / "checkpoints" / f"step-{max(job.losses()):08d}").exists()
    assert re.search("state       (failed|cancelled), job efflaunch-stopped-2 STOPPED", efflaunch(cluster, place, "status", "runs/stopped"))


@pytest.mark.slow
def test_nodes_go_and_come(cluster: RayCluster, place: Path) -> None:
    """Three nodes; a drain notice for one, as a spot market gives: saved, on with two; it is back when a rank is killed: three again."""
    words = ("launcher.nodes=2:3", "cluster.num_nodes=3", "cluster.ranks_per_node=1", "train.steps=420")
    job = submit(cluster, place, "elastic", *words, mishaps="kill:1:400", step_s=0.05)
    job.wait_for_step(6)
    victim = next(node for node in (2, 1) if any(AGENT in command for _, command in cluster.on_node(node)))
    cluster.drain(victim)
    job.wait_for_attempt(2)
    cluster.crash(victim)
    cluster.wait_for_nodes(2)
    cluster.boot(victim)
    cluster.wait_for_nodes(3)
    assert job.end() == ("SUCCEEDED", 0), job.output()
    attempts = job.state().attempts
    assert [attempt.num_nodes for attempt in attempts] == [3, 2, 3] and [attempt.exit_code for attempt in attempts] == [75, 1, 0]
    assert attempts[0].decision == "preempted and saved; requeued, 1 of 100" and f"node{victim}" not in attempts[1].hosts
    assert attempts[1].last_step == 399 and "cluster.num_nodes: 3 -> 2" in job.output()
    assert job.losses() == {step: 10.0 / step for step in range(1, 421)}


def test_runs_that_get_no_nodes(cluster: RayCluster, place: Path) -> None:
    job = submit(cluster, place, "toomany", "cluster.num_nodes=4", "train.steps=5", "launcher.ray.placement_timeout_s=2")
    assert job.end() == ("FAILED", 93)
    failure = job.state().failure
    assert failure is not None and failure.message.startswith("nodes of the Ray cluster, after 2 s: found 3 nodes that could hold it")
    assert "wanted on each of 4 nodes: CPU 2" in failure.message and "Try: cluster.num_nodes=3" in failure.message
    text = efflaunch(cluster, place, "logs", "runs/toomany")
    assert text.count("CPU 4 free of 4") >= 3


def test_a_run_directory_that_is_not_shared(cluster: RayCluster, place: Path) -> None:
    words = ("run.id=apart", f"run.root={place}/private", "train.steps=5", "launcher.ray.exclude=[node1]")
    efflaunch(cluster, place, *FAKE, *on_ray(cluster), *words)
    job = Job(place / "private" / "apart", cluster)
    assert job.end() == ("FAILED", 93), job.output()
    assert "\nFAIL  node2  run directory: No such file or directory" in job.output()
    assert job.state().exit_code == 93 and job.state().failure is not None
    assert job.state().failure.message.endswith("leave them out: launcher.ray.exclude=[node2]")


def test_who_is_let_in(cluster: RayCluster, place: Path) -> None:
    words = (*FAKE, *on_ray(cluster), "run.id=stranger", "train.steps=5")
    text = efflaunch(cluster, place, *words, expect=93, RAY_AUTH_TOKEN="0" * 32, RAY_AUTH_TOKEN_PATH="")
    assert "expected the cluster's token" in text and "RAY_AUTH_TOKEN" in text and "0" * 32 not in text
    dead = efflaunch(cluster, place, *words, "launcher.ray.address=http://127.0.0.1:9", expect=93)
    assert "Ray at http://127.0.0.1:9: found no answer" in dead
    assert not (place / "runs" / "stranger").exists()


def test_nothing_is_left_running(cluster: RayCluster) -> None:
    """After all jobs: no agent, no rank, no driver of theirs, whatever became of them. The last test of this module."""

    def left() -> list[str]:
        words = ("efflaunch.launcher.ray", "pt_elastic", "ray::NodeKeeper")
        return [command for _, command in cluster.processes() if any(word in command for word in words)]

    wait_until(lambda: not left(), "the end of what the jobs started")
    assert left() == []
