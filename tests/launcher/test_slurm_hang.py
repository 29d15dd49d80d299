"""A hang on two nodes of a real SLURM: every node's agent writes stacks, and both name the rank of the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from efflaunch.bench.clusters.slurm import SlurmCluster, why_not
from efflaunch.tests.launcher.slurm_jobs import submit
from efflaunch.tests.launcher.test_hang_runs import SOON

REASON = why_not()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def test_a_stopped_rank_of_another_node(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "hung", "train.steps=12", *SOON, "launcher.hang_min_s=20", mishaps="stop:3:7")
    assert job.end() == "COMPLETED", job.output()
    first, second = job.state().attempts
    assert first.restarted and second.exit_code == 0 and max(job.losses()) == 12
    assert first.failure is not None and first.failure.rank == 3, job.output()
    assert "rank 3 on node1 is stopped and cannot run" in first.failure.message and "no word" not in first.failure.message
    logs = job.run_dir / "logs" / "attempt-1"
    assert sorted(path.name for path in logs.glob("stacks-*.txt")) == [f"stacks-{rank}.txt" for rank in range(4)]
    assert "on node0" in (logs / "stacks-0.txt").read_text() and "all_reduce" in (logs / "stacks-0.txt").read_text()
    assert "no progress for" in job.output() and (logs / "hang.json").is_file()
