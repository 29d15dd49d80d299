"""Use of the devices' peak by hand: causal attention, recomputation out of MFU and in HFU, and no share of a peak that is a guess."""

from __future__ import annotations

from dataclasses import replace

import pytest

from efflaunch.cluster.config import Device
from efflaunch.estimate.plan_inputs import PlanInputs
from efflaunch.estimate.timing.flops import sequence_flops
from efflaunch.estimate.timing.utilisation import model_flops, utilisation
from efflaunch.launcher.config.compose import compose


def inputs(*overrides: str, device: Device = Device.CUDA) -> PlanInputs:
    made = PlanInputs.of(compose(["+experiment=quickstart", "memory=recompute", *overrides]))
    return replace(made, cluster=replace(made.cluster, device=device, peak_flops=1e12))


def weights(s: PlanInputs) -> int:
    """Matrices of the tiny Llama: 4 layers of width 256, 8 heads, 4 of them keys', feed-forward 640; and the head."""
    layer = 256 * 256 * 2 + 2 * 256 * 128 + 3 * 256 * 640 + 2 * 256
    return 4 * layer + 4096 * 256


def test_model_flops_by_hand() -> None:
    s = inputs()
    # Norms' weights are counted as products too: a thousandth.
    by_hand = 6 * weights(s) * 1000 + 3 * 4 * (4 * 256 * 1000**2 / 2)
    assert model_flops(s, 1000) == pytest.approx(by_hand, rel=1e-3)


def test_shares_of_the_peak() -> None:
    s = inputs()
    used = utilisation(s, [1000, 3000], 2.0)
    assert used.tokens_per_s == 4000 / 2 / 4
    model = model_flops(s, 1000) + model_flops(s, 3000)
    assert used.mfu == pytest.approx(model / 2 / 4 / 1e12) and used.model_flops_per_s == pytest.approx(model / 8)
    hardware = sum(sum(sequence_flops(s, length)) for length in (1000, 3000))
    assert used.hfu == pytest.approx(hardware / 8 / 1e12) and used.hfu > used.mfu
    assert set(used.fields()) == {"device_tokens_per_s", "model_flops_per_s", "mfu", "hfu"}


def test_two_documents_attend_less_than_one() -> None:
    s = inputs()
    assert utilisation(s, [2000, 2000], 1.0).model_flops_per_s < utilisation(s, [4000], 1.0).model_flops_per_s


def test_what_is_kept_changes_hfu_alone() -> None:
    kept, recomputed = (utilisation(inputs(f"memory={name}"), [4000], 1.0) for name in ("keep", "recompute"))
    assert kept.mfu == recomputed.mfu and kept.hfu is not None and recomputed.hfu is not None
    assert kept.mfu is not None and kept.mfu < kept.hfu < recomputed.hfu
    # Attention's kernels make scores again in backward, whatever is kept.
    s = inputs("memory=keep")
    attention = 4 * (4 * 256 * 4000**2 / 2)
    assert kept.hfu - kept.mfu == pytest.approx(0.5 * attention / 4 / 1e12, rel=1e-3), s.policy


def test_cpus_have_no_peak() -> None:
    used = utilisation(inputs(device=Device.CPU), [1000], 1.0)
    assert used.mfu is None and used.hfu is None and set(used.fields()) == {"device_tokens_per_s", "model_flops_per_s"}
