"""metrics.jsonl line by line, and sinks that work, fail, hang or cannot keep up."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from efflaunch.errors import ConfigError
from efflaunch.tests.limits import ENDS_S
from efflaunch.training.reporting import metrics as metrics_module
from efflaunch.training.reporting import wandb_sink
from efflaunch.training.reporting.config import LoggingConfig, WandbMode
from efflaunch.training.reporting.metrics import Metrics, check_logging
from efflaunch.utils.helper_thread import await_ending

CONFIG = LoggingConfig(name="test")


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the packages of sinks take to be imported."""
    monkeypatch.setattr(metrics_module, "CLOSE_S", ENDS_S)
    monkeypatch.setattr(wandb_sink, "FINISH_S", ENDS_S)


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_each_event_is_one_flushed_line_with_its_time(tmp_path: Path) -> None:
    with Metrics(tmp_path / "run", CONFIG, {}, False) as metrics:
        metrics.write("start", step=0, steps=3)
        metrics.write("step", step=1, loss=2.5, ranks=[{"rank": 0, "tokens": 5, "peak_bytes": 7}], grad_norm=None)
        first, second = _lines(tmp_path / "run")
    assert first.pop("time") <= second.pop("time")
    assert first == {"event": "start", "step": 0, "steps": 3}
    assert second == {"event": "step", "step": 1, "loss": 2.5, "ranks": [{"rank": 0, "tokens": 5, "peak_bytes": 7}], "grad_norm": None}


def test_sinks_get_the_numbers_of_sources() -> None:
    web, code = {"name": "web", "share": 0.5, "epochs": 0.1, "loss": None}, {"name": "code", "share": 0.5, "epochs": 2, "loss": 1.5}
    assert dict(metrics_module._scalars({"step": 1, "lr": 0.1, "sources": [web, code]})) == {
        "lr": 0.1,
        "source/web/share": 0.5,
        "source/web/epochs": 0.1,
        "source/code/loss": 1.5,
        "source/code/share": 0.5,
        "source/code/epochs": 2.0,
    }


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    Metrics(tmp_path, CONFIG, {}, False).write("step", step=1, loss=float("nan"), ranks=[{"x": float("inf")}], t=(float("-inf"), 1))
    (line,) = _lines(tmp_path)
    assert (line["loss"], line["ranks"], line["t"]) == (None, [{"x": None}], [None, 1])


def test_a_resumed_run_appends_and_steps_over_a_line_that_was_cut_off(tmp_path: Path) -> None:
    Metrics(tmp_path, CONFIG, {}, False).write("step", step=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "st')
    Metrics(tmp_path, CONFIG, {}, True).write("step", step=2)
    first, cut, last = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert (json.loads(first)["step"], cut, json.loads(last)["step"]) == (1, '{"event": "st', 2)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Metrics(tmp_path, replace(CONFIG, tensorboard=True), {}, False, rank=1) as metrics:
        metrics.write("step", step=1, loss=1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_loses_lines_says_so_and_recovers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics(tmp_path, CONFIG, {}, False)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", _no_space)
        metrics.write("step", step=1)
        metrics.write("step", step=2)
    metrics.write("step", step=3)
    assert [line["step"] for line in _lines(tmp_path)] == [3]
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2 and "No space left" in texts[0] and "2 lines are lost" in texts[1]


def _no_space(*args: object, **kwargs: object) -> object:
    raise OSError(28, "No space left on device")


class _Recorder:
    """A sink that keeps what it is given; `gate` holds it back."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.written: list[tuple[int, dict[str, float]]] = []
        self.closed, self.thread, self.gate = False, "", gate

    def write(self, scalars: dict[str, float], step: int) -> None:
        if self.gate is not None:
            self.gate.wait()
        self.thread = threading.current_thread().name
        self.written.append((step, scalars))

    def close(self) -> None:
        self.closed = True


def test_sinks_get_the_numbers_of_each_step_in_their_own_thread(tmp_path: Path) -> None:
    sink = _Recorder()
    with Metrics(tmp_path, CONFIG, {}, False, sinks={"mine": lambda: sink}) as metrics:
        metrics.write("start", step=0, steps=2)
        for step in (1, 2):
            ranks = [{"rank": 0, "peak_bytes": 5}, {"rank": 1, "peak_bytes": 9}]
            metrics.write("step", step=step, loss=1.5, tokens=8, grad_norm=None, plan="text", ranks=ranks)
    assert sink.written == [(step, {"loss": 1.5, "tokens": 8.0, "peak_bytes": 9.0}) for step in (1, 2)]
    assert sink.closed and sink.thread == "mine sink"


def test_sinks_get_the_metrics_of_each_evaluation(tmp_path: Path) -> None:
    sink = _Recorder()
    with Metrics(tmp_path, CONFIG, {}, False, sinks={"mine": lambda: sink}) as metrics:
        metrics.write("eval", step=3, corpus="web", loss=2.0, targets=7, metrics={"eval/web/loss": 2.0, "eval/web/context_gain": None})
    assert sink.written == [(3, {"eval/web/loss": 2.0})]


def test_a_sink_that_fails_is_reported_once_and_the_others_continue(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = _Recorder()

    def broken() -> _Recorder:
        raise RuntimeError("no such project")

    with Metrics(tmp_path, CONFIG, {}, False, sinks={"broken": broken, "good": lambda: good}) as metrics:
        for step in range(5):
            metrics.write("step", step=step, loss=1.0)
    failed = [line for line in _lines(tmp_path) if line["event"] == "sink_failed"]
    assert [(line["sink"], line["error"]) for line in failed] == [("broken", "RuntimeError: no such project")]
    assert [record.getMessage() for record in caplog.records] == ["broken receives no more metrics: RuntimeError: no such project"]
    assert len(good.written) == 5
    assert len([line for line in _lines(tmp_path) if line["event"] == "step"]) == 5


def test_a_sink_that_hangs_neither_blocks_training_nor_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "CLOSE_S", 0.2)
    monkeypatch.setattr(metrics_module, "QUEUE_EVENTS", 4)
    gate = threading.Event()
    metrics = Metrics(tmp_path, CONFIG, {}, False, sinks={"slow": lambda: _Recorder(gate)})
    for step in range(20):
        metrics.write("step", step=step, loss=1.0)
    metrics.close()
    gate.set()
    by_event = {line["event"]: line for line in _lines(tmp_path)}
    assert "still busy" in by_event["sink_failed"]["error"] and by_event["sink_failed"]["sink"] == "slow"
    assert by_event["sink_dropped"]["sink"] == "slow" and 15 <= by_event["sink_dropped"]["events"] <= 16
    assert len([line for line in _lines(tmp_path) if line["event"] == "step"]) == 20


def test_tensorboard_shows_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for attempt in (0, 1):
        with Metrics(tmp_path, replace(CONFIG, tensorboard=True), {}, bool(attempt)) as metrics:
            for step in (1, 2):
                metrics.write("step", step=2 * attempt + step, loss=float(step), plan="text")
    assert [line["event"] for line in _lines(tmp_path)] == ["step"] * 4
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 1.0), (4, 2.0)]


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("wandb", "tensorboard") else find(name))
    with pytest.raises(ConfigError, match=r"logging.tensorboard=true: found no package tensorboard.*\n.*efflaunch\[tensorboard\]"):
        check_logging(replace(CONFIG, tensorboard=True))
    with pytest.raises(ConfigError, match=r"logging.wandb=offline: found no package wandb.*\n.*pip install 'efflaunch\[wandb\]'"):
        Metrics(tmp_path, replace(CONFIG, wandb=WandbMode.OFFLINE), {}, False)
    with pytest.raises(ConfigError, match=r"logging\.every_steps"):
        check_logging(replace(CONFIG, every_steps=0))
    check_logging(CONFIG)
    assert list(tmp_path.iterdir()) == []


_FAKE_WANDB = """
import json, os, time
def note(*values):
    with open(os.environ["FAKE_CALLS"], "a") as file:
        file.write(json.dumps(values) + "\\n")
class Run:
    def define_metric(self, *a, **k): pass
    def log(self, values): note("log", values)
    def finish(self): note("finish")
def Settings(**fields): return fields
def init(**arguments):
    if os.environ.get("FAKE_HANGS"): time.sleep(600)
    if os.environ.get("FAKE_FAILS"): raise RuntimeError("no such project")
    note("init", arguments, os.environ["WANDB_ERROR_REPORTING"], os.environ["WANDB_SILENT"])
    return Run()
"""


@pytest.fixture
def fake_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The child process imports this wandb; what it is asked is noted in a file."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(_FAKE_WANDB)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'fake'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr(metrics_module, "_check_installed", lambda *args: None)
    return tmp_path / "calls"


def test_wandb_is_offline_quiet_and_keeps_its_run_id(tmp_path: Path, fake_calls: Path) -> None:
    for resumed, mode in ((False, WandbMode.OFFLINE), (True, WandbMode.OFFLINE), (True, WandbMode.ONLINE)):
        with Metrics(tmp_path / "run", replace(CONFIG, wandb=mode), {"a": 1}, resumed) as metrics:
            metrics.write("step", step=3, loss=0.5)
    calls = [json.loads(line) for line in fake_calls.read_text().splitlines()]
    assert [call[0] for call in calls] == ["init", "log", "finish"] * 3
    starts = [call[1] for call in calls if call[0] == "init"]
    assert [(start["mode"], start["resume"]) for start in starts] == [("offline", None), ("offline", None), ("online", "allow")]
    assert len({start["id"] for start in starts}) == 1 and starts[0]["id"] == (tmp_path / "run" / "wandb_id").read_text()
    assert all(call[2:] == ["false", "true"] for call in calls if call[0] == "init")
    assert starts[0]["config"] == {"a": 1} and starts[0]["dir"] == str(tmp_path / "run")
    assert calls[1][1] == {"loss": 0.5, "step": 3}
    assert [line["event"] for line in _lines(tmp_path / "run")] == ["step"] * 3


def test_wandb_that_does_not_start_is_reported_with_its_reason(tmp_path: Path, fake_calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAILS", "1")
    with Metrics(tmp_path / "run", replace(CONFIG, wandb=WandbMode.ONLINE), {}, False) as metrics:
        metrics.write("step", step=1, loss=0.5)
    failed = [line for line in _lines(tmp_path / "run") if line["event"] == "sink_failed"]
    assert [(line["sink"], line["error"]) for line in failed] == [("wandb", "RuntimeError: no such project")]
    assert not fake_calls.exists()


def test_a_wandb_that_hangs_takes_every_line_and_gives_up_at_the_end(
    tmp_path: Path, fake_calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_sink, "FINISH_S", 0.3)
    monkeypatch.setattr(wandb_sink, "_MARGIN_S", ENDS_S)
    monkeypatch.setenv("FAKE_HANGS", "1")
    sink = wandb_sink.WandbSink({"settings": {}})
    for step in range(2000):
        sink.write({"x" * 100: 1.0}, step)
    with pytest.raises(wandb_sink.SinkError, match="not finished 0 s after the end of the run"):
        sink.close()
    assert not fake_calls.exists()


_OFFLINE = """
import sys; from pathlib import Path
from efflaunch.training.reporting.config import LoggingConfig, WandbMode
from efflaunch.training.reporting import metrics, wandb_sink
metrics.CLOSE_S = wandb_sink.FINISH_S = float(sys.argv[3])
with metrics.Metrics(Path(sys.argv[1]), LoggingConfig(name="t", wandb=WandbMode.OFFLINE), {"a": 1}, sys.argv[2] == "1") as written:
    written.write("step", step=1, loss=2.0)
"""


def test_real_wandb_offline_segments_share_one_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for attempt in "01":
        command = [sys.executable, "-c", _OFFLINE, str(tmp_path / "run"), attempt, str(ENDS_S)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == "" and done.stderr == ""
    run_id = (tmp_path / "run" / "wandb_id").read_text()
    segments = list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}"))
    assert len(segments) == len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) >= 1
    assert all(list(segment.glob(f"run-{run_id}*.wandb")) for segment in segments)
    assert [line["event"] for line in _lines(tmp_path / "run")] == ["step", "step"]
    assert logging.getLogger("efflaunch").level == logging.NOTSET


def test_after_an_error_sinks_end_by_themselves(tmp_path: Path) -> None:
    """The error goes on record first: nobody has waited for them when it leaves the block."""
    gate = threading.Event()
    sink = _Recorder(gate)
    with pytest.raises(ZeroDivisionError), Metrics(tmp_path, CONFIG, {}, False, sinks={"slow": lambda: sink}) as metrics:
        metrics.write("step", step=1, loss=1.5)
        _ = 1 // 0
    assert not sink.closed
    gate.set()
    await_ending(ENDS_S)
    assert sink.closed and sink.written == [(1, {"loss": 1.5})]
