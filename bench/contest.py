"""Defines who is measured in bench/memory.py, and measures: peak device and host bytes of one step, gradients against plain, step times."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..memory.arena.tracer import StorageTracer
from ..memory.policy import MemoryPolicy
from .peers.alst import Alst
from .peers.ours import Ours, preset, with_chunks
from .peers.shape import Chunks, Shape, Task
from .peers.stock import Contestant, Stock
from .peers.streambp import ReleasedStreamBP

Build = Callable[[Task], Contestant]
BASE = "hf_checkpointing"
COMPILED = "+compile"
PRESETS = ("keep", "recompute", "alst", "streambp", "memo", "upipe")
PEERS: dict[str, Build] = {
    "plain": Stock,
    BASE: lambda task: Stock(task, checkpointing=True),
    "deepspeed_alst": Alst,
    "streambp_released": ReleasedStreamBP,
}
EXTRA_PEERS: dict[str, Build] = {
    "hf_checkpointing_offload": lambda task: Stock(task, checkpointing=True, offload=True),
    "deepspeed_alst_as_shipped": lambda task: Alst(task, as_shipped=True),
}
GRADIENT_TOLERANCE = 1e-4
"""Largest relative distance of a parameter's gradient from plain Hugging Face's, in float32."""
CHECK = Task(Shape(4, 16), 3, 130, Chunks(layer=32, loss=20, streambp_layer=40, streambp_loss=30), dtype="float32")
"""Chunks that do not divide the length."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A contestant. Layer counts it is measured with are multiples of `segment_layers`."""

    build: Build
    policy: MemoryPolicy | None = None
    """Memory policy of the entry; None for peers."""

    @property
    def segment_layers(self) -> int:
        return 1 if self.policy is None else self.policy.segment_layers


def contestants(chunk_tokens: int, auto: Mapping[str, MemoryPolicy], *, compiled: bool = False) -> dict[str, Entry]:
    """Return all entries by name. `auto`: more of our policies, as of `auto_policies`; `compiled`: adds ours with compiled steps."""
    solved = {name: preset(name) for name in PRESETS} | dict(auto)
    if compiled:
        solved |= {f"{name}{COMPILED}": replace(policy, compile="inductor") for name, policy in solved.items()}
    ours = {name: with_chunks(policy, chunk_tokens) for name, policy in solved.items()}
    entered = {name: Entry(build) for name, build in PEERS.items()}
    entered |= {name: Entry(partial(Ours, policy=policy), policy) for name, policy in ours.items()}
    return entered | {name: Entry(build) for name, build in EXTRA_PEERS.items()}


def gradient_error(build: Build, task: Task = CHECK) -> float:
    """The worst relative distance of a parameter's gradient from plain Hugging Face's."""
    plain, mine = Stock(task), build(task)
    losses = plain.step(), mine.step()
    expected, computed = plain.gradients(), mine.gradients()
    if set(expected) != set(computed):
        raise RuntimeError(f"gradients of other parameters than plain Hugging Face's: {sorted(set(expected) ^ set(computed))}")
    errors = [float((computed[name] - gradient).norm() / gradient.norm()) for name, gradient in expected.items()]
    return max(*errors, abs(losses[1] - losses[0]) / losses[0])


@dataclass(frozen=True, slots=True)
class Peak:
    device_bytes: int
    host_bytes: int
    at_peak: list[tuple[str, int, int]]
    """(what made it, how many, bytes) of the largest on the device."""


def peak(contestant: Contestant) -> Peak:
    """Measure the peak of a second step. Gradients go into buffers that are there already; embedding and head are frozen.

    So lengths differ in activations alone: the gradients of embedding and head, which do not depend on the length, would be the
    peak of models as small as these, and hide the slope that decides at real lengths.
    """
    for ends in (contestant.model.get_input_embeddings(), contestant.model.get_output_embeddings()):
        ends.requires_grad_(False)
    contestant.step()
    for gradient in contestant.gradients().values():
        gradient.zero_()
    with _no_collector(), StorageTracer(contestant.tensors(), host=contestant.is_host) as tracer:
        contestant.step()
    return Peak(tracer.peak_bytes, contestant.host_peak_bytes(), tracer.peak_by_maker()[:6])


@contextmanager
def _no_collector() -> Iterator[None]:
    """Storages in reference cycles would otherwise go at moments that depend on what ran before."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def timed_rounds(entered: Mapping[str, Contestant], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Wall and processor seconds of one step, every contestant once a round after one round that only warms up; the order turns."""
    wall: dict[str, list[float]] = {name: [] for name in entered}
    processor: dict[str, list[float]] = {name: [] for name in entered}
    names = list(entered)
    for index in range(-1, rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            entered[name].model.zero_grad(set_to_none=True)
            started, used = time.perf_counter(), time.process_time()
            entered[name].step()
            if index >= 0:
                processor[name].append(time.process_time() - used)
                wall[name].append(time.perf_counter() - started)
    return {"seconds": wall, "processor_s": processor}


def ratios(seconds: Mapping[str, Iterable[float]], base: str = BASE) -> dict[str, float]:
    """Each contestant's time over the base's: the median of the ratios within a round."""
    return {name: statistics.median(a / b for a, b in zip(times, seconds[base], strict=True)) for name, times in seconds.items()}


def describe(policy: MemoryPolicy) -> dict[str, Any]:
    """A policy as plain data: shares kept and moved per class."""
    shares = {name: [split.keep, split.host] for name, split in policy.splits.items()}
    rest = {key: getattr(policy, key) for key in ("graph", "segment_layers", "chunk_tokens", "head_groups")}
    return {**shares, **rest, "attention": policy.attention.value}
