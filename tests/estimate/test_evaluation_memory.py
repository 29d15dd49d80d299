"""Memory of an evaluation: what real forward passes hold is in the ledger's phase of it, and is less than a step's."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from efflaunch.bench.predicted import CASES
from efflaunch.bench.traced import MODEL, Case, case_ledger, predicted_by_phase
from efflaunch.estimate.certificate import certify
from efflaunch.estimate.footprint.term import FORWARD_ALONE
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.config.ledger import plan
from efflaunch.tests.ranks import RankPool

CHOSEN = ("recompute", "keep", "recompute, large vocabulary", "streambp", "memo, half", "keep, Ulysses 2", "gemma2", "qwen3 moe")


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def evaluation_peak(case: Case) -> int:
    """On a rank: the most bytes of the second of two evaluations of the case's documents, optimizer states in."""
    import numpy as np
    import torch

    from efflaunch.memory.arena.tracer import StorageTracer
    from efflaunch.model.build import build_config, build_model
    from efflaunch.model.config import ModelConfig
    from efflaunch.model.hf_fields import hf_config_dict
    from efflaunch.parallel.sequence.attention import CpuKernel
    from efflaunch.parallel.sequence.plan import Group, MicroBatch, StepPlan
    from efflaunch.parallel.topology import build_topology
    from efflaunch.training.evaluation.measure import add_step
    from efflaunch.training.evaluation.tally import Tally
    from efflaunch.training.step_setup import StepSetup

    torch.set_num_threads(1)
    ledger, topology, device = case_ledger(case), build_topology(replicate=1, device="cpu"), torch.device("cpu")
    model = build_model(
        build_config(hf_config_dict(ModelConfig(**{**MODEL, **case.model}))), ledger.inputs.policy, topology.mesh,
        device=device, compute_dtype=getattr(torch, case.dtype), seed=0, loss_chunk_tokens=case.loss_chunk,
    )  # fmt: skip
    states = [torch.zeros_like(parameter) for parameter in model.parameters() for _ in range(2)]
    plan = StepPlan(case.ranks, (case.length,), (MicroBatch((Group(0, case.ranks, ledger.layout.ulysses, (0,)),)),))
    ids = np.random.default_rng(0).integers(0, ledger.inputs.spec.vocab_size, case.length)
    source = SimpleNamespace(lengths=lambda _: plan.lengths, parts=lambda *_: plan.lengths, tokens=lambda s, i, a, b: (ids[a:b], ids[a:b]))
    setup = StepSetup(model=model, topology=topology, kernel=CpuKernel(), device=device, reduce_each=False)
    judged = SimpleNamespace(device=device, topology=topology, model=model, step_setup=setup)
    add_step(judged, source, 0, plan, Tally())
    with StorageTracer([*model.parameters(), *states]) as tracer:
        add_step(judged, source, 0, plan, Tally())
    return tracer.peak_bytes


@pytest.mark.parametrize("case", [case for case in CASES if case.name in CHOSEN], ids=lambda case: case.name)
def test_prediction_holds(case: Case, pool: RankPool) -> None:
    """It may be too high, for it is no peak of a run; it is not too low."""
    measured = pool.run(evaluation_peak, case, ranks=case.ranks)[0]
    predicted = max(predicted_by_phase(case)[phase] for phase in FORWARD_ALONE)
    assert 0.99 * measured <= predicted <= 1.25 * measured, f"predicted {predicted}, measured {measured}: {predicted / measured - 1:+.2%}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_never_the_peak_of_a_run(case: Case) -> None:
    predicted = predicted_by_phase(case)
    assert 0 < max(predicted[phase] for phase in FORWARD_ALONE) < max(predicted.values())


def test_the_certificate_says_so() -> None:
    certificate = certify(plan(compose(["+experiment=quickstart", "memory=recompute"])))
    assert 0 < certificate.evaluation_bytes < certificate.device_bytes
