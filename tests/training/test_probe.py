"""Probes: the fit on samples with known coefficients, and a whole profile of two real ranks."""

from __future__ import annotations

import json
import math
from dataclasses import astuple, replace

import numpy as np
import pytest

from efflaunch.errors import ConfigError
from efflaunch.estimate.measured.find_rates import find_rates
from efflaunch.estimate.measured.profile import load_profiles
from efflaunch.launcher.config.compose import compose
from efflaunch.parallel.sequence.cost import CostModel, DegreeCost
from efflaunch.tests.ranks import RankPool
from efflaunch.training.profiling.probe import Sample, _check_fit, fit_degrees

COST = CostModel(
    world_size=4,
    tokens_per_rank=1024,
    degrees=tuple(DegreeCost(degree=d, ulysses=d, attention_s=1e-9 / d, linear_s=1e-6 / d) for d in (1, 2, 4)),
)
TINY = [
    "model=tiny", "model.num_layers=2", "model.hidden_size=32", "model.intermediate_size=64", "model.num_heads=4", "model.num_kv_heads=2",
    "model.vocab_size=97", "data=indexed", "data.prefixes=[x]", "data.max_seq_len=1K", "data.global_batch_tokens=1K",
    "cluster=local_cpu", "cluster.ranks_per_node=2", "parallel.tokens_per_rank=512", "train.dtype=float32", "train.steps=10",
]  # fmt: skip


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


def test_coefficients_are_found_again():
    truth = {1: (4e-9, 3e-6), 2: (2.1e-9, 2e-6), 4: (1.1e-9, 1.5e-6)}
    samples = [
        Sample(degree, degree, lengths, (0.01 + sum(a * n * n + b * n for n in lengths),) * (4 // degree), 0.0)
        for degree, (a, b) in truth.items()
        for lengths in ((64,), (512,), (1024 * degree,), (128,) * 4, (700, 30))
    ]
    degrees, overhead_s = fit_degrees(samples, COST)
    assert overhead_s == pytest.approx(0.01, rel=1e-6)
    for row in degrees:
        a, b = truth[row.degree]
        assert row.attention_s == pytest.approx(a, rel=1e-6) and row.linear_s + row.exchange_s == pytest.approx(b, rel=1e-6)
        assert row.linear_s == pytest.approx(min(b, 3e-6 / row.degree), rel=1e-6) and row.fit.worst_error < 1e-9


def test_a_fit_without_a_cost_of_tokens_is_refused():
    samples = [Sample(1, 1, lengths, (0.01,) * 4, 0.0) for lengths in ((64,), (512,), (1024,), (128,) * 4)]
    degrees, _ = fit_degrees(samples, CostModel(world_size=4, tokens_per_rank=1024, degrees=COST.degrees[:1]))
    with pytest.raises(ConfigError, match=r"groups of 1 ranks that do not grow with their tokens"):
        _check_fit(degrees)


def _probed(arguments, folder):
    """The rank's part, without joining again: the pool's ranks have their group. Everything runs, and takes the time it is said to."""
    import pathlib

    import torch
    import torch.distributed as dist

    from efflaunch.estimate.measured.profile import save_profile
    from efflaunch.training.profiling.probe import Prober

    class Steady(Prober):
        def sample(self, degree, ulysses, lengths):
            sample = super().sample(degree, ulysses, lengths)
            assert all(busy_s > 0 for busy_s in sample.group_s)
            return replace(sample, group_s=(0.01 + 3e-6 * sum(lengths) / degree,) * len(sample.group_s))

    profile = Steady.of(compose(arguments), torch.device("cpu")).profile(1.0)
    if dist.get_rank() == 0:
        save_profile(pathlib.Path(folder) / "profile.yaml", profile)
    return profile.overhead_s


def test_real_ranks_are_profiled(pool, tmp_path):
    pool.run(_probed, [*TINY, f"memory.offload_dir={tmp_path}"], str(tmp_path), ranks=2)
    (profile,) = load_profiles(tmp_path / "profile.yaml")
    assert [row.degree for row in profile.degrees] == [1, 2] and "2 ranks" in profile.key.ranks
    for row in profile.degrees:
        assert row.linear_s + row.exchange_s == pytest.approx(3e-6 / row.degree) and row.attention_s == pytest.approx(0.0, abs=1e-12)
        assert row.fit.samples >= 3 and profile.overhead_s == pytest.approx(0.01)
    assert {(link.kind, link.degree) for link in profile.collectives} == {(k, 2) for k in ("all-to-all", "neighbours", "gather", "reduce")}
    rates = profile.rates
    assert rates is not None and (rates.device, rates.ranks_per_node, len(rates.link), len(rates.disk)) == ("cpu", 2, 2, 2)
    assert rates.directory == str(tmp_path) and rates.device_update == rates.host_update > 0
    assert all(math.isfinite(rate) and rate > 0 for row in (*rates.link, *rates.disk) for rate in astuple(row))
    stored = find_rates(None, compose(TINY).cluster, "", None, tmp_path)
    assert stored is not None and stored.rates == rates
    figures = [profile.overhead_s, profile.gather_s, profile.empty_s, profile.step_s]
    assert all(math.isfinite(value) and value >= 0 for value in figures)
    assert json.dumps(figures) and np.isfinite([link.latency_s for link in profile.collectives]).all()
