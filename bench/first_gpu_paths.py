"""Sections of bench/first_gpu.py about the device and the ways to it: capacity, hidden waits, pinned memory, copies beside compute."""

from __future__ import annotations

import importlib.util
import mmap
import os
import resource
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from ..memory.offload.cuda import CudaPinner
from ..memory.offload.device import Mark
from ..memory.offload.host_pool import HostArena
from ..memory.offload.measure_bandwidth import measure_host_link
from ..memory.offload.open import device_for
from ..model.build import install
from .gpu_jobs import opened_store, policies, random_model
from .gpu_section import Row, Scale
from .peers.document import alone, mean_loss

PACKAGES = ("flash_attn", "flash_attn_interface", "hydra", "pynvml")
GIB = 1 << 30


def device(scale: Scale) -> Row:
    """What the device has and what a context takes of it; limits, packages and versions that decide the rest."""
    facts: Row = {
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "packages": {name: importlib.util.find_spec(name) is not None for name in PACKAGES},
    }
    if scale.device == "cuda":
        torch.zeros(1, device="cuda")
        free, total = torch.cuda.mem_get_info()
        properties = torch.cuda.get_device_properties(0)
        facts |= {"name": properties.name, "capability": torch.cuda.get_device_capability(), "total_gib": total / GIB}
        facts |= {"context_gib": (total - free - torch.cuda.memory_reserved()) / GIB}
    return facts


def syncs(scale: Scale) -> Row:
    """Times that forward and backward made the host wait for the device, by policy, with where; the loss has one of its own."""
    place, tokens, chunk = torch.device(scale.device), scale.pick(8192, 64), scale.pick(2048, 16)
    job = {"shape": (scale.pick(8, 4), scale.pick(128, 8)), "layers": 2, "device": scale.device}
    found: Row = {}
    for name, policy in policies(chunk).items():
        model = random_model(job, torch.float32 if scale.device == "cpu" else torch.bfloat16)
        with opened_store(policy, model, tokens, place) as store:
            install(model, policy, loss_chunk_tokens=chunk, store=store)
            ids = torch.randint(0, model.config.vocab_size, (tokens,), device=place)
            mean_loss(model, ids, alone(tokens, place)).backward()
            with _sync_places(place) as places:
                mean_loss(model, ids, alone(tokens, place)).backward()
            found[name] = {"syncs": len(places), "places": places[:6]}
    return {"policies": found, "can_see": scale.device == "cuda"}


@contextmanager
def _sync_places(place: torch.device) -> Iterator[list[list[str]]]:
    """Collect our frames at each wait that CUDA's debug mode warns of; a CPU has none to warn of."""
    places: list[list[str]] = []

    def noted(message: Any, *_: object, **__: object) -> None:
        if "synchroniz" in str(message):
            frames = [frame for frame in traceback.extract_stack() if "efflaunch" in frame.filename or "/memory/" in frame.filename]
            places.append([f"{frame.filename.rsplit('/', 2)[-1]}:{frame.lineno}" for frame in frames[:-1]][-3:])

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = noted
        if place.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if place.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def pinning(scale: Scale) -> Row:
    """Seconds for each GiB to be touched, and then pinned, in plain pages and in huge ones."""
    size, found = scale.pick(4 * GIB, 8 << 20), {}
    for name in ("plain", "huge"):
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if name == "huge" and hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        view = torch.frombuffer(memory, dtype=torch.uint8)
        touched_s = _timed(view.zero_)
        found[name] = {"touch_s_per_gib": touched_s * GIB / size}
        if scale.device == "cuda":
            pinner = CudaPinner(torch.device("cuda", 0))
            found[name]["pin_s_per_gib"] = _timed(lambda: pinner.register(view.data_ptr(), size)) * GIB / size  # noqa: B023
            pinner.unregister(view.data_ptr())
    return {"pages": found}


def _timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def offload(scale: Scale) -> Row:
    """The link's bandwidth, and seconds of matrix products and of copies to the host, each alone and both at once."""
    place = torch.device(scale.device, 0) if scale.device == "cuda" else torch.device("cpu")
    link = measure_host_link(place, 4.0 if not scale.tiny else 0.05, copy_bytes=scale.pick(256 << 20, 1 << 16))
    num_bytes, width, times = scale.pick(GIB, 1 << 16), scale.pick(8192, 32), scale.pick(60, 2)
    arena = HostArena(num_bytes, pinner=CudaPinner(place) if place.type == "cuda" else None)
    try:
        taken = _overlap(place, arena, num_bytes, width, times)
    finally:
        arena.close()
    hidden = taken["copies_s"] + taken["products_s"] - taken["both_s"]
    return {"link": asdict(link), **taken, "hidden_share": hidden / min(taken["copies_s"], taken["products_s"])}


def _overlap(place: torch.device, arena: HostArena, num_bytes: int, width: int, times: int) -> dict[str, float]:
    """Seconds of four copies, of `times` products and of both."""
    streams, host = device_for(place), arena.views(arena.take(num_bytes), num_bytes)[0]
    source = torch.ones(num_bytes, dtype=torch.uint8, device=place)
    factor = torch.ones(width, width, device=place, dtype=torch.float32 if place.type == "cpu" else torch.bfloat16)

    def copies() -> Mark:
        return [streams.to_host([(source, host)], []) for _ in range(4)][-1]

    def products() -> Mark:
        for _ in range(times):
            factor @ factor
        return streams.mark()

    def seconds(*works: Callable[[], Mark]) -> float:
        begun = time.perf_counter()
        for mark in [work() for work in works]:
            mark.synchronize()
        return time.perf_counter() - begun

    seconds(copies, products)
    return {"copies_s": seconds(copies), "products_s": seconds(products), "both_s": seconds(copies, products)}
