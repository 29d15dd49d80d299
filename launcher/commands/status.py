"""`efflaunch status RUN_DIR`: where a run stands, from its files alone."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ...errors import EXIT_DONE
from ...units import format_seconds
from ...utils.text import typed
from ..agent.hang_verdict import silence_lines
from ..agent.hang_watch import read_pulses
from ..backend_registry import launcher_of
from ..config.node_range import node_range
from ..config.run_config import Backend, Config
from ..rundir.metrics_index import Summary, read_summary
from ..rundir.metrics_reader import checkpoint_steps
from ..rundir.notices import read_notices
from ..rundir.progress import summary_lines
from ..rundir.run_dir import read_run
from ..rundir.state import ACTIVE, RunState, read_state
from .arguments import CommandParser, add_json, add_run_dir

DESCRIPTION = "Where a run stands: state, step, loss, speed, time to go, checkpoints, last error."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `efflaunch status`."""
    add_run_dir(parser)
    add_json(parser)


def main(words: list[str]) -> int:
    """Run `efflaunch status` and return its exit code."""
    parser = CommandParser("status", DESCRIPTION)
    add_arguments(parser)
    options = parser.parse_args(words)
    return print_status(options.run_dir, as_json=options.json)


def print_status(run_dir: Path, *, as_json: bool) -> int:
    """Print it; exit code 0 whatever the run's own state is."""
    summary = read_summary(run_dir)
    facts = status(run_dir, summary)
    print(json.dumps(facts, indent=1) if as_json else "\n".join(describe(facts, run_dir, summary)))
    return EXIT_DONE


def status(run_dir: Path, summary: Summary | None = None) -> dict[str, Any]:
    """Return everything `--json` prints. ConfigError where `run_dir` is not a run directory. `summary`: its metrics, if read already."""
    stored = read_run(run_dir)
    state = read_state(run_dir)
    summary = read_summary(run_dir) if summary is None else summary
    progress, forecast = summary.progress(), summary.forecast(stored.config.launcher.grace_s)
    return {
        "run_dir": str(run_dir),
        "experiment": stored.config.experiment,
        "revision": stored.revision,
        **_process_facts(run_dir, state, stored.config.launcher.backend),
        **_node_facts(state, stored.config),
        "stop_s": None if forecast is None else forecast.needed_s,
        "stop_warning": None if forecast is None or forecast.fits else str(forecast),
        "step": progress.step,
        "steps": stored.config.train.steps,
        "loss": progress.losses.get(progress.step),
        "first_loss": progress.losses[min(progress.losses)] if progress.losses else None,
        "tokens": progress.total_tokens,
        "tokens_per_s": progress.tokens_per_s,
        "time_left_s": progress.time_left_s,
        "peak_bytes": [progress.peak_bytes[rank] for rank in sorted(progress.peak_bytes)],
        "checkpoints": checkpoint_steps(run_dir),
        "checkpoint_error": progress.checkpoint_error,
        "mirror": stored.config.checkpoint.mirror,
        "mirror_error": progress.mirror_error,
        "stragglers": progress.stragglers,
        "silent": _silent(run_dir, state),
        "notices": [] if state is None else read_notices(run_dir, state.started),
    }


def _process_facts(run_dir: Path, state: RunState | None, backend: Backend) -> dict[str, Any]:
    if state is None:
        empty = dict.fromkeys(("pid", "host", "job", "detail", "exit_code", "updated", "last_error"))
        return {"state": "not started", "attempts": 0, **empty}
    standing, failure = launcher_of(backend).status(run_dir, state), state.failure
    return {
        "state": standing.state,
        "pid": standing.pid,
        "host": state.host,
        "job": standing.job,
        "detail": standing.detail,
        "attempts": len(state.attempts),
        "exit_code": state.exit_code,
        "updated": state.updated,
        "last_error": None if failure is None else {"rank": failure.rank, "message": failure.message, "log": failure.log},
    }


def _node_facts(state: RunState | None, config: Config) -> dict[str, Any]:
    """Return where the newest attempt runs or ran, and what was asked for."""
    last = state.attempts[-1] if state is not None and state.attempts else None
    return {
        "nodes_asked": str(node_range(config)),
        "num_nodes": None if last is None else last.num_nodes,
        "hosts": [] if last is None else list(last.hosts),
        "world_size": None if last is None or state is None else last.world_size or state.world_size,
        "excluded": {} if state is None else state.excluded,
    }


def _nodes_line(facts: dict[str, Any]) -> str:
    asked = "" if facts["nodes_asked"] == str(facts["num_nodes"]) else f" of {facts['nodes_asked']}"
    return f"{facts['num_nodes']}{asked}, {facts['world_size']} ranks: {', '.join(facts['hosts'])}"


def _silent(run_dir: Path, state: RunState | None) -> list[dict[str, Any]]:
    """Return how long each rank has sent no beat, and its last one; none while all of them make progress."""
    if state is None or state.state not in ACTIVE or not state.attempts or state.attempts[-1].ended is not None:
        return []
    return read_pulses(run_dir, state.attempts[-1].number)


def describe(facts: dict[str, Any], run_dir: Path, summary: Summary | None = None) -> list[str]:
    """Return the facts as lines of text."""
    rows = [("run", f"{facts['run_dir']} ({facts['experiment']}, revision {facts['revision']})"), ("state", _state_line(facts))]
    progress = (read_summary(run_dir) if summary is None else summary).progress()
    progress.steps = facts["steps"]
    rows += summary_lines(progress)
    if facts["state"] in ACTIVE and facts["tokens_per_s"] is not None:
        left = facts["time_left_s"]
        rows.append(("speed", f"{facts['tokens_per_s']:,.0f} tokens/s" + ("" if left is None else f", {format_seconds(left)} to go")))
    if facts["hosts"]:
        rows.append(("nodes", _nodes_line(facts)))
    rows += [("left out", f"{host}: {why}") for host, why in facts["excluded"].items()]
    if facts["stop_warning"] and facts["state"] in ACTIVE:
        rows.append(("stopping", facts["stop_warning"]))
    rows += [("" if index else "silent", line) for index, line in enumerate(silence_lines(facts["silent"]))]
    rows.append(("checkpoints", ", ".join(f"step {step}" for step in facts["checkpoints"]) or "none"))
    if facts["checkpoint_error"]:
        rows.append(("save failed", facts["checkpoint_error"]))
    rows += [("" if index else "notice", notice["text"]) for index, notice in enumerate(facts["notices"])]
    if facts["last_error"]:
        rows.append(("last error", f"{facts['last_error']['message']} (log: {run_dir / facts['last_error']['log']})"))
    if facts["state"] not in ACTIVE:
        rows.append(("resume", typed("resume", run_dir)))
    return [f"{name:<12}{value}" for name, value in rows]


def _state_line(facts: dict[str, Any]) -> str:
    parts = [facts["state"]]
    if facts["detail"]:
        parts.append(facts["detail"])
    if facts["exit_code"] is not None:
        parts.append(f"exit code {facts['exit_code']}")
    if facts["attempts"] > 1:
        parts.append(f"{facts['attempts']} attempts")
    if facts["updated"]:
        parts.append(f"{format_seconds(max(0.0, time.time() - facts['updated']))} ago")
    return ", ".join(parts)
