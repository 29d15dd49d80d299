"""Whatever becomes of a field of metrics.jsonl, who reads it passes the line over or does without the field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from efflaunch.launcher.live_display import PlainDisplay
from efflaunch.launcher.rundir.metrics_events import Event, is_sound
from efflaunch.launcher.rundir.progress import RunProgress, summary_lines
from efflaunch.launcher.stop_forecast import GraceWatch

CERTIFICATE = {
    "place": "rank",
    "device_bytes": 5,
    "device_phase": "loss",
    "device_capacity_bytes": 9,
    "host_bytes": 5,
    "host_capacity_bytes": 9,
    "fits": True,
}
TOTALS = {"late": 0, "steps": 2, "predicted_s": 1.0, "static_s": 2.0, "timed_s": 1.0, "timed_predicted_s": 1.0}
EVENTS: tuple[Event, ...] = (
    {
        "event": "start",
        "time": 1.0,
        "step": 0,
        "steps": 4,
        "world_size": 2,
        "hosts": ["a"],
        "parameters": 10,
        "sequence": "adaptive",
        "costs": "arithmetic",
        "memory": ["keep"],
        "certificate": CERTIFICATE,
        "resumed_from": None,
        "restored_from": None,
        "optimizer_inexact": [],
        "skipped_checkpoints": ["x"],
        "data_changes": ["y"],
        "schedule": {"change": "z"},
    },
    {"event": "certificate", "time": 1.0, "step": 1, "ok": True, "predicted_bytes": 9, "measured_bytes": [7], "compared": "resident"},
    {
        "event": "step",
        "time": 1.0,
        "step": 1,
        "loss": 5.0,
        "tokens": 9,
        "sequences": 3,
        "step_s": 0.2,
        "tokens_per_s": 9.0,
        "micro_batches": 1,
        "plan": "p",
        "ranks": [{"rank": 0, "tokens": 9, "peak_bytes": 7}],
        "sources": [{"name": "web", "tokens": 9, "share": 1.0, "epochs": 0.5, "targets": 8, "loss": 5.0}],
        "total_tokens": 9,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "plan_totals": TOTALS,
        "device_tokens_per_s": 4.5,
        "model_flops_per_s": 1e9,
        "mfu": 0.4,
        "hfu": 0.5,
    },
    {"event": "checkpoint", "time": 1.0, "step": 1, "path": "p", "num_bytes": 7, "save_s": 0.1, "stall_s": 0.1, "snapshot_s": 0.1},
    {"event": "checkpoint_failed", "time": 1.0, "step": 2, "error": "full"},
    {"event": "mirror_failed", "time": 1.0, "step": 2, "error": "away"},
    {"event": "planner_failed", "time": 1.0, "step": 2, "error": "died"},
    {"event": "drift", "time": 1.0, "step": 2, "measured_over_predicted": {"2": 1.5}},
    {"event": "stragglers", "time": 1.0, "step": 2, "ranks": [{"rank": 1, "host": "a", "ratio": 1.4}]},
    {"event": "score", "time": 1.0, "done_tokens": 1, "total_tokens": 2, "elapsed_s": 1.0},
    {"event": "eval_progress", "time": 1.0, "corpus": "web", "done_tokens": 1, "total_tokens": 2},
    {
        "event": "eval",
        "time": 1.0,
        "step": 2,
        "corpus": "web",
        "loss": 2.0,
        "targets": 5,
        "tokens": 9,
        "eval_s": 1.0,
        "lengths": [{"length": 8, "loss": 2.0, "targets": 5}],
        "positions": [{"up_to": 8, "loss": 2.0, "targets": 5}],
        "context": {"tokens": 4, "targets": 3, "loss": 2.0, "short_loss": 2.5, "gain": 0.5},
        "metrics": {"eval/web/loss": 2.0},
    },
    {"event": "best", "time": 1.0, "step": 2, "metric": "eval/web/loss", "value": 2.0, "pinned": True},
    {"event": "early_stop", "time": 1.0, "step": 2, "metric": "eval/web/loss", "best": 2.0, "best_step": 1, "evaluations": 3},
)
VALUES: tuple[Any, ...] = (None, "x", -1, 0, 0.5, [], {}, True, [None], [{}], {"a": None}, 1e308)


def variants(event: Event) -> Iterator[Event]:
    """`event` with one field gone or of another kind, and so within its fields."""
    for name in (name for name in event if name != "event"):
        yield {key: value for key, value in event.items() if key != name}
        yield from ({**event, name: value} for value in VALUES)
        inner = event[name]
        if isinstance(inner, dict):
            yield from ({**event, name: changed} for changed in variants(inner))
        if isinstance(inner, list) and inner and isinstance(inner[0], dict):
            yield from ({**event, name: [changed]} for changed in variants(inner[0]))


@pytest.mark.parametrize("number", range(len(EVENTS)), ids=[str(event["event"]) for event in EVENTS])
def test_a_damaged_field_ends_no_reader(number: int) -> None:
    assert all(is_sound(event) for event in EVENTS)
    for changed in variants(EVENTS[number]):
        events = [event for event in (*EVENTS[:number], changed, *EVENTS[number + 1 :]) if is_sound(event)]
        PlainDisplay(1).show(events)
        summary_lines(RunProgress().apply(events))
        GraceWatch(60.0).add(events).news()
