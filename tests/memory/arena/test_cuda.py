"""cuda.cpp against a stand-in for the CUDA runtime: its logic, not a GPU's."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import pytest

from efflaunch.errors import ConfigError
from efflaunch.memory.arena.build import build, cuda_recipe
from efflaunch.memory.arena.cuda import ALIGNMENT, CudaArena, _roots, find_runtime
from efflaunch.memory.arena.plan import plan_arena, spread
from efflaunch.utils.compilers import compiler_path

STUB = Path(__file__).parent / "stub"
STEP, OTHER = 11, 22
"""Streams."""


class Device:
    """The pluggable allocator's functions as torch calls them."""

    def __init__(self, folder: Path) -> None:
        compiler = compiler_path() or "none was found"
        runtime = folder / "libcudart.so.99"
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-std=c++17", f"-Wl,-soname,{runtime.name}", str(STUB / "cudart.cpp"), "-o", str(runtime)],
            check=True,
        )
        self.runtime = ctypes.CDLL(str(runtime))
        self.runtime.stub_used.restype = ctypes.c_int64
        self.library = ctypes.CDLL(str(build(cuda_recipe(STUB, runtime), folder)))
        self.library.arena_cuda_alloc.restype = ctypes.c_void_p
        self.arena = StepStream(self.library, ALIGNMENT)

    def number(self, name: str) -> Any:
        return ctypes.c_int64.in_dll(self.runtime, name)

    def alloc(self, size: int, stream: int = STEP) -> int:
        return int(self.library.arena_cuda_alloc(ctypes.c_ssize_t(size), 0, ctypes.c_void_p(stream)))

    def free(self, address: int, size: int, stream: int = STEP) -> None:
        self.library.arena_cuda_free(ctypes.c_void_p(address), ctypes.c_ssize_t(size), 0, ctypes.c_void_p(stream))

    def record_stream(self, address: int, stream: int) -> None:
        self.library.arena_cuda_record_stream(ctypes.c_void_p(address), ctypes.c_void_p(stream))

    def step(self) -> list[int]:
        a, b = self.alloc(1000), self.alloc(3000)
        self.free(a, 1000)
        c = self.alloc(2000)
        self.free(b, 3000)
        self.free(c, 2000)
        return [a, b, c]


class StepStream(CudaArena):
    def _owner(self) -> int:
        return STEP


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    if compiler_path() is None:
        pytest.skip("no C++ compiler")
    return Device(tmp_path_factory.mktemp("cuda"))


def test_record_plan_replay(device: Device) -> None:
    arena = device.arena
    with arena.recording():
        device.step()
    trace = arena.trace()
    assert trace.sizes == (1000, 3000, 2000)
    plan = spread(plan_arena(trace.within(), alignment=ALIGNMENT), trace)
    assert arena.reserve(plan.height) and plan.height == plan.max_live == 3072 + 2048
    for _ in range(2):
        with arena.replaying(plan):
            addresses = device.step()
        assert arena.counts().served == 3 and arena.counts().fallback_peak_bytes == 0
        base = addresses[0] - plan.offsets[0]
        assert [address - base for address in addresses] == list(plan.offsets)
    assert device.runtime.stub_used() == plan.height, "nothing but the arena is left"
    with arena.replaying(plan):
        other = device.alloc(1000, OTHER)
        addresses = device.step()
        wrong = device.alloc(640)
    counts = arena.counts()
    assert (counts.served, counts.foreign, counts.fallback) == (3, 1, 1), "another stream's request and one of no known size"
    assert not base <= other < base + plan.height and not base <= wrong < base + plan.height
    device.free(other, 1000, OTHER)
    device.free(wrong, 640)
    assert arena.device_peak_bytes() >= 640 + 1000 + plan.height
    assert arena.release() and device.runtime.stub_used() == 0


def test_a_block_waits_for_the_streams_that_used_it(device: Device) -> None:
    waits = device.number("stub_waits")
    before = waits.value
    address = device.alloc(512)
    for stream in (OTHER, OTHER, STEP):
        device.record_stream(address, stream)
    device.free(address, 512)
    assert waits.value == before + 1, "once for the other stream; its own needs no waiting"
    second = device.alloc(512)
    device.free(second, 512)
    assert waits.value == before + 1


def test_a_full_device(device: Device) -> None:
    """Unused memory is given back and asked for again; the arena says it has no room."""
    trims, room = device.number("stub_trims"), device.number("stub_room")
    before = trims.value
    with pytest.raises(MemoryError, match="no 2097152 bytes"):
        device.arena.reserve(2 * room.value)
    assert trims.value == before + 1 and device.arena.reserved_bytes == 0


def test_where_the_runtime_is_found(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"looked for include/cuda_runtime_api.h and include/crt in {tmp_path}"):
        find_runtime([tmp_path])
    (tmp_path / "include" / "crt").mkdir(parents=True)
    (tmp_path / "lib").mkdir()
    for name in ("include/cuda_runtime_api.h", "include/crt/host_defines.h", "lib/libcudart.so.13"):
        (tmp_path / name).write_text("")
    assert find_runtime([tmp_path / "nowhere", tmp_path]) == (tmp_path / "include", tmp_path / "lib" / "libcudart.so.13")


def test_it_is_built_against_the_real_headers_where_there_are_any(tmp_path: Path) -> None:
    """Of a toolkit, or of the packages nvidia-cuda-runtime and nvidia-cuda-crt; loading it finds every function of the real runtime."""
    try:
        headers, runtime = find_runtime(_roots())
    except ConfigError:
        pytest.skip("no CUDA headers here; pip install nvidia-cuda-runtime nvidia-cuda-crt")
    library = ctypes.CDLL(str(build(cuda_recipe(headers, runtime), tmp_path)))
    assert all(hasattr(library, f"arena_cuda_{name}") for name in ("alloc", "free", "record_stream"))
