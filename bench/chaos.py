"""`python -m efflaunch.bench.chaos --kills N --faults N --json FILE`: checkpoints under kills and damage, with real processes.

A kill: two gloo ranks change their whole state at every step and save it without waiting; a rank, all ranks, a flusher, the
keeper of a replica, or a process at a named point (faults.py) gets SIGKILL; the next life restores, and must find the newest
step that was reported durable or a newer one, with every number that step's. A fault: a committed checkpoint is damaged on disk
(flipped bit, zeroed page, cut off, file missing, swapped, stale); a restore must name the damage and fall back to the one
before, unchanged.

Headline keys: `lost` (a durable step was not found again), `torn` (restored numbers of another step), `silent` (damaged bytes
that were taken for good), each with the number of trials done in `kills` and `faults`. FILE is written after every trial, and
the same command with --resume continues where it ended.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..checkpoint.faults import COMMIT_POINTS, FLUSHER_POINTS, RANK_0_POINTS
from .record import machine, write_json

PRELOAD = (
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "torch.utils.serialization",
    "numpy.random",
    "efflaunch.checkpoint.engine",
)
"""Imported once, by the process that ranks are forked from."""
RANKS = 2
SEGMENT_BYTES = 16384
_LIFE_S = 600.0
"""Longest time from the start of a life to its first durable save: only whether it ends at all, on a machine as busy as may be."""
KILLS = ("rank 0", "rank 1", "all ranks", "flusher", "point")
REPLICA_LIVES = (20, 10)
"""(period, number): of every `period` lives the last `number` keep replicas."""
DAMAGES = ("flip", "zero", "truncate", "missing", "swap", "stale", "append")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    record = Record(options.json, options.seed, {**machine(), "asked": {"kills": options.kills, "faults": options.faults}})
    if options.resume and options.json.exists():
        record.load()
    logging.disable(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="efflaunch-chaos-", dir=options.folder) as folder:
            kill_trials(Path(folder) / "kills", options.kills, options.seed, record.kills, record.write)
            fault_trials(Path(folder) / "faults", options.faults, options.seed, record.faults, record.write)
    finally:
        logging.disable(logging.NOTSET)
    record.write()
    words = "  ".join(f"{key} {record.result()[key]}" for key in ("kills", "faults", "lost", "torn", "silent", "failed"))
    print(f"{words}  -> {options.json}")
    return 0 if not record.kills.problems + record.faults.problems else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="efflaunch.bench.chaos", description="Checkpoints under kills and damage.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where the checkpoints go; the system's temporary folder if not given")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="count on from what the file says was done, with the same seed")
    return parser


@dataclass(slots=True)
class Tally:
    """Results of a series of trials: how many were done, by kind, and the problems."""

    done: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    problems: list[dict[str, Any]] = field(default_factory=list)
    from_memory: int = 0
    """Number of lives that resumed from a replica."""

    def add(self, kind: str) -> None:
        self.done += 1
        self.by_kind[kind] = self.by_kind.get(kind, 0) + 1


class Record:
    """The file of results, written after every trial."""

    def __init__(self, path: Path, seed: int, facts: dict[str, Any]) -> None:
        self.path, self.seed, self.facts = path, seed, facts
        self.kills, self.faults = Tally(), Tally()
        self._before_s, self._started = 0.0, time.monotonic()

    def load(self) -> None:
        """Continues from the file; ValueError where it is of another seed."""
        saved = json.loads(self.path.read_text())
        if saved["seed"] != self.seed:
            raise ValueError(f"{self.path} is of seed {saved['seed']}, not {self.seed}")
        self._before_s = saved["seconds"]
        self.kills, self.faults = (Tally(**saved["tallies"][kind]) for kind in ("kills", "faults"))

    def result(self) -> dict[str, Any]:
        problems = self.kills.problems + self.faults.problems
        result = {"benchmark": "chaos", **self.facts, "seed": self.seed, "kills": self.kills.done, "faults": self.faults.done}
        result |= {kind: sum(problem["kind"] == kind for problem in problems) for kind in ("lost", "torn", "silent", "failed")}
        result |= {"seconds": self._before_s + time.monotonic() - self._started, "restored_from_memory": self.kills.from_memory}
        return result | {"tallies": {"kills": asdict(self.kills), "faults": asdict(self.faults)}}

    def write(self) -> None:
        write_json(self.path, self.result())


def _nothing() -> None:
    pass


def kill_trials(
    folder: Path,
    number: int,
    seed: int,
    tally: Tally | None = None,
    after: Callable[[], None] = _nothing,
    *,
    points: Sequence[str] = (),
    replica: bool | None = None,
) -> Tally:
    """Run one training of many lives in `folder`, continuing from `tally`; each life ends with a kill, the next one checks.

    `points`: kill at these, in order. `replica`: whether lives keep replicas; None: some of them.
    """
    tally = Tally() if tally is None else tally
    folder.mkdir(parents=True)
    durable = 0
    for trial in range(tally.done, number + 1):
        every, last = REPLICA_LIVES
        replicas = trial % every >= every - last if replica is None else replica
        life = _Life(folder, trial, random.Random(f"{seed} {trial}"), replicas, points[trial] if trial < len(points) else "")
        outcome = life.run(last=trial == number)
        for text in outcome["problems"]:
            tally.problems.append({"kind": text.partition(":")[0], "trial": trial, "text": text})
        if outcome["restored"] < durable:
            tally.problems.append({"kind": "lost", "trial": trial, "text": f"step {durable} was durable, {outcome['restored']} found"})
        durable = max(outcome["restored"] if outcome["is_durable"] else 0, outcome["durable"], durable)
        tally.from_memory += outcome["from_memory"]
        if trial < number:
            tally.add(f"kill {life.kind}" if life.kind != "point" else f"kill at {life.point}")
        after()
    _stop_keepers(folder)
    return tally


def _stop_keepers(folder: Path) -> None:
    """Nobody comes back to them; they would wait for the end of this process."""
    from ..checkpoint.replica.keeper_process import meeting_path, send

    for path in meeting_path(folder, socket.gethostname()).glob("keeper-*"):
        send(path, {"do": "stop"})


class _Life:
    """Ranks from their start to their death."""

    def __init__(self, folder: Path, number: int, chance: random.Random, replica: bool, point: str = "") -> None:
        self.folder, self.replica = folder, replica
        self.kind = "point" if point else chance.choice((*KILLS, "keeper") if replica else KILLS)
        self.notes = folder.parent / f"{folder.name}-notes-{number}"
        self.notes.mkdir()
        self.point = point or chance.choice((*FLUSHER_POINTS, *COMMIT_POINTS))
        self.victim = 0 if self.point in RANK_0_POINTS else chance.randrange(RANKS)
        self.fault = f"{self.point}=kill@{chance.randint(2, 6)}" if self.kind == "point" else ""
        self.flusher = 0
        """The victim's first."""
        self.saves = chance.randint(1, 4)
        self.delay_s = chance.uniform(0, 0.15)

    def run(self, *, last: bool) -> dict[str, Any]:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOAD))
        faults = [self.fault if rank == self.victim else "" for rank in range(RANKS)]
        ranks = [
            context.Process(target=live, args=(rank, self.folder, self.notes, faults[rank], last, self.replica), daemon=True)
            for rank in range(RANKS)
        ]
        for rank in ranks:
            rank.start()
        try:
            self._end(ranks, last)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        facts = self._read()
        shutil.rmtree(self.notes)
        return facts

    def _end(self, ranks: list[Any], last: bool) -> None:
        deadline = time.monotonic() + _LIFE_S
        while all(rank.is_alive() for rank in ranks):
            steps = self._read()["steps"]
            if not last and self.kind != "point" and len(steps) >= self.saves:
                time.sleep(self.delay_s)
                self._kill(ranks)
                if self.kind in ("flusher", "keeper"):
                    # Both are survived: the same ranks continue and save again.
                    self._wait_for_more(ranks, len(steps), deadline)
                return
            if self.kind == "point" and self._flusher_died():
                self._wait_for_more(ranks, len(steps), deadline)
                return
            if time.monotonic() > deadline:
                _note(self.notes / "problem-end", f"failed: {self.kind} {self.fault}: nothing happened in {_LIFE_S:.0f} s")
                return
            time.sleep(0.005)

    def _flusher_died(self) -> bool:
        """Return whether the victim's flusher died of the fault that it was given."""
        path = self.notes / f"flusher-{self.victim}"
        if path.exists():
            pid = int(path.read_text())
            self.flusher = self.flusher or pid
            return pid != self.flusher or not Path(f"/proc/{pid}").exists()
        return False

    def _kill(self, ranks: list[Any]) -> None:
        if self.kind in ("flusher", "keeper"):
            pids = [int(path.read_text()) for path in sorted(self.notes.glob(f"{self.kind}-*"))]
            os.kill(pids[self.victim % len(pids)], signal.SIGKILL)
            return
        chosen = ranks if self.kind == "all ranks" else [ranks[int(self.kind.removeprefix("rank "))]]
        for rank in chosen:
            rank.kill()

    def _wait_for_more(self, ranks: list[Any], number: int, deadline: float) -> None:
        while len(self._read()["steps"]) < number + 2 and all(rank.is_alive() for rank in ranks):
            if time.monotonic() > deadline:
                _note(self.notes / "problem-end", f"failed: no save after the death of a {self.kind}")
                return
            time.sleep(0.005)

    def _read(self) -> dict[str, Any]:
        """Return what the ranks wrote down in this life."""
        restored = self.notes / "restored"
        log = self.notes / "durable"
        steps = [int(line) for line in log.read_text().split()] if log.exists() else []
        restored_step, is_durable, origin = json.loads(restored.read_text()) if restored.exists() else (-1, True, "")
        problems = [path.read_text() for path in self.notes.glob("problem-*")]
        if restored_step < 0:
            problems.append("failed: no restore")
        what = {"restored": restored_step, "is_durable": is_durable, "from_memory": int("memory" in origin)}
        return what | {"durable": max(steps, default=0), "steps": steps, "problems": problems}


def live(rank: int, folder: Path, notes: Path, fault: str, last: bool, replica: bool) -> None:
    """A rank's life: restore, check, then change and save the state until killed (`last`: only check)."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{notes}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=_LIFE_S))
    try:
        _live(rank, folder, notes, fault, last, replica)
    except Exception as error:  # written down for the trial
        if not _peer_died(error):
            _note(notes / f"problem-{rank}", f"failed: {type(error).__name__}: {error}")
    os._exit(0)


def _note(path: Path, text: str) -> None:
    """Write a note that a reader in another process sees whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.rename(path)


def _peer_died(error: Exception) -> bool:
    return any(word in str(error) for word in ("Connection closed by peer", "Connection reset", "Broken pipe", "gloo"))


def _live(rank: int, folder: Path, notes: Path, fault: str, last: bool, replica: bool) -> None:
    from ..checkpoint.config import Replica

    state = State()
    engine = state.engine(folder, notes, fault, replica=Replica.PEER if replica else Replica.NONE)
    if engine.keeper_pid is not None:
        _note(notes / f"keeper-{rank}", str(engine.keeper_pid))
    restored = engine.restore()
    step = restored.step if restored is not None else 0
    if restored is not None and (wrong := state.wrong(step)):
        _note(notes / f"problem-{rank}", f"torn: {wrong}")
    if rank == 0:
        _note(notes / "restored", json.dumps([step, *((restored.is_durable, restored.origin) if restored else (True, ""))]))
    chance = random.Random(step)
    while not last:
        step += 1
        engine.wait_for_snapshot()
        state.set(step)
        engine.save(step, {"step": step})
        if engine.flusher_pid is not None:
            _note(notes / f"flusher-{rank}", str(engine.flusher_pid))
        time.sleep(chance.uniform(0, 0.02))


class State:
    """A model and an optimizer whose every number follows from the step. Sharded where there is a process group."""

    SHAPES = ((257, 33), (64, 3, 5), (7,), (1,), (3, 2))

    def __init__(self) -> None:
        import torch
        import torch.distributed as dist
        from torch import nn
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        self.reports: list[Any] = []
        mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if dist.is_initialized() else None
        self.model = nn.Module()
        for number, shape in enumerate(self.SHAPES):
            value = torch.zeros(shape)
            self.model.register_parameter(f"w{number}", nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]) if mesh else value))
        self.model.register_buffer("count", torch.zeros(2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        for parameter in self.model.parameters():
            self.optimizer.state[parameter] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter).detach()}

    def tensors(self) -> list[Any]:
        states = [self.optimizer.state[parameter][key] for parameter in self.model.parameters() for key in ("step", "exp_avg")]
        return [*self.model.parameters(), *self.model.buffers(), *states]

    def set(self, step: int) -> None:
        import torch

        with torch.no_grad():
            for number, tensor in enumerate(self.tensors()):
                part, expected = _numbers(tensor, number, step)
                part.copy_(expected)

    def wrong(self, step: int) -> str:
        """The first tensor whose numbers are not those of `step`; empty: none."""
        import torch

        for number, tensor in enumerate(self.tensors()):
            part, expected = _numbers(tensor, number, step)
            if not torch.equal(part, expected):
                return f"tensor {number} of step {step} has {part.flatten()[:2].tolist()} instead of {expected.flatten()[:2].tolist()}"
        return ""

    def engine(
        self,
        folder: Path,
        notes: Path | None = None,
        fault: str = "",
        node: str = "",
        clock: Callable[[], float] = time.monotonic,
        **changes: Any,
    ) -> Any:
        from ..checkpoint.config import CheckpointConfig
        from ..checkpoint.engine import CheckpointEngine, SaveReport
        from ..parallel.sharding.fsdp2 import Fsdp2State

        def saved(report: SaveReport) -> None:
            self.reports.append(report)
            if notes is not None and report.error is None:
                with (notes / "durable").open("a") as file:
                    file.write(f"{report.step}\n")

        config = CheckpointConfig(**{"name": "chaos", **changes})
        return CheckpointEngine(
            config,
            folder,
            state=Fsdp2State(self.model, self.optimizer),
            metadata={},
            on_save=saved,
            segment_bytes=SEGMENT_BYTES,
            fault=fault,
            node=node,
            clock=clock,
        )


def _numbers(tensor: Any, number: int, step: int) -> tuple[Any, Any]:
    """Return this rank's part of a tensor and what it holds after `step`: other numbers at every place, tensor and step."""
    import torch

    from ..parallel.sharding.parts import pieces

    ((part, offsets),) = pieces(tensor)
    whole = (torch.arange(tensor.numel(), dtype=torch.float32) % 997 + 1000 * (step % 4096) + number / 8).reshape(tensor.shape)
    slices = tuple(slice(start, start + size) for start, size in zip(offsets, part.shape, strict=True))
    return part, whole[slices]


def fault_trials(folder: Path, number: int, seed: int, tally: Tally | None = None, after: Callable[[], None] = _nothing) -> Tally:
    """Each trial damages the newest of two checkpoints and restores. Continues from `tally`."""
    tally = Tally() if tally is None else tally
    whole = folder / "whole"
    state = State()
    engine = state.engine(whole)
    for step in (1, 2):
        state.set(step)
        engine.save(step, {})
        engine.wait()
    engine.close()
    for trial in range(tally.done, number):
        chance = random.Random(f"{seed} {trial}")
        kind = chance.choice(DAMAGES)
        place = folder / "trial"
        shutil.copytree(whole, place)
        name = damage(place / "step-00000002", kind, chance)
        text = _judge(state, place, name)
        if text is not None:
            tally.problems.append({"kind": text.partition(":")[0], "trial": trial, "text": f"{kind} {name}: {text}"})
        tally.add(f"fault {kind}")
        shutil.rmtree(place)
        after()
    return tally


def _judge(state: State, place: Path, name: str) -> str | None:
    """Restore from the damaged checkpoint and return what is wrong with the result; None: nothing."""
    state.set(9)
    restored = state.engine(place).restore()
    if restored is None or (wrong := state.wrong(restored.step)):
        return f"torn: {wrong}" if restored is not None else "lost: nothing was restored"
    if restored.step == 2:
        return "silent: the damaged checkpoint was restored"
    if not restored.skipped or "step-00000002" not in restored.skipped[0]:
        return "silent: nothing names the damage"
    return None if name in restored.skipped[0] or "COMMIT" in restored.skipped[0] else f"silent: {name} is not named"


def damage(path: Path, kind: str, chance: random.Random) -> str:
    """Damages one file of a checkpoint; its name."""
    victims = sorted(file for file in path.iterdir() if file.stat().st_size)
    victim = chance.choice(victims)
    data = bytearray(victim.read_bytes())
    if kind == "flip":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "zero":
        start = chance.randrange(len(data)) // 512 * 512
        before = bytes(data)
        data[start : start + 4096] = bytes(len(data[start : start + 4096]))
        if bytes(data) == before:
            data[start] ^= 1
    elif kind == "truncate":
        del data[chance.randrange(len(data)) :]
    elif kind == "append":
        data += b"\0"
    elif kind == "missing":
        victim.unlink()
        return victim.name
    else:
        return _exchange(path, victim, kind, chance)
    victim.write_bytes(data)
    return victim.name


def _exchange(path: Path, victim: Path, kind: str, chance: random.Random) -> str:
    """Another file's content (`swap`), or that of the step before (`stale`)."""
    source = path.parent / "step-00000001" / victim.name
    if kind == "swap":
        source = chance.choice([file for file in sorted(path.iterdir()) if file != victim and file.stat().st_size])
    data = source.read_bytes()
    if data == victim.read_bytes():
        # .metadata and index.json are the same at every step: nothing to find.
        data += b"\0"
    victim.write_bytes(data)
    return victim.name


if __name__ == "__main__":
    raise SystemExit(main())
