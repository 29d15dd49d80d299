"""The parts of launcher=ray that need no Ray: requests, uploads, placement, what follows, and what people are told."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from efflaunch.errors import ConfigError, EfflaunchError
from efflaunch.launcher import cli, start
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.config.run_config import Config
from efflaunch.launcher.nodes.next_action import Verdict
from efflaunch.launcher.nodes.outcome import gather, store_queued
from efflaunch.launcher.ray import client, files
from efflaunch.launcher.ray.attempts import Driver
from efflaunch.launcher.ray.client import JobFacts
from efflaunch.launcher.ray.driver import check_shared
from efflaunch.launcher.ray.launcher import RayLauncher, reconcile
from efflaunch.launcher.ray.placement import NodeOffer, demand_table, fitting, no_placement
from efflaunch.launcher.ray.request import Caller, check_address, check_ray, demand, describe_request, job_request
from efflaunch.launcher.ray.upload import measure, stage
from efflaunch.launcher.rundir.run_dir import attempt_dir, make_run_dir, write_run
from efflaunch.launcher.rundir.state import ACTIVE, Attempt, RunState, end_attempt, new_state, read_state, write_state

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "ray"
AWAY = ("launcher=ray", "launcher.ray.address=http://head:8265")
SITE = (
    "launcher.ray.driver_cpus=2", "launcher.ray.python=/opt/venv/bin/python", "launcher.ray.work_dir=/shared/work",
    "launcher.ray.env=[NCCL_DEBUG]", "launcher.ray.code=[mine]", "launcher.grace_s=5m",
)  # fmt: skip


def config(*words: str) -> Config:
    return compose(["+experiment=quickstart", "run.id=it", *words])


@pytest.mark.parametrize(("name", "overrides"), [("plain", ()), ("site", SITE)])
def test_what_is_submitted(name: str, overrides: tuple[str, ...]) -> None:
    """EFFLAUNCH_UPDATE_GOLDEN=1 writes the files anew; read their diff."""
    made = compose(["+experiment=llama8b_1M", "cluster=h100_80g", "run.id=it", *AWAY, *overrides])
    variables = {"NCCL_DEBUG": "WARN"} if overrides else {}
    place = {"run_dir": Path("/shared/my runs/it"), "work_dir": Path("/home/me"), "number": 1, "version": "1.2.3"}
    request = job_request(made, Caller(**place, variables=variables), "http://head:8265")  # type: ignore[arg-type]
    text = describe_request(request, {"mine": 1234} if overrides else {})
    file = GOLDEN / f"{name}.yaml"
    if os.environ.get("EFFLAUNCH_UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


def test_dry_run_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "very-secret")
    words = ["+experiment=quickstart", "run.id=dry", "--dry-run", "launcher=ray"]
    assert cli.main([*words, "cluster.num_nodes=2", "launcher.ray.address=http://head:8265"]) == 0
    text = capsys.readouterr().out
    assert f"{tmp_path}/runs/dry --work-dir {tmp_path}" in text and "submission_id: efflaunch-dry-1" in text and "very-secret" not in text
    assert cli.main([*words, "launcher.ray.local=true"]) == 0
    assert f"efflaunch.launcher.ray.task {tmp_path}/runs/dry" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    real = importlib.util.find_spec
    monkeypatch.setattr(client.importlib.util, "find_spec", lambda name: None if name == "ray" else real(name))
    monkeypatch.setattr(start, "check_data", lambda config: None)
    for where in ("launcher.ray.address=http://head:8265", "launcher.ray.local=true"):
        assert cli.main(["+experiment=quickstart", "launcher=ray", where, "run.id=none"]) == 93
        text = capsys.readouterr().err
        assert "launcher=ray: found no ray in this Python; expected ray[default]" in text and 'pip install "efflaunch[ray]"' in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), r"launcher\.ray\.address: found none, and no RAY_API_SERVER_ADDRESS"),
        (("launcher.ray.address=ray://head:10001",), r"found 'ray://head:10001'; expected the address of Ray's job server"),
        (("launcher.ray.address=head",), r"found 'head'"),
        (("launcher.ray.local=true", "launcher.ray.address=auto"), r"found an address as well"),
        (("launcher.ray.local=true", "cluster.num_nodes=2"), r"found cluster\.num_nodes=2; expected one node"),
        ((*AWAY, "launcher.ray.env=[WANDB_API_KEY,HF_HOME]"), r"launcher\.ray\.env: found WANDB_API_KEY; expected no secrets"),
        ((*AWAY, "launcher.ray.resources={tpu: -1}"), r"launcher\.ray\.resources\.tpu: found -1; expected more than 0"),
        ((*AWAY, "launcher.ray.cpus_per_node=0"), r"launcher\.ray\.cpus_per_node: found 0; expected more than 0"),
    ],
)
def test_what_cannot_be_a_job(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_ray(config("launcher=ray", *words), None)
    assert caught.value.exit_code == 93


def test_a_password_in_the_address() -> None:
    with pytest.raises(ConfigError, match="found a name, a password or a query in it") as caught:
        check_address("http://me:sesame@head:8265")
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("words", [AWAY, ("launcher=ray", "launcher.ray.address=auto"), ("launcher=ray", "launcher.ray.local=true")])
def test_what_can_be_a_job(words: tuple[str, ...]) -> None:
    """Variables may go along, secrets among them may not."""
    check_ray(config(*words, "launcher.ray.env=[TOKENIZERS_PARALLELISM,NCCL_SOCKET_IFNAME]"), None)
    with pytest.raises(ConfigError, match="launcher.ray.env: found HF_TOKEN"):
        check_ray(config(*words, "launcher.ray.env=[TOKENIZERS_PARALLELISM,HF_TOKEN]"), None)


def test_the_environments_address_makes_a_job_and_none_makes_none() -> None:
    check_ray(config("launcher=ray"), "https://head")
    with pytest.raises(ConfigError, match="launcher.ray.address"):
        check_ray(config("launcher=ray"), None)


def test_a_variable_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_ONE", raising=False)
    launch = start.place_of(config(*AWAY))
    with pytest.raises(ConfigError, match=r"launcher\.ray\.env: found no NO_SUCH_ONE here"):
        from efflaunch.launcher.backend import Launch

        RayLauncher().describe(Launch(config=config(*AWAY, "launcher.ray.env=[NO_SUCH_ONE]"), run_dir=launch))


def test_demand() -> None:
    assert demand(config(*AWAY, "cluster.ranks_per_node=3")) == {"CPU": 3.0}
    gpus = compose(["+experiment=llama8b_1M", "cluster=h100_80g", *AWAY, "launcher.ray.cpus_per_node=96", "launcher.ray.resources={ib: 1}"])
    assert demand(gpus) == {"CPU": 96.0, "GPU": 8.0, "ib": 1.0}


def test_what_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, size in (
        ("mine/a.py", 10),
        ("mine/.git/pack", 5000),
        ("mine/__pycache__/a.pyc", 9000),
        ("mine/.gitignore", 3),
        ("one.py", 7),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    assert measure(["mine", "one.py"], 10_000) == {"mine": 5013, "one.py": 7}
    message = (
        r"launcher\.ray\.code: found 4\.9 KiB: mine/\.git 4\.9 KiB, mine/a\.py 10 B, one\.py 7 B, mine/\.gitignore 3 B; expected at most"
    )
    with pytest.raises(ConfigError, match=message):
        measure(["mine", "one.py"], 4000)
    with pytest.raises(ConfigError, match=r"launcher\.ray\.code\[1\]: found no nowhere in "):
        measure(["mine", "nowhere"], 10_000)
    with pytest.raises(ConfigError, match=r"found a second one\.py"):
        measure(["one.py", "./one.py"], 10_000)
    make_run_dir(tmp_path / "run")
    write_run(tmp_path / "run", config(*AWAY), 1)
    for _ in range(2):
        stage(tmp_path / "run", ["mine", "one.py"], tmp_path / "run" / "ray" / "upload")
    sent = sorted(str(path.relative_to(tmp_path / "run/ray/upload")) for path in (tmp_path / "run/ray/upload").rglob("*") if path.is_file())
    assert sent == ["mine/.git/pack", "mine/a.py", "one.py", "run.sha256", "run.yaml"]


def offer(name: str, free: float, total: float = 8, **more: float) -> NodeOffer:
    index = int(name[1:])
    resources = {"CPU": total, **more}
    return NodeOffer(id=f"{index:02}abcdef01", host=name, address=f"10.0.0.{index}", total=resources, free={**resources, "CPU": free})


def test_demand_against_what_there_is() -> None:
    offers = [offer("n1", 8, GPU=8), offer("n2", 1, GPU=8), offer("n3", 8), offer("n4", 8, GPU=8)]
    bundle = {"CPU": 4.0, "GPU": 8.0}
    table = demand_table(offers, bundle, 3, ["n4"]).splitlines()
    assert table[0] == "wanted on each of 3 nodes: CPU 4, GPU 8"
    assert table[1] == "busy      n2 10.0.0.2 02abcdef  CPU 1 free of 8, GPU 8 free of 8"
    assert table[2] == "too small n3 10.0.0.3 03abcdef  CPU 8 free of 8, GPU 0 free of 0"
    assert table[3].startswith("left out  n4") and table[4].startswith("ok        n1")
    assert [item.host for item in fitting(offers, bundle, ["04abcd"])] == ["n1", "n2"]
    impossible = str(no_placement(offers, bundle, 4, [], 60))
    assert (
        "after 60 s: found 3 nodes that could hold it; expected 4 that are free" in impossible and "Try: cluster.num_nodes=3" in impossible
    )
    busy = str(no_placement(offers, bundle, 3, [], 60))
    assert "found 2 nodes that are free" in busy and "larger launcher.ray.placement_timeout_s" in busy
    assert demand_table([], bundle, 1, []).endswith("no nodes at all")


def test_what_a_node_is_called() -> None:
    node = offer("n1", 1)
    assert all(node.is_called(name) for name in ("n1", "10.0.0.1", "01abcdef01", "01abcd", "n1/01abcdef"))
    assert not any(node.is_called(name) for name in ("n", "01a", "n2", "n1/02abcdef", ""))


@pytest.mark.parametrize(
    ("recorded", "job", "state"),
    [
        ("queued", "PENDING", "queued"),
        ("running", "RUNNING", "running"),
        ("running", "FAILED", "died"),
        ("running", "STOPPED", "cancelled"),
        ("preempted", "FAILED", "preempted"),
        ("done", "SUCCEEDED", "done"),
    ],
)
def test_ray_knows_better_whether_anything_lives(recorded: str, job: str, state: str) -> None:
    mine = replace(new_state(world_size=2, revision=1, attempts=()), state=recorded)
    standing = reconcile(mine, "it-1", JobFacts(job="it-1", state=job, message="what happened\nat length", exit_code=None, start_s=None))
    assert (
        standing.state == state
        and standing.detail.startswith(f"job it-1 {job}")
        and standing.job == "it-1"
        and "at length" not in standing.detail
    )
    assert reconcile(mine, "it-1", None).state == ("died" if recorded in ACTIVE else recorded)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    make_run_dir(tmp_path / "run")
    files.clear(tmp_path / "run")
    words = ("cluster.num_nodes=2", "cluster.ranks_per_node=2", "launcher.max_restarts=1", "launcher.ray.max_preemptions=1")
    store_queued(tmp_path / "run", config(*AWAY, *words))
    return tmp_path / "run"


def driver(run_dir: Path) -> Driver:
    made = Driver(run_dir, job="it-1", entry=None, work_dir="/", say=lambda line: None, tick=lambda: None)
    made.offers = lambda: [offer(f"n{index}", 8) for index in range(1, 5)]
    return made


def state(run_dir: Path) -> RunState:
    run_state = read_state(run_dir)
    assert run_state is not None
    return run_state


def begin(run_dir: Path) -> int:
    run_state = state(run_dir)
    number = len(run_state.attempts) + 1
    attempt = Attempt(number=number, started=1.0, num_nodes=2, world_size=4, hosts=("n1", "n2"))
    write_state(run_dir, replace(run_state, attempts=(*run_state.attempts, attempt)))
    attempt_dir(run_dir, number).mkdir(parents=True)
    return number


def leave(run_dir: Path, node: int, ranks: dict[int, int], errors: dict[int, str] | None = None, out_of_time: int = 0) -> None:
    logs = attempt_dir(run_dir, len(state(run_dir).attempts))
    reports = [{"rank": rank, "exit_code": code, "stopped_by_agent": bool(out_of_time)} for rank, code in ranks.items()]
    (logs / f"node-{node}.json").write_text(json.dumps({"host": "n", "exit_code": 1, "ranks": reports, "out_of_time": out_of_time}))
    for rank, message in (errors or {}).items():
        record = {"time": 1.0, "rank": rank, "exit_code": 1, "type": "RuntimeError", "message": message, "traceback": f"trace of {rank}"}
        (logs / f"rank-{rank}.error.json").write_text(json.dumps(record))


def test_a_lost_node_is_the_cause_and_not_the_ranks_that_missed_it(run_dir: Path) -> None:
    it = driver(run_dir)
    begin(run_dir)
    leave(run_dir, 0, {0: 1, 1: 1}, {0: "Connection closed by peer", 1: "Connection reset by peer"})
    decision = it._conclude({1: "n2, its node has died"}, is_formed=True)
    assert decision.verdict is Verdict.REQUEUE and decision.reason == "requeued 1 of 1 since the last progress"
    failure = state(run_dir).failure
    assert failure is not None and failure.message == "node 1 of the job ended without a word: n2, its node has died"
    begin(run_dir)
    leave(run_dir, 0, {0: 1, 1: 1}, {0: "the wheels came off"})
    assert it._conclude({1: "n2, its node has died"}, is_formed=True).verdict is Verdict.FAIL
    assert state(run_dir).failure.message == "rank 0: RuntimeError: the wheels came off"  # type: ignore[union-attr]
    assert state(run_dir).exit_code == 1 and state(run_dir).state == "failed"
    assert list(state(run_dir).excluded) == ["n2"] and state(run_dir).attempts[-1].lost == ("n2",)


def test_how_many_nodes(run_dir: Path) -> None:
    """As many as are free up to MAX; MIN are waited for."""
    it = driver(run_dir)
    assert it._sizing().num_nodes == 2  # type: ignore[union-attr]
    it.config = config(*AWAY, "launcher.nodes=2:3", "cluster.ranks_per_node=2", "launcher.ray.placement_timeout_s=0")
    assert it._sizing().num_nodes == 3  # type: ignore[union-attr]
    it.offers = lambda: [offer("n1", 8), offer("n2", 1)]
    with pytest.raises(ConfigError, match="found 1 nodes that are free; expected 2 that are free"):
        it._sizing()
    files.request_stop(run_dir, "it-1", files.SAVE)
    it.looked_at = 0.0
    assert it._sizing() is None


def test_preemptions_have_a_budget_of_their_own(run_dir: Path) -> None:
    it = driver(run_dir)
    for verdict in (Verdict.REQUEUE, Verdict.STOP):
        begin(run_dir)
        write_state(run_dir, end_attempt(state(run_dir), exit_code=75, failure=None, last_step=len(state(run_dir).attempts)))
        assert it._conclude({}, is_formed=True).verdict is verdict
    assert state(run_dir).attempts[-1].decision == "preempted 2 times, launcher.ray.max_preemptions=1"


def test_stopped_before_it_had_nodes(run_dir: Path) -> None:
    it = driver(run_dir)
    files.request_stop(run_dir, "it-1", files.SAVE)
    assert it._look_around()
    assert it._conclude({}, is_formed=False).verdict is Verdict.STOP
    assert (state(run_dir).state, state(run_dir).exit_code) == ("preempted", 75)


def test_killed_as_asked(run_dir: Path) -> None:
    begin(run_dir)
    for node in range(2):
        leave(run_dir, node, {2 * node: -9, 2 * node + 1: -9}, out_of_time=3)
    it = driver(run_dir)
    it.stop(files.NOW)
    assert it._conclude({}, is_formed=True).verdict is Verdict.FAIL
    assert state(run_dir).failure.message == "the ranks were killed at once, as asked"  # type: ignore[union-attr]
    _, failure, _ = gather(run_dir, it.config, 1, num_nodes=2, output=Path("x"))
    assert failure.message == "the ranks were killed at once, as asked"


def test_nodes_that_never_came_and_nodes_that_did_not_come_back(run_dir: Path) -> None:
    it = driver(run_dir)
    error = no_placement([], {"CPU": 1.0}, 2, [], 60)
    assert it._refused(error).verdict is Verdict.USER and state(run_dir).exit_code == 93
    store_queued(run_dir, it.config)
    begin(run_dir)
    assert it._conclude({}, is_formed=True).verdict is Verdict.REQUEUE
    assert it._refused(error).verdict is Verdict.FAIL and state(run_dir).exit_code == 1
    assert state(run_dir).attempts[-1].decision == "could not be restarted"


def test_time_is_up(run_dir: Path) -> None:
    it = driver(run_dir)
    it.config = config(*AWAY, "launcher.ray.time_limit_s=1h")
    assert not it._look_around()
    it.started, it.looked_at = it.started - 3601, 0.0
    assert it._look_around() and it.wish == files.SAVE


def test_one_driver(run_dir: Path) -> None:
    assert not files.has_driver(run_dir)
    with files.only_driver(run_dir):
        assert files.has_driver(run_dir)
        with pytest.raises(ConfigError, match="running it on Ray; expected one efflaunch per run directory"), files.only_driver(run_dir):
            pass
    assert not files.has_driver(run_dir)


def test_a_driver_that_does_not_see_the_run_directory(run_dir: Path, tmp_path: Path) -> None:
    stage(run_dir, [], tmp_path / "sent")
    check_shared(run_dir, tmp_path / "sent")
    with pytest.raises(ConfigError, match="where the job's driver runs: found No such file or directory"):
        check_shared(tmp_path / "elsewhere", tmp_path / "sent")
    write_run(run_dir, config(*AWAY, "train.steps=7"), 2)
    with pytest.raises(ConfigError, match="found another run.yaml than the one that was submitted"):
        check_shared(run_dir, tmp_path / "sent")


def test_an_address_that_is_dead() -> None:
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match=r"Ray at http://127\.0\.0\.1:9: found no answer"):
        client.JobServer("http://127.0.0.1:9")
    assert isinstance(client.reach("http://127.0.0.1:9"), EfflaunchError)


def test_another_version_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    class Answer:
        def json(self) -> dict[str, str]:
            return {"ray_version": "1.13.0"}

    class Server:
        def _do_request(self, method: str, endpoint: str) -> Answer:
            return Answer()

    monkeypatch.setattr(client, "_client", lambda address: Server())
    expected = rf"found version 1\.13\.0; expected the same Ray on both sides; here is {ray.__version__}.*\n.*ray\[default\]==1\.13\.0"
    with pytest.raises(ConfigError, match=expected):
        client.JobServer("http://head:8265")
