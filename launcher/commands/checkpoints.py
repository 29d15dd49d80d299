"""`efflaunch checkpoints RUN_DIR`: what a run has saved, where, and whether it is whole."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoint import files
from ...errors import EXIT_DONE, EXIT_USER, CheckpointError
from ...units import format_bytes, format_seconds
from ..rundir.lock import is_locked
from ..rundir.metrics_index import read_progress
from ..rundir.run_dir import keep_private, read_run
from .arguments import STEP, CommandParser, add_json, add_run_dir, number_in

if TYPE_CHECKING:
    from ...checkpoint.tier import Tier

HERE = "here"
DAMAGED, MISSING, UNREACHABLE = "damaged", "missing", "unreachable"
"""States of what is not well; the last two of the second place."""
_BAD = (DAMAGED, MISSING, UNREACHABLE)


@dataclass(frozen=True, slots=True)
class CheckpointsRequest:
    """Parsed command line of `efflaunch checkpoints`."""

    verify: bool
    pin: int | None
    unpin: int | None
    as_json: bool


DESCRIPTION = "Checkpoints of a run: state, age, size, place. Exit code 0: all is well; 93: one is damaged, or not in the mirror."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `efflaunch checkpoints`."""
    add_run_dir(parser)
    parser.add_argument("--verify", action="store_true", help="read every byte and compare it with its hash")
    parser.add_argument("--pin", type=number_in(int, STEP), metavar="STEP", help="never let retention remove this one")
    parser.add_argument("--unpin", type=number_in(int, STEP), metavar="STEP", help="let it again")
    add_json(parser)


def main(words: list[str]) -> int:
    """Run `efflaunch checkpoints` and return its exit code."""
    parser = CommandParser("checkpoints", DESCRIPTION)
    add_arguments(parser)
    options = parser.parse_args(words)
    request = CheckpointsRequest(verify=options.verify, pin=options.pin, unpin=options.unpin, as_json=options.json)
    return print_checkpoints(options.run_dir, request)


def print_checkpoints(run_dir: Path, request: CheckpointsRequest) -> int:
    """Print the list; exit code 0 where all is well.

    93 where a checkpoint is damaged, none is whole, or the second place cannot be read or lacks what it should have.
    """
    config = read_run(run_dir).config
    keep_private(config.run.private)
    mirror = config.checkpoint.mirror
    for step, pinned in ((request.pin, True), (request.unpin, False)):
        if step is not None:
            _set_pinned(run_dir, step, pinned)
    rows = [_row_here(info, request.verify) for info in files.list_checkpoints(run_dir)]
    if mirror is not None:
        rows += _rows_there(run_dir, mirror, [row["step"] for row in rows if row["state"] != DAMAGED], request.verify)
    replicas = _rows_in_memory(run_dir)
    if request.as_json:
        print(json.dumps([*rows, *replicas], indent=1))
    else:
        print("\n".join(_lines([*rows, *replicas], request.verify)))
    # What is in memory alone is no checkpoint.
    well = all(row["state"] not in _BAD for row in rows)
    return EXIT_DONE if well else EXIT_USER


def _set_pinned(run_dir: Path, step: int, pinned: bool) -> None:
    path = files.step_path(run_dir / files.FOLDER, step)
    if not path.is_dir():
        there = ", ".join(str(info.step) for info in files.list_checkpoints(run_dir)) or "none"
        raise CheckpointError(str(path), found="no such checkpoint", expected=f"one of the steps there are: {there}", hint="one of these")
    try:
        if pinned:
            (path / files.PINNED_FILE).touch()
        else:
            (path / files.PINNED_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            str(path), found=str(error), expected="a directory you can write", hint=shlex.join(["ls", "-ld", str(path)])
        ) from error


def _row_here(info: files.CheckpointInfo, verify: bool) -> dict[str, Any]:
    problems = [info.problem] if info.problem is not None else []
    if verify:
        from ...checkpoint.verify import damage

        problems += damage(info.path)
    row = _row(info.step, HERE, problems, verify)
    size = {"num_bytes": info.num_bytes, "time": info.time, "world_size": info.world_size}
    return row | size | {"pinned": info.is_pinned, "path": str(info.path)}


def _rows_there(run_dir: Path, mirror: str, here: list[int], verify: bool) -> list[dict[str, Any]]:
    """`here`: the whole ones that this place should have the newest of, once nothing runs."""
    from ...checkpoint.tier import Tier

    try:
        tier = Tier(mirror)
        steps = tier.steps()
    except Exception as error:  # whatever a store raises: what is here is listed all the same
        return [_problem(None, mirror, UNREACHABLE, f"{type(error).__name__}: {error}")]
    rows = [_row_there(tier, step, verify) for step in steps]
    lacking = [step for step in here[-1:] if step not in steps]
    said = read_progress(run_dir).mirror_error
    if said is not None or (lacking and not is_locked(run_dir)):
        rows += [_problem(step, tier.address, MISSING, said or "it was never copied there") for step in lacking or here[-1:]]
    return rows


def _problem(step: int | None, where: str, state: str, text: str) -> dict[str, Any]:
    none = {"num_bytes": 0, "time": 0.0, "world_size": 0, "pinned": False}
    return {"step": step, "where": where, "state": state, "problems": [text]} | none


def _row_there(tier: Tier, step: int, verify: bool) -> dict[str, Any]:
    problems = tier.damage(step) if verify else []
    try:
        record = tier.record(step)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return _row(step, tier.address, [*problems, str(error)], verify) | {"num_bytes": 0, "time": 0.0, "world_size": 0, "pinned": False}
    size = {"num_bytes": sum(record["files"].values()), "time": record["time"], "world_size": record["world_size"]}
    return _row(step, tier.address, problems, verify) | size | {"pinned": False, "path": f"{tier.address}/step-{step:08d}"}


def _rows_in_memory(run_dir: Path) -> list[dict[str, Any]]:
    """List the images of ranks (checkpoint.replica) that keepers on this host hold of the run's newest snapshots. Not checkpoints."""
    import socket

    from ...checkpoint.replica.keeper_process import look, meeting_path

    node = socket.gethostname()
    folder = meeting_path(run_dir / files.FOLDER, node)
    images = look(folder, node, "")[0] if folder.is_dir() else []
    rows = []
    for step, attempt, world_size in sorted({(image.step, image.attempt, image.world_size) for image in images}):
        ranks = {image.rank for image in images if image.attempt == attempt and image.manifest}
        state = "replicated" if len(ranks) == world_size else "partial"
        row = _row(step, f"memory of {node} ({len(ranks)} of {world_size} ranks)", [], False)
        rows.append({**row, "state": state, "num_bytes": 0, "time": 0.0, "world_size": world_size, "pinned": False})
    return rows


def _row(step: int, where: str, problems: list[str], verified: bool) -> dict[str, Any]:
    state = DAMAGED if problems else ("verified" if verified else "committed")
    return {"step": step, "where": where, "state": state, "problems": problems}


def _lines(rows: list[dict[str, Any]], verify: bool) -> list[str]:
    if not rows:
        return ["no checkpoints"]
    lines = [f"{'step':>8}  {'state':<11}{'size':>10}  {'age':>14}  {'ranks':>5}  where"]
    for row in rows:
        age = f"{format_seconds(max(0.0, time.time() - row['time']))} ago" if row["time"] else "?"
        pinned = "  pinned" if row["pinned"] else ""
        size = format_bytes(row["num_bytes"]) if row["num_bytes"] else "-"
        lines.append(f"{row['step'] or '-':>8}  {row['state']:<11}{size:>10}  {age:>14}  {row['world_size']:>5}  {row['where']}{pinned}")
        lines += [f"          {problem}" for problem in row["problems"]]
    if not verify:
        lines.append("states are from sizes and commit records; --verify reads every byte")
    return lines
