"""efflaunch as a person runs it, with the real training: stop, kill, resume, other layouts, export, and runs that cannot go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from efflaunch.launcher.rundir.metrics_index import newest_step
from efflaunch.launcher.rundir.metrics_reader import MetricsFollower
from efflaunch.launcher.rundir.progress import RunProgress
from efflaunch.launcher.rundir.run_dir import read_run
from efflaunch.launcher.rundir.state import read_state
from efflaunch.tests.launcher.runs import descendants, environment, is_alive
from efflaunch.tests.limits import ENDS_S, wait_until
from efflaunch.tests.parity.reference import reference_loss
from efflaunch.training.data.source import open_data
from efflaunch.training.data.writer import IndexedWriter

SIDE = Path(__file__).resolve().parent / "slow_side.py"
STEPS = 25
BASE = (
    "model=tiny", "model.num_layers=2", "model.hidden_size=32", "model.intermediate_size=64", "model.num_heads=4", "model.num_kv_heads=2",
    "model.vocab_size=97", "data=indexed", "data.prefixes=[corpus]", "data.max_seq_len=256", "data.global_batch_tokens=1K",
    "cluster=local_cpu", "cluster.ranks_per_node=2", "parallel.tokens_per_rank=128", "parallel.scheme=ring", "train.dtype=float32",
    "optim.schedule=constant", "optim.lr=1e-3", "optim.warmup_steps=2", "checkpoint.every_steps=5", "run.id=run", "logging.display=plain",
)  # fmt: skip


PIPED = ("parallel.pipeline.stages=2", "parallel.tokens_per_rank=256", "memory=streambp")
"""Two stages of one rank, in micro-batches that plans choose, activations streamed."""


def start(directory: Path, *words: str, script: Path | None = None, **variables: str) -> subprocess.Popen:
    """The efflaunch command, or `script` with a training function of its own."""
    log = (directory / "output").open("ab")
    command = [sys.executable, *(["-m", "efflaunch"] if script is None else [str(script)]), *words]
    return subprocess.Popen(command, cwd=directory, env=environment() | variables, stdout=log, stderr=log)


def train(directory: Path, *overrides: str, steps: int = STEPS) -> subprocess.Popen:
    return start(directory, "train", *BASE, f"train.steps={steps}", *overrides)


def run(directory: Path, *words: str, expect: int = 0) -> str:
    """What one efflaunch command printed; fails unless it exits with `expect`."""
    done = subprocess.run(
        [sys.executable, "-m", "efflaunch", *words], cwd=directory, env=environment(), capture_output=True, text=True, timeout=ENDS_S
    )
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def finish(process: subprocess.Popen, directory: Path, expect: int = 0) -> None:
    assert process.wait(ENDS_S) == expect, (directory / "output").read_text()


def losses(directory: Path) -> dict[int, float]:
    return RunProgress().apply(MetricsFollower(directory / "runs" / "run").read()).losses


def wait_for_step(directory: Path, process: subprocess.Popen, step: int) -> None:
    while newest_step(directory / "runs" / "run") < step:
        assert process.poll() is None, (directory / "output").read_text()
        time.sleep(0.02)


def hold(directory: Path, at: int, *overrides: str, steps: int = STEPS, then: tuple[int, ...] = ()) -> subprocess.Popen:
    """A run whose rank 0 waits in the middle of step `at` (and of those of `then`) for `release`."""
    held = {"HOLD_STEPS": ",".join(map(str, (at, *then)))}
    process = start(directory, "train", *BASE, f"train.steps={steps}", *overrides, script=SIDE, **held)
    wait_until_held(directory, process, at)
    return process


def wait_until_held(directory: Path, process: subprocess.Popen, at: int) -> None:
    wait_until(lambda: (directory / "runs" / "run" / f"held-{at}").exists() or process.poll() is not None)
    assert process.poll() is None, (directory / "output").read_text()


def release(directory: Path, at: int) -> None:
    (directory / "runs" / "run" / f"released-{at}").touch(0o600)


def stop(directory: Path, process: subprocess.Popen, at: int) -> None:
    """SIGTERM while it is held at step `at`, which is its last one then."""
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: read_state(directory / "runs" / "run").state == "stopping", "it was not told")
    release(directory, at)
    finish(process, directory, expect=75)
    assert max(losses(directory)) == at


def make_corpus(directory: Path) -> None:
    generator = np.random.default_rng(3)
    writer = IndexedWriter(str(directory / "corpus"), "uint16")
    for length in np.minimum(generator.lognormal(3.5, 1.2, 300).astype(int) + 2, 700):
        writer.add(np.cumsum(generator.integers(0, 3, length)) % 97)
    writer.finish()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run nothing happened to."""
    directory = tmp_path_factory.mktemp("reference")
    make_corpus(directory)
    finish(train(directory), directory)
    curve = losses(directory)
    assert sorted(curve) == list(range(1, STEPS + 1)) and curve[STEPS] < curve[1]
    return directory


@pytest.fixture(scope="module")
def piped(tmp_path_factory, reference):
    """The same in stages."""
    directory = tmp_path_factory.mktemp("piped")
    for file in reference.glob("corpus.*"):
        shutil.copy(file, directory)
    finish(train(directory, *PIPED), directory)
    assert_close(losses(directory), losses(reference))
    assert not (directory / "runs" / "run" / "profile.yaml").exists(), "it would be taken for one of all layers"
    return directory


def assert_close(ours: dict[int, float], theirs: dict[int, float]) -> None:
    assert ours.keys() == theirs.keys()
    for step, loss in theirs.items():
        assert abs(ours[step] - loss) < 1e-4 * loss, step


@pytest.fixture
def place(tmp_path, reference):
    for file in reference.glob("corpus.*"):
        shutil.copy(file, tmp_path)
    return tmp_path


def stopped(place: Path, step: int) -> None:
    """Leave a run that was told to stop in `step`."""
    stop(place, hold(place, step), step)


def test_stopped_and_started_again_is_bit_equal(place, reference):
    stopped(place, 7)
    finish(train(place), place)
    assert losses(place) == losses(reference)


def command(pid: int) -> str:
    return " ".join(psutil.Process(pid).cmdline())


def test_a_killed_rank_is_restarted_and_bit_equal(place, reference):
    process = hold(place, 9)
    pids = descendants(process.pid)
    others = [pid for pid in pids if "checkpoint.flusher" not in command(pid)]
    ranks = [pid for pid in others if "forkserver" not in command(pid) or psutil.Process(pid).memory_info().rss > 1 << 28]
    os.kill(ranks[-1], signal.SIGKILL)
    finish(process, place)
    assert losses(place) == losses(reference)
    assert "signal 9" in (place / "output").read_text()
    assert not [pid for pid in pids if is_alive(pid)]


def test_a_killed_stage_is_restarted_and_bit_equal(place, piped):
    process = hold(place, 9, *PIPED)
    others = [pid for pid in descendants(process.pid) if "checkpoint.flusher" not in command(pid)]
    ranks = [pid for pid in others if "forkserver" not in command(pid) or psutil.Process(pid).memory_info().rss > 1 << 28]
    os.kill(ranks[-1], signal.SIGKILL)
    finish(process, place)
    assert losses(place) == losses(piped)
    assert "signal 9" in (place / "output").read_text()


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.pipeline.stages=1",),
        ("cluster.ranks_per_node=4", "parallel.pipeline.order=gpipe", "parallel.sequence=adaptive", "memory=recompute"),
    ],
    ids=["no stages", "two ranks a stage, GPipe"],
)
def test_stages_resume_on_another_layout(place, piped, overrides):
    stop(place, hold(place, 6, *PIPED), 6)
    run(place, "resume", "runs/run", *overrides)
    assert_close(losses(place), losses(piped))


def test_a_killed_flusher_costs_at_most_one_checkpoint(place, reference):
    process = hold(place, 9)
    flushers = [pid for pid in descendants(process.pid) if "checkpoint.flusher" in command(pid)]
    assert len(flushers) == 2
    os.kill(flushers[0], signal.SIGKILL)
    release(place, 9)
    finish(process, place)
    assert losses(place) == losses(reference)
    assert [event for event in MetricsFollower(place / "runs" / "run").read() if event["event"] == "checkpoint"][-1]["step"] == STEPS
    assert not [pid for pid in flushers if is_alive(pid)]


def test_killed_ranks_resume_from_memory_and_are_bit_equal(place, reference):
    """With replicas, though storage takes its time: what was saved in memory alone is used, and then put on disk."""
    process = hold(place, 9, "checkpoint.replica=peer")
    pids = descendants(process.pid)
    assert len([pid for pid in pids if "replica.keeper" in command(pid)]) == 2
    others = [pid for pid in pids if "efflaunch.checkpoint" not in command(pid)]
    ranks = [pid for pid in others if "forkserver" not in command(pid) or psutil.Process(pid).memory_info().rss > 1 << 28]
    os.kill(ranks[-1], signal.SIGKILL)
    finish(process, place)
    assert losses(place) == losses(reference)
    starts = [event for event in MetricsFollower(place / "runs" / "run").read() if event["event"] == "start"]
    assert len(starts) == 2 and starts[1]["restored_from"].startswith("the memory of")
    assert not [pid for pid in pids if is_alive(pid)]


@pytest.mark.slow
@pytest.mark.parametrize("point", ["before_manifest", "before_commit"])
def test_what_only_memory_had_is_used_and_is_on_disk_before_anything_newer(place, reference, point):
    """Ranks are killed while a save is whole in memory and not on disk: its writers have not voted, or nobody has committed it.

    Storage works again once the ranks are back.
    """
    storage = place / "storage-works"
    process = start(
        place, "train", *BASE, f"train.steps={STEPS}", "checkpoint.replica=peer", "checkpoint.every_steps=10",
        script=SIDE, CHECKPOINT_FAULT=f"{point}=until:{storage}",
    )  # fmt: skip
    events = MetricsFollower(place / "runs" / "run")
    seen: list = []

    def of(kind: str) -> list:
        assert process.poll() is None, (place / "output").read_text()
        seen.extend(events.read())
        return [event for event in seen if event["event"] == kind]

    wait_until(lambda: any(event["error"] is None for event in of("replica")))
    for pid in descendants(process.pid):
        if "efflaunch.checkpoint" not in command(pid) and "launcher.agent" in command(pid) and psutil.Process(pid).ppid() != process.pid:
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(of("start")) == 2)
    assert not of("checkpoint")
    again = of("start")[1]
    assert again["restored_from"].startswith("the memory of") and again["resumed_from"] == 10
    storage.touch()
    finish(process, place)
    assert losses(place) == losses(reference)
    seen += events.read()
    # What its writers had finished was committed when the ranks came back; the rest was saved again, before anything newer.
    logs = (place / "runs" / "run" / "logs" / "attempt-2" / "rank-0.log").read_text()
    is_adopted = "checkpoint of step 10: every rank had written it when training stopped; committed now" in logs
    assert is_adopted == (point == "before_commit")
    durable = [event["step"] for event in seen if event["event"] == "checkpoint"]
    assert durable == ([20, STEPS] if is_adopted else [10, 20, STEPS])


@pytest.mark.slow
def test_a_killed_agent_leaves_nothing_and_resumes_bit_equal(place, reference):
    process = hold(place, 9, "checkpoint.replica=peer")
    pids = descendants(process.pid)
    agents = [pid for pid in pids if "launcher.agent" in command(pid) and psutil.Process(pid).ppid() == process.pid]
    os.kill(agents[0], signal.SIGKILL)
    process.wait(ENDS_S)
    wait_until(lambda: not any(is_alive(pid) for pid in pids), "processes outlived the agent")
    run(place, "resume", "runs/run")
    assert losses(place) == losses(reference)


def test_everything_killed_then_resumed_is_bit_equal(place, reference):
    process = hold(place, 13)
    pids = descendants(process.pid)
    process.kill()
    process.wait()
    wait_until(lambda: not any(is_alive(pid) for pid in pids), "processes outlived efflaunch")
    run(place, "resume", "runs/run")
    assert losses(place) == losses(reference)


def test_a_stopped_rank_costs_nothing_but_time(place, reference):
    """It is noticed, named and killed, and the loss curve is that of a run nothing happened to, bit by bit."""
    soon = ("launcher.hang_factor=2", "launcher.hang_min_s=10", "launcher.hang_startup_s=1h")
    stopped = {"STOP_RANK": "1", "STOP_STEP": "8", "FAKE_CLOCK": "rest"}
    finish(start(place, "train", *BASE, "train.steps=12", *soon, script=SIDE, **stopped), place)
    assert losses(place) == {step: loss for step, loss in losses(reference).items() if step <= 12}
    state = read_state(place / "runs" / "run")
    assert state is not None and len(state.attempts) == 2
    failure = state.attempts[0].failure
    assert failure is not None and failure.rank == 1 and "is stopped and cannot run (reading data, after step 7)" in failure.message
    logs = place / "runs" / "run" / "logs" / "attempt-1"
    assert (logs / "stacks-1.txt").is_file()
    waiting = (logs / "stacks-0.txt").read_text()
    assert "backward_step" in waiting and "training/trainer.py" in waiting


def test_done_and_then_more_steps_is_bit_equal(place, reference):
    finish(train(place, steps=STEPS - 6), place)
    assert "nothing to do" in run(place, "resume", "runs/run") or max(losses(place)) == STEPS - 6
    assert "the data is not" not in run(place, "resume", "runs/run", f"train.steps={STEPS}")
    assert losses(place) == losses(reference)
    changed = run(place, "resume", "runs/run", f"train.steps={STEPS + 1}", "data.max_seq_len=128")
    assert "the data is not what the checkpoint was trained on" in changed


@pytest.mark.parametrize(
    "overrides",
    [
        ("cluster.ranks_per_node=1", "parallel.tokens_per_rank=512"),
        ("cluster.ranks_per_node=4", "parallel.replicate=2", "parallel.scheme=auto"),
        PIPED,
    ],
)
def test_resume_on_another_layout_sees_the_same_documents(place, reference, overrides):
    stopped(place, 6)
    at = max(losses(place))
    run(place, "resume", "runs/run", *overrides)
    ours, theirs = losses(place), losses(reference)
    assert {step: loss for step, loss in ours.items() if step <= at} == {step: loss for step, loss in theirs.items() if step <= at}
    for step in range(at + 1, STEPS + 1):
        assert abs(ours[step] - theirs[step]) < 1e-4 * theirs[step], step


def test_export_gives_the_model_that_was_trained(place, reference):
    from transformers import AutoModelForCausalLM

    shutil.copytree(reference / "runs", place / "runs")
    report = run(place, "export", "runs/run", "exported", "--dtype", "float32", "--json")
    assert json.loads(report.splitlines()[-1])["step"] == STEPS
    model = AutoModelForCausalLM.from_pretrained(place / "exported", dtype=torch.float32)
    source = open_data_of(place)
    documents, targets = zip(*(source.tokens(STEPS, i, 0, n) for i, n in enumerate(source.lengths(STEPS))), strict=True)
    with torch.no_grad():
        expected = float(reference_loss(model, documents, targets))
    run(place, "resume", "runs/run", f"train.steps={STEPS + 1}")
    assert abs(losses(place)[STEPS + 1] - expected) < 1e-5 * expected


def open_data_of(place: Path):
    config = read_run(place / "runs" / "run").config
    before = Path.cwd()
    os.chdir(place)
    try:
        return open_data(config.data, config.train.seed, 97)
    finally:
        os.chdir(before)


def test_gradients_that_are_no_numbers_stop_the_run_and_keep_the_checkpoint(place, reference):
    shutil.copytree(reference / "runs", place / "runs")
    text = run(place, "resume", "runs/run", f"train.steps={STEPS + 9}", "optim.lr=1e38", "optim.grad_clip=null", expect=93)
    assert f"step {STEPS + 2}: found a loss or gradient norm of nan" in text and "every loss is finite, the gradients are not" in text
    assert "Traceback" not in text
    newest = sorted((place / "runs" / "run" / "checkpoints").iterdir())[-1]
    assert newest.name == f"step-{STEPS:08d}"
    run(place, "resume", "runs/run", "optim.lr=1e-3", "optim.grad_clip=1.0", f"train.steps={STEPS + 2}")
    assert max(losses(place)) == STEPS + 2


def test_a_loss_that_is_no_number_names_ranks_and_documents(place, reference):
    """A rate far too high, with weights that are all finite still: the documents of the step are named, with their tokens."""
    shutil.copytree(reference / "runs", place / "runs")
    text = run(place, "resume", "runs/run", f"train.steps={STEPS + 9}", "optim.lr=1e18", "optim.grad_clip=null", expect=93)
    named = re.search(
        r"step (\d+): found a loss or gradient norm of nan \(ranks 0, 1; ((?:corpus \S* ?document \d+ tokens \d+-\d+(?:; )?)+)", text
    )
    assert named, text
    source, step = open_data_of(place), int(named[1]) - 1
    assert step > STEPS, "the first step with it changes weights alone"
    held = [int(n) for index in range(len(source.lengths(step))) for n in re.findall(r"document (\d+)", source.describe(step, index))]
    documents = [int(n) for n in re.findall(r"document (\d+) tokens", named[2])]
    assert documents and set(documents) <= set(held)
    assert "NaN or infinite weights" not in text and "take the documents named out of the corpus" in text
    assert sorted((place / "runs" / "run" / "checkpoints").iterdir())[-1].name == f"step-{STEPS:08d}"


def test_weights_that_become_no_numbers_in_training_are_named_and_no_document(place):
    process = start(place, "train", *BASE, "train.steps=6", script=SIDE, SPOIL_STEP="4")
    finish(process, place, expect=93)
    text = (place / "output").read_text()
    assert "step 4: found a loss or gradient norm of nan: NaN or infinite weights in model.embed_tokens.weight; expected finite" in text
    assert "no document is at fault" in text and "corpus document" not in text and "Traceback" not in text
    assert max(losses(place)) == 3


def test_one_ctrl_c_ends_a_run_that_hangs_at_its_end(place):
    """Its last save is on the way for ever: nothing it could still do is waited for longer than launcher.grace_s."""
    fault = {"CHECKPOINT_FAULT": f"before_commit=until:{place}/never"}
    process = start(place, "train", *BASE, "train.steps=3", "checkpoint.every_steps=null", "launcher.grace_s=1", script=SIDE, **fault)
    wait_for_step(place, process, 3)
    pids = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    finish(process, place, expect=1)
    assert "did not save within launcher.grace_s=1 s" in (place / "output").read_text()
    assert read_state(place / "runs" / "run").state == "failed"
    wait_until(lambda: not any(is_alive(pid) for pid in pids), "processes outlived it")
    run(place, "resume", "runs/run", "launcher.grace_s=600")
    assert max(losses(place)) == 3 and (place / "runs" / "run" / "checkpoints" / "step-00000003" / "COMMIT").is_file()


def test_weights_that_are_no_numbers_are_named_before_the_first_step(place, reference):
    """A run begins from exported weights, through `model.path`; one row of the embedding is spoiled: no document is at fault."""
    shutil.copytree(reference / "runs", place / "runs")
    run(place, "export", "runs/run", "spoiled", "--dtype", "float32")
    weights = load_file(place / "spoiled" / "model.safetensors")
    weights["model.embed_tokens.weight"][96] = float("nan")
    save_file(weights, place / "spoiled" / "model.safetensors", metadata={"format": "pt"})
    (place / "mine" / "model").mkdir(parents=True)
    (place / "mine" / "model" / "spoiled.yaml").write_text("name: spoiled\npath: spoiled\n")
    words = [word for word in BASE if not word.startswith("model")]
    text = run(place, "train", *words, f"train.steps={STEPS}", "--config-dir", "mine", "model=spoiled", "run.id=other", expect=93)
    assert "found NaN or infinite numbers in model.embed_tokens.weight; expected finite weights" in text
    assert "corpus document" not in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "corpus.idx").unlink(), "corpus.idx"),
        (lambda d: (d / "corpus.idx").write_bytes((d / "corpus.idx").read_bytes()[:500]), "corpus.idx"),
        (lambda d: (d / "corpus.bin").write_bytes((d / "corpus.bin").read_bytes()[:500]), "corpus.bin"),
    ],
    ids=["missing", "truncated index", "truncated tokens"],
)
def test_a_broken_corpus_is_named_once(place, damage, message):
    damage(place)
    text = run(place, "train", *BASE, "train.steps=3", "optim.warmup_steps=0", expect=93)
    assert text.count("expected") == 1 and message in text and "Traceback" not in text
