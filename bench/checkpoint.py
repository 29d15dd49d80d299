"""`python -m efflaunch.bench.checkpoint --json FILE`: our checkpoints against torch.save, dcp.save, dcp.async_save and raw writes.

One process, the same tensors for all, files in one folder. Rounds are interleaved: each runs every contestant once, in another
order, so a slow moment of the machine hits all; files are removed and the disk is synced in between. A contestant's turn is a
training step with a save at its start: save, a window (a sleep, standing for a GPU's forward and backward; matrix products on
CUDA), whatever must be waited for before the update, the update (every number changes), and then until durable.
Figures are medians over rounds, minima beside them. Every save of ours is read back once and compared, number by number.

Headline keys: `stall_vs_sync` and `stall_vs_async` (what training waits for ours over dcp.save's and over dcp.async_save's with
threads; aims 0.005 and 0.05), `durable_vs_raw` (our rate until durable over that of raw direct writes; aim 0.7),
`step_inflation` (a step with ours behind it against one without, minus 1; aim 0.02; `step_inflation_training`: the same inside
real training on the CPU), `restore_vs_dcp` (our verified restore's speed over dcp.load's, caches dropped; aim 1 or more),
`hash_cost` (how much later a save is durable than one whose chunks are not hashed; aim 0.05), `hash_share` (processor time of
hashing over the time until durable).
"""

from __future__ import annotations

import argparse
import logging
import mmap
import os
import random
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .record import machine, write_json

PIECE_BYTES = 16 << 20
CONTESTANTS = (
    "ours",
    "ours_unhashed",
    "ours_replicated",
    "torch_save",
    "dcp",
    "async_thread",
    "async_process",
    "async_staged",
    "raw",
    "nothing",
)


def main(arguments: list[str] | None = None) -> int:
    options, origin = _parser().parse_args(arguments), machine()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="efflaunch-bench-", dir=options.folder) as folder:
            warnings.simplefilter("ignore")
            state, rows, restores, training = _measure_all(options, Path(folder))
    finally:
        logging.disable(logging.NOTSET)
    result = {"benchmark": "checkpoint", **origin, "num_bytes": state.num_bytes, "device": options.device, "rounds": options.rounds}
    result |= {"window_s": options.window, **summary(rows, restores, training, state.num_bytes)}
    result |= {"contestants": rows, "restore": restores, "training": training}
    write_json(options.json, result)
    keys = ("stall_vs_sync", "stall_vs_async", "durable_vs_raw", "step_inflation", "restore_vs_dcp", "hash_cost")
    print("  ".join(f"{key} {result[key]:.4f}" for key in keys if result[key] is not None), f" -> {options.json}")
    return 0


def _measure_all(options: argparse.Namespace, folder: Path) -> tuple[_State, dict[str, Any], dict[str, Any], dict[str, Any]]:
    import torch

    torch.set_num_threads(1)
    state = _State(options.gigabytes, options.device)
    rows = measure(state, folder, options)
    restores = restore_times(state, folder / "restore", options.rounds)
    return state, rows, restores, training_steps(folder / "training", options.training_steps) if options.training_steps else {}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="efflaunch.bench.checkpoint", description="Checkpoints against torch's own.")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of state; 1")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--window", type=float, default=1.0, metavar="S", help="forward and backward of a step; 1")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--training-steps", type=int, default=24, help="steps of the part inside real training; 0: none")
    parser.add_argument("--contestants", default=",".join(CONTESTANTS), help="comma separated; ours and nothing are always there")
    parser.add_argument("--folder", help="on the disk to measure; the system's temporary folder if not given")
    parser.add_argument("--json", type=Path, required=True)
    return parser


class _State:
    """A module of `gigabytes` of parameters that change at every update, and a few scalars."""

    def __init__(self, gigabytes: float, device: str) -> None:
        import torch
        from torch import nn

        self.device = torch.device(device)
        number = max(1, round(gigabytes * 1e9 / PIECE_BYTES))
        self.model = nn.Module()
        for index in range(number):
            value = torch.full((PIECE_BYTES // 4 // 1024, 1024), float(index), device=self.device)
            self.model.register_parameter(f"w{index}", nn.Parameter(value))
            self.model.register_parameter(f"s{index}", nn.Parameter(torch.tensor(float(index), device=self.device)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.num_bytes = sum(value.numel() * value.element_size() for value in self.model.parameters())
        self.updates = 0

    def tensors(self) -> dict[str, Any]:
        return {f"model.{name}": value.detach() for name, value in self.model.named_parameters()}

    def update(self) -> None:
        import torch

        with torch.no_grad():
            for value in self.model.parameters():
                value.add_(1)
        self.updates += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def window(self, seconds: float) -> None:
        """Forward and backward: a GPU computes, the host waits."""
        if self.device.type == "cpu":
            time.sleep(seconds)
            return
        import torch

        product = torch.randn(4096, 4096, device=self.device, dtype=torch.bfloat16)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for _ in range(20):
                product = product @ product * 1e-3
            torch.cuda.synchronize()


Waits = tuple[Callable[[], Any], Callable[[], float | None]]
"""Two functions of a save: one waits until the update may run; one waits until durable and returns when (None: before the update)."""
Turn = Callable[[], Waits]
"""Starts a save."""


def measure(state: _State, folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds of every contestant and round: `stall_s`, `durable_s`, `step_s`."""
    names = [name for name in CONTESTANTS if name in (*options.contestants.split(","), "ours", "nothing")]
    rows: dict[str, dict[str, list[float]]] = {name: {"stall_s": [], "durable_s": [], "step_s": []} for name in names}
    contestants = _Contestants(state, folder)
    try:
        for number in range(-1, options.rounds):
            for name in random.Random(number).sample(names, len(names)):
                contestants.clean()
                times = _turn(state, contestants.start(name), options.window)
                if name == "ours":
                    contestants.check()
                if number >= 0:
                    # The first round warms up: plans, pools and processes are made.
                    for key, value in times.items():
                        rows[name][key].append(value)
    finally:
        contestants.close()
    return {name: {key: _shown(values) for key, values in row.items()} for name, row in rows.items()}


def _shown(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}


def _turn(state: _State, save: Turn, window_s: float) -> dict[str, float]:
    begun = time.monotonic()
    before_update, until_durable = save()
    saved = time.monotonic()
    stall = saved - begun
    state.window(window_s)
    waited = time.monotonic()
    before_update()
    stall += time.monotonic() - waited
    state.update()
    step = time.monotonic() - begun
    durable = until_durable() or saved
    return {"stall_s": stall, "durable_s": durable - begun, "step_s": step}


class _Contestants:
    """Everybody's way to save the same tensors; `check` compares our newest checkpoint with what was to be saved."""

    def __init__(self, state: _State, folder: Path) -> None:
        from ..checkpoint.config import CheckpointConfig, Replica
        from ..checkpoint.engine import CheckpointEngine
        from ..parallel.sharding.fsdp2 import Fsdp2State

        self.state, self.folder, self.scratch = state, folder, folder / "theirs"
        self.step = 0
        self.reports: list[Any] = []
        kinds = {"ours": ("", Replica.NONE), "ours_unhashed": ("chunk=unhashed", Replica.NONE), "ours_replicated": ("", Replica.PEER)}
        self.engines = {
            name: CheckpointEngine(
                CheckpointConfig(name="bench", keep_last=1, replica=replica),
                folder / name,
                state=Fsdp2State(state.model, state.optimizer),
                metadata={},
                on_save=self.reports.append,
                fault=fault,
            )
            for name, (fault, replica) in kinds.items()
        }
        self.buffer: mmap.mmap | None = None

    def start(self, name: str) -> Turn:
        return {
            "ours": lambda: self._ours("ours"),
            "ours_unhashed": lambda: self._ours("ours_unhashed"),
            "ours_replicated": lambda: self._ours("ours_replicated"),
            "torch_save": self._torch_save,
            "dcp": self._dcp,
            "async_thread": lambda: self._async("thread"),
            "async_process": lambda: self._async("process"),
            "async_staged": lambda: self._async("staged"),
            "raw": self._raw,
            "nothing": lambda: (_nothing, _nothing),
        }[name]

    def clean(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        os.sync()
        time.sleep(0.2)

    def check(self) -> None:
        """Our files hold the numbers from before the update, read by plain torch."""
        import torch
        import torch.distributed.checkpoint as dcp

        loaded = {key: torch.empty_like(value, device="cpu") for key, value in self.state.tensors().items()}
        dcp.load(loaded, checkpoint_id=str(self.folder / "ours" / f"step-{self.step:08d}"), no_dist=True)
        for key, value in self.state.tensors().items():
            assert torch.equal(loaded[key] + 1, value.cpu()), f"{key} is torn"

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()

    def _ours(self, name: str) -> Waits:
        self.step += 1
        begun, engine = time.monotonic(), self.engines[name]
        engine.save(self.step, {})

        def until_durable() -> float:
            engine.wait(replicated=True)
            report = self.reports[-1]
            assert report.error is None, report.error
            return begun + float(report.save_s)

        return engine.wait_for_snapshot, until_durable

    def _torch_save(self) -> Waits:
        import torch

        path = self.scratch / "state.pt"
        with path.open("wb") as file:
            torch.save(self.state.tensors(), file)
            file.flush()
            os.fsync(file.fileno())
        return _nothing, _nothing

    def _dcp(self) -> Waits:
        import torch.distributed.checkpoint as dcp

        dcp.save(self.state.tensors(), checkpoint_id=str(self.scratch / "dcp"), no_dist=True)
        return _nothing, _nothing

    def _async(self, kind: str) -> Waits:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        path = str(self.scratch / "dcp")
        if kind == "staged":
            stager = DefaultStager(StagingOptions(False, False, True, False))
            answer: Any = dcp.async_save(self.state.tensors(), checkpoint_id=path, no_dist=True, async_stager=stager)
            return answer.staging_completion.result, _stamp(answer.upload_completion, stager.close)
        if kind == "process":
            _alone_in_a_group()
            future: Any = dcp.async_save(self.state.tensors(), checkpoint_id=path, async_checkpointer_type=AsyncCheckpointerType.PROCESS)
        else:
            future = dcp.async_save(self.state.tensors(), checkpoint_id=path, no_dist=True)
        return _nothing, _stamp(future)

    def _raw(self) -> Waits:
        """Write the same bytes from memory, direct, in 16 MiB writes: the disk's own speed."""
        if self.buffer is None:
            self.buffer = mmap.mmap(-1, PIECE_BYTES)
            self.buffer.write(os.urandom(PIECE_BYTES))
        descriptor = os.open(self.scratch / "raw", os.O_CREAT | os.O_WRONLY | getattr(os, "O_DIRECT", 0), 0o644)
        try:
            size = -(-self.state.num_bytes // PIECE_BYTES) * PIECE_BYTES
            os.posix_fallocate(descriptor, 0, size)
            for offset in range(0, size, PIECE_BYTES):
                done = 0
                while done < PIECE_BYTES:
                    done += os.pwrite(descriptor, memoryview(self.buffer)[done:], offset + done)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return _nothing, _nothing


def _nothing() -> None:
    pass


def _stamp(future: Any, after: Callable[[], None] = _nothing) -> Callable[[], float]:
    """Waits for a future; the time when it was done."""
    times: list[float] = []
    future.add_done_callback(lambda _: times.append(time.monotonic()))

    def wait() -> float:
        future.result()
        after()
        while not times:
            time.sleep(0.001)
        return times[0]

    return wait


def _alone_in_a_group() -> None:
    """The process kind of async_save needs a process group."""
    import torch.distributed as dist

    if not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)


def restore_times(state: _State, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds to load everything: ours with every hash checked, and dcp.load, each from its own files, caches dropped."""
    import torch.distributed.checkpoint as dcp

    from ..checkpoint.config import CheckpointConfig
    from ..checkpoint.engine import CheckpointEngine
    from ..parallel.sharding.fsdp2 import Fsdp2State

    config = CheckpointConfig(name="bench", keep_last=1)
    engine = CheckpointEngine(config, folder / "ours", state=Fsdp2State(state.model, state.optimizer), metadata={})
    engine.save(1, {})
    engine.wait()
    dcp.save(state.tensors(), checkpoint_id=str(folder / "dcp"), no_dist=True)
    times: dict[str, list[float]] = {"ours": [], "dcp": []}
    for number in range(rounds):
        for name in random.Random(number).sample(["ours", "dcp"], 2):
            _drop_caches(folder)
            begun = time.monotonic()
            if name == "ours":
                engine.restore()
            else:
                dcp.load(state.tensors(), checkpoint_id=str(folder / "dcp"), no_dist=True)
            times[name].append(time.monotonic() - begun)
    engine.close()
    return {name: _shown(values) for name, values in times.items()}


def _drop_caches(folder: Path) -> None:
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def training_steps(folder: Path, steps: int) -> dict[str, Any]:
    """Real training of a small model on this processor: steps with a save behind them and steps without, in turn."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..checkpoint.config import CheckpointConfig
    from ..checkpoint.engine import CheckpointEngine
    from ..parallel.sharding.fsdp2 import Fsdp2State

    config = LlamaConfig(hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8, vocab_size=8192)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine = CheckpointEngine(CheckpointConfig(name="bench", keep_last=1), folder, state=Fsdp2State(model, optimizer), metadata={})
    ids = torch.randint(0, 8192, (1, 256))
    times: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(-4, 2 * steps):
        saves = number % 2 == 0 and number >= 0
        begun = time.monotonic()
        if saves:
            engine.save(number, {})
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        engine.wait_for_snapshot()
        optimizer.step()
        optimizer.zero_grad()
        if number >= 0:
            times["with" if saves else "without"].append(time.monotonic() - begun)
        engine.wait()
    engine.close()
    return {name: _shown(values) for name, values in times.items()}


def summary(rows: dict[str, Any], restores: dict[str, Any], training: dict[str, Any], num_bytes: int) -> dict[str, Any]:
    """The headline keys; None where a contestant was left out. Ratios of medians."""

    def ratio(name: str, other: str, key: str) -> float | None:
        return rows[name][key]["median"] / rows[other][key]["median"] if name in rows and other in rows else None

    hashed = ratio("ours", "ours_unhashed", "durable_s")
    figures = {
        "hash_cost": None if hashed is None else hashed - 1,
        "stall_vs_sync": ratio("ours", "dcp", "stall_s"),
        "stall_vs_async": ratio("ours", "async_thread", "stall_s"),
        "durable_vs_raw": ratio("raw", "ours", "durable_s"),
        "step_inflation": (ratio("ours", "nothing", "step_s") or 0.0) - 1,
        "restore_vs_dcp": restores["dcp"]["median"] / restores["ours"]["median"],
        "hash_share": _hash_s(num_bytes) / rows["ours"]["durable_s"]["median"],
    }
    if training:
        figures["step_inflation_training"] = training["with"]["median"] / training["without"]["median"] - 1
    return figures


def _hash_s(num_bytes: int) -> float:
    """Processor seconds of hashing so many bytes."""
    from ..checkpoint.manifest import digest

    data = os.urandom(PIECE_BYTES)
    times = []
    for _ in range(8):
        begun = time.process_time()
        digest(data)
        times.append(time.process_time() - begun)
    return min(times) * num_bytes / PIECE_BYTES


if __name__ == "__main__":
    raise SystemExit(main())
