"""The probe before a run's first step: its fit, its limits in time, what it decides, and that it leaves training as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher.config.compose import compose
from efflaunch.parallel.sequence.cost import CostModel, DegreeCost
from efflaunch.tests.ranks import RankPool
from efflaunch.tests.training.test_probe import TINY
from efflaunch.training.optimizers.config import Update
from efflaunch.training.profiling.first_probe import (
    COSTS_FILE,
    Measured,
    QuickProbe,
    expected_s,
    fit_few,
    meaningless,
    too_few,
    without_probe,
)
from efflaunch.training.profiling.probe import Sample

COST = CostModel(
    world_size=4,
    tokens_per_rank=1024,
    degrees=tuple(DegreeCost(degree=d, ulysses=d, attention_s=1e-9 / d, linear_s=1e-6 / d, exchange_s=1e-7 * (d > 1)) for d in (1, 2, 4)),
)
ADAPTIVE = [*TINY, "parallel.sequence=adaptive"]


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


def sampled(lengths_of, constant_s=0.01, factor=2.0, noise=0.0):
    """What a machine takes that is `factor` slower than COST says, in all."""
    rng = np.random.default_rng(0)
    return [
        Sample(
            row.degree,
            row.degree,
            lengths,
            tuple((constant_s + factor * COST.group_s(lengths, row.degree)) * rng.lognormal(0.0, noise, 4 // row.degree)),
            0.05,
        )
        for row in COST.degrees
        for lengths in lengths_of(row.degree)
    ]


def test_a_machine_twice_as_slow_is_twice_as_slow_in_the_model():
    degrees, overhead_s = fit_few(sampled(lambda degree: ((2000 * degree,), (8000 * degree,), (16000 * degree,))), COST)
    assert overhead_s == pytest.approx(0.01) and meaningless(degrees) == ""
    for row, modelled in zip(degrees, COST.degrees, strict=True):
        assert row.attention_s == pytest.approx(2 * modelled.attention_s)
        assert row.linear_s + row.exchange_s == pytest.approx(2 * (modelled.linear_s + modelled.exchange_s)) and row.fit.mean_error < 1e-9


def test_what_no_sample_shows_scales_with_the_rest():
    """Sequences so short that attention is a thousandth of the time: it still is neither forgotten nor made up by noise."""
    degrees, _ = fit_few(sampled(lambda degree: ((60,), (250,)), constant_s=1e-5, noise=0.02), COST)
    assert all(
        row.attention_s == pytest.approx(2 * modelled.attention_s, rel=0.15) for row, modelled in zip(degrees, COST.degrees, strict=True)
    )


def test_a_degree_that_differs_is_seen():
    slow = [
        replace(sample, group_s=tuple(1.5 * s for s in sample.group_s)) if sample.degree == 2 else sample
        for sample in sampled(lambda degree: ((2000,), (8000,), (16000,)), constant_s=0.0)
    ]
    factors = [row.linear_s + row.exchange_s for row in fit_few(slow, COST)[0]]
    modelled = [row.linear_s + row.exchange_s for row in COST.degrees]
    assert factors[1] / modelled[1] > 1.15 * factors[0] / modelled[0]


def test_noise_is_called_so():
    falling = [
        replace(sample, group_s=(1.0 / sum(sample.lengths),) * len(sample.group_s)) for sample in sampled(lambda d: ((60,), (2000,)))
    ]
    assert "do not grow with their tokens" in meaningless(fit_few(falling, COST)[0])
    wild = sampled(lambda degree: ((2000,), (4000,), (8000,)), noise=3.0)
    assert meaningless(fit_few(wild, COST)[0]) != ""


def test_group_sizes_without_enough_shapes_are_named():
    samples = sampled(lambda degree: ((60,), (2000,)) if degree == 1 else ((60,),))
    assert too_few(samples, COST, 0.5) == "parallel.probe_s=0.5 is too short for groups of 2, 4 (efflaunch profile takes its time)"
    assert too_few(sampled(lambda degree: ((60,), (2000,))), COST, 0.5) == ""


def test_longer_sequences_are_expected_to_take_longer_but_gathers_are_not():
    sample = Sample(1, 1, (100,), (0.2, 0.3), 0.5)
    linear = DegreeCost(degree=1, ulysses=1, attention_s=0.0, linear_s=1e-6)
    assert expected_s(sample, (400,), linear) == pytest.approx(0.5 + 4 * 0.3)


def test_seconds_must_be_seconds():
    for wrong in ("-1", "inf", "nan"):
        with pytest.raises(ConfigError, match=r"parallel\.probe_s"):
            compose([*ADAPTIVE, f"parallel.probe_s={wrong}"])


class _TimedProber:
    """A machine of the model's own pace, with a clock of its own."""

    def __init__(self, factor: float) -> None:
        self.cost, self.factor, self.now, self.made = COST, factor, 0.0, []

    def agreed(self, value: float) -> float:
        return value

    def sample(self, degree: int, ulysses: int, lengths: tuple[int, ...]) -> Sample:
        busy_s = self.factor * COST.group_s(lengths, degree)
        self.now += 0.5 + busy_s
        self.made.append((degree, lengths))
        return Sample(degree, ulysses, lengths, (busy_s,) * (4 // degree), 0.5)


def _timed(factor: float, budget_s: float) -> tuple[_TimedProber, list[Sample]]:
    prober = _TimedProber(factor)
    quick = object.__new__(QuickProbe)
    quick.prober, quick._beat, quick._clock = prober, lambda phase: None, lambda: prober.now
    quick._budget_s, quick._longest = budget_s, 2048
    return prober, quick._samples(0.0)


def test_no_sample_is_begun_that_does_not_fit_into_the_time():
    for factor in (1.0, 1e3, 1e4):
        prober, samples = _timed(factor, 6.0)
        first = {degree: next(lengths for made, lengths in prober.made if made == degree) for degree in (1, 2, 4)}
        assert first == {1: (16,), 2: (32,), 4: (32,)}, "no longer than data.max_seq_len"
        least_s = sum(0.5 + factor * COST.group_s(lengths, degree) for degree, lengths in first.items())
        assert prober.now <= max(6.0, least_s) and len(samples) >= 3
    quick, _ = _timed(1.0, 60.0)
    assert len(quick.made) == 15, "a fit without noise is not measured again"


def test_costs_carry_where_they_are_from():
    from efflaunch.training.step_planner import Costs, load_costs

    costs = Costs(COST, 0.0, SimpleNamespace(), "arithmetic on data sheets", "abc", is_assumed=True)  # type: ignore[arg-type]
    degrees, overhead_s = fit_few(sampled(lambda degree: ((2000,), (8000,))), COST)
    probed = Measured(degrees=degrees, overhead_s=overhead_s, gather_s=0.05, empty_s=0.05, step_s=0.2).applied(costs, 1)
    assert probed.origin == "probed before step 1 (14 samples; mean error of their fit up to 0%)" and not probed.is_assumed
    assert probed.model.source == "profile" and probed.model.step_s == 0.2 and probed.overhead_s == overhead_s
    assert load_costs(json.loads(json.dumps(probed.dump())), costs.key, "abc") == probed
    assert load_costs(probed.dump(), costs.key, "other settings") is None
    failed = Measured(failure="too much else runs here").applied(costs, 7)
    assert failed.model == COST
    assert failed.origin == "arithmetic on data sheets; a probe before step 7 changed nothing: too much else runs here"


def _state(prober):
    import torch
    from torch.distributed.tensor import DTensor

    def local(value):
        return (value.to_local() if isinstance(value, DTensor) else value).detach().clone()

    parts = {name: local(value) for name, value in prober.updater.weights.named_parameters()}
    for index, state in enumerate(prober.updater.optimizer.state.values()):
        parts |= {f"{index}.{name}": local(value) for name, value in state.items() if torch.is_tensor(value)}
    return parts | {"rng": torch.get_rng_state(), "numpy": torch.tensor(np.random.get_state()[1].astype(np.int64))}


def _left_alone(words, folder):
    """A trained step, the state, a probe, the state; then the same once more, from RUN_DIR."""
    import pathlib

    import torch
    import torch.distributed as dist

    from efflaunch.training.micro_batches import EMPTY
    from efflaunch.training.profiling.first_probe import probe_before_training
    from efflaunch.training.profiling.probe import Prober
    from efflaunch.training.step_planner import resolve_costs

    config, device = compose(words), torch.device("cpu")
    prober = Prober.of(config, device)
    built = SimpleNamespace(
        device=device,
        topology=prober.topology,
        ledger=SimpleNamespace(inputs=prober.inputs),
        model=prober.model,
        updater=prober.updater,
        kernel=prober.setup.kernel,
    )
    prober._backward([EMPTY], None)
    prober.updater.finish()
    prober.updater.apply()
    before, phases = _state(prober), []
    assumed = resolve_costs(config, prober.inputs, device, None)
    probed = probe_before_training(config, built, assumed, pathlib.Path(folder), step=1, beat=phases.append)
    dist.barrier()
    repeated = probe_before_training(config, built, assumed, pathlib.Path(folder), step=1, beat=phases.append)
    after = _state(prober)
    same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    gone = all(parameter.grad is None for parameter in prober.model.parameters())
    probed, repeated = (json.loads(json.dumps(costs.dump())) for costs in (probed, repeated))
    if config.optim.update is Update.STEP:
        assert any(name.endswith("exp_avg") for name in before), "there are moments to lose"
    return same and gone, assumed.is_assumed, probed, repeated, sorted(set(phases))


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", "3", "{}", '{"fingerprint": "abc"}', "[" * 9999, '{"fingerprint": "abc", "model": {}}']
)
def test_damaged_costs_are_set_aside_and_made_again(tmp_path, caplog, damage):
    from efflaunch.training.step_planner import Costs

    costs = Costs(COST, 0.0, SimpleNamespace(), "arithmetic on data sheets", "abc", is_assumed=True)  # type: ignore[arg-type]
    (tmp_path / COSTS_FILE).write_text(json.dumps(costs.dump()))
    assert without_probe(costs, tmp_path) is not None
    (tmp_path / COSTS_FILE).write_text(damage)
    assert without_probe(costs, tmp_path) is None and without_probe(costs, tmp_path) is None
    assert "costs.json is damaged" in caplog.text and (tmp_path / f"{COSTS_FILE}.damaged").read_text() == damage


def test_training_is_left_as_it_was_and_a_second_attempt_does_not_probe(pool, tmp_path):
    for name, words in {"device": [], "host": ["optim.states=host"]}.items():
        folder = tmp_path / name
        folder.mkdir()
        answers = pool.run(_left_alone, [*ADAPTIVE, "parallel.probe_s=1", *words], str(folder), ranks=2)
        assert len({json.dumps(answer) for answer in answers}) == 1, "all ranks agree"
        same, assumed, probed, repeated, phases = answers[0]
        assert same and assumed and probed == repeated == json.loads((folder / COSTS_FILE).read_text())
        assert phases == ["probing empty micro-batches", "probing groups of 1", "probing groups of 2"]
        assert "before step 1" in probed["origin"]


def test_a_probe_is_left_out_where_backward_updates(pool, tmp_path):
    words = [*ADAPTIVE, "optim.update=backward", "optim.clip_mode=previous_norm"]
    ((same, _, probed, _, phases), _) = pool.run(_left_alone, words, str(tmp_path), ranks=2)
    assert same and not phases and not list(tmp_path.iterdir())
    assert probed["origin"].endswith("; not probed: with optim.update=backward a probe would move the optimizer's states")


def test_nothing_is_probed_where_nobody_asked(pool, tmp_path):
    for words in ([*ADAPTIVE, "parallel.probe_s=0"], TINY):
        ((same, assumed, probed, _, phases), _) = pool.run(_left_alone, words, str(tmp_path), ranks=2)
        assert same and assumed and not phases and not list(tmp_path.iterdir()) and "prob" not in probed["origin"]
