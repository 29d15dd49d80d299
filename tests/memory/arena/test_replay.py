"""The guarded allocator on real ranks: nothing changes but addresses, and what does not fit is counted, never trusted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from efflaunch.errors import ConfigError
from efflaunch.memory.arena.build import Recipe, build, cpu_recipe
from efflaunch.memory.policy import KEPT, MemoryPolicy
from efflaunch.tests.ranks import RankPool
from efflaunch.utils.compilers import compiler_path

needs_compiler = pytest.mark.skipif(compiler_path() is None, reason="no C++ compiler")
POLICIES = {
    "keep": MemoryPolicy(graph=True),
    "chunks": MemoryPolicy(chunk_tokens=40),
    "attention kept": MemoryPolicy(attention_output=KEPT),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arena")


@pytest.fixture
def pool() -> Iterator[RankPool]:
    """New processes for each test: the allocator stays in a process for good."""
    with RankPool() as pool:
        yield pool


def prepared(cache: Path, step: Any) -> tuple[Any, Any, Any]:
    """(arena, trace of a warm step, its plan)."""
    import torch

    from efflaunch.memory.arena.plan import plan_arena, spread
    from efflaunch.memory.arena.replay import open_cpu_arena
    from efflaunch.memory.arena.search import Budget

    torch.set_num_threads(1)
    arena = open_cpu_arena(cache)
    work = step()
    for _ in range(2):
        work()
    with arena.recording():
        work()
        clear(work)
    trace = arena.trace()
    with arena.recording():
        work()
        clear(work)
    assert arena.trace() == trace, "two steps ask for the same"
    plan = spread(plan_arena(trace.within(), alignment=arena.alignment, budget=Budget(work=2_000_000)), trace)
    assert arena.reserve(plan.height)
    return arena, work, plan


def clear(work: Any) -> None:
    if hasattr(work, "rank"):
        work.rank.model.zero_grad()


@needs_compiler
@pytest.mark.parametrize("policy", POLICIES, ids=list(POLICIES))
def test_gradients_are_the_same_bit_for_bit(policy: str, cache: Path, pool: RankPool) -> None:
    pool.run(check_exact_replay, cache, POLICIES[policy], ranks=1)


def check_exact_replay(cache: Path, policy: MemoryPolicy) -> None:
    import torch

    from efflaunch.tests.memory.arena.steps import SmallStep

    arena, work, plan = prepared(cache, lambda: SmallStep(policy))
    loss, want = work(), work.gradients()
    clear(work)
    for _ in range(2):
        with arena.replaying(plan):
            assert work() == loss
            got = [p.grad for p in work.rank.model.parameters()]
            assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
            del got
            clear(work)
        counts = arena.counts()
        assert counts.served == len(plan.sizes) > 200 and (counts.out_of_order, counts.fallback, counts.foreign, counts.outside) == (
            0,
            0,
            0,
            0,
        )
        assert counts.arena_peak_bytes == plan.height == arena.reserved_bytes == plan.max_live and counts.fallback_peak_bytes == 0


class Requests:
    """A step that is nothing but allocations, each filled with its own number and looked at before it goes."""

    def __init__(self, script: list[tuple[str, int, int]]) -> None:
        self.script = script

    def __call__(self) -> None:
        import torch

        live: dict[int, Any] = {}
        for action, key, size in self.script:
            if action == "new":
                live[key] = torch.empty(size, dtype=torch.int64)
                live[key].fill_(key)
            else:
                self.look(key, live.pop(key))
        for key, tensor in live.items():
            self.look(key, tensor)

    def look(self, key: int, tensor: Any) -> None:
        assert (tensor == key).all(), f"tensor {key} was written over"


SCRIPT = [
    ("new", 1, 1000), ("new", 2, 500), ("old", 1, 0), ("new", 3, 800), ("new", 4, 200), ("old", 2, 0), ("new", 5, 500), ("old", 3, 0),
    ("old", 4, 0), ("new", 6, 1300), ("old", 5, 0), ("old", 6, 0),
]  # fmt: skip
CHANGED = {
    "order": [SCRIPT[1], SCRIPT[0], *SCRIPT[2:]],
    "a size": [("new", 1, 1000), ("new", 2, 777), *SCRIPT[2:]],
    "one more": [("new", 9, 1000), *SCRIPT, ("old", 9, 0)],
    "one less": [entry for entry in SCRIPT if entry[1] != 3],
    "longer lives": [*(entry for entry in SCRIPT if entry != ("old", 1, 0)), ("old", 1, 0)],
    "backwards": [("new" if action == "old" else "old", key, {k: s for _, k, s in SCRIPT if s}[key]) for action, key, _ in SCRIPT[::-1]],
}


@needs_compiler
def test_changed_steps_are_caught(cache: Path, pool: RankPool) -> None:
    pool.run(check_changed_steps, cache, ranks=1)


def check_changed_steps(cache: Path) -> None:
    arena, work, plan = prepared(cache, lambda: Requests(SCRIPT))
    with arena.replaying(plan):
        work()
    requests = arena.counts().served
    assert requests >= 6 and arena.counts().fallback == 0
    seen = {}
    for name, script in CHANGED.items():
        with arena.replaying(plan):
            Requests(script)()
        counts = arena.counts()
        seen[name] = counts
        assert counts.arena_peak_bytes <= plan.height
    assert seen["order"].out_of_order >= 1 and seen["order"].served < requests
    for name in ("a size", "one more", "longer lives"):
        assert seen[name].fallback >= 1, name
    assert seen["one less"].out_of_order >= 1
    with arena.replaying(plan):
        work()
    assert arena.counts().served == requests, "a changed step leaves nothing behind"


@needs_compiler
def test_two_threads_are_caught(cache: Path, pool: RankPool) -> None:
    pool.run(check_two_threads, cache, ranks=1)


def check_two_threads(cache: Path) -> None:
    arena, work, plan = prepared(cache, lambda: Requests(SCRIPT * 20))
    failures: list[BaseException] = []

    def other() -> None:
        try:
            for _ in range(20):
                Requests([(action, key + 100, size) for action, key, size in SCRIPT])()
        except BaseException as error:
            failures.append(error)

    for _ in range(5):
        threads = [threading.Thread(target=other) for _ in range(2)]
        with arena.replaying(plan):
            for thread in threads:
                thread.start()
            work()
            for thread in threads:
                thread.join()
        counts = arena.counts()
        assert not failures and counts.foreign >= 2 * 20 * 6, "other threads never use the arena"
        assert counts.served + counts.out_of_order + counts.fallback == len(plan.sizes), "and take nothing from the one that does"


@needs_compiler
def test_gradients_with_more_compute_threads(cache: Path, pool: RankPool) -> None:
    pool.run(check_more_compute_threads, cache, ranks=1)


def check_more_compute_threads(cache: Path) -> None:
    """Kernels that ask for scratch from their own threads: to rounding the same, whatever the order."""
    import torch

    from efflaunch.tests.memory.arena.steps import CHUNKED, SmallStep

    arena, work, plan = prepared(cache, lambda: SmallStep(CHUNKED, documents=(300, 200)))
    work()
    want = work.gradients()
    clear(work)
    torch.set_num_threads(2)
    for _ in range(3):
        with arena.replaying(plan):
            work()
            got = work.gradients()
            clear(work)
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        del got
        counts = arena.counts()
        assert counts.served + counts.out_of_order > 0.5 * len(plan.sizes)


@needs_compiler
def test_what_lives_on_is_not_served_again(cache: Path, pool: RankPool) -> None:
    pool.run(check_lives_on, cache, ranks=1)


def check_lives_on(cache: Path) -> None:
    import torch

    arena, work, plan = prepared(cache, lambda: Requests(SCRIPT))
    with arena.replaying(plan):
        held = torch.empty(1000, dtype=torch.int64).fill_(7)
    assert arena.counts().served == 1
    assert not arena.reserve(plan.height * 2) and not arena.release(), "its memory stays while a tensor lives there"
    with arena.replaying(plan):
        work()
    assert arena.counts().fallback >= 1, "the address was taken"
    assert (held == 7).all()
    del held
    assert arena.reserve(plan.height * 2) and arena.reserved_bytes == plan.height * 2
    with arena.replaying(replace(plan, offsets=tuple(-1 for _ in plan.offsets))):
        work()
    assert arena.counts().outside == len(plan.sizes), "a plan may leave everything outside"
    assert arena.release() and arena.reserved_bytes == 0
    with arena.replaying(plan):
        work()
    assert arena.counts().served == 0, "no arena, no addresses"


def test_without_a_compiler_the_error_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        build(cpu_recipe(), tmp_path, compilers=("no-such-c++",))
    assert str(caught.value) == (
        "memory.arena=planned: found no C++ compiler (looked for no-such-c++); expected one, to build the arena's allocator on first use.\n"
        "  Try: install g++ (apt-get install g++, dnf install gcc-c++, apk add g++, conda install gxx), or memory.arena=default"
    )


@needs_compiler
def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fails on cpu\.cpp: .*c10/core/Allocator\.h.*C\+\+20"):
        build(Recipe("cpu.cpp", ("-fsyntax-only",)), tmp_path)
    assert not list(tmp_path.glob("*.so")), "nothing half made stays"


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="nothing can be written to"):
        build(cpu_recipe(), tmp_path / "file" / "cache", compilers=("sh",))


def test_a_library_is_made_once(tmp_path: Path) -> None:
    """A stand-in for the compiler that takes its time: who comes later waits, and finds the whole library."""
    calls, compiler = tmp_path / "calls", tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho call >> {calls}\nsleep 0.3\nwhile [ "$1" != -o ]; do shift; done\necho made > "$2"\n')
    compiler.chmod(0o755)
    recipe, paths = cpu_recipe(), []
    threads = [threading.Thread(target=lambda: paths.append(build(recipe, tmp_path, compilers=(str(compiler),)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1 and len(paths) == 4 and paths[0].read_text() == "made\n"
    assert calls.read_text() == "call\n"
    assert replace(recipe, torch_version="0.0").digest() != recipe.digest(), "another torch needs another library"
