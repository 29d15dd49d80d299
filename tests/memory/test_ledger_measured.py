"""The ledger against exact live bytes of the real step: never too low, and at most a fifth too high.

The tracer counts every storage of one warm step on rank 0: weights, states, gradients, gathered copies, activations, buffers.
Terms it cannot see (process, communicators) are left out of the prediction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from efflaunch.memory.policy import explicit_policy
from efflaunch.parallel.config import Device, GradReduce, Scheme
from efflaunch.tests.memory.settings import SMALL, cluster, make_ledger, policy
from efflaunch.tests.ranks import RankPool
from efflaunch.training.config import Dtype, Family, ModelConfig
from efflaunch.training.spec import hf_config_dict

UNSEEN = {"context", "communicators", "allocator reserve"}
CHUNK = 256


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def case(name: str, **changes: Any) -> Any:
    base = {
        "ranks": 1, "tokens": 1024, "micro_batches": 1, "chunk": None, "dtype": "float32", "activations": "recompute",
        "attention": "recompute", "scheme": "auto", "model": {}, "grad_reduce": "micro_batch",
    }  # fmt: skip
    return pytest.param({**base, **changes}, id=name)


CASES = [
    case("recompute"),
    case("attention kept", attention="keep"),
    case("keep", activations="keep", attention="keep"),
    case("bfloat16", dtype="bfloat16"),
    case("bfloat16 keep", dtype="bfloat16", activations="keep", attention="keep"),
    case("qwen3", model={"family": Family.QWEN3, "head_dim": 64}),
    case("large vocabulary", model={"vocab_size": 32768}, tokens=512),
    case("few tokens", tokens=64),
    case("chunks", tokens=4096, chunk=512),
    case("chunks, attention kept, two ranks", tokens=2048, ranks=2, chunk=256, attention="keep", scheme="ulysses"),
    case("ulysses 2", ranks=2, scheme="ulysses"),
    case("ring 2", ranks=2, scheme="ring"),
    case("ulysses 4 with 2 KV heads", ranks=4, tokens=512, scheme="ulysses"),
    case("two micro-batches", micro_batches=2),
    case("whole gradients", micro_batches=2, grad_reduce="step", ranks=2, scheme="ulysses", tokens=512),
]


@pytest.mark.parametrize("wanted", CASES)
def test_prediction_holds(wanted: dict[str, Any], pool: RankPool) -> None:
    model = {**SMALL, **wanted["model"]}
    measured = pool.run(traced_peak, wanted, model, ranks=wanted["ranks"])[0]
    length = wanted["tokens"] * wanted["ranks"]
    ledger = make_ledger(
        model,
        length=length,
        tokens_per_rank=wanted["tokens"],
        batch=length * wanted["micro_batches"],
        memory=replace(policy(wanted["activations"], wanted["attention"]), chunk_tokens=wanted["chunk"]),
        machines=cluster(device=Device.CPU, ranks_per_node=wanted["ranks"]),
        dtype=Dtype(wanted["dtype"]),
        loss_chunk=CHUNK,
        scheme=Scheme(wanted["scheme"]),
        grad_reduce=GradReduce(wanted["grad_reduce"]),
    )
    assert ledger.layout.num_micro_batches == wanted["micro_batches"] and ledger.layout.sp_degree == wanted["ranks"]
    seen = [entry for entry in ledger.device.terms if entry.name not in UNSEEN]
    predicted = max(sum(entry.by_phase.get(phase, 0) for entry in seen) for phase in ledger.device.peak_phase.__class__)
    assert 1.0 <= predicted / measured <= 1.2, f"predicted {predicted}, measured {measured}: {predicted / measured:.3f}"


def traced_peak(wanted: dict[str, Any], model: dict[str, Any]) -> int:
    """On a rank: peak live bytes of the second step."""
    import numpy as np
    import torch

    from efflaunch.bench.tracer import StorageTracer
    from efflaunch.parallel.sequence.attention import CpuKernel
    from efflaunch.parallel.sequence.plan import Group, MicroBatch, StepPlan
    from efflaunch.parallel.topology import build_topology
    from efflaunch.training.model import build_config, build_model
    from efflaunch.training.step import backward_step, read_step

    torch.set_num_threads(1)
    topology, device, ranks = build_topology(replicate=1, device="cpu"), torch.device("cpu"), wanted["ranks"]
    keep = explicit_policy(replace(policy(wanted["activations"], wanted["attention"]), chunk_tokens=wanted["chunk"]))
    net = build_model(
        build_config(hf_config_dict(ModelConfig(**model))), keep, topology.mesh,
        device=device, compute_dtype=getattr(torch, wanted["dtype"]), seed=0, loss_chunk_tokens=CHUNK,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    length = wanted["tokens"] * ranks
    ulysses = 1 if wanted["scheme"] == "ring" else ranks
    count = wanted["micro_batches"]
    plan = StepPlan(ranks, (length,) * count, tuple(MicroBatch((Group(0, ranks, ulysses, (index,)),)) for index in range(count)))
    ids = np.random.default_rng(0).integers(0, model["vocab_size"], length)

    class Source:
        def lengths(self, step: int) -> tuple[int, ...]:
            return plan.lengths

        def parts(self, step: int, index: int) -> tuple[int, ...]:
            return (plan.lengths[index],)

        def tokens(self, step: int, index: int, start: int, stop: int) -> Any:
            return ids[start:stop], ids[start:stop]

    def step() -> None:
        works = read_step(Source(), 0, plan, topology.rank)  # type: ignore[arg-type]
        each = wanted["grad_reduce"] == "micro_batch"
        backward_step(net, topology, CpuKernel(), works, num_targets=length * count, reduce_each=each, device=device)
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    with StorageTracer([*net.parameters(), *states]) as tracer:
        step()
    return tracer.peak_bytes
