"""Profiles: fits against known coefficients, what they do to a cost model, files, and refusal of other hardware."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import yaml

from efflaunch.cluster.rates import Copies, MachineRates
from efflaunch.errors import ConfigError
from efflaunch.estimate.measured.find_rates import find_rates
from efflaunch.estimate.measured.profile import (
    Fit,
    FittedCollective,
    FittedDegree,
    Profile,
    ProfileKey,
    attention_units,
    find_profile,
    fit_of,
    least_squares,
    load_profiles,
    save_profile,
)
from efflaunch.parallel.sequence.cost import CostModel, DegreeCost
from efflaunch.tests.memory.settings import cluster

KEY = ProfileKey(hardware="NVIDIA H200", ranks="1 node x 8 ranks", model="llama, 2 layers", versions="torch 2.13.0")
FIT = Fit(samples=9, mean_error=0.03, r2=0.999, worst_error=0.06)


def profile(**changes):
    degrees = tuple(
        FittedDegree(degree=d, ulysses=1, attention_s=3e-9 / d, linear_s=1e-6 / d, exchange_s=2e-7 * (d > 1), fit=FIT) for d in (1, 2)
    )
    link = FittedCollective(kind="gather", degree=2, latency_s=1e-4, bytes_per_s=1e9, fit=FIT)
    fields = {"key": KEY, "degrees": degrees, "overhead_s": 0.01, "gather_s": 0.02, "empty_s": 0.05, "step_s": 0.1, "collectives": (link,)}
    return Profile(**{**fields, **changes})


def rates(**changes):
    copies = tuple(Copies(out=10e9 + rank, back=11e9, both_out=6e9, both_back=7e9) for rank in range(8))
    fields = {"device": "cuda", "ranks_per_node": 8, "link": copies, "device_update": 2e12, "host_update": 3e10}
    return MachineRates(**{**fields, **changes})


def arithmetic(windowed=()):
    degrees = tuple(
        DegreeCost(degree=d, ulysses=1, attention_s=1e-9 / d, linear_s=5e-6 / d, ring_s=1e-7 * (d > 1), windowed_s=windowed)
        for d in (1, 2, 4)
    )
    return CostModel(world_size=4, tokens_per_rank=1000, degrees=degrees, beta_s=7.0, gather_s=3.0, step_s=5.0)


def test_least_squares_finds_what_made_the_samples():
    truth = [2e-2, 3e-6, 4e-11]
    rows = [[1.0, n, n * n] for n in (64, 512, 4096, 32768, 262144)]
    result = least_squares(rows, [float(np.dot(row, truth)) for row in rows])
    assert result == pytest.approx(truth, rel=1e-6)


def test_least_squares_matches_scipy_on_noisy_samples_and_never_goes_negative():
    optimize = pytest.importorskip("scipy.optimize")
    generator = np.random.default_rng(0)
    for _ in range(50):
        rows = generator.random((12, 3))
        seconds = np.maximum(rows @ [1.0, 0.0, 0.5] + generator.normal(0, 0.05, 12), 0.05)
        result = least_squares(rows.tolist(), seconds.tolist())
        want, _ = optimize.nnls(rows / seconds[:, None], np.ones(12))
        ours, best = (np.square(rows @ x / seconds - 1).sum() for x in (np.array(result), want))
        assert min(result) >= 0 and ours <= best * 1.05


def test_fit_of_counts_relative_errors():
    fit = fit_of(np.array([1.1, 2.0]), np.array([1.0, 2.0]))
    assert (fit.samples, fit.worst_error, fit.mean_error) == (2, pytest.approx(0.1), pytest.approx(0.05))
    assert fit.r2 == pytest.approx(1 - 0.01 / 0.5)


def test_measured_values_replace_arithmetic_and_what_was_not_probed_stays():
    cost = profile().refine(arithmetic())
    n = np.array([100.0, 900.0])
    assert cost.sequence_s(n, 2) == pytest.approx(1.5e-9 * n * n + 7e-7 * n, rel=1e-12)
    assert cost.of(4) == arithmetic().of(4)
    assert (cost.beta_s, cost.gather_s, cost.step_s, cost.source) == (pytest.approx(0.03), pytest.approx(0.02), 0.1, "profile")


def test_windows_keep_their_proportion():
    before = arithmetic(windowed=((50, 4e-9),))
    cost = profile().refine(before)
    n = np.array([10.0, 50.0, 800.0])
    units = attention_units(before.of(1), n)
    assert units[0] == pytest.approx(100) and units[2] < 800**2
    assert cost.sequence_s(n, 1) == pytest.approx(3e-9 * units + 1e-6 * n, rel=1e-12)


def test_files_keep_every_bit_and_other_machines(tmp_path):
    path = tmp_path / "profile.yaml"
    other = profile(key=replace(KEY, hardware="NVIDIA A100"))
    for made in (other, profile(), profile(overhead_s=0.1 + 0.2)):
        save_profile(path, made)
    assert load_profiles(path) == [other, profile(overhead_s=0.1 + 0.2)]
    assert find_profile(None, KEY, tmp_path) == (profile(overhead_s=0.1 + 0.2), str(path))


def test_a_profile_of_other_hardware_is_refused_with_the_reason(tmp_path):
    save_profile(tmp_path / "mine.yaml", profile())
    here = replace(KEY, hardware="NVIDIA A100")
    with pytest.raises(ConfigError, match="hardware: NVIDIA H200, not NVIDIA A100") as caught:
        find_profile("mine.yaml", here, tmp_path)
    assert caught.value.exit_code == 93 and "efflaunch profile" in caught.value.hint


def test_the_default_file_of_other_hardware_is_left_aside_and_said_to_be(tmp_path):
    save_profile(tmp_path / "profile.yaml", profile())
    result, origin = find_profile(None, replace(KEY, versions="torch 9"), tmp_path)
    assert result is None and "versions: torch 2.13.0, not torch 9" in origin
    result, origin = find_profile(None, KEY, tmp_path / "elsewhere")
    assert result is None and "nothing was measured" in origin


def test_planning_elsewhere_takes_a_profile_of_any_hardware(tmp_path):
    save_profile(tmp_path / "profile.yaml", profile())
    assert find_profile(None, replace(KEY, hardware=""), tmp_path)[0] == profile()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "efflaunch_profile: true\nentries: []",
        "efflaunch_profile: 9\nentries: []",
        "efflaunch_profile: 1\nentries: [{key: {}}]",
        "efflaunch_profile: 2\nentries: [{rates: {link: []}}]",
        "a: [",
        "\x00",
    ],
)
def test_files_that_are_no_profile(tmp_path, text):
    (tmp_path / "profile.yaml").write_text(text)
    with pytest.raises(ConfigError, match="written by efflaunch profile"):
        find_profile("profile.yaml", KEY, tmp_path)
    # One that nobody named never stands in the way.
    result, origin = find_profile(None, KEY, tmp_path)
    assert result is None and "is damaged" in origin


def test_a_named_file_must_exist(tmp_path):
    with pytest.raises(ConfigError, match="no file"):
        find_profile("absent.yaml", KEY, tmp_path)


def test_rates_are_kept_and_old_files_have_none(tmp_path):
    path = tmp_path / "profile.yaml"
    measured = profile(rates=rates(disk=(Copies(out=1e9, back=2e9, both_out=0.5e9, both_back=0.6e9),), directory="/local"))
    save_profile(path, measured)
    assert load_profiles(path) == [measured]
    old = yaml.safe_load(path.read_text())
    del old["entries"][0]["rates"]
    path.write_text(yaml.safe_dump({**old, "efflaunch_profile": 1}))
    assert load_profiles(path) == [replace(measured, rates=None)], "format 1 serves for all else"
    assert find_rates(None, cluster(), "", None, tmp_path) is None
    save_profile(path, profile(key=replace(KEY, model="another"), rates=rates()))
    assert len(load_profiles(path)) == 2, "and may be added to"


def test_a_file_of_a_newer_version_says_so(tmp_path):
    (tmp_path / "profile.yaml").write_text("efflaunch_profile: 9\nentries: []")
    with pytest.raises(ConfigError, match="format 9, of a newer efflaunch than this one") as caught:
        load_profiles(tmp_path / "profile.yaml")
    assert "efflaunch profile with the arguments of this run" in caught.value.hint


def test_rates_are_of_the_machine_not_of_the_model(tmp_path):
    """Found for another model, by hardware and ranks a node; a disk is one directory's."""
    path = tmp_path / "profile.yaml"
    disk = (Copies(out=1e9, back=2e9, both_out=1e9, both_back=1e9),)
    plain, local = rates(device_update=1e12), rates(disk=disk, directory="/local")
    save_profile(path, profile(key=replace(KEY, model="plain"), rates=plain, taken="2026-02-02 00:00 UTC"))
    save_profile(path, profile(key=replace(KEY, model="with disk"), rates=local, taken="2026-01-01 00:00 UTC"))
    save_profile(path, profile())

    def result(machines=None, hardware="", offload_dir=None):
        measured = find_rates(None, machines or cluster(), hardware, offload_dir, tmp_path)
        return None if measured is None else measured.rates

    assert result() == plain and result(offload_dir="/local") == local and result(offload_dir="/other") == plain
    assert result(hardware="NVIDIA H200") == plain and result(hardware="NVIDIA A100") is None
    assert result(cluster(ranks_per_node=4)) is None and result(cluster(device=type(cluster().device)("cpu"))) is None
    measured = find_rates(None, cluster(), "", None, tmp_path)
    assert measured is not None and "measured of 2026-02-02 00:00 UTC on NVIDIA H200" in measured.source and str(path) in measured.source
    assert find_rates("absent.yaml", cluster(), "", None, tmp_path) is None
