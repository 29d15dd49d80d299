"""memory=auto: its answers fit the ledger, are at least as fast as every policy tried, hold what is given, and say what is missing."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflaunch.estimate.build import build_ledger
from efflaunch.estimate.ledger import Ledger
from efflaunch.estimate.plan_inputs import PlanInputs
from efflaunch.estimate.solver.evaluate import measures
from efflaunch.estimate.solver.linear_program import solve_program
from efflaunch.estimate.solver.report import SolveReport
from efflaunch.estimate.solver.search import NO_EXTRA, PREFERENCE, ExtraCapacity, overflow
from efflaunch.estimate.solver.solve import can_fit, search_of, solve_memory
from efflaunch.memory.config import ActivationPlace, AttentionTiling, MemoryConfig
from efflaunch.memory.policy import KEPT, MOVED, MemoryPolicy, Split
from efflaunch.training.config import Dtype

from .settings import GIB, SMALL, cluster, make_ledger

K = 1 << 10
M = 1 << 20


def auto(**given: Any) -> MemoryConfig:
    return MemoryConfig(name="auto", solve=True, **given)


def small(device: float, host: float = 64.0, memory: MemoryConfig | None = None, **changes: Any) -> Ledger:
    """Four layers on two GPUs that have almost nothing; sizes in GiB without what the ledger assumes of a GPU."""
    machines = cluster(ranks_per_node=2, device_memory_bytes=int(device * GIB), host_memory_bytes=int((host + 12.6) * GIB), **changes)
    return make_ledger(
        SMALL, length=4 * K, tokens_per_rank=64 * K, batch=128 * K, memory=memory or auto(), machines=machines, loss_chunk=256
    )


def test_everything_is_kept_where_it_fits():
    ledger = small(80)
    assert ledger.fits and ledger.inputs.policy.graph and ledger.report is not None
    assert ledger.report.gap == 0.0 and not ledger.report.prices and ledger.report.step_s == ledger.report.keep_s


@pytest.mark.parametrize(
    ("device", "host", "budget"), [*itertools.product([2.7, 3.2, 4.0], [0.2, 64.0], [None]), (3.4, 64.0, 16 << 20), (3.4, -0.4, None)]
)
def test_answers_fit_and_beat_a_grid_of_policies(device, host, budget):
    """Every class wholly kept, moved or recomputed, in every shape: none that fits is faster than the answer by more than it says."""
    ledger = small(device, host, memory=auto(host_budget=budget))
    s, report = ledger.inputs, ledger.report
    assert report is not None
    fastest = min(
        (measured.step_s() for policy in grid() if overflow(measured := measures(replace(s, policy=policy))) <= 0), default=float("inf")
    )
    if not report.feasible:
        assert fastest == float("inf") and not ledger.fits
        return
    assert ledger.fits and ledger.timing.step_s == pytest.approx(report.step_s)
    assert fastest >= report.step_s * (1 - report.gap) - 1e-12 and report.gap <= 1.5 * PREFERENCE


def grid():
    whole = (KEPT, MOVED, Split())
    for layer_input, attention, mlp, query, residual in itertools.product(whole[:2], whole, whole, whole[::2], whole[::2]):
        for segment, (chunk, walk) in itertools.product(
            (1, 2), ((None, AttentionTiling.WHOLE), (4096, AttentionTiling.WHOLE), (4096, AttentionTiling.CHUNKS))
        ):
            yield MemoryPolicy(
                layer_input=layer_input,
                attention_output=attention,
                query=query,
                key_value=query,
                residual=residual,
                mlp=mlp,
                segment_layers=segment,
                chunk_tokens=chunk,
                attention=walk,
            )


@settings(max_examples=5, deadline=None)
@given(st.floats(2.7, 5.0), st.floats(0.0, 3.0), st.floats(0.0, 8.0), st.floats(0.0, 2.0))
def test_more_memory_is_never_slower(device, more, host, more_host):
    before, after = small(device, host).report, small(device + more, host + more_host).report
    assert before is not None and after is not None
    if before.feasible:
        assert after.feasible and after.step_s <= before.step_s * (1 + 2 * PREFERENCE)


@pytest.mark.parametrize(
    "given",
    [
        {"layer_input": ActivationPlace.HOST},
        {"attention_output": ActivationPlace.RECOMPUTE},
        {"attention_output": ActivationPlace.HOST, "activations": ActivationPlace.RECOMPUTE},
        {"activations": ActivationPlace.HOST, "host_fraction": 0.25},
        {"segment_layers": 2},
        {"chunk_tokens": 5000},
        {"chunk_tokens": 2048, "attention": AttentionTiling.CHUNKS},
        {"head_groups": 2},
    ],
)
def test_what_is_given_is_held(given):
    policy = small(4, memory=auto(**given)).inputs.policy
    shares = {ActivationPlace.HOST: MOVED, ActivationPlace.RECOMPUTE: Split(), ActivationPlace.KEEP: KEPT}
    for key, value in given.items():
        if key == "host_fraction":
            assert policy.mlp == Split(host=value)
        elif key == "activations":
            assert policy.query == policy.key_value == policy.residual == policy.mlp
        elif isinstance(value, ActivationPlace):
            assert getattr(policy, key) == shares[value]
        else:
            assert getattr(policy, key) == value
    assert not policy.graph


def test_with_activations_on_the_host_one_share_is_solved_as_memo_does():
    """Given where things go, the one question left is how much: all that a fast link and a large host take, else what fits."""
    given = auto(activations=ActivationPlace.HOST, layer_input=ActivationPlace.HOST, attention_output=ActivationPlace.HOST)
    roomy = small(4, memory=given, host_link_bandwidth=1e12)
    tight = small(4, host=1.0, memory=given, host_link_bandwidth=1e12)
    for ledger in (roomy, tight):
        policy = ledger.inputs.policy
        assert ledger.fits and policy.query == policy.key_value == policy.residual == policy.mlp and policy.mlp.keep == 0.0
    assert 0.0 < tight.inputs.policy.mlp.host < roomy.inputs.policy.mlp.host


def test_the_same_question_has_the_same_answer():
    assert small(5).inputs == small(5).inputs and small(5).report == small(5).report


def least(report: SolveReport, key: str) -> int:
    """MiB of the budget that is said to be the least."""
    assert report.least_budget is not None
    name, _, size = report.least_budget.partition("=")
    assert name == key and size.endswith("MiB")
    return int(size[:-3])


def test_what_is_missing_is_named_and_the_least_that_works_does():
    ledger = small(1.0)
    report = ledger.report
    assert report is not None and not report.feasible and not ledger.fits
    size = least(report, "cluster.device_memory_bytes")
    assert report.fixed_bytes < size << 20 and "context" in {name for name, _ in report.fixed_terms}
    assert small(size / 1024).fits and not small((size - 2) / 1024).fits


def test_a_larger_device_does_not_help_a_host_that_is_too_small():
    ledger = small(80.0, host=-4.0)
    report = ledger.report
    assert report is not None and not report.feasible
    size = least(report, "cluster.host_memory_bytes")
    assert small(80.0, host=size / 1024 - 12.6 + 1 / 1024).fits and not small(80.0, host=size / 1024 - 12.6 - 2 / 1024).fits


def resized(ledger: Ledger, change: str) -> Ledger:
    """The configuration on the machine a price speaks of, solved anew."""
    s = ledger.asked
    cluster, ranks = s.cluster, s.layout.ranks_per_node
    result = re.match(r"([0-9.]+) (MiB|GiB) more (.*)", change)
    if result is None:
        assert change == "a link to the host twice as fast"
        return rebuilt(s, cluster=replace(cluster, host_link_bandwidth=2 * cluster.host_link_bandwidth))
    size = float(result[1]) * {"MiB": 1 << 20, "GiB": GIB}[result[2]]
    if result[3] == "memory on each GPU":
        return rebuilt(s, cluster=replace(cluster, device_memory_bytes=int(cluster.device_memory_bytes + size)))
    if result[3] == "host memory for each GPU":
        return rebuilt(s, cluster=replace(cluster, host_memory_bytes=int(cluster.host_memory_bytes + ranks * size)))
    assert result[3] == "of memory.host_budget for each GPU" and s.memory.host_budget is not None
    return rebuilt(s, memory=replace(s.memory, host_budget=int(s.memory.host_budget + ranks * size)))


def rebuilt(inputs: PlanInputs, **changes: Any) -> Ledger:
    return build_ledger(inputs.with_parts(**changes))


@pytest.mark.parametrize(
    "changes", [{"host": -4.0}, {"memory": auto(host_budget=1, layer_input=ActivationPlace.HOST)}], ids=["host", "budget"]
)
def test_where_the_host_has_no_room_for_what_is_always_there_no_program_is_solved(changes, monkeypatch):
    asked = small(3.4, **changes).asked
    assert can_fit(small(3.4).asked)
    monkeypatch.setattr("efflaunch.estimate.solver.search.solve_program", None)
    assert not can_fit(asked)


def test_whole_layers_fit_a_budget_that_small_chunks_do_not():
    """A layer's rows fill their block of the arena almost to the end, and chunks of them leave more of theirs empty."""
    fields = {
        "layer_input": ActivationPlace.HOST,
        "attention_output": ActivationPlace.RECOMPUTE,
        "activations": ActivationPlace.RECOMPUTE,
        "segment_layers": 1,
    }

    def ledger(**more: Any) -> Ledger:
        model, machines = {**SMALL, "hidden_size": 320}, cluster(ranks_per_node=1)
        return make_ledger(model, length=6553, tokens_per_rank=6553, batch=6553, memory=auto(**fields, **more), machines=machines)

    assert not ledger(host_budget=17_500_000, chunk_tokens=1024).fits and can_fit(ledger(host_budget=17_500_000).asked)


@pytest.mark.parametrize(
    ("device", "host", "changes", "kinds"),
    [
        (2.8, -0.2, {}, {"GPU", "host"}),
        (2.8, 64.0, {"host_link_bandwidth": 4e9}, {"GPU", "link"}),
        (3.0, 0.2, {"host_link_bandwidth": 4e9}, {"GPU"}),
        (2.8, 64.0, {"host_budget": 300 << 20}, {"GPU", "memory.host_budget"}),
        (3.4, 0.4, {}, {"GPU"}),
    ],
)
def test_prices_are_kept_by_the_machine_they_speak_of(device, host, changes, kinds):
    """Of each sentence: with a machine that has so much more, the step is shorter by so much."""
    speeds = {name: value for name, value in changes.items() if name != "host_budget"}
    ledger = small(device, host, memory=auto(host_budget=changes.get("host_budget")), **speeds)
    report = ledger.report
    assert report is not None and report.feasible and report.prices
    seen = {kind for kind in ("GPU", "host", "link", "memory.host_budget") for price in report.prices if kind in price.change}
    assert kinds <= seen
    for price in report.prices:
        repeated = resized(ledger, price.change).report
        assert repeated is not None and price.saved_share >= PREFERENCE
        # Either plan may be PREFERENCE slower than the fastest, for room that it leaves; the price is of the fastest.
        assert report.step_s - repeated.step_s == pytest.approx(price.saved_s, abs=1.5 * PREFERENCE * report.step_s)
        assert price.saved_share == pytest.approx(price.saved_s / report.step_s)
        assert str(price) == f"{price.change} would save {100 * price.saved_share:.1f} % of the step"
        assert (price.slope_s is None) == ("link" in price.change)


def test_a_slope_is_what_the_first_bytes_save():
    """Of the duals: a little more room makes the program faster by that much, and no room makes the same shape faster than they say."""
    setting = small(3.0, host=0.2).asked
    search = search_of(setting)
    result = search.best()
    assert result is not None
    program = result.candidate.program
    before = solve_program(program)
    assert before is not None and any(price > 0 for price in before.prices.values())
    for memory in ("device", "host"):
        slope = sum(price for name, price in before.prices.items() if name.startswith(memory))
        for size in (float(1 << 16), float(GIB)):
            room = ExtraCapacity(device_bytes=size) if memory == "device" else ExtraCapacity(host_bytes=size)
            after = solve_program(room.of(program))
            assert after is not None
            saved = before.time_s - after.time_s
            assert saved <= slope * size + 1e-9 * before.time_s
            if size < GIB:
                assert saved == pytest.approx(slope * size, rel=1e-3, abs=1e-9 * before.time_s)


def test_what_is_full_is_said_with_its_share():
    ledger = small(3.0, host=0.2, host_link_bandwidth=4e9)
    report = ledger.report
    assert report is not None and report.binding
    rows = measures(ledger.inputs).rows
    for sentence in report.binding:
        result = re.fullmatch(r"(GPU memory|host memory) in (.*), (\d+) %", sentence)
        if result is not None:
            used, limit = rows[f"{'device' if result[1] == 'GPU memory' else 'host'}, {result[2]}"]
            assert int(result[3]) == round(100 * used / limit) >= 98
    slow = small(2.8, host=64.0, host_link_bandwidth=1e9, memory=auto(layer_input=ActivationPlace.HOST))
    assert slow.report is not None and slow.timing.host_s > 0
    assert any(re.fullmatch(r"the way to the host in (forward|backward), \d+ % of the computation beside it", text)
               for text in slow.report.binding)  # fmt: skip


def test_a_room_is_the_machine_with_so_much_more():
    setting = small(4.0, host=0.5).asked
    search = search_of(setting)
    result = search.best(ExtraCapacity(host_bytes=float(GIB)))
    repeated = search_of(
        replace(setting, cluster=replace(setting.cluster, host_memory_bytes=setting.cluster.host_memory_bytes + GIB))
    ).best()
    assert result is not None and repeated is not None and result.policy == repeated.policy
    assert search.best(NO_EXTRA) is not None


def test_budget_of_the_host_is_kept():
    ledger = small(4.0, memory=auto(host_budget=GIB // 2))
    assert ledger.fits and ledger.budget is not None and ledger.budget.peak_bytes <= GIB // 2
    free = small(4.0)
    assert free.timing.step_s <= ledger.timing.step_s * (1 + PREFERENCE)


def test_a_budget_too_small_for_a_block_of_each_row_is_no_worse_than_none():
    """What waits on the host waits in whole blocks: with less room than those need, all that fits on the device still is there."""
    steps = [
        ledger.timing.step_s for size in (0, 1 << 20, 16 << 20, 24 << 20) if (ledger := small(3.4, memory=auto(host_budget=size))).fits
    ]
    assert len(steps) == 4 and max(steps) <= min(steps) * (1 + 2 * PREFERENCE)


def test_whole_gradients_only_where_they_leave_room():
    """Several micro-batches: the solver decides when gradients are reduced, too."""
    roomy = make_ledger(length=8 * K, tokens_per_rank=8 * K, batch=M, memory=auto(), machines=cluster(device_memory_bytes=140 * GIB))
    tight = make_ledger(length=8 * K, tokens_per_rank=8 * K, batch=M, memory=auto(), machines=cluster(device_memory_bytes=40 * GIB))
    assert (roomy.inputs.parallel.grad_reduce.value, tight.inputs.parallel.grad_reduce.value) == ("step", "micro_batch")
    assert roomy.fits and tight.fits


def test_ranks_without_a_gpu():
    """What waits on the host waits in the same memory: moving it gains nothing, and the answer is one the machine can run."""
    machines = cluster(device=type(cluster().device)("cpu"), ranks_per_node=2, device_memory_bytes=GIB, host_memory_bytes=3 * GIB)
    ledger = make_ledger(SMALL, length=16 * K, tokens_per_rank=8 * K, memory=auto(), machines=machines, dtype=Dtype.FLOAT32)
    assert ledger.fits
    solved, report = solve_memory(ledger.asked)
    assert solved == ledger.inputs and report == ledger.report


@pytest.mark.parametrize("size", [48, 80])
def test_room_is_left_where_it_costs_no_time(size: int) -> None:
    """A million tokens on eight GPUs: more than half of 80 GiB would save nothing, so no more is used."""
    machines = cluster(device_memory_bytes=size * GIB, reserve=0.05)
    ledger = make_ledger(length=M, tokens_per_rank=128 * K, memory=auto(), machines=machines)
    large = make_ledger(length=M, tokens_per_rank=128 * K, memory=auto(), machines=cluster(device_memory_bytes=1000 * GIB))
    assert ledger.fits and ledger.timing.step_s <= large.timing.step_s * (1 + 2 * PREFERENCE)
    assert ledger.device.peak_bytes <= max(0.75 * size, 40) * GIB and ledger.device.reserve_bytes == int(0.05 * size * GIB)


def test_a_reserve_is_never_planned_into() -> None:
    """The same device with a quarter of it reserved holds a quarter less, and what no longer fits is refused."""
    whole, part = small(4.0), small(4.0, reserve=0.25)
    assert whole.fits and part.fits and part.device.usable_bytes == 3 * GIB and part.device.peak_bytes <= 3 * GIB
    assert not small(4.0, reserve=0.5).fits
