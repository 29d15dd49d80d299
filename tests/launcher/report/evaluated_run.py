"""A run directory with everything a report shows, as training leaves it, without training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.rundir.run_dir import store_config
from efflaunch.launcher.rundir.state import Attempt, Failure, new_state, write_state

CERTIFICATE = {
    "place": "rank", "device_phase": "loss", "fits": True, "device_bytes": 2 << 30, "device_capacity_bytes": 3 << 30,
    "host_bytes": 4 << 30, "host_capacity_bytes": 12 << 30,
}  # fmt: skip


def start(at: float, resumed: int | None = None) -> dict[str, Any]:
    return {
        "event": "start", "time": at, "step": resumed or 0, "steps": 6, "world_size": 4, "parameters": 1000, "sequence": "static",
        "resumed_from": resumed, "certificate": CERTIFICATE, "memory": ["layer inputs kept"],
    }  # fmt: skip


def step(number: int, loss: float | None, at: float, **fields: Any) -> dict[str, Any]:
    groups = [
        {"micro_batch": 0, "first_rank": 0, "degree": 2, "ulysses": 2, "sequences": [0], "tokens": 300},
        {"micro_batch": 0, "first_rank": 2, "degree": 1, "ulysses": 1, "sequences": [1], "tokens": 100},
    ]
    return {
        "event": "step", "time": at, "step": number, "loss": loss, "step_s": 2.0, "tokens": 400, "tokens_per_s": 200.0 + number,
        "total_tokens": 400 * number, "ranks": [{"rank": rank, "peak_bytes": (rank + 1) << 28} for rank in range(4)],
        "groups": groups, "device_tokens_per_s": 50.0, "model_flops_per_s": 3e9, **fields,
    }  # fmt: skip


def evaluation(number: int, loss: float, at: float, corpus: str = "web") -> dict[str, Any]:
    return {
        "event": "eval", "time": at, "step": number, "corpus": corpus, "loss": loss, "targets": 1234, "tokens": 2000, "eval_s": 1.5,
        "lengths": [{"length": 1024, "loss": loss + 0.2, "targets": 64}, {"length": 8192, "loss": loss, "targets": 64}],
        "positions": [{"up_to": 1 << power, "loss": loss + 1 / (1 + power), "targets": 10} for power in range(14)],
        "context": {"tokens": 4096, "targets": 500, "loss": loss, "short_loss": loss + 0.125, "gain": 0.125},
        "metrics": {f"eval/{corpus}/loss": loss, f"eval/{corpus}/context_gain": 0.125, f"eval/{corpus}/position_8": loss},
    }  # fmt: skip


def needles(number: int, at: float) -> dict[str, Any]:
    rows = [
        {"task": "one_key", "length": length, "depth": depth, "samples": 4, "exact": exact, "log_prob": -1.0}
        for length, depth, exact in ((1024, 0.0, 1.0), (1024, 0.5, 0.75), (8192, 0.0, 0.5), (8192, 0.5, 0.25))
    ]
    own = {"metrics": {"eval/needles/exact": 0.625}, "exact": 0.625, "needles": rows, "positions": [], "context": None}
    return evaluation(number, 2.0, at, "needles") | own


def make_run(root: Path, name: str = "mine", *overrides: str, mfu: float | None = None, hidden: bool = False) -> Path:
    """A run of six steps with a crash after the fourth, evaluations, a pinned best checkpoint, and a second revision.

    `hidden`: also evaluated on needles.
    """
    run_dir = root / name
    run_dir.mkdir(parents=True)
    config = compose(["+experiment=quickstart", "train.steps=4", f"run.id={name}", "eval.corpora={web: 'held/<web>'}", *overrides])
    store_config(run_dir, config)
    store_config(run_dir, replace(config, train=replace(config.train, steps=6)))
    used = {} if mfu is None else {"mfu": mfu, "hfu": mfu * 1.2}
    events = [
        start(1000.0), evaluation(0, 9.0, 1001.0),
        *(step(number, 8.0 - number, 1000.0 + 10 * number, **used) for number in (1, 2, 3, 4)),
        {"event": "checkpoint", "time": 1025.0, "step": 2, "path": "checkpoints/step-00000002", "save_s": 0.5, "stall_s": 0.1},
        evaluation(4, 3.5, 1041.0),
        start(1060.0, resumed=2),
        *(step(number, 7.5 - number, 1060.0 + 10 * number, **used) for number in (3, 4, 5, 6)),
        {"event": "certificate", "time": 1061.0, "step": 3, "ok": True, "predicted_bytes": 3 << 29, "measured_bytes": [1 << 30],
         "compared": "resident, libraries in"},
        evaluation(6, 2.25, 1125.0),
        *([needles(6, 1125.5)] if hidden else []),
        {"event": "best", "time": 1126.0, "step": 6, "metric": "eval/web/loss", "value": 2.25, "pinned": True},
        {"event": "end", "time": 1130.0, "step": 6},
    ]  # fmt: skip
    text = "".join(json.dumps(event) + "\n" for event in events)
    # Cut off in the middle of a line, as a crash leaves it.
    (run_dir / "metrics.jsonl").write_text(text + '{"event": "step", "step": 7, "lo')
    failure = Failure(rank=1, message="rank 1 died & left <nothing>", traceback="", log="logs/attempt-1/rank-1.log")
    attempts = (
        Attempt(number=1, started=999.0, ended=1050.0, exit_code=1, last_step=4, failure=failure, decision="started again", restarted=True),
        Attempt(number=2, started=1055.0, ended=1131.0, exit_code=0, last_step=6),
    )
    write_state(run_dir, replace(new_state(world_size=4, revision=2, attempts=attempts), state="done", exit_code=0))
    return run_dir
