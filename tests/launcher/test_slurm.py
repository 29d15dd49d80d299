"""The parts of launcher=slurm that need no SLURM: the script, decisions, addresses, the table, what its commands print."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from efflaunch.errors import ConfigError, EfflaunchError
from efflaunch.launcher import cli, start
from efflaunch.launcher.agent.restart_policy import AttemptOutcome
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.config.node_range import NodeRange
from efflaunch.launcher.nodes import address
from efflaunch.launcher.nodes.meeting import Meeting
from efflaunch.launcher.nodes.next_action import Limits, Verdict, decide, decide_next
from efflaunch.launcher.nodes.preflight import CODE_FOLDERS, NodeFacts, bad_hosts, check_nodes, table
from efflaunch.launcher.rundir.state import ACTIVE, Attempt, new_state
from efflaunch.launcher.slurm import control
from efflaunch.launcher.slurm.array import render_array
from efflaunch.launcher.slurm.launcher import reconcile, template_text
from efflaunch.launcher.slurm.script import BatchJob, check_batch, format_time, render_sbatch

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "slurm"
SITE = (
    "cluster.slurm.partition=long", "cluster.slurm.account=team", "cluster.slurm.qos=high", "cluster.slurm.constraint='h100&ib'",
    "cluster.slurm.time_s=2d", "cluster.slurm.cpus_per_node=96", "cluster.slurm.mem=900G", "cluster.slurm.gres='gpu:h100:8'",
    "cluster.slurm.sbatch=['--reservation=mine','--mail-type=END']", "cluster.slurm.srun=['--container-image=/images/torch 2.sqsh']",
    "cluster.slurm.prologue=['module load cuda','source /shared/venv/bin/activate']", "launcher.slurm.exclude=[n17,n18]",
    "launcher.slurm.after='afterok:41'", "launcher.slurm.requeue=false", "launcher.grace_s=5m",
)  # fmt: skip


@pytest.mark.parametrize(("name", "overrides"), [("plain", ()), ("site", SITE)])
def test_the_script(name: str, overrides: tuple[str, ...]) -> None:
    """EFFLAUNCH_UPDATE_GOLDEN=1 writes the files anew; read their diff."""
    config = compose(["+experiment=llama8b_1M", "launcher=slurm", "cluster=h100_80g", "run.id=it", *overrides])
    job = BatchJob(config=config, run_dir=Path("/shared/my runs/it"), work_dir=Path("/shared/work"), python="/shared/venv/bin/python")
    text = render_sbatch(job, template_text())
    file = GOLDEN / f"{name}.sbatch"
    if os.environ.get("EFFLAUNCH_UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""


def batch(name: str, *overrides: str) -> BatchJob:
    config = compose(["+experiment=llama8b_1M", "launcher=slurm", "cluster=h100_80g", *overrides])
    return BatchJob(config=config, run_dir=Path("/shared/my runs") / name, work_dir=Path("/shared/work"), python="/shared/venv/bin/python")


def check_golden(name: str, text: str) -> None:
    file = GOLDEN / f"{name}.sbatch"
    if os.environ.get("EFFLAUNCH_UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""


def test_the_script_of_a_range_of_nodes() -> None:
    job = replace(batch("it", "launcher.nodes=2:6", "cluster.slurm.partition=long"), nodes=NodeRange(2, 4))
    check_golden("elastic", render_sbatch(job, template_text()))


def test_the_script_of_an_array() -> None:
    words = ("launcher.slurm.array_limit=2", "cluster.slurm.partition=long", "cluster.slurm.prologue=['module load cuda']")
    jobs = [batch(f"try-lr-{rate}", *words, f"optim.lr={rate}") for rate in ("1e-3", "1e-4", "1e-5")]
    check_golden("array", render_array(jobs, Path("/shared/my runs/try-array"), template_text()))


def test_points_that_make_no_array() -> None:
    one, other = batch("a"), batch("b", "cluster.slurm.time_s=1h")
    with pytest.raises(ConfigError, match=r"launcher\.slurm\.array: found --time not given for a and 0-01:00:00 for b"):
        render_array([one, other], Path("/runs/x-array"), template_text())
    other = batch("b", "cluster.num_nodes=4")
    with pytest.raises(ConfigError, match=r"found --nodes 2 for a and 4 for b; expected points that differ in what they train"):
        render_array([one, other], Path("/runs/x-array"), template_text())
    with pytest.raises(ConfigError, match=r"launcher\.slurm\.array_limit: found 0; expected 1 or more"):
        render_array([batch("a", "launcher.slurm.array_limit=0")], Path("/runs/x-array"), template_text())


def test_a_sweep_as_an_array_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["sweep", "+experiment=quickstart", "launcher=slurm", "run.id=try", "train.seed=0,1", "--dry-run"]
    assert cli.main([*words, "launcher.slurm.array=true"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-1\n" in script and f"  {tmp_path}/runs/try-seed-0\n  {tmp_path}/runs/try-seed-1\n)" in script
    assert "#SBATCH --job-name=efflaunch-try-array\n" in script and not list(tmp_path.iterdir())
    assert cli.main([*words, "launcher.slurm.array=true,false"]) == 93
    assert "expected it for all or none" in capsys.readouterr().err


def test_the_template_is_sound_and_asks_for_what_the_script_does() -> None:
    text = template_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    for option in ("--ntasks-per-node=1", "--requeue", "--open-mode=append", "--signal=USR2@135"):
        assert f"#SBATCH {option}\n" in text and f"#SBATCH {option}\n" in (GOLDEN / "plain.sbatch").read_text()


def test_dry_run_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    words = ["+experiment=quickstart", "run.id=dry", "--dry-run"]
    assert cli.main([*words, "launcher=slurm", "cluster.num_nodes=2"]) == 0
    script = capsys.readouterr().out
    assert f"run_dir={tmp_path}/runs/dry\n" in script and "#SBATCH --nodes=2\n" in script and "very-secret" not in script
    assert cli.main(words) == 0
    assert "-m efflaunch.launcher.agent runs/dry\n" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(start, "check_data", lambda config: None)
    assert cli.main(["+experiment=quickstart", "launcher=slurm", "run.id=none"]) == 93
    assert "launcher=slurm: found no sbatch on PATH" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_what_cannot_be_a_job() -> None:
    config = compose(["+experiment=quickstart", "launcher=slurm", "cluster.slurm.time_s=2m"])
    with pytest.raises(ConfigError, match=r"cluster\.slurm\.time_s: found 120 s; expected more than 135 s"):
        check_batch(config)
    config = compose(["+experiment=quickstart", "launcher=slurm", "cluster.slurm.sbatch=['mem=3']"])
    with pytest.raises(ConfigError, match=r"cluster\.slurm\.sbatch\[0\]: found 'mem=3'"):
        check_batch(config)


@pytest.mark.parametrize(("seconds", "text"), [(60, "0-00:01:00"), (5400, "0-01:30:00"), (2 * 86400 + 61, "2-00:01:01")])
def test_times(seconds: float, text: str) -> None:
    assert format_time(seconds) == text


LIMITS = Limits(max_restarts=2, max_preemptions=3, requeue=True, start_step=10)


@pytest.mark.parametrize(
    ("history", "verdict"),
    [
        ([(0, 20)], Verdict.DONE),
        ([(93, 10)], Verdict.USER),
        ([(75, 12)], Verdict.REQUEUE),
        ([(1, 10)], Verdict.AGAIN),
        ([(1, 10), (1, 10)], Verdict.AGAIN),
        ([(1, 10), (1, 10), (1, 10)], Verdict.FAIL),
        ([(1, 10), (1, 10), (1, 11)], Verdict.AGAIN),
        ([(75, 10), (75, 10), (1, 10), (1, 10)], Verdict.AGAIN),
        ([(75, 10), (75, 10), (75, 10)], Verdict.STOP),
        ([(75, 11), (75, 12), (75, 13)], Verdict.REQUEUE),
        ([(75, 11), (75, 12), (75, 13), (75, 14)], Verdict.STOP),
        ([(1, 10), (75, 11), (1, 11), (1, 11)], Verdict.AGAIN),
    ],
)
def test_what_follows(history: list[tuple[int, int]], verdict: Verdict) -> None:
    outcomes = [AttemptOutcome(exit_code=code, step=step) for code, step in history]
    assert decide(outcomes, LIMITS, cancelled=False, lost_node=False).verdict is verdict


def test_what_follows_a_lost_node_and_a_cancel() -> None:
    failed, saved = [AttemptOutcome(exit_code=1, step=11)], [AttemptOutcome(exit_code=75, step=11)]
    fixed = replace(LIMITS, requeue=False)
    assert decide(failed, LIMITS, cancelled=False, lost_node=True).verdict is Verdict.REQUEUE
    assert decide(failed, fixed, cancelled=False, lost_node=True).verdict is Verdict.FAIL
    assert decide(failed, LIMITS, cancelled=True, lost_node=False).verdict is Verdict.FAIL
    assert decide(saved, LIMITS, cancelled=True, lost_node=False).verdict is Verdict.STOP
    assert decide(saved, fixed, cancelled=False, lost_node=False).verdict is Verdict.STOP


@pytest.mark.parametrize("keys", ["launcher.slurm", "launcher.ray"])
def test_what_follows_reads_the_keys_of_its_back_end(keys: str) -> None:
    name = keys.removeprefix("launcher.")
    launcher = compose(["+experiment=quickstart", f"launcher={name}", f"{keys}.requeue=false", "launcher.max_restarts=2"]).launcher
    nodes = getattr(launcher, name)
    attempts = tuple(Attempt(number=k, started=0.0, exit_code=code, last_step=4) for k, code in [(1, 1), (2, 1), (3, None)])
    run_state = replace(new_state(world_size=2, revision=1, attempts=attempts), attempts_before=1, step_before=4)
    assert decide_next(run_state, launcher, nodes, cancelled=False, lost_node=True).reason == f"lost a node, and {keys}.requeue=false"
    assert decide_next(run_state, launcher, nodes, cancelled=False, lost_node=False).reason == "restart 2 of 2 since the last progress"
    one_launch = replace(run_state, attempts_before=0)
    assert decide_next(one_launch, launcher, nodes, cancelled=False, lost_node=False).verdict is Verdict.FAIL, "three in a row"


def test_a_head_that_others_cannot_reach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolves_to(*addresses: str) -> None:
        facts = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 0)) for one in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: facts)

    resolves_to("127.0.1.1")
    with pytest.raises(ConfigError, match=r"address of node n1: found only 127\.0\.1\.1; expected an IPv4 address that the other nodes"):
        address.head_address("n1", None)
    resolves_to("127.0.1.1", "10.1.2.3")
    assert address.head_address("n1", None) == "10.1.2.3"
    with pytest.raises(ConfigError, match=r"launcher\.slurm\.interface: found 'nonesuch'"):
        address.head_address("n1", "nonesuch")


def test_the_port_follows_from_the_job_and_is_free() -> None:
    with socket.socket() as taken:
        first = address.head_port(123, "127.0.0.1")
        taken.bind(("127.0.0.1", first))
        taken.listen()
        second = address.head_port(123, "127.0.0.1")
        assert second != first and 20000 <= second < 30000
    assert address.head_port(123, "127.0.0.1") == first


def test_a_meeting_is_read_as_it_was_written() -> None:
    meeting = Meeting(3, "10.0.0.7", 21234, 300)
    assert str(meeting) == "3@10.0.0.7:21234+300" and Meeting.parse(str(meeting)) == meeting
    with pytest.raises(ValueError, match="invalid literal"):
        Meeting.parse("somewhere")


def facts(node: int, **changes: object) -> NodeFacts:
    made = NodeFacts(node=node, host=f"n{node}", address=f"10.0.0.{node}", interface="ib0", package="p", run="r", machine="8 GPUs")
    return replace(made, **changes)  # type: ignore[arg-type]


def test_the_code_of_every_folder_is_compared() -> None:
    root = Path(start.__file__).parents[1]
    folders = {path.parent.name for path in root.glob("*/__init__.py")}
    assert set(CODE_FOLDERS) == folders - {"bench", "conf", "slurm", "tests"}


def test_the_table_has_failures_first() -> None:
    standing = [
        facts(0),
        facts(1, run="other"),
        facts(2, package="old", clock_s=45.0),
        facts(3, problem="needs 8 GPUs with 80 GB, found 7"),
        facts(4),
        None,
    ]
    rows = check_nodes(standing, marks=[True, True, True, True, False, False], num_nodes=6)
    assert [row.host for row in rows] == ["n1", "n2", "n3", "n4", "node 5 of the job", "n0"]
    assert bad_hosts(rows) == ["n1", "n2", "n3", "n4"]
    lines = table(rows).splitlines()
    assert "sees another run.yaml: the run directory is not shared" in lines[0]
    assert "has another version of efflaunch's files; its clock is +45 s off the head's" in lines[1]
    assert "needs 8 GPUs with 80 GB, found 7" in lines[2] and "is not seen by the head" in lines[3]
    assert "did not answer" in lines[4] and lines[5] == "ok    n0                 10.0.0.0 on ib0, 8 GPUs, clock +0.0 s"
    wrong = check_nodes([facts(0), facts(1)], marks=[True, True], num_nodes=4)
    assert wrong[0].problems == ("the job has 2 nodes, cluster.num_nodes=4",)


LINE = (
    "JobId=7 JobName=efflaunch-it UserId=me(1) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 "
    "ExitCode=0:0 TimeLimit=2-00:00:00 StartTime=2026-01-31T12:00:00 NodeList=n[1-2] BatchHost=n1"
)


def test_what_scontrol_prints() -> None:
    facts = control.parse_job(LINE)
    assert (facts.job, facts.state, facts.reason, facts.nodes, facts.restarts) == (7, "RUNNING", "", "n[1-2]", 2) and facts.is_alive
    waiting = control.parse_job(LINE.replace("RUNNING Reason=None", "PENDING Reason=Priority").replace("n[1-2]", "(null)"))
    assert waiting.reason == "Priority" and waiting.nodes == ""


@pytest.mark.parametrize(
    ("recorded", "job", "state"),
    [
        ("queued", "RUNNING", "queued"),
        ("running", "RUNNING", "running"),
        ("running", "PENDING", "queued"),
        ("running", "TIMEOUT", "died"),
        ("queued", "CANCELLED", "cancelled"),
        ("done", "COMPLETED", "done"),
        ("preempted", "FAILED", "preempted"),
    ],
)
def test_slurm_knows_better_whether_anything_lives(recorded: str, job: str, state: str) -> None:
    mine = replace(new_state(world_size=2, revision=1, attempts=()), state=recorded)
    standing = reconcile(mine, "7", control.parse_job(LINE.replace("RUNNING", job)))
    assert standing.state == state and standing.detail.startswith(f"job 7 {job}") and standing.job == "7"
    forgotten = reconcile(mine, "7", None)
    assert forgotten.state == ("died" if recorded in ACTIVE else recorded)


def test_sbatch_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "sbatch"
    script.write_text('#!/bin/sh\necho "sbatch: error: You are out of hours" >&2\nexit 1\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match=r"sbatch: found error: You are out of hours; expected the job to be accepted"):
        control.submit(tmp_path / "job.sbatch")
    script.write_text('#!/bin/sh\necho "123;west"\n')
    assert control.submit(tmp_path / "job.sbatch") == "123"


def test_a_slurm_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "scontrol"
    script.write_text('#!/bin/sh\necho "slurm_load_jobs error: Unable to contact slurm controller" >&2\nexit 1\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(EfflaunchError, match="SLURM does not answer: slurm_load_jobs error: Unable to contact slurm controller"):
        control.find_job("5")


def test_controllers_in_their_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"sinfo": 'echo "slurm-wlm 22.05.8"', "scontrol": 'echo "Slurmctld(primary) at head is UP"'}
    for name, script in said.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert control.controller_words() == "slurm-wlm 22.05.8; Slurmctld(primary) at head is UP"
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'error: no DNS record\\nfatal: no configuration\\n' >&2\nexit 1\n")
    with pytest.raises(ConfigError, match="SLURM: found fatal: no configuration; expected a controller that is up"):
        control.controller_words()
