"""Checks before ranks are started that all nodes of a job are fit for it: a table, failures first.

Every node tells the head the same facts over the store that the ranks will use, so the network is tried as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import UserError
from ...units import format_bytes
from ..rundir.run_dir import RUN_FILE, attempt_dir, read_attempt
from .node_place import NodePlace

MAX_CLOCK_SKEW_S = 30.0
"""Errors are put in order by the clocks of their nodes."""
CODE_FOLDERS = ("checkpoint", "cluster", "estimate", "launcher", "memory", "model", "parallel", "training", "utils")
"""Folders whose code must be the same on every node. Not a listing: a checkout may hold other folders."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFacts:
    """Facts that one node reports of itself."""

    node: int
    host: str
    address: str
    interface: str
    package: str
    """Hash of efflaunch's own source files."""
    run: str
    """Hash of run.yaml as this node sees it; empty where it cannot."""
    machine: str
    """Devices and memory in words."""
    problem: str = ""
    """Why the node cannot do its part, by its own account; empty where it can."""
    clock_s: float = 0.0
    """The node's clock minus the head's, measured when the head sent its time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One node's line of the table."""

    host: str
    problems: tuple[str, ...]
    details: str
    node: int = 0


def look(run_dir: Path, *, place: NodePlace, address: str, interface: str | None, attempt: int) -> NodeFacts:
    """Return this node's facts. Leaves a mark in the run directory that the head looks for."""
    run, machine, problem = "", "", ""
    try:
        run = _run_hash(run_dir, attempt)
        mark(run_dir, place.folder, attempt, place.node).touch()
        machine, problem = _machine(run_dir, attempt)
    except OSError as error:
        problem = f"run directory: {error.strerror}: {error.filename}"
    return NodeFacts(
        node=place.node,
        host=place.name,
        address=address,
        interface=interface or "?",
        package=package_hash(),
        run=run,
        machine=machine,
        problem=problem,
    )


def _run_hash(run_dir: Path, attempt: int) -> str:
    """Hash run.yaml and the attempt's own configuration, if it has one. OSError where this node cannot read them."""
    own = attempt_dir(run_dir, attempt) / RUN_FILE
    return hashlib.sha256((run_dir / RUN_FILE).read_bytes() + (own.read_bytes() if own.is_file() else b"")).hexdigest()


def _machine(run_dir: Path, attempt: int) -> tuple[str, str]:
    """Describe what the node has, and why that is not enough; the second is empty where it is."""
    from ...checkpoint.files import FOLDER
    from ...checkpoint.tier import reach
    from ..hardware import this_machine
    from ..machine_checks import check_free, check_node

    try:
        config = read_attempt(run_dir, attempt)
        here = this_machine(config.cluster.device)
        sizes = sorted({gpu.memory_bytes for gpu in here.gpus})
        gpus = f"{len(here.gpus)} GPUs of {' and '.join(map(format_bytes, sizes))}, " if here.gpus else ""
        words = f"{gpus}{here.num_cores} cores, {format_bytes(here.memory_bytes)} free"
        check_node(config, here)
        check_free(config, here)
        if config.checkpoint.mirror is not None:
            reach(config.checkpoint.mirror, run_dir / FOLDER)
    except UserError as error:
        return "", str(error).splitlines()[0]
    return words, ""


def mark(run_dir: Path, folder: str, attempt: int, node: int) -> Path:
    """The file by which the head sees that a node writes into the same directory."""
    return run_dir / folder / f"seen-{attempt}-{node}"


def package_hash() -> str:
    """Hash every source file of efflaunch with its path."""
    root = Path(__file__).resolve().parent.parent.parent
    total = hashlib.sha256()
    for path in [*sorted(root.glob("*.py")), *sorted(path for folder in CODE_FOLDERS for path in (root / folder).rglob("*.py"))]:
        total.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return total.hexdigest()


def check_nodes(facts: Sequence[NodeFacts | None], *, marks: Sequence[bool], num_nodes: int) -> list[Row]:
    """A row per node, those with problems first. `facts[0]` is the head's; None: the node said nothing in time."""
    head = facts[0]
    assert head is not None, "the head asks"
    rows = [
        _row(node, answer, head, marked)
        if answer is not None
        else Row(host=f"node {node} of the job", problems=("did not answer",), details="", node=node)
        for node, (answer, marked) in enumerate(zip(facts, marks, strict=True))
    ]
    if len(facts) != num_nodes:
        problem = f"the job has {len(facts)} nodes, cluster.num_nodes={num_nodes}"
        rows[0] = replace(rows[0], problems=(problem, *rows[0].problems))
    return sorted(rows, key=lambda row: not row.problems)


def _row(node: int, answer: NodeFacts, head: NodeFacts, marked: bool) -> Row:
    problems = [answer.problem] if answer.problem else []
    if answer.run and answer.run != head.run:
        problems.append("sees another run.yaml: the run directory is not shared")
    elif not marked and not answer.problem:
        problems.append("what it wrote is not seen by the head: the run directory is not shared")
    if answer.package != head.package:
        problems.append("has another version of efflaunch's files")
    if answer.node != node:
        problems.append(f"answered as node {answer.node}")
    if abs(answer.clock_s) > MAX_CLOCK_SKEW_S:
        problems.append(f"its clock is {answer.clock_s:+.0f} s off the head's")
    details = f"{answer.address} on {answer.interface}, {answer.machine or 'machine not looked at'}, clock {answer.clock_s:+.1f} s"
    return Row(host=answer.host, problems=tuple(problems), details=details, node=node)


def table(rows: Sequence[Row]) -> str:
    """Format the table as lines of text."""
    width = max(len(row.host) for row in rows)
    return "\n".join(
        f"{'ok' if not row.problems else 'FAIL':<5} {row.host:<{width}}  {'; '.join((*row.problems, row.details)).strip('; ')}"
        for row in rows
    )


def bad_hosts(rows: Sequence[Row]) -> list[str]:
    """Names of nodes that answered and are not fit."""
    return [row.host for row in rows if row.problems and row.details]


def unfit(rows: Sequence[Row]) -> dict[int, str]:
    """Node -> what is wrong with it."""
    return {row.node: "; ".join(row.problems) for row in rows if row.problems}
